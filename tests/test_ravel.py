"""Disentanglement of attributes: what swapping an entity's features changes, and what it must leave."""

import json
from pathlib import Path

import pytest
import torch

import saekit
from saekit.evaluate import ravel
from saekit.evaluate.core import Report
from saekit.evaluate.labelled import Texts
from saekit.models import Model
from saekit.testbed.facts import ATTRIBUTES, POINT, VALUES, Facts, facts
from saekit.types import SaekitError


@pytest.fixture(scope="module")
def world() -> Facts:
    return facts(0)


def texts_of(lines: list[dict[str, str]]) -> Texts:
    names = [name for name in lines[0] if name != "text"]
    return Texts(
        "facts", [line["text"] for line in lines], {name: [line[name] for line in lines] for name in names}
    )


def model_of(world: Facts) -> Model:
    return saekit.load_model(world.model, tokenizer=world.tokenizer)


@pytest.fixture(scope="module", params=["of_values", "of_entities"])
def asked(world: Facts, request: pytest.FixtureRequest) -> tuple[str, Report]:
    d = getattr(world, request.param)()
    return request.param, ravel.disentanglement(d, model_of(world), texts_of(world.lines()), "a1")


def test_features_of_values_disentangle_and_features_of_entities_do_not(asked: tuple[str, Report]) -> None:
    kind, report = asked
    assert report.about["known"] == 1 and set(report.about["each"]) == {"a1"}
    score = float(report["disentanglement"])
    if kind == "of_values":
        assert score >= 0.98
        assert all(one["cause"] > 0.95 < one["isolation"] for one in report.about["each"].values())
    else:
        assert score <= 0.6
    assert report["disentanglement"].control["random"] <= 0.6


def test_all_at_once_changes_everything(asked: tuple[str, Report]) -> None:
    _, report = asked
    assert report["cause"].control[ravel.WHOLE] == 1 and report["isolation"].control[ravel.WHOLE] == 0
    both = (float(report["cause"]) + float(report["isolation"])) / 2
    assert float(report["disentanglement"]) == pytest.approx(both)
    for measure in report.values():
        assert measure.interval is not None
        assert 0 <= measure.interval[0] <= float(measure) <= measure.interval[1] <= 1


def test_what_is_swapped_is_the_other_prompt_s(world: Facts) -> None:
    """With every feature swapped and no error the logits are the other prompt's, and with none the prompt's own."""
    d, model = world.of_entities(), model_of(world)
    prompts, site = ravel._known(d, model, texts_of(world.lines()))
    change = ravel._changes(d, prompts, d.W_dec)
    pairs, _ = ravel._pairs(prompts, "a1", ["a0", "a1", "a2"], 0)
    own = {
        name: model.logits(model.inputs(prompts.tokens[rows], prompts.attention[rows]))[
            torch.arange(len(rows)), prompts.last[rows]
        ]
        for name, rows in (("base", pairs.base), ("source", pairs.source))
    }
    for share, name in ((0.0, "base"), (1.0, "source")):
        mask = torch.full((len(change[1]),), share)
        assert torch.allclose(ravel._swapped(model, site, prompts, change, pairs, mask), own[name], atol=1e-3)
    assert all(prompts.asked[b] == prompts.asked[s] for b, s in zip(pairs.base, pairs.source, strict=True))
    assert (prompts.answers[pairs.base] != prompts.answers[pairs.source]).all()
    assert all((prompts.asked[b] == "a1") == c for b, c in zip(pairs.base, pairs.cause, strict=True))


def test_masks_are_judged_on_other_entities(world: Facts) -> None:
    d = world.of_values()
    prompts, _ = ravel._known(d, model_of(world), texts_of(world.lines()))
    fitted, judged = ravel._pairs(prompts, "a0", ["a0", "a1", "a2"], 0)
    sides = [{prompts.entities[i] for i in torch.cat([p.base, p.source]).tolist()} for p in (fitted, judged)]
    assert not sides[0] & sides[1] and len(sides[0]) == 28 and len(sides[1]) == 12


def test_the_entity_s_last_token_is_found_in_real_tokens(code_lm: Model) -> None:
    text = "# the import of collections.OrderedDict comes from"
    place, length, answer = ravel._places(code_lm, text, "collections.OrderedDict", " the")
    ids = code_lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert length == len(ids) and code_lm.tokenizer.decode([answer]) == " the"
    assert code_lm.tokenizer.decode(ids[: place + 1]).endswith("Dict")
    assert not code_lm.tokenizer.decode(ids[:place]).endswith("Dict")


def test_a_model_that_does_not_know_is_left_out(world: Facts) -> None:
    lines = world.lines()
    for line in lines[:30]:
        line["answer"] = " e0"  # never told
    report = ravel.disentanglement(world.of_values(), model_of(world), texts_of(lines), "a2", controls=False)
    assert report.about["known"] == pytest.approx(1 - 30 / len(lines))
    assert report["cause"].control == {} and report.about["each"].keys() == {"a2"}


def test_bad_input_is_refused(world: Facts, code_lm: Model) -> None:
    lines, d, model = world.lines(), world.of_values(), model_of(world)
    wrong = [{**line, "answer": " e0"} for line in lines]
    absent = [{**lines[0], "entity": "paris"}, *lines[1:]]
    merged = [{**lines[0], "answer": ""}, *lines[1:]]
    bare = [{"text": line["text"], "entity": line["entity"], "asked": line["asked"]} for line in lines]
    one = [line for line in lines if line["asked"] == "a0"]
    few = [line for line in lines if line["entity"] in ("e0", "e1")]
    for given, said in (
        (wrong, "answers none of the 120 prompts rightly"),
        (absent, "does not hold its entity 'paris'"),
        (merged, "begins with no token of its own"),
        (bare, "lack 'answer'"),
        (one, "attribute 'a0' can't be told from others"),
        (few, "have no two answers among 1 entities"),
    ):
        with pytest.raises(SaekitError, match=said):
            ravel.disentanglement(d, model, texts_of(given))
    with pytest.raises(
        SaekitError, match="attribute 'a9' can't be told from others: known prompts ask for a0, a1, a2"
    ):
        ravel.disentanglement(d, model, texts_of(lines), "a9")
    with pytest.raises(SaekitError, match="predicts no tokens of a tokenizer"):
        ravel.disentanglement(d, saekit.load_model(torch.nn.Identity(), name="plain"), texts_of(lines))
    clt = saekit.create("transcoder", d_in=8, n_features=16, k=2)
    clt.reads, clt.writes = (POINT,), ("other",)
    with pytest.raises(SaekitError, match=r"dictionaries of one hook point|is not in model"):
        ravel.disentanglement(clt, model, texts_of(lines))


def test_it_is_run_from_files(world: Facts, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text("\n".join(map(json.dumps, world.lines())))
    from saekit.evaluate.labelled import read_texts

    report = ravel.disentanglement(world.of_values(), model_of(world), read_texts(file), controls=False)
    swapped = report.about["each"]
    assert len(swapped) == ATTRIBUTES and all(
        one["cause"] > 0.9 < one["isolation"] for one in swapped.values()
    )
    assert world.of_values().n_features == ATTRIBUTES * VALUES
    report.save(tmp_path)
    assert json.loads((tmp_path / "eval_ravel.json").read_text())["about"]["attribute"] == "a0, a1, a2"
