"""``saekit train``: a dictionary from a store, or live from a model."""

import dataclasses
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.errors import SaekitError
from saekit.registry import nearest
from saekit.verbs.console import Device, Json, Seed, duration, option_of, progress, result, say
from saekit.verbs.many import run_many
from saekit.verbs.places import batch_size_of, begun, layer_of, open_source, widths


def train(
    architecture: Annotated[
        str, typer.Argument(help="A name from the dictionaries' table, e.g. topk.")
    ] = "topk",
    acts: Annotated[
        list[str] | None,
        typer.Option(
            help="Store to train on (from `saekit harvest`). Repeated, for a crosscoder: stores of the same text, each of another model; their hook points are STORE/HOOK_POINT."
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Without --acts: model to harvest from while training.")
    ] = "code-lm",
    text: Annotated[str, typer.Option(help="Without --acts: its text.")] = "stdlib",
    hook_point: Annotated[
        str | None,
        typer.Option(
            help="Hook point; of a transcoder a module, or the two that it reads and writes, with a comma. Needed where the store holds more."
        ),
    ] = None,
    hook_points: Annotated[
        str | None,
        typer.Option(
            help="A glob: one dictionary for each hook point (of a transcoder: module) it matches, from one stream, e.g. 'blocks.*.mlp'."
        ),
    ] = None,
    n_features: Annotated[int, typer.Option(help="Width of the dictionary.")] = 4096,
    k: Annotated[int, typer.Option(help="Active features per token.")] = 32,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any other field of the architecture or of the training, e.g. --set k_aux=64, --set optimizer=sparse_adam; repeatable.",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            help="Several values of a field, e.g. --sweep k=16,32,64, or of architecture; one run each, from one stream. Repeatable: all combinations."
        ),
    ] = None,
    control: Annotated[
        bool | None,
        typer.Option(
            "--control/--no-control",
            help="Also train a TopK with a frozen random decoder, from the same stream: what eval then compares the run with. A sweep does, as rows of its table, unless told not to.",
        ),
    ] = None,
    out: Annotated[str, typer.Option(help="Folder of the run; an interrupted run in it goes on.")] = "run",
    steps: Annotated[
        int | None, typer.Option(help="Steps; default: one pass over the store, or 1000.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Rows of a step, default 4096; of a Lorsa whole sequences, by default as many as hold so many."
        ),
    ] = None,
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
    from saekit.trainers import TrainConfig
    from saekit.trainers import train as run

    if config is not None:
        dictionary, source, options = _repeat(Path(config))
        beside = {}
    else:
        trains = {f.name for f in dataclasses.fields(TrainConfig)}
        extra = dict(option_of(item, FLAGS) for item in option or [])
        wiring = _wiring(architecture, extra)
        source, found = open_source(acts or (), model, text, wiring, hook_point, hook_points, device)
        batch_size = batch_size_of(source, batch_size)
        other = {key: extra.pop(key) for key in list(extra) if key in trains}
        fields = {"architecture": architecture, "n_features": n_features, "k": k, **extra}
        whole = max(1, source.n_rows // max(1, batch_size)) if source.n_rows and acts else 1000
        options = {
            "steps": whole if steps is None else steps, "batch_size": batch_size, "lr": lr,
            "dead_after": dead_after, "checkpoint_every": checkpoint_every, "log_every": log_every, "wandb": wandb, "seed": seed, **other,
        }  # fmt: skip
        made: dict[str, dict[str, Any]] = {}  # by place, and there by name
        each: dict[str, dict[str, Any]] = {}
        for name, place in found.items():
            here = {**widths(source, place, wiring), **begun(source, place, wiring, fields, device), **fields}
            if sweep:
                made[name], own = _sweep(here, sweep, seed, wiring, control is not False)
                each |= {f"{name}_{run}" if name else run: chosen for run, chosen in own.items()}
            else:
                made[name] = {
                    "": _create(here, seed),
                    **({"frozen": _frozen(here, seed, wiring)} if control else {}),
                }
                each |= {f"{name}_frozen": AS_MADE} if control else {}
            for d in made[name].values():
                d.reads, d.writes = place
        if sweep or "" not in made:
            runs = {"_".join(filter(None, (n, run))): d for n, ds in made.items() for run, d in ds.items()}
            run_many(runs, source, options, out, device, as_json, each, front="" in made)
            return
        dictionary, control_ = made[""][""], made[""].get("frozen")
        beside = {"control": control_} if control_ is not None else {}
    began, total = time.monotonic(), options.get("steps", TrainConfig.steps)
    with progress("train", "steps") as draw:
        done = run(
            dictionary, source, out=out, device=device, **options, **beside,
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


AS_MADE = {"init": None, "resample_every": None}  # of controls, which else would be none
# what --set leaves to flags of their own
FLAGS = {
    "n_features",
    "k",
    "seed",
    "steps",
    "batch_size",
    "lr",
    "dead_after",
    "checkpoint_every",
    "log_every",
    "wandb",
}


def _create(fields: dict[str, Any], seed: int) -> Any:
    from saekit.dictionaries import create

    options = dict(fields)
    return create(options.pop("architecture"), seed=seed, **options)


def _wiring(architecture: str, extra: dict[str, Any]) -> Any:
    from saekit.dictionaries import PRESETS
    from saekit.dictionaries.wiring import WIRINGS

    if architecture not in PRESETS:
        raise SaekitError(f"architecture {architecture!r} is unknown{nearest(architecture, PRESETS)}")
    name = extra.get("wiring", PRESETS[architecture].get("wiring", "autoencoder"))
    if name not in WIRINGS:
        raise SaekitError(f"wiring {name!r} is unknown{nearest(name, WIRINGS.table)}")
    return WIRINGS[name]


def _frozen(fields: dict[str, Any], seed: int, wiring: Any) -> Any:
    """The control of what a decoder learns: random atoms under a TopK encoder that is trained."""
    from saekit.dictionaries import create
    from saekit.dictionaries.wiring import WIRINGS

    name = next(name for name in WIRINGS if WIRINGS[name] is wiring)
    keys = ("n_features", "k", "d_in", "d_out", "normalise", "attention", "n_qk", "d_qk")
    shape = {key: fields[key] for key in keys if key in fields}
    return create("frozen", seed=seed, wiring=name, **shape)


def _sweep(
    fields: dict[str, Any], sweep: list[str], seed: int, wiring: Any, control: bool
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A dictionary for each combination of the values, and the training options that are its own."""
    from saekit.trainers import TrainConfig

    axes: dict[str, list[Any]] = {}
    for name, given in map(_axis, sweep):
        if name in axes:
            raise SaekitError(f"--sweep names {name} twice; give all its values at once")
        axes[name] = given
    trains = {f.name for f in dataclasses.fields(TrainConfig)} - {"seed"}
    dictionaries, each = {}, {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        name = _run_name(chosen)
        if name in dictionaries:
            raise SaekitError(f"--sweep gives {name} twice; leave one out")
        each[name] = {key: value for key, value in chosen.items() if key in trains}
        mine = {key: value for key, value in chosen.items() if key not in trains}
        own_seed = _checked_seed(mine.pop("seed", seed))
        dictionaries[name] = _create({**fields, **mine}, own_seed)
        # one frozen control for each width, k and normalisation among them
        shape = {key: value for key, value in mine.items() if key in ("n_features", "k", "normalise")}
        beside = _run_name({"frozen": "", **shape})
        if control and beside not in dictionaries:
            dictionaries[beside] = _frozen({**fields, **shape}, seed, wiring)
            each[beside] = AS_MADE
    return dictionaries, each


def _checked_seed(seed: Any) -> int:
    """A seed of the sweep: that of a dictionary's start, while the stream stays that of --seed."""
    if not isinstance(seed, int) or seed < 0:
        raise SaekitError(f"--sweep seed: {seed!r} must be a whole number of at least 0")
    return seed


def _run_name(chosen: dict[str, Any]) -> str:
    """A name that can be a folder's."""
    parts = (f"{key}-{value}" if value != "" else key for key, value in chosen.items())
    return "_".join(parts).replace("/", "-").replace("\\", "-")


def _axis(item: str) -> tuple[str, list[Any]]:
    name, sign, values = item.partition("=")
    if not sign or not values:
        raise SaekitError(f"--sweep {item!r} has no values; write --sweep {name}=A,B,C")
    if name in ("steps", "batch_size", "d_in"):
        raise SaekitError(f"--sweep {item!r}: all runs share one stream, so {name} is the same for all")
    out = []
    for value in values.split(","):
        try:
            out.append(json.loads(value))
        except ValueError:
            out.append(value)
    return name, out


def _model_of(source: dict[str, Any]) -> str:
    from saekit.activations import read_manifest

    return source["model"] if "model" in source else read_manifest(Path(source["acts"]))["model"]["name"]


def _repeat(path: Path) -> tuple[Any, Any, dict[str, Any]]:
    """Dictionary, source and options of a run, from the config.json in its folder."""
    from saekit.activations import Store
    from saekit.dictionaries import Config, build
    from saekit.harvest import SideBySide, StreamSource
    from saekit.harvest import harvest as harvest_
    from saekit.trainers import TrainConfig, read_config, weights_digest

    data = read_config(path)
    if "betas" in data["train"]:
        data["train"]["betas"] = tuple(data["train"]["betas"])  # JSON has lists alone
    TrainConfig(**data["train"])
    dictionary = build(Config.from_json(data["dictionary"]), seed=data["init_seed"])
    dictionary.reads, dictionary.writes = dictionary.wiring.sites(data["hook_points"])
    source = data["source"]
    wanted = data.get("init", weights_digest(dictionary))
    if dictionary.wiring.kind == "sequences" and weights_digest(dictionary) != wanted:
        dictionary.begin_from(layer_of(_model_of(source), dictionary.reads[0]))
    if weights_digest(dictionary) != wanted:
        raise SaekitError(
            f"config {str(path)!r} is of a run that went on from trained weights, which it doesn't hold; repeat it from Python"
        )
    if "stores" in source:
        stores = {name: Store(folder) for name, folder in source["stores"].items()}
        return dictionary, SideBySide(stores), data["train"]
    if "acts" in source:
        return dictionary, Store(source["acts"]), data["train"]
    if "model" not in source or "text" not in source:
        raise SaekitError(f"config {str(path)!r} is of a run on a tensor in memory; repeat it from Python")
    options = {key: value for key, value in source.items() if key not in ("model", "text", "hook_points")}
    stream = harvest_(source["model"], source["text"], data["hook_points"], **options)
    return dictionary, StreamSource(stream), data["train"]
