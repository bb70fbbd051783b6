"""The model card and the folder of a dry run: what a run recorded, whole, and nothing of the machine it ran on."""

import json
import os
import shutil
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from commandline import saekit as command
from hub_client import POINT, made, same

import saekit
from saekit.errors import SaekitError
from saekit.evaluate import evaluate
from saekit.hub import card, native
from saekit.hub.publish import publish


@pytest.fixture(scope="module")
def run(good: Path, tiny_gpt2: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its eval.json."""
    folder = tmp_path_factory.mktemp("published") / "run"
    shutil.copytree(good / "run", folder)
    report = evaluate(native.load(folder), tiny_gpt2, "stdlib", tokens=1024, controls=False)
    (folder / "eval.json").write_text(json.dumps(report.to_json()))
    return folder


def test_the_card_says_what_the_run_recorded(run: Path, tmp_path: Path) -> None:
    done = publish(run, "owner/name", licence="mit", dry_run=True, out=tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert (front["library_name"], front["license"], front["base_model"]) == ("saekit", "mit", ["tiny-gpt2"])
    assert {"saekit", "saelens", "sparse-autoencoder"} <= set(front["tags"])
    measures = json.loads((run / "eval.json").read_text())["measures"]
    scalars = {key: m for key, m in measures.items() if isinstance(m["value"], float | int)}
    assert len(scalars) > 5
    for key, m in scalars.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {key} |"))
        assert m["unit"] in row and f"{m['n']:,} tokens" in row
    assert f'saekit.load("hf://owner/name/{POINT}")' in text
    assert f'SAE.from_pretrained(release="owner/name", sae_id="{POINT}")' in text
    assert (
        f"`{POINT}`" in text
        and "Python's standard library" in text
        and done.addresses == (f"hf://owner/name/{POINT}",)
    )
    for name in done.files:
        if name.endswith(".svg"):
            assert f"]({name})" in text
            xml.etree.ElementTree.parse(tmp_path / "out" / name)
    assert any(name.endswith("density.svg") for name in done.files)


def test_a_dry_run_writes_what_it_lists_and_nothing_else(run: Path, tmp_path: Path) -> None:
    done = publish(run, "owner/name", licence="mit", dry_run=True, out=tmp_path / "out")
    there = {
        f.relative_to(tmp_path / "out").as_posix(): f.stat().st_size
        for f in (tmp_path / "out").rglob("*")
        if f.is_file()
    }
    assert done.files == there and done.commit is None and done.folder == tmp_path / "out"
    assert {
        f"{POINT}/{n}" for n in ("card.json", "dictionary.safetensors", "cfg.json", "sae_weights.safetensors")
    } < set(there)
    assert os.listdir(tmp_path) == ["out"]
    assert same(native.load(tmp_path / "out" / POINT), native.load(run))
    publish(
        run, "owner/name", licence="apache-2.0", dry_run=True, out=tmp_path / "out"
    )  # its own may be replaced
    assert "apache-2.0" in (tmp_path / "out" / "README.md").read_text()


LACKS: dict[str, Callable[[saekit.Dictionary], Any]] = {
    "licence": lambda d: d.card.pop("licence"),
    "base_model": lambda d: d.card["data"].pop("model"),
    "data": lambda d: d.card["data"].pop("text"),
    "reads": lambda d: setattr(d, "reads", ()),
    "writes": lambda d: setattr(d, "writes", ()),
    "metrics": lambda d: d.card.pop("metrics"),
}


@pytest.mark.parametrize("fields", [*([f] for f in LACKS), list(LACKS)], ids=lambda f: "-".join(f))
def test_missing_metadata_is_refused_and_every_field_named(fields: list[str], tmp_path: Path) -> None:
    d = made()
    for field in fields:
        LACKS[field](d)
    with pytest.raises(SaekitError) as told:
        publish({"a": d}, "owner/name", dry_run=True, out=tmp_path / "out")
    for field in LACKS:
        assert (f"{field} (a): {card.FIX[field]}" in str(told.value)) == (field in fields)
    assert not list(tmp_path.iterdir())


def test_paths_of_this_machine_are_not_published(tmp_path: Path) -> None:
    d = made(data={"model": {"name": "/secret/model"}, "text": {"name": "~/secret/text.jsonl"}})
    d.card["training"] = {"config": {"init": "/secret/run"}}
    with pytest.raises(SaekitError, match=r"base_model \(.*data \("):
        publish(d, "owner/name", dry_run=True, out=tmp_path / "out")
    for wrong in ({"base_model": "/secret/model"}, {"data": "/secret/text"}):
        with pytest.raises(SaekitError, match="/secret"):
            publish(
                d,
                "owner/name",
                **{"base_model": "a/b", "data": "c/d", **wrong},
                dry_run=True,
                out=tmp_path / "out",
            )  # type: ignore[arg-type]
    publish(d, "owner/name", base_model="a/b", data="c/d", dry_run=True, out=tmp_path / "out")
    for file in (tmp_path / "out").rglob("*"):
        assert file.is_dir() or b"secret/" not in file.read_bytes(), file
    front = yaml.safe_load((tmp_path / "out" / "README.md").read_text().split("---\n")[1])
    assert front["base_model"] == ["a/b"] and front["datasets"] == ["c/d"]
    assert d.card["training"]["config"]["init"] == "/secret/run"  # the user's own is as it was


@pytest.mark.parametrize("name", ["model", "text"])
def test_a_folder_that_lies_here_is_no_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``models/mine`` reads like an id of the Hub; what lies under that name here is not one."""
    monkeypatch.chdir(tmp_path)
    d = made()
    d.card["data"][name]["name"] = "models/mine"
    publish(d, "owner/name", dry_run=True, out="out")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    with pytest.raises(SaekitError, match={"model": "base_model", "text": "data"}[name]):
        publish(d, "owner/name", dry_run=True, out="out")


def test_what_saelens_cannot_say_is_left_out_with_its_reason(tmp_path: Path) -> None:
    d = saekit.create("omp", d_in=16, n_features=64, k=4)
    d.reads, d.writes, d.card = (POINT,), (POINT,), made().card
    done = publish(d, "owner/name", dry_run=True, out=tmp_path / "out")
    assert done.left_out[POINT] in (tmp_path / "out" / "README.md").read_text()
    assert not any("sae_weights" in name for name in done.files)
    with pytest.raises(SaekitError, match="saelens"):
        publish(d, "owner/name", layouts=["native", "saelens"], dry_run=True, out=tmp_path / "other")
    assert not (tmp_path / "other").exists()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "repo": ({"repo": "name"}, "owner/name"),
    "repo path": ({"repo": "owner/../name"}, "owner/name"),
    "layout": ({"layouts": ["native", "saelenz"]}, "saelenz"),
    "no native": ({"layouts": ["saelens"]}, "native"),
    "licence": ({"licence": "Apache 2"}, "Apache 2"),
    "none": ({"dictionaries": []}, "dictionaries are none"),
    "folder": ({"dictionaries": "nowhere"}, "nowhere"),
    "out": ({"out": "."}, "no dry run made it"),
    "the card's name": ({"dictionaries": {"README.md": made()}}, "'README.md' is that of a file"),
    "no branch": ({"revision": ""}, "revision ''"),
    "an odd branch": ({"revision": "a..b"}, "revision 'a..b'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_one_sentence_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").touch()
    options, said = WRONG[name]
    given = {"dictionaries": made(), "repo": "owner/name", "dry_run": True, **options}
    with pytest.raises(SaekitError) as told:
        publish(given.pop("dictionaries"), given.pop("repo"), **given)
    assert said in str(told.value) and "\n" not in str(told.value)
    assert os.listdir(tmp_path) == ["a"]


def test_two_of_one_name_need_names(tmp_path: Path) -> None:
    with pytest.raises(SaekitError, match="two dictionaries"):
        publish([made(0), made(1)], "owner/name", dry_run=True, out=tmp_path / "out")
    done = publish({"a": made(0), "b": made(1)}, "owner/name", dry_run=True, out=tmp_path / "out")
    assert done.addresses == ("hf://owner/name/a", "hf://owner/name/b")
    assert same(native.load(tmp_path / "out" / "b"), made(1))


def test_the_command_line_lists_the_folder(run: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    done = command("publish", str(run), "owner/name", "--dry-run", "--licence", "mit", "--out", out, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["files"]["README.md"] > 500
    refused = command("publish", str(run), "owner/name", "--dry-run", "--out", str(tmp_path / "other"))
    assert refused.returncode == 2 and "licence" in refused.stderr and not refused.stdout
    offline = command("publish", str(run), "owner/name", "--licence", "mit")
    assert offline.returncode == 2 and "HF_HUB_OFFLINE" in offline.stderr
