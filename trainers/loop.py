"""The one training loop: dictionaries of any kinds, fed step by step from one stream of activations."""

import signal
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saekit.activations import Source, Store, TensorSource
from saekit.dictionaries import Dictionary
from saekit.harvest import SequenceSource, SideBySide, StoredSequences, Stream, StreamSource
from saekit.registry import nearest
from saekit.trainers.config import TrainConfig
from saekit.trainers.job import Beginning, Job, Run, columns_of
from saekit.types import SaekitError


def as_source(source: Any, whole: bool = False) -> Source:
    """A tensor (or a pair, of inputs and outputs), a store's path, a store, a harvest stream, or a source itself.

    ``whole``: as whole sequences, which a tensor has as ``[n, seq, columns]``.
    """
    if whole:
        return _whole(source)
    if isinstance(source, Tensor):
        return TensorSource(source)
    if isinstance(source, str | Path):
        return Store(source)
    if isinstance(source, tuple) and all(isinstance(part, Tensor) for part in source):
        shapes = {part.shape[:-1] for part in source}
        if len(shapes) != 1:
            raise SaekitError(
                f"source holds tensors of shapes {', '.join(str(tuple(part.shape)) for part in source)}; give pairs, row by row"
            )
        return TensorSource(torch.cat(source, -1), tuple(part.shape[-1] for part in source))
    if isinstance(source, np.ndarray):
        return TensorSource(torch.from_numpy(source))
    if not isinstance(source, Stream | Source):
        raise SaekitError(
            f"source is of type {type(source).__name__}; give rows as a tensor, a store or its path, or what harvest() returns"
        )
    return StreamSource(source) if isinstance(source, Stream) else source


def _whole(source: Any) -> Source:
    if isinstance(source, str | Path | Store):
        return StoredSequences(source if isinstance(source, Store) else Store(source))
    if isinstance(source, StreamSource | Stream):
        return SequenceSource(source.stream if isinstance(source, StreamSource) else source)
    if isinstance(source, SideBySide):
        raise SaekitError(
            "source holds stores side by side, row by row, and this dictionary reads whole sequences; give one store"
        )
    return as_source(source)


def _takes_whole(dictionary: Dictionary) -> bool:
    return dictionary.wiring.kind == "sequences"


def default_batch(source: Source) -> int:
    """4096 rows, or as many whole sequences as come nearest to them."""
    return max(1, round(TrainConfig.batch_size / getattr(source, "rows_per_item", 1)))


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
    batch_size: int | None = None,
    out: "str | Path | None" = None,
    *,
    control: Dictionary | None = None,
    device: "str | torch.device | None" = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    **options: Any,
) -> Run:
    """Train a dictionary on a tensor, a store's path, or a harvest stream; resumes from ``out``.

    ``batch_size`` counts rows (default: 4096), or whole sequences for a dictionary that reads them (default: of
    as many positions). ``options`` are the other fields of :class:`TrainConfig`. The run folder holds ``config.json``,
    ``log.jsonl``, ``checkpoints/`` and in the end ``dictionary.safetensors`` with ``card.json``.
    ``on_step(step, record)`` is called where a log line is written. ``control`` is a dictionary that is
    trained beside it on the same batches, as a run of its own in the folder ``control``.
    """
    if control is not None:
        _check_apart({"dictionary": dictionary, "control": control})
    source = as_source(source, _takes_whole(dictionary))
    path = Path(out) if out is not None else None
    options |= {"steps": steps, "batch_size": default_batch(source) if batch_size is None else batch_size}
    job = Job.of("", dictionary, source, path, device, options)
    job.on_step = on_step
    jobs = [job]
    if control is not None:
        beside = path / "control" if path is not None else None
        as_made = {**options, "init": None, "resample_every": None}  # else it would be no control
        jobs.append(Job.of("control", control, source, beside, device, as_made))
    _run(jobs, source)
    for one in jobs:
        if one.error is not None:
            raise one.error
    return job.result()


def train_many(
    dictionaries: Mapping[str, Dictionary],
    source: Any,
    steps: int = 1000,
    batch_size: int | None = None,
    out: "str | Path | None" = None,
    *,
    device: "str | torch.device | None" = None,
    on_step: Callable[[str, int, dict[str, float]], None] | None = None,
    each: Mapping[str, Mapping[str, Any]] | None = None,
    **options: Any,
) -> dict[str, Run]:
    """Train dictionaries of any kinds from one stream of activations, each as it would be alone.

    The arguments are those of :func:`train` (where one reads whole sequences all do); ``each`` gives the options of single dictionaries that
    differ from the rest's (not steps, batch_size or seed, which decide the stream). ``out`` gets a
    folder of that name for each run, which is a run like any other. A run that fails is reported in its
    ``error`` and the others go on. ``on_step(name, step, record)`` is called where a log line is written.
    """
    if not dictionaries:
        raise SaekitError("dictionaries is empty; give at least one as {name: dictionary}")
    _check_apart(dictionaries)
    source = as_source(source, any(map(_takes_whole, dictionaries.values())))
    batch_size = default_batch(source) if batch_size is None else batch_size
    jobs, each = [], each or {}
    for name in sorted(set(each) - set(dictionaries)):
        raise SaekitError(
            f"each names {name!r}, which is not a dictionary{nearest(name, list(dictionaries))}"
        )
    for name, dictionary in dictionaries.items():
        if name in ("", "..") or Path(name).name != name:
            raise SaekitError(f"the name {name!r} of a dictionary can't be a folder's; choose another")
        own = dict(each.get(name, {}))
        for key in sorted({"steps", "batch_size", "seed"} & set(own)):
            raise SaekitError(
                f"{key} = {own[key]!r} of {name!r} alone would need a stream of its own; give it for all"
            )
        path = Path(out) / name if out is not None else None
        given = options | own | {"steps": steps, "batch_size": batch_size}
        jobs.append(Job.of(name, dictionary, source, path, device, given))
        if on_step is not None:
            jobs[-1].on_step = partial(on_step, name)
    _run(jobs, source)
    return {job.name: job.result() for job in jobs}


def _check_apart(dictionaries: Mapping[str, Dictionary]) -> None:
    """Raise where two share weights, which would be trained twice."""
    owner: dict[int, str] = {}
    for name, dictionary in dictionaries.items():
        for weight in dictionary.parameters():
            if (other := owner.setdefault(id(weight), name)) != name:
                raise SaekitError(f"{other!r} and {name!r} share weights, and each would train the other's; create one for each")  # fmt: skip


def _attempt(job: Job, action: Callable[[], None]) -> None:
    """Do a part of a job's work; its failure ends this job alone."""
    try:
        action()
    except Exception as error:  # whatever a plug-in raises
        job.fail(error)


def _run(jobs: Sequence[Job], source: Source) -> None:
    """Open every job, feed them all from one stream, close them."""
    _check_peers([job.trainer.dictionary for job in jobs if job.looks_at_others])
    try:
        beginning = Beginning(source, jobs)
        for job in jobs:
            _attempt(job, partial(job.open, beginning))
        del beginning  # and what it holds
        if any(job.looks_at_others for job in jobs):
            _together(jobs)
        _loop(jobs, source)
    finally:
        for job in jobs:
            _attempt(job, job.close)


def _loop(jobs: Sequence[Job], source: Source) -> None:
    running = [job for job in jobs if job.error is None and not job.finished]
    if not running:
        return
    first, config = min(job.trainer.step_number for job in running), running[0].config
    points = tuple(dict.fromkeys(point for job in running for point in job.points))
    own = {job.name: columns_of(source, points, job.points) for job in running}
    batches = source.batches(points, config.batch_size, config.seed, first)
    with _interruptible() as stopped:
        for step in range(first, config.steps):
            batch = next(batches)
            peers = _peers(running)
            for job in running:
                if job.trainer.step_number == step:  # others were further when they were interrupted
                    part = own[job.name]
                    mine = batch if part is None or not isinstance(batch, Tensor) else batch[:, part]
                    _attempt(job, partial(job.step, mine, peers.get(job.name, ())))
            running = [job for job in running if job.error is None and not job.finished]
            if stopped() is not None:
                for job in running:
                    _attempt(job, job.save)
                return
            if not running:
                return


def _check_peers(dictionaries: Sequence[Dictionary]) -> None:
    """Warn unless dictionaries that are drawn to each other can be told apart: from one start they stay one."""
    if not dictionaries:
        return
    with torch.no_grad():
        first, *others = (d.atoms.rows() for d in dictionaries)
    if all(torch.equal(first, other) for other in others):
        warnings.warn(
            f"objective 'mutual' draws dictionaries trained together to each other, and there is {'one' if not others else 'one start for all'}, "
            "so the term does nothing; train several that begin at seeds of their own (train_many, or --sweep seed=0,1)",
            stacklevel=4,
        )


def _together(jobs: Sequence[Job]) -> None:
    """Bring runs that were interrupted between each other's checkpoints to one step: a peer must not be ahead."""
    alive = [job for job in jobs if job.error is None]
    least = min((job.trainer.step_number for job in alive), default=0)
    for job in alive:
        if job.trainer.step_number > least:
            _attempt(job, partial(job.rewind, least))


def _peers(jobs: Sequence[Job]) -> dict[str, tuple[Tensor, ...]]:
    """For each dictionary that looks at others: their decoders, as they are before the step."""
    if not any(job.looks_at_others for job in jobs):
        return {}
    with torch.no_grad():
        rows = {job.name: job.trainer.dictionary.atoms.rows().clone() for job in jobs if job.looks_at_others}
    return {name: tuple(r for other, r in rows.items() if other != name) for name in rows}
