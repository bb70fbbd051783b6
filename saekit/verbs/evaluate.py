"""``saekit eval``: the metric table of a dictionary."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.errors import SaekitError
from saekit.verbs.console import Device, Json, Seed, progress, result, say


def table(report: Any) -> str:
    """The measures as text: value, interval, unit, n, and the controls."""
    from rich.console import Console
    from rich.table import Table

    names = list(dict.fromkeys(name for m in report.values() for name in m.control))
    out = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("metric", "value", "95 % interval", "unit", "n", *names):
        out.add_column(column, justify="left" if column in ("metric", "unit") else "right")
    for key, m in report.items():
        if isinstance(m.value, list):
            continue
        span = f"{m.interval[0]:.4f} .. {m.interval[1]:.4f}" if m.interval else ""
        out.add_row(
            key,
            f"{m.value:.4f}",
            span,
            m.unit,
            f"{m.n:,}",
            *(f"{m.control[c]:.4f}" if c in m.control else "" for c in names),
        )
    console = Console(width=120)
    with console.capture() as captured:
        console.print(out)
    return captured.get().rstrip()


def _trained_control(path: Path, dictionary: Any) -> Any:
    """The frozen control that was trained beside a run, or in the sweep that the run is of; None where there is none."""
    from saekit.hub import load

    def shape(d: Any) -> tuple:
        choices = (d.config.selection, *d.config.objective)
        k = next((c.k for _, c in choices if getattr(c, "k", None) is not None), None)
        return d.reads, d.writes, d.n_features, d.wiring.normalise, k

    own = path / "control"
    if own.is_dir():
        return load(str(own))
    for folder in sorted(path.resolve().parent.glob("*frozen*")):
        if folder != path.resolve() and (folder / "dictionary.safetensors").exists():
            control = load(str(folder))
            wanted = shape(dictionary)
            if shape(control)[:4] == wanted[:4] and wanted[4] in (None, shape(control)[4]):
                return control
    return None


def _runs(paths: list[str]) -> tuple[list[str], Path]:
    """The dictionaries that are named, those inside where a folder of runs is, and the folder of all of them."""
    first = Path(paths[0])
    if len(paths) == 1 and first.is_dir() and not (first / "dictionary.safetensors").exists():
        inside = sorted(file.parent for file in first.glob("*/dictionary.safetensors"))
        controls = [run for run in inside if run.name == "frozen" or run.name.endswith("_frozen")]
        runs = [str(run) for run in inside if run not in controls]
        if runs:
            return runs, first
    return paths, first if len(paths) == 1 else Path(os.path.commonpath([os.path.abspath(p) for p in paths]))


TOKENS = 65536


def _check_unasked(suite: str, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if value is not None:
            raise SaekitError(
                f"--{name.replace('_', '-')} {value!r} is nothing that suite {suite!r} asks for; leave it out"
            )


def evaluate(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Dictionary or finished run. Several, or a folder of runs (as train --hook-points writes): all spliced in at once, each in the place of its module.",
            metavar="DICTIONARY...",
        ),
    ],
    model: Annotated[str | None, typer.Option(help="Model; default: the one it was harvested from.")] = None,
    text: Annotated[str | None, typer.Option(help="Text; default: the one it was harvested from.")] = None,
    hook_point: Annotated[str | None, typer.Option(help="Hook point; default: the dictionary's own.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to evaluate on; default: 65536.")] = None,
    split: Annotated[str | None, typer.Option(help="Side of the text's split; default: held_out.")] = None,
    controls: Annotated[
        bool, typer.Option(help="Also evaluate random dictionaries, and the run's control where it has one.")
    ] = True,
    ablation: Annotated[
        str | None,
        typer.Option(help="What CE recovered is measured against: zero (the default) or mean."),
    ] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="core, or one that asks about attributes of texts: sparse_probing, absorption, scr, tpp, ravel, unlearning."
        ),
    ] = "core",
    labels: Annotated[
        str | None,
        typer.Option(
            help="Texts and attributes of the other suites: a file of JSON lines, families (of Python modules; the default) or letters (first ones of tokens)."
        ),
    ] = None,
    attribute: Annotated[
        str | None, typer.Option(help="Attribute that is asked about; default: the first of the texts.")
    ] = None,
    spurious: Annotated[
        str | None,
        typer.Option(
            help="scr: attribute that goes with it where a biased probe is fitted; default: the second."
        ),
    ] = None,
    value: Annotated[
        str | None,
        typer.Option(
            help="unlearning: value of the attribute that is to be forgotten; default: the most frequent."
        ),
    ] = None,
    pool: Annotated[
        str | None, typer.Option(help="mean of a text's tokens, or its last one; default: the suite's.")
    ] = None,
    saebench: Annotated[
        str | None,
        typer.Option(
            help="Folder to write the result to as SAEBench does too, as EVAL/NAME_custom_sae_eval_results.json."
        ),
    ] = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Evaluate a dictionary on held-out text, beside random controls; writes eval.json into its folder.

    Several together, as a replacement of the model: eval.json goes into the folder that holds them all. Suites other than
    core write eval_SUITE.json.

    Example: `saekit eval run --tokens 65536` or `saekit eval run --suite tpp --labels texts.jsonl --attribute topic`
    """
    from saekit.evaluate import SUITES
    from saekit.evaluate import evaluate as run
    from saekit.harvest import check_writable
    from saekit.hub import load
    from saekit.hub.native import origin
    from saekit.registry import nearest

    if suite != "core" and suite not in SUITES:
        raise SaekitError(f"suite {suite!r} is unknown{nearest(suite, ['core', *SUITES.table])}")
    core = {"text": text, "hook_point": hook_point, "tokens": tokens, "split": split, "ablation": ablation}
    asking = {"attribute": attribute, "spurious": spurious, "value": value, "pool": pool}
    _check_unasked(suite, {"labels": labels, "saebench": saebench, **asking} if suite == "core" else core)
    if suite != "core":
        if len(paths) > 1:
            raise SaekitError(f"--suite {suite} is of one dictionary, and {len(paths)} are given; name one")
        report = _asked(
            suite, paths[0], model, "families" if labels is None else labels, (attribute, spurious), {"pool": pool, "value": value}, controls, device, seed, saebench
        )  # fmt: skip
        return result(report.to_json(), as_json, table(report))
    runs, folder = _runs(paths)
    found = [load(run, device=device) for run in runs]
    dictionary: Any = found[0] if len(paths) == 1 and runs == paths else found
    trained = _trained_control(Path(paths[0]), dictionary) if controls and dictionary is found[0] else None
    beside = controls if trained is None else {"frozen": trained.to(found[0].device)}
    check_writable(folder)
    own_model, own_text = origin(found[0].card)
    model, text = model or own_model, text or own_text
    if text is None:
        raise SaekitError(f"dictionary {runs[0]!r} was trained on text given in Python; name one with --text")
    with progress("evaluate", "tokens") as draw:
        report = run(
            dictionary, model, text, tokens=TOKENS if tokens is None else tokens, hook_point=hook_point, split="held_out" if split is None else split, controls=beside,
            ablation="zero" if ablation is None else ablation, device=device, seed=seed, on_batch=lambda done, total: draw(done, total, ""),
        )  # fmt: skip
    report.save(folder)
    result(report.to_json(), as_json, table(report))


def _asked(
    suite: str, path: str, model: str | None, labels: str, names: tuple[str | None, str | None],
    given: dict[str, str | None],     controls: bool, device: str | None, seed: int, saebench: str | None,
) -> Any:  # fmt: skip
    """The report of a suite that asks about attributes of texts, written into the dictionary's folder."""
    from saekit.evaluate import SUITES
    from saekit.evaluate.labelled import families, letters, read_texts
    from saekit.evaluate.saebench_json import check_saebench, write_saebench
    from saekit.harvest import check_writable
    from saekit.hub import load
    from saekit.hub.native import origin
    from saekit.models import load_model

    run, d = SUITES[suite], load(path, device=device)
    check_writable(Path(path))
    view = load_model(model or origin(d.card)[0], device=device)
    texts = {"families": families, "letters": lambda: letters(view)}.get(labels, lambda: read_texts(labels))()
    known = list(texts.attributes)
    # ravel asks for all that prompts ask for
    asked: list[Any] = [names[0] or (known[0] if suite != "ravel" else None)]
    if suite != "scr":
        _check_unasked(suite, {"spurious": names[1]})
    if suite == "scr":
        if names[1] is None and len(known) < 2:
            raise SaekitError(
                f"labels {labels!r} have the attribute {known[0]!r} alone, and scr takes two; give texts with another"
            )
        asked.append(names[1] or next(name for name in known if name != asked[0]))
    if saebench is not None:
        check_saebench(suite, texts.values(asked[0]) if suite == "absorption" else ())
        check_writable(Path(saebench))
    options: dict[str, Any] = {name: chosen for name, chosen in given.items() if chosen is not None}
    taken = inspect.signature(run).parameters
    _check_unasked(suite, {name: options[name] for name in options if name not in taken})
    options |= {"controls": controls, "seed": seed}
    with progress("evaluate", "texts") as draw:
        report = run(d, view, texts, *asked, **options, on_batch=lambda done, total: draw(done, total, suite))
    report.save(path)
    if saebench is not None:
        say(f"SAEBench's result: {write_saebench(report, d, Path(path).resolve().name, Path(saebench))}")
    return report
