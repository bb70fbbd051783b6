"""Formats of other tools: what their own code makes of a file is what saekit makes of it, and the other way round.

Goldens are written by tests/peers/*.py, in the peers' environments. With ``SAEKIT_PEERS2`` naming the python of one that
has dictionary_learning, eai-sparsify and overcomplete, the ``peer`` tests write and open files there and then.
"""

import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from exports import (  # fmt: skip
    CASES,
    CLOSE,
    DTYPES,
    GOLDEN,
    OPTIONS,
    PAIRS,
    RULES,
    SCRIPTS,
    D,
    F,
    K,
    difference,
    edited,
    exported,
    family_of,
    folder_of,
    held,
    inputs,
    label_of,
    loaded,
    made,
    run,
    says,
    setting,
    untold,
)

import saekit
from saekit import SaekitError
from saekit.hub.files import Files
from saekit.hub.formats import FORMATS


@pytest.mark.parametrize("case", CASES)
def test_codes_supports_and_outputs_are_the_peers(case: str) -> None:
    d = loaded(case)
    codes, out, same = difference(d, held(*folder_of(case)))
    assert d.dtype == torch.float32
    assert same
    assert codes <= CLOSE
    assert out <= CLOSE


@pytest.mark.parametrize("case", CASES)
def test_its_content_says_which_format_it_is(case: str) -> None:
    folder, name = folder_of(case)
    files = Files(folder / name)
    assert [f for f in FORMATS if FORMATS[f].detect(files)] == [family_of(case)]


@pytest.mark.parametrize("case", CASES)
def test_what_was_read_stays_itself_in_saekits_own_format(case: str, tmp_path: Path) -> None:
    d = loaded(case)
    again = saekit.load(saekit.save(d, tmp_path / "out"))
    x = held(*folder_of(case))["x"]
    assert torch.equal(d.encode(x).to_dense(), again.encode(x).to_dense())
    assert again.card["imported"] == d.card["imported"]


@pytest.mark.parametrize(("format", "architecture", "normalise"), PAIRS)
def test_a_format_says_a_dictionary_exactly_or_says_why_not(
    format: str, architecture: str, normalise: str, tmp_path: Path
) -> None:
    d, out = made(architecture, normalise), tmp_path / "out"
    if not says(format, architecture, normalise):
        with pytest.raises(SaekitError, match=f"{format}.*(choose|ask|train)"):
            saekit.save(d, out, format=format)
        assert not out.exists()
        return
    saekit.save(d, out, format=format)
    again = saekit.load(out, **untold(format, d))
    codes, output, same = difference(again, reference(d))
    assert same
    assert codes <= CLOSE
    assert output <= CLOSE
    sites = [d.reads, d.writes]
    if format == "sparsify":  # names modules, as seen from the model's own; blocks.3.hook_resid_post is none
        sites = [tuple(p.removeprefix("model.") for p in side if ":" in p) for side in sites]
    assert [again.reads, again.writes] == sites


@torch.no_grad()
def reference(d: saekit.Dictionary, seed: int = 0) -> dict[str, torch.Tensor]:
    """What a dictionary makes of inputs, as a peer's golden says it."""
    x = inputs(seed=seed)
    codes = d.encode(x)
    return {"x": x, "codes": codes.to_dense(), "out": d.decode(codes, x)}


def check_opened(format: str, folder: Path, written: dict[str, saekit.Dictionary]) -> None:
    """What a peer made of files is what saekit makes of them, and, in fp32, what the dictionaries are."""
    for case, d in written.items():
        theirs = held(folder, case)
        for mine in (
            saekit.load(folder / case, **untold(format, d)),
            *([d] if case.endswith("float32") else []),
        ):
            codes, out, same = difference(mine, theirs)
            assert same, case
            assert max(codes, out) <= CLOSE, case


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("format", [f for f in RULES if SCRIPTS[f][0] == "documented"])
def test_files_are_what_the_documents_say(format: str, everything: bool, tmp_path: Path) -> None:
    written = exported(format, tmp_path, everything)
    assert len(written) >= 4
    run("documented", "open", tmp_path)
    check_opened(format, tmp_path, written)


@pytest.mark.peer
@pytest.mark.parametrize("format", [f for f in RULES if SCRIPTS[f][0] != "documented"])
def test_peers_open_what_saekit_writes(format: str, tmp_path: Path) -> None:
    script, variable = SCRIPTS[format]
    written = exported(format, tmp_path, everything=True)
    run(script, "open", tmp_path, python=os.environ[variable])
    check_opened(format, tmp_path, written)


@pytest.mark.peer
@pytest.mark.parametrize("family", ["dictionary_learning", "sparsify", "overcomplete"])
def test_goldens_are_what_the_peers_write_today(family: str, tmp_path: Path) -> None:
    run(family, "write", tmp_path, python=os.environ["SAEKIT_PEERS2"])
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in (GOLDEN / family).iterdir()}
    for case in sorted(p for p in tmp_path.iterdir() if p.is_dir()):
        d = saekit.load(case, **OPTIONS.get(case.name, {}))
        codes, out, same = difference(d, held(tmp_path, case.name))
        assert same, case
        assert max(codes, out) <= CLOSE, case


@pytest.mark.parametrize("format", [f for f in RULES if f != "gemma_scope"])
def test_weights_are_written_in_the_dtype_asked_for(format: str, tmp_path: Path) -> None:
    architecture = "topk" if format in ("sparsify", "openai") else "relu"
    d = made(architecture, "row_std" if format == "openai" else "scale")
    for dtype in DTYPES:
        saekit.save(d, tmp_path / dtype, format=format, dtype=dtype)
        assert saekit.load(tmp_path / dtype).card["imported"]["dtype"] == dtype
    with pytest.raises(SaekitError, match="dtype 'int8' is unknown"):
        saekit.save(d, tmp_path / "int8", format=format, dtype="int8")
    with torch.no_grad():
        d.atoms.weight.mul_(1e6)
    with pytest.raises(SaekitError, match="'float16' is too narrow for"):
        saekit.save(d, tmp_path / "wide", format=format, dtype="float16")
    assert not (tmp_path / "int8").exists()
    assert not (tmp_path / "wide").exists()


# dictionary_learning


@pytest.mark.parametrize("name", ["BatchTopKSAE", "MatryoshkaBatchTopKSAE"])
def test_a_threshold_that_was_never_set_is_no_threshold(name: str, tmp_path: Path) -> None:
    case = f"dictionary_learning/{name}-float32"
    folder = edited(case, tmp_path, "ae.pt", setting("threshold", torch.tensor(-1.0)))
    with pytest.raises(SaekitError, match=r"threshold = -1 .* never set by training"):
        saekit.load(folder)
    codes, _, same = difference(saekit.load(folder, threshold=0.75), held(*folder_of(case)))
    assert same and codes <= CLOSE


PLACES = [
    ({"submodule_name": "resid_post_layer_3"}, "out", ("blocks.3.hook_resid_post",)),
    ({"submodule_name": "resid_post_layer_3"}, "in", ("blocks.3.hook_resid_pre",)),
    ({"submodule_name": "mlp_out_layer_3"}, "out", ("blocks.3.hook_mlp_out",)),
    ({"submodule_name": "attn_out_layer_11"}, "out", ("blocks.11.hook_attn_out",)),
    ({"submodule_name": "blocks.3.attn.hook_z"}, "out", ("blocks.3.attn.hook_z",)),
    ({"submodule_name": "gate"}, "out", ()),
    ({"submodule_name": None}, "out", ()),
]


@pytest.mark.parametrize(("trainer", "side", "reads"), PLACES)
def test_a_layer_alone_is_not_taken_for_the_residual_stream(
    trainer: dict, side: str, reads: tuple, tmp_path: Path
) -> None:
    folder = edited(
        "dictionary_learning/AutoEncoderNew-float32", tmp_path, "config.json",
        lambda c: {"trainer": {**c["trainer"], **trainer}, "buffer": {"io": side}},
    )  # fmt: skip
    d = saekit.load(folder)
    assert (d.reads, d.writes) == (reads, reads)
    assert ("the hook point" in d.card["imported"]["missing"]) == (not reads)
    assert saekit.load(folder, hook_point="blocks.5.hook_x").reads == ("blocks.5.hook_x",)


def test_a_checkpoint_of_another_class_is_told_by_its_config_alone() -> None:
    d = loaded("dictionary_learning/MatryoshkaBatchTopKSAE-float32")
    assert d.config.selection[0] == "jumprelu"
    assert d.card["data"] == {"model": {"name": "EleutherAI/pythia-70m-deduped"}, "context": 128}
    assert d.card["imported"]["metadata"]["trainer"]["k"] == K


# sparsify


def many(tmp_path: Path) -> Path:
    """A run over several hook points."""
    out = tmp_path / "run"
    for case, place in (("topk-float32", "layers.3"), ("topk-transcode-float32", "layers.3.mlp"), ("groupmax-float32", "layers.4/seed0"), ("topk-bfloat16", "layers.4/seed1")):  # fmt: skip
        shutil.copytree(next((GOLDEN / "sparsify" / case).iterdir()), out / place)
    (out / "config.json").write_text("{}")
    return out


def test_a_folder_of_several_hook_points_is_asked_which(tmp_path: Path) -> None:
    folder = many(tmp_path)
    with pytest.raises(
        SaekitError,
        match=r"more than one of its dictionaries; known: layers\.3, layers\.3\.mlp, layers\.4/seed0",
    ):
        saekit.load(folder)
    with pytest.raises(SaekitError, match=r"'layers\.5' is not one of its dictionaries; did you mean"):
        saekit.load(folder, hook_point="layers.5")
    with pytest.raises(SaekitError, match="more than one"):
        saekit.load(folder, hook_point="layers.4")
    for point, case, reads in (
        ("layers.3", "topk-float32", "layers.3:out"), ("layers.3.mlp", "topk-transcode-float32", "layers.3.mlp:in"),
        ("layers.3.mlp:in", "topk-transcode-float32", "layers.3.mlp:in"), ("layers.4/seed0", "groupmax-float32", "layers.4:out"),
    ):  # fmt: skip
        d = saekit.load(folder, hook_point=point)
        codes, _, same = difference(d, held(GOLDEN / "sparsify", case))
        assert same and codes <= CLOSE
        assert d.reads == (reads,)
    assert saekit.load(folder / "layers.4" / "seed1").reads == ("layers.4:out",)


@pytest.mark.parametrize("latents", [0, F])
def test_no_number_of_latents_means_the_expansion_factor(latents: int, tmp_path: Path) -> None:
    folder = edited("sparsify/topk-float32", tmp_path, "cfg.json", setting("num_latents", latents))
    assert saekit.load(folder).n_features == F


# Gemma Scope


REPOS = [
    ("gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71", "blocks.20.hook_resid_post", "blocks.20.hook_resid_post"),
    ("gemma-scope-9b-it-mlp/layer_3/width_16k/average_l0_9", "blocks.3.hook_mlp_out", "blocks.3.hook_mlp_out"),
    ("models--google--gemma-scope-27b-pt-att/snapshots/0a/layer_7/width_131k/average_l0_5", "blocks.7.attn.hook_z", "blocks.7.attn.hook_z"),
    ("gemma-scope-2b-pt-transcoders/layer_4/width_16k/average_l0_7", "blocks.4.ln2.hook_normalized", "blocks.4.hook_mlp_out"),
    ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "hook_embed", "hook_embed"),
    ("somewhere/layer_4", None, None),
]  # fmt: skip


def test_the_nearest_folder_says_where_a_file_without_a_config_stands(tmp_path: Path) -> None:
    d = saekit.create("jumprelu", d_in=8, n_features=16).to_inference()
    folder = tmp_path / "transcoder_study" / "resid_post" / "layer_9_width_16k"
    here = saekit.save(d, folder, format="gemma_scope_2")
    (here / "config.json").unlink()
    found = saekit.load(here)
    assert found.config.wiring[0] == "autoencoder" and found.reads == ("model.layers.9:out",)


@pytest.mark.parametrize(("place", "read", "written"), REPOS)
def test_a_path_says_what_gemma_scope_reads(
    place: str, read: str | None, written: str | None, tmp_path: Path
) -> None:
    shutil.copytree(
        next((GOLDEN / "documented" / "gemma_scope-res").rglob("params.npz")).parent, tmp_path / place
    )
    d = saekit.load(tmp_path / place)
    assert d.reads == ((read,) if read else ())
    assert d.writes == ((written,) if written else ())
    assert ("the hook point" in d.card["imported"]["missing"]) == (read is None)


def test_an_embeddings_output_is_scaled_as_a_whole() -> None:
    d, golden = (
        loaded("documented/gemma_scope-embedding"),
        held(GOLDEN / "documented", "gemma_scope-embedding"),
    )
    state = Files(GOLDEN / "documented" / "gemma_scope-embedding")
    b_dec = state.tensors(state.names()[0])["b_dec"]
    torch.testing.assert_close(d.b_dec, b_dec * math.sqrt(D))
    assert difference(d, golden)[2]


# OpenAI, Qwen Scope


def test_an_output_of_openais_comes_back_by_its_rows_mean_and_deviation() -> None:
    d = loaded("documented/openai-TopK", hook_point="blocks.1.hook_mlp_out")
    assert d.reads == d.writes == ("blocks.1.hook_mlp_out",)
    x = held(GOLDEN / "documented", "openai-TopK")["x"]
    torch.testing.assert_close(d(7 * x + 100), 7 * d(x) + 100, rtol=1e-4, atol=1e-2)


def test_k_of_qwen_scope_is_in_its_repositorys_name(tmp_path: Path) -> None:
    source = GOLDEN / "documented" / "bare-qwen_scope" / "layer7.sae.pt"
    for place, k in (
        ("SAE-Res-Qwen3-1.7B-Base-W32K-L0_4", 4),
        ("models--Qwen--SAE-Res-Qwen3-8B-W64K-L0_7/snapshots/1f", 7),
    ):
        (tmp_path / place).mkdir(parents=True)
        shutil.copy(source, tmp_path / place)
        for path in (tmp_path / place, tmp_path / place / source.name):
            d = saekit.load(path)
            assert d.config.selection[1].k == k
            assert d.reads == ("blocks.7.hook_resid_post",)
    with pytest.raises(SaekitError, match=r"k of file .* give k="):
        saekit.load(source)


def test_a_file_of_hook_z_finds_its_config_beside_it(tmp_path: Path) -> None:
    folder = GOLDEN / "documented" / "bare-hook_z"
    for other in ("gpt2-small_L8.pt", "gpt2-small_L8_cfg.json"):
        shutil.copy(folder / other.replace("L8", "L7"), tmp_path / other)
    d = saekit.load(tmp_path / "gpt2-small_L8.pt")
    assert difference(d, held(GOLDEN / "documented", "bare-hook_z"))[2]


def test_options_that_files_need_are_asked_for() -> None:
    with pytest.raises(SaekitError, match=r"no encoder, as a matching pursuit hasn't.* give k="):
        saekit.load(GOLDEN / "overcomplete" / "pursuit")
    with pytest.raises(SaekitError, match="normalization 'l1' is unknown"):
        saekit.load(GOLDEN / "overcomplete" / "topk", k=K, normalization="l1")
    with pytest.raises(SaekitError, match="option 'k' is not one of format 'sparsify'"):
        saekit.load(GOLDEN / "sparsify" / "topk-float32", k=K)


@pytest.mark.parametrize("format", ["llama_scope", "overcomplete", "bare"])
def test_formats_that_are_only_read_say_so(format: str, tmp_path: Path) -> None:
    with pytest.raises(SaekitError, match=f"format {format!r} is read and never written"):
        saekit.save(made("relu", "none"), tmp_path / "out", format=format)


def test_several_places_are_refused_by_formats_of_one(tmp_path: Path) -> None:
    d = saekit.create("crosscoder", d_in=(D, D), n_features=F, k=K)
    for format in RULES:
        with pytest.raises(SaekitError, match="wiring 'crosscoder' is more than one place"):
            saekit.save(d, tmp_path / "out", format=format)


def test_the_table_of_pairs_names_every_case() -> None:
    table = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
    for case in CASES:
        label = label_of(case.split("/")[1]).removeprefix(f"{family_of(case)}-")
        assert f"| {family_of(case)} | {label} | peer → saekit |" in table
    for format, architecture, normalise in PAIRS:
        if says(format, architecture, normalise):
            assert f"| {format} | {architecture} | saekit → peer |" in table
