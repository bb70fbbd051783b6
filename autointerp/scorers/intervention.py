"""Intervention: does what the feature makes the model say fit the explanation? (Paulo et al. 2024, section 3.3)

The feature's direction is added to what the model computes from the end of a prompt on, as strongly as moves the next token's
distribution by one nat, and the model continues. A random direction and another feature's do the same at the same
divergence. Which of the three sets of continuations is the feature's, is the question; the sets bear no names.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy import ndarray
from torch import Tensor

from saekit.autointerp import prompts, stats
from saekit.autointerp.explanation import Rule, Score
from saekit.autointerp.negatives import silent
from saekit.autointerp.prompts import Reader
from saekit.autointerp.requests import Request
from saekit.autointerp.windows import Windows
from saekit.dictionaries import Dictionary
from saekit.hooks import intervene
from saekit.models import Model
from saekit.types import Codes, SaekitError

KL, NEAR, STEPS = 1.0, 0.1, 20  # nats that are asked for, how near, and bisections at most
TOKENS, SETS, SHOWN = 12, 3, 2  # of a continuation; of a question; continuations of a set
ARMS = ("feature", "random direction", "random feature")
SYSTEM = (
    f"{prompts.TASK} A language model was made to write while one feature was held active. You see three sets of what it "
    'wrote, with different features active. Find the set that fits the explanation. Answer with JSON: {"set": 2}, its number.'
)


@dataclass(frozen=True)
class Written:
    """``texts`` [arm, question, continuation, token] of ids; ``order`` [question, 3] says which arm stands at each place.

    ``divergence`` is what each arm reached, in nats.
    """

    texts: Int64[ndarray, "3 question 2 token"]
    order: Int64[ndarray, "question 3"]
    divergence: Float[ndarray, " 3"]

    @property
    def truth(self) -> Int64[ndarray, " question"]:
        """The place of the feature's set."""
        return self.order.argmin(1)


@cache
def _schema() -> type:
    from pydantic import BaseModel, ConfigDict, Field

    class Chosen(BaseModel):
        model_config = ConfigDict(extra="forbid")
        set: int = Field(ge=1, le=SETS)

    return Chosen


class Intervention:
    """Share of questions in which the set that the feature wrote is found; one in three is chance."""

    name, metric, by = "intervention", "accuracy", "judge"
    untried = (
        "is alone in the dictionary, writes nothing, or moves the model by no strength as far as is asked for"
    )

    def __init__(self, model: Model, dictionary: Dictionary):
        if not model.predicts_tokens:
            raise SaekitError(
                f"model {model.name!r} writes no text, so interventions can't be scored; leave the scorer out"
            )
        if len(dictionary.writes) != 1:
            raise SaekitError(
                f"the dictionary writes {len(dictionary.writes)} places, and interventions are scored at one; leave the scorer out"
            )
        self.model, self.dictionary = model, dictionary

    def trials(self, windows: Windows, feature: int, side: str, n: int, seed: int) -> "Written | None":
        """An eighth of ``n`` questions; None where a direction doesn't move the model enough, or there is no other feature."""
        begun = silent(windows, feature, side, SHOWN * max(3, n // 8), ("random",), seed)
        alive = np.flatnonzero(windows.firings.counts)
        others = alive[alive != feature]
        questions = len(begun) // SHOWN
        if not questions or not len(others):
            return None
        rng = np.random.default_rng([windows.seed, seed, feature, 7])
        own = self._direction(feature)
        noise = torch.from_numpy(rng.standard_normal(len(own))).to(own)
        arms = [own, noise, self._direction(int(rng.choice(others)))]
        ids = torch.from_numpy(begun.tokens[: questions * SHOWN])
        texts, reached = [], []
        for arm in arms:
            strength, divergence = self._strength(ids, arm / arm.norm())
            if not abs(divergence - KL) <= NEAR:  # NaN too: of a direction of zeros
                return None
            texts.append(self._continued(ids, strength * arm / arm.norm()).reshape(questions, SHOWN, -1))
            reached.append(divergence)
        order = np.stack([rng.permutation(SETS) for _ in range(questions)])
        return Written(np.stack(texts), order, np.array(reached))

    def _direction(self, feature: int) -> Float[Tensor, " d"]:
        d = self.dictionary
        x = torch.zeros(1, d.d_in, device=d.device, dtype=d.dtype)
        one = torch.tensor([[feature]], device=d.device)
        on, off = (
            Codes.from_rectangular(
                one, torch.tensor([[value]], device=d.device, dtype=d.dtype), d.n_features, (1,)
            )
            for value in (1.0, 0.0)
        )
        with torch.no_grad():
            return (d.decode(on, x) - d.decode(off, x))[0]

    def _steered(self, vector: Tensor, run: Callable[[], Tensor]) -> Tensor:
        """What a run gives while a vector is added from the prompt's last position on."""

        def add(x: Tensor) -> Tensor:
            new = x.clone()
            new[:, -1] += vector.to(x)
            return new

        with torch.no_grad(), intervene([(self.model.site(self.dictionary.writes[0]), add)]):
            return run()

    def _strength(self, ids: Int64[Tensor, "prompt seq"], unit: Float[Tensor, " d"]) -> tuple[float, float]:
        """How much of a direction moves the next token by one nat on average, and how far it does, by bisection."""

        def forward() -> Tensor:
            inputs = self.model.inputs(ids, torch.ones_like(ids, dtype=torch.bool))
            return self.model.logits(inputs)[:, -1].float().log_softmax(-1)

        with torch.no_grad():
            clean = forward()

        def divergence(strength: float) -> float:
            moved = self._steered(strength * unit, forward)
            return float((clean.exp() * (clean - moved)).sum(-1).mean())

        low, high = 0.0, 1.0
        while (found := divergence(high)) < KL and high < 2**STEPS:
            low, high = high, 2 * high
        middle = high
        for _ in range(STEPS):
            if abs(found - KL) <= NEAR:
                break
            middle = (low + high) / 2
            found = divergence(middle)
            low, high = (middle, high) if found < KL else (low, middle)
        return middle, found

    def _continued(
        self, ids: Int64[Tensor, "prompt seq"], vector: Float[Tensor, " d"]
    ) -> Int64[ndarray, "prompt token"]:
        """Greedy continuations; a pass behind cached keys has one position, so the last is the one that is written."""
        out = self._steered(vector, lambda: self.model.generate(ids, TOKENS, min_new_tokens=TOKENS))
        return out[:, ids.shape[1] :].cpu().numpy()

    def requests(self, trials: Written, text: str, unit: str, reader: Reader) -> list[Request]:
        """One prompt for each question."""
        out = []
        for i, places in enumerate(trials.order):
            lines = [" … ".join(reader.line(one) for one in trials.texts[arm, i]) for arm in places]
            sets = "\n\n".join(f"Set {place}: {line}" for place, line in enumerate(lines, 1))
            out.append(Request(f"{unit} {self.name} {i + 1}", prompts.chat(SYSTEM, prompts.explained(text), sets), _schema(), max_tokens=64))  # fmt: skip
        return out

    def read(self, trials: Written, values: Sequence[Any]) -> Float[ndarray, " question"]:
        """Places by the answers, from 0."""
        return np.array([np.nan if value is None else value.set - 1.0 for value in values])

    def execute(self, trials: Written, rule: Rule) -> Float[ndarray, " question"]:
        """The set whose continuations have the most tokens by the rule; no guess where none of them has any."""
        arms, questions, _, width = trials.texts.shape
        strength = np.asarray(rule.strength(trials.texts.reshape(-1, width)), np.float64)
        each = strength.reshape(arms, questions, -1).sum(2)  # [arm, question]
        placed = np.take_along_axis(each.T, trials.order, 1)
        best = placed.argmax(1).astype(float)
        return np.where(np.ptp(placed, axis=1) > 0, best, -1.0)

    def measure(self, trials: Written, guesses: Float[ndarray, " question"], seed: int) -> Score:
        """The share found, with Wilson's interval; where there is no guess (-1) a third counts."""
        known = np.isfinite(guesses)
        right = np.where(guesses == -1, 1 / SETS, guesses == trials.truth)
        n = int(known.sum())
        low, high = stats.wilson(float(right[known].sum()), n) if n else (None, None)
        return Score(self.name, self.metric, float(right[known].mean()) if n else None, low, high, n, float(np.where(known, right, 0).mean()))  # fmt: skip

    def blind(self, learnt: "Written | None", trials: Written, reader: Reader) -> dict[str, float | None]:
        """The set that repeats itself the most: strong steering shows in that, whatever the feature."""
        distinct = np.array(
            [
                [len(np.unique(trials.texts[arm, i])) for arm in places]
                for i, places in enumerate(trials.order)
            ]
        )
        return {"most repetitive": float((distinct.argmin(1) == trials.truth).mean())}
