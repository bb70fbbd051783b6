"""The one training loop: batch, loss, backward, step, constraints, counts, log, checkpoint."""

import json
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saekit.activations import Source, Store, TensorSource, write_atomic
from saekit.dictionaries import Dictionary
from saekit.harvest import Stream, StreamSource, check_writable
from saekit.hub import native
from saekit.records import difference
from saekit.registry import nearest
from saekit.trainers import checkpoint
from saekit.trainers.config import TrainConfig, read_config, resolve, weights_digest
from saekit.trainers.init import initialise
from saekit.trainers.log import Log
from saekit.trainers.log import read as read_log
from saekit.trainers.trainer import Trainer
from saekit.types import ActivationBatch, SaekitError

NORMALISATION_ROWS = 1 << 15
OVERFLOWS = 1e15  # of a weight; a thousand of them make a row that kernels refuse


@dataclass(frozen=True)
class Run:
    """A finished, interrupted or failed training: the dictionary, where it lies, how far it came."""

    dictionary: Dictionary
    path: Path | None
    steps: int
    finished: bool
    metrics: dict[str, float]
    error: str | None = None  # why it ended early, when others trained beside it went on


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
    source = as_source(source)
    path = Path(out) if out is not None else None
    options |= {"steps": steps, "batch_size": batch_size}
    job = _Job.of("", dictionary, source, path, device, options)
    job.on_step = on_step
    _run([job], source)
    if isinstance(job.error, Exception):
        raise job.error
    return job.result()


def train_many(
    dictionaries: Mapping[str, Dictionary],
    source: Any,
    steps: int = 1000,
    batch_size: int = 4096,
    out: "str | Path | None" = None,
    *,
    device: "str | torch.device | None" = None,
    on_step: Callable[[str, int, dict[str, float]], None] | None = None,
    each: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> dict[str, Run]:
    """Train dictionaries of any kinds from one stream of activations, each as it would be alone.

    The arguments are those of :func:`train`; ``each`` gives the options of single dictionaries that
    differ from the rest's (not steps, batch_size or seed, which decide the stream). ``out`` gets a
    folder of that name for each run, which is a run like any other. A run that fails is reported in its
    ``error`` and the others go on. ``on_step(name, step, record)`` is called where a log line is written.
    """
    if not dictionaries:
        raise SaekitError("dictionaries is empty; give at least one as {name: dictionary}")
    source, jobs, each = as_source(source), [], each or {}
    for name in sorted(set(each) - set(dictionaries)):
        raise SaekitError(
            f"each names {name!r}, which is not a dictionary{nearest(name, list(dictionaries))}"
        )
    for name, dictionary in dictionaries.items():
        if not name or Path(name).name != name:
            raise SaekitError(f"the name {name!r} of a dictionary can't be a folder's; choose another")
        own = dict(each.get(name, {}))
        for key in sorted({"steps", "batch_size", "seed"} & set(own)):
            raise SaekitError(
                f"{key} = {own[key]!r} of {name!r} alone would need a stream of its own; give it for all"
            )
        path = Path(out) / name if out is not None else None
        given = options | own | {"steps": steps, "batch_size": batch_size}
        jobs.append(_Job.of(name, dictionary, source, path, device, given))
        if on_step is not None:
            jobs[-1].on_step = partial(on_step, name)
    _run(jobs, source)
    return {job.name: job.result() for job in jobs}


@dataclass
class _Job:
    """One dictionary's training among those that share a stream."""

    name: str
    trainer: Trainer
    config: TrainConfig
    points: tuple[str, ...]
    path: Path | None
    settings: dict[str, Any]
    fresh: bool
    rows: int  # of a batch
    log: Log | None = None
    on_step: Callable[[int, dict[str, float]], None] | None = None
    record: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    began: tuple[float, int] = (0.0, 0)
    error: Exception | None = None

    @staticmethod
    def of(
        name: str, dictionary: Dictionary, source: Source, path: Path | None,
        device: "str | torch.device | None", options: dict[str, Any],
    ) -> "_Job":  # fmt: skip
        """Check everything that can be checked before any work."""
        known = [f.name for f in fields(TrainConfig)]
        for key in sorted(set(options) - set(known)):
            raise SaekitError(f"option {key!r} is not one of train's{nearest(key, known)}")
        rows_per_item = getattr(source, "rows_per_item", 1)
        config, reasons = resolve(TrainConfig(**options), dictionary.n_features, rows_per_item)
        points = check(dictionary, source, config)
        if not dictionary.reads and points != ("x",):
            dictionary.reads, dictionary.writes = dictionary.wiring.sites(points)
        trainer = Trainer(
            dictionary, config.lr, steps=config.steps, warmup=config.warmup, decay=config.decay,
            clip=config.clip, dead_after=config.dead_after, optimizer=config.optimizer, betas=config.betas,
            resample_every=config.resample_every, seed=config.seed, device=device,
        )  # fmt: skip
        settings = {
            "train": asdict(config), "reasons": reasons, "dictionary": dictionary.config.to_json(),
            "init_seed": dictionary.seed, "init": weights_digest(dictionary), "hook_points": list(points), "data": source.identity(), "source": _origin(source),
        }  # fmt: skip
        fresh = path is not None and not (path / "config.json").exists()
        return _Job(name, trainer, config, points, path, settings, fresh, config.batch_size * rows_per_item)

    @property
    def finished(self) -> bool:
        """Whether every step has been taken."""
        return self.trainer.step_number == self.config.steps

    def open(self, source: Source) -> None:
        """Make or take up the run folder; set what depends on the data."""
        if self.path is not None:
            _prepare(self.path, self.settings, self.trainer)
            self.log = Log(self.path, self.trainer.step_number, self.config.wandb, self.settings)
        d = self.trainer.dictionary
        if not d.prepared:
            if not d.normalised:
                d.set_normalisation(_sample(source, self.points, self.config))
            if self.config.init is not None or hasattr(d.atoms, "prepare") or hasattr(d.selection, "prepare"):
                rows = torch.cat(list(_sample(source, self.points, self.config))).to(d.device, d.dtype)
                if self.config.init is not None:
                    initialise(d, self.config.init, rows)
                if not d.prepared:
                    d.prepare(rows)
            d.prepared.fill_(True)
        self.began = (time.perf_counter(), self.trainer.step_number)

    def step(self, batch: "Tensor | ActivationBatch", peers: tuple[Tensor, ...]) -> None:
        """One step, with what is due after it."""
        trainer, config = self.trainer, self.config
        try:
            self.metrics = trainer.step(batch, peers=peers)
        except ValueError as error:  # kernels refuse weights that have run away
            if isinstance(error, SaekitError) or not _diverged(trainer.dictionary):
                raise
            raise SaekitError(
                f"the loss is no number any more after step {trainer.step_number}: the weights have run away; choose a smaller lr than {config.lr:.2e}"
            ) from error
        step = trainer.step_number
        if step % config.log_every == 0 or self.finished or step == 1:
            since, first = self.began
            rate = (step - first) * self.rows / (time.perf_counter() - since)
            metrics = {k: v.item() for k, v in self.metrics.items()}
            self.record = {"step": step, "rows": step * self.rows, **metrics}
            shown = {**self.record, "rows_per_second": rate}
            if self.log is not None:
                self.log.write(shown)
            if self.on_step is not None:
                self.on_step(step, shown)
        if self.finished or step % (config.checkpoint_every or config.steps) == 0:
            self.save()

    def save(self) -> None:
        """Write a checkpoint, unless the run has come to nothing."""
        if self.metrics and not torch.isfinite(self.metrics["loss"]):
            raise SaekitError(
                f"the loss is {self.metrics['loss'].item()} at step {self.trainer.step_number}; choose a smaller lr than {self.config.lr:.2e}"
            )
        if self.path is not None:
            checkpoint.save(self.path / "checkpoints", self.trainer.step_number, self.trainer.state(), {})

    def fail(self, error: Exception) -> None:
        """Note why it ends here; a folder in which nothing was saved is left free for another try."""
        if isinstance(error, OSError):
            error = SaekitError(
                f"out {str(self.path)!r} can't be written: {error.strerror}; free some space and run the same command again: "
                "it goes on from the last checkpoint"
            )
        self.error = error
        if not isinstance(error, SaekitError) or self.path is None or not self.fresh:
            return
        if not any((self.path / "checkpoints").glob("step-*")):
            for name in ("config.json", "log.jsonl"):
                with suppress(OSError):
                    (self.path / name).unlink()

    def close(self) -> None:
        """Write the dictionary of a finished run; close the log."""
        if self.log is not None:
            self.log.close()
        if self.error is not None:
            return
        if not self.record and self.path is not None:  # a finished run was taken up again
            self.record = (read_log(self.path) or [{}])[-1]
        d = self.trainer.dictionary
        d.card |= {
            "data": self.settings["data"],
            "training": {"config": asdict(self.config), "last": self.record},
        }
        if self.finished:
            for missed in filter(
                None, (t.coefficient.missed() for t in d.terms.values() if hasattr(t, "coefficient"))
            ):
                warnings.warn(f"{self.name + ': ' if self.name else ''}{missed}", stacklevel=4)
            if self.path is not None:
                native.save(d, self.path)

    def result(self) -> Run:
        """How it ended."""
        why = None if self.error is None else str(self.error)
        return Run(
            self.trainer.dictionary,
            self.path,
            self.trainer.step_number,
            self.finished and not why,
            self.record,
            why,
        )


def _attempt(job: _Job, action: Callable[[], None]) -> None:
    """Do a part of a job's work; its failure ends this job alone."""
    try:
        action()
    except (SaekitError, OSError, ValueError, RuntimeError, ArithmeticError) as error:
        job.fail(error)


def _run(jobs: Sequence[_Job], source: Source) -> None:
    """Open every job, feed them all from one stream, close them."""
    try:
        for job in jobs:
            _attempt(job, partial(job.open, source))
        _loop(jobs, source)
    finally:
        for job in jobs:
            _attempt(job, job.close)


def _loop(jobs: Sequence[_Job], source: Source) -> None:
    running = [job for job in jobs if job.error is None and not job.finished]
    if not running:
        return
    first, config = min(job.trainer.step_number for job in running), running[0].config
    batches = source.batches(running[0].points, config.batch_size, config.seed, first)
    with _interruptible() as stopped:
        for step in range(first, config.steps):
            batch = next(batches)
            peers = _peers(running)
            for job in running:
                if job.trainer.step_number == step:  # others were further when they were interrupted
                    _attempt(job, partial(job.step, batch, peers.get(job.name, ())))
            running = [job for job in running if job.error is None and not job.finished]
            if stopped() is not None:
                for job in running:
                    _attempt(job, job.save)
                return
            if not running:
                return


def _peers(jobs: Sequence[_Job]) -> dict[str, tuple[Tensor, ...]]:
    """For each dictionary that looks at others: their decoders, as they are before the step."""
    looking = [
        job for job in jobs if any(getattr(t, "peers", False) for t in job.trainer.dictionary.terms.values())
    ]
    if not looking:
        return {}
    with torch.no_grad():
        rows = {job.name: job.trainer.dictionary.atoms.rows().clone() for job in looking}
    return {name: tuple(r for other, r in rows.items() if other != name) for name in rows}


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
    batches = (
        batch.rows(points[0]) if isinstance(batch, ActivationBatch) else batch
        for batch in source.batches(points, config.batch_size, config.seed)
    )
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
