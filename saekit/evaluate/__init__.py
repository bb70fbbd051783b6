"""Evaluations of a dictionary: one file and one line each.

The core suite reads any text; the others are ``suite(dictionary, model, texts, ...)`` with texts of which something is
said (:class:`saekit.evaluate.labelled.Texts`), and give a :class:`Report`.
"""

from saekit.evaluate.core import Report as Report
from saekit.evaluate.core import evaluate as evaluate
from saekit.evaluate.core import read_report as read_report
from saekit.evaluate.measure import Measure as Measure
from saekit.registry import Registry

SUITES = Registry(
    "suite",
    {
        "core": "saekit.evaluate.core:evaluate",
        "sparse_probing": "saekit.evaluate.probing:sparse_probing",
        "absorption": "saekit.evaluate.absorption:absorption",
        "scr": "saekit.evaluate.scr_tpp:spurious_removal",
        "unlearning": "saekit.evaluate.unlearning:unlearning",
        "ravel": "saekit.evaluate.ravel:disentanglement",
        "tpp": "saekit.evaluate.scr_tpp:targeted_perturbation",
    },
)
