"""Detection: which of these texts does the feature fire in? (Paulo et al. 2024, section 3.2)"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from numpy import ndarray

from saekit.autointerp import prompts
from saekit.autointerp.explanation import Rule, Score
from saekit.autointerp.prompts import Reader
from saekit.autointerp.requests import Request
from saekit.autointerp.scorers import binary
from saekit.autointerp.scorers.binary import Binary
from saekit.autointerp.windows import Windows

SYSTEM = (
    f"{prompts.TASK} For each example, decide whether the feature is active on any of its tokens. "
    'Answer with JSON: {"answers": [{"id": 1, "fires": true, "p": 0.9}, ...]}, one entry for each example in order, '
    "where fires is your verdict and p your probability that the feature is active."
)
TOKENS = 24  # of an entry of the answer


class Detection:
    """Balanced accuracy of telling windows in which the feature fires from silent ones; 0.5 is chance."""

    name, metric, by, marked, system = "detection", "balanced accuracy", "judge", False, SYSTEM

    def trials(self, windows: Windows, feature: int, side: str, n: int, seed: int) -> "Binary | None":
        """Up to ``n`` firing and as many silent windows; None where there are too few."""
        return binary.drawn(windows, feature, side, n, seed, self.marked)

    def lines(self, trials: Binary, reader: Reader) -> list[str]:
        """The examples as they are shown."""
        pairs = zip(trials.examples.tokens, trials.marks, strict=True)
        return [reader.line(tokens, marks) for tokens, marks in pairs]

    def requests(self, trials: Binary, text: str, unit: str, reader: Reader) -> list[Request]:
        """Prompts of up to eight examples."""
        lines = self.lines(trials, reader)
        return [
            Request(
                f"{unit} {self.name} {i}",
                prompts.chat(self.system, prompts.explained(text), prompts.numbered([lines[at] for at in batch])),
                binary.answers_schema(), max_tokens=64 + TOKENS * len(batch), check=binary.complete(len(batch)),
            )
            for i, batch in enumerate(trials.batches(), 1)
        ]  # fmt: skip

    def read(self, trials: Binary, values: Sequence[Any]) -> Float[ndarray, " n"]:
        """Chances by the answers."""
        return binary.read(trials, values)

    def execute(self, trials: Binary, rule: Rule) -> Float[ndarray, " n"]:
        """The largest chance of any token, from 0.5 up where the rule says that one fires."""
        return binary.judged(rule.strength(trials.examples.tokens)).max(1)

    def measure(self, trials: Binary, guesses: Float[ndarray, " n"], seed: int) -> Score:
        """The score."""
        return binary.measure(self.name, self.metric, trials, guesses)

    def blind(self, learnt: "Binary | None", trials: Binary, reader: Reader) -> dict[str, float | None]:
        """What marks and lengths give away."""
        return binary.blind(learnt, trials, reader.sizes)
