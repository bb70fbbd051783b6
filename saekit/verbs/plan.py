"""``saekit plan``: memory, disk and time of a job, from a short trial of it on this machine."""

import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.errors import SaekitError
from saekit.verbs.console import Device, Json, Seed, duration, option_of, result
from saekit.verbs.train import FLAGS

COUNT_SECONDS = 10  # for counting the tokens of a text; a longer one is taken to be long enough


def plan(
    job: Annotated[str, typer.Argument(help="harvest or train.")],
    model: Annotated[str, typer.Option(help="Model.")] = "code-lm",
    text: Annotated[str, typer.Option(help="Text.")] = "stdlib",
    hook_point: Annotated[list[str], typer.Option("--hook-point", help="Hook points; repeatable.")] = [  # noqa: B006 (typer reads the default, nobody writes to it)
        "blocks.1.hook_resid_post"
    ],
    tokens: Annotated[int, typer.Option(help="harvest: tokens to read; 0 for the whole text.")] = 1_000_000,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a row: of a harvest, or of what a Lorsa is trained on.")
    ] = None,
    batch_rows: Annotated[int, typer.Option(help="harvest: rows of a forward pass.")] = 16,
    dtype: Annotated[str, typer.Option(help="harvest: stored as fp32, bf16, fp16 or int8.")] = "fp32",
    architecture: Annotated[str, typer.Option(help="train: name of the architecture.")] = "topk",
    d_in: Annotated[int, typer.Option(help="train: width of the rows.")] = 256,
    n_features: Annotated[int, typer.Option(help="train: width of the dictionary.")] = 4096,
    k: Annotated[int, typer.Option(help="train: active features per token.")] = 32,
    steps: Annotated[int, typer.Option(help="train: steps.")] = 1000,
    batch_size: Annotated[
        int | None, typer.Option(help="train: rows of a step, default 4096; of a Lorsa whole sequences.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="train: any other field of the architecture, e.g. --set n_layers=4 or --set n_qk=8; repeatable.",
        ),
    ] = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Predict what a job takes: a few passes of it are run and scaled up; nothing is left behind.

    Time is the command's, from its start to its end; memory is the peak anonymous memory of the process (what can't be reclaimed), disk what stays.

    Example: `saekit plan harvest --tokens 5000000 --dtype bf16`
    """
    jobs = {
        "harvest": {
            "model": model, "text": text, "hook_points": list(hook_point), "tokens": tokens, "context": context,
            "batch_rows": batch_rows, "dtype": dtype, "device": device,
        },
        "train": {
            "architecture": architecture, "d_in": d_in, "n_features": n_features, "k": k, "steps": steps,
            "batch_size": batch_size, "device": device, "seed": seed, "context": context, "options": dict(option_of(item, FLAGS) for item in option or []),
        },
    }  # fmt: skip
    if job not in jobs:
        raise SaekitError(f"job {job!r} is not one of 'harvest', 'train'")
    data = predict(job, jobs[job])
    shown = f"{job}: {duration(data['seconds'])}, {data['memory_bytes'] / 1e9:.2f} GB of memory, {data['disk_bytes'] / 1e9:.3f} GB of disk"
    result(data, as_json, f"{shown}\n(scaled up from {data['trial']}, on this machine as busy as it is now)")


def predict(job: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Prediction for a job; the trial runs in a process of its own, so that its peak is the job's."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "saekit.verbs.plan",
            job,
            json.dumps(settings),
            folder,
            str(time.time()),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        raise SaekitError(done.stderr.strip().removeprefix("error: "))
    if done.returncode:
        raise RuntimeError(f"the trial of {job} failed:\n{done.stderr}")
    data = json.loads(done.stdout.splitlines()[-1])
    data["seconds"] += time.time() - data.pop("ended_at")  # what a process takes to end
    return data


def _trial_harvest(settings: dict[str, Any], folder: Path, began_at: float) -> dict[str, Any]:
    """Harvest two shards: the peak comes with the first, the rate is the second's."""
    from saekit.harvest import bytes_per_token, harvest
    from saekit.harvest.shards import SHARD_BYTES

    whole_text = harvest(**{**settings, "tokens": settings.pop("tokens") or None})
    startup = time.time() - began_at  # Python, imports, the model: as the job's own
    wanted = _tokens(whole_text)
    times: list[tuple[int, float]] = []
    began = time.perf_counter()
    stream = harvest(**settings, tokens=1)
    startup -= time.perf_counter() - began  # the model is loaded once more below
    widths = [batch.activations[h].shape[-1] for batch in stream for h in stream.hook_points]
    per_token = bytes_per_token(widths, settings["dtype"])
    per_shard = max(settings["batch_rows"] * stream.context, SHARD_BYTES // per_token)
    began = time.perf_counter()
    trial = min(wanted, 2 * per_shard + 1)
    harvest(
        **settings,
        out=folder / "acts",
        tokens=trial,
        on_batch=lambda done, _: times.append((done, time.perf_counter())),
    )
    whole = time.perf_counter() - began
    (first, t0), (last, t1) = times[min(1, len(times) - 1)], times[-1]
    before = (t0 - began) - first * (t1 - t0) / max(1, last - first) if last > first else 0.0
    seconds = whole if wanted <= trial else max(0.0, before) + wanted * (t1 - t0) / (last - first)
    return {"seconds": startup + seconds, "disk_bytes": wanted * per_token, "trial": f"{last:,} tokens"}


def _tokens(stream: Any) -> int:
    """How many tokens a harvest will read: as many as asked for, unless the text ends before."""
    began, n = time.perf_counter(), 0
    for _, batch in stream.inputs():
        n += batch.mask.numel()
        if time.perf_counter() - began > COUNT_SECONDS:
            if stream.config.tokens is None:
                raise SaekitError(
                    f"tokens = 0: the text is too long to be counted in {COUNT_SECONDS} s; name a number of tokens"
                )
            return stream.config.tokens
    return n


def _trial_train(settings: dict[str, Any], folder: Path, began_at: float) -> dict[str, Any]:
    """Twelve steps on a small store of noise, with a checkpoint, then the time of a step."""
    import torch

    from saekit.dictionaries import create
    from saekit.harvest.stream import DEFAULT_CONTEXT
    from saekit.trainers import train

    startup = time.time() - began_at  # Python and imports: as the job's own
    steps, device = settings["steps"], settings["device"]
    shape = {key: settings[key] for key in ("d_in", "n_features", "k", "seed")} | settings["options"]
    shape = {key: tuple(value) if isinstance(value, list) else value for key, value in shape.items()}
    startup += -time.time()
    dictionary = create(settings["architecture"], **shape)
    startup += time.time()
    whole = dictionary.wiring.kind == "sequences"
    seq = (settings["context"] or DEFAULT_CONTEXT) if whole else 1
    batch_size = settings["batch_size"] or max(1, 4096 // seq)
    _noise(dictionary, batch_size, seq, folder / "acts")
    with torch.no_grad():  # a few dead features, as most runs have: they cost an extra pass
        for part in getattr(dictionary, "parts", [dictionary]):
            part.b_enc[::500] = -1e3
    n, marks = min(steps, 12), [time.perf_counter()]
    train(
        dictionary, str(folder / "acts"), n, batch_size, folder / "run", device=device, log_every=1, checkpoint_every=n,
        dead_after=batch_size, on_step=lambda *_: marks.append(time.perf_counter()),
    )  # fmt: skip
    ended = time.perf_counter()
    inner = sorted(b - a for a, b in pairwise(marks[1:])) or [marks[1] - marks[0]]
    step, checkpoint = inner[len(inner) // 2], ended - marks[-1]
    disk = sum(f.stat().st_size for f in (folder / "run").rglob("*") if f.is_file())
    states = sum(f.stat().st_size for f in (folder / "run" / "checkpoints").rglob("*") if f.is_file())
    return {
        "seconds": startup + marks[1] - marks[0] + (steps - 1) * step + min(10, steps) * checkpoint,
        "disk_bytes": disk + (states if steps > 1 else 0),  # two checkpoints are kept, the trial made one
        "trial": f"{n} steps",
    }


def _noise(dictionary: Any, batch_size: int, seq: int, folder: Path) -> None:
    """A store of four batches of noise, at the hook points that a dictionary reads and writes."""
    import torch

    from saekit.activations import SCHEMA
    from saekit.harvest.shards import ShardWriter
    from saekit.types import ActivationBatch

    w, generator = dictionary.wiring, torch.Generator().manual_seed(0)
    reads, writes = w.parts_in, () if w.columns == sum(w.parts_in) else w.parts_out
    widths = {f"x.{i}:in": n for i, n in enumerate(reads)} | {f"x.{i}:out": n for i, n in enumerate(writes)}
    manifest = {
        "schema": SCHEMA, "complete": True, "hook_points": {name: {"width": n} for name, n in widths.items()}, "dtype": "bf16", "seq": seq,
        "shards": [], "model": {}, "text": {}, "settings": {}, "norm_limits": {}, "batches_per_shard": 1,
    }  # fmt: skip
    writer = ShardWriter(folder, manifest)
    for _ in range(4):
        rows = {name: torch.randn(batch_size, seq, n, generator=generator) for name, n in widths.items()}
        writer.add(ActivationBatch(rows, torch.ones(batch_size, seq, dtype=torch.bool)))
        writer.flush()


def _main() -> None:
    """The trial process: prints one line of JSON."""
    job, settings, folder = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    import torch  # noqa: F401  (its import is part of what the job takes)

    from saekit.verbs.memory import PeakAnonymous, steady_malloc

    steady_malloc()  # as the job itself will

    try:
        with PeakAnonymous() as peak:
            data = {"harvest": _trial_harvest, "train": _trial_train}[job](
                settings, folder, float(sys.argv[4])
            )
    except SaekitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps({"job": job, **data, "memory_bytes": peak.bytes, "ended_at": time.time()}))


if __name__ == "__main__":
    _main()
