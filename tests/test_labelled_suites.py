"""Suites on texts of which something is said: probing, absorption, spurious correlations, targeted perturbations.

``SAEKIT_SAEBENCH`` names the python of an environment with sae-bench 0.6 for the test marked ``peer``.
"""

import json
import os
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import torch
from commandline import saekit as command
from safetensors.torch import load_file, save_file

import saekit
from saekit.evaluate import SUITES, labelled
from saekit.evaluate.absorption import Absorbed, Concept, absorbed, concept, measures, probed, splits
from saekit.evaluate.labelled import (
    CONTEXT,
    Labelled,
    Texts,
    atoms_of,
    balanced,
    gather,
    halves,
    read_texts,
)
from saekit.evaluate.measure import Resampler, by_source
from saekit.evaluate.probing import RANKER, _measure, _written
from saekit.evaluate.probing import told as probed_by
from saekit.evaluate.saebench_json import SHAPES, to_saebench, write_saebench
from saekit.evaluate.scr_tpp import (
    ablated,
    mended,
    removed,
    scr_measures,
    spurious_effects,
    strongest,
    targeted,
    targeted_effects,
)
from saekit.evaluate.unlearning import losses
from saekit.interventions import Edit, When
from saekit.models import Model
from saekit.probes import sparse
from saekit.testbed.facts import facts
from saekit.testbed.labelled import absorbing, spurious
from saekit.types import Codes, SaekitError


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(rows: int = 60, d: int = 6, n: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows, codes and atoms of which nothing is particular."""
    codes = torch.randn(rows, n, generator=g(seed)).relu() * (
        torch.rand(rows, n, generator=g(seed + 1)) < 0.5
    )
    atoms = torch.nn.functional.normalize(torch.randn(n, d, generator=g(seed + 2)), dim=1)
    noise = 0.3 * torch.randn(rows, d, generator=g(seed + 3))
    return {
        "x": codes @ atoms + noise, "codes": codes, "atoms": atoms, "direction": torch.randn(d, generator=g(seed + 4)),
        "labels": (torch.arange(rows) % 3 == 0).int(), "own": torch.tensor([1, 4]),
        "accuracies": torch.tensor([0.95, 0.6, 0.8]), "clean": torch.tensor([0.9, 0.8, 0.95]),
        "changed": torch.tensor([[0.5, 0.8, 0.9], [0.85, 0.6, 0.95], [0.9, 0.7, 0.55]]),
    }  # fmt: skip


def told(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same by saekit."""
    codes, labels = Codes.from_dense(given["codes"]), given["labels"].bool()
    found = absorbed(given["x"], codes, given["atoms"], given["direction"], given["own"].tolist())
    out = {"full": found.full, "fraction": found.fraction}
    for name, effects in (("scr", spurious_effects), ("tpp", targeted_effects)):
        e = effects(codes, labels, given["atoms"], given["direction"])
        chosen = strongest(e, 2)
        out[f"{name}.effects"] = e
        out[f"{name}.chosen"] = torch.zeros(len(e), dtype=torch.bool).index_fill(0, chosen, True)
        out[f"{name}.rows"] = ablated(given["x"], codes, given["atoms"], chosen)
    lengths = given["atoms"].norm(dim=1)
    probe = sparse(codes.with_values(codes.values * lengths[codes.indices.long()]), labels, 2, RANKER)
    assert probe.features is not None
    out["probing.chosen"] = torch.zeros(len(e), dtype=torch.bool).index_fill(0, probe.features, True)
    out["scr"] = torch.tensor(removed(*given["accuracies"].tolist()))
    lost = given["clean"] - given["changed"]  # of probes across, without features for classes down
    out["tpp"] = torch.from_numpy(targeted(lost.numpy()))
    return out


@pytest.mark.peer
@pytest.mark.parametrize("seed", range(3))
def test_formulas_are_saebench_s_own(seed: int, tmp_path: Path) -> None:
    given = drawn(seed=10 * seed)
    save_file(given, tmp_path / "given.safetensors")
    exports.run(
        "saebench_formulas",
        str(tmp_path / "given.safetensors"),
        tmp_path,
        python=os.environ["SAEKIT_SAEBENCH"],
    )
    theirs = load_file(tmp_path / "found.safetensors")
    mine = told(given)
    # with fewer effects above 0 than are ablated the peer fills up by features of none
    assert all((mine[f"{name}.effects"] > 0).sum() >= 2 for name in ("scr", "tpp"))
    assert mine.keys() == theirs.keys() and 0 < mine["full"].float().mean() < 1
    for name, value in mine.items():
        assert (value.double() - theirs[name].double()).abs().max() < 1e-6, name


def test_absorption_by_hand() -> None:
    atoms = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    codes = torch.tensor([
        [1.0, 0, 0, 0],  # its own feature says all
        [0, 1.0, 0, 0],  # another says all
        [0.5, 0.5, 0, 0],  # half and half
        [0, 0, 1.0, 0],  # nobody says it
        [0, 0.3, 1.0, 0],  # another, less than two fifths
        [0, 0, 0, 0],
    ])  # fmt: skip
    x = torch.tensor([[1.0, 0.0]]).expand(6, 2)
    found = absorbed(x, Codes.from_dense(codes), atoms, torch.tensor([7.0, 0.0]), [0])
    assert found.full.tolist() == [False, True, False, False, False, False]
    assert torch.allclose(found.fraction, torch.tensor([0.0, 1.0, 0.5, 0.0, 0.0, 0.0]))


def test_atoms_may_have_any_norm() -> None:
    given = drawn(seed=5)
    by = 0.3 + 3 * torch.rand(12, generator=g(9))
    scaled = told({**given, "codes": given["codes"] / by, "atoms": given["atoms"] * by[:, None]})
    for name, value in told(given).items():
        assert torch.allclose(value.float(), scaled[name].float(), atol=1e-5), name


def test_features_are_probed_by_what_they_write() -> None:
    d, codes = saekit.create("relu", d_in=6, n_features=12, atoms="free"), drawn()["codes"]
    by = 0.3 + 3 * torch.rand(12, generator=g(9))
    found = []
    for scale in (torch.ones(12), by):
        with torch.no_grad():
            d.atoms.weight.copy_(drawn()["atoms"] * scale[:, None])
        found.append(_written(Labelled(d, torch.zeros(60, 6), Codes.from_dense(codes / scale))).to_dense())
    assert all(torch.allclose(one, codes, atol=1e-5) for one in found)


def test_pooled_ablations_are_the_mean_of_ablated_tokens() -> None:
    given = drawn()
    codes, features = Codes.from_dense(given["codes"]), torch.tensor([0, 3, 7])
    tokens = ablated(given["x"], codes, given["atoms"], features)
    mean = Codes.from_dense(given["codes"].view(6, 10, 12).mean(1))
    pooled = ablated(given["x"].view(6, 10, 6).mean(1), mean, given["atoms"], features)
    assert torch.allclose(pooled, tokens.view(6, 10, 6).mean(1), atol=1e-6)


def test_shares_and_differences_of_accuracies() -> None:
    assert removed(0.9, 0.5, 0.9) == pytest.approx(1) and removed(0.9, 0.5, 0.5) == 0
    assert removed(0.7, 0.7, 0.9) == 0 == removed(0.6, 0.7, 0.9)
    # ablations for a class take its probe to chance, and leave the others
    assert targeted(np.diag([0.4, 0.3])) == pytest.approx([0.4, 0.3])
    assert targeted(np.array([[0.0, 0.4], [0.0, 0.0]])) == pytest.approx([-0.4, 0])  # another's is lost
    assert targeted(np.full((3, 3), 0.4)) == pytest.approx([0, 0, 0])  # of no class in particular


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_planted_absorption_is_found(rate: float) -> None:
    world = absorbing(rate, 3000, 1)
    one = Labelled(world.dictionary, world.x, world.dictionary.encode(world.x).detach())
    found = concept(one, atoms_of(world.dictionary, "absorption"), probed(world.x, world.labels[0], 1), 1)
    assert found.own == [0]
    assert found.absorbed.full.float().mean().item() == pytest.approx(rate, abs=0.08)


@pytest.mark.parametrize("entangled", [False, True])
def test_a_planted_bias_is_removed_where_it_can_be(entangled: bool) -> None:
    world = spurious(entangled, 4000, 2)
    one = Labelled(world.dictionary, world.x, world.dictionary.encode(world.x).detach())
    ways = mended(one, atoms_of(world.dictionary, "scr"), (world.labels[0], world.labels[1]), 0)
    found = scr_measures({"": ways}, 0)["scr_5"]
    assert float(found) <= 0.05 if entangled else float(found) >= 0.95
    assert found.interval is not None and found.interval[0] <= float(found) <= found.interval[1]


def test_features_of_the_other_value_are_none_of_a_concept_s() -> None:
    labels = torch.arange(200) % 2 == 0
    dense = torch.zeros(200, 5)
    dense[~labels, 0] = 1.0  # tells all, by its absence
    dense[labels, 3] = (torch.rand(100, generator=g()) < 0.7).float()
    codes = Codes.from_dense(dense)
    assert splits(codes, labels, (codes, labels)) == [3]


# texts


WORDS = {"l": "court judge law trial", "s": "wave ship sail storm"}


def file_of(folder: Path, n: int = 20) -> Path:
    lines = []
    for i in range(2 * n):
        topic = list(WORDS)[i % 2]
        own = WORDS[topic].split()
        lines.append(
            json.dumps(
                {"text": f"{own[i % 4]} {own[(i + 1) % 4]} x{i}", "topic": topic, "even": (i // 2) % 2 == 0}
            )
        )
    path = folder / "texts.jsonl"
    path.write_text("\n".join(lines))
    return path


def small(code_lm: Model) -> saekit.Dictionary:
    d = saekit.create("topk", d_in=256, n_features=64, k=8)
    d.reads = d.writes = ("blocks.1.hook_resid_post",)
    d.prepare(torch.randn(200, 256, generator=g()))
    return d


def test_what_is_gathered_is_the_mean_over_a_text_s_own_tokens(code_lm: Model) -> None:
    d, texts = small(code_lm), ["def main(self):", "x = 1", "import os, sys\nprint(os)"]
    for pool in ("mean", "last"):
        found = gather(d, code_lm, Texts("t", texts, {}), pool, controls=False)[""]
        for i, text in enumerate(texts):
            x = next(iter(saekit.harvest(code_lm, [text], list(d.reads), tokens=None, context=64))).rows(
                d.reads[0]
            )
            codes = d.encode(x).to_dense()
            mine = (x.mean(0), codes.mean(0)) if pool == "mean" else (x[-1], codes[-1])
            assert torch.allclose(found.x[i], mine[0], atol=1e-4)
            assert torch.allclose(found.codes.to_dense()[i], mine[1], atol=1e-4)


def question(suite: str, code_lm: Model, folder: Path) -> tuple[Any, ...]:
    """A dictionary, its model, texts, and what a suite is to ask about them."""
    if suite == "ravel":
        world = facts(0)
        (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, world.lines())))
        model = saekit.load_model(world.model, tokenizer=world.tokenizer)
        return world.of_values(), model, read_texts(folder / "texts.jsonl"), "a0"
    texts = read_texts(file_of(folder))
    return small(code_lm), code_lm, texts, *(("topic", "even") if suite == "scr" else ("topic",))


@pytest.mark.peer
@pytest.mark.parametrize("suite", SHAPES)
def test_results_are_of_saebench_s_schema(suite: str, code_lm: Model, tmp_path: Path) -> None:
    d, *asked = question(suite, code_lm, tmp_path)
    report = SUITES[suite](d, *asked)
    file = write_saebench(report, d, "mine", tmp_path / "out")
    exports.run("saebench_outputs", str(file), tmp_path, python=os.environ["SAEKIT_SAEBENCH"])


@pytest.mark.parametrize("suite", [name for name in SUITES if name != "core"])
def test_every_suite_gives_measures_with_controls(suite: str, code_lm: Model, tmp_path: Path) -> None:
    d, *asked = question(suite, code_lm, tmp_path)
    report = SUITES[suite](d, *asked)
    assert report.about["suite"] == suite and report.about["text"] == {"name": str(tmp_path / "texts.jsonl")}
    first = next(iter(report.values()))
    if suite in SHAPES:
        file = write_saebench(report, d, "mine", tmp_path / "out")
        data = json.loads(file.read_text())
        assert file.parent.name == data["eval_type_id"] and data["sae_lens_release_id"] == "mine"
        numbers = [v for category in data["eval_result_metrics"].values() for v in category.values()]
        spreads = {
            v for name, v in data["eval_result_metrics"].get("mean", {}).items() if name.startswith("std_dev")
        }
        known = [*spreads, *map(float, report.values())]
        assert numbers and all(min(abs(v - w) for w in known) < 1e-12 for v in numbers)
    else:
        with pytest.raises(SaekitError, match="has no place in SAEBench's results"):
            to_saebench(report, d, "mine")
    others = {"unlearning": "random features", "ravel": "coordinates"}
    beside = {"random", others.get(suite, "random_omp")}
    assert first.n > 0 and first.interval is not None and beside <= first.control.keys()


def test_losses_are_the_model_s_own_where_nothing_that_fires_is_edited(code_lm: Model) -> None:
    d, texts = small(code_lm), ["def main(self):\n    return self", "import os\nimport sys"]
    found = losses(code_lm, d, texts, [])
    for i, text in enumerate(texts):
        ids = code_lm.tokenizer(text, return_tensors="pt")["input_ids"]
        ids = torch.cat([torch.tensor([[code_lm.tokenizer.bos_token_id]]), ids], 1)
        with torch.no_grad():
            logits = code_lm.logits(code_lm.inputs(ids, torch.ones_like(ids)))[0]
        by_hand = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="sum")
        assert (
            found.nats[i].item() == pytest.approx(by_hand.item(), rel=1e-4)
            and found.tokens[i] == ids.shape[1] - 1
        )
    fires = _fires(code_lm, d, texts)
    silent, loud = int((~fires).nonzero()[0]), int(fires.nonzero()[0])
    same = losses(code_lm, d, texts, [Edit(silent, set=-9.0, when=When(silent))])
    assert torch.allclose(same.nats, found.nats, rtol=1e-5)
    assert not torch.allclose(losses(code_lm, d, texts, [Edit(loud, set=-90.0, when=When(loud))]).nats, found.nats, rtol=1e-2)  # fmt: skip


def test_the_first_tokens_of_long_texts_are_judged_alone(code_lm: Model) -> None:
    """Of one too long to be read at once too, which others stand behind."""
    d, texts = small(code_lm), ["import os\n" * 8000, "x = 1\n" * 60, "import sys\nimport os"]
    found = losses(code_lm, d, texts, [])
    assert found.tokens.tolist() == [
        CONTEXT - 1,
        CONTEXT - 1,
        losses(code_lm, d, texts[2:], []).tokens.item(),
    ]
    whole = gather(d, code_lm, Texts("t", texts, {}), controls=False)[""]
    assert len(whole.x) == 3


def _fires(model: Model, d: saekit.Dictionary, texts: list[str]) -> torch.Tensor:
    found = gather(d, model, Texts("t", texts, {}), controls=False)[""]
    return found.codes.firing_counts() > 0


def test_rows_are_drawn_within_classes() -> None:
    labels = torch.arange(100) % 4 == 0
    train, test = halves(labels, 0)
    assert sorted(torch.cat([train, test]).tolist()) == list(range(100)) and labels[train].sum() == 20
    some = balanced(labels, train, 0)
    assert labels[some].sum() == 20 == (~labels[some]).sum() and set(some.tolist()) <= set(train.tolist())


def test_pieces_of_a_document_are_on_one_side() -> None:
    sources = torch.arange(300) // 7  # 42 documents of 7 texts and one of 6
    labels = (sources % 3 == 0) ^ (torch.arange(300) % 11 == 0)  # some documents have both values
    for seed in range(3):
        train, test = halves(labels, seed, sources=sources)
        assert sorted(torch.cat([train, test]).tolist()) == list(range(300))
        assert not set(sources[train].tolist()) & set(sources[test].tolist())
        assert 0.7 < len(train) / 300 < 0.9 and labels[test].any() and not labels[test].all()
    few = halves(["a", "a", "b", "b"], 0, sources=torch.tensor([0, 1, 2, 3]))
    assert [len(side) for side in few] == [2, 2]  # one of each is left to judge on


def test_a_draw_takes_whole_documents() -> None:
    """Where all texts of a document are right or wrong together, what is said spreads as documents do."""
    g = torch.Generator().manual_seed(0)
    sources = torch.arange(400) // 20
    right = (torch.rand(20, generator=g) < 0.6)[sources]
    hits = {"": [{"features_1": right}]}
    alone, whole = (
        _measure("features_1", hits, [of], 0).interval or (0.0, 0.0) for of in (torch.arange(400), sources)
    )
    share, wide = right.double().mean().item(), whole[1] - whole[0]
    assert wide == pytest.approx(4 * (share * (1 - share) / 20) ** 0.5, rel=0.15)
    assert wide > 3 * (alone[1] - alone[0]) and whole[0] < share < whole[1]
    assert by_source(np.array([5, 2, 5]), np.array([[1.0], [2.0], [4.0]]))[0].tolist() == [[2.0], [5.0]]


def test_concepts_of_few_texts_count_as_much_and_add_no_noise() -> None:
    """All texts of one concept are absorbed and none of another's: whatever is drawn, half is."""
    sizes, share = (10, 1000), torch.tensor([1.0, 0.0])
    kinds = [Absorbed(torch.full((n,), bool(s)), torch.full((n,), s)) for n, s in zip(sizes, share.tolist(), strict=True)]  # fmt: skip
    found = measures({"": [Concept(one, [0]) for one in kinds]}, 0)["absorption_fraction"]
    assert float(found) == 0.5 and found.interval == (0.5, 0.5)


def test_pairs_of_few_documents_spread_as_documents_do() -> None:
    rng = np.random.default_rng(0)
    quality, ends = rng.normal(size=24), rng.integers(24, size=(2, 3000))
    value = quality[ends[0]]
    low, high = Resampler(24, 0).of_pairs(*ends).interval(lambda a, n: a / n, value, np.ones(3000)) or (0.0, 0.0)  # fmt: skip
    assert high - low == pytest.approx(4 * quality.std() / 24**0.5, rel=0.25)
    assert low < value.mean() < high


def test_built_in_texts(code_lm: Model) -> None:
    texts = labelled.families(20)
    assert len(set(texts.texts)) == len(texts.texts) and texts.documents is not None
    assert all(len(set(family)) == 1 for family in _by(texts.documents, texts.attributes["family"]))
    assert Texts("t", ["b", "a", "b"], {}).sources().tolist() == [0, 1, 0]
    assert len(texts.texts) == 20 * labelled.FAMILIES and len(texts.values("family")) == labelled.FAMILIES
    words = labelled.letters(code_lm)
    assert len(set(words.texts)) == len(words.texts) > 1000
    assert all(
        a.strip()[0].lower() == b for a, b in zip(words.texts, words.attributes["letter"], strict=True)
    )


def test_a_file_says_what_its_texts_are_pieces_of(tmp_path: Path) -> None:
    lines = [{"text": f"t{i}", "document": f"d{i // 2}", "topic": "x"} for i in range(4)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    texts = read_texts(tmp_path / "t.jsonl")
    assert texts.sources().tolist() == [0, 0, 1, 1] and list(texts.attributes) == ["topic"]


def _by(keys: list[str], values: list[str]) -> list[list[str]]:
    return [[v for k, v in zip(keys, values, strict=True) if k == key] for key in set(keys)]


MISTAKES = {
    "no JSON": ("nonsense", "line 1 of .* is no JSON"),
    "no attribute": ('{"text": "a"}', "must hold .*at least one attribute"),
    "only a document": ('{"text": "a", "document": "b"}', "must hold .*at least one attribute"),
    "other fields": ('{"text": "a", "b": 1}\n{"text": "a", "c": 1}', "line 2 of .* has fields"),
    "nothing": ("\n", "holds no line"),
    "null": ('{"text": "a", "b": null}', "line 1 of .* has None for 'b'"),
    "an object": ('{"text": "a", "b": {"c": 1}}', "line 1 of .* for 'b'; give a short string"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_files_that_say_nothing_are_refused(name: str, tmp_path: Path) -> None:
    content, said = MISTAKES[name]
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(SaekitError, match=said):
        read_texts(tmp_path / "t.jsonl")


def test_questions_that_cant_be_asked_are_refused(code_lm: Model) -> None:
    texts = Texts("t", ["a"] * 30, {"one": ["x"] * 30, "two": ["y"] * 15 + ["z"] * 15})
    d = small(code_lm)
    for call, said in (
        (lambda: SUITES["sparse_probing"](d, code_lm, texts), "texts have 2 attributes .one, two.; name the one"),
        (lambda: SUITES["tpp"](d, code_lm, texts, "one"), "attribute 'one' has 1 value of at least 10 texts"),
        (lambda: SUITES["tpp"](d, code_lm, texts, "tow"), "did you mean 'two'"),
        (lambda: SUITES["tpp"](d, code_lm, texts, "two", pool="max"), "pool 'max' is unknown"),
        (lambda: SUITES["unlearning"](d, code_lm, texts, "two", value="x"), "value 'x' of attribute 'two' is that of 0 of 30 texts"),
        (lambda: probed_by(Labelled(d, torch.zeros(40, 3), Codes.from_dense(torch.zeros(40, 8))), torch.arange(40) % 2 == 0, 0), "no feature fires on the 32 texts"),
        (lambda: gather(d, code_lm, Texts("t", ["a", ""], {}), controls=False), "text 1 has no token that counts"),
        (lambda: SUITES["scr"](d, code_lm, texts, "two", "two"), "spurious 'two' is the attribute that is asked about"),
        (lambda: SUITES["tpp"](d, code_lm, texts, "two", controls=False), "all texts of label .* are of one document"),
        (lambda: SUITES["unlearning"](d, code_lm, Texts("t", list("abcdefghijkl"), {"own": ["x"] * 3 + ["y"] * 9}), "own", value="x"), "is that of 3 of 12 texts; choose one that 10 or more have"),
        (lambda: absorbed(torch.zeros(1, 2), Codes.from_dense(torch.ones(1, 1)), torch.ones(1, 2), torch.ones(2), []), "own is empty"),
        (lambda: targeted(np.array([[0.4]])), "1 class is there"),
    ):  # fmt: skip
        with pytest.raises(SaekitError, match=said):
            call()
    clt = saekit.create("clt", d_in=8, n_layers=2, n_features=16, k=2)
    with pytest.raises(SaekitError, match="'cross_layer' writes otherwise; choose 'sparse_probing'"):
        atoms_of(clt, "tpp")
    with pytest.raises(SaekitError, match="'row_norm' scales each row by itself"):
        atoms_of(saekit.create("topk", d_in=8, n_features=16, k=2, normalise="row_norm"), "tpp")


def test_the_verb_writes_a_report_and_refuses_what_a_suite_does_not_ask_for(
    code_lm: Model, tmp_path: Path
) -> None:
    d = small(code_lm)
    d.card["data"] = {"model": {"name": "code-lm"}, "text": {"name": "stdlib"}}
    saekit.save(d, tmp_path / "run")
    texts = str(file_of(tmp_path))
    done = command("eval", str(tmp_path / "run"), "--suite", "sparse_probing", "--labels", texts, "--json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "run" / "eval_sparse_probing.json").read_text())
    assert written == json.loads(done.stdout) and written["about"]["attribute"] == "topic"
    for words, said in (
        (("--suite", "tpp", "--tokens", "100"), "--tokens 100 is nothing that suite 'tpp' asks for"),
        (("--suite", "tpp", "--hook-point", "x"), "--hook-point 'x' is nothing that suite 'tpp' asks for"),
        (("--suite", "core"), "texts.jsonl' is nothing that suite 'core' asks for"),
        (("--suite", "tpp", "--value", "l"), "--value 'l' is nothing that suite 'tpp' asks for"),
        (("--suite", "tppp", "--tokens", "5"), "did you mean 'tpp'"),
        (("--suite", "tpp", "--spurious", "even"), "--spurious 'even' is nothing that suite 'tpp' asks for"),
        (("--suite", "unlearning", "--saebench", "x"), "'unlearning' has no place in SAEBench's results"),
        (
            ("--suite", "absorption", "--attribute", "even", "--saebench", "x"),
            "is none; leave saebench out",
        ),
        (("--suite", "tpp", "--labels", "nowhere"), "labels 'nowhere' can't be read"),
    ):
        bad = command("eval", str(tmp_path / "run"), "--labels", texts, *words)
        assert bad.returncode == 2 and said in bad.stderr
