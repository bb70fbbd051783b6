"""``saekit released``: what is published, by model and hook point."""

import dataclasses
from typing import Annotated

import typer

from saekit.verbs.console import Json, result

SHOWN = ("l0", "fvu", "ce_recovered")


def released(
    model: Annotated[str | None, typer.Option(help="Of this model; * and ? are wild.")] = None,
    hook_point: Annotated[
        str | None, typer.Option(help="That read or write this hook point; * and ? are wild.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List dictionaries that were published with saekit; without a network, those that the cache knows.

    Example: `saekit released --model code-lm --hook-point 'blocks.*.hook_resid_post'`
    """
    from rich.console import Console
    from rich.table import Table

    from saekit.hub.index import released as found

    rows = found(model, hook_point)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("address", "model", "reads", "features", *SHOWN, "licence"):
        table.add_column(column, overflow="fold")
    for row in rows:
        numbers = [f"{row.metrics[key]['value']:.4g}" if key in row.metrics else "" for key in SHOWN]
        table.add_row(
            row.address, row.model, ", ".join(row.reads), f"{row.n_features:,}", *numbers, row.licence
        )
    console = Console(width=140)
    with console.capture() as captured:
        console.print(table)
    text = captured.get().rstrip()
    if not rows:
        every = found() if model or hook_point else []
        known = ", ".join(sorted({one.model for one in every})) or "none"
        text = f"no dictionary is published for these; models that have some: {known}"
    result([dataclasses.asdict(row) for row in rows], as_json, text)
