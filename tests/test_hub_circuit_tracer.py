"""circuit-tracer's formats: what it wrote itself and made of it, what we write, and what is refused.

The files under ``golden/circuit_tracer`` are the peer's, by ``peers/circuit_tracer.py``. ``SAEKIT_TRACER`` names the
python of an environment with circuit-tracer for the test marked ``peer``.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import pytest
import torch
from safetensors.torch import load_file, save_file

import saekit
from saekit.hub import circuit_tracer
from saekit.hub.files import Files
from saekit.types import SaekitError

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "circuit_tracer"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
SETS = [name for name in CASES if name.startswith("set")]
LAYERS, D = 3, 6
TOL = 1e-5


def run(d: saekit.Dictionary, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense codes and outputs."""
    with torch.no_grad():
        codes = d.encode(x)
        return codes.to_dense(), d.decode(codes, x)


def run_set(parts: list[saekit.Dictionary], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and outputs of all layers side by side."""
    found = [run(part, rows) for part, rows in zip(parts, x.split(D, 1), strict=True)]
    return torch.cat([codes for codes, _ in found], 1), torch.cat([out for _, out in found], 1)


def read(folder: Path) -> saekit.Dictionary | list[saekit.Dictionary]:
    """What a folder holds; a set with skips has no dictionary that stands for all of it."""
    files = Files(folder)
    skips = files.has("layer_0.safetensors") and "W_skip" in files.heads("layer_0.safetensors")
    return circuit_tracer.load_set(files) if skips else circuit_tracer.load(files)


def made_of(d: saekit.Dictionary | list[saekit.Dictionary], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Codes and outputs."""
    return run_set(d, x) if isinstance(d, list) else run(d, x)


def same(found: tuple[torch.Tensor, torch.Tensor], wanted: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert torch.equal(found[0] != 0, wanted[0] != 0) and (found[0] != 0).any()
    for mine, theirs in zip(found, wanted, strict=True):
        assert (mine - theirs).abs().max() < TOL


def beside(name: str) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs, and the peer's codes and outputs."""
    held = load_file(GOLDEN / f"{name}.safetensors")
    return held["x"], (held["codes"], held["out"])


@pytest.mark.parametrize("name", [name for name in CASES if name != "set-skip"])
def test_codes_and_outputs_are_the_peers_own(name: str) -> None:
    x, theirs = beside(name)
    d = saekit.load(GOLDEN / name)
    same(run(d, x), theirs)
    assert d.reads == tuple(f"blocks.{i}.ln2.hook_normalized" for i in range(LAYERS))
    assert d.writes == tuple(f"blocks.{i}.hook_mlp_out" for i in range(LAYERS))
    assert d.card["data"]["model"]["name"] == "toy"
    assert (theirs[0] < 0).any() == ("jumprelu" in name)  # below a threshold of less than 0


@pytest.mark.parametrize("name", SETS)
def test_layers_of_a_set_by_themselves_are_the_peers_too(name: str) -> None:
    x, theirs = beside(name)
    same(run_set(circuit_tracer.load_set(Files(GOLDEN / name)), x), theirs)
    single = [saekit.load(GOLDEN / name, layer=i) for i in range(LAYERS)]
    same(run_set(single, x), theirs)
    alone = saekit.load(GOLDEN / name / "layer_1.safetensors", input_hook="hook_resid_mid")
    assert torch.equal(run(alone, x[:, D : 2 * D])[1], run(single[1], x[:, D : 2 * D])[1])
    assert (alone.reads, alone.writes) == (("blocks.1.hook_resid_mid",), ())
    assert "the hook points" in alone.card["imported"]["missing"]


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_read_back_as_it_was(name: str, tmp_path: Path) -> None:
    x, theirs = beside(name)
    d = read(GOLDEN / name)
    circuit_tracer.save(d, tmp_path / "out", scan="toy")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in (GOLDEN / name).iterdir()}
    assert Files(tmp_path / "out").yaml("config.yaml") == Files(GOLDEN / name).yaml("config.yaml")
    same(made_of(read(tmp_path / "out"), x), theirs)


def own(preset: str, layer: int = 0, **given: Any) -> saekit.Dictionary:
    """One of saekit's, with a normalisation of its data."""
    d = saekit.create(preset, n_features=24, seed=3 + layer, **given)
    g = torch.Generator().manual_seed(layer)
    d.prepare(3 + torch.randn(64, d.wiring.columns, generator=g))
    with torch.no_grad():
        d.b_dec.add_(0.2)
    n = len(d.wiring.parts_in)
    d.reads = tuple(f"blocks.{layer + i}.hook_resid_mid" for i in range(n))
    d.writes = tuple(f"blocks.{layer + i}.hook_mlp_out" for i in range(n))
    return d


RULES: dict[str, dict[str, Any]] = {
    "relu": {"selection": "relu", "objective": ("reconstruction", "l1")},
    "jumprelu": {"selection": "jumprelu", "objective": ("reconstruction", "l0")},
    "batchtopk": {"selection": "batchtopk", "k": 6},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("reach", [None, 2, 1])
def test_our_own_are_written_and_read_back_in_raw_units(rule: str, reach: int | None, tmp_path: Path) -> None:
    d = own("clt", d_in=D, n_layers=LAYERS, reach=reach, **RULES[rule])
    x = 3 + torch.randn(8, d.d_in, generator=torch.Generator().manual_seed(9))
    circuit_tracer.save(d, tmp_path, model="toy")
    assert (tmp_path / "layer_2.safetensors").exists() == (reach == 1)
    again = circuit_tracer.load(Files(tmp_path))
    for mine, theirs in zip(run(d, x), run(again, x), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4, rtol=1e-4)
    assert (again.reads, again.writes) == (d.reads, d.writes)


def changed(name: str, here: Path, file: str, **tensors: Any) -> Path:
    """A golden folder with other tensors in a file; None takes one away."""
    shutil.copytree(GOLDEN / name, here, dirs_exist_ok=True)
    state = load_file(here / file) | {key.replace("__", "."): value for key, value in tensors.items()}
    save_file({key: value for key, value in state.items() if value is not None}, here / file)
    return here


def without(name: str, here: Path, *files: str) -> Path:
    shutil.copytree(GOLDEN / name, here)
    for file in files:
        (here / file).unlink()
    return here


def listed(here: Path) -> Path:
    here.mkdir()
    (here / "config.yaml").write_text("model_kind: transcoder_set\ntranscoders: ['hf://a/b/layer_0.npz']\n")
    return here


ONE = "layer_1.safetensors"
REFUSED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], list[str]]] = {
    "a set with skips": (lambda p: without("set-skip", p), {}, ["skips", "layer = 0, ..., 2"]),
    "a layer gone": (lambda p: without("set-relu", p, ONE), {}, ["lacks layer_1.safetensors", "has layer_2"]),
    "a layer that is none": (lambda p: without("set-relu", p), {"layer": 7}, ["layer = 7", "0, 1, 2"]),
    "a layer of what has none": (lambda p: without("clt-relu", p), {"layer": 1}, ["layer = 1", "cross-layer"]),
    "a decoder gone": (lambda p: without("clt-relu", p, "W_dec_1.safetensors"), {}, ["W_dec_1.safetensors", "not there"]),
    "an encoder gone": (lambda p: without("clt-relu", p, "W_enc_1.safetensors"), {}, ["lacks W_enc_1.safetensors"]),
    "an encoder turned": (lambda p: changed("set-relu", p, ONE, W_enc=torch.zeros(D, 12)), {}, ["'W_enc'", "(6, 12)", "(12, 6)", "turned"]),
    "a decoder turned": (lambda p: changed("set-relu", p, ONE, W_dec=torch.zeros(D, 12)), {}, ["'W_dec'", "(6, 12)", "(12, 6)"]),
    "a tensor missing": (lambda p: changed("set-relu", p, ONE, b_dec=None), {}, [ONE, "lacks", "'b_dec'"]),
    "a tensor too many": (lambda p: changed("set-relu", p, ONE, log_thresholds=torch.zeros(12)), {}, [ONE, "'log_thresholds'"]),
    "weights with NaN": (lambda p: changed("set-relu", p, ONE, b_enc=torch.full((12,), float("nan"))), {}, [ONE, "NaN", "'b_enc'"]),
    "layers of different widths": (lambda p: changed("set-relu", p, ONE, b_enc=torch.zeros(11), W_enc=torch.zeros(11, D), W_dec=torch.zeros(11, D)), {}, ["different widths", "layer = 0"]),
    "a threshold in some layers": (lambda p: changed("clt-jumprelu", p, "W_enc_1.safetensors", threshold_1=None), {}, ["W_enc_1", "lacks", "'threshold_1'"]),
    "targets of a shorter model": (lambda p: changed("clt-relu", p, "W_dec_0.safetensors", W_dec_0=torch.zeros(12, 2, D)), {}, ["'W_dec_0'", "(12, 2, 6)", "(12, 3, 6)"]),
    "files of others": (listed, {}, ["config.yaml", "fetch and load each"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cant_be_read_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    change, given, words = REFUSED[case]
    with pytest.raises(SaekitError) as caught:
        saekit.load(change(tmp_path / "in"), **given)
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert "\n" not in said


def transcoder(layer: int = 0, **given: Any) -> saekit.Dictionary:
    return own("transcoder", layer, **{"d_in": D, **RULES["jumprelu"], **given})


UNWRITTEN: dict[str, tuple[Callable[[], Any], dict[str, Any], list[str]]] = {
    "nothing": (lambda: [], {"model": "toy"}, ["empty list"]),
    "no model": (lambda: transcoder(), {}, ["model is not given", "model = ..."]),
    "blocks that don't begin at 0": (lambda: transcoder(2), {"model": "toy"}, ["input_hook", "blocks.2.hook_resid_mid"]),
    "an autoencoder": (lambda: own("jumprelu", d_in=D), {"model": "toy"}, ["'autoencoder'", "transcoder"]),
    "ranks": (lambda: own("transcoder", d_in=D, k=3), {"model": "toy"}, ["'topk'", "relu, jumprelu"]),
    "ranks of a cross-layer one": (lambda: own("clt", d_in=D, n_layers=3, k=3), {"model": "toy"}, ["'topk'", "relu, jumprelu"]),
    "two widths": (lambda: transcoder(d_out=5), {"model": "toy"}, ["6", "5", "one width"]),
    "two widths of a cross-layer one": (lambda: own("clt", d_in=D, d_out=5, n_layers=3, **RULES["relu"]), {"model": "toy"}, ["6", "5", "one width"]),
    "a skip in one layer": (lambda: [transcoder(), transcoder(1, skip=True)], {"model": "toy"}, ["skips and without"]),
    "two cross-layer ones": (lambda: [own("clt", d_in=D, n_layers=3, **RULES["relu"])] * 2, {"model": "toy"}, ["2 cross-layer", "give one"]),
}  # fmt: skip


@pytest.mark.parametrize("case", UNWRITTEN)
def test_what_cant_be_written_is_refused_before_anything_is(case: str, tmp_path: Path) -> None:
    make, given, words = UNWRITTEN[case]
    with pytest.raises(SaekitError) as caught:
        circuit_tracer.save(make(), tmp_path / "out", **given)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_list_of_our_transcoders_is_a_set(tmp_path: Path) -> None:
    parts = [transcoder(i, skip=True) for i in range(LAYERS)]
    circuit_tracer.save(parts, tmp_path, model="toy")
    x = 3 + torch.randn(8, LAYERS * D, generator=torch.Generator().manual_seed(9))
    again = circuit_tracer.load_set(Files(tmp_path))
    for mine, theirs in zip(run_set(parts, x), run_set(again, x), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-4, rtol=1e-4)


def ours(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """All that is written, beside its inputs, and its codes and outputs by name."""
    expected = {}
    for name in CASES:
        d, (x, _) = read(GOLDEN / name), beside(name)
        circuit_tracer.save(d, folder / name)
        expected[name] = made_of(d, x)
        save_file({"x": x}, folder / f"{name}.safetensors")
    for rule, how in RULES.items():
        for reach in (None, 2, 1):
            d = own("clt", d_in=D, n_layers=LAYERS, reach=reach, **how)
            x = 3 + torch.randn(8, d.d_in, generator=torch.Generator().manual_seed(9))
            name = f"own-{rule}-{reach}"
            circuit_tracer.save(d, folder / name, model="toy")
            expected[name] = run(d, x)
            save_file({"x": x}, folder / f"{name}.safetensors")
    return expected


@pytest.mark.peer
def test_the_peer_opens_what_we_write(tmp_path: Path) -> None:
    expected = ours(tmp_path)
    exports.run("circuit_tracer", "open", tmp_path, python=os.environ["SAEKIT_TRACER"])
    for name, (codes, out) in expected.items():
        theirs = load_file(tmp_path / f"{name}.safetensors")
        tolerance = 1e-4 if name.startswith("own") else TOL
        assert torch.equal(theirs["codes"] != 0, codes != 0), name
        assert torch.allclose(theirs["codes"], codes, atol=tolerance, rtol=tolerance), name
        assert torch.allclose(theirs["out"], out, atol=tolerance, rtol=tolerance), name
    print(json.dumps({"opened": len(expected)}))
