"""Dictionaries of rows: four choices, of which every common architecture is a combination."""

import copy
import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.atoms import ATOMS
from saekit.dictionaries.config import Config
from saekit.dictionaries.dictionary import Dictionary
from saekit.dictionaries.objective import OBJECTIVES
from saekit.dictionaries.selection import SELECTIONS
from saekit.dictionaries.training import Forward, Selected, TrainState, drawn_by
from saekit.kernels import sparse_decode
from saekit.types import ActivationBatch, Codes, Loss, SaekitError

BOUND = {
    "sequences": "are shared out evenly among attention heads",
    "transforms": "are maps with atoms of their own",
}


class Rows(Dictionary):
    """A dictionary whose codes are rows of features: one encoder, one decoder, one selection.

    ``mask`` is that of dedicated features: the columns that each may read and write; None for all.
    """

    mask: Tensor | None

    def __init__(self, config: Config, seed: int = 0):
        super().__init__(config, seed)
        n, d_out = config.n_features, self.d_out
        with drawn_by(seed):
            self.selection = SELECTIONS[config.selection[0]](config.selection[1], n, self.d_in)
        self.terms = nn.ModuleDict({name: OBJECTIVES[name](c, n) for name, c in config.objective})
        generator = torch.Generator().manual_seed(seed)
        own = self.selection.mask(n, self.d_in) if hasattr(self.selection, "mask") else None
        self.register_buffer("mask", self.wiring.mask(n) if own is None else own, persistent=False)
        directions = torch.randn(self.n_atoms, d_out, generator=generator)
        if self.mask is not None:
            directions = directions * self.mask
        directions = nn.functional.normalize(directions, dim=-1)
        self.atoms = ATOMS[config.atoms[0]](config.atoms[1], directions, generator)
        tied, trained = self.atoms.tied, self.atoms.trained
        self.encoder = None if tied else nn.Parameter(self._encoder_start(directions, n, generator))
        biased = trained and not self.encoder_unit
        reads_bias = biased and getattr(self.selection, "biased", True)
        self.b_enc = nn.Parameter(torch.zeros(n), requires_grad=reads_bias)
        self.b_dec = nn.Parameter(torch.zeros(d_out), requires_grad=biased)

    def _encoder_start(self, directions: Tensor, n: int, generator: torch.Generator) -> Tensor:
        # an encoder that starts as the decoder's transpose avoids most early deaths (Gao et al. 2024)
        if self.wiring.same_space:
            return directions.clone()
        return nn.functional.normalize(torch.randn(n, self.d_in, generator=generator), dim=-1)

    @property
    def n_atoms(self) -> int:
        """Rows of the decoder: one for each feature, unless features have several."""
        return self.n_features

    def expanded(self, codes: Codes, x: Float[Tensor, "rows *blocks d_in"] | None) -> Codes:
        """Codes of the atoms, from those of the features and the input in normalised space: the same, unless features have several."""
        return codes

    @property
    def encoder_unit(self) -> bool:
        """Whether encoder rows have norm 1 and there are no biases, as a pursuit needs."""
        return getattr(self.selection, "unit_encoder", False)

    @property
    def W_enc(self) -> Float[Tensor, "d_in feature"]:
        """Encoder weights in normalised space, as a view of the stored [n_features, d_in]."""
        return self._encoder_rows().T

    @property
    def W_dec(self) -> Float[Tensor, "feature d_out"]:
        """Decoder weights in normalised space: row i is what feature i writes."""
        return self.atoms.rows()

    def _encoder_rows(self) -> Tensor:
        return self.atoms.rows() if self.encoder is None else self.encoder

    def encode(self, x: Float[Tensor, "*shape d_in"]) -> Codes:
        """Codes by the inference rule: each row (or sequence) by itself."""
        codes = self.selection(self.read(x), self._encoder_rows(), self.b_enc)
        return dataclasses.replace(codes, shape=tuple(x.shape[:-1]))

    @torch.no_grad()
    def read_by(
        self, codes: Codes, x: Float[Tensor, "*shape d_in"]
    ) -> "tuple[Float[Tensor, 'entry d_in'], Float[Tensor, ' entry']]":
        """What each code reads, with the selection as it is: ``(w, b)`` with ``value = w x + b``.

        Of sequences x is what the feature's head has gathered at the code's position. Codes that are constants
        read nothing.
        """
        at = codes.indices.long()
        weight, bias = self._encoder_rows()[at], self.b_enc[at]
        if hasattr(self.selection, "read_by"):
            weight, bias = self.selection.read_by(codes, self._encoder_rows())
        elif hasattr(self.selection, "tangent"):
            weight, bias = self.selection.tangent(codes, self._inside(codes, x), self._encoder_rows())
        else:
            before = (weight * self._inside(codes, x)).sum(1) + bias
            bias = bias + (codes.values - before)  # what rounds otherwise
        rows = self._raw(x)[codes.row_ids()] if self.norm_in.by_rows else None
        weight, shift = self.norm_in.fold(weight, rows)
        return weight.to(self.dtype), (shift + bias).to(self.dtype)

    def _raw(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "rows d_in"]:
        return x.reshape(-1, self.d_in).to(self.dtype)

    def _inside(self, codes: Codes, x: Tensor) -> Float[Tensor, "entry d_in"]:
        """What each code's encoder row is multiplied with."""
        return self.read(x)[codes.row_ids()]

    def written_by(self, codes: Codes, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "entry d_out"]:
        """What each code writes, in the units of the model; with b_dec (and what is passed on) the output."""
        written = self.norm_out.directions(self.atoms.rows()[codes.indices.long()] * codes.values[:, None])
        if self.norm_out.by_rows:
            written = written * self.norm_out.statistics(self._raw(x))[1][codes.row_ids()]
        return written

    def decode(
        self, codes: Codes, x: Float[Tensor, "*shape d_in"] | None = None
    ) -> Float[Tensor, "*shape d_out"]:
        """What the codes write, in the units of the model; ``x`` is for wirings that pass input through, and for rows with units of their own."""
        if codes.n_features != self.n_features:
            raise SaekitError(f"codes are of {codes.n_features} features, and the dictionary has {self.n_features}; give its own")  # fmt: skip
        passes = self.wiring.skip is not None or self.wiring.kind == "transforms"
        if passes and x is None:
            raise SaekitError("x is not given, and this dictionary passes its input on; decode(codes, x)")
        read = self.read(x) if passes and x is not None else None
        c = self.expanded(codes, read)
        y = sparse_decode(c.offsets, c.indices, c.values, self.atoms.rows()) + self.b_dec
        if self.wiring.skip is not None and x is not None and read is not None:
            y = y + self._passed(x, read)
        raw = self._raw(x) if self.norm_out.by_rows and x is not None else None
        return self.norm_out.invert(y, raw).view(*codes.shape, self.d_out)

    def _passed(self, x: Tensor, read: Tensor) -> Tensor:
        """What the skip writes: of normalised rows, but of raw ones where only the features' are by their own statistics."""
        return (self._raw(x) if self.norm_in.by_rows else read) @ self.wiring.skip.T

    def pairs(self, batch: "Float[Tensor, 'batch columns'] | ActivationBatch") -> tuple[Tensor, Tensor]:
        """What is encoded and what is written, in normalised space."""
        read, target = self.wiring.split(self.rows_of(batch))
        x = self.read(read)
        return x, (x if target is read else self.norm_out(target.to(x.dtype)))

    def loss(
        self, batch: "Float[Tensor, 'batch *seq columns'] | ActivationBatch", state: TrainState | None = None
    ) -> Loss:
        """The training loss of a batch of rows (or of the unmasked rows of an ActivationBatch)."""
        (x, y), state = self.pairs(batch), state or TrainState()
        skip = self.wiring.skip
        passed = None if skip is None else self._passed(self.wiring.split(self.rows_of(batch))[0], x)
        selected = self.select(x, state)
        terms, forward = self.judge(x, y if passed is None else y - passed, selected, state, passed)
        assert forward.squared is not None  # set by the term that fits the data
        fvu = forward.squared.sum() / (y - y.mean(0)).square().sum()
        return Loss(torch.stack(list(terms.values())).sum(), terms, selected.codes.detach(), fvu.detach())

    def select(self, x: Float[Tensor, "batch *blocks d_in"], state: TrainState) -> Selected:
        """Codes of a training batch in normalised space, with what the terms need beside them."""
        picks = (term.picks(self.d_out) for term in self.terms.values() if hasattr(term, "picks"))
        k_aux = max(picks, default=0)
        n_dead = int(state.dead.sum()) if k_aux and state.dead is not None else 0
        return self.selection.train_codes(x, self._encoder_rows(), self.b_enc, state, min(k_aux, n_dead))

    def judge(
        self, x: Float[Tensor, "batch *blocks d_in"], y: Float[Tensor, "batch d_out"], selected: Selected,
        state: TrainState, passed: Tensor | None = None, error: Tensor | None = None,
    ) -> tuple[dict[str, Tensor], Forward]:  # fmt: skip
        """The terms of the objective for a selection; ``y`` is what the features have to write.

        Where ``error`` is given, the fit has been judged already, and the other terms are left.
        """
        forward = Forward(
            x, y, selected, self.atoms.rows(), self._encoder_rows(), self.b_dec, state, self.atoms.unit,
            self.norm_out.invert, passed, self.wiring.parts_out, error=error,
        )  # fmt: skip
        judged = {name: term for name, term in self.terms.items() if error is None or not term.fit}
        return {name: term(forward) for name, term in judged.items()}, forward

    def unit_weights(self) -> list[Tensor]:
        """The weights whose rows an optimizer has to keep on the sphere."""
        encoder = [self.encoder] if self.encoder_unit and self.encoder is not None else []
        return [*([self.atoms.weight] if self.atoms.unit else []), *encoder]

    @torch.no_grad()
    def after_step(self) -> None:
        """Restores the constraints of the weights, after the step of an optimizer that doesn't keep them."""
        if self.mask is not None:
            for weight in (self.atoms.weight, self.encoder):
                if weight is not None:
                    weight.mul_(self.mask)
        self.atoms.after_step()

    def observe(self, codes: Codes, state: TrainState) -> None:
        """After a step: let thresholds and coefficients learn from the codes of the batch."""
        for part in (self.selection, *self.terms.values()):
            if hasattr(part, "observe"):
                part.observe(codes, state)

    @torch.no_grad()
    def prepare(self, batch: Any) -> None:
        """What depends on data before the first step: normalisation, atoms among data, first thresholds.

        ``batch`` is what :meth:`gather` gives.
        """
        if not self.normalised:
            self.set_normalisation(batch)
        x, y = self.pairs(batch)
        with drawn_by(self.seed):
            if hasattr(self.atoms, "prepare"):
                self.atoms.prepare(y)
                if self.encoder is not None and self.wiring.same_space:
                    self.encoder.copy_(nn.functional.normalize(self.atoms.rows(), dim=-1))
            if hasattr(self.selection, "prepare"):
                self.selection.prepare(x, self._encoder_rows(), self.b_enc)
                self.after_step()
        self.prepared.fill_(True)

    @torch.no_grad()
    def to_inference(self) -> "Rows":
        """The same function of raw activations, with normalisation and thresholds folded into the weights.

        Codes keep their values; a normalisation by each row's own statistics stays; the decoder's rows are no longer
        of unit norm, so atoms are free, and rules that come down to a threshold per feature become a JumpReLU. A pursuit works in the
        normalised space itself, so there nothing is folded.
        """
        if not self.selection.affine:
            return copy.deepcopy(self).eval()
        name, settings = self.config.selection
        weight, bias, state = self._encoder_rows(), self.b_enc, self.selection.state_dict()
        if hasattr(self.selection, "thresholds"):
            weight, bias, threshold = self.selection.thresholds(weight, bias)
            name, settings, state = "jumprelu", SELECTIONS["jumprelu"].Config(), {"threshold": threshold}
        return self.folded((name, settings), weight, bias, state)

    @torch.no_grad()
    def folded(self, selection: tuple[str, Any], weight: Tensor, bias: Tensor, state: dict) -> "Rows":
        """A dictionary of raw activations with this one's decoder and the given selection and encoder.

        ``weight`` [n_features, d_in] and ``bias`` are in normalised space; ``state`` is the selection's.
        """
        kind = self.wiring.normalise if self.norm_in.by_rows else "none"
        wiring = (self.config.wiring[0], dataclasses.replace(self.config.wiring[1], normalise=kind))
        fit = ("reconstruction", OBJECTIVES["reconstruction"].Config())
        free = ("free", ATOMS["free"].Config())
        folded = type(self)(Config(self.n_features, wiring, selection, free, (fit,))).to(
            self.device, self.dtype
        )
        assert folded.encoder is not None  # free atoms are not tied
        encoder, shift = self.norm_in.fold(weight)
        folded.encoder.copy_(encoder)
        folded.b_enc.copy_(bias.double() + shift)
        folded.selection.load_state_dict(state)
        if hasattr(folded.selection, "fold"):
            folded.selection.fold(self.norm_in.fold)
        folded.atoms.weight.copy_(self.norm_out.directions(self.atoms.rows().double()))
        folded.b_dec.copy_(self.norm_out.unscaled(self.b_dec.double()[None])[0])
        if self.wiring.skip is not None and self.norm_in.by_rows:
            folded.wiring.skip.copy_(self.wiring.skip)
        elif self.wiring.skip is not None:
            skip, shift = self.norm_in.fold(self.wiring.skip)
            folded.wiring.skip.copy_(self.norm_out.directions(skip.T).T)
            folded.b_dec.add_(self.norm_out.directions(shift[None])[0])
        if folded.norm_out.kind == "none":  # where it is for whoever asks
            folded.norm_out.mean.copy_(self.norm_out.mean)
        folded.prepared.fill_(True)
        folded.reads, folded.writes, folded.card = self.reads, self.writes, dict(self.card)
        return folded.eval()


def as_rows(dictionary: Dictionary, doing: str, alike: bool = True) -> Rows:
    """The dictionary, if it is one encoder and one decoder, as ``doing`` something to its features needs.

    ``alike``: and a feature is one row of each, which nothing binds to others.
    """
    name = dictionary.config.wiring[0]
    if not isinstance(dictionary, Rows):
        raise SaekitError(
            f"a dictionary of wiring {name!r} is made of parts, and {doing} takes one at a time; give one of its parts"
        )
    if alike and dictionary.wiring.kind in BOUND:
        raise SaekitError(
            f"features of wiring {name!r} {BOUND[dictionary.wiring.kind]}, which {doing} doesn't know of"
        )
    return dictionary
