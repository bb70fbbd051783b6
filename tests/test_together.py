"""Dictionaries evaluated all at once: on token rows as one is, and by their folders' names."""

from pathlib import Path

import pytest
import torch

import saekit
from saekit.models import Model
from saekit.types import SaekitError


@pytest.fixture(scope="module")
def two() -> list[saekit.Dictionary]:
    out = []
    for layer in (0, 1):
        d = saekit.create("topk", d_in=32, n_features=64, k=4, seed=layer)
        d.reads = d.writes = (f"blocks.{layer}.mlp:out",)
        d.norm_in.fitted.fill_(True)
        out.append(d)
    return out


def test_token_rows_are_evaluated_on_as_by_one(two: list[saekit.Dictionary], tiny_gpt2: Model) -> None:
    tokens = torch.randint(1, 4096, (12, 32), generator=torch.Generator().manual_seed(0))
    together = saekit.evaluate(two, tiny_gpt2, tokens)
    alone = [saekit.evaluate(d, tiny_gpt2, tokens) for d in two]
    assert together.about["tokens"] == tokens.numel() and together.about["context"] is None
    assert together["l0"].value == pytest.approx(8) and together["l0"].n == 12 * 31
    assert together["ce_original"].value == pytest.approx(alone[0]["ce_original"].value, rel=1e-6)
    first = saekit.evaluate(two[:1], tiny_gpt2, tokens)
    assert first["ce_replaced"].value == pytest.approx(alone[0]["ce_spliced"].value, rel=1e-5)


def test_folders_stand_for_the_dictionaries_in_them(
    two: list[saekit.Dictionary], tiny_gpt2: Model, tmp_path: Path
) -> None:
    tokens = torch.randint(1, 4096, (4, 32), generator=torch.Generator().manual_seed(0))
    folders = [tmp_path / "0", tmp_path / "1"]
    for d, folder in zip(two, folders, strict=True):
        saekit.save(d, folder)
    for given, named in ((two[0], str(folders[0])), (two[0], folders[0]), (two, [str(f) for f in folders])):
        mine, theirs = (saekit.evaluate(d, tiny_gpt2, tokens) for d in (given, named))
        assert mine.to_json() == theirs.to_json()
    for given in (str(tmp_path / "none"), [str(tmp_path / "none")]):
        with pytest.raises(SaekitError, match="none' is not a folder"):
            saekit.evaluate(given, tiny_gpt2, tokens)
