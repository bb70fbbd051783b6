"""Laws of the metrics, on the pure functions and on the evaluation of a dictionary in a model."""

import copy
import math
import sys

import pytest
import torch

import saekit
from saekit import metrics
from saekit.dictionaries.rows import Rows
from saekit.evaluate import evaluate
from saekit.evaluate.core import UNITS, controls_for
from saekit.hooks import intervene
from saekit.models import load_model
from saekit.types import Codes, SaekitError

POINT = "blocks.1.hook_resid_post"


@pytest.fixture(params=[0.0, 3.0, 100.0], ids=lambda r: f"mean/std={r:g}")
def rows(request: pytest.FixtureRequest) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randn(500, 24, generator=g) * torch.rand(24, generator=g) + request.param


def test_the_mean_scores_0_and_the_identity_1(rows: torch.Tensor) -> None:
    mean = rows.double().mean(0).expand_as(rows)
    assert metrics.explained_variance(rows, mean) == pytest.approx(0, abs=1e-6)
    assert metrics.fvu(rows, mean) == pytest.approx(1, abs=1e-6)
    assert metrics.explained_variance(rows, rows) == 1
    assert metrics.cosine(rows, rows) == pytest.approx(1) and metrics.norm_ratio(
        rows, 0.5 * rows
    ) == pytest.approx(0.5)


def test_order_and_scale_do_not_matter(rows: torch.Tensor) -> None:
    hat = rows + 0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(1))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    base = metrics.fvu(rows, hat)
    assert metrics.fvu(rows[order], hat[order]) == pytest.approx(base, rel=1e-9)
    assert metrics.fvu(1024 * rows, 1024 * hat) == pytest.approx(base, rel=1e-9)
    assert metrics.mse(rows, hat) == pytest.approx((rows - hat).square().sum(-1).mean().item(), rel=1e-5)


def test_ce_and_kl_equal_their_definitions() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(7, 11, generator=g), torch.randn(7, 11, generator=g)
    target = torch.randint(11, (7,), generator=g)
    torch.testing.assert_close(
        metrics.cross_entropy(a, target), torch.nn.functional.cross_entropy(a, target, reduction="none")
    )
    expected = torch.nn.functional.kl_div(
        b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(metrics.kl(a, b), expected)
    assert (metrics.kl(a, b) > 0).all() and metrics.kl(a, a).abs().max() < 1e-6


def test_ce_recovered_is_1_without_loss_and_0_at_ablation() -> None:
    assert metrics.ce_recovered(2.0, 2.0, 8.0) == 1 and metrics.ce_recovered(2.0, 8.0, 8.0) == 0
    assert math.isnan(metrics.ce_recovered(2.0, 2.0, 2.0))


def test_density_and_dead_share() -> None:
    codes = Codes.from_dense(torch.tensor([[1.0, 0, 2], [0.5, 0, 0]]))
    assert metrics.density(codes).tolist() == [1.0, 0.0, 0.5]
    assert metrics.dead_share(metrics.density(codes)) == pytest.approx(1 / 3) and metrics.l0(codes) == 1.5


@pytest.fixture(scope="module")
def trained(tiny_gpt2, small_store) -> saekit.Dictionary:
    d = saekit.create("topk", d_in=32, n_features=128, k=8)
    saekit.train(d, small_store, 60, 256)
    return d


@pytest.fixture(scope="module")
def report(trained, tiny_gpt2):
    return evaluate(trained, tiny_gpt2, "stdlib", tokens=2048, context=64)


def test_every_key_has_n_unit_and_interval(report) -> None:
    assert set(report) == set(UNITS)
    for key, measure in report.items():
        assert measure.n > 1000 and measure.unit == UNITS[key]
        if key not in ("density", "dead_share"):
            low, high = measure.interval
            assert low <= float(measure) <= high
    assert len(report["density"].value) == 128
    assert float(report["explained_variance"]) == pytest.approx(1 - float(report["fvu"]))
    assert set(report["fvu"].control) == {"random", "random_omp"} and report.about["documents"] >= 3


def test_evaluation_equals_the_pure_functions(report, trained, tiny_gpt2) -> None:
    stream = saekit.harvest(
        tiny_gpt2, "stdlib", [POINT], tokens=2048, context=64, batch_rows=8, split="held_out"
    )
    rows = torch.cat([batch.rows(POINT) for batch in stream])
    with torch.no_grad():
        codes, hat = trained.encode(rows), trained(rows)
    assert report["fvu"].n == len(rows)
    for key, value in {
        "fvu": metrics.fvu(rows, hat), "cosine": metrics.cosine(rows, hat), "norm_ratio": metrics.norm_ratio(rows, hat),
        "l0": metrics.l0(codes), "dead_share": metrics.dead_share(metrics.density(codes)),
    }.items():  # fmt: skip
        assert float(report[key]) == pytest.approx(value, rel=1e-5), key


def test_controls_share_the_normalisation_and_the_l0() -> None:
    rows = torch.randn(500, 32, generator=torch.Generator().manual_seed(0)) + 30.0
    for name in ("topk", "relu"):
        d = saekit.create(name, d_in=32, n_features=128, k=4)
        d.set_normalisation(rows)
        controls = controls_for(d, d.encode(rows))
        assert set(controls) == {"random", "random_omp"}
        l0 = 4 if name == "topk" else metrics.l0(d.encode(rows))
        for control in controls.values():
            assert control.config.selection[1].k == round(l0)
            # about zero instead of the mean, the offset alone would cost all codes
            assert name == "relu" or metrics.fvu(rows, control(rows)) < 1


@pytest.mark.parametrize("batch_rows", [1, 3, 32])
def test_evaluation_does_not_depend_on_the_batch_size(batch_rows: int, report, trained, tiny_gpt2) -> None:
    other = evaluate(
        trained, tiny_gpt2, "stdlib", tokens=2048, context=64, batch_rows=batch_rows, controls=False
    )
    for key in set(UNITS) - {"density"}:
        assert float(other[key]) == pytest.approx(float(report[key]), rel=2e-5, abs=2e-5), key
        if report[key].interval:
            assert other[key].interval == pytest.approx(report[key].interval, rel=1e-3, abs=1e-4)


def test_more_documents_than_are_kept_apart(trained, tiny_gpt2, monkeypatch: pytest.MonkeyPatch) -> None:
    # by its module: saekit.evaluate is the function
    monkeypatch.setattr(sys.modules["saekit.evaluate.core"], "MAX_DOCUMENTS", 3)
    texts = [f"def f{i}(x):\n    return x + {i}\n" * 4 for i in range(40)]
    found = evaluate(trained, tiny_gpt2, texts, context=64, controls=False)
    assert found.about["documents"] == 40 and found["fvu"].interval and found["kl"].interval


class _Stub(Rows):
    """A dictionary whose reconstruction is a given function: for the laws of the evaluation itself."""

    def __init__(self, base: saekit.Dictionary, function) -> None:
        super().__init__(base.config, seed=0)
        self.reads, self.function = base.reads, function

    def decode(self, codes, x=None):
        return self.function(x)


def test_the_identity_loses_nothing_and_zero_is_the_ablation(trained, tiny_gpt2) -> None:
    same = evaluate(_Stub(trained, lambda x: x), tiny_gpt2, tokens=1024, context=64, controls=False)
    assert float(same["fvu"]) == 0 and float(same["kl"]) == pytest.approx(0, abs=1e-6)
    assert float(same["ce_spliced"]) == float(same["ce_original"]) and float(same["ce_recovered"]) == 1
    zero = evaluate(_Stub(trained, torch.zeros_like), tiny_gpt2, tokens=1024, context=64, controls=False)
    assert float(zero["ce_spliced"]) == float(zero["ce_ablated"]) and float(zero["ce_recovered"]) == 0


def test_mean_ablation_knows_the_mean_also_of_a_folded_dictionary(trained, tiny_gpt2) -> None:
    options = {"tokens": 1024, "context": 64, "controls": False, "ablation": "mean"}
    mine, folded = evaluate(trained, tiny_gpt2, **options), trained.to_inference()
    theirs = evaluate(folded, tiny_gpt2, **options)
    assert float(mine["ce_ablated"]) == pytest.approx(float(theirs["ce_ablated"]), abs=1e-6)
    again = folded.to_inference()  # what it keeps is no normalisation
    x = torch.randn(20, 32)
    assert torch.equal(again.encode(x).to_dense(), folded.encode(x).to_dense())
    folded.norm_out.mean.zero_()
    with pytest.raises(SaekitError, match="knows the mean of what it writes"):
        evaluate(folded, tiny_gpt2, **options)


def test_a_sink_of_1000_times_the_norm_moves_explained_variance_by_less_than_half_a_percent(
    trained, tiny_gpt2
) -> None:
    """A position that the model blows up, as attention sinks do, is masked and changes nothing."""
    clean = evaluate(trained, tiny_gpt2, tokens=2048, context=64, controls=False)

    def sink(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        out[:, ::16] *= 1000.0
        return out

    block = load_model(tiny_gpt2).site("blocks.1.hook_resid_post")
    with intervene([(block, sink)]):
        dirty = evaluate(trained, tiny_gpt2, tokens=2048, context=64, controls=False)
    assert dirty["fvu"].n < clean["fvu"].n
    assert float(dirty["explained_variance"]) == pytest.approx(float(clean["explained_variance"]), rel=0.005)


def test_a_model_without_logits_gets_the_measures_that_need_none(trained, tiny_gpt2) -> None:
    inner = load_model(tiny_gpt2.module.transformer, tokenizer=tiny_gpt2.tokenizer, name="no-head")
    found = evaluate(trained, inner, tokens=1024, context=64, hook_point=POINT, controls=False)
    assert "fvu" in found and "kl" not in found and "ce_recovered" not in found


def test_bad_choices(trained, tiny_gpt2) -> None:
    with pytest.raises(SaekitError, match="ablation 'noise'"):
        evaluate(trained, tiny_gpt2, tokens=64, ablation="noise")
    with pytest.raises(SaekitError, match="hook_point is not given"):
        evaluate(saekit.create("topk", d_in=32, n_features=64, k=4), tiny_gpt2)


def test_training_documents_are_not_called_held_out(tiny_gpt2, small_store) -> None:
    dictionary = saekit.create("topk", d_in=32, n_features=64, k=4)
    dictionary = saekit.train(dictionary, small_store, steps=1, batch_size=64).dictionary
    options = {"tokens": 64, "context": 64, "controls": False}
    for given, split in ((dictionary, "train"), (dictionary, "all"), ([dictionary], "train")):
        with pytest.warns(UserWarning, match="on the 'train' side of 'stdlib', .* not held out"):
            evaluate(given, tiny_gpt2, "stdlib", split=split, **options)
    evaluate(dictionary, tiny_gpt2, "stdlib", split="held_out", **options)
    report = evaluate(dictionary, tiny_gpt2, ["import os\n" * 90], tokens=64, context=64, controls=False)
    assert report.about["split"] == "all"


def test_activations_with_heads_arespliced(tiny_gpt2) -> None:
    """Replacing a site by itself changes nothing, whatever axes stand behind the positions."""
    from saekit.hooks import Site, intervene, spliced

    class Heads(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (4, 8))

    heads, x = Heads(), torch.randn(2, 5, 32)
    mask = torch.rand(2, 5) < 0.5
    with intervene([(Site(heads, "out", "heads"), spliced(mask, torch.zeros(2, 5, 32)))]):
        out = heads(x)
    assert torch.equal(out, torch.where(mask[..., None, None], 0, x.unflatten(-1, (4, 8))))


def test_a_model_that_gives_nan_is_named(tiny_gpt2) -> None:
    broken = copy.deepcopy(tiny_gpt2.module)
    broken.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
    dictionary = saekit.create("topk", d_in=32, n_features=64, k=4)
    dictionary.reads = dictionary.writes = ("blocks.1.hook_resid_post",)
    view = load_model(broken, tokenizer=tiny_gpt2.tokenizer, name="broken")
    with pytest.raises(SaekitError, match=r"of model 'broken' hold NaN or Inf"):
        evaluate(dictionary, view, "stdlib", tokens=64, context=64, controls=False)
