"""``saekit convert``, formats known by their content, and what the doctor says of other tools' files."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commandline import saekit as run

import saekit
from saekit.activations import Store
from saekit.dictionaries import calibrate
from saekit.harvest import harvest
from saekit.hooks import capture
from saekit.hub.files import Files
from saekit.hub.formats import FORMATS
from saekit.hub.names import lens
from saekit.models import Model
from saekit.types import SaekitError

GOLDEN = Path(__file__).parent / "golden/saelens"
POINT = "blocks.1.hook_resid_post"
PAIR = ["blocks.1.mlp:in", "blocks.1.mlp:out"]


@pytest.fixture(scope="module")
def pairs(tiny_gpt2: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of what an MLP reads and writes."""
    path = tmp_path_factory.mktemp("pairs") / "acts"
    return harvest(tiny_gpt2, "stdlib", PAIR, out=path, tokens=4096, context=64, batch_rows=8)


@pytest.fixture(scope="module")
def transcoder(pairs: Store) -> saekit.Dictionary:
    """A TopK transcoder after some steps."""
    d = saekit.create("transcoder", d_in=32, d_out=32, n_features=128, k=8)
    d.reads, d.writes = (PAIR[0],), (PAIR[1],)
    trainer = saekit.Trainer(d, lr=5e-3)
    for _, batch in zip(range(150), pairs.batches(PAIR, 256, seed=0), strict=False):
        trainer.step(batch)
    return d


def test_there_and_back_changes_nothing(here: Path) -> None:
    """A TopK run written for SAELens and read again: the same codes and outputs, L0 and FVU on a store."""
    store = str(here / "store")
    done = run(
        "convert", str(here / "run"), str(here / "sae"), "--to", "saelens", "--sample", store, "--json"
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["from"], data["to"], data["thresholds"]) == ("native", "saelens", False)
    assert data["before"]["l0"] == data["after"]["l0"] and data["before"]["rows"] > 1000
    assert abs(data["before"]["fvu"] - data["after"]["fvu"]) < 1e-5
    back = run("convert", str(here / "sae"), str(here / "back"), "--sample", store)
    assert "saelens -> native" in back.stdout and "L0 4.00 -> 4.00" in back.stdout
    first, last = saekit.load(here / "run"), saekit.load(here / "back")
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(last(x), first(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last.encode(x).to_dense(), first.encode(x).to_dense(), rtol=1e-5, atol=1e-5)
    assert (last.reads, last.card["data"]["model"]["name"]) == (
        first.reads,
        first.card["data"]["model"]["name"],
    )


def test_what_was_folded_and_is_missing_is_said(tmp_path: Path) -> None:
    done = run(
        "convert",
        str(GOLDEN / "before_6-topk"),
        str(tmp_path / "a"),
        "--dtype",
        "bfloat16",
        "--to",
        "saelens",
    )
    assert "folded: the bias that is taken off the input went into b_enc" in done.stdout
    assert "L0 and FVU were not measured; --sample ACTS does" in done.stdout
    assert json.loads((tmp_path / "a/cfg.json").read_text())["dtype"] == "bfloat16"
    done = run("convert", str(GOLDEN / "heads"), str(tmp_path / "b"), "--hook-point", "here")
    assert "not in the files: the model" in done.stdout
    assert saekit.load(tmp_path / "b").reads == ("here",)
    layer = GOLDEN.parent / "circuit_tracer/set-relu/layer_1.safetensors"
    done = run("convert", str(layer), str(tmp_path / "c"), "--set", "input_hook=hook_resid_mid")
    assert done.returncode == 0, done.stderr
    assert saekit.load(tmp_path / "c").reads == ("blocks.1.hook_resid_mid",)


def test_ranks_become_thresholds_only_where_that_is_asked_for(
    pairs: Store, transcoder: saekit.Dictionary, tmp_path: Path
) -> None:
    saekit.save(transcoder, tmp_path / "own")
    command = (
        "convert",
        str(tmp_path / "own"),
        str(tmp_path / "out"),
        "--to",
        "saelens",
        "--sample",
        str(pairs.path),
    )
    done = run(*command)
    assert done.returncode == 2 and "no selection 'topk'" in done.stderr and "--thresholds" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run(*command, "--thresholds", "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    # chosen on other rows than it is measured on, so about the same
    assert data["after"]["l0"] == pytest.approx(data["before"]["l0"], rel=0.1)
    assert data["after"]["l0"] != data["before"]["l0"]
    assert data["before"]["fvu"] < 1 and data["after"]["fvu"] == pytest.approx(data["before"]["fvu"], rel=0.3)
    written = saekit.load(tmp_path / "out")
    assert (written.config.selection[0], written.reads, written.writes) == (
        "jumprelu",
        ("blocks.1.ln2.hook_normalized",),  # TransformerLens's names of the same places
        ("blocks.1.hook_mlp_out",),
    )


def test_thresholds_are_those_of_calibrate(
    pairs: Store, transcoder: saekit.Dictionary, tmp_path: Path
) -> None:
    """Every other batch of sequences chooses, the rest measures."""
    saekit.save(transcoder, tmp_path / "own")
    done = run("convert", str(tmp_path / "own"), str(tmp_path / "out"), "--to", "saelens", "--sample", str(pairs.path), "--thresholds")  # fmt: skip
    assert done.returncode == 0 and "by thresholds" in done.stdout
    batches = list(pairs.sequences())
    rows = torch.cat([batch.rows(PAIR[0]).float() for batch in batches[1::2]])
    l0 = transcoder.encode(rows).l0().double().mean()
    by_hand = calibrate(transcoder, rows, float(l0))
    written = saekit.load(tmp_path / "out")
    torch.testing.assert_close(written.selection.threshold, by_hand.selection.threshold)


WIRINGS: dict[str, dict[str, Any]] = {
    "crosscoder": {"d_in": [32, 32]},
    "clt": {"d_in": 32, "n_layers": 1},
    "lorsa": {"d_in": 32, "n_qk": 2, "d_qk": 4},
    "molt": {"d_in": 32},
}


@pytest.mark.parametrize("name", WIRINGS)
def test_every_wiring_is_measured_on_a_store(name: str, pairs: Store, tmp_path: Path) -> None:
    d = saekit.create(name, n_features=64, k=4, normalise="none", **WIRINGS[name])
    d.reads, d.writes = d.wiring.sites(PAIR)
    saekit.save(d, tmp_path / "own")
    command = ("convert", str(tmp_path / "own"), str(tmp_path / "out"), "--sample", str(pairs.path), "--json")
    done = run(*command)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["before"] == data["after"] and data["before"]["rows"] > 1000
    assert 0 < data["before"]["l0"] <= d.n_features


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "a folder that is there": (("{run}", "{run}"), "is there already"),
    "thresholds of nothing": (("{run}", "{new}", "--thresholds"), "give a store with --sample"),
    "a format of no name": (("{run}", "{new}", "--to", "saelenz"), "format 'saelenz' is unknown; did you mean 'saelens'"),
    "a source of no format": (("{store}", "{new}"), "no dictionary of a known format"),
    "an option of no use": (("{run}", "{new}", "--hook-point", "a"), "'hook_point' is not one of format 'native'"),
    "a set option of no use": (("{heads}", "{new}", "--set", "input_hok=a"), "'input_hok' is not one of format 'saelens'"),
    "a flag that is set": (("{heads}", "{new}", "--set", "k=3"), "k has a flag of its own; write --k 3"),
    "a dtype of ours": (("{run}", "{new}", "--dtype", "float16"), "'dtype' is not one of format 'native'"),
    "another format": (("{run}", "{new}", "--from", "saelens"), "cfg.json"),
    "a sample of another place": (("{heads}", "{new}", "--sample", "{store}"), "blocks.1.attn.hook_z.*is not in store"),
    "a sample that isn't one": (("{run}", "{new}", "--sample", "{run}"), "manifest.json"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_conversion_that_can_not_be_writes_nothing(case: str, here: Path) -> None:
    words, said = REFUSED[case]
    places = {"run": here / "run", "store": here / "store", "new": here / "new", "heads": GOLDEN / "heads"}
    done = run("convert", *(word.format(**places) for word in words))
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert re.search(said, done.stderr)
    assert not (here / "new").exists()


def test_a_store_of_several_places_needs_one_named(pairs: Store, tmp_path: Path) -> None:
    d = saekit.create("topk", d_in=32, n_features=64, k=4)
    saekit.save(d, tmp_path / "d")
    done = run(
        "convert", str(tmp_path / "d"), str(tmp_path / "out"), "--to", "saelens", "--sample", str(pairs.path)
    )
    assert done.returncode == 2 and "doesn't say where it reads" in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_content_says_the_format() -> None:
    """No two formats take the same files for theirs."""
    for case in sorted(path for path in GOLDEN.iterdir() if path.is_dir()):
        assert [name for name in FORMATS if FORMATS[name].detect(Files(case))] == ["saelens"]


def test_a_folder_of_nothing_known_is_answered_with_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(
        saekit.SaekitError, match=r"no card.json.*holds notes.txt .*known are saelens: cfg.json"
    ):
        saekit.load(tmp_path)
    shutil.copytree(GOLDEN / "heads", tmp_path / "layer_1")
    shutil.copytree(GOLDEN / "before_6-relu", tmp_path / "layer_2")
    for answer in (lambda: saekit.load(tmp_path), lambda: saekit.load(str(tmp_path))):
        with pytest.raises(
            saekit.SaekitError, match="a folder of dictionaries; give one of them: layer_1, layer_2"
        ):
            answer()
    done = run("doctor", str(tmp_path))
    assert done.returncode == 2 and "layer_1, layer_2" in done.stderr
    with pytest.raises(saekit.SaekitError, match="is not a folder"):
        saekit.load(tmp_path / "nosuch")


def test_loading_and_saving_refuse_what_they_do_not_know(tmp_path: Path) -> None:
    d = saekit.load(GOLDEN / "heads")
    refused = {
        "format 'saelenz' is unknown": lambda: saekit.load(GOLDEN / "heads", format="saelenz"),
        "option 'hook' is not one of format 'saelens'; did you mean 'hook_point'": lambda: saekit.load(GOLDEN / "heads", hook="a"),
        "option 'k' is not one of format 'native'; it has none": lambda: saekit.save(d, tmp_path / "a", k=3),
        "format 'native2' is unknown; did you mean 'native'": lambda: saekit.save(d, tmp_path / "a", format="native2"),
        "is there already; choose a new folder": lambda: saekit.save(d, tmp_path, format="saelens"),
        "'llama_scope' is read and never written": lambda: saekit.save(d, tmp_path / "a", format="llama_scope"),
    }  # fmt: skip
    (tmp_path / "something").write_text("")
    for said, do in refused.items():
        with pytest.raises(saekit.SaekitError, match=said):
            do()
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_an_imported_dictionary_is_saved_as_ours(tmp_path: Path) -> None:
    """Its card keeps what the other file said, and names no rows that it was trained on."""
    d = saekit.load(GOLDEN / "gated-layer_norm-float64")
    saekit.save(d, tmp_path / "d")
    back = saekit.load(tmp_path / "d")
    assert back.card == d.card and back.card["imported"]["format"] == "saelens"
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back(x), d(x))


def test_the_doctor_knows_other_tools_files(tmp_path: Path) -> None:
    data = json.loads(run("doctor", str(GOLDEN / "jumprelu-layer_norm-float32"), "--json").stdout)
    assert (data["format"], data["selection"]["name"], data["wiring"]["normalise"]) == (
        "saelens",
        "jumprelu",
        "row_std",
    )
    assert (data["reads"], data["dtype"], data["not in the files"]) == ([POINT], "float32", [])
    damaged = tmp_path / "d"
    shutil.copytree(GOLDEN / "heads", damaged)
    (damaged / "sae_weights.safetensors").write_bytes(b"0" * 40)
    done = run("doctor", str(damaged))
    assert done.returncode == 2 and "sae_weights.safetensors" in done.stderr


def test_a_set_of_runs_becomes_one_of_circuit_tracers(tiny_gpt2: Model, tmp_path: Path) -> None:
    """With thresholds of their own, by rising layer, at places that the peer finds."""
    points = [f"blocks.{i}.mlp:{side}" for i in (0, 1) for side in ("in", "out")]
    saekit.harvest(tiny_gpt2, "stdlib", points, out=tmp_path / "acts", tokens=3000, context=64, batch_rows=8)
    store = Store(tmp_path / "acts")
    for i in (0, 1):
        d = saekit.create("transcoder", d_in=32, n_features=64, k=4, seed=i)
        d.reads, d.writes = (points[2 * i],), (points[2 * i + 1],)
        d.card["data"] = {"model": {"name": "tiny-gpt2", "class": "GPT2LMHeadModel"}}
        batches = list(store.sequences())
        d.set_normalisation(
            torch.cat([torch.cat([b.rows(p) for p in points[2 * i : 2 * i + 2]], 1) for b in batches])
        )
        saekit.save(d, tmp_path / "set" / f"blocks.{i}.mlp")
    command = ("convert", str(tmp_path / "set"), str(tmp_path / "out"), "--to", "circuit_tracer")
    done = run(*command)
    assert done.returncode == 2 and "convert --thresholds --sample ACTS" in done.stderr
    done = run(*command, "--thresholds", "--sample", str(tmp_path / "acts"), "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["measured"]) == 2
    back = saekit.load(tmp_path / "out")
    assert back.reads == ("blocks.0.ln2.hook_normalized", "blocks.1.ln2.hook_normalized")
    assert back.writes == ("blocks.0.hook_mlp_out", "blocks.1.hook_mlp_out")


def test_what_a_format_does_not_say_is_told(tmp_path: Path) -> None:
    d = saekit.create("topk", d_in=16, n_features=64, k=4, normalise="none")
    d.reads = d.writes = ("blocks.1.hook_resid_post",)
    saekit.save(d, tmp_path / "own")
    done = run("convert", str(tmp_path / "own"), str(tmp_path / "out"), "--to", "sparsify")
    assert "not in what was written: the hook point" in done.stdout


PLACES = ["transformer.h.1:in", "transformer.h.1:out", "blocks.1.mlp:in", "blocks.1.mlp", "blocks.1.attn:out", "transformer.h.1.mlp:out", "transformer.h.1"]  # fmt: skip


@pytest.mark.parametrize("point", PLACES)
def test_a_translated_name_is_of_the_same_place(point: str, tiny_gpt2: Model) -> None:
    named = lens(point, {})
    assert "hook_" in named and ":" not in named
    # two names of one stream: what a block writes is what stands behind it
    x = torch.arange(12)[None]
    seen = capture(lambda: tiny_gpt2({"input_ids": x}), {p: tiny_gpt2.site(p) for p in (point, named)})
    assert torch.equal(seen[point], seen[named])


def test_names_without_a_counterpart_stay() -> None:
    assert lens("blocks.1.attn:in", {}) == "blocks.1.attn:in"
    gemma = {"data": {"model": {"class": "Gemma2ForCausalLM"}}}
    assert lens("model.layers.1.mlp:out", gemma) == "model.layers.1.mlp:out"
    assert lens("model.layers.1:out", gemma) == "blocks.1.hook_resid_post"


def test_places_are_found_below_the_base_model_as_sparsify_names_them(tiny_gpt2: Model) -> None:
    assert tiny_gpt2.site("h.1.mlp:in") == tiny_gpt2.site("transformer.h.1.mlp:in")
    with pytest.raises(SaekitError, match="is not in model"):
        tiny_gpt2.site("h.99")


def test_the_doctor_tells_the_tensors_of_a_file_that_says_no_more(tmp_path: Path) -> None:
    torch.save({"sae": {"W": torch.zeros(3, 4, dtype=torch.bfloat16)}}, tmp_path / "a.pt")
    np.savez(tmp_path / "b.npz", W=np.zeros((5, 6), np.float16))
    for name, said in (("a.pt", {"sae.W": "bfloat16 (3, 4)"}), ("b.npz", {"W": "float16 (5, 6)"})):
        data = json.loads(run("doctor", str(tmp_path / name), "--json").stdout)
        assert data.items() >= said.items() and "give the folder" in data["of a dictionary"]
    (tmp_path / "c.pt").write_bytes(b"no archive")
    done = run("doctor", str(tmp_path / "c.pt"))
    assert done.returncode == 2 and done.stderr.startswith("error: file ") and done.stderr.count("\n") == 1
