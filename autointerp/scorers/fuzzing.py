"""Fuzzing: are the marked tokens those on which the feature fires? (Paulo et al. 2024, section 3.2)

Every silent window carries the marks of a firing one, so that a judge has to read the explanation.
"""

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from saekit.autointerp import prompts
from saekit.autointerp.explanation import Rule
from saekit.autointerp.scorers import binary
from saekit.autointerp.scorers.binary import Binary
from saekit.autointerp.scorers.detection import Detection

SYSTEM = (
    f"{prompts.TASK} In each example some words are marked with « and ». Decide whether the feature is active on all of "
    'the marked words. Answer with JSON: {"answers": [{"id": 1, "fires": true, "p": 0.9}, ...]}, one entry for each '
    "example in order, where fires is your verdict and p your probability that the feature is active on the marked words."
)


class Fuzzing(Detection):
    """Balanced accuracy of telling right marks from marks in silent windows; 0.5 is chance."""

    name, marked, system = "fuzzing", True, SYSTEM

    def execute(self, trials: Binary, rule: Rule) -> Float[ndarray, " n"]:
        """The smallest chance of any marked token."""
        strength = binary.judged(rule.strength(trials.examples.tokens))
        return np.where(trials.marks, strength, 1.0).min(1)
