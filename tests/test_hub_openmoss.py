"""OpenMOSS' format: what llamascopium itself wrote and made of it, what we write, and what is refused.

The files under ``golden/openmoss`` are the peer's, by ``peers/openmoss.py``. ``SAEKIT_OPENMOSS`` names the python of an
environment with llamascopium for the tests marked ``peer``.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import pytest
import torch
from safetensors.torch import load_file, save_file

import saekit
from saekit.hub import openmoss
from saekit.hub.files import Files
from saekit.hub.openmoss_write import expansion
from saekit.types import SaekitError

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "openmoss"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
FOLDED = [name for name in CASES if name.endswith("folded")]
OUT = "blocks.1.hook_mlp_out"
TOL = 1e-5


def options(name: str) -> dict[str, Any]:
    """What a case's files don't say."""
    beside, given = load_file(GOLDEN / f"{name}.safetensors"), {}
    if "threshold" in beside:
        given["threshold"] = float(beside["threshold"])
    if "norm" in beside:
        given["norms"] = {OUT: float(beside["norm"])}
    if name == "crosscoder-jumprelu-inference":
        given["heads"] = "each"
    return given


def read(name: str, **more: Any) -> saekit.Dictionary:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name in FOLDED else "error")
        return saekit.load(GOLDEN / name, **{**options(name), **more})


def run(d: saekit.Dictionary, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense codes and outputs."""
    with torch.no_grad():
        codes = d.encode(x)
        return codes.to_dense(), d.decode(codes, x)


def ranked_norms(name: str) -> torch.Tensor | float:
    """By what saekit's codes are larger than the peer's, where both rank by codes times norms: the norms themselves."""
    config = json.loads((GOLDEN / name / "config.json").read_text())
    if config["act_fn"] != "topk" or not config["sparsity_include_decoder_norm"]:
        return 1.0
    t = load_file(GOLDEN / name / "sae_weights.safetensors")
    if config["sae_type"] == "clt":
        squares = torch.zeros(len(t["W_E"]), t["W_E"].shape[2])
        for key in (key for key in t if key.startswith("W_D")):
            squares[: len(t[key])] += t[key].square().sum(-1)
        return squares.sqrt().flatten()
    if config["sae_type"] == "molt":
        pairs = [(t[key], t[key.replace("U_", "V_")]) for key in t if key.startswith("U_")]
        return torch.cat(
            [(u @ v).flatten(1).norm(dim=1) for u, v in sorted(pairs, key=lambda p: p[0].shape[2])]
        )
    return t.get("W_D", t.get("W_O")).norm(dim=1)


def golden(name: str) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs, and the peer's codes, in saekit's units, and outputs."""
    beside = load_file(GOLDEN / f"{name}.safetensors")
    codes = beside["codes"]
    if name == "crosscoder-relu-dataset":  # theirs has a column for each head, and they agree
        heads = codes.view(len(codes), 2, -1)
        assert torch.allclose(heads[:, 0], heads[:, 1], atol=TOL)
        codes = heads[:, 0]
    return beside["x"], (codes * ranked_norms(name), beside["out"])


@pytest.mark.parametrize("name", CASES)
def test_codes_and_outputs_are_the_peers_own(name: str) -> None:
    d, (x, (theirs, theirs_out)) = read(name), golden(name)
    codes, out = run(d, x)
    assert (theirs > 0).any() and (theirs == 0).any()
    assert torch.equal(codes != 0, theirs != 0)
    assert (codes - theirs).abs().max() < TOL
    assert (out - theirs_out).abs().max() < TOL
    assert d.reads and d.writes and d.card["imported"]["format"] == "openmoss"


@pytest.mark.parametrize("name", FOLDED)
def test_thresholds_left_behind_by_a_fold_are_told_and_brought_back_on_request(name: str) -> None:
    beside = load_file(GOLDEN / f"{name}.safetensors")
    trained = beside["trained.codes"] != 0
    with pytest.warns(UserWarning, match=r"times what they were in training.*thresholds='trained'"):
        stored = saekit.load(GOLDEN / name)
    assert not torch.equal(run(stored, beside["x"])[0] != 0, trained)  # the trap is real
    assert any("expect another L0" in said for said in stored.card["imported"]["folded"])
    codes, out = run(saekit.load(GOLDEN / name, thresholds="trained"), beside["x"])
    assert torch.equal(codes != 0, trained)
    assert (out - beside["trained.out"]).abs().max() < TOL


def written(name: str, folder: Path) -> tuple[saekit.Dictionary, torch.Tensor]:
    """A dictionary that was read, written again."""
    d, x = read(name), load_file(GOLDEN / f"{name}.safetensors")["x"]
    saekit.save(d, folder, format="openmoss", **({"n_ctx": 6} if name.startswith("lorsa") else {}))
    return d, x


UNSAID = {
    "crosscoder-jumprelu-inference": ["feature 12", "source 0", "divides a crosscoder's codes"],
    "lorsa-jumprelu-turns": ["frequencies", "rotary_base"],
}
SAID = [name for name in CASES if name not in UNSAID]


@pytest.mark.parametrize("name", SAID)
def test_what_is_written_is_read_back_as_it_was(name: str, tmp_path: Path) -> None:
    d, x = written(name, tmp_path / "out")
    again = saekit.load(tmp_path / "out")
    for mine, theirs in zip(run(d, x), run(again, x), strict=True):
        assert (mine - theirs).abs().max() < TOL
        assert torch.equal(mine != 0, theirs != 0)
    assert (again.reads, again.writes) == (d.reads, d.writes)


@pytest.mark.parametrize("name", UNSAID)
def test_what_the_format_cant_say_is_not_written(name: str, tmp_path: Path) -> None:
    with pytest.raises(SaekitError) as caught:
        written(name, tmp_path / "out")
    assert all(word in str(caught.value) for word in UNSAID[name]), str(caught.value)
    assert not (tmp_path / "out").exists()


def trained(preset: str, **given: Any) -> tuple[saekit.Dictionary, torch.Tensor]:
    """One of saekit's own, with a normalisation of its data, and inputs."""
    d = saekit.create(preset, n_features=24, seed=3, **given)
    g = torch.Generator().manual_seed(1)
    shape = (4, 6) if preset == "lorsa" else (64,)
    rows = 3 + torch.randn(*shape, d.wiring.columns, generator=g)
    d.prepare(rows)
    with torch.no_grad():
        for part in getattr(d, "parts", [d]):
            part.b_enc.add_(0.1)
        d.b_dec.add_(0.2)
    n = len(d.wiring.parts_in)
    d.writes = tuple(f"blocks.{i}.hook_mlp_out" for i in range(n))
    d.reads = d.writes if d.wiring.same_space else tuple(f"blocks.{i}.hook_resid_mid" for i in range(n))
    return d, rows[..., : d.d_in]


OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {"d_in": 8, "k": 4}),
    "relu": ("relu", {"d_in": 8}),
    "jumprelu": ("jumprelu", {"d_in": 8}),
    "batchtopk": ("batchtopk", {"d_in": 8, "k": 4}),
    "by rows": ("jumprelu", {"d_in": 8, "normalise": "row_norm"}),
    "transcoder": ("transcoder", {"d_in": 8, "k": 4}),
    "clt": ("clt", {"d_in": 4, "n_layers": 3, "k": 6}),
    "clt of short reach": ("clt", {"d_in": 4, "n_layers": 3, "reach": 2, "selection": "jumprelu", "objective": ("reconstruction", "l0")}),
    "crosscoder": ("crosscoder", {"d_in": (4, 4), "selection": "relu", "objective": ("reconstruction", "l1")}),
    "lorsa": ("lorsa", {"d_in": 8, "k": 4, "n_qk": 2, "d_qk": 4, "rotary": 4, "rotary_pairs": "neighbours"}),
    "lorsa with norms": ("lorsa", {"d_in": 8, "k": 4, "n_qk": 4, "n_kv": 2, "d_qk": 4, "rotary": 2, "qk_norm": True}),
    "molt": ("molt", {"d_in": 8, "k": 4, "ranks": (1, 2), "normalise": "none"}),
}  # fmt: skip


@pytest.mark.parametrize("case", OURS)
def test_our_own_are_written_and_read_back_in_raw_units(case: str, tmp_path: Path) -> None:
    preset, given = OURS[case]
    d, x = trained(preset, **given)
    openmoss.save(d, tmp_path, **({"n_ctx": 6} if preset == "lorsa" else {}))
    again = openmoss.load(Files(tmp_path))
    codes, out = run(d, x)
    theirs, theirs_out = run(again, x)
    assert torch.equal(codes != 0, theirs != 0) and (codes != 0).any()
    assert torch.allclose(codes, theirs, atol=1e-4, rtol=1e-4)
    assert torch.allclose(out, theirs_out, atol=1e-4, rtol=1e-4)


def changed(name: str, here: Path, config: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """A golden folder with other fields and tensors; None takes one away."""
    shutil.copytree(GOLDEN / name, here, dirs_exist_ok=True)
    held = json.loads((here / "config.json").read_text()) | (config or {})
    (here / "config.json").write_text(json.dumps({k: v for k, v in held.items() if v is not None}))
    file = here / "sae_weights.safetensors"
    if tensors:
        state = load_file(file) | {k.replace("__", "."): v for k, v in tensors.items()}
        save_file({k: v for k, v in state.items() if v is not None}, file)
    return here


NORM = f"dataset_average_activation_norm__{OUT.replace('.', '__')}"
REFUSED: dict[str, tuple[Callable[[Path], Path], dict[str, Any], list[str]]] = {
    "a GLU encoder": (lambda p: changed("sae-relu-dataset", p, {"use_glu_encoder": True}), {}, ["GLU", "two maps"]),
    "ranks of a batch": (lambda p: changed("sae-batchtopk-dataset", p), {}, ["'batchtopk'", "a whole batch", "threshold = "]),
    "ranks of all layers": (lambda p: changed("clt-topk-inference", p, {"act_fn": "layertopk"}), {}, ["'layertopk'", "all layers", "threshold = "]),
    "norms of a batch": (lambda p: changed("sae-jumprelu-batch", p), {}, ["batch-wise", OUT, "depends on the batch", "norms = "]),
    "a norm never set": (lambda p: changed("sae-relu-dataset", p, **{NORM: torch.tensor(1e-41)}), {}, [OUT, "norms = "]),
    "a norm that is NaN": (lambda p: changed("sae-relu-dataset", p, **{NORM: torch.tensor(float("nan"))}), {}, [OUT, "nan", "norms = "]),
    "no norm": (lambda p: changed("sae-relu-dataset", p, **{NORM: None}), {}, [OUT, "None", "norms = "]),
    "rows of a clt normalised one by one": (lambda p: changed("clt-relu-dataset", p, {"norm_activation": "token-wise"}), {}, ["clt", "token-wise"]),
    "an unknown normalisation": (lambda p: changed("sae-relu-dataset", p, {"norm_activation": "inferense"}), {}, ["norm_activation", "'inference'"]),
    "an unknown act_fn": (lambda p: changed("sae-relu-dataset", p, {"act_fn": "gelu"}), {}, ["act_fn", "'gelu'", "'relu'"]),
    "an unknown type": (lambda p: changed("sae-relu-dataset", p, {"sae_type": "sea"}), {}, ["sae_type", "'sea'", "'sae'"]),
    "a field of another type": (lambda p: changed("sae-relu-dataset", p, {"top_k": "3"}), {}, ["config.json", "top_k = '3'", "int"]),
    "a field missing": (lambda p: changed("sae-relu-dataset", p, {"hook_point_in": None}), {}, ["config.json", "lacks", "'hook_point_in'"]),
    "another width": (lambda p: changed("sae-relu-dataset", p, {"d_model": 7}), {}, ["'W_E'", "(6, 12)", "(7, 14)"]),
    "a width of 0": (lambda p: changed("sae-relu-dataset", p, {"d_model": 0}), {}, ["d_model = 0", "above 0"]),
    "a tensor missing": (lambda p: changed("sae-relu-dataset", p, b_D=None), {}, ["lacks", "'b_D'"]),
    "a tensor too many": (lambda p: changed("sae-relu-dataset", p, W_X=torch.zeros(3)), {}, ["'W_X'", "no use"]),
    "a tensor of whole numbers": (lambda p: changed("sae-relu-dataset", p, b_D=torch.zeros(6, dtype=torch.int32)), {}, ["'b_D'", "int32"]),
    "weights with NaN": (lambda p: changed("sae-relu-dataset", p, b_D=torch.full((6,), float("nan"))), {}, ["NaN", "'b_D'"]),
    "a target of a clt missing": (lambda p: changed("clt-relu-dataset", p, W_D__1=None), {}, ["lacks", "'W_D.1'"]),
    "a crosscoder's features that heads turn on apart": (lambda p: changed("crosscoder-jumprelu-inference", p), {}, ["each head", "heads = 'each'"]),
    "a crosscoder that ranks": (lambda p: changed("crosscoder-relu-dataset", p, {"act_fn": "topk"}), {"heads": "each"}, ["topk", "no way"]),
    "heads of what has none": (lambda p: changed("sae-relu-dataset", p), {"heads": "each"}, ["heads = 'each'", "sae"]),
    "thresholds of what has none": (lambda p: changed("sae-relu-dataset", p), {"thresholds": "trained"}, ["thresholds = 'trained'", "relu"]),
    "thresholds of training without norms": (lambda p: changed("sae-jumprelu-inference-plain", p, **{NORM: None}), {"thresholds": "trained"}, ["'trained'", "norms"]),
    "an option of another value": (lambda p: changed("sae-relu-dataset", p), {"thresholds": "traned"}, ["thresholds 'traned'", "'trained'"]),
    "repeated dimensions": (lambda p: changed("lorsa-topk-dataset", p, {"rotary_scale": 2}), {}, ["rotary_scale = 2"]),
    "positions of another base": (lambda p: changed("lorsa-topk-dataset", p, {"rotary_dim": 4, "rotary_base": 50}), {}, ["'rotary_sin'"]),
    "norms of each head's own": (lambda p: changed("lorsa-relu-norms", p, ln_q__w=torch.rand(2, 4)), {}, ["'ln_q.w'", "each head's own"]),
    "ranks that are none": (lambda p: changed("molt-relu-dataset", p, {"rank_counts": {"two": 12}}), {}, ["rank_counts"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cant_be_read_is_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    change, given, words = REFUSED[case]
    files = Files(change(tmp_path / "in"))
    with pytest.raises(SaekitError) as caught:
        openmoss.load(files, **given)
    said = str(caught.value)
    assert all(word in said for word in words), said
    assert "\n" not in said


def at(d: saekit.Dictionary, *hooks: str) -> saekit.Dictionary:
    d.reads = d.writes = hooks
    return d


def below(d: saekit.Dictionary) -> saekit.Dictionary:
    with torch.no_grad():
        d.selection.threshold.fill_(-1.0)
    return d


UNWRITTEN: dict[str, tuple[Callable[[], saekit.Dictionary], dict[str, Any], list[str]]] = {
    "a pursuit": (lambda: trained("matching_pursuit", d_in=8, k=3)[0], {}, ["'openmoss'", "'pursuit'"]),
    "a skip": (lambda: trained("skip_transcoder", d_in=8, k=3)[0], {}, ["'openmoss'", "skip"]),
    "two widths": (lambda: trained("transcoder", d_in=8, d_out=6, k=3)[0], {}, ["[8]", "[6]", "one width"]),
    "no hook points": (lambda: at(trained("topk", d_in=8, k=3)[0]), {}, ["reads and writes are empty"]),
    "thresholds below 0": (lambda: below(trained("jumprelu", d_in=8)[0]), {}, ["'openmoss'", "negative codes"]),
    "linear codes": (lambda: trained("k_sparse", d_in=8, k=3)[0], {}, ["'openmoss'", "negative codes"]),
    "centred maps": (lambda: trained("molt", d_in=8, k=3, ranks=(1, 2))[0], {}, ["centred", "normalise = 'none'"]),
    "falling ranks": (lambda: trained("molt", d_in=8, k=3, ranks=(2, 1), normalise="none")[0], {}, ["ranks (2, 1)"]),
    "ranks of a crosscoder": (lambda: trained("crosscoder", d_in=(4, 4), k=3, selection="topk")[0], {}, ["must be equal", "'topk'"]),
    "sequences of unknown length": (lambda: trained("lorsa", d_in=8, k=3, n_qk=2, d_qk=4)[0], {}, ["n_ctx"]),
    "sequences read where they are written": (lambda: at(trained("lorsa", d_in=8, k=3, n_qk=2, d_qk=4)[0], OUT), {"n_ctx": 6}, [OUT, "two hook points"]),
    "a window": (lambda: trained("lorsa", d_in=8, k=3, n_qk=2, d_qk=4, window=3)[0], {"n_ctx": 6}, ["no window"]),
    "a length of what has none": (lambda: trained("topk", d_in=8, k=3)[0], {"n_ctx": 6}, ["n_ctx = 6", "lorsa"]),
    "an unknown dtype": (lambda: trained("topk", d_in=8, k=3)[0], {"dtype": "float31"}, ["dtype", "'float32'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", UNWRITTEN)
def test_what_cant_be_written_is_refused_before_anything_is(case: str, tmp_path: Path) -> None:
    make, given, words = UNWRITTEN[case]
    with pytest.raises(SaekitError) as caught:
        openmoss.save(make(), tmp_path / "out", **given)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_expansion_factor_gives_the_number_of_features_back() -> None:
    for d in (3, 7, 49, 768, 2304):
        for n in range(1, 3000, 7):
            assert int(d * expansion(d, n)) == n


def ours(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """All that is written, beside its inputs, and its codes and outputs by name."""
    expected = {}
    for name in SAID:
        d, x = written(name, folder / name)
        save_file({"x": x}, folder / f"{name}.safetensors")
        expected[name] = run(d, x)
    for case, (preset, given) in OURS.items():
        d, x = trained(preset, **given)
        if preset == "lorsa":
            x = x[:2]
        name = "own-" + re.sub(r"\W+", "-", case)
        openmoss.save(d, folder / name, **({"n_ctx": 6} if preset == "lorsa" else {}))
        save_file({"x": x.contiguous()}, folder / f"{name}.safetensors")
        expected[name] = run(d, x)
    return expected


@pytest.mark.peer
def test_the_peer_opens_what_we_write(tmp_path: Path) -> None:
    expected = ours(tmp_path)
    exports.run("openmoss", "open", tmp_path, python=os.environ["SAEKIT_OPENMOSS"])
    for name, (codes, out) in expected.items():
        theirs = load_file(tmp_path / f"{name}.safetensors")
        found = theirs["codes"][..., : codes.shape[-1]]  # a crosscoder's, of its first head
        assert torch.equal(found != 0, codes != 0), name
        tolerance = 1e-4 if name.startswith("own") else TOL
        assert torch.allclose(found, codes, atol=tolerance, rtol=tolerance), name
        assert torch.allclose(theirs["out"], out, atol=tolerance, rtol=tolerance), name
