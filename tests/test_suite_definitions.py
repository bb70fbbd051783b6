"""Suites of labelled texts against their definitions, computed at length, and against labels that say nothing."""

from dataclasses import replace

import pytest
import torch
from test_labelled_suites import small

from saekit.evaluate import SUITES, unlearning
from saekit.evaluate.labelled import Labelled, Texts, atoms_of, balanced, halves
from saekit.evaluate.probing import KS, told
from saekit.evaluate.scr_tpp import (
    ABLATED,
    ablated,
    perturbed,
    scr_measures,
    strongest,
    targeted_effects,
    tpp_measures,
)
from saekit.models import Model, load_model
from saekit.probes import linear
from saekit.testbed.facts import facts
from saekit.testbed.labelled import classes
from saekit.types import SaekitError


def of_classes(rows: int = 1200, seed: int = 3) -> tuple[Labelled, list[torch.Tensor], torch.Tensor]:
    world = classes(rows, seed)
    codes = world.dictionary.encode(world.x).detach()
    return (
        Labelled(world.dictionary, world.x, codes),
        list(world.labels),
        atoms_of(world.dictionary, "tpp").detach(),
    )


def test_tpp_is_what_a_probe_loses_less_what_the_others_lose() -> None:
    one, labels, atoms = of_classes()
    sets = [[balanced(own, rows, 0) for rows in halves(own, 0)] for own in labels]
    probes = [linear(one.x[train], own[train], seed=0) for own, (train, _) in zip(labels, sets, strict=True)]
    judged = [one.at(test) for _, test in sets]

    def accuracy(j: int, x: torch.Tensor) -> float:
        return ((probes[j](x) > 0) == labels[j][sets[j][1]]).double().mean().item()

    found = tpp_measures({"": perturbed(one, atoms, labels, 0)}, 0)
    n = len(labels)
    for k in ABLATED[:3]:
        by_hand = 0.0
        for i, own in enumerate(labels):
            fitted = one.at(sets[i][0])
            effect = targeted_effects(fitted.codes, own[sets[i][0]], atoms, probes[i].weight)
            features = strongest(effect, k)
            for j, of in enumerate(judged):
                lost = accuracy(j, of.x) - accuracy(j, ablated(of.x, of.codes, atoms, features))
                by_hand += lost / n if i == j else -lost / (n * (n - 1))
        assert float(found[f"tpp_{k}"]) == pytest.approx(by_hand, abs=1e-9)
        low, high = found[f"tpp_{k}"].interval or (1.0, 0.0)
        assert 0.3 < low <= by_hand <= high


def test_a_loss_of_other_probes_counts_against_it() -> None:
    """The first class's features cost its own probe all of 4 texts, and the other's one of 2."""
    both, none = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    lost = {str(k): [both.repeat(4, 1), torch.cat([both, none])] for k in ABLATED}
    assert float(tpp_measures({"": lost}, 0)["tpp_2"]) == pytest.approx((1.0 - 0.5) / 2)


def test_drawn_features_perturb_no_class_in_particular() -> None:
    one, labels, atoms = of_classes()
    drawn = tpp_measures({"": perturbed(one, atoms, labels, 0, drawn=True)}, 0)
    for k in ("2", "5"):
        assert abs(float(drawn[f"tpp_{k}"])) < 0.06


def test_the_direction_of_the_worse_biased_probe_counts() -> None:
    def hits(right: int) -> torch.Tensor:
        return torch.arange(10) < right

    ways = [
        {"clean": hits(10), "biased": hits(6), **{str(k): hits(8) for k in ABLATED}},
        {"clean": hits(10), "biased": hits(3), **{str(k): hits(10) for k in ABLATED}},
    ]
    for order in (ways, ways[::-1]):
        assert float(scr_measures({"": order}, 0)["scr_5"]) == pytest.approx(1.0)
    even = [ways[0], {**ways[1], "biased": hits(6)}]
    assert float(scr_measures({"": even}, 0)["scr_5"]) == pytest.approx((0.5 + 1.0) / 2)
    assert float(scr_measures({"": ways}, 0)["scr_dir1_5"]) == pytest.approx(0.5)


def test_directions_that_tie_both_count_in_the_interval() -> None:
    g = torch.Generator().manual_seed(0)
    biased = torch.rand(200, generator=g) < 0.5
    clean, other = torch.ones(200, dtype=torch.bool), biased[torch.randperm(200, generator=g)]
    ways = [{"clean": clean, "biased": own, **{str(k): changed for k in ABLATED}} for own, changed in ((biased, biased), (other, clean))]  # fmt: skip
    found = scr_measures({"": ways}, 0)["scr_5"]
    assert float(found) == 0.5 and found.interval == (0.5, 0.5)


def test_a_bias_that_costs_nothing_is_told() -> None:
    hits = {key: torch.arange(10) < 6 for key in ("clean", "biased", *map(str, ABLATED))}
    with pytest.warns(UserWarning, match="on 10 texts the biased probe is as accurate as the clean one"):
        assert float(scr_measures({"": [hits, hits]}, 0)["scr_5"]) == 0


def test_labels_that_say_nothing_are_not_told() -> None:
    """Judged on the texts that they are fitted to, probes of so many features would be right about all of them."""
    one, _, _ = of_classes(240)
    g = torch.Generator().manual_seed(0)
    accuracies = []
    for seed in range(3):
        labels = torch.rand(240, generator=g) < 0.5
        found = told(one, labels, seed)
        assert {len(hit) for hit in found.values()} == {len(balanced(labels, halves(labels, seed)[1], seed))}
        accuracies += [found[f"{side}_{k}"].double().mean() for side in ("features", "coordinates") for k in (*KS, "all")]  # fmt: skip
    assert 0.35 < torch.stack(accuracies).mean() < 0.65


def test_a_value_that_no_probe_reads_is_not_asked_about(code_lm: Model) -> None:
    g = torch.Generator().manual_seed(1)
    texts = [f"import module{i}\nx = {i}" if i % 2 else f"class Part{i}:\n    pass" for i in range(90)]
    drawn = [str(v) for v in torch.randint(3, (90,), generator=g).tolist()]
    d = small(code_lm)
    with pytest.raises(SaekitError, match="has no value whose probe reads it well"):
        SUITES["absorption"](d, code_lm, Texts("t", texts, {"drawn": drawn}), controls=False)
    kind = ["import" if i % 2 else "class" for i in range(90)]
    report = SUITES["absorption"](d, code_lm, Texts("t", texts, {"kind": kind}), controls=False)
    assert report.about["left_out"] == [] and set(report.about["each"]) == {"import", "class"}


def test_rare_features_come_first_by_how_often_they_fire_on_what_is_to_be_forgotten() -> None:
    codes = small_codes()
    rates = unlearning.Rates(
        forget=torch.tensor([0.3, 0.5, 0.2, 0.0, 0.4]),
        retain=torch.tensor([0.0, 0.5, unlearning.RARE, 0.0, 2 * unlearning.RARE]),
        active=torch.arange(1.0, 6.0),
        codes=codes,
    )
    assert rates.ranked() == [(0, 1.0), (2, 3.0)]
    assert {i for i, _ in rates.ranked(seed=0)} == {0, 2}
    assert replace(rates, retain=torch.ones(5)).ranked() == []


def small_codes():
    return of_classes(20)[0].codes


def test_the_feature_of_a_value_is_found_and_costs_other_entities_of_it_alone() -> None:
    """Features of entities can't forget a value: what is chosen by some entities says nothing of others."""
    world = facts(0, 120)
    lines, model = world.lines(), load_model(world.model, tokenizer=world.tokenizer)
    values = [str(world.values[int(line["entity"][1:]), 0].item()) for line in lines]
    told = [line["text"] + line["answer"] for line in lines]
    texts = Texts("facts", told, {"a0": values}, [line["entity"] for line in lines])
    for d, cost in ((world.of_values(), (1.0, float("inf"))), (world.of_entities(), (-1e-6, 1e-6))):
        report = SUITES["unlearning"](d, model, texts, "a0", value="2", controls=False)
        assert cost[0] <= float(report["forget"]) <= cost[1] and abs(float(report["retain"])) < 1e-6
    assert SUITES["unlearning"](world.of_values(), model, texts, value="2", controls=False).about["clamped"].keys() == {"2"}  # fmt: skip


@torch.no_grad()
def test_what_hurts_other_texts_as_well_is_not_clamped(code_lm: Model) -> None:
    d = small(code_lm)
    texts = ["import os\nimport sys\nimport re"] * 6 + ["def main(self):\n    return self.value"] * 6
    forget = torch.arange(12) < 6
    found = unlearning._rates(code_lm, d, Texts("t", texts, {}), torch.arange(12), forget)
    before = unlearning.losses(code_lm, d, texts, [])
    both = (found.forget * found.retain).argsort(descending=True)[:10]
    everywhere = [(int(i), float(found.active[i])) for i in both]
    assert (found.retain[both] > 0).all()
    assert unlearning._chosen(code_lm, d, texts, forget, everywhere, before, lambda: None) == []
    edits = unlearning._chosen(code_lm, d, texts, forget, found.ranked(), before, lambda: None)
    assert edits and all(edit.set is not None and edit.set < 0 and edit.when is not None for edit in edits)
    after = unlearning.losses(code_lm, d, texts, edits)
    assert after.mean(forget) > before.mean(forget)
    assert after.mean(~forget) <= (1 + unlearning.SPARED) * before.mean(~forget)
