"""The trained object: one class over four choices, the same for every architecture."""

import copy
import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.atoms import ATOMS
from saekit.dictionaries.objective import OBJECTIVES
from saekit.dictionaries.objective.forward import Forward, TrainState
from saekit.dictionaries.selection import SELECTIONS
from saekit.dictionaries.wiring import WIRINGS
from saekit.kernels import sparse_decode
from saekit.records import check, fits, name_of
from saekit.registry import Registry, nearest
from saekit.types import ActivationBatch, Codes, Loss, SaekitError

CHOICES = {"wiring": WIRINGS, "selection": SELECTIONS, "atoms": ATOMS, "objective": OBJECTIVES}
Choice = tuple[str, Any]  # a row's name and its frozen config
_NAMED = {"name": str}
CONFIG = {
    "n_features": int, "wiring": _NAMED, "selection": _NAMED, "atoms": _NAMED, "objective": [_NAMED]
}  # fmt: skip


def configure(table: Registry, name: str, options: Mapping[str, Any], unused: set[str]) -> Any:
    """The config of one row, from those options that it has a field for; takes them off ``unused``."""
    if name not in table:
        raise SaekitError(f"{table.kind} {name!r} is unknown{nearest(name, table.table)}")
    config = table[name].Config
    mine = {f.name for f in fields(config)} & set(options)
    missing = [
        f.name
        for f in fields(config)
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in mine
    ]
    if missing:
        raise SaekitError(f"{table.kind} {name!r} needs {missing[0]}; give {missing[0]}=...")
    unused -= mine
    for f in fields(config):
        if f.name in mine and not fits(options[f.name], f.type):
            raise SaekitError(
                f"{f.name} = {options[f.name]!r} of {table.kind} {name!r} must be of type {name_of(f.type)}"
            )
    return config(**{key: options[key] for key in mine})


@dataclass(frozen=True)
class Config:
    """The architecture of a dictionary: its width and the four choices."""

    n_features: int
    wiring: Choice
    selection: Choice
    atoms: Choice
    objective: tuple[Choice, ...]

    def __post_init__(self):
        if not isinstance(self.n_features, int) or self.n_features < 1:
            raise SaekitError(f"n_features = {self.n_features!r} must be a whole number of at least 1")
        self.selection[1].check(self.n_features)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form; :meth:`from_json` inverts it."""

        def plain(choice: Choice) -> dict[str, Any]:
            return {"name": choice[0], **dataclasses.asdict(choice[1])}

        return {
            "n_features": self.n_features,
            **{c: plain(getattr(self, c)) for c in ("wiring", "selection", "atoms")},
            "objective": [plain(term) for term in self.objective],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Config":
        """Read a config back; an unknown or missing field raises by name."""

        def choice(kind: str, entry: Mapping[str, Any]) -> Choice:
            options = {key: value for key, value in entry.items() if key != "name"}
            unused = set(options)
            name = entry["name"]
            config = configure(CHOICES[kind], name, options, unused)
            if unused:
                field = sorted(unused)[0]
                raise SaekitError(
                    f"{kind} {name!r} has no field {field!r}{nearest(field, list(vars(config)))}"
                )
            return name, config

        check(data, CONFIG, "the dictionary's config", "save the dictionary again")
        for key in sorted(set(data) - set(CONFIG)):
            raise SaekitError(
                f"field {key!r} of the dictionary's config is unknown{nearest(key, list(CONFIG))}"
            )
        single = {c: choice(c, data[c]) for c in ("wiring", "selection", "atoms")}
        return Config(
            n_features=data["n_features"],
            objective=tuple(choice("objective", t) for t in data["objective"]),
            **single,
        )


class Dictionary(nn.Module):
    """A sparse dictionary: ``encode`` to :class:`Codes`, ``decode`` back.

    Inputs are centred and scaled with the stored normalisation (so that the mean squared norm of
    what is read is ``d_in``), and outputs scaled back; :meth:`to_inference` folds it away.
    ``reads`` and ``writes`` name its hook points; ``card`` carries what is known about its
    training (model, data, metrics).
    """

    mean_in: Tensor
    scale_in: Tensor
    mean_out: Tensor
    scale_out: Tensor
    normalised: Tensor

    def __init__(self, config: Config, seed: int = 0):
        super().__init__()
        self.config, self.seed = config, seed
        self.wiring = WIRINGS[config.wiring[0]](config.wiring[1])
        self.selection = SELECTIONS[config.selection[0]](config.selection[1])
        self.terms = {name: OBJECTIVES[name](settings) for name, settings in config.objective}
        d_in, d_out, n = self.wiring.d_in, self.wiring.d_out, config.n_features
        generator = torch.Generator().manual_seed(seed)
        directions = nn.functional.normalize(torch.randn(n, d_out, generator=generator), dim=-1)
        self.atoms = ATOMS[config.atoms[0]](config.atoms[1], directions)
        tied = self.atoms.tied
        self.encoder = None if tied else nn.Parameter(self._tied_init(directions, d_in, generator))
        self.b_enc = nn.Parameter(torch.zeros(n), requires_grad=not tied)
        self.b_dec = nn.Parameter(torch.zeros(d_out), requires_grad=not tied)
        for side, width in (("in", d_in), ("out", d_out)):
            self.register_buffer(f"mean_{side}", torch.zeros(width))
            self.register_buffer(f"scale_{side}", torch.ones(width))
        self.register_buffer("normalised", torch.tensor(False))
        self.reads: tuple[str, ...] = ()
        self.writes: tuple[str, ...] = ()
        self.card: dict[str, Any] = {}

    @staticmethod
    def _tied_init(directions: Tensor, d_in: int, generator: torch.Generator) -> Tensor:
        # an encoder that starts as the decoder's transpose avoids most early deaths (Gao et al. 2024)
        if directions.shape[1] == d_in:
            return directions.clone()
        return nn.functional.normalize(torch.randn(len(directions), d_in, generator=generator), dim=-1)

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.mean_in.device

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
        rows = x.reshape(-1, self.d_in).to(self.mean_in.dtype)
        return (rows - self.mean_in).mul_(self.scale_in)

    def encode(self, x: Float[Tensor, "*shape d_in"]) -> Codes:
        """Codes by the inference rule: each row (or sequence) by itself."""
        codes = self.selection(self._read(x), self._encoder_rows(), self.b_enc)
        return dataclasses.replace(codes, shape=tuple(x.shape[:-1]))

    def decode(
        self, codes: Codes, x: Float[Tensor, "*shape d_in"] | None = None
    ) -> Float[Tensor, "*shape d_out"]:
        """What the codes write, in the units of the model; ``x`` is for wirings that pass input through."""
        y_hat = self._write(codes) / self.scale_out + self.mean_out
        return y_hat.view(*codes.shape, self.d_out)

    def _write(self, codes: Codes) -> Tensor:
        return sparse_decode(codes.offsets, codes.indices, codes.values, self.atoms.rows()) + self.b_dec

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_out"]:
        """The reconstruction, ``decode(encode(x))``, in the dtype of ``x``."""
        return self.decode(self.encode(x), x).to(x.dtype)

    def loss(
        self, batch: "Float[Tensor, 'batch d_in'] | ActivationBatch", state: TrainState | None = None
    ) -> Loss:
        """The training loss of a batch of rows (or of the unmasked rows of an ActivationBatch)."""
        if isinstance(batch, ActivationBatch):
            batch = batch.rows(self.reads[0]) if self.reads else batch.rows(next(iter(batch.activations)))
        x = self._read(batch)
        target = self.wiring.target(batch)
        y = x if target is batch else (target.to(x.dtype) - self.mean_out) * self.scale_out
        state = state or TrainState()
        k_aux = max(
            (term.picks(self.d_out) for term in self.terms.values() if hasattr(term, "picks")), default=0
        )
        n_dead = int(state.dead.sum()) if k_aux and state.dead is not None else 0
        codes, aux = self.selection.train_codes(
            x, self._encoder_rows(), self.b_enc, state.dead if n_dead else None, min(k_aux, n_dead)
        )
        forward = Forward(x, y, codes, aux, self.atoms.rows(), self.b_dec, state)
        terms = {name: term(forward) for name, term in self.terms.items()}
        return Loss(torch.stack(list(terms.values())).sum(), terms, codes.detach())

    def unit_weights(self) -> list[Tensor]:
        """The weights whose rows an optimizer has to keep on the sphere."""
        return [self.atoms.weight] if self.atoms.unit else []

    def after_step(self) -> None:
        """Restores the constraints of the atoms, after the step of an optimizer that doesn't keep them."""
        self.atoms.after_step()

    @torch.no_grad()
    def set_normalisation(self, rows: "Float[Tensor, 'batch d_in'] | Iterable[Tensor]") -> None:
        """Estimate the mean and the one scale that gives centred rows a mean squared norm of d_in.

        ``rows`` is a tensor, or an iterable of batches, of which one at a time is held.
        """
        shifts: dict[str, Tensor] = {}  # sums are taken about the first batch's mean: no cancellation
        totals: dict[str, Tensor] = {}
        squares, n = {"in": 0.0, "out": 0.0}, 0
        for x in (rows,) if isinstance(rows, Tensor) else rows:
            n += len(x)
            for side, values in (("in", x), ("out", self.wiring.target(x))):
                values = values.to(self.device, torch.float64)
                shift = shifts.setdefault(side, values.mean(0))
                centred = values - shift
                totals[side] = totals.get(side, 0) + centred.sum(0)
                squares[side] += centred.square().sum().item()
        for side, total in totals.items():
            mean_square = squares[side] / n - (total / n).square().sum().item()
            scale = math.sqrt(len(total) / mean_square) if mean_square > 0 else 1.0
            getattr(self, f"mean_{side}").copy_(shifts[side] + total / n)
            getattr(self, f"scale_{side}").fill_(scale)
        self.normalised.fill_(True)

    @torch.no_grad()
    def to_inference(self) -> "Dictionary":
        """The same function of raw activations with the normalisation folded into the weights.

        Codes keep their values; the decoder's rows are no longer of unit norm, so atoms are free. A
        pursuit works in the normalised space itself, so there nothing is folded.
        """
        if not self.selection.affine:
            return copy.deepcopy(self).eval()
        chosen = {"wiring": self.config.wiring, "selection": self.config.selection}
        folded = Dictionary(
            Config(
                self.n_features,
                atoms=("free", ATOMS["free"].Config()),
                objective=self.config.objective,
                **chosen,
            )
        ).to(self.device)
        encoder = self._encoder_rows().double() * self.scale_in.double()
        assert folded.encoder is not None  # free atoms are not tied
        folded.encoder.copy_(encoder)
        folded.b_enc.copy_(self.b_enc.double() - encoder @ self.mean_in.double())
        folded.atoms.weight.copy_(self.atoms.rows().double() / self.scale_out.double())
        folded.b_dec.copy_(self.b_dec.double() / self.scale_out.double() + self.mean_out.double())
        folded.normalised.fill_(True)
        folded.reads, folded.writes, folded.card = self.reads, self.writes, dict(self.card)
        return folded.eval()
