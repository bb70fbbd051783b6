"""The record between formats: what it states is what its dictionary computes, folded, kept and given back."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import saekit
from saekit.dictionaries import PRESETS, create
from saekit.dictionaries.parts import constant
from saekit.dictionaries.selection import SELECTIONS
from saekit.dictionaries.start import warm_start
from saekit.dictionaries.training import TrainState
from saekit.hub.record import Record, about, from_dictionary, refuse_unless, to_dictionary

D, OUT, F, K, ROWS = 8, 6, 24, 4, 64


def inputs(seed: int = 0, d: int = D) -> Tensor:
    """Rows whose mean is 3 standard deviations off 0, so that a bias in the wrong place shows."""
    g = torch.Generator().manual_seed(seed)
    side = torch.randint(0, 2, (d,), generator=g) * 2.0 - 1
    return 3 * side + torch.randn(ROWS, d, generator=g)


def a_record(selection: str = "relu", wiring: str = "autoencoder", seed: int = 0, **changes: Any) -> Record:
    """Random weights; what a selection needs beside them comes by itself."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) * (D**-0.5 if len(shape) == 2 else 0.3)

    out = D if wiring == "autoencoder" else OUT
    fields: dict[str, Any] = {"encoder": drawn(F, D), "atoms": drawn(F, out) * (0.5 + torch.rand(F, 1, generator=g)), "b_enc": drawn(F), "b_dec": drawn(out)}  # fmt: skip
    if selection in ("topk", "abstopk", "groupmax", "omp", "codebook"):
        fields["options"] = {"k": K}
    if selection == "pursuit":
        fields["options"] = {"k": K, "residual": 0.5, "until_repeat": True}
    if selection in ("pursuit", "omp", "codebook"):
        unit = torch.nn.functional.normalize(fields["atoms"], dim=1)
        fields |= {"atoms": unit, "encoder": unit, "tied": True, "b_enc": torch.zeros(F)}
    if selection in ("jumprelu", "batchtopk"):
        fields["threshold"] = drawn(F).abs() + 0.3
    if selection == "gated":
        fields["state"] = {"r": drawn(F), "b_mag": drawn(F)}
    if selection in ("abstopk", "omp", "codebook"):
        fields["relu"] = "none"
    return Record(**fields | {"selection": selection, "wiring": wiring} | changes)


def stated(record: Record, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (dense) and output by the record's own words, in fp64 and with nothing folded."""
    r = dataclasses.replace(record, **{k: v.double() for k, v in record.tensors().items() if "." not in k})
    x = x.double()
    mean, size, eps = torch.zeros(len(x), 1).double(), torch.ones(len(x), 1).double(), 0.0
    if r.per_row == "row_std":
        mean, size, eps = x.mean(1, keepdim=True), x.std(1, keepdim=True), 1e-5
    if r.per_row == "row_norm":
        size = x.norm(dim=1, keepdim=True) / D**0.5
    u = (x - mean) / (size + eps) * r.scale_in - (0 if r.pre_bias is None else r.pre_bias)
    pre = u @ r.encoder.T + r.b_enc
    norms = r.atoms.norm(dim=1)
    factor = norms if r.domain == "norm" else torch.ones(F).double()
    atoms = r.atoms
    if r.selection in ("topk", "abstopk", "groupmax"):
        compared = pre * factor
        if r.relu == "before":
            compared = compared.relu()
        key = compared.abs() if r.selection == "abstopk" else compared
        if r.selection == "groupmax":
            at = key.unflatten(1, (K, -1)).argmax(2) + torch.arange(K) * (F // K)
        else:
            at = key.topk(K, dim=1).indices
        codes = torch.zeros_like(pre).scatter(1, at, compared.gather(1, at))
        codes = codes.relu() if r.relu == "after" else codes
        atoms = r.atoms / factor[:, None]
    elif r.threshold is not None:
        passes = pre.relu() * factor > r.threshold if r.relu == "before" else pre * factor > r.threshold
        codes = (pre if r.relu == "none" else pre.relu()) * passes
    elif r.selection == "gated":
        inner = (u @ r.encoder.T) * r.state["r"].double().exp() + r.state["b_mag"].double()
        codes = inner.relu() * (pre > 0)
    elif r.selection == "pursuit":
        codes = pursued(u, r)
    else:
        codes = pre.relu()
    y = (codes @ atoms + r.b_dec) / r.scale_out
    y = y * size + mean if r.wiring == "autoencoder" else y
    return codes, y if r.skip is None else y + x @ r.skip.T


def pursued(u: Tensor, r: Record) -> Tensor:
    """Row by row, as SAELens' loop reads."""
    codes = torch.zeros(len(u), F).double()
    for row, left in enumerate(u.clone()):
        for _ in range(r.options["k"]):
            at = int((left @ r.encoder.T).relu().argmax())
            value = (left @ r.encoder[at]).relu()
            new = value > 0 and codes[row, at] == 0
            codes[row, at] += value
            left = left - value * r.encoder[at]
            if (r.options["until_repeat"] and not new) or left.norm() < r.options["residual"]:
                break
    return codes


def agree(d: saekit.Dictionary, x: Tensor, codes: Tensor, y: Tensor, tolerance: float = 1e-5) -> None:
    """The same codes and output to a relative tolerance, and the same supports."""
    found = d.encode(x)
    dense = found.to_dense().double()
    assert torch.equal(dense != 0, codes != 0)
    assert (dense - codes).abs().max() <= tolerance * codes.abs().max()
    assert (d.decode(found, x) - y).abs().max() <= tolerance * y.abs().max()
    assert (codes != 0).sum() > len(x)  # there is something to agree on


BIAS = {"pre_bias": torch.linspace(-2, 2, D)}
SAME = {"scale_in": 0.37, "scale_out": 0.37}
CASES: dict[str, Record] = {
    f"{name}-{wiring}": a_record(name, wiring)
    for name, wiring in itertools.product(("relu", "topk", "abstopk", "groupmax", "jumprelu", "batchtopk", "gated"), ("autoencoder", "transcoder"))
} | {
    f"{name}, all folds{row}": a_record(name, **BIAS, **SAME, per_row=row or "none")
    for name, row in itertools.product(("relu", "topk", "jumprelu", "gated", "pursuit"), ("", "row_std", "row_norm"))
} | {
    "pursuit": a_record("pursuit"),
    "pursuit with a bias": a_record("pursuit", **BIAS),
    "ranked by norms": a_record("topk", domain="norm", **BIAS),
    "ranked by magnitude and norms": a_record("abstopk", domain="norm"),
    "groups by norms": a_record("groupmax", domain="norm"),
    "thresholds on norms": a_record("jumprelu", domain="norm", **BIAS, **SAME),
    "ReLU on norms": a_record("relu", domain="norm"),
    "linear": a_record("topk", relu="none", options={"k": 20}),
    "ReLU first": a_record("topk", relu="before", options={"k": 20}),
    "thresholds below 0": a_record("jumprelu", threshold=torch.linspace(-1, 1, F)),
    "thresholds below 0, ReLU first": a_record("jumprelu", relu="before", threshold=torch.linspace(-1, 1, F)),
    "linear thresholds": a_record("jumprelu", relu="none", threshold=torch.linspace(-1, 1, F)),
    "other scales": a_record("jumprelu", "transcoder", scale_in=0.5, scale_out=7.0, domain="norm"),
    "skip": a_record("topk", "transcoder", skip=torch.randn(OUT, D, generator=torch.Generator().manual_seed(3)), **BIAS),
    "skip of raw rows": a_record("relu", "transcoder", skip=torch.ones(OUT, D), per_row="row_std", scale_in=2.0),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_dictionary_computes_what_the_record_states(name: str) -> None:
    record, x = CASES[name], inputs(1)
    if name in ("linear", "ReLU first"):
        record = dataclasses.replace(record, options={"k": K})
    agree(to_dictionary(record), x, *stated(record, x))


@pytest.mark.parametrize("name", CASES)
def test_a_record_comes_back_from_its_dictionary(name: str) -> None:
    x = inputs(2)
    d = to_dictionary(dataclasses.replace(CASES[name], reads=("a",), writes=("b",), card={"x": 1}))
    back = from_dictionary(d, "some")
    assert (back.wiring, back.per_row, back.reads, back.writes) == (CASES[name].wiring, CASES[name].per_row, ("a",), ("b",))  # fmt: skip
    assert back.card == {"x": 1}
    codes = d.encode(x)
    agree(to_dictionary(back), x, codes.to_dense().double(), d.decode(codes, x).double())


def fitted(name: str, **options: Any) -> saekit.Dictionary:
    """A dictionary of a preset with a normalisation, and with thresholds off 0 where it has some."""
    wide = (
        {"d_in": D, "n_features": F, "atoms": "unit_norm"}
        if name == "batchtopk"
        else {"d_in": D, "n_features": F}
    )
    k = {"k": K} if hasattr(SELECTIONS[PRESETS[name]["selection"]].Config, "k") or name in NEEDS_K else {}
    d = create(name, **{**wide, **k, **options})
    x = inputs(5)
    d.prepare(torch.cat([x, x], 1) if d.wiring.columns == 2 * D else x)
    with torch.no_grad():
        for key, value in d.selection.named_buffers():
            if key == "threshold":
                value.fill_(0.4)
    return d


NEEDS_K = ("topk", "k_sparse", "abstopk", "groupmax", "batchtopk", "matryoshka", "hierarchical_topk", "matching_pursuit", "omp", "codebook", "transcoder", "skip_transcoder", "archetypal", "frozen", "random")  # fmt: skip
STATED = ("relu", "topk", "k_sparse", "abstopk", "groupmax", "batchtopk", "jumprelu", "gated", "matryoshka", "matching_pursuit", "omp", "codebook", "transcoder", "skip_transcoder", "frozen", "random")  # fmt: skip


@pytest.mark.parametrize("normalise", ["scale", "centre", "none", "row_std", "row_norm"])
@pytest.mark.parametrize("name", STATED)
def test_a_record_states_what_presets_compute(name: str, normalise: str) -> None:
    d, x = fitted(name, normalise=normalise), inputs(6)
    codes = d.encode(x)
    record = from_dictionary(d, "some")
    back = to_dictionary(record)
    again = back.encode(x)
    torch.testing.assert_close(
        again.to_dense(), codes.to_dense(), rtol=0, atol=1e-5 * float(codes.values.detach().abs().max())
    )
    hat = d.decode(codes, x)
    torch.testing.assert_close(
        back.decode(again, x), hat, rtol=0, atol=1e-5 * float(hat.detach().abs().max())
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "atoms the other way round": ({"atoms": torch.zeros(D, F)}, r"atoms has shape \(8, 24\).*n_features"),
    "a short bias": ({"b_enc": torch.zeros(F - 1)}, r"b_enc has shape \(23,\).*\(24,\)"),
    "a pre-bias of the output": ({"wiring": "transcoder", "pre_bias": torch.zeros(OUT)}, "pre_bias has shape"),
    "whole numbers": ({"b_dec": torch.zeros(D).int()}, "b_dec is torch.int32"),
    "NaN": ({"b_dec": torch.full((D,), torch.nan)}, "b_dec holds NaN"),
    "a selection of no name": ({"selection": "topq"}, "selection 'topq' is unknown; did you mean 'topk'"),
    "a domain of no name": ({"domain": "post"}, "domain 'post' is unknown"),
    "no threshold": ({"selection": "jumprelu"}, "'jumprelu' needs a threshold"),
    "a threshold too many": ({"threshold": torch.zeros(F)}, "'relu' has no threshold"),
    "two widths of one space": ({"atoms": torch.zeros(F, OUT), "b_dec": torch.zeros(OUT)}, "an autoencoder reads 8 columns and writes 6"),
    "two scales of one space": ({"scale_in": 2.0}, "scale_in = 2.0 and scale_out = 1.0"),
    "a scale of 0": ({"scale_in": 0.0, "scale_out": 0.0}, "scale_in = 0.0 must be a factor above 0"),
    "a skip within one space": ({"skip": torch.zeros(D, D)}, "skip is given"),
    "signs under a ReLU": ({"selection": "abstopk", "options": {"k": K}}, "'abstopk' has no ReLU"),
    "a ReLU without itself": ({"relu": "none"}, "'relu' always has its ReLU"),
    "norms of a gate": ({"selection": "gated", "domain": "norm"}, "isn't compared by its atoms' norms"),
    "experts": ({"selection": "switch", "options": {"k": K}}, "'switch' sends rows to experts"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_record_that_means_nothing_is_refused(case: str) -> None:
    changes, said = REFUSED[case]
    with pytest.raises(saekit.SaekitError, match=said):
        dataclasses.replace(a_record(), **changes)


def test_options_that_a_selection_does_not_have_are_refused() -> None:
    with pytest.raises(
        saekit.SaekitError, match="option 'kay' is not one of selection 'topk'; did you mean 'k'"
    ):
        to_dictionary(a_record("topk", options={"k": K, "kay": 2}))


def several(name: str) -> saekit.Dictionary:
    """A dictionary that a record can't state."""
    if name == "crosscoder":
        return create(name, d_in=[D, D], n_features=F, k=K)
    if name == "switch":
        return create(name, d_in=D, n_features=F, k=2, experts=4)
    if name == "whitened pursuit":
        return create("matching_pursuit", d_in=D, n_features=F, k=K, normalise="whiten")
    return create(name, d_in=D, n_features=F, k=K, **({"n_layers": 2} if name == "clt" else {"ranks": (2,)}))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("crosscoder", "wiring 'crosscoder' is more than one place"),
        ("clt", "wiring 'cross_layer' is more than one place"),
        ("molt", "wiring 'molt' is more than one place"),
        ("switch", "'switch' sends rows to experts"),
        ("whitened pursuit", "whitened space"),
    ],
)
def test_dictionaries_that_a_record_can_not_state_are_refused(name: str, said: str) -> None:
    with pytest.raises(saekit.SaekitError, match=said):
        from_dictionary(several(name), "some")


@pytest.mark.parametrize(
    ("record", "knows", "said"),
    [
        (a_record("topk"), {"selections": ("relu", "jumprelu")}, "no selection 'topk'.*--thresholds"),
        (a_record("abstopk"), {"selections": ("relu", "jumprelu")}, "no selection 'abstopk'.*choose another format"),
        (a_record("topk", relu="none"), {"selections": ("topk",)}, "sets negative codes to 0"),
        (a_record(wiring="transcoder"), {"selections": ("relu",), "wirings": ("autoencoder",)}, "no wiring 'transcoder'"),
        (a_record(per_row="row_std"), {"selections": ("relu",), "per_row": ("none", "row_norm")}, "can't say normalise = 'row_std'"),
        (a_record(wiring="transcoder", skip=torch.ones(OUT, D)), {"selections": ("relu",), "skip": False}, "no skip"),
    ],
)  # fmt: skip
def test_what_a_format_can_not_say_is_refused_with_the_reason(record: Record, knows: Any, said: str) -> None:
    with pytest.raises(saekit.SaekitError, match=f"format 'some'.*{said}|{said}"):
        refuse_unless(record, "some", **knows)


def test_what_was_folded_is_on_the_card() -> None:
    card = about("some", "bfloat16", model="gpt2", context=128, metadata={"n": 1}, missing=("the text",))
    d = to_dictionary(a_record("topk", card=card, domain="norm", **BIAS, **SAME))
    imported = d.card["imported"]
    assert [word for told in imported["folded"] for word in ("norms", "taken off", "input's scale", "output's scale") if word in told] == ["norms", "taken off", "input's scale", "output's scale"]  # fmt: skip
    assert (imported["dtype"], imported["missing"], d.card["data"]) == ("bfloat16", ["the text"], {"model": {"name": "gpt2"}, "context": 128})  # fmt: skip
    assert to_dictionary(a_record(card=card)).card["imported"]["folded"] == []
    assert card["imported"]["folded"] == []  # the record's own is as it was


# normalisation by each row's own statistics


@pytest.mark.parametrize("kind", ["row_std", "row_norm"])
@pytest.mark.parametrize("wiring", ["autoencoder", "transcoder"])
def test_codes_and_outputs_of_rows_with_units_of_their_own_are_sums(kind: str, wiring: str) -> None:
    """``value = w x + b`` of each code, and what codes write adds up to the output."""
    x = inputs(7)
    d = to_dictionary(a_record("topk", wiring, per_row=kind, **BIAS))
    codes = d.encode(x)
    weight, bias = d.read_by(codes, x)
    read = (weight * x[codes.row_ids()]).sum(1) + bias
    torch.testing.assert_close(read, codes.values.detach(), rtol=0, atol=2e-5)
    written = torch.zeros(ROWS, d.d_out).index_add(0, codes.row_ids(), d.written_by(codes, x))
    rest = d(x) - d.decode(codes.scale(torch.zeros(F)), x)
    torch.testing.assert_close(written, rest, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["row_std", "row_norm"])
def test_each_row_is_its_own_scale(kind: str) -> None:
    """An autoencoder of rows with their own units gives a scaled row's codes again, and its output scaled."""
    x = inputs(8)
    d = to_dictionary(a_record("topk", per_row=kind))
    torch.testing.assert_close(d.encode(7 * x).to_dense(), d.encode(x).to_dense(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(d(7 * x), 7 * d(x), rtol=1e-4, atol=1e-3)


def test_rows_with_units_of_their_own_are_trained(tmp_path: Any) -> None:
    """A training makes the loss fall, and the dictionary is itself after folding and after saving."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 5, generator=g).relu() @ torch.randn(5, D, generator=g) * torch.rand(2048, 1, generator=g).mul(3).exp()  # fmt: skip
    d = create("topk", d_in=D, n_features=F, k=2, normalise="row_std", seed=1)
    first = float(d.loss(x, TrainState()).fvu)
    trainer = saekit.Trainer(d, lr=1e-2)
    for _ in range(60):
        trainer.step(x)
    assert float(d.loss(x, TrainState()).fvu) < 0.5 * first
    saekit.save(d, tmp_path / "d")
    for other in (d.to_inference(), saekit.load(tmp_path / "d")):
        torch.testing.assert_close(other(x), d(x), rtol=1e-4, atol=1e-4)


def test_what_rows_with_units_of_their_own_lack_is_said(tmp_path: Any) -> None:
    d, x = to_dictionary(a_record("topk", per_row="row_std")), inputs(9)
    with pytest.raises(saekit.SaekitError, match="x is not given, and normalise = 'row_std'"):
        d.decode(d.encode(x))
    with pytest.raises(saekit.SaekitError, match="gives each row units of its own"):
        constant(d)
    other = create("topk", d_in=D, n_features=F, k=K)
    with pytest.raises(saekit.SaekitError, match="one goes by each row's own statistics"):
        warm_start(other, d)
    with pytest.raises(saekit.SaekitError, match="normalise 'row_std' is unknown"):
        create("crosscoder", d_in=[D, D], n_features=F, k=K, normalise="row_std")
    begun = create("topk", d_in=D, n_features=F, k=K, normalise="row_std", atoms="free")
    warm_start(begun, d)
    torch.testing.assert_close(begun(x), d(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("residual", [0.0, 0.9, 4.0])
@pytest.mark.parametrize("until_repeat", [False, True])
def test_a_pursuit_stops_where_it_is_told(residual: float, until_repeat: bool) -> None:
    options = {"k": 12, "residual": residual, "until_repeat": until_repeat}
    record, x = a_record("pursuit", options=options), inputs(10)
    codes, y = stated(record, x)
    agree(to_dictionary(record), x, codes, y, 1e-4)
    if residual == 4.0:
        assert float((codes != 0).sum(1).double().mean()) < 5  # it does stop
