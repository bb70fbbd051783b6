"""SAELens' files: what its own code makes of them, both ways, and what is refused.

``tests/golden/saelens`` was written by ``tests/peers/saelens.py``; ``SAEKIT_PEERS`` names the python of an environment
that sae-lens is installed in, for the tests that run it.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import saekit
from saekit.dictionaries import create
from saekit.hub.files import Files
from saekit.hub.record import Record, to_dictionary
from saekit.hub.saelens import ARCHITECTURES, WEIGHTS, detect

HERE = Path(__file__).parent
GOLDEN = HERE / "golden/saelens"
CASES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir())
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}  # fmt: skip
D, F, K, OUT = 8, 24, 4, 6


def same(d: saekit.Dictionary, of: dict[str, Tensor]) -> None:
    """The peer's codes and outputs to 1e-5 of the largest, and its supports."""
    codes = d.encode(of["x"])
    dense, out = codes.to_dense(), d.decode(codes, of["x"])
    assert torch.equal(dense != 0, of["codes"] != 0)
    assert (dense - of["codes"]).abs().max() <= 1e-5 * of["codes"].abs().max()
    assert (out - of["out"]).abs().max() <= 1e-5 * of["out"].abs().max()
    assert of["codes"].count_nonzero() > len(of["x"])  # there is something to agree on


@pytest.mark.parametrize("case", CASES)
def test_codes_and_outputs_are_the_peers_own(case: str) -> None:
    assert detect(Files(GOLDEN / case))
    d = saekit.load(GOLDEN / case)
    with torch.no_grad():
        same(d, load_file(GOLDEN / f"{case}.safetensors"))
    assert d.card["imported"]["dtype"] == json.loads((GOLDEN / case / "cfg.json").read_text())["dtype"]


def test_every_architecture_normalisation_and_dtype_has_a_case() -> None:
    cfgs = [json.loads((GOLDEN / case / "cfg.json").read_text()) for case in CASES]
    assert {cfg["architecture"] for cfg in cfgs} == set(ARCHITECTURES)
    assert {cfg["normalize_activations"] for cfg in cfgs} >= {"none", "layer_norm", "constant_norm_rescale", "expected_average_only_in", "covariance_whitening"}  # fmt: skip
    assert {cfg["dtype"] for cfg in cfgs} == set(DTYPES)


@pytest.mark.parametrize("case", CASES)
def test_a_written_file_is_the_same_dictionary(case: str, tmp_path: Path) -> None:
    d, x = saekit.load(GOLDEN / case), load_file(GOLDEN / f"{case}.safetensors")["x"]
    saekit.save(d, tmp_path / "out", format="saelens")
    back = saekit.load(tmp_path / "out")
    with torch.no_grad():
        codes = d.encode(x)
        scale = back.encode(x).values.abs().max() / codes.values.abs().max()
        pursued = d.config.selection[0] == "pursuit"
        assert pursued or abs(scale - 1) < 1e-5  # a pursuit's scale divides its codes
        wanted = {"x": x, "codes": codes.to_dense() * (scale if pursued else 1), "out": d.decode(codes, x)}
        same(back, wanted)
    assert (back.reads, back.writes) == (d.reads, d.writes)
    theirs, mine = (card["imported"]["metadata"] for card in (d.card, back.card))
    assert {k: v for k, v in mine.items() if k in theirs} == theirs | {"sae_lens_version": "6.54.12"} or "before_6" in case  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_written_in_a_dtype(dtype: str, tmp_path: Path) -> None:
    saekit.save(saekit.load(GOLDEN / "heads"), tmp_path / "out", format="saelens", dtype=dtype)
    cfg = json.loads((tmp_path / "out/cfg.json").read_text())
    assert {t.dtype for t in load_file(tmp_path / "out" / WEIGHTS).values()} == {DTYPES[dtype]}
    assert (cfg["dtype"], cfg["reshape_activations"]) == (dtype, "hook_z")
    assert saekit.load(tmp_path / "out").dtype == torch.float32


def trained(name: str, **options: Any) -> saekit.Dictionary:
    """A dictionary of saekit's own with a normalisation, whose output has another scale than its input."""
    given = {"d_in": D, "n_features": F, **({"k": K} if name not in ("relu", "jumprelu", "gated") else {})}
    d = create(name, **given | options)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(256, D, generator=g) + 3
    d.prepare(torch.cat([x, 50 * x + 7], 1) if d.wiring.columns == 2 * D else x)
    with torch.no_grad():
        if d.wiring.skip is not None:
            d.wiring.skip.normal_(generator=g)
        if name in ("batchtopk", "matryoshka"):
            d.selection.threshold.fill_(0.4)
    d.reads, d.writes = ("blocks.0.hook_resid_mid",), ("blocks.0.hook_mlp_out",)
    return d


OWN: dict[str, dict[str, Any]] = {
    "relu": {}, "topk": {}, "abstopk": {}, "batchtopk": {}, "jumprelu": {}, "gated": {}, "matryoshka": {}, "matching_pursuit": {},
    "transcoder": {"selection": "batchtopk"}, "skip_transcoder": {"selection": "batchtopk"},
}  # fmt: skip


@pytest.mark.parametrize("normalise", ["scale", "none", "row_std", "row_norm"])
@pytest.mark.parametrize("name", OWN)
def test_dictionaries_of_ours_are_written(name: str, normalise: str, tmp_path: Path) -> None:
    d = trained(name, normalise=normalise, **OWN[name])
    saekit.save(d, tmp_path / "out", format="saelens")
    back = saekit.load(tmp_path / "out")
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(2)) + 3
    with torch.no_grad():
        hat = d(x)
        assert (back(x) - hat).abs().max() <= 1e-5 * hat.abs().max()
        assert torch.equal(back.encode(x).to_dense() != 0, d.encode(x).to_dense() != 0)
    cfg = json.loads((tmp_path / "out/cfg.json").read_text())
    assert cfg["metadata"]["hook_name"] == "blocks.0.hook_resid_mid"
    assert ("hook_name_out" in cfg["metadata"]) == ("transcoder" in name) == ("d_out" in cfg)


def turned(d: saekit.Dictionary) -> saekit.Dictionary:
    """Its features read by each other's directions."""
    with torch.no_grad():
        d.encoder.copy_(d.encoder.roll(1, 0))
    return d


REFUSED: dict[str, tuple[Any, str]] = {
    "ranks in a transcoder": (lambda: trained("transcoder"), "no selection 'topk'.*--thresholds"),
    "groups": (lambda: trained("groupmax"), "no selection 'groupmax'.*--thresholds"),
    "orthogonal pursuit": (lambda: trained("omp"), "no selection 'omp'"),
    "linear units": (lambda: trained("k_sparse"), "sets negative codes to 0"),
    "two places": (lambda: create("crosscoder", d_in=[D, D], n_features=F, k=K), "wiring 'crosscoder' is more than one place"),
    "another encoder": (lambda: turned(trained("matching_pursuit", atoms="unit_norm")), "has an encoder of its own"),
    "a relative end": (lambda: trained("matching_pursuit", tolerance=0.1), "stops at tolerance = 0.1"),
    "a bias of one side": (lambda: to_dictionary(Record(torch.eye(D), torch.eye(D), torch.zeros(D), torch.ones(D), "pursuit", {"k": K}, tied=True)), "adds another b_dec than it takes off"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_saelens_can_not_say_is_refused_and_nothing_is_written(case: str, tmp_path: Path) -> None:
    make, said = REFUSED[case]
    with pytest.raises(saekit.SaekitError, match=said):
        saekit.save(make(), tmp_path / "out", format="saelens")
    assert not (tmp_path / "out").exists()


def test_a_dtype_that_does_not_hold_the_weights_is_refused(tmp_path: Path) -> None:
    d = saekit.load(GOLDEN / "heads")
    with torch.no_grad():
        d.b_dec.mul_(1e6)
    with pytest.raises(saekit.SaekitError, match="'float16' is too narrow for b_dec"):
        saekit.save(d, tmp_path / "out", format="saelens", dtype="float16")
    with pytest.raises(saekit.SaekitError, match="dtype 'float8' is unknown"):
        saekit.save(d, tmp_path / "out", format="saelens", dtype="float8")
    assert not (tmp_path / "out").exists()


# what files may get wrong


def changed(case: str, folder: Path, cfg: dict[str, Any] | None = None, **tensors: Tensor | None) -> Path:
    """A copy of a case with other fields (None: without) and other tensors (None: without)."""
    shutil.copytree(GOLDEN / case, folder)
    said = json.loads((folder / "cfg.json").read_text()) | (cfg or {})
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    stored = load_file(folder / WEIGHTS) | tensors
    save_file({k: v for k, v in stored.items() if v is not None}, folder / WEIGHTS)
    return folder


PLAIN, BATCH, RAW = "standard-none-float32", "checkpoint-batchtopk", "transcoder-none-float16"
DAMAGED: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any], str]] = {
    "W_dec the other way round": (PLAIN, None, {"W_dec": torch.zeros(D, F)}, r"'W_dec'.*\(8, 24\).*must be \(24, 8\)"),
    "W_enc the other way round": (PLAIN, None, {"W_enc": torch.zeros(F, D)}, r"'W_enc'.*\(24, 8\).*must be \(8, 24\)"),
    "thresholds under a ReLU": (PLAIN, None, {"threshold": torch.ones(F)}, "holds the tensor 'threshold', which architecture 'standard' does not have"),
    "a BatchTopK called ReLU": (BATCH, {"architecture": "standard"}, {}, "holds the tensor 'topk_threshold', which architecture 'standard'"),
    "a BatchTopK without its threshold": (BATCH, None, {"topk_threshold": None}, "lacks the tensor 'topk_threshold'"),
    "a bias of the output taken off the input": (RAW, {"apply_b_dec_to_input": True}, {}, "apply_b_dec_to_input = true.*set it to false"),
    "no architecture": (PLAIN, {"architecture": None}, {}, "lacks the field 'architecture'"),
    "an architecture of no name": (PLAIN, {"architecture": "standrad"}, {}, "'standrad'.*did you mean 'standard'"),
    "attention over what was before": (PLAIN, {"architecture": "temporal"}, {}, "'temporal'.*saekit has no such dictionary"),
    "a normalisation of no name": (PLAIN, {"normalize_activations": "layernorm"}, {}, "'layernorm'.*did you mean 'layer_norm'"),
    "a shape of no name": (PLAIN, {"reshape_activations": "hook_q"}, {}, "reshape_activations .hook_q.*unknown"),
    "half a feature": ("topk-none-float64", {"k": 4.5}, {}, "k = 4.5.*whole number"),
    "no k": ("topk-none-float64", {"k": None}, {}, "k = None.*whole number"),
    "too many features": ("topk-none-float64", {"k": 99}, {}, "k = 99"),
    "another width": (PLAIN, {"d_in": 9}, {}, "with d_in = 9"),
    "a width in words": (PLAIN, {"d_in": "8"}, {}, "d_in = '8'.*expected int"),
    "a place that is no name": (PLAIN, {"metadata": {"hook_name": ["a"], "sae_lens_version": "6.0.0"}}, {}, "metadata.hook_name = .*expected str"),
    "NaN": (PLAIN, None, {"b_enc": torch.full((F,), torch.nan)}, "b_enc.*NaN|NaN.*b_enc"),
    "a factor that nothing asks for": ("before_6-relu", None, {"scaling_factor": torch.full((F,), 2.0)}, "finetuning_scaling_factor in its cfg is not true"),
    "an activation of no name": ("before_6-relu", {"activation_fn_str": "tanh-relu"}, {}, "activation_fn 'tanh-relu'.*known: relu, topk"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_that_means_something_else_is_refused(name: str, tmp_path: Path) -> None:
    case, cfg, tensors, said = DAMAGED[name]
    with pytest.raises(saekit.SaekitError, match=said):
        saekit.load(changed(case, tmp_path / "d", cfg, **tensors))


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"scaling_factor": -1.0}, "scaling_factor = -1.0; it must be above 0"),
        ({"scaling_factor": "2"}, "scaling_factor = '2'"),
        ({}, "lacks the field 'scaling_factor'"),
    ],
)
def test_a_damaged_scale_is_refused(beside: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = changed("checkpoint-topk-scale", tmp_path / "d")
    (folder / "activation_scaler.json").write_text(json.dumps(beside))
    with pytest.raises(saekit.SaekitError, match=said):
        saekit.load(folder)


def test_whitening_is_refused_where_it_does_not_fold(tmp_path: Path) -> None:
    folder = changed("checkpoint-pursuit", tmp_path / "d", {"normalize_activations": "covariance_whitening"})
    for name in ("activation_scaler.json", "activation_whitening.safetensors"):
        shutil.copy(GOLDEN / "checkpoint-topk-whiten" / name, folder / name)
    with pytest.raises(saekit.SaekitError, match="matching pursuit can't be folded"):
        saekit.load(folder)
    topk = changed("checkpoint-topk-whiten", tmp_path / "e")
    save_file({"mean": torch.zeros(D), "matrix": torch.eye(D)}, topk / "activation_whitening.safetensors")
    with pytest.raises(saekit.SaekitError, match="no tensor 'inverse_matrix' of shape"):
        saekit.load(topk)


def test_a_batchtopk_is_not_read_as_a_relu() -> None:
    """SAELens#608: weights of a BatchTopK without its rule have several times the L0."""
    d, x = saekit.load(GOLDEN / BATCH), load_file(GOLDEN / f"{BATCH}.safetensors")["x"]
    assert d.config.selection[0] == "jumprelu"
    every = (x @ d.W_enc + d.b_enc > 0).sum(1)
    assert (d.encode(x).l0() < every).all()


def test_logarithms_and_factors_of_files_before_6(tmp_path: Path) -> None:
    """``log_threshold`` is one's logarithm, and a fine-tuned ``scaling_factor`` multiplies codes in the decoder."""
    case = "before_6-jumprelu"
    of = load_file(GOLDEN / f"{case}.safetensors")
    threshold = load_file(GOLDEN / case / WEIGHTS)["threshold"]
    with torch.no_grad():
        same(saekit.load(changed(case, tmp_path / "a", threshold=None, log_threshold=threshold.log())), of)
        factor = torch.linspace(0.5, 2, F)
        d = saekit.load(changed("before_6-relu", tmp_path / "b", {"finetuning_scaling_factor": True}, scaling_factor=factor))  # fmt: skip
        of = load_file(GOLDEN / "before_6-relu.safetensors")
        stored = load_file(GOLDEN / "before_6-relu" / WEIGHTS)
        same(d, of | {"out": (of["codes"] * factor) @ stored["W_dec"] + stored["b_dec"]})


def test_what_a_file_does_not_say_is_named_and_may_be_given(tmp_path: Path) -> None:
    silent = changed("transcoder-none-float16", tmp_path / "d", {"metadata": {"sae_lens_version": "6.54.12"}})
    d = saekit.load(silent)
    assert (d.reads, d.writes) == ((), ())
    assert d.card["imported"]["missing"] == ["the hook point", "the model", "the text"]
    d = saekit.load(silent, hook_point="blocks.1.ln2", hook_point_out="blocks.1.hook_mlp_out")
    assert (d.reads, d.writes) == (("blocks.1.ln2",), ("blocks.1.hook_mlp_out",))
    assert "the hook point that is written" in saekit.load(silent, hook_point="a").card["imported"]["missing"]
    with pytest.raises(saekit.SaekitError, match="writes what it reads; leave it out"):
        saekit.load(GOLDEN / PLAIN, hook_point_out="b")
    lost = changed("checkpoint-topk-scale", tmp_path / "e")
    (lost / "activation_scaler.json").unlink()
    assert any("activation_scaler.json" in what for what in saekit.load(lost).card["imported"]["missing"])


# with the peer


def peer(mode: str, folder: Path, *more: str) -> None:
    """Run the script of this peer in its own environment."""
    python = os.environ.get("SAEKIT_PEERS")
    if python is None:
        pytest.skip("SAEKIT_PEERS names no python")
    if subprocess.run([python, "-P", "-c", "import sae_lens"], capture_output=True).returncode:
        pytest.skip(f"{python} has no sae-lens")
    script = [python, "-P", str(HERE / "peers/saelens.py"), mode, str(folder), *more]
    offline = {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(script, capture_output=True, text=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.peer
def test_the_whole_product_is_read_as_the_peer_reads_it(tmp_path: Path) -> None:
    peer("write", tmp_path, "all")
    cases = sorted(path for path in tmp_path.iterdir() if path.is_dir())
    assert len(cases) == 198
    with torch.no_grad():
        for case in cases:
            same(saekit.load(case), load_file(case.with_name(f"{case.name}.safetensors")))


@pytest.mark.peer
def test_the_peer_reads_what_we_write(tmp_path: Path) -> None:
    """Everything that was imported, and dictionaries of ours, in every dtype: the peer's codes and outputs are ours."""
    made = {case: saekit.load(GOLDEN / case) for case in CASES}
    made |= {f"own-{n}-{kind}": trained(n, normalise=kind, **OWN[n]) for n in OWN for kind in ("scale", "row_std", "row_norm")}  # fmt: skip
    for name, d in made.items():
        for dtype in DTYPES:
            saekit.save(d, tmp_path / f"{name}-as-{dtype}", format="saelens", dtype=dtype)
            x = 3 + torch.randn(16, D, generator=torch.Generator().manual_seed(3))
            save_file({"x": x}, tmp_path / f"{name}-as-{dtype}.safetensors")
    peer("open", tmp_path)
    with torch.no_grad():
        for name, d in made.items():
            for dtype in DTYPES:
                of = load_file(tmp_path / f"{name}-as-{dtype}.safetensors")
                same(saekit.load(tmp_path / f"{name}-as-{dtype}"), of)
                pursued = d.config.selection[0] == "pursuit"
                if dtype in ("float32", "float64") and not pursued:
                    same(d, of)
                if dtype == "float32" and pursued:  # whose codes are divided by its scale
                    assert (d(of["x"]) - of["out"]).abs().max() <= 1e-5 * of["out"].abs().max()
