"""Runs that share a stream, on the command line: trained together, and a table of them."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saekit.verbs.console import progress, result, say


def run_many(
    dictionaries: Mapping[str, Any], source: Any, options: dict[str, Any], out: str, device: str | None,
    as_json: bool, each: Mapping[str, Mapping[str, Any]], front: bool,
) -> None:  # fmt: skip
    """Train them, and print a table; with ``front``, of runs at one place, also a figure of error over L0."""
    from saekit.report.sweep import draw, rows
    from saekit.trainers import train_many

    total, began = options["steps"], time.monotonic()
    with progress("train", "steps") as draw_bar:
        runs = train_many(
            dictionaries, source, out=out, device=device, each=each, **options,
            on_step=lambda name, step, r: draw_bar(step, total, f"{name}: fvu {r['fvu']:.3f} l0 {r['l0']:.1f}"),
        )  # fmt: skip
    for name, run in runs.items():
        if run.error:
            say(f"{name} failed: {run.error}")
    if not all(run.finished or run.error for run in runs.values()):
        say(f"stopped; saved in {out}: the same command goes on from there")
        sys.exit(130)
    found = rows(runs, source, options["batch_size"], options["seed"])
    data = {
        "runs": found,
        "failed": {n: r.error for n, r in runs.items() if r.error},
        "seconds": time.monotonic() - began,
    }
    width = max(30, *(len(r["name"]) for r in found), 0)
    lines = [f"{'run':{width}} {'L0':>8} {'FVU':>8} {'dead':>8}"]
    for r in found:
        star = " *" * (front and r["front"])
        lines.append(f"{r['name']:{width}} {r['l0']:8.1f} {r['fvu']:8.4f} {r['dead_share']:8.2%}{star}")
    if found and front:
        lines.append(f"* on the front; {draw(found, Path(out) / 'sweep.html').resolve()}")
    result(data, as_json, "\n".join(lines))
    if data["failed"]:
        sys.exit(1)
