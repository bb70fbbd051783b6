"""One dictionary's training: its run folder, what is due at each step, how it ended."""

import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saekit.activations import Source, Store, write_atomic
from saekit.dictionaries import Dictionary
from saekit.dictionaries.dictionary import check_widths
from saekit.harvest import SideBySide, StoredSequences, check_writable
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
# of the rows that a dictionary is prepared with, and of those that are held for all that are trained together
BEGINNING_BYTES = 1 << 29
SETTLED = 2048  # rows, the last of a run, on which a threshold's L0 is measured
OVERFLOWS = 1e15  # of a weight; a thousand of them make a row that kernels refuse


@dataclass(frozen=True, repr=False)
class Run:
    """A finished, interrupted or failed training: the dictionary, where it lies, how far it came."""

    dictionary: Dictionary
    path: Path | None
    steps: int
    finished: bool
    metrics: dict[str, float]
    error: str | None = None  # why it ended early, when others trained beside it went on

    def __repr__(self) -> str:
        end = self.error or ("finished" if self.finished else "stopped")
        shown = [f"{key} {self.metrics[key]:.4g}" for key in ("loss", "fvu", "l0") if key in self.metrics]
        return f"Run({', '.join([f'{self.steps:,} steps', end, *shown])}{'' if self.path is None else f', in {self.path}'})"


# selections of the k largest, of which only positive ones are active
RANKED = ("topk", "batchtopk", "groupmax")


def _short_of_k(d: Dictionary, record: Mapping[str, Any]) -> str | None:
    """What to say where fewer features are active than were asked for, or None."""
    name, config = d.config.selection
    wanted = config.k if name in RANKED else 0
    if record.get("l0", wanted) >= 0.9 * wanted:
        return None
    return (
        f"L0 is {record['l0']:.1f} and k = {wanted} was asked for: no more pre-activations of a row are positive; "
        "choose a smaller k, or more features"
    )


@torch.no_grad()
def _counts_by_threshold(d: Dictionary, batch: Any) -> Tensor:
    """L0 of a batch's rows by the rule at inference, of selections whose rows share a budget in training; else none."""
    if d.config.selection[0] != "batchtopk" or d.wiring.kind != "rows":
        return torch.zeros(0)
    return d.encode(d.wiring.split(d.gather([batch]))[0]).l0().float().cpu()


@dataclass
class Job:
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
    counts_by_threshold: list[Tensor] = field(default_factory=list)

    @staticmethod
    def of(
        name: str, dictionary: Dictionary, source: Source, path: Path | None,
        device: "str | torch.device | None", options: dict[str, Any],
    ) -> "Job":  # fmt: skip
        """Check everything that can be checked before any work."""
        known = [f.name for f in fields(TrainConfig)]
        for key in sorted(set(options) - set(known)):
            raise SaekitError(f"option {key!r} is not one of train's{nearest(key, known)}")
        rows_per_item = getattr(source, "rows_per_item", 1)
        config, reasons = resolve(TrainConfig(**options), dictionary.n_features, rows_per_item)
        points = check(dictionary, source, config)
        if not dictionary.reads and points != dictionary.wiring.unnamed:
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
        return Job(name, trainer, config, points, path, settings, fresh, config.batch_size * rows_per_item)

    @property
    def finished(self) -> bool:
        """Whether every step has been taken."""
        return self.trainer.step_number == self.config.steps

    def open(self, beginning: "Beginning") -> None:
        """Make or take up the run folder; set what depends on the data."""
        if self.path is not None:
            _prepare(self.path, self.settings, self.trainer)
            self.log = Log(self.path, self.trainer.step_number, self.config.wandb, self.settings)
        d = self.trainer.dictionary
        if not d.prepared:
            if not d.normalised:
                d.set_normalisation(beginning.of(self))
            if self.config.init is not None or d.needs_data:
                batch = d.gather(list(beginning.of(self)))
                if self.config.init is not None:
                    initialise(d, self.config.init, batch)
                if not d.prepared:
                    d.prepare(batch)
            d.prepared.fill_(True)
        self.began = (time.perf_counter(), self.trainer.step_number)

    def rewind(self, step: int) -> None:
        """Go back to the checkpoint of a step, for a run that others beside it look at."""
        assert self.path is not None  # runs without a folder begin together
        found = checkpoint.latest(self.path / "checkpoints", step)
        if found is None or found[1]["step"] != step:
            raise SaekitError(
                f"out {str(self.path)!r} holds no checkpoint of step {step}, from which the dictionaries that look at it go on; delete the runs and train again"
            )
        self.trainer.restore(found[0], step)
        if self.log is not None:
            self.log.close()
        self.log = Log(self.path, step, self.config.wandb, self.settings)

    @property
    def looks_at_others(self) -> bool:
        """Whether its loss depends on the dictionaries trained beside it."""
        return any(getattr(term, "peers", False) for term in self.trainer.dictionary.terms.values())

    def step(self, batch: "Tensor | ActivationBatch", peers: tuple[Tensor, ...]) -> None:
        """One step, with what is due after it."""
        trainer, config = self.trainer, self.config
        try:
            self.metrics = trainer.step(batch, peers=peers)
            if (config.steps - trainer.step_number) * self.rows < SETTLED:
                self.counts_by_threshold.append(_counts_by_threshold(trainer.dictionary, batch))
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
            steered = (getattr(term, "coefficient", term) for term in d.terms.values())
            misses = [part.missed() for part in steered if hasattr(part, "missed")]
            for missed in filter(None, [*misses, _short_of_k(d, self.record), self._off_threshold()]):
                warnings.warn(f"{self.name + ': ' if self.name else ''}{missed}", stacklevel=4)
            if self.path is not None:
                native.save(d, self.path)

    def _off_threshold(self) -> str | None:
        """What to say where the threshold at inference gives another L0 than the budget in training, or None."""
        counts = torch.cat([torch.zeros(0), *self.counts_by_threshold])
        if len(counts) == 0:
            return None
        k, l0 = self.trainer.dictionary.config.selection[1].k, counts.mean().item()
        error = counts.std(correction=0).item() / len(counts) ** 0.5
        if abs(l0 - k) <= max(0.1 * k, 3 * error):
            return None
        return f"k = {k} was asked for and L0 by the threshold at inference is {l0:.2f}: calibrate(dictionary, rows, {k}) sets it right, and larger batches let it settle"

    def result(self) -> Run:
        """How it ended."""
        error, why = self.error, None
        if error is not None:  # the text of a KeyError is a bare key
            why = str(error) if isinstance(error, SaekitError) else f"{type(error).__name__}: {error}"
        return Run(
            self.trainer.dictionary,
            self.path,
            self.trainer.step_number,
            self.finished and not why,
            self.record,
            why,
        )


def check(dictionary: Dictionary, source: Source, config: TrainConfig) -> tuple[str, ...]:
    """Raise unless the dictionary can be trained on the source; returns the hook points it reads."""
    wiring = dictionary.wiring
    offered = getattr(source, "hook_points", None) or getattr(
        getattr(source, "stream", None), "hook_points", None
    )
    points = dictionary.points
    if not points:
        points = wiring.points(*wiring.sites(offered)) if offered else wiring.unnamed
    if isinstance(source, Store | SideBySide | StoredSequences):
        for point in points:
            source.check(point)
    store = getattr(source, "store", source)
    if isinstance(store, Store) and not store.manifest["complete"]:
        warnings.warn(
            f"store {str(store.path)!r} is unfinished: training on the {store.n_rows} rows it holds; its harvest goes on when run again",
            stacklevel=3,
        )
    widths = (
        tuple(source.width(p) for p in points)
        if offered
        else getattr(source, "widths", (source.width(None),))
    )
    if sum(widths) != wiring.columns:
        fix = f"create it with {f'd_in={sum(widths)}' if wiring.takes == 'each' else 'the widths of its hook points'}"
        raise SaekitError(f"the data's width {sum(widths)} is not the dictionary's {wiring.stated}; {fix}")
    check_widths(dictionary, widths, points)
    if source.n_rows is not None and source.n_rows < config.batch_size:
        raise SaekitError(
            f"the data holds {source.n_rows} {'sequences' if hasattr(source, 'rows_per_item') else 'rows'} and one batch takes batch_size = {config.batch_size}; harvest more tokens or choose a smaller batch"
        )
    if not any(p.requires_grad for p in dictionary.parameters()):
        raise SaekitError("this dictionary is a control with nothing to train; evaluate it as it is")
    return points


def _origin(source: Source) -> dict[str, Any]:
    """Where the data came from, so that ``--config`` can repeat the run."""
    store = getattr(source, "store", source)
    if isinstance(store, Store):
        return {"acts": str(store.path.resolve())}
    if isinstance(source, SideBySide):
        return {"stores": {name: str(store.path.resolve()) for name, store in source.stores.items()}}
    stream = getattr(source, "stream", None)
    return (
        {"model": stream.model.name, "text": stream.text_identity()["name"], **stream.settings()}
        if stream
        else {}
    )


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


class Beginning:
    """The first batches of a stream, which normalisations and starts are taken from.

    Dictionaries trained together take them from one pass, whose batches are held where they fit into
    BEGINNING_BYTES; each gets the rows that it would get alone.
    """

    def __init__(self, source: Source, jobs: Sequence[Job]):
        self.source = source
        self.points = tuple(dict.fromkeys(point for job in jobs for point in job.points))
        self.held: list[Any] = []
        self.stream: Iterator[Any] | None = None

    def of(self, job: Job) -> Iterator[Any]:
        """The batches that a job is prepared with: about NORMALISATION_ROWS rows, fewer where they are very wide."""
        of_row = 4 * sum(self.source.width(point) for point in job.points)
        most = min(NORMALISATION_ROWS, BEGINNING_BYTES // of_row)
        have = (self.source.n_rows or NORMALISATION_ROWS) * job.rows // job.config.batch_size
        n = max(1, -(-min(most, have) // job.rows))
        of_all = 4 * sum(self.source.width(point) for point in self.points)
        given = job.config.batch_size, job.config.seed
        if n * job.rows * of_all > BEGINNING_BYTES:
            return islice(self.source.batches(job.points, *given), n)
        if self.stream is None:
            self.stream = iter(self.source.batches(self.points, *given))
        self.held += islice(self.stream, max(0, n - len(self.held)))
        part = columns_of(self.source, self.points, job.points)
        return (
            batch if part is None or not isinstance(batch, Tensor) else batch[:, part]
            for batch in self.held[:n]
        )


def columns_of(source: Source, points: Sequence[str], mine: Sequence[str]) -> Tensor | None:
    """The columns of some hook points in rows of more of them; None where they are all, in the same order."""
    if tuple(points) == tuple(mine):
        return None
    widths = [source.width(point) for point in points]
    starts = dict(zip(points, np.cumsum([0, *widths]).tolist(), strict=False))
    return torch.cat([torch.arange(starts[p], starts[p] + source.width(p)) for p in mine])
