"""Pages and notebooks: what they name exists, and all that they show runs (`make notebooks`)."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import click
import pytest
import typer
from commandline import saekit

from saekit.cli import VERBS, app
from saekit.dictionaries.atoms import ATOMS
from saekit.dictionaries.objective import OBJECTIVES
from saekit.dictionaries.presets import PRESETS
from saekit.dictionaries.selection import SELECTIONS
from saekit.dictionaries.wiring import WIRINGS
from saekit.papers.result import included

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# in the order of docs/README.md: later pages read what earlier ones wrote
ORDER = re.findall(r"^\| \[\w+\]\((\w+)\.md\)", (DOCS / "README.md").read_text(), re.MULTILINE)
LINK = re.compile(r"\]\(([\w./-]+)\)")


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: their language and text."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", (DOCS / f"{page}.md").read_text(), re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """What follows ``saekit`` in the commands that a page runs, and in those that it only names."""
    run = [line for kind, text in blocks(page) if kind == "bash" for line in text.splitlines()]
    named = re.findall(r"^    (saekit .*)$", (DOCS / f"{page}.md").read_text(), re.MULTILINE)
    return [shlex.split(line)[1:] for line in (*run, *named)]


def test_every_verb_has_a_page_that_is_listed() -> None:
    pages = {path.stem for path in DOCS.glob("*.md")}
    assert set(ORDER) <= pages
    # a verb without a page of its own stands on another's
    shown = {words[0] for page in ORDER for words in commands(page)}
    assert set(VERBS) <= shown and all(page in VERBS for page in ORDER)


@pytest.mark.parametrize("page", ORDER)
def test_the_commands_of_a_page_have_their_options(page: str) -> None:
    group = typer.main.get_command(app)
    for verb, *words in commands(page):
        command = group.commands[verb]  # type: ignore[attr-defined]
        with contextlib.suppress(click.exceptions.Exit):
            command.make_context(verb, list(words))


@pytest.mark.parametrize("path", [*DOCS.glob("*.md"), ROOT / "README.md"], ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    for link in LINK.findall(path.read_text()):
        assert (path.parent / link).exists(), link


@pytest.mark.parametrize(
    ("row", "table"),
    [("wiring", WIRINGS), ("selection", SELECTIONS), ("atoms", ATOMS), ("objective", OBJECTIVES), ("presets", PRESETS)],
)  # fmt: skip
def test_the_readme_names_every_choice(row: str, table: Iterable[str]) -> None:
    line = next(s for s in (ROOT / "README.md").read_text().splitlines() if s.startswith(f"| {row} |"))
    assert set(table) <= set(re.findall(r"\w+", line))


def test_the_page_of_results_has_every_row() -> None:
    page = (DOCS / "results.md").read_text()
    assert re.findall(r"^## ([\w-]+)$", page, re.MULTILINE) == included()
    assert "](docs/results.md)" in (ROOT / "README.md").read_text() and "Failed:" not in page


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path: Path) -> None:
    import nbformat

    book = nbformat.read(path, 4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert code and all(not cell.outputs and cell.execution_count is None for cell in code)
    assert all(len(cell.source.splitlines()) <= 16 for cell in code)


@pytest.mark.notebook
def test_the_pages_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks of all pages, in one folder. It takes longest, so it stands before the notebooks."""
    monkeypatch.chdir(tmp_path)
    for page in (*ORDER, "analyses"):
        for kind, text in blocks(page):
            if kind == "python":
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(text, f"{page}.md", "exec"), {"__name__": "__main__"})
            for line in text.splitlines() if kind == "bash" else ():
                done = saekit(*shlex.split(line)[1:])
                assert done.returncode == 0, f"{page}: {line}\n{done.stderr}"
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["measures"]


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path) -> None:
    """Offline, from its first cell to its last; in the end it has figures."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(path, 4)
    NotebookClient(book, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    kinds = [kind for cell in book.cells for out in cell.get("outputs", []) for kind in out.get("data", {})]
    assert {"application/vnd.plotly.v1+json", "image/svg+xml", "text/html"} & set(kinds)
    kept = ROOT / "build" / "notebooks"
    kept.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, kept / path.name)  # with its outputs, to be looked at


@pytest.mark.notebook
@pytest.mark.parametrize("blocks", [pytest.param(1, marks=pytest.mark.slow), None])
def test_the_readmes_code_runs(blocks: int | None, tmp_path: Path) -> None:
    found = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    whole, code = "\n".join(found), "\n".join(found[:blocks])
    for large, small in (
        ("500_000", "20_000"),
        ("steps=120", "steps=4"),
        ("steps=60", "steps=2"),
        ("points), 500)", "points), 2)"),
        ("n_features=4096", "n_features=512"),
        ("features=20)", "features=20, tokens=60_000)"),
        ("tokens=8192)", "tokens=2048)"),
        ('saekit.evaluate(d, model, "stdlib")', 'saekit.evaluate(d, model, "stdlib", tokens=2048)'),
        ("saekit.evaluate([heads, mlp], model)", "saekit.evaluate([heads, mlp], model, tokens=2048)"),
    ):
        assert large in whole
        code = code.replace(large, small)
    streamed = re.compile(r"""(harvest\(\w+, "stdlib", (?:\[[^]]*\]|points))\)""")
    assert len(streamed.findall(whole)) == 6
    code = streamed.sub(r"\1, tokens=20_000)", code)
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ce_recovered" in done.stdout and (tmp_path / "report.html").exists()
