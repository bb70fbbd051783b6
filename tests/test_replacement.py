"""Dictionaries spliced into a model all at once: what is exact stays the model's, error terms restore what isn't."""

from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import saekit as command

import saekit
from saekit.evaluate.together import evaluate_together
from saekit.hooks import capture
from saekit.layers import attention
from saekit.models import Model, load_model
from saekit.replacement import Replacement
from saekit.types import SaekitError


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("code-lm")


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(1, 4096, (2, 24), generator=torch.Generator().manual_seed(0))


def logits(model: Model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.inputs(tokens, torch.ones_like(tokens, dtype=torch.bool)))


def activations(model: Model, tokens: torch.Tensor, points: list[str]) -> dict[str, torch.Tensor]:
    sites = {point: model.site(point) for point in points}
    return capture(lambda: logits(model, tokens), sites, stop=False)


def fresh(model: Model, layers: tuple[int, ...] = (0, 1, 2, 3)) -> list[saekit.Dictionary]:
    """A transcoder and a Lorsa for each layer, untrained."""
    out = []
    for layer in layers:
        out.append(saekit.create("transcoder", d_in=256, n_features=64, k=4, seed=layer))
        heads = attention(model, f"blocks.{layer}.attn")
        out.append(saekit.create("lorsa", attention=heads, n_features=64, k=4, seed=layer))
        for d, name in zip(out[-2:], ("mlp", "attn"), strict=True):
            d.reads, d.writes = d.wiring.sites([f"blocks.{layer}.{name}"])
    return out


def exact(model: Model, layer: int) -> saekit.Dictionary:
    """An attention layer as a Lorsa with a feature for each sign of each of its dimensions."""
    a = attention(model, f"blocks.{layer}.attn")
    n = 2 * a.W_V.shape[0] * a.W_V.shape[1]
    d = saekit.create(
        "lorsa", attention=a, n_features=n, k=n, normalise="none", atoms="free", objective=("reconstruction",)
    )
    with torch.no_grad():
        d.encoder.copy_(torch.cat([a.W_V, -a.W_V], 1).flatten(0, 1))
        d.b_enc.copy_(torch.cat([a.b_V, -a.b_V], 1).flatten())
        d.atoms.weight.copy_(torch.cat([a.W_O, -a.W_O], 2).movedim(2, 1).flatten(0, 1))
        d.b_dec.copy_(a.b_O)
    d.reads, d.writes = d.wiring.sites([f"blocks.{layer}.attn"])
    return d


def test_exact_dictionaries_leave_the_model_as_it_is(model: Model, tokens: torch.Tensor) -> None:
    """Every attention layer replaced by an exact Lorsa: the same logits, which zeros in their places change."""
    whole, own = Replacement(model, [exact(model, layer) for layer in range(4)]), logits(model, tokens)
    with whole.spliced():
        torch.testing.assert_close(logits(model, tokens), own, rtol=1e-3, atol=1e-3)
    with Replacement(model, fresh(model)).spliced():
        assert (logits(model, tokens) - own).abs().max() > 1
    assert torch.equal(logits(model, tokens), own)  # the hooks are gone


def test_error_terms_restore_the_model(model: Model, tokens: torch.Tensor) -> None:
    whole, own = Replacement(model, fresh(model)), logits(model, tokens)
    with whole.spliced(errors=whole.errors(activations(model, tokens, whole.points))):
        assert torch.equal(logits(model, tokens), own)


def test_error_terms_of_a_cross_layer_transcoder_restore_the_model(model: Model, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    clt = saekit.create("clt", d_in=256, n_layers=4, n_features=256, k=16)
    clt.reads = tuple(f"blocks.{i}.mlp:in" for i in range(4))
    clt.writes = tuple(f"blocks.{i}.mlp:out" for i in range(4))
    clt.b_dec.data.normal_()
    whole, own = Replacement(model, clt), logits(model, tokens)
    with whole.spliced(errors=whole.errors(activations(model, tokens, whole.points))):
        assert torch.equal(logits(model, tokens), own)
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)
    with pytest.raises(SaekitError, match="dictionaries hold a str"):
        Replacement(model, "run")  # type: ignore[arg-type]


def test_the_order_of_the_dictionaries_is_nothing(model: Model, tokens: torch.Tensor) -> None:
    """Where one reads what another writes it reads the replaced model, whichever is named first."""
    point = "blocks.1.hook_resid_post"
    first: Any = saekit.create("topk", d_in=256, n_features=64, k=4, seed=1)
    first.reads = first.writes = (point,)
    second: Any = saekit.create("transcoder", d_in=256, n_features=64, k=4, seed=2)
    second.reads, second.writes = (point,), ("blocks.2.mlp:out",)
    found = []
    for order in ([first, second], [second, first]):
        with Replacement(model, order).spliced():
            found.append(logits(model, tokens))
    assert torch.equal(*found)


def test_masked_positions_are_left_alone(model: Model, tokens: torch.Tensor) -> None:
    (d,) = [d for d in fresh(model, (1,)) if d.wiring.kind == "rows"]
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[:, :5] = False
    point = "blocks.1.mlp:out"
    before = activations(model, tokens, [point])[point]
    with Replacement(model, [d]).spliced(mask):
        after = activations(model, tokens, ["blocks.1.hook_resid_post", "blocks.1.hook_resid_mid"])
    seen = after["blocks.1.hook_resid_post"] - after["blocks.1.hook_resid_mid"]
    torch.testing.assert_close(seen[:, :5], before[:, :5], rtol=1e-3, atol=1e-4)
    assert (seen[:, 5:] - before[:, 5:]).abs().max() > 0.1


def test_a_cross_layer_transcoder_writes_layer_by_layer(model: Model, tokens: torch.Tensor) -> None:
    """With reach 1 it is its transcoders, each on what the replaced model gives it."""
    clt = saekit.create("clt", d_in=256, n_layers=4, n_features=256, k=16, reach=1)
    clt.reads = tuple(f"blocks.{i}.mlp:in" for i in range(4))
    clt.writes = tuple(f"blocks.{i}.mlp:out" for i in range(4))
    for part in clt.parts:
        part.b_enc.data.normal_()
    ones = []
    for i, part in enumerate(clt.parts):
        one = saekit.create("transcoder", d_in=256, n_features=64, k=4, normalise="none")
        one.load_state_dict({**one.state_dict(), **part.state_dict()})
        one.reads, one.writes = (clt.reads[i],), (clt.writes[i],)
        ones.append(one)
    out = []
    for dictionaries in ([clt], ones):
        with Replacement(model, dictionaries).spliced():
            out.append(logits(model, tokens))
            out.append(logits(model, tokens))  # a second pass begins afresh
    for other in out[1:]:
        torch.testing.assert_close(out[0], other, rtol=1e-3, atol=1e-3)


def test_together_is_measured_beside_random_ones(model: Model) -> None:
    ds = fresh(model, (1, 2))
    for d in ds:
        d.card = {}
    report = evaluate_together(ds, model, "stdlib", tokens=2048, context=64)
    assert float(report["l0"]) <= 16 and set(report["kl"].control) == {"random"}
    assert float(report["ce_with_errors"]) == pytest.approx(float(report["ce_original"]), abs=1e-4)
    assert abs(float(report["kl_with_errors"])) < 1e-4 < float(report["kl"])
    assert float(report["ce_ablated"]) > float(report["ce_original"])
    for key in ("ce_replaced", "kl", "ce_recovered"):
        low, high = report[key].interval
        assert low <= float(report[key]) <= high
    same = saekit.evaluate(ds, model, "stdlib", tokens=2048, context=64)
    assert float(same["kl"]) == float(report["kl"])
    with pytest.raises(SaekitError, match="belong to one dictionary"):
        saekit.evaluate(ds, model, hook_point="blocks.1.mlp")


def test_what_cannot_stand_in_is_refused(model: Model, tokens: torch.Tensor) -> None:
    one, other = (saekit.create("transcoder", d_in=256, n_features=64, k=4) for _ in range(2))
    for d in (one, other):
        d.reads, d.writes = d.wiring.sites(["blocks.1.mlp"])
    with pytest.raises(SaekitError, match=r"'blocks.1.mlp:out' is written by two"):
        Replacement(model, [one, other])
    other.reads, other.writes = ("blocks.2.mlp:in",), ("blocks.0.mlp:out",)
    with pytest.raises(SaekitError, match=r"before 'blocks.2.mlp:in', which it reads"):
        with Replacement(model, [other]).spliced():
            logits(model, tokens)
    other.reads = other.writes = ()
    for ds, words in (([], "is empty"), ([other], "name its hook points")):
        with pytest.raises(SaekitError, match=words):
            Replacement(model, ds)


def test_the_command_splices_a_folder_of_runs(tmp_path: Path) -> None:
    acts, out = tmp_path / "acts", tmp_path / "set"
    points = ("--hook-point", "blocks.[12].mlp:in", "--hook-point", "blocks.[12].mlp:out")
    assert command("harvest", "code-lm", *points, "--tokens", "4096", "--out", str(acts)).returncode == 0
    train = (
        "train",
        "transcoder",
        "--acts",
        str(acts),
        "--hook-points",
        "blocks.*.mlp",
        "--n-features",
        "64",
    )
    done = command(*train, "--k", "4", "--steps", "2", "--batch-size", "512", "--out", str(out), "--control")
    assert done.returncode == 0, done.stderr
    done = command("eval", str(out), "--tokens", "1024")
    assert done.returncode == 0 and "kl_with_errors" in done.stdout, done.stderr
    assert (out / "eval.json").exists()
    two = [str(out / f"blocks.{i}.mlp") for i in (1, 2)]
    again = command("eval", *two, "--tokens", "1024")
    assert again.stdout == done.stdout  # the controls in the folder were left out


def test_one_cross_layer_transcoder_is_measured_as_it_replaces(model: Model) -> None:
    """Errors of early layers reach what later ones read, by itself as beside others."""
    clt = saekit.create("clt", d_in=256, n_layers=4, n_features=256, selection="jumprelu", seed=1)
    clt.reads = tuple(f"blocks.{i}.mlp:in" for i in range(4))
    clt.writes = tuple(f"blocks.{i}.mlp:out" for i in range(4))
    options = {"tokens": 1024, "context": 64, "batch_rows": 4}
    alone, beside = saekit.evaluate(clt, model, **options), saekit.evaluate([clt], model, **options)
    assert alone["kl"].value == pytest.approx(beside["kl"].value, rel=1e-4)
    assert alone["ce_recovered"].value == pytest.approx(beside["ce_recovered"].value, rel=1e-3)
    assert alone["l0"].control["random"] > 0  # k is shared out among the layers, whatever was measured


def test_a_pass_of_a_cross_layer_transcoder_encodes_each_layer_once(
    model: Model, tokens: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clt = saekit.create("clt", d_in=256, n_layers=4, n_features=256, k=16)
    clt.reads = tuple(f"blocks.{i}.mlp:in" for i in range(4))
    clt.writes = tuple(f"blocks.{i}.mlp:out" for i in range(4))
    x = torch.randn(5, 4 * 256)
    codes = [clt.encode_layer(i, part) for i, part in enumerate(x.split(256, 1))]
    written = torch.cat([clt.decode_layer(i, codes[: i + 1]) for i in range(4)], 1)
    torch.testing.assert_close(written, clt(x))
    calls: list[int] = []
    own = type(clt.parts[0]).encode
    monkeypatch.setattr(type(clt.parts[0]), "encode", lambda part, x: calls.append(len(x)) or own(part, x))
    with Replacement(model, [clt]).spliced():
        logits(model, tokens)
    assert calls == [tokens.numel()] * 4


def test_text_goes_on_within_a_replacement_that_looks_back(model: Model) -> None:
    """No cached keys and values: what a Lorsa reads is the whole sequence, at every new token."""
    prompt = "def add(a, b):\n    return"
    own = model.generate(prompt, 8)
    with Replacement(model, [exact(model, layer) for layer in range(4)]).spliced():
        assert model.generate(prompt, 8) == own
        with pytest.raises(SaekitError, match=r"cached keys and values.*use_cache=False"):
            model.generate(prompt, 4, use_cache=True)
        padded = torch.tensor([[0, 0, 5, 6]])
        with pytest.raises(SaekitError, match=r"padding before text.*pad on the right"):
            model({"input_ids": padded, "attention_mask": (padded > 0).long()})
        model({"input_ids": padded.flip(1), "attention_mask": (padded.flip(1) > 0).long()})
    assert model.generate(prompt, 8) == own


def test_what_does_not_fit_the_model_is_refused(model: Model, tokens: torch.Tensor) -> None:
    d = saekit.create("transcoder", d_in=256, d_out=128, n_features=64, k=4)
    d.reads, d.writes = d.wiring.sites(["blocks.1.mlp"])
    with Replacement(model, [d]).spliced(), pytest.raises(SaekitError, match=r"128 columns.*has 256"):
        logits(model, tokens)
