"""``saekit train``: a dictionary from a store, or live from a model."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.types import SaekitError
from saekit.verbs.console import Device, Json, Seed, duration, progress, result, say


def train(
    architecture: Annotated[
        str, typer.Argument(help="A name from the dictionaries' table, e.g. topk.")
    ] = "topk",
    acts: Annotated[str | None, typer.Option(help="Store to train on (from `saekit harvest`).")] = None,
    model: Annotated[
        str, typer.Option(help="Without --acts: model to harvest from while training.")
    ] = "code-lm",
    text: Annotated[str, typer.Option(help="Without --acts: its text.")] = "stdlib",
    hook_point: Annotated[
        str | None, typer.Option(help="Hook point; needed where the store holds several.")
    ] = None,
    n_features: Annotated[int, typer.Option(help="Width of the dictionary.")] = 4096,
    k: Annotated[int, typer.Option(help="Active features per token.")] = 32,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other field of the architecture, e.g. --set k_aux=64; repeatable."),
    ] = None,
    out: Annotated[str, typer.Option(help="Folder of the run; an interrupted run in it goes on.")] = "run",
    steps: Annotated[
        int | None, typer.Option(help="Steps; default: one pass over the store, or 1000.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a step.")] = 4096,
    lr: Annotated[
        float | None, typer.Option(help="Peak rate of Adam; default: from the width and the steps.")
    ] = None,
    dead_after: Annotated[
        int | None, typer.Option(help="Rows without firing that make a feature dead.")
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(help="Steps between checkpoints; default: a tenth.")
    ] = None,
    log_every: Annotated[int, typer.Option(help="Steps between log lines.")] = 10,
    wandb: Annotated[
        str | None, typer.Option(help="Also log to this wandb project (WANDB_MODE=offline works).")
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Repeat a run from its config.json; only --out and --device are read beside it."),
    ] = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a dictionary; ends cleanly on Ctrl-C and goes on when the command is run again.

    Example: `saekit train topk --acts acts --n-features 4096 --k 32 --out run`
    """
    from saekit.dictionaries import create
    from saekit.trainers import TrainConfig
    from saekit.trainers import train as run

    if config is not None:
        dictionary, source, options = _repeat(Path(config))
    else:
        source, width = _source(acts, model, text, hook_point, batch_size, device)
        extra = dict(_option(item) for item in option or [])
        dictionary = create(architecture, n_features=n_features, k=k, seed=seed, **{"d_in": width, **extra})
        whole = max(1, source.n_rows // max(1, batch_size)) if source.n_rows else 1000
        options = {
            "steps": whole if steps is None else steps, "batch_size": batch_size, "lr": lr,
            "dead_after": dead_after, "checkpoint_every": checkpoint_every, "log_every": log_every, "wandb": wandb, "seed": seed,
        }  # fmt: skip
        if hook_point:
            dictionary.reads, dictionary.writes = dictionary.wiring.sites([hook_point])
    began, total = time.monotonic(), options.get("steps", TrainConfig.steps)
    with progress("train", "steps") as draw:
        done = run(
            dictionary, source, out=out, device=device, **options,
            on_step=lambda step, r: draw(step, total, f"loss {r['loss']:.2f} fvu {r['fvu']:.3f} dead {r['dead_share']:.1%}"),
        )  # fmt: skip
    if not done.finished:
        say(f"stopped; saved at step {done.steps} of {total} in {out}: the same command goes on from there")
        sys.exit(130)
    data: dict[str, Any] = {
        "out": str(done.path),
        "steps": done.steps,
        "seconds": time.monotonic() - began,
        "metrics": done.metrics,
    }
    m = done.metrics
    shown = f"fvu {m['fvu']:.3f}, l0 {m['l0']:.1f}, dead {m['dead_share']:.1%}" if m else "nothing left to do"
    result(data, as_json, f"{done.path}: {done.steps} steps in {duration(data['seconds'])}; {shown}")


def _option(item: str) -> tuple[str, Any]:
    name, sign, value = item.partition("=")
    if not sign:
        raise SaekitError(f"--set {item!r} has no value; write --set {item}=VALUE")
    if name in ("n_features", "k", "seed"):
        flag = name.replace("_", "-")
        raise SaekitError(f"--set {item!r}: {name} has a flag of its own; write --{flag} {value}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _source(
    acts: str | None, model: str, text: str, hook_point: str | None, batch_size: int, device: str | None
) -> tuple[Any, int]:
    """The source of rows, and their width."""
    from saekit.activations import Store
    from saekit.harvest import StreamSource
    from saekit.harvest import harvest as harvest_

    if acts is not None:
        store = Store(acts)
        if hook_point is None and len(store.hook_points) > 1:
            raise SaekitError(
                f"store {acts!r} holds several hook points; choose one with --hook-point: {', '.join(store.hook_points)}"
            )
        point = hook_point or store.hook_points[0]
        store.check(point)
        if store.n_rows < batch_size:
            raise SaekitError(
                f"store {acts!r} holds {store.n_rows} rows and one batch takes batch_size = {batch_size}; harvest more tokens or choose a smaller --batch-size"
            )
        return store, store.width(point)
    if hook_point is None:
        raise SaekitError(
            "neither --acts nor --hook-point is given; name a store, or where in the model to read"
        )
    source = StreamSource(harvest_(model, text, [hook_point], tokens=None, device=device))
    return source, source.width(hook_point)


def _repeat(path: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Dictionary, source and options of a run, from the config.json in its folder."""
    from saekit.activations import Store
    from saekit.dictionaries import Config, Dictionary
    from saekit.harvest import StreamSource
    from saekit.harvest import harvest as harvest_
    from saekit.trainers import TrainConfig, read_config, weights_digest

    data = read_config(path)
    if "betas" in data["train"]:
        data["train"]["betas"] = tuple(data["train"]["betas"])  # JSON has lists alone
    TrainConfig(**data["train"])
    dictionary = Dictionary(Config.from_json(data["dictionary"]), seed=data["init_seed"])
    dictionary.reads, dictionary.writes = dictionary.wiring.sites(data["hook_points"])
    if data.get("init", weights_digest(dictionary)) != weights_digest(dictionary):
        raise SaekitError(
            f"config {str(path)!r} is of a run that went on from trained weights, which it doesn't hold; repeat it from Python"
        )
    source = data["source"]
    if "acts" in source:
        return dictionary, Store(source["acts"]), data["train"]
    if "model" not in source or "text" not in source:
        raise SaekitError(f"config {str(path)!r} is of a run on a tensor in memory; repeat it from Python")
    options = {key: value for key, value in source.items() if key not in ("model", "text", "hook_points")}
    stream = harvest_(source["model"], source["text"], data["hook_points"], **options)
    return dictionary, StreamSource(stream), data["train"]
