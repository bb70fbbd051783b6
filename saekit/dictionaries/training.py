"""What crosses between the four choices in training: what is known, what was selected, one forward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.kernels import sparse_decode
from saekit.types import Codes

Downstream = Callable[[Tensor, bool], Mapping[str, Tensor]]


@contextmanager
def drawn_by(seed: int) -> Iterator[None]:
    """Within it torch's own generator on the CPU begins at ``seed``; afterwards it goes on as if nothing had been drawn."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


@dataclass(frozen=True)
class TrainState:
    """What training knows beside the batch.

    ``step`` of ``steps`` (None where the end is unknown); ``seed`` of everything random in the loss;
    ``dead`` features; ``peers``, the decoders of dictionaries trained beside this one, cut from the
    graph; ``downstream`` carries an output on through the model (end-to-end training).
    """

    step: int = 0
    steps: int | None = None
    seed: int = 0
    dead: Bool[Tensor, " feature"] | None = None
    peers: tuple[Tensor, ...] = ()
    downstream: Downstream | None = None

    def ramp(self, share: float) -> float:
        """From 0 to 1 over the first ``share`` of the run; 1 where its length is unknown."""
        if self.steps is None or share <= 0:
            return 1.0
        return min(1.0, (self.step + 1) / max(1.0, share * self.steps))

    def generator(self, purpose: int) -> torch.Generator:
        """Random numbers that depend on seed, step and purpose alone, so that a resumed run draws the same."""
        key = (self.seed * 1_000_003 + self.step) * 8 + purpose
        return torch.Generator().manual_seed(key % (1 << 31))


@dataclass(frozen=True)
class Selected:
    """The codes of a training batch, and what terms of the objective may need beside them.

    ``dead``: codes of the dead features with the largest pre-activations (AuxK). ``on``:
    ``1[u > threshold]`` of every entry of the codes, differentiable in the threshold (JumpReLU).
    ``gate``: what penalties fall on instead of the codes: ReLU of the gate's pre-activations (gated), codes of maps (MOLT). ``lengths``: norms of what
    features write, where not those of their atoms. ``routes``: probability of each expert
    (switch).
    """

    codes: Codes
    dead: Codes | None = None
    on: Float[Tensor, " nnz"] | None = None
    gate: Codes | None = None
    routes: Float[Tensor, "rows expert"] | None = None
    lengths: Float[Tensor, " feature"] | None = None


@dataclass
class Forward:
    """One forward pass in normalised space: input, target, what was selected, the parameters.

    ``y`` is what the features have to write: the target, less what a skip has ``passed`` on. The term that
    fits the data stands first in the objective and sets ``squared``, the squared error of each row, and
    ``error``, output less target, both cut from the graph.
    """

    x: Float[Tensor, "batch *blocks d_in"]
    y: Float[Tensor, "batch d_out"]
    selected: Selected
    atoms: Float[Tensor, "atom d_out"]
    encoder: Float[Tensor, "feature d_in"]
    b_dec: Float[Tensor, " d_out"]
    state: TrainState
    unit: bool = True  # whether atoms have norm 1
    to_model: Callable[[Tensor], Tensor] = field(default=lambda y: y)  # to the units of the model
    passed: Float[Tensor, "batch d_out"] | None = None
    parts: tuple[int, ...] = ()  # widths of what is written side by side
    squared: Float[Tensor, " batch"] | None = None
    error: Float[Tensor, "batch d_out"] | None = None

    @property
    def codes(self) -> Codes:
        """The codes of the batch."""
        return self.selected.codes

    @property
    def penalised(self) -> Codes:
        """The codes that penalties fall on: the gate's, where there is one."""
        return self.selected.codes if self.selected.gate is None else self.selected.gate

    def features(self) -> Float[Tensor, "batch d_out"]:
        """What the features write, with the bias; differentiable, in normalised space."""
        c = self.codes
        return sparse_decode(c.offsets, c.indices, c.values, self.atoms) + self.b_dec

    def output(self) -> Float[Tensor, "batch d_out"]:
        """The whole output; differentiable, in normalised space."""
        return self.features() if self.passed is None else self.features() + self.passed

    def sizes(self, codes: Codes) -> Float[Tensor, " nnz"]:
        """``|z| * ||d||`` of every entry: what it adds to the output, whatever the scale of its atom.

        Where several sources are written, the norms in them are added up: ``|z| * sum_s ||d_s||``.
        """
        # of slope 1 at 0, where abs() has 0: silent entries just below a threshold teach it
        values = torch.where(codes.values < 0, -codes.values, codes.values)
        lengths = self.selected.lengths
        if lengths is not None:
            return values * lengths[codes.indices.long()]
        if self.unit and len(self.parts) < 2:
            return values
        parts = self.atoms.split(self.parts, 1) if self.parts else (self.atoms,)
        norms = torch.stack([torch.linalg.vector_norm(part, dim=-1) for part in parts]).sum(0)
        return values * norms[codes.indices.long()]
