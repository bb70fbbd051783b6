"""The trained object: one class over four choices, the same for every architecture."""

import copy
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.atoms import ATOMS
from saekit.dictionaries.config import Config
from saekit.dictionaries.normalisation import Moments, Normalisation
from saekit.dictionaries.objective import OBJECTIVES
from saekit.dictionaries.selection import SELECTIONS
from saekit.dictionaries.training import Forward, TrainState
from saekit.dictionaries.wiring import WIRINGS
from saekit.kernels import sparse_decode
from saekit.types import ActivationBatch, Codes, Loss, SaekitError


class Dictionary(nn.Module):
    """A sparse dictionary: ``encode`` to :class:`Codes`, ``decode`` back.

    Inputs are normalised (by default centred, and scaled so that the mean squared norm of what is read
    is ``d_in``), and outputs brought back; :meth:`to_inference` folds it away. ``reads`` and ``writes``
    name its hook points; ``card`` carries what is known about its training (model, data, metrics).
    """

    prepared: Tensor
    mask: Tensor | None  # of dedicated features: the columns that each may read and write
    selection: Any  # rows of the tables: see their packages for what they have
    atoms: Any
    terms: Any
    wiring: Any

    def __init__(self, config: Config, seed: int = 0):
        super().__init__()
        self.config, self.seed = config, seed
        n = config.n_features
        self.wiring = WIRINGS[config.wiring[0]](config.wiring[1])
        d_in, d_out = self.wiring.d_in, self.wiring.d_out
        self.selection = SELECTIONS[config.selection[0]](config.selection[1], n, d_in)
        self.terms = nn.ModuleDict({name: OBJECTIVES[name](c, n) for name, c in config.objective})
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("mask", self.wiring.mask(n), persistent=False)
        directions = torch.randn(n, d_out, generator=generator)
        if self.mask is not None:
            directions = directions * self.mask
        directions = nn.functional.normalize(directions, dim=-1)
        self.atoms = ATOMS[config.atoms[0]](config.atoms[1], directions, generator)
        tied, trained = self.atoms.tied, self.atoms.trained
        self.encoder = None if tied else nn.Parameter(self._encoder_start(directions, generator))
        biased = trained and not self.encoder_unit
        self.b_enc = nn.Parameter(torch.zeros(n), requires_grad=biased)
        self.b_dec = nn.Parameter(torch.zeros(d_out), requires_grad=biased)
        self.norm_in = Normalisation(self.wiring.parts_in, self.wiring.normalise)
        self.norm_out = Normalisation(self.wiring.parts_out, self.wiring.normalise)
        self.register_buffer("prepared", torch.tensor(False))
        self.reads: tuple[str, ...] = ()
        self.writes: tuple[str, ...] = ()
        self.card: dict[str, Any] = {}

    def _encoder_start(self, directions: Tensor, generator: torch.Generator) -> Tensor:
        # an encoder that starts as the decoder's transpose avoids most early deaths (Gao et al. 2024)
        if self.wiring.same_space:
            return directions.clone()
        return nn.functional.normalize(torch.randn(len(directions), self.d_in, generator=generator), dim=-1)

    @property
    def encoder_unit(self) -> bool:
        """Whether encoder rows have norm 1 and there are no biases, as a pursuit needs."""
        return getattr(self.selection, "unit_encoder", False)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.b_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its tensors."""
        return self.b_dec.dtype

    @property
    def n_features(self) -> int:
        """Number of features."""
        return self.config.n_features

    @property
    def d_in(self) -> int:
        """Width read."""
        return self.wiring.d_in

    @property
    def d_out(self) -> int:
        """Width written."""
        return self.wiring.d_out

    @property
    def points(self) -> tuple[str, ...]:
        """The hook points whose columns make a row of training data."""
        return self.wiring.points(self.reads, self.writes)

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

    def _read(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d_in:
            raise SaekitError(f"the input's width {x.shape[-1]} is not the dictionary's d_in = {self.d_in}")
        return self.norm_in(x.reshape(-1, self.d_in).to(self.dtype))

    def encode(self, x: Float[Tensor, "*shape d_in"]) -> Codes:
        """Codes by the inference rule: each row (or sequence) by itself."""
        codes = self.selection(self._read(x), self._encoder_rows(), self.b_enc)
        return dataclasses.replace(codes, shape=tuple(x.shape[:-1]))

    def decode(
        self, codes: Codes, x: Float[Tensor, "*shape d_in"] | None = None
    ) -> Float[Tensor, "*shape d_out"]:
        """What the codes write, in the units of the model; ``x`` is for wirings that pass input through."""
        y = sparse_decode(codes.offsets, codes.indices, codes.values, self.atoms.rows()) + self.b_dec
        if self.wiring.skip is not None:
            if x is None:
                raise SaekitError("x is not given, and this dictionary passes its input on; decode(codes, x)")
            y = y + self._read(x) @ self.wiring.skip.T
        return self.norm_out.invert(y).view(*codes.shape, self.d_out)

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_out"]:
        """The reconstruction, ``decode(encode(x))``, in the dtype of ``x``."""
        return self.decode(self.encode(x), x).to(x.dtype)

    def loss(
        self, batch: "Float[Tensor, 'batch d_in'] | ActivationBatch", state: TrainState | None = None
    ) -> Loss:
        """The training loss of a batch of rows (or of the unmasked rows of an ActivationBatch)."""
        read, target = self.wiring.split(self.rows_of(batch))
        x, state = self._read(read), state or TrainState()
        y = x if target is read else self.norm_out(target.to(x.dtype))
        passed = None if self.wiring.skip is None else x @ self.wiring.skip.T
        k_aux = max(
            (term.picks(self.d_out) for term in self.terms.values() if hasattr(term, "picks")), default=0
        )
        n_dead = int(state.dead.sum()) if k_aux and state.dead is not None else 0
        atoms = self.atoms.rows()
        encoder = atoms if self.encoder is None else self.encoder
        selected = self.selection.train_codes(x, encoder, self.b_enc, state, min(k_aux, n_dead))
        left = y if passed is None else y - passed
        forward = Forward(
            x,
            left,
            selected,
            atoms,
            encoder,
            self.b_dec,
            state,
            self.atoms.unit,
            self.norm_out.invert,
            passed,
            self.wiring.parts_out,
        )
        terms = {name: term(forward) for name, term in self.terms.items()}
        assert forward.squared is not None  # set by the term that fits the data
        fvu = forward.squared.sum() / (y - y.mean(0)).square().sum()
        return Loss(torch.stack(list(terms.values())).sum(), terms, selected.codes.detach(), fvu.detach())

    def rows_of(self, batch: "Float[Tensor, 'batch columns'] | ActivationBatch") -> Tensor:
        """A batch as rows of training data: the columns of its hook points side by side."""
        if isinstance(batch, ActivationBatch):
            points = self.points if self.reads else list(batch.activations)[: len(self.wiring.unnamed)]
            batch = torch.cat([batch.rows(point) for point in points], -1)
        if batch.ndim != 2 or batch.shape[1] != self.wiring.columns:
            raise SaekitError(f"batch has shape {tuple(batch.shape)}; expected [rows, {self.wiring.stated}]")
        return batch

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
    def set_normalisation(self, rows: "Float[Tensor, 'batch d_in'] | Iterable[Tensor]") -> None:
        """Estimate mean and scale (or whitening) of what is read and written.

        ``rows`` is a tensor, or an iterable of batches, of which one at a time is held.
        """
        covariance = self.wiring.normalise == "whiten"
        read, written = Moments(covariance), Moments(covariance)
        for part in (rows,) if isinstance(rows, Tensor) else rows:
            x, target = self.wiring.split(self.rows_of(part))
            read.add(x)
            written = read if target is x else written
            if target is not x:
                written.add(target)
        self.norm_in.fit(read)
        self.norm_out.fit(written)

    @property
    def normalised(self) -> bool:
        """Whether the normalisation has been set."""
        return bool(self.norm_in.fitted)

    @torch.no_grad()
    def prepare(self, rows: Float[Tensor, "batch d_in"]) -> None:
        """What depends on data before the first step: normalisation, atoms among data, first thresholds."""
        if not self.normalised:
            self.set_normalisation(rows)
        x, y = self.wiring.split(rows.to(self.device))
        if hasattr(self.atoms, "prepare"):
            self.atoms.prepare(self.norm_out(y.to(self.dtype)))
            if self.encoder is not None and self.wiring.same_space:
                self.encoder.copy_(nn.functional.normalize(self.atoms.rows(), dim=-1))
        if hasattr(self.selection, "prepare"):
            self.selection.prepare(self._read(x), self._encoder_rows(), self.b_enc)
        self.prepared.fill_(True)

    @torch.no_grad()
    def to_inference(self) -> "Dictionary":
        """The same function of raw activations, with normalisation and thresholds folded into the weights.

        Codes keep their values; the decoder's rows are no longer of unit norm, so atoms are free, and
        rules that come down to a threshold per feature become a JumpReLU. A pursuit works in the
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
    def folded(self, selection: tuple[str, Any], weight: Tensor, bias: Tensor, state: dict) -> "Dictionary":
        """A dictionary of raw activations with this one's decoder and the given selection and encoder.

        ``weight`` [n_features, d_in] and ``bias`` are in normalised space; ``state`` is the selection's.
        """
        wiring = (self.config.wiring[0], dataclasses.replace(self.config.wiring[1], normalise="none"))
        fit = ("reconstruction", OBJECTIVES["reconstruction"].Config())
        free = ("free", ATOMS["free"].Config())
        folded = Dictionary(Config(self.n_features, wiring, selection, free, (fit,))).to(self.device)
        assert folded.encoder is not None  # free atoms are not tied
        encoder, shift = self.norm_in.fold(weight)
        folded.encoder.copy_(encoder)
        folded.b_enc.copy_(bias.double() + shift)
        folded.selection.load_state_dict(state)
        if hasattr(folded.selection, "fold"):
            folded.selection.fold(self.norm_in.fold)
        folded.atoms.weight.copy_(self.norm_out.directions(self.atoms.rows().double()))
        folded.b_dec.copy_(self.norm_out.invert(self.b_dec.double()[None])[0])
        if self.wiring.skip is not None:
            skip, shift = self.norm_in.fold(self.wiring.skip)
            folded.wiring.skip.copy_(self.norm_out.directions(skip.T).T)
            folded.b_dec.add_(self.norm_out.directions(shift[None])[0])
        folded.prepared.fill_(True)
        folded.reads, folded.writes, folded.card = self.reads, self.writes, dict(self.card)
        return folded.eval()
