"""Dictionaries of sequences: features that read what attention heads gather from all positions before them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.attention import Attention
from saekit.dictionaries.config import Config
from saekit.dictionaries.rows import Rows
from saekit.dictionaries.training import TrainState
from saekit.types import ActivationBatch, Codes, SaekitError

GATHERED = "gathered"  # what a batch's columns side by side go by
ENERGY = 0.99  # share of the variance of a head's values that its active subspace holds


class Sequences(Rows):
    """Rows of features behind attention patterns.

    ``encode`` takes ``[..., seq, d_in]``. Features are shared out evenly among the QK heads of ``wiring.patterns``,
    in order. Training batches are whole sequences: an :class:`ActivationBatch`, whose mask says which positions
    are learned from (all are looked at), or ``[batch, seq, columns]`` of which all are.
    """

    def __init__(self, config: Config, seed: int = 0):
        for choice in (config.selection, config.atoms):
            if choice[0] in REFUSED:
                raise SaekitError(
                    f"{choice[0]!r} with wiring {config.wiring[0]!r}: {REFUSED[choice[0]]}; choose another"
                )
        super().__init__(config, seed)
        self.attention: Attention | None = None  # the layer it begins from, until the data is known

    @property
    def context(self) -> int | None:
        """How long the sequences were that it was trained on, where that is known."""
        return self.card.get("data", {}).get("context")

    @property
    def n_qk(self) -> int:
        """How many QK heads the features are shared out among."""
        return self.wiring.patterns.config.n_qk

    @torch.no_grad()
    def begin_from(self, attention: Attention) -> None:
        """Take the QK heads of a layer, biases and all; values follow when data is known (see :meth:`prepare`).

        With more QK heads than the layer has, each of the layer's is copied to neighbours.
        """
        own, theirs = self.wiring.patterns, attention.patterns
        for name in ("W_Q", "b_Q", "W_K", "b_K"):
            mine, given = getattr(own, name), getattr(theirs, name)
            mine.copy_(given.repeat_interleave(len(mine) // len(given), 0))
        for name in ("frequencies", "norm_q", "norm_k"):
            if getattr(own, name) is not None:
                getattr(own, name).copy_(getattr(theirs, name))
        self.wiring.natural.fill_(True)
        if isinstance(getattr(self.atoms, "weight", None), nn.Parameter):  # a control's atoms stay random
            self.attention = attention

    def read(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "rows head d_in"]:
        """What every QK head has gathered at each position, in normalised space."""
        if x.ndim < 2:
            raise SaekitError(
                f"the input has shape {tuple(x.shape)}; give sequences, [..., seq, d_in = {self.d_in}]"
            )
        return self.wiring.mix(super().read(x).view(-1, *x.shape[-2:])).movedim(0, 1)

    def _inside(self, codes: Codes, x: Tensor) -> Float[Tensor, "entry d_in"]:
        """What each code's head has gathered."""
        return self.read(x)[codes.row_ids(), codes.indices.long() // (self.n_features // self.n_qk)]

    def rows_of(self, batch: "Float[Tensor, '*shape columns'] | ActivationBatch") -> Tensor:
        """The unmasked positions as rows."""
        if isinstance(batch, ActivationBatch):
            return batch.rows(GATHERED) if GATHERED in batch.activations else super().rows_of(batch)
        return super().rows_of(batch.flatten(0, -2))

    def gather(self, batches: "Sequence[Float[Tensor, 'batch *seq columns'] | ActivationBatch]") -> Any:
        """Batches of whole sequences as one, on the dictionary's device."""
        parts, masks = [], []
        for batch in batches:
            if isinstance(batch, ActivationBatch):
                check_padding(batch)
                points = self._points_of(batch)
                part, mask = torch.cat([batch.activations[p] for p in points], -1), batch.mask
            else:
                part, mask = batch, torch.ones(batch.shape[:-1], dtype=torch.bool)
            if part.ndim != 3 or part.shape[2] != self.wiring.columns:
                raise SaekitError(
                    f"batch has shape {tuple(part.shape)}; expected whole sequences, [batch, seq, {self.wiring.stated}]"
                )
            parts.append(part)
            masks.append(mask)
        whole = torch.cat(parts).to(self.device, self.dtype)
        return ActivationBatch({GATHERED: whole}, torch.cat(masks).to(self.device))

    def pairs(self, batch: "Float[Tensor, 'batch *seq columns'] | ActivationBatch") -> tuple[Tensor, Tensor]:
        """What is encoded and what is written, at the unmasked positions in normalised space."""
        gathered = isinstance(batch, ActivationBatch) and GATHERED in batch.activations
        whole: Any = batch if gathered else self.gather([batch])
        read, target = self.wiring.split(whole.activations[GATHERED])
        return self._some(self.read(read), whole.mask), self.norm_out(target[whole.mask])

    @staticmethod
    def _some(gathered: Float[Tensor, "rows head d_in"], mask: Bool[Tensor, "batch seq"]) -> Tensor:
        """The unmasked positions, each head's rows contiguous by themselves, as encoding wants them."""
        return gathered.movedim(1, 0)[:, mask.flatten()].movedim(0, 1)

    def set_normalisation(self, rows: Any) -> None:
        """Estimate mean and scale of what is read and written; heads that were copied go on looking as they did."""
        super().set_normalisation(rows)
        if self.wiring.natural:
            self.wiring.normalised(self.norm_in)

    @property
    def needs_data(self) -> bool:
        """Whether :meth:`prepare` has more to do than to fit the normalisation."""
        return self.attention is not None or super().needs_data

    @torch.no_grad()
    def prepare(self, batch: Any) -> None:
        """What depends on data before the first step; where it begins from a layer, the values too."""
        whole = batch if isinstance(batch, ActivationBatch) else self.gather([batch])
        if not self.normalised:
            self.set_normalisation([whole])
        if self.attention is not None:
            self._take_values(*self.pairs(whole))
            self.attention = None
        super().prepare(whole)

    def _take_values(self, x: Float[Tensor, "rows head d_in"], y: Float[Tensor, "rows d_out"]) -> None:
        """Begin features as random directions of what the layer's heads move, all at the scale that fits best.

        A feature reads a direction of its head's values, drawn from the subspace that holds 99 % of their
        variance (Wang et al. 2025, 2508.16929), and writes where the layer sends that direction. While biases
        are 0 codes are proportional to the scale, so the best one has a closed form.
        """
        a = self.attention
        assert a is not None and self.encoder is not None  # free of its atoms, since spaces differ
        generator = torch.Generator().manual_seed(self.seed)
        each, copies = self.n_features // self.n_qk, self.n_qk // len(a.W_O)
        for head in range(self.n_qk):
            source = head // copies
            W_V = a.W_V[source * len(a.W_V) // len(a.W_O)].to(x)
            W_V = self.norm_in.unfold(W_V)[0].to(x)
            values = (x[:, head] - x[:, head].mean(0)) @ W_V.T
            spread, basis = torch.linalg.eigh((values.T @ values).double())
            share = spread.flip(0).clamp(min=0).cumsum(0) / spread.clamp(min=0).sum().clamp(min=1e-300)
            basis = basis.flip(1)[:, : int((share < ENERGY).sum()) + 1].to(x)
            drawn = torch.randn(each, basis.shape[1], generator=generator).to(x) @ basis.T
            own = slice(head * each, (head + 1) * each)
            self.encoder[own] = nn.functional.normalize(drawn @ W_V, dim=-1)
            written = drawn @ a.W_O[source].T.to(x)
            self.atoms.weight[own] = nn.functional.normalize(self.norm_out.normalised(written), dim=-1)
        if hasattr(self.selection, "prepare"):
            self.selection.prepare(x, self.encoder, self.b_enc)
        # by the training rule: one that learns a threshold knows none yet
        codes = self.select(x, TrainState()).codes.detach()
        hat = self.norm_out(self.decode(codes)) - self.b_dec
        scale = (hat * y).sum() / hat.square().sum().clamp(min=1e-30)
        if scale > 0:
            self.encoder.mul_(scale)

    @torch.no_grad()
    def folded(self, selection: tuple[str, Any], weight: Tensor, bias: Tensor, state: dict) -> "Sequences":
        """As of any rows; the QK heads read raw activations too."""
        out = super().folded(selection, weight, bias, state)
        assert isinstance(out, Sequences)  # it is of its own kind
        self.wiring.fold_into(out.wiring, self.norm_in)
        return out

    def codes_of(self, batch: ActivationBatch, points: Sequence[str] | None = None) -> Codes:
        """Codes of the unmasked positions, read at ``points``; every position is looked at."""
        check_padding(batch)
        x = torch.cat([batch.activations[point] for point in points or self.reads], -1).to(self.device)
        chosen = self._some(self.read(x), batch.mask.to(self.device))
        return self.selection(chosen, self._encoder_rows(), self.b_enc)

    def _check_whole(self, x: Tensor) -> None:
        if x.ndim != 3 or x.shape[2] != self.d_in:
            raise SaekitError(f"x has shape {tuple(x.shape)}; expected [batch, seq, d_in = {self.d_in}]")

    def patterns(self, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch head query source"]:
        """Where each QK head looks; feature f is of head ``f // (n_features / n_qk)``."""
        self._check_whole(x)
        x = x.to(self.device, self.dtype)
        return self.wiring.patterns(self.norm_in(x.flatten(0, 1)).view(x.shape))

    @torch.no_grad()
    def looking(self, x: Float[Tensor, "batch seq d_in"]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """:meth:`sources` of single features at single places: ``(features, rows, queries)``, all [n], to [n, source]."""
        self._check_whole(x)
        normalised = self.norm_in(x.to(self.device, self.dtype).flatten(0, 1)).view(x.shape)
        patterns, each = self.wiring.patterns(normalised), self.n_features // self.n_qk

        @torch.no_grad()
        def at(features: Tensor, rows: Tensor, queries: Tensor) -> Tensor:
            out = patterns[rows, features // each, queries]
            for row in rows.unique():
                here = rows == row
                chosen = features[here]
                out[here] *= self._encoder_rows()[chosen] @ normalised[row].T + self.b_enc[chosen, None]
            return out

        return at

    @torch.no_grad()
    def sources(
        self, x: Float[Tensor, "batch seq d_in"], features: Int[Tensor, " chosen"]
    ) -> Float[Tensor, "batch chosen query source"]:
        """What each source position adds to the pre-activation of some features at every query.

        ``A_ts (w x_s + b)``, the bias shared out as attention is, so that the sources of a query add up to the
        pre-activation.
        """
        self._check_whole(x)
        features = torch.as_tensor(features, device=self.device)
        wrong = features[(features < 0) | (features >= self.n_features)]
        if len(wrong):
            raise SaekitError(f"features name {int(wrong[0])}, which is not in 0..{self.n_features - 1}")
        weight, bias = self._encoder_rows()[features], self.b_enc[features]
        x = self.norm_in(x.to(self.device, self.dtype).flatten(0, 1)).view(x.shape)
        values = torch.einsum("bsi,fi->bfs", x, weight) + bias[:, None]
        heads = features // (self.n_features // self.n_qk)
        return self.wiring.patterns(x)[:, heads] * values[:, :, None]


def check_padding(batch: ActivationBatch) -> None:
    """Raise where padding (of no document, by the attention mask) comes before text: features would look at it.

    What ``mask`` alone leaves out, as a BOS or a role of a chat, is text: the model looks at it, and so do they.
    """
    if batch.documents is None:
        return
    real = batch.documents >= 0
    late = (real[:, 1:] & ~real[:, :-1]).any(1)
    if late.any():
        row = int(batch.documents[late].max(1).values.min())
        raise SaekitError(
            f"attention_mask has padding before text (row {row}), which features that look back would look at; pad on the right"
        )


REFUSED = {
    **dict.fromkeys(
        ("pursuit", "omp", "iterative", "unrolled"),
        "it would look for atoms in what is read, and attention stands between the two",
    ),
    "switch": "its router reads one input, and every QK head gathers one",
}
