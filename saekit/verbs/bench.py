"""``saekit bench``: how fast the kernels are, as a ratio to one dense product, and that they are right."""

import json
import subprocess
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.errors import SaekitError
from saekit.registry import nearest
from saekit.verbs.console import Json, Seed, result, say

OWN = {"hierarchical": {"k": 128}, "pursuit": {"d_in": 256, "n_features": 4096, "k": 16, "batch": 512}}
SCALES = (4096, 16384, 65536, 131072)


def bench(
    case: Annotated[list[str] | None, typer.Option(help="Only this case; repeatable. Default: all.")] = None,
    d_in: Annotated[int, typer.Option(help="Width of the rows.")] = 512,
    n_features: Annotated[int, typer.Option(help="Width of the dictionary.")] = 16384,
    k: Annotated[int, typer.Option(help="Active features per row.")] = 32,
    batch: Annotated[int, typer.Option(help="Rows of a step.")] = 2048,
    steps: Annotated[int, typer.Option(help="Timed steps.")] = 10,
    shortlist: Annotated[
        list[str] | None,
        typer.Option(help="fp32 or bf16; repeatable. Default: both where the CPU has a matrix unit."),
    ] = None,
    peers: Annotated[
        str | None,
        typer.Option(help="Python of an environment with sae-lens, dictionary-learning or eai-sparsify."),
    ] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Also a TopK step at 4096 to 131072 features, drawn.")
    ] = False,
    record: Annotated[bool, typer.Option(help="Append the rows to kernels/results.jsonl.")] = True,
    plot: Annotated[str, typer.Option(help="Where --scaling draws.")] = "bench.html",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time operations, training steps of selections and of wirings; a case that isn't proven right gets no speed.

    Example: `saekit bench --case topk --case transcoder --peers .peers/bin/python`
    """
    from saekit.kernels import bench as kernels
    from saekit.kernels.backend import matrix_unit
    from saekit.verbs import step_costs

    known = [*kernels.OPERATIONS, *kernels.STEPS, *step_costs.WIRINGS]
    for name in case or []:
        if name not in known:
            raise SaekitError(f"case {name!r} is unknown{nearest(name, known)}")
    for field, value in (("d_in", d_in), ("n_features", n_features), ("batch", batch), ("steps", steps)):
        if value < (2 if field == "steps" else 1):
            raise SaekitError(
                f"{field} = {value} is too small; choose at least {2 if field == 'steps' else 1}"
            )
    if not 1 <= k <= n_features:
        raise SaekitError(f"k = {k} must lie in 1..n_features = {n_features}; choose a smaller k")
    lists = shortlist or ["fp32", *(["bf16"] if matrix_unit() else [])]
    for name in lists:
        if name not in ("fp32", "bf16"):
            raise SaekitError(f"shortlist {name!r} is not one of 'fp32', 'bf16'")
    if peers is not None and not Path(peers).is_file():
        raise SaekitError(
            f"peers {peers!r} is no file; give the python of an environment, as in .peers/bin/python"
        )
    given = {"d_in": d_in, "n_features": n_features, "k": k, "batch": batch}
    rows: list[dict[str, Any]] = []
    for name in case or known:
        # cases of another kind have their own shape, unless one is asked for by name alone
        shape = kernels.Shape(**{**given, **(OWN.get(name, {}) if not case else {})})
        if name in step_costs.WIRINGS:
            rows.append(step_costs.measure(name, shape, steps))
            say(step_costs.line(rows[-1]))
            continue
        for kind in lists:
            row = kernels.measure(name, shape, kind, steps, seed)
            if name in kernels.STEPS and row["parity_holds"]:
                row.update(kernels.peak_memory(name, shape, kind))
            rows.append(row)
            say(_line(row))
        if peers is not None:
            rows += _peers(peers, name, shape, [r for r in rows if r["case"] == name and "p50_ms" in r])
    if scaling:
        found = [
            kernels.measure("topk", kernels.Shape(d_in, n, k, batch), kind, steps, seed)
            for n in SCALES
            for kind in lists
        ]
        for row in found:
            say(_line(row))
        rows += found
        _draw(found, plot)
    if record:
        kernels.record(rows)
    failed = [row["case"] for row in rows if not row.get("parity_holds", True)]
    result(
        rows,
        as_json,
        f"{len(rows)} rows" + (f"; parity fails for {', '.join(failed)}" if failed else "; parity holds"),
    )
    if failed:
        raise typer.Exit(1)


def _line(row: dict[str, Any]) -> str:
    sizes = f"{row['d_in']} -> {row['n_features']}, k {row['k']}, batch {row['batch']}"
    head = f"{row['case']:13} {row['shortlist']:5} {sizes:38}"
    if not row["parity_holds"]:
        return f"{head} parity FAILS ({row['parity']:.1e}): no speed"
    memory = ""
    if "extra" in row:
        memory = f", memory {row['extra'] / 1e6:.0f} MB = {row['extra'] / row['parameters_gradients_states']:.2f} of parameters, gradients and states"
    return f"{head} {row['p50_ms']:8.1f} ms = {row['ratio']:.2f} x the product's {row['floor_ms']:.1f} ms ({row['floor_reused_ms']:.1f} into a buffer), parity {row['parity']:.0e}{memory}"


def _peers(python: str, name: str, shape: Any, ours: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the peers that have such a case and are installed there, and the ratios to ours."""
    from saekit.kernels import peers

    rows = []
    for peer, (_, kinds) in peers.PEERS.items():
        if name not in kinds:
            continue
        settings = json.dumps([peer, name, shape.d_in, shape.n_features, shape.k, shape.batch, 6])
        done = subprocess.run([python, peers.__file__, settings], capture_output=True, text=True)
        if done.returncode:
            say(
                f"  {peer}: not timed ({done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no message'})"
            )
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        ratios = ", ".join(f"{row['p50_ms'] / r['p50_ms']:.1f} x ours ({r['shortlist']})" for r in ours)
        say(f"  {peer}: {row['p50_ms']:.0f} ms = {ratios}")
        rows.append(
            {**vars(shape), **row, **{f"over_{r['shortlist']}": row["p50_ms"] / r["p50_ms"] for r in ours}}
        )
    return rows


def _draw(rows: list[dict[str, Any]], path: str) -> None:
    """Ratio to the dense product over the width of the dictionary."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for kind in dict.fromkeys(row["shortlist"] for row in rows):
        mine = [row for row in rows if row["shortlist"] == kind and row["parity_holds"]]
        figure.add_scatter(
            x=[r["n_features"] for r in mine], y=[r["ratio"] for r in mine], name=kind, mode="lines+markers"
        )
    figure.update_layout(
        title="A whole TopK training step, as a multiple of one fp32 encode product",
        xaxis={"title": "features", "type": "log"}, yaxis={"title": "step / product", "rangemode": "tozero"}, template="plotly_white",
    )  # fmt: skip
    figure.write_html(path, include_plotlyjs=True)
    say(f"scaling: {Path(path).resolve()}")
