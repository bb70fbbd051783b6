"""``saekit diff``: what a crosscoder's sources share, and what one has alone."""

from pathlib import Path
from typing import Annotated

import typer

from saekit.errors import SaekitError
from saekit.registry import nearest
from saekit.verbs.console import Device, Json, Seed, result


def diff(
    path: Annotated[str, typer.Argument(help="Finished run of a crosscoder.", metavar="RUN")],
    source: Annotated[
        str | None,
        typer.Option(help="Hook point or store whose own features are looked for; default: the last."),
    ] = None,
    other: Annotated[str | None, typer.Option(help="What it is compared with; default: the first.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of its stores to measure on.")] = 65536,
    out: Annotated[str | None, typer.Option(help="Folder for diff.json and diff.html; default: RUN.")] = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Norm differences and latent scaling of a crosscoder's features (Minder et al. 2025): a table and a page.

    Example: `saekit diff run --source tuned --other base`
    """
    import json

    import numpy as np
    import torch

    from saekit.activations import Store, write_atomic
    from saekit.harvest import SideBySide, check_writable
    from saekit.hub import load
    from saekit.report import diff as report
    from saekit.trainers import read_config

    if rows < 2:
        raise SaekitError(f"rows = {rows} must be at least 2")
    d = load(path, device=device)
    if d.config.wiring[0] != "crosscoder" or len(d.reads) < 2:
        raise SaekitError(
            f"dictionary {path!r} is of wiring {d.config.wiring[0]!r} and reads {len(d.reads)} hook point; a crosscoder of two or more can be compared"
        )
    target = Path(out) if out is not None else Path(path)
    check_writable(target)
    came = read_config(Path(path) / "config.json")["source"]
    stores = came.get("stores")
    if stores is None and "acts" not in came:
        raise SaekitError(
            f"dictionary {path!r} was trained on a live stream or on tensors, of which no rows are kept; train it on stores, or call saekit.report.diff.compare on rows"
        )
    acts = SideBySide({n: Store(p) for n, p in stores.items()}) if stores else Store(came["acts"])

    def index(name: str | None, default: int) -> int:
        if name is None:
            return default
        found = [i for i, point in enumerate(d.reads) if name in (point, point.partition("/")[0])]
        known = [*d.reads, *(point.partition("/")[0] for point in d.reads if "/" in point)]
        if len(found) != 1:
            raise SaekitError(
                f"{name!r} names {len(found)} of the sources {', '.join(d.reads)}{nearest(name, known)}"
            )
        return found[0]

    a, b = index(source, len(d.reads) - 1), index(other, 0)
    n = min(rows, acts.n_rows)
    at = np.sort(np.random.default_rng(seed).choice(acts.n_rows, n, replace=False))
    x = torch.cat([acts.gather(point, at) for point in d.reads], -1).to(d.device)
    found = report.compare(d, x, a, b)
    names = {"source": d.reads[a], "other": d.reads[b]}
    if stores:
        names = {key: point.partition("/")[0] for key, point in names.items()}
    quality = report.measured(d, x)
    data = {**names, "rows": n, **quality, "features": found}
    target.mkdir(parents=True, exist_ok=True)
    write_atomic(target / "diff.json", json.dumps(data).encode())
    page = report.draw(found, names["source"], names["other"], target / "diff.html")
    shown = f"L0 {quality['l0']:.1f}; FVU " + ", ".join(
        f"{name} {v:.4f}" for name, v in quality["fvu"].items()
    )
    shown += "\n" + report.summary(found, names["source"], names["other"])
    result({**data, "page": str(page)}, as_json, f"{shown}\n{page.resolve()}")
