"""Surprisal: does a description make a base language model expect the texts in which the feature fires? (Paulo et al. 2024)"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from saekit.autointerp.prompts import Reader
from saekit.autointerp.scorers.binary import Binary
from saekit.autointerp.scorers.embedding import Embedding
from saekit.models import Model, load_model
from saekit.types import SaekitError

TAIL = "\n# Sentences:\n"
FRAME = "# Description: {}" + TAIL
NEUTRAL = "various unrelated sentences"  # what is subtracted, so that texts that are easy anyway don't count
ROWS = 40  # texts of a forward pass


class Surprisal(Embedding):
    """AUC of how much lower a text's loss is behind the description than behind a neutral one; 0.5 is chance.

    ``model`` is a causal language model (by default code-lm), the one that is explained or another. Of a text that takes
    more than half of its context the beginning counts, so that the description has a place.
    """

    name = "surprisal"

    def __init__(self, model: Any = "code-lm"):
        self._given = model
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        """The language model, loaded when it is first needed."""
        if self._model is None:
            self._model = load_model(self._given)
            if self._model.tokenizer is None or not self._model.predicts_tokens:
                raise SaekitError(
                    f"model {self._model.name!r} is no causal language model with a tokenizer; give surprisal one, as 'code-lm'"
                )
        return self._model

    def compute(self, trials: Binary, text: str, reader: Reader) -> Float[ndarray, " n"]:
        """Losses behind the neutral description less those behind this one, nats a token."""
        if not text.strip():
            return np.zeros(len(trials.examples))
        lines = self.lines(trials, reader)
        return self._losses(NEUTRAL, lines) - self._losses(" ".join(text.split()), lines)

    @torch.no_grad()
    def _losses(self, description: str, lines: Sequence[str]) -> Float[ndarray, " n"]:
        """Mean cross-entropy of each line's tokens behind a description."""
        m, out = self.model, []
        tail = m.tokenizer(TAIL)["input_ids"]
        for at in range(0, len(lines), ROWS):
            context = m.context or 10**9
            # verbose=False: what is too long is cut, and needs no warning
            ids = [
                m.tokenizer(line or " ", verbose=False)["input_ids"][: context // 2]
                for line in lines[at : at + ROWS]
            ]
            most = context - max(map(len, ids))
            before = m.tokenizer(FRAME.format(description))["input_ids"]
            if len(before) > most:  # a description that fills the context is cut, and its frame kept
                before = [*before[: max(0, most - len(tail))], *tail][:most]
            width = len(before) + max(map(len, ids))
            rows, real = (
                torch.zeros(len(ids), width, dtype=torch.int64),
                torch.zeros(len(ids), width, dtype=torch.bool),
            )
            for i, own in enumerate(ids):
                rows[i, : len(before) + len(own)] = torch.tensor([*before, *own])
                real[i, : len(before) + len(own)] = True
            scores = m.logits(m.inputs(rows, real))[:, len(before) - 1 : -1].float().log_softmax(-1).cpu()
            loss = -scores.gather(2, rows[:, len(before) :, None])[..., 0]
            kept = real[:, len(before) :]
            out.append((loss * kept).sum(1) / kept.sum(1))
        return torch.cat(out).double().numpy()
