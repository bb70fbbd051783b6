"""One page of all reproductions: paper, claim, the paper's number, ours, control, verdict, and a figure of each."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saekit.activations import write_atomic
from saekit.pages import printable, script_json, sha256

# a figure is drawn when its row is opened: forty at once would be slow
DRAW = """"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
for (const row of document.querySelectorAll("details")) {
  const draw = () => {
    const place = row.querySelector(".figure");
    if (!row.open || !place || place.dataset.drawn) return;
    place.dataset.drawn = "yes";
    const { data, layout } = figures[place.dataset.name];
    Plotly.newPlot(place, data, { ...layout, height: undefined, width: undefined }, { responsive: true, displaylogo: false });
  };
  row.addEventListener("toggle", draw);
  draw();
}
"""


def write_papers(rows: Sequence[dict[str, Any]], path: Path) -> Path:
    """Write the page of results, as :func:`saekit.papers.result.every` gives them; returns its path.

    Beside it the same without figures stands as Markdown, for where pages aren't shown.
    """
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    figures = {row["name"]: row["figure"] for row in rows if "figure" in row}
    # a parser reads \\r\\n as \\n, and the policy's hash is taken over what the parser read
    scripts = [get_plotlyjs().replace("\r\n", "\n"), DRAW]
    page = _filled(
        "papers.html", rows, figures=Markup(script_json(figures)),
        policy=" ".join(f"'sha256-{sha256(script)}'" for script in scripts), scripts=[Markup(script) for script in scripts],
    )  # fmt: skip
    write_atomic(path, page.encode("utf-8"))
    write_atomic(path.with_suffix(".md"), _filled("papers.md.jinja", rows).encode("utf-8"))
    return path


def _filled(template: str, rows: Sequence[dict[str, Any]], **more: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=template.endswith("html"), undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=lambda value: printable(value) if type(value) is str else value,
    )  # fmt: skip
    # what Markdown would read as more than text
    environment.filters["marked"] = lambda text: re.sub(r"[\\|<*_`]", r"\\\g<0>", text)
    return environment.get_template(template).render(
        rows=[_shown(row) for row in rows], tally=_tally(rows), **more
    )


def _tally(rows: Sequence[dict[str, Any]]) -> str:
    claims = [claim for row in rows for claim in row.get("claims", ())]
    whole = sum(row.get("holds", False) for row in rows)
    minutes = sum(row.get("seconds", 0) for row in rows) / 60
    return f"{len(rows)} papers in {minutes:.0f} minutes, of {whole} of which every claim holds; {sum(c['holds'] for c in claims)} of {len(claims)} claims hold."


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    if "failed" in row:
        return row
    seconds = row["seconds"]
    took = f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
    return row | {"took": took, "claims": [claim | _numbers(claim) for claim in row["claims"]]}


def _numbers(claim: dict[str, Any]) -> dict[str, str]:
    span = f" [{_number(claim['interval'][0])}, {_number(claim['interval'][1])}]" if claim["interval"] else ""
    control = claim["control"]
    values = [v for v in control["values"] if v is not None] if control else []
    beside = f"{control['name']}: {_number(sum(values) / len(values))}" if values else ""
    return {"shown": f"{_number(claim['mean'])}{span}", "beside": beside}


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3g}"
