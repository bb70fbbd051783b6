"""Formats of explanations, all together: no name leads outside the folder, and the tables load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy_firings import signed

from saekit.autointerp.explanation import Explanation
from saekit.autointerp.firings import Firings
from saekit.autointerp.formats import READERS, WRITERS
from saekit.autointerp.formats.delphi import (
    Judged,
    read_cache,
    read_scores,
    write_cache,
    write_scores,
)
from saekit.autointerp.formats.neuronpedia import read_rows, write_rows
from saekit.types import SaekitError

OUTSIDE = ["../up", "a/../../b", "/etc", "", "a//b", ".", "..", "a\\b", "a\nb", "x" * 300]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Firings:
    return signed(tmp_path_factory.mktemp("firings"))


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_outside(name: str, made: Firings, tmp_path: Path) -> None:
    run, one = tmp_path / "run", Explanation(1, "words", "human")
    row = {"modelId": "m", "layer": "s", "index": "1", "description": "d"}
    calls: list[Callable[[], Any]] = [
        lambda: write_cache(made, run, name), lambda: read_cache(run, name), lambda: read_scores(run, name),
        lambda: write_scores({1: [Judged(("x",), (0.5,), 0, True, True)]}, run, name, "fuzz"), lambda: write_rows([row], run, f"{name}/s", "explanations"),
        lambda: read_rows(run, f"m/{name}", "explanations"),
        *(lambda form=form: READERS[form](run, name) for form in READERS),
        *(lambda form=form: WRITERS[form]([one], run, name) for form in WRITERS),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(SaekitError) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("table", [READERS, WRITERS])
def test_every_row_of_the_tables_loads(table: Any) -> None:
    assert all(callable(table[name]) for name in table)
    with pytest.raises(ValueError, match="did you mean 'delphi'"):
        table["delfi"]
