"""Codebooks: the nearest codes add themselves, heads have their own, and a model learns to live with them."""

import copy

import pytest
import torch

import saekit
from saekit.hooks import intervene
from saekit.models import load_model
from saekit.replacement import Replacement
from saekit.trainers.finetune import finetune
from saekit.types import SaekitError


def make(**options) -> saekit.Dictionary:
    return saekit.create("codebook", **{"d_in": 16, "n_features": 32, "k": 2, **options})


def test_it_is_the_sum_of_the_nearest_codes(planted_rows: torch.Tensor) -> None:
    d = make()
    d.prepare(planted_rows)
    x = d.norm_in(planted_rows.clone())
    codes = d.W_dec.detach()
    nearest = (x @ torch.nn.functional.normalize(codes, dim=1).T).topk(2).indices
    expected = d.norm_out.invert(codes[nearest].sum(1) + d.b_dec)
    torch.testing.assert_close(d(planted_rows), expected, rtol=1e-4, atol=1e-4)
    assert (d.encode(planted_rows).values == 1).all()


def test_groups_are_codebooks_of_their_own_columns(planted_rows: torch.Tensor) -> None:
    d = make(groups=2, k=1)
    saekit.train(d, planted_rows, 20, 256, lr=1e-3)
    indices, _ = d.encode(planted_rows).rectangular()
    assert (indices[:, 0] < 16).all() and (indices[:, 1] >= 16).all()
    assert d.W_dec[:16, 8:].abs().max() == 0 and d.W_dec[16:, :8].abs().max() == 0
    for options, words in (
        ({"groups": 3}, "groups = 3 does not divide"),
        ({"groups": 2, "k": 17}, "k = 17 must"),
    ):
        with pytest.raises(SaekitError, match=words):
            make(**options)


def test_training_lowers_the_error(planted_rows: torch.Tensor) -> None:
    d = make(n_features=128)
    d.prepare(planted_rows)
    before = saekit.metrics.fvu(planted_rows, d(planted_rows).detach())
    saekit.train(d, planted_rows, 300, 256, lr=3e-3)
    assert saekit.metrics.fvu(planted_rows, d(planted_rows).detach()) < 0.8 * before


@pytest.fixture
def replacement(tiny_gpt2) -> Replacement:
    """Codebooks at the heads and the MLP of the second block of a model of its own."""
    model = load_model(copy.deepcopy(tiny_gpt2.module), tokenizer=tiny_gpt2.tokenizer)
    points = {"blocks.1.attn.c_proj:in": 4, "blocks.1.mlp:out": 1}
    ds = [saekit.create("codebook", d_in=32, n_features=64, k=1, groups=groups) for groups in points.values()]
    for d, point in zip(ds, points, strict=True):
        d.reads = d.writes = (point,)
    return Replacement(model, ds)


def test_gradients_pass_straight_through(replacement: Replacement) -> None:
    """Below the codebooks the model gets the gradient that their output gets, and codes get theirs."""
    model = replacement.model
    tokens = torch.randint(1, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    given = model.inputs(tokens, torch.ones_like(tokens, dtype=torch.bool))
    for d in replacement.dictionaries:
        d.prepared.fill_(True)
    left: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []

    def keep(y: torch.Tensor) -> None:
        y.retain_grad()
        seen.append(y)

    own = model.site("blocks.0.mlp")
    with intervene([(own, keep)]), replacement.spliced(straight_through=left), intervene([(own, keep)]):
        model.logits(given).square().mean().backward()
    before, behind = seen  # of the codebook
    assert behind.grad.abs().sum() > 0
    torch.testing.assert_close(before.grad, behind.grad, rtol=0, atol=0)
    assert len(left) == 2 and all(share > 0 for share in left)
    assert model.site("blocks.0.mlp").module.c_fc.weight.grad.abs().sum() > 0
    for d in replacement.dictionaries:
        assert d.atoms.weight.grad.abs().sum() > 0
    plain = model.site("blocks.0.mlp").module.c_fc.weight.grad.clone()
    model.module.zero_grad()
    with replacement.spliced():  # without it nothing comes through the codes but by the residual stream
        model.logits(given).square().mean().backward()
    assert not torch.allclose(plain, model.site("blocks.0.mlp").module.c_fc.weight.grad)


def test_a_model_learns_to_live_with_them(replacement: Replacement) -> None:
    texts = ["the quick brown fox jumps over the lazy dog " * 8] * 16
    stream = saekit.harvest(
        replacement.model, texts, replacement.points, tokens=None, context=32, split="all"
    )
    seen: list[dict[str, float]] = []
    finetune(replacement, stream, 30, batch_size=4, lr=3e-3, on_step=lambda _, r: seen.append(r))
    assert seen[-1]["ce"] < 0.7 * seen[0]["ce"] and len(seen) == 30
    for steps in (1, 2, 10):
        finetune(replacement, stream, steps, batch_size=4)
    with pytest.raises(SaekitError, match="steps = 0"):
        finetune(replacement, stream, 0)
    with pytest.raises(SaekitError, match=r"warmup = 2\.0 lie in 0\.\.1"):
        finetune(replacement, stream, 1, warmup=2.0)


def test_a_fresh_threshold_is_trained_before_a_model_is(replacement: Replacement) -> None:
    d = saekit.create("batchtopk", d_in=replacement.dictionaries[0].d_in, n_features=64, k=4)
    d.reads = d.writes = ("blocks.0.mlp:out",)
    whole = Replacement(replacement.model, d)
    stream = saekit.harvest(replacement.model, "stdlib", ["blocks.0.mlp:out"], tokens=2000, context=32)
    with pytest.raises(SaekitError, match=r"learns its threshold from batches of rows.*train\(\) it before"):
        finetune(whole, stream, 1, batch_size=4)


def test_a_stream_that_does_not_fit_is_refused(replacement: Replacement, small_store) -> None:
    stream = saekit.harvest(replacement.model, ["some text " * 40], replacement.points[:1], context=32)
    with pytest.raises(SaekitError, match=r"lacks 'blocks\.1\.mlp:out', a hook point of the replacement"):
        finetune(replacement, stream, 1)
    for given, name in ((small_store, "Store"), (str(small_store.path), "str")):
        with pytest.raises(SaekitError, match=f"stream is of type {name}, .* give a live stream"):
            finetune(replacement, given, 1)
