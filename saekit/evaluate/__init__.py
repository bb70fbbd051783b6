"""Evaluations of a dictionary: one file and one line each."""

from saekit.evaluate.core import Report as Report
from saekit.evaluate.core import evaluate as evaluate
from saekit.evaluate.core import read_report as read_report
from saekit.evaluate.measure import Measure as Measure
from saekit.registry import Registry

SUITES = Registry("suite", {"core": "saekit.evaluate.core:evaluate"})
