"""The adapter for SAEBench: what it computes, and which evaluations it refuses.

``SAEKIT_SAEBENCH`` names the python of an environment with sae-bench 0.6, for the test with the peer.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import saekit
from saekit.hub.saebench import EVALS, as_saebench
from saekit.types import SaekitError

POINT, AT, HEADS = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out", "blocks.1.attn.hook_z"
MADE: dict[str, dict[str, Any]] = {
    "relu": {}, "topk": {"k": 4}, "abstopk": {"k": 4}, "batchtopk": {"k": 4}, "jumprelu": {}, "gated": {},
    "matching_pursuit": {"k": 4}, "omp": {"k": 4}, "switch": {"k": 4}, "k_sparse": {"k": 4},
}  # fmt: skip


def made(name: str, rows: torch.Tensor, normalise: str = "scale", **options: Any) -> saekit.Dictionary:
    options = {"normalise": normalise, **MADE.get(name, {"k": 4}), **options}
    d = saekit.create(name, d_in=32, n_features=64, seed=1, **options)
    d.reads = d.writes = (POINT,)
    d.card["data"] = {"model": {"name": "pythia-70m-deduped"}, "context": 128}
    if d.needs_data:
        d.set_normalisation(rows[:2000] if d.d_out == d.d_in else torch.cat([rows[:2000]] * 2, 1))
    if hasattr(d.selection, "threshold"):
        d.selection.threshold.data.fill_(0.2)
    return d


@pytest.mark.parametrize("normalise", ["none", "scale", "whiten"])
@pytest.mark.parametrize("name", MADE)
def test_codes_and_outputs_are_the_dictionarys_over_atoms_of_norm_1(name: str, normalise: str, rows) -> None:
    d = made(name, rows, normalise)
    sae = as_saebench(d, "core")
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64), rtol=0, atol=1e-5)
    x = rows[:60].view(3, 20, 32)
    codes = d.encode(x).to_dense()
    found = sae.encode(x)
    assert torch.equal(found != 0, codes != 0) and (codes != 0).any()
    largest = rows.abs().max()
    torch.testing.assert_close(sae.decode(found), d(x), rtol=0, atol=float(1e-5 * largest))
    torch.testing.assert_close(sae(x), sae.decode(found))
    # an edit moves the output by the edited feature's direction, of length 1 for each unit of its code
    edited = found.clone()
    edited[..., 7] += 2
    moved = sae.decode(edited) - sae.decode(found)
    torch.testing.assert_close(moved, (2 * sae.W_dec[7]).expand_as(moved), rtol=0, atol=float(1e-5 * largest))


def test_casting_is_known_to_it(rows) -> None:
    sae = as_saebench(made("topk", rows), "core")
    assert sae.to(device="cpu", dtype=torch.bfloat16) is sae
    assert (sae.dtype, sae.cfg.dtype, sae.W_enc.dtype) == (torch.bfloat16, "bfloat16", torch.bfloat16)
    assert sae.encode(rows[:4]).dtype == sae(rows[:4]).dtype == torch.bfloat16


def test_its_settings_go_into_results_without_what_is_added(rows) -> None:
    sae = as_saebench(made("topk", rows), "core", model="gpt2")
    sae.cfg.metadata = object()
    assert (
        sae.cfg.to_dict() | {"model_name": "gpt2", "hook_name": POINT, "hook_layer": 1} == sae.cfg.to_dict()
    )
    assert sae.cfg.context_size == 128 and sae.cfg.d_sae == 64


RIGHT: dict[str, tuple[str, ...]] = {  # which evaluations are right about what
    "resid_post": tuple(EVALS),
    "another place": ("core", "sparse_probing", "scr_and_tpp", "autointerp", "unlearning"),
    "heads": ("core",),
    "transcoder": ("sparse_probing", "autointerp"),
    "lorsa": ("autointerp",),
}  # fmt: skip


def of_kind(kind: str, rows: torch.Tensor) -> saekit.Dictionary:
    if kind == "lorsa":
        d = saekit.create("lorsa", d_in=32, n_features=64, n_qk=2, d_qk=8, k=4, normalise="none")
    else:
        d = made("transcoder" if kind == "transcoder" else "topk", rows, "none")
    d.reads = ({"resid_post": POINT, "heads": HEADS}.get(kind, AT),)
    d.writes = ("blocks.1.hook_attn_out",) if kind in ("transcoder", "lorsa") else d.reads
    d.card["data"] = {"model": {"name": "pythia-70m-deduped"}}
    return d


@pytest.mark.parametrize("kind", RIGHT)
@pytest.mark.parametrize("name", EVALS)
def test_an_evaluation_that_would_be_wrong_is_refused(name: str, kind: str, rows) -> None:
    d = of_kind(kind, rows)
    if name in RIGHT[kind]:
        assert as_saebench(d, name).encode(rows[:32].view(2, 16, 32)).shape == (2, 16, 64)
        return
    with pytest.raises(SaekitError) as told:
        as_saebench(d, name)
    assert name in str(told.value) and all(right in str(told.value) for right in RIGHT[kind])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an eval": ("topk", {"eval": "cores"}, "eval 'cores'"),
    "a place": ("topk", {"hook_name": "layers.1:out"}, "hook_name 'layers.1:out'"),
    "a skip": ("skip_transcoder", {"eval": "autointerp"}, "decodes with its input"),
    "several places": ("crosscoder", {}, "wiring 'crosscoder'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_hold_is_named(case: str, rows) -> None:
    name, given, said = REFUSED[case]
    width = [16, 16] if name == "crosscoder" else 32
    d = saekit.create(name, d_in=width, n_features=64, k=4, normalise="none")
    d.reads = d.writes = (POINT,)
    d.card["data"] = {"model": {"name": "gpt2"}}
    with pytest.raises(SaekitError, match=said):
        as_saebench(d, **{"eval": "core", **given})
    del d.card["data"]
    if case == "a place":
        with pytest.raises(SaekitError, match="model is not in the dictionary's card"):
            as_saebench(d, "core")


@pytest.mark.peer
def test_the_peer_evaluates_it(tmp_path: Path, rows) -> None:
    """Its loader takes it, and its own metrics are those of the dictionary."""
    python = os.environ.get("SAEKIT_SAEBENCH")
    if not python:
        pytest.skip("SAEKIT_SAEBENCH names no python")
    d = made("batchtopk", rows)
    saekit.save(d, tmp_path / "d")
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root / "build" / "typing"), "PYTHONSAFEPATH": "1"}
    script = [python, str(root / "tests" / "peers" / "saebench.py"), str(tmp_path / "d")]
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
