"""The one training loop: batch, loss, backward, step, constraints, counts, log, checkpoint."""

import json
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saekit.activations import Source, Store, TensorSource, write_atomic
from saekit.dictionaries import Dictionary, TrainState
from saekit.harvest import Stream, StreamSource, check_writable
from saekit.hub import native
from saekit.kernels import serial
from saekit.records import difference
from saekit.registry import nearest
from saekit.trainers import checkpoint, dead, optim
from saekit.trainers.config import TrainConfig, read_config, resolve, weights_digest
from saekit.trainers.log import Log
from saekit.trainers.log import read as read_log
from saekit.types import ActivationBatch, SaekitError

NORMALISATION_ROWS = 1 << 15
OVERFLOWS = 1e15  # of a weight; a thousand of them make a row that kernels refuse


class Trainer:
    """One dictionary in training. ``step`` takes a batch and returns metrics that stay on the device.

    Without :func:`train` it takes its normalisation from the first batch and, with ``steps`` left
    out, a constant rate after warm-up.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        lr: float | None = None,
        *,
        steps: int | None = None,
        warmup: int | None = None,
        decay: float = 0.3,
        clip: float | None = None,
        dead_after: int | None = None,
        device: "str | torch.device | None" = None,
    ):
        self.dictionary = dictionary.to(device) if device else dictionary
        self.lr = lr if lr is not None else optim.learning_rate(dictionary.n_features, steps).value
        self.steps, self.decay, self.clip = steps, decay, clip
        self.warmup = warmup if warmup is not None else int(optim.warmup_steps(steps).value)
        self.dead_after = dead_after if dead_after is not None else dead.DEAD_AFTER
        self.step_number = 0
        self.silent = torch.zeros(dictionary.n_features, dtype=torch.int64, device=dictionary.device)
        self.optimizer = optim.Adam(self.dictionary.parameters(), self.dictionary.unit_weights())

    def step(self, x: "Float[Tensor, 'batch d_in'] | ActivationBatch") -> dict[str, Tensor]:
        """One optimisation step on a batch of rows."""
        d = self.dictionary
        if isinstance(x, ActivationBatch):
            x = x.rows(d.reads[0] if d.reads else next(iter(x.activations)))
        if x.ndim != 2 or x.shape[1] != d.d_in:
            raise SaekitError(f"batch has shape {tuple(x.shape)}; expected [rows, d_in = {d.d_in}]")
        x = x.to(self.silent.device, d.mean_in.dtype)
        if not d.normalised:
            d.set_normalisation(x)
        rate = self.lr * optim.rate_factor(self.step_number, self.steps, self.warmup, self.decay)
        # torch's threads would spin beside the kernels' own
        with serial() if x.device.type == "cpu" else nullcontext():
            return self._step(x, rate)

    def _step(self, x: Tensor, rate: float) -> dict[str, Tensor]:
        d, is_dead = self.dictionary, dead.dead(self.silent, self.dead_after)
        with self.optimizer.collect() as factors:
            loss = d.loss(x, TrainState(self.step_number, is_dead))
            loss.total.backward()
        self.optimizer.step(factors, rate, self.step_number + 1, self.clip)
        if not d.unit_weights():  # those the optimizer has kept on the sphere
            d.after_step()
        dead.update(self.silent, loss.codes.firing_counts(), len(x))
        self.step_number += 1
        active = (loss.codes.values != 0).sum() / loss.codes.rows
        out = {"loss": loss.total.detach(), **{k: v.detach() for k, v in loss.terms.items()}}
        # in normalised space the mean predictor's error is d_out
        out["fvu"] = out["reconstruction"] / d.d_out
        return {**out, "l0": active, "dead_share": is_dead.float().mean(), "lr": torch.tensor(rate)}

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on."""
        out = {f"dictionary.{k}": v for k, v in self.dictionary.state_dict().items()}
        out["silent"] = self.silent
        for i, (m, v) in enumerate(self.optimizer.moments):
            out[f"optimizer.{i}.m"], out[f"optimizer.{i}.v"] = m, v
        return out

    def restore(self, tensors: dict[str, Tensor], step: int) -> None:
        """Take the state of :meth:`state` back."""
        own = {k.removeprefix("dictionary."): v for k, v in tensors.items() if k.startswith("dictionary.")}
        self.dictionary.load_state_dict(own)
        self.silent.copy_(tensors["silent"])
        for i, (m, v) in enumerate(self.optimizer.moments):
            m.copy_(tensors[f"optimizer.{i}.m"])
            v.copy_(tensors[f"optimizer.{i}.v"])
        self.step_number = step


@dataclass(frozen=True)
class Run:
    """A finished (or interrupted) training: the dictionary, where it lies, how far it came."""

    dictionary: Dictionary
    path: Path | None
    steps: int
    finished: bool
    metrics: dict[str, float]


def as_source(source: Any) -> Source:
    """A tensor, a store's path, a store, a harvest stream, or a source itself."""
    if isinstance(source, Tensor):
        return TensorSource(source)
    if isinstance(source, str | Path):
        return Store(source)
    if isinstance(source, np.ndarray):
        return TensorSource(torch.from_numpy(source))
    if not isinstance(source, Stream | Source):
        raise SaekitError(
            f"source is of type {type(source).__name__}; give rows as a tensor, a store or its path, or what harvest() returns"
        )
    return StreamSource(source) if isinstance(source, Stream) else source


def check(dictionary: Dictionary, source: Source, config: TrainConfig) -> tuple[str, ...]:
    """Raise unless the dictionary can be trained on the source; returns the hook points it reads."""
    points = tuple(
        dictionary.reads
        or dictionary.wiring.sites(
            getattr(source, "hook_points", None)
            or getattr(getattr(source, "stream", None), "hook_points", None)
            or ["x"]
        )[0]
    )
    if isinstance(source, Store):
        for point in points:
            source.check(point)
        if not source.manifest["complete"]:
            warnings.warn(
                f"store {str(source.path)!r} is unfinished: training on the {source.n_rows} rows it holds; its harvest goes on when run again",
                stacklevel=3,
            )
    width = sum(source.width(point) for point in points)
    if width != dictionary.d_in:
        raise SaekitError(
            f"the data's width {width} is not the dictionary's d_in = {dictionary.d_in}; create it with d_in={width}"
        )
    if source.n_rows is not None and source.n_rows < config.batch_size:
        raise SaekitError(
            f"the data holds {source.n_rows} rows and one batch takes batch_size = {config.batch_size}; harvest more tokens or choose a smaller batch"
        )
    if not any(p.requires_grad for p in dictionary.parameters()):
        raise SaekitError("this dictionary is a control with nothing to train; evaluate it as it is")
    return points


@contextmanager
def _interruptible() -> Iterator[Callable[[], int | None]]:
    """Turns SIGTERM and Ctrl-C into a flag, so that the loop ends after a whole step."""
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        if received:  # a second signal means now
            raise KeyboardInterrupt
        received.append(number)

    try:
        previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller owns the signals
        previous = {}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    dictionary: Dictionary,
    source: Any,
    steps: int = 1000,
    batch_size: int = 4096,
    out: "str | Path | None" = None,
    *,
    device: "str | torch.device | None" = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    **options: Any,
) -> Run:
    """Train a dictionary on a tensor, a store's path, or a harvest stream; resumes from ``out``.

    ``options`` are the other fields of :class:`TrainConfig`. The run folder holds ``config.json``,
    ``log.jsonl``, ``checkpoints/`` and in the end ``dictionary.safetensors`` with ``card.json``.
    ``on_step(step, record)`` is called where a log line is written.
    """
    known = [f.name for f in fields(TrainConfig)]
    for key in sorted(set(options) - set(known)):
        raise SaekitError(f"option {key!r} is not one of train's{nearest(key, known)}")
    config, reasons = resolve(
        TrainConfig(steps=steps, batch_size=batch_size, **options), dictionary.n_features
    )
    source = as_source(source)
    points = check(dictionary, source, config)
    if not dictionary.reads and points != ("x",):
        dictionary.reads, dictionary.writes = dictionary.wiring.sites(points)
    trainer = Trainer(
        dictionary, config.lr, steps=config.steps, warmup=config.warmup, decay=config.decay,
        clip=config.clip, dead_after=config.dead_after, device=device,
    )  # fmt: skip
    path = Path(out) if out is not None else None
    settings = {
        "train": asdict(config), "reasons": reasons, "dictionary": dictionary.config.to_json(),
        "init_seed": dictionary.seed, "init": weights_digest(dictionary), "hook_points": list(points), "data": source.identity(), "source": _origin(source),
    }  # fmt: skip
    log, fresh = None, path is not None and not (path / "config.json").exists()
    try:
        if path is not None:
            _prepare(path, settings, trainer)
            log = Log(path, trainer.step_number, config.wandb, settings)
        if not dictionary.normalised:
            dictionary.set_normalisation(_sample(source, points, config))
        record, finished = _loop(trainer, source, points, config, path, log, on_step)
    except OSError as error:
        raise SaekitError(
            f"out {str(path)!r} can't be written: {error.strerror}; free some space and run the same command again: "
            "it goes on from the last checkpoint"
        ) from None
    except SaekitError:
        if fresh and path is not None and not any((path / "checkpoints").glob("step-*")):
            for name in ("config.json", "log.jsonl"):  # so that the folder is free for another try
                with suppress(OSError):
                    (path / name).unlink()
        raise
    finally:
        if log is not None:
            log.close()
    if not record and path is not None:  # a finished run was taken up again
        record = (read_log(path) or [{}])[-1]
    dictionary.card |= {"data": settings["data"], "training": {"config": asdict(config), "last": record}}
    if path is not None and finished:
        native.save(dictionary, path)
    return Run(dictionary, path, trainer.step_number, finished, record)


def _origin(source: Source) -> dict[str, Any]:
    """Where the data came from, so that ``--config`` can repeat the run."""
    if isinstance(source, Store):
        return {"acts": str(source.path.resolve())}
    stream = getattr(source, "stream", None)
    return (
        {"model": stream.model.name, "text": stream.text_identity()["name"], **stream.settings()}
        if stream
        else {}
    )


def _sample(source: Source, points: Sequence[str], config: TrainConfig) -> Iterator[Tensor]:
    """The first batches of the run, about as many rows as a normalisation needs."""
    batches = source.batches(points, config.batch_size, config.seed)
    n = max(1, -(-min(NORMALISATION_ROWS, source.n_rows or NORMALISATION_ROWS) // config.batch_size))
    return islice(batches, n)


def _prepare(path: Path, settings: dict[str, Any], trainer: Trainer) -> None:
    """Make the run folder, or take up the run that it holds."""
    file = path / "config.json"
    check_writable(path)
    if file.exists():
        previous = read_config(file)
        for field in ("dictionary", "init_seed", "data", "hook_points", "train"):
            mine, theirs = settings[field], previous.get(field, {})
            if field == "train":
                free = ("log_every", "checkpoint_every", "wandb")
                mine, theirs = ({k: v for k, v in part.items() if k not in free} for part in (mine, theirs))
            mine = json.loads(json.dumps(mine))
            if mine != theirs:
                raise SaekitError(
                    f"out {str(path)!r} holds a run with another {difference(field, theirs, mine)}; choose another folder, or delete it"
                )
    write_atomic(file, json.dumps(settings, indent=1).encode())
    found = checkpoint.latest(path / "checkpoints")
    if found is not None:
        tensors, state = found
        trainer.restore(tensors, state["step"])


def _diverged(dictionary: Dictionary) -> bool:
    """Whether a weight is NaN or so large that its products overflow."""
    return any(not p.detach().abs().max() < OVERFLOWS for p in dictionary.parameters())


def _loop(
    trainer: Trainer, source: Source, points: Sequence[str], config: TrainConfig,
    path: Path | None, log: Log | None, on_step: Callable[[int, dict[str, float]], None] | None,
) -> tuple[dict[str, float], bool]:  # fmt: skip
    record: dict[str, float] = {}
    batches = source.batches(points, config.batch_size, config.seed, trainer.step_number)
    began, first = time.perf_counter(), trainer.step_number

    def save() -> None:
        if not torch.isfinite(metrics["loss"]):
            raise SaekitError(
                f"the loss is {metrics['loss'].item()} at step {trainer.step_number}; choose a smaller lr than {config.lr:.2e}"
            )
        if path is not None:
            checkpoint.save(path / "checkpoints", trainer.step_number, trainer.state(), {})

    with _interruptible() as stopped:
        while trainer.step_number < config.steps:
            batch = next(batches)
            try:
                metrics = trainer.step(batch)
            except ValueError as error:  # kernels refuse weights that have run away
                if isinstance(error, SaekitError) or not _diverged(trainer.dictionary):
                    raise
                raise SaekitError(
                    f"the loss is no number any more after step {trainer.step_number}: the weights have run away; choose a smaller lr than {config.lr:.2e}"
                ) from error
            step = trainer.step_number
            last = step == config.steps
            if step % config.log_every == 0 or last or step == 1:
                rate = (step - first) * config.batch_size / (time.perf_counter() - began)
                record = {
                    "step": step,
                    "rows": step * config.batch_size,
                    **{k: v.item() for k, v in metrics.items()},
                }
                if log is not None:
                    log.write({**record, "rows_per_second": rate})
                if on_step is not None:
                    on_step(step, {**record, "rows_per_second": rate})
            if last or step % (config.checkpoint_every or config.steps) == 0:
                save()
            if stopped() is not None and not last:
                save()
                return record, False
    return record, True
