"""``saekit harvest``: activations of a text, as shards on disk."""

import time
from typing import Annotated, Any

import typer

from saekit.verbs.console import Device, Json, Seed, duration, progress, result

Model = Annotated[str, typer.Argument(help="code-lm, a Hugging Face folder, a hub id, or package:NAME.")]
Text = Annotated[str, typer.Argument(help="stdlib, a file, a folder, or a local or hub data set.")]
HookPoints = Annotated[list[str], typer.Option("--hook-point", help="Where to read, e.g. blocks.1.hook_resid_post or model.layers.3.mlp:in; globs work; repeatable.")]  # fmt: skip
Tokens = Annotated[int, typer.Option(help="Tokens to read; 0 for the whole text.")]
Context = Annotated[int | None, typer.Option(help="Tokens of a row; default: the model's own, at most 512.")]
BatchRows = Annotated[int, typer.Option(help="Rows of a forward pass.")]
Dtype = Annotated[str, typer.Option(help="Stored as fp32, bf16, fp16 or int8.")]


def harvest(
    model: Model,
    text: Text = "stdlib",
    hook_point: HookPoints = [],  # noqa: B006 (typer reads the default, nobody writes to it)
    out: Annotated[str, typer.Option(help="Folder of the store.")] = "acts",
    tokens: Tokens = 1_000_000,
    context: Context = None,
    batch_rows: BatchRows = 16,
    dtype: Dtype = "fp32",
    split: Annotated[str, typer.Option(help="Side of the text's split: train, held_out or all.")] = "train",
    isolate: Annotated[
        bool, typer.Option(help="One document per row, padded, instead of packed rows.")
    ] = False,
    role: Annotated[
        list[str] | None, typer.Option(help="Roles of chats whose tokens count; repeatable.")
    ] = None,
    outlier: Annotated[
        float, typer.Option(help="Mask tokens whose norm is this many times the median.")
    ] = 10.0,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Harvest activations into a store; goes on where an interrupted harvest stopped.

    Example: `saekit harvest code-lm stdlib --hook-point blocks.1.hook_resid_post --out acts`
    """
    from saekit.harvest import harvest as run

    began = time.monotonic()
    with progress("harvest", "tokens") as draw:
        store = run(
            model, text, hook_point, out=out, device=device, tokens=tokens or None, context=context,
            batch_rows=batch_rows, dtype=dtype, split=split, isolate=isolate, roles=role, outlier=outlier,
            on_batch=lambda done, total: draw(done, total, ""),
        )  # fmt: skip
    n_tokens = sum(entry["tokens"] for entry in store.manifest["shards"])
    size = sum(entry["bytes"] for entry in store.manifest["shards"])
    data: dict[str, Any] = {
        "out": str(store.path), "tokens": n_tokens, "rows": store.n_rows, "bytes": size,
        "hook_points": store.manifest["hook_points"], "seconds": time.monotonic() - began,
    }  # fmt: skip
    widths = ", ".join(f"{name} ({site['width']})" for name, site in store.manifest["hook_points"].items())
    result(
        data, as_json,
        f"{store.path}: {n_tokens:,} tokens, {store.n_rows:,} unmasked rows of {widths}, {size / 1e6:,.0f} MB in {duration(data['seconds'])}",
    )  # fmt: skip
