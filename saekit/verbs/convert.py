"""``saekit convert``: a dictionary of one format, written in another, with what that changes."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from saekit.errors import SaekitError
from saekit.verbs.console import Json, option_of, result

if TYPE_CHECKING:
    from saekit.activations import Store
    from saekit.dictionaries import Dictionary

TOKENS = 16384  # of the sample that are measured on, and as many others that thresholds are chosen on


def convert(
    source: Annotated[
        str,
        typer.Argument(help="Dictionary: folder or file of any known format, or hf://owner/repo/name.", metavar="SRC"),
    ],
    out: Annotated[str, typer.Argument(help="New folder to write.", metavar="OUT")],
    to: Annotated[str, typer.Option(help="Format to write: native, saelens, ...")] = "native",
    from_: Annotated[str | None, typer.Option("--from", help="Format of SRC; default: by its content.")] = None,
    hook_point: Annotated[
        str | None, typer.Option(help="Hook point that is read, for files that don't say.")
    ] = None,
    hook_point_out: Annotated[
        str | None, typer.Option(help="Hook point that a transcoder writes, for files that don't say.")
    ] = None,
    k: Annotated[int | None, typer.Option(help="Active features per row, for files that don't say.", min=1)] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other option of SRC's format, e.g. --set input_hook=hook_resid_mid; repeatable."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="dtype of the written weights; default: the format's.")] = None,
    sample: Annotated[
        str | None, typer.Option(help="Store of activations on which L0 and FVU are measured.", metavar="ACTS")
    ] = None,
    thresholds: Annotated[
        bool,
        typer.Option("--thresholds", help="Turn a rule by rank into thresholds of the same L0 on half of the sample."),
    ] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Convert a dictionary between formats: what was folded, what the files don't say, and L0 and FVU before and after.

    What the target can't say is refused with the reason. Example: `saekit convert run out --to saelens --sample acts`
    """
    from saekit.hub import load, save
    from saekit.hub.formats import named

    if to != "native":
        named(to)
    if thresholds and sample is None:
        raise SaekitError("thresholds are chosen on activations; give a store with --sample")
    if Path(out).exists():
        raise SaekitError(f"out {out!r} is there already; choose a new folder, or remove it")
    said: dict[str, Any] = {"hook_point": hook_point, "hook_point_out": hook_point_out, "k": k}
    options = {name: value for name, value in said.items() if value is not None}
    options |= dict(option_of(item, said) for item in option or [])
    layers = _layers(Path(source)) if to == "circuit_tracer" else []
    if layers:
        return _set(layers, source, out, dtype, sample, thresholds, as_json)
    d = load(source, from_, **options)
    imported = d.card.get("imported", {})
    data: dict[str, Any] = {
        "source": source, "from": imported.get("format", "native"), "to": to, "out": str(Path(out).resolve()),
        "folded": imported.get("folded", []), "missing": imported.get("missing", []), "thresholds": thresholds,
    }  # fmt: skip
    if sample is None:
        save(d, out, to, **({} if dtype is None else {"dtype": dtype}))
    else:
        from saekit.activations import Store

        halves = _halves(Store(sample), d)
        changed = _thresholds(d, halves[1]) if thresholds else d
        before = measured(d, halves[0])
        save(changed, out, to, **({} if dtype is None else {"dtype": dtype}))
    again = load(out, to)
    if to != "native":
        data["lost"] = again.card.get("imported", {}).get("missing", [])
    if sample is not None:
        again.reads, again.writes = d.reads, d.writes  # by the store's names, whatever the format calls them
        data |= {"before": before, "after": measured(again, halves[0])}
    result(data, as_json, _text(data))


def _layers(source: Path) -> list[Path]:
    """The dictionaries of a set, such as `saekit train transcoder --hook-points` leaves, by rising layer."""
    if not source.is_dir() or (source / "card.json").is_file():
        return []
    found = [file.parent for file in source.glob("*/card.json") if "frozen" not in file.parent.name]
    return sorted(found, key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _set(
    layers: list[Path], source: str, out: str, dtype: str | None, sample: str | None, thresholds: bool, as_json: bool
) -> None:  # fmt: skip
    """Write a transcoder for each layer as one set."""
    from saekit.activations import Store
    from saekit.hub import load
    from saekit.hub.circuit_tracer import save

    given, lines = [load(path) for path in layers], []
    written, data = list(given), {"source": source, "to": "circuit_tracer", "out": str(Path(out).resolve())}
    rows: list[dict[str, Any]] = []
    for i, d in enumerate(given if sample is not None else ()):
        halves = _halves(Store(str(sample)), d)
        written[i] = _thresholds(d, halves[1]) if thresholds else d
        rows.append({"before": measured(d, halves[0]), "after": measured(written[i], halves[0])})
        lines.append(f"layer {i}: {_changed(rows[-1], thresholds)}")
    save(written, out, **({} if dtype is None else {"dtype": dtype}))
    text = [f"{len(layers)} transcoders -> circuit_tracer: {data['out']}", *lines]
    result({**data, "layers": len(layers), "measured": rows}, as_json, "\n".join(text))


def _text(data: dict[str, Any]) -> str:
    lines = [f"{data['from']} -> {data['to']}: {data['out']}"]
    lines += [f"folded: {what}" for what in data["folded"]]
    lines += [f"not in the files: {what}" for what in data["missing"]]
    lines += [f"not in what was written: {what}" for what in data.get("lost", ())]
    if "before" not in data:
        return "\n".join([*lines, "L0 and FVU were not measured; --sample ACTS does"])
    return "\n".join([*lines, _changed(data, data["thresholds"])])


def _changed(data: dict[str, Any], thresholds: bool) -> str:
    a, b = data["before"], data["after"]
    rule = ", by thresholds" if thresholds else ""
    return (
        f"L0 {a['l0']:.2f} -> {b['l0']:.2f}, FVU {a['fvu']:.4f} -> {b['fvu']:.4f} on {a['rows']:,} rows{rule}"
    )


def _halves(store: "Store", d: "Dictionary") -> tuple[list[Any], list[Any]]:
    """Batches of sequences that have what is read and written: those to measure on, and as many others."""
    from saekit.activations import ActivationBatch

    points = dict.fromkeys(d.points) or dict.fromkeys(store.hook_points)
    if not d.points and len(store.hook_points) > 1:
        raise SaekitError(
            f"the dictionary doesn't say where it reads, and store {str(store.path)!r} has {', '.join(store.hook_points)}; give --hook-point"
        )
    for point in points:
        store.check(point)
    halves: tuple[list[ActivationBatch], list[ActivationBatch]] = ([], [])
    counts = [0, 0]
    for i, batch in enumerate(store.sequences()):
        side = i % 2
        if counts[side] < TOKENS:
            halves[side].append(batch)
            counts[side] += int(batch.mask.sum())
        if min(counts) >= TOKENS:
            break
    return halves


def _sites(d: "Dictionary", batch: Any) -> tuple[Sequence[str], Sequence[str]]:
    only = tuple(batch.activations)
    return d.reads or only, d.writes or d.reads or only


def measured(d: "Dictionary", batches: Sequence[Any]) -> dict[str, float]:
    """``l0`` (active features per row) and ``fvu`` of what is written, with the number of ``rows``."""
    import torch

    from saekit import metrics

    counts, hats, targets = [], [], []
    with torch.no_grad():
        for batch in batches:
            reads, writes = _sites(d, batch)
            x = torch.cat([batch.activations[p] for p in reads], -1).float()
            codes = d.encode(x)
            counts.append(codes.l0()[batch.mask])
            hats.append(d.decode(codes, x)[batch.mask])
            targets.append(torch.cat([batch.activations[p] for p in writes], -1)[batch.mask].float())
    l0 = torch.cat(counts).double().mean().item() if counts else 0.0
    rows = sum(len(part) for part in targets)
    if rows < 2:
        raise SaekitError("the sample holds fewer than 2 rows; harvest more text")
    return {"l0": l0, "fvu": metrics.fvu(torch.cat(targets), torch.cat(hats)), "rows": rows}


def _thresholds(d: "Dictionary", batches: Sequence[Any]) -> "Dictionary":
    """The dictionary with thresholds of the mean L0 that its own rule has, chosen on other rows than are measured on."""
    import torch

    from saekit.dictionaries import calibrate

    if not batches:
        raise SaekitError("the sample is too small to choose thresholds beside measuring; harvest more text")
    reads, _ = _sites(d, batches[0])
    whole = [torch.cat([batch.activations[p] for p in reads], -1).float() for batch in batches]
    sequences = d.wiring.kind == "sequences"
    rows = torch.cat([x if sequences else x[batch.mask] for x, batch in zip(whole, batches, strict=True)])
    return calibrate(d, rows, measured(d, batches)["l0"])
