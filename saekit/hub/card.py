"""The model card of a repository of dictionaries, made from what their runs recorded.

A dictionary's facts are one entry of the index file (:mod:`saekit.hub.index` has its fields), and the card is made from the
index alone, so that publishing another dictionary into the same repository keeps what the card says of the others.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from saekit import records
from saekit.dictionaries import Dictionary
from saekit.hub.index import MEASURE, TAG
from saekit.tokens import GIVEN
from saekit.types import SaekitError

# the metrics of the table of all dictionaries
SUMMARY = ("l0", "fvu", "ce_recovered", "dead_share")
OURS = {"code-lm": "code-lm, which ships with saekit", "stdlib": "stdlib, Python's standard library"}
KIND = {
    "autoencoder": "sparse-autoencoder", "transcoder": "transcoder", "crosscoder": "crosscoder", "cross_layer": "cross-layer-transcoder",
    "lorsa": "lorsa", "molt": "mixture-of-linear-transforms",
}  # fmt: skip
EVAL = {
    "about": {"tokens?": int, "split?": str, "text?": {"name?": str}},
    "measures": {"*": {"value": float | list | None, "n": int, "unit": str}},
}
FIX = {
    "licence": "give licence='apache-2.0' or another (--licence)",
    "base_model": "give base_model='owner/name' of the Hub (--base-model)",
    "data": "say what it was trained on with data='owner/name' of the Hub, or in words (--data)",
    "reads": "set dictionary.reads to the hook points that it reads",
    "writes": "set dictionary.writes to the hook points that it writes",
    "metrics": "run `saekit eval` on it, or set dictionary.card['metrics'] to {key: {value, n, unit}}",
}


def is_path(text: str) -> bool:
    """Whether a text is a path of some machine rather than a name: absolute, from home, or from here."""
    return (
        os.path.isabs(text)
        or text.startswith(("~", "."))
        or bool(re.match(r"[A-Za-z]:[\\/]", text))
        or "\\" in text
    )


def _stated(name: str) -> str:
    """A name of a model or text that means the same elsewhere; '' for a path, and for what lies here under that name."""
    return "" if name == GIVEN or is_path(name) or (name not in OURS and Path(name).exists()) else name


def is_id(text: str) -> bool:
    """Whether it has the form of an id on the Hub, ``name`` or ``owner/name``."""
    return not is_path(text) and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", text, re.ASCII) is not None


def _measures(dictionary: Dictionary, folder: Path | None) -> tuple[dict[str, Any], str]:
    """Numbers with n and unit, and what they were measured on: of the run's eval.json, else of the card."""
    file = folder / "eval.json" if folder else None
    if file and file.is_file():
        report = records.read(file, "an evaluation", EVAL, "run `saekit eval` again")
        found, about = report["measures"], report["about"]
        text = _stated(about.get("text", {}).get("name", ""))
        on = " ".join(filter(None, (text, about.get("split", "").replace("_", "-"))))
    else:
        found, on = dictionary.card.get("metrics", {}), ""
        records.check(
            found,
            {"*": {"value": float | list | None, "n": int, "unit": str}},
            "the card's metrics",
            FIX["metrics"],
        )
    kept = {
        key: {
            "value": m["value"], "n": m["n"], "unit": m["unit"], "unit_n": m.get("unit_n", "tokens"),
            "interval": list(m["interval"]) if m.get("interval") else None, "control": dict(m.get("control", {})),
        }
        for key, m in found.items()
        if isinstance(m["value"], int | float) and math.isfinite(m["value"])
    }  # fmt: skip
    records.check(kept, {"*": MEASURE}, "the metrics", FIX["metrics"])
    return kept, on


def facts(
    dictionary: Dictionary, folder: Path | None, licence: str | None, base_model: str | None, data: str | None
) -> tuple[dict[str, Any], list[str]]:
    """What the index says of a dictionary, but for its files, and the names of required fields that nothing states.

    What is given replaces what the run recorded; a model or text that is a path of this machine is not stated.
    """
    about = dictionary.card.get("data", {})
    model, text = (about.get(key, {}).get("name", "") for key in ("model", "text"))
    base_model = base_model or (model if is_id(_stated(model)) else "")
    data = data or _stated(text)
    metrics, measured = _measures(dictionary, folder)
    choices = (dictionary.config.selection, *dictionary.config.objective)
    entry = {
        "wiring": dictionary.config.wiring[0], "selection": dictionary.config.selection[0],
        "d_in": dictionary.d_in, "d_out": dictionary.d_out, "n_features": dictionary.n_features,
        "k": next((c.k for _, c in choices if isinstance(getattr(c, "k", None), int)), None),
        "model": base_model, "reads": list(dictionary.reads), "writes": list(dictionary.writes),
        "data": data, "rows": about.get("rows"), "metrics": metrics, "measured": measured,
    }  # fmt: skip
    stated = {"licence": licence or dictionary.card.get("licence"), "base_model": base_model, **entry}
    return entry, [field for field in FIX if not stated[field]]


def refuse(missing: Mapping[str, Sequence[str]]) -> None:
    """Raise where required fields are missing: one sentence with each of them, the dictionaries that lack it, and the fix."""
    fields: dict[str, list[str]] = {}
    for name, lacks in missing.items():
        for field in lacks:
            fields.setdefault(field, []).append(name)
    if fields:
        said = [
            f"{field} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''}): {FIX[field]}"
            for field, names in fields.items()
        ]
        raise SaekitError(f"the model card lacks {'; '.join(said)}")


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in lines]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.3e}"


def _front(repo: str, licence: str, entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """YAML front matter; JSON's strings and lists are YAML's too."""
    models = sorted({e["model"] for e in entries.values()})
    datasets = sorted({e["data"] for e in entries.values() if "/" in e["data"] and is_id(e["data"])})
    tags = [
        TAG,
        "mechanistic-interpretability",
        *sorted({KIND.get(e["wiring"], e["wiring"]) for e in entries.values()}),
    ]
    if any("saelens" in e["layouts"] for e in entries.values()):
        tags.append("saelens")
    listed = {"base_model": models, "datasets": datasets, "tags": tags}
    lines = ["---", "library_name: saekit", f"license: {json.dumps(licence)}"]
    for key, values in listed.items():
        lines += [f"{key}:", *(f"- {json.dumps(value)}" for value in values)] if values else []
    return [*lines, "---"]


def _snippets(repo: str, revision: str, entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    name = next(iter(entries))
    at = "" if revision == "main" else f"@{revision}"
    lines = ["```python", "import saekit", "", f'd = saekit.load("hf://{repo}/{name}{at}")']
    lines += [
        f"codes = d.encode(x)  # x: [..., {entries[name]['d_in']}], of {', '.join(entries[name]['reads'])}"
    ]
    lines += ["x_hat = d.decode(codes, x)  # codes are sparse: indices and values", "```"]
    shared = next((n for n, e in entries.items() if "saelens" in e["layouts"]), None)
    if shared:
        lines += ["", "With SAELens:", "", "```python", "from sae_lens import SAE", ""]
        if at:
            lines += [f"# SAELens reads the main branch; this is of {revision}"]
        lines += [f'sae = SAE.from_pretrained(release="{repo}", sae_id="{shared}")', "```"]
    return lines


def _section(name: str, entry: Mapping[str, Any], figures: Sequence[str]) -> list[str]:
    """All that is known of one dictionary."""
    rows = f", {entry['rows']:,} rows" if entry["rows"] else ""
    shape = f"{entry['d_in']} to {entry['n_features']:,} features" + (
        f", k = {entry['k']}" if entry["k"] else ""
    )
    lines = [
        f"### {name}", "", f"- {entry['wiring']}, {entry['selection']}: {shape}",
        f"- reads {', '.join(f'`{p}`' for p in entry['reads'])}; writes {', '.join(f'`{p}`' for p in entry['writes'])} of `{entry['model']}`",
        f"- trained on {OURS.get(entry['data'], entry['data'])}{rows}", f"- layouts: {', '.join(entry['layouts'])}",
        *([f"- SAELens's layout is left out: {entry['left_out']}"] if entry.get("left_out") else []), "",
    ]  # fmt: skip
    controls = list(dict.fromkeys(c for m in entry["metrics"].values() for c in m["control"]))
    head = ["metric", "value", "95 % interval", "unit", "n", *controls]
    body = [
        [
            key, _number(m["value"]), " to ".join(map(_number, m["interval"] or ())), m["unit"], f"{m['n']:,} {m['unit_n']}",
            *(_number(m["control"].get(c)) for c in controls),
        ]
        for key, m in entry["metrics"].items()
    ]  # fmt: skip
    if entry["measured"]:
        lines += [
            f"Measured on {entry['measured']} text"
            + (", beside the same measures of controls." if controls else "."),
            "",
        ]
    lines += _table(head, body)
    for figure in figures:
        lines += ["", f"![{name}: {Path(figure).stem.replace('_', ' ')}]({figure})"]
    return [*lines, ""]


def card(
    repo: str,
    revision: str,
    licence: str,
    entries: Mapping[str, Mapping[str, Any]],
    figures: Mapping[str, Sequence[str]],
) -> str:
    """The README.md of a repository: front matter, how to load, a table of its dictionaries, and a section for each.

    ``entries`` are those of the index, ``figures`` paths of pictures in the repository, by dictionary.
    """
    shown = [key for key in SUMMARY if any(key in e["metrics"] for e in entries.values())]
    rows = [
        [f"`{name}`", e["model"], ", ".join(e["reads"]), f"{e['n_features']:,}", *(_number(e["metrics"].get(key, {}).get("value")) for key in shown)]
        for name, e in entries.items()
    ]  # fmt: skip
    models = sorted({e["model"] for e in entries.values()})
    several = "a dictionary" if len(entries) == 1 else f"{len(entries)} dictionaries"
    lines = [
        *_front(repo, licence, entries), "", f"# {repo.split('/')[1]}", "",
        f"Sparse features of {', '.join(OURS.get(m, m) for m in models)}: {several}, published with saekit {version('saekit')}. Licence: {licence}.",
        "", *_snippets(repo, revision, entries), "", "## Dictionaries", "",
        *_table(["name", "model", "reads", "features", *shown], rows), "",
    ]  # fmt: skip
    for name, entry in entries.items():
        lines += _section(name, entry, figures.get(name, ()))
    return "\n".join(lines).rstrip() + "\n"
