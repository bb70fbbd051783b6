"""The contract of a trained object, whatever it is made of, and what all kinds of it share."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.dictionaries.config import Config
from saekit.dictionaries.normalisation import ROWS, Moments, Normalisation
from saekit.dictionaries.wiring import WIRINGS
from saekit.types import ActivationBatch, Codes, SaekitError


class Dictionary(nn.Module):
    """A sparse dictionary: ``encode`` to :class:`Codes`, ``decode`` back.

    Inputs are normalised (by default centred, and scaled so that the mean squared norm of what is read
    is its width), and outputs brought back; ``to_inference`` folds it away. ``reads`` and ``writes``
    name its hook points; ``card`` carries what is known about its training (model, data, metrics).

    A kind (a row of :mod:`saekit.dictionaries.kinds`) has ``encode(x)``, ``decode(codes, x=None)``,
    ``loss(batch, state)``, ``prepare(batch)``, ``observe(codes, state)``, ``after_step()``, ``unit_weights()``
    and ``to_inference()``, and, for whoever looks, ``W_enc``, ``W_dec``, ``b_dec``, ``selection``, ``atoms``
    and ``terms``.
    """

    prepared: Tensor
    b_dec: Any
    b_enc: Any
    encoder: Any
    encoder_unit: Any
    mask: Any
    selection: Any  # rows of the tables: see their packages for what they have
    atoms: Any
    terms: Any
    wiring: Any
    W_enc: Any
    W_dec: Any
    encode: Any
    decode: Any
    read_by: Any
    written_by: Any
    pairs: Any
    expanded: Any
    begin_from: Any  # of a kind that stands in for an attention layer
    loss: Any
    prepare: Any
    observe: Any
    after_step: Any
    unit_weights: Any
    to_inference: Any

    def __init__(self, config: Config, seed: int):
        super().__init__()
        self.config, self.seed = config, seed
        self.wiring = WIRINGS[config.wiring[0]](config.wiring[1])
        self.norm_in = Normalisation(self.wiring.parts_in, self.wiring.normalise)
        kind = self.wiring.normalise
        # statistics of a row that is read say nothing of the units of another space
        elsewhere = kind in ROWS and not self.wiring.same_space
        self.norm_out = Normalisation(self.wiring.parts_out, "none" if elsewhere else kind)
        self.register_buffer("prepared", torch.tensor(False))
        self.reads: tuple[str, ...] = ()
        self.writes: tuple[str, ...] = ()
        self.card: dict[str, Any] = {}

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""
        return self.b_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its tensors."""
        return self.b_dec.dtype

    def digest(self) -> str:
        """What tells it from others: 16 hexadecimal digits of a hash of its choices and tensors, wherever they are."""
        found = hashlib.sha256(json.dumps(self.config.to_json(), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(flat.view(torch.uint8).numpy().data)
        return found.hexdigest()[:16]

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
    def context(self) -> int | None:
        """How long sequences have to be for it; None where rows stand by themselves."""
        return None

    @property
    def normalised(self) -> bool:
        """Whether the normalisation has been set."""
        return bool(self.norm_in.fitted)

    def read(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "rows d_in"]:
        """Inputs as rows in normalised space."""
        if x.shape[-1] != self.d_in:
            raise SaekitError(f"the input's width {x.shape[-1]} is not the dictionary's d_in = {self.d_in}")
        return self.norm_in(x.reshape(-1, self.d_in).to(self.dtype))

    def forward(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_out"]:
        """The reconstruction, ``decode(encode(x))``, in the dtype of ``x``."""
        return self.decode(self.encode(x), x).to(x.dtype)

    def rows_of(self, batch: "Float[Tensor, 'batch columns'] | ActivationBatch") -> Tensor:
        """A batch as rows of training data: the columns of its hook points side by side."""
        if isinstance(batch, ActivationBatch):
            points = self._points_of(batch)
            batch = torch.cat([batch.rows(point) for point in points], -1)
        if not isinstance(batch, Tensor):
            raise SaekitError(
                f"batch is of type {type(batch).__name__}; give rows, [rows, {self.wiring.stated}], or an ActivationBatch"
            )
        if batch.ndim != 2 or batch.shape[1] != self.wiring.columns:
            raise SaekitError(f"batch has shape {tuple(batch.shape)}; expected [rows, {self.wiring.stated}]")
        return batch

    def _points_of(self, batch: ActivationBatch) -> Sequence[str]:
        """The hook points of a batch that make a row, whose widths and shapes are checked."""
        points = self.points
        if not points:
            points = tuple(batch.activations)
            if len(points) > 1:
                raise SaekitError(
                    f"batch holds {', '.join(points)}, and the dictionary doesn't say which it reads; set reads and writes"
                )
        missing = [point for point in points if point not in batch.activations]
        if missing:
            raise SaekitError(f"batch lacks {missing[0]!r}; it holds {', '.join(batch.activations)}")
        parts = [batch.activations[point] for point in points]
        for point, part in zip(points, parts, strict=True):
            if part.shape[: batch.mask.ndim] != batch.mask.shape:
                raise SaekitError(
                    f"batch has {tuple(part.shape)} at {point!r} and a mask of {tuple(batch.mask.shape)}; give them the same rows"
                )
        check_widths(self, [part.shape[-1] for part in parts], points)
        return points

    def gather(self, batches: "Sequence[Float[Tensor, 'batch columns'] | ActivationBatch]") -> Any:
        """Batches as one that ``loss`` takes, on the dictionary's device."""
        rows = [self.rows_of(batch) for batch in batches]
        return (rows[0] if len(rows) == 1 else torch.cat(rows)).to(
            self.device, self.dtype
        )  # one is not copied

    def codes_of(self, batch: ActivationBatch, points: Sequence[str] | None = None) -> Codes:
        """Codes of the unmasked positions, read at ``points`` (None: those of ``reads``)."""
        rows = [batch.rows(point) for point in points or self.reads]
        return self.encode(torch.cat(rows, -1).to(self.device))

    @property
    def needs_data(self) -> bool:
        """Whether :meth:`prepare` has more to do than to fit the normalisation."""
        return hasattr(self.atoms, "prepare") or hasattr(self.selection, "prepare")

    @torch.no_grad()
    def set_normalisation(
        self, rows: "Float[Tensor, 'batch *seq columns'] | Iterable[Tensor | ActivationBatch]"
    ) -> None:
        """Estimate mean and scale (or whitening) of what is read and written.

        ``rows`` is a tensor, or an iterable of batches, of which one at a time is held.
        """
        covariance = self.wiring.normalise == "whiten"
        read, written = Moments(covariance), Moments(covariance)
        for part in (rows,) if isinstance(rows, Tensor) else rows:
            own = self.rows_of(part)
            if not own.isfinite().all():
                bad = int((~own.isfinite().all(1)).nonzero()[0])
                raise SaekitError(f"batch holds NaN or Inf in row {bad}; remove it")
            x, target = self.wiring.split(own)
            read.add(x)
            written = read if target is x else written
            if target is not x:
                written.add(target)
        if read.n == 0:
            raise SaekitError("rows hold none to estimate from; give some, and no generator that was gone through")  # fmt: skip
        self.norm_in.fit(read)
        self.norm_out.fit(written)


def check_widths(dictionary: Dictionary, widths: Sequence[int], points: Sequence[str]) -> None:
    """Raise unless what stands side by side has, part by part, the widths that are read and then written."""
    wiring = dictionary.wiring
    wanted = (*wiring.parts_in, *wiring.parts_out)[: len(widths)]
    if len(widths) < 2 or sum(widths) != wiring.columns:
        return  # one part, or a sum that is refused as a whole
    for i, (have, want) in enumerate(zip(widths, wanted, strict=True)):
        if have != want:
            name = points[i] if i < len(points) else f"part {i}"
            side = "reads" if i < len(wiring.parts_in) else "writes"
            raise SaekitError(
                f"{name!r} is {have} wide, and the dictionary {side} {want} there ({wiring.stated}); give parts in its order, or create it with their widths"
            )
