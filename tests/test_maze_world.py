"""Whether features are facts of a world: AUROCs by ranks, attention gathered, features held for each text, and mazes changed."""

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import saekit
from saekit.analyses.world_models import aurocs, choose, continued, gathered, held
from saekit.dictionaries import Dictionary
from saekit.hooks import capture
from saekit.interventions import Edit, intervened
from saekit.models import Model, load_model
from saekit.testbed import solver as solvers
from saekit.testbed.lattice import Lattice, changes
from saekit.testbed.solver import LATTICE, solver
from saekit.testbed.transformer import Transformer, TransformerConfig
from saekit.types import Codes, SaekitError

POINT = "blocks.0.hook_resid_post"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(rows: int = 60, features: int = 7, negative: bool = False) -> Tensor:
    """Codes of few values, so that many tie, most of them at 0; one feature is dead."""
    dense = (2 * torch.randn(rows, features, generator=generator())).round() / 2
    dense = dense if negative else dense.clamp(min=0)
    dense[:, -1] = 0
    return dense


@pytest.mark.parametrize("negative", [False, True])
def test_aurocs_are_those_of_scikit_learn(negative: bool) -> None:
    from sklearn.metrics import roc_auc_score

    dense = drawn(negative=negative)
    labels = torch.rand(60, 4, generator=generator(1)) < torch.tensor([0.05, 0.3, 0.5, 0.9])
    found = aurocs(Codes.from_dense(dense), labels)
    assert found.shape == (7, 4)
    for feature, label in torch.cartesian_prod(torch.arange(7), torch.arange(4)).tolist():
        expected = roc_auc_score(labels[:, label].numpy(), dense[:, feature].numpy())
        assert found[feature, label].item() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(found[-1], torch.full((4,), 0.5).double())  # a dead feature tells nothing


def test_aurocs_keep_their_order_and_turn_with_the_labels() -> None:
    codes = Codes.from_dense(drawn())
    labels = torch.rand(60, 3, generator=generator(1)) < 0.4
    found = aurocs(codes, labels)
    assert torch.equal(found, aurocs(codes.with_values(codes.values**3), labels))
    assert torch.allclose(aurocs(codes, ~labels), 1 - found)
    # entries that a selection keeps and that are 0 don't count, whatever their order
    stored = Codes.from_rectangular(torch.arange(7).flip(0).repeat(60, 1), drawn().flip(1), 7)
    assert torch.equal(found, aurocs(stored, labels))


def test_features_that_are_facts_tell_them_all() -> None:
    world = Lattice(4, moved=3)
    rng = random.Random(0)
    passages = [p for _ in range(60) for p in world.draw(rng)[0]]
    numbers = torch.tensor([world.edges.index((min(p), max(p))) for p in passages])
    labels = torch.nn.functional.one_hot(numbers, len(world.edges)).bool()
    own = torch.randperm(len(world.edges), generator=generator())
    strong = 1 + torch.rand(len(numbers), 1, generator=generator(1))
    codes = Codes.from_rectangular(own[numbers][:, None], strong, 40)
    facts = choose(codes, labels, 2)
    assert torch.equal(facts.features[:, 0], own) and (facts.auroc[:, 0] == 1).all()
    assert (facts.auroc[:, 1] == 0.5).all() and (facts.mean[:, 1] == 0).all()
    for j in range(len(own)):
        assert facts.mean[j, 0].item() == pytest.approx(strong[numbers == j].mean().item(), rel=1e-5)
    other = Codes.from_rectangular(torch.randint(40, (len(numbers), 1), generator=generator(2)), strong, 40)
    assert choose(other, labels).auroc.max() < 0.8


def test_attention_is_gathered_from_where_it_is() -> None:
    seq, heads = 12, 3
    patterns = torch.zeros(2, heads, seq, seq)
    at = torch.arange(seq)
    for head in range(heads):
        patterns[:, head, at, (at - head).clamp(min=0)] = 1
    queries = torch.tensor([5, 9])
    assert gathered(patterns, queries, [0, 1, 2]).equal(torch.eye(3))
    even = torch.ones(1, 1, seq, seq).tril() / (at + 1)[:, None]
    assert torch.allclose(gathered(even, queries, [1, 3]), torch.full((1, 2), (1 / 6 + 1 / 10) / 2))


CONFIG = TransformerConfig(vocabulary=9, context=16, d_model=16, n_layers=2, n_heads=2, d_head=8, d_mlp=32)


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(Transformer(CONFIG).eval(), name="toy")


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    d = saekit.create("topk", d_in=16, n_features=24, k=5, seed=1)
    d.reads = d.writes = (POINT,)
    return d


def logits(model: Model, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.logits(model.inputs(tokens, torch.ones_like(tokens, dtype=torch.bool)))


TOKENS = torch.randint(9, (4, 10), generator=generator(3))
FEATURES, PLACES = torch.randint(24, (4, 3), generator=generator(4)), torch.tensor([[2, 7], [0, 1], [9, 4], [3, 8]])  # fmt: skip
VALUES = 3 * torch.rand(4, 3, generator=generator(5))


def test_features_are_held_as_by_an_edit_of_each_text(model: Model, dictionary: Dictionary) -> None:
    features = torch.stack([torch.randperm(24, generator=generator(i))[:3] for i in range(4)])
    with held(model, dictionary, features, PLACES, VALUES):
        found = logits(model, TOKENS)
    plain = logits(model, TOKENS)
    for i in range(4):
        edits = [
            Edit(f, position=at, set=v)
            for at in PLACES[i].tolist()
            for f, v in zip(features[i].tolist(), VALUES[i].tolist(), strict=True)
        ]
        with intervened(model, [(dictionary, edits)]):
            expected = logits(model, TOKENS[i : i + 1])
        assert torch.allclose(found[i : i + 1], expected, atol=1e-5)
        assert not torch.allclose(plain[i : i + 1], expected, atol=1e-2)
    assert torch.equal(plain, logits(model, TOKENS))  # nothing stays behind


def test_holding_features_where_they_are_changes_nothing(model: Model, dictionary: Dictionary) -> None:
    x = capture(lambda: logits(model, TOKENS), {"x": model.site(POINT)}, stop=False)["x"]
    place = torch.tensor([[2], [0], [9], [3]])
    codes = dictionary.encode(x[torch.arange(4)[:, None], place])
    own = codes.to_dense()[:, 0].detach()
    off = own.argmin(1, keepdim=True)  # inactive, and held at strength 0
    for features in (own.topk(3, 1).indices, off, off.expand(4, 2).contiguous()):
        with held(model, dictionary, features, place, own.gather(1, features)):
            assert torch.allclose(logits(model, TOKENS), logits_of(model), atol=1e-5)


def logits_of(model: Model) -> Tensor:
    """Of a copy that has no hooks."""
    other = Transformer(CONFIG)
    other.load_state_dict(model.module.state_dict())
    with torch.no_grad():
        return other.eval()(TOKENS)


def test_a_feature_named_twice_is_held_at_the_mean(model: Model, dictionary: Dictionary) -> None:
    twice = FEATURES[:, :1].expand(4, 2).contiguous()
    with held(model, dictionary, twice, PLACES, VALUES[:, :2]):
        found = logits(model, TOKENS)
    with held(model, dictionary, FEATURES[:, :1], PLACES, VALUES[:, :2].mean(1, keepdim=True)):
        assert torch.allclose(found, logits(model, TOKENS), atol=1e-5)


def test_what_is_said_is_the_most_probable_until_the_end(model: Model) -> None:
    prompts = TOKENS[:, :6]
    tokens = prompts
    for _ in range(5):
        tokens = torch.cat([tokens, logits(model, tokens)[:, -1].argmax(-1)[:, None]], 1)
    plain = tokens[:, 6:]
    end = int(plain[0, 2])
    said = continued(model, prompts, end, 5)
    for row, expected in zip(said.tolist(), plain.tolist(), strict=True):
        stop = expected.index(end) if end in expected else 5
        assert row == expected[:stop] + [end] * (5 - stop)


def checked(world: Lattice, add: bool) -> None:
    for one in changes(world, 40, random.Random(1), add):
        passages, begin, end = one.maze
        told = [frozenset(p) for p in passages]
        assert world.shortest(passages, begin, end) == [one.before] and one.before != one.after
        for passage, at, way in ((one.passage, one.at, one.after), (one.other, one.other_at, one.before)):
            assert (frozenset(passage) in told) is not add
            if add:
                assert told[at] not in {frozenset(s) for w in (one.before, one.after) for s in pairwise(w)}
                left = [*passages, passage]
            else:
                assert told[at] == frozenset(passage)
                left = [p for i, p in enumerate(passages) if i != at]
            assert world.shortest(left, begin, end) == [way]


@pytest.mark.parametrize("add", [True, False])
def test_one_passage_more_or_less_makes_another_path_the_only_shortest(add: bool) -> None:
    checked(LATTICE, add)


def test_paths_are_shortest_and_passages_are_not_implied() -> None:
    world, rng = Lattice(3, moved=2), random.Random(0)
    mazes = [world.draw(rng) for _ in range(200)]
    prompts = world.prompts(mazes, rng)
    unreached = ties = 0
    for (passages, begin, end), row in zip(mazes, prompts.tokens.tolist(), strict=True):
        assert len({frozenset(p) for p in passages}) == world.passages
        assert all(max(p) - min(p) in (1, 3) and b in world.beside[a] for p in passages for a, b in [p])
        away = {end: 0}  # by relaxing, not by search
        for _ in range(world.cells):
            for a, b in [*passages, *(p[::-1] for p in passages)]:
                away[b] = min(away.get(b, 99), away.get(a, 99) + 1)
        way = [*row, world.words[-1]][world.asked :]
        way = way[: way.index(world.words[-1])]
        assert way[0] == begin and way[-1] == end and len(way) == away[begin] + 1
        assert way in world.shortest(passages, begin, end)
        unreached += any(steps >= 99 for steps in away.values())
        ties += len(world.shortest(passages, begin, end)) > 1
    assert unreached and ties and (prompts.allowed.sum(-1) > 1).any()


def test_a_solver_is_the_same_for_its_seed_and_is_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    first, again, other = (solver(seed, steps=3).module.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    solver(0, tmp_path, steps=3)
    monkeypatch.setattr(solvers, "_learn", lambda *_: pytest.fail("learnt again"))
    kept = solver(0, tmp_path, steps=3).module.state_dict()
    assert all(torch.equal(first[name], kept[name]) for name in first)


CODES, LABELS = Codes.from_dense(drawn()), torch.arange(60)[:, None] % 3 == torch.arange(3)
EVERY = torch.ones(1, 1, 6, 6).tril()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: aurocs(CODES, LABELS[:59]), "labels are of 59 rows, and codes of 60"),
        (lambda: aurocs(CODES, torch.zeros_like(LABELS)), "label 0 is true of 0 of 60 rows"),
        (lambda: choose(CODES, LABELS | (torch.arange(3) == 1)), "label 1 is true of 60 of 60 rows"),
        (lambda: aurocs(CODES.with_values(CODES.values / 0), LABELS), "NaN or infinity"),
        (lambda: choose(CODES, LABELS, 8), "some = 8 must lie in 1..7"),
        (lambda: gathered(EVERY, torch.tensor([1, 4]), [3]), "leave out the first 3 positions"),
        (lambda: gathered(EVERY, torch.tensor([6]), [1]), "must stay within the 6 tokens"),
        (lambda: gathered(EVERY, torch.tensor([4]), []), "one or more of each"),
        (lambda: Lattice(1), "side = 1 has no passages"),
        (lambda: Lattice(3, moved=5), r"moved = 5 must lie in 0\.\.4"),
        (lambda: changes(Lattice(3), 2, random.Random(0), False), "give 0 of 2 mazes .* one passage less"),
        (lambda: changes(Lattice(2), 2, random.Random(0), True), "give 0 of 2 mazes .* one passage more"),
        (lambda: solver(0, steps=0), "steps = 0 learn nothing"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call: Any, said: str) -> None:
    with pytest.raises(SaekitError, match=said):
        call()


@pytest.mark.parametrize(
    ("features", "places", "values", "said"),
    [
        (FEATURES + 24, PLACES, VALUES, r"must lie in 0\.\.23"),
        (FEATURES, PLACES - 5, VALUES, "counted from the beginning"),
        (FEATURES, PLACES, VALUES / 0, "NaN or infinity"),
        (FEATURES[:, :0], PLACES, VALUES[:, :0], "one or more for each text"),
        (FEATURES, PLACES + 1, VALUES, r"runs on 4 texts of 10 tokens, .* up to position 10"),
        (FEATURES[:3], PLACES[:3], VALUES[:3], "features are held in 3 texts"),
    ],
)
def test_edits_that_name_nothing_are_refused(
    model: Model, dictionary: Dictionary, features: Tensor, places: Tensor, values: Tensor, said: str
) -> None:
    with pytest.raises(SaekitError, match=said), held(model, dictionary, features, places, values):
        logits(model, TOKENS)


def test_a_dictionary_of_two_places_is_refused(model: Model) -> None:
    d = saekit.create("transcoder", d_in=16, d_out=16, n_features=24, k=5)
    d.reads, d.writes = ("blocks.0.mlp:in",), ("blocks.0.mlp:out",)
    with pytest.raises(SaekitError, match="one and the same hook point"), held(model, d, FEATURES, PLACES, VALUES):  # fmt: skip
        pass


def test_no_tokens_are_no_continuation(model: Model) -> None:
    with pytest.raises(SaekitError, match="limit = 0"):
        continued(model, TOKENS, 0, 0)
