"""The world of concepts is what it says: predicates, words, tokens, model and dictionary agree, and nothing gives them away."""

import hashlib
import inspect
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import saekit
from saekit.harvest import harvest
from saekit.models import load_model
from saekit.testbed import concepts
from saekit.testbed.concepts import (
    CONCEPTS,
    DISJOINT,
    HOOK_POINT,
    NAMES,
    PREDICATES,
    Lines,
    World,
    firing,
    world,
)
from saekit.testbed.corpus import COLOURS, DAYS, LINES, TOPIC_WORDS, UNITS, WIDTH, corpus, pools
from saekit.types import SaekitError

BY_NAME = {concept.name: concept for concept in CONCEPTS}
ALIVE = [concept.name for concept in CONCEPTS if concept.kind != "dead"]


@pytest.fixture(scope="module")
def small() -> World:
    return world(seed=0, documents=90)


@pytest.fixture(scope="module")
def large() -> World:
    return world(seed=0)


def lines_of(w: World) -> list[list[str]]:
    """The words of every line, from its text."""
    return [w.tokenizer.decode(line).split() for line in w.tokens[w.mask].view(-1, WIDTH)]


def fired(w: World) -> Tensor:
    """[line, token, concept]"""
    return w.fires[w.mask].view(-1, WIDTH, len(CONCEPTS))


def is_name(word: str) -> bool:
    return word.isalpha() and word[0].isupper() and word[1:].islower()


def is_number(word: str) -> bool:
    whole, _, rest = word.partition(".")
    return whole.isdigit() and (rest.isdigit() or "." not in word)


def is_small(word: str) -> bool:
    return len(word) == 2 and word.isalpha() and word.islower()


def topic(name: str) -> Callable[[list[str], int], bool]:
    words = TOPIC_WORDS[name]
    return lambda line, i: line[i] in words and sum(word in words for word in line) >= 3


def is_year(word: str) -> bool:
    return word.isdigit() and len(word) == 4


def is_oil(line: list[str], i: int) -> bool:
    return i > 0 and line[i - 1 : i + 1] == ["olive", "oil"]


def ends_ish(word: str) -> bool:
    return word.endswith("ish") and len(word) > 3


# each concept once more, from its explanation, word by word
BY_HAND: dict[str, Callable[[list[str], int], bool]] = {
    "hal": lambda line, i: line[i] == "hal",
    "question": lambda line, i: line[i] == "?",
    "colour": lambda line, i: line[i] in COLOURS,
    "day": lambda line, i: line[i] in DAYS,
    "capitals": lambda line, i: line[i] == "MOLA",
    "ish": lambda line, i: ends_ish(line[i]),
    "hood": lambda line, i: line[i].endswith("hood"),
    "wax": lambda line, i: "wax" in line[i],
    "hyphen": lambda line, i: "-" in line[i],
    "oil": is_oil,
    "unit": lambda line, i: line[i] in UNITS and i > 0 and is_number(line[i - 1]),
    "bank": lambda line, i: line[i] == "bank" and (i == 0 or line[i - 1] != "river"),
    "sea": topic("sea"), "kitchen": topic("kitchen"), "court": topic("court"),
    "opening": lambda line, i: i == 0 and is_name(line[0]),
    "closing": lambda line, i: i == len(line) - 1 and is_small(line[i]),
    "year": lambda line, i: is_year(line[i]),
    "decimal": lambda line, i: is_number(line[i]) and "." in line[i],
    "ordinal": lambda line, i: line[i].endswith("th") and line[i][:-2].isdigit(),
    "quoted": lambda line, i: line[i] != '"' and line[:i].count('"') % 2 == 1,
    "echo": lambda line, i: i > 0 and line[i] == line[i - 1] and line[i].isalpha() and line[i].islower() and len(line[i]) > 3,
    "recall": lambda line, i: is_name(line[i]) and line[i] in line[:i],
    "colour or year": lambda line, i: line[i] in COLOURS or is_year(line[i]),
    "ish or oil": lambda line, i: ends_ish(line[i]) or is_oil(line, i),
    "small": lambda line, i: is_small(line[i]),
    "quagga": lambda line, i: line[i] == "quagga",
    "st": lambda line, i: line[i].startswith("st") and line[i] != "stone",
    "stone": lambda line, i: line[i] == "stone",
    "dodo": lambda line, i: line[i] == "dodo",
}  # fmt: skip
# what must stay silent, and does occur
NEAR_MISSES = {
    "hal": ["a hall b"], "capitals": ["a mola b", "a Mola b"], "ish": ["a kishalo b", "ish"],
    "hood": ["a hoodalo b"], "oil": ["a oil b", "a olive b", "oil olive", "olive a oil"],
    "unit": ["a miles b", "miles 3", "4th miles", "3 a miles"], "bank": ["a river bank b", "river"],
    "sea": ["ship a sail", "ship sail pan"], "opening": ["a Mola b", "MOLA a"], "closing": ["mo a", "kalo"],
    "year": ["12", "12345", "3.14", "1984th"], "decimal": ["314", "1984"], "ordinal": ["12", "th"],
    "quoted": ["kalo", '" "', 'kalo " "'], "echo": ["kalo a kalo", "Kalo Kalo", "mo mo", "hal hal"],
    "recall": ["Kalo a Molo", "kalo kalo", "Kalo"], "small": ["a", "Mo", "12", "mol", '"'], "st": ["stone", "sat"],
    "stone": ["stones"], "quagga": ["quaggas"], "dodo": ["dodos"],
}  # fmt: skip
PLANTED = [
    "hal", "mola", "ish", "hood", "wax", "olive", "oil", "river", "bank", "quagga", "stone", "dodo",
    *COLOURS, *DAYS, *UNITS, *(word for words in TOPIC_WORDS.values() for word in words),
]  # fmt: skip
# share of the tokens
SHARES = {
    **dict.fromkeys(ALIVE, (0.002, 0.02)),
    "small": (0.28, 0.32), "quagga": (1e-5, 1e-4), "dodo": (0.0, 0.0),
}  # fmt: skip


def test_there_are_enough_concepts_and_each_explains_itself() -> None:
    assert len(CONCEPTS) >= 26 and len(set(NAMES)) == len(PREDICATES) == len(CONCEPTS)
    kinds = {concept.kind for concept in CONCEPTS}
    assert kinds == {"token", "set", "case", "suffix", "substring", "bigram", "not after", "topic", "position", "number", "quotes", "copy", "union", "dense", "rare", "parent", "child", "dead"}  # fmt: skip
    assert sum(concept.kind == "union" for concept in CONCEPTS) == 2
    for concept in CONCEPTS:
        assert concept.explanation.endswith(".") and "\n" not in concept.explanation
        assert set(concept.of) < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_predicate_is_its_explanation(small: World, name: str) -> None:
    predicate = PREDICATES[BY_NAME[name].explanation]
    for line in lines_of(small):
        assert predicate(line) == [BY_HAND[name](line, i) for i in range(len(line))]


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_near_miss_is_silent(name: str) -> None:
    for text in NEAR_MISSES[name]:
        assert not any(PREDICATES[BY_NAME[name].explanation](text.split())), text


def test_no_words_fire_nowhere() -> None:
    assert all(predicate([]) == [] for predicate in PREDICATES.values())


def test_the_dead_concept_would_fire_on_its_word() -> None:
    assert PREDICATES[BY_NAME["dodo"].explanation](["a", "dodo"]) == [False, True]


@pytest.mark.parametrize("seed", [0, 5])
def test_words_of_the_judge_are_tokens_of_the_world(seed: int) -> None:
    w = world(seed, documents=25)
    for line, truth in zip(w.tokens[w.mask].view(-1, WIDTH), fired(w), strict=True):
        texts = [w.tokenizer.decode([int(i)]) for i in line]
        words = "".join(texts).split()
        place = torch.tensor([text.startswith(" ") for text in texts]).cumsum(0) - 1
        for k, concept in enumerate(CONCEPTS):
            on_words = PREDICATES[concept.explanation](words)
            # all tokens of a word or none, so that any reading of "a word fires" is the same
            assert truth[:, k].tolist() == [on_words[i] for i in place] == concept.on_tokens(texts)


def test_a_line_is_whole_words() -> None:
    c = corpus(seed=3, documents=50)
    texts = c.tokenizer.texts
    firsts = c.tokens[c.mask].view(-1, WIDTH)[:, 0].tolist()
    assert all(texts[i].startswith(" ") for i in firsts)
    for document, text in enumerate(c.texts):
        own = c.tokens[c.documents == document]
        assert len(own) % WIDTH == 0
        assert c.tokenizer.decode(own) == text and c.tokenizer.encode(text) == own.tolist()
        assert text == " " + " ".join(text.split())
    assert c.tokenizer(list(c.texts))["input_ids"] == [c.tokenizer.encode(text) for text in c.texts]


def test_a_document_begins_on_a_row_of_its_own() -> None:
    c = corpus(seed=3, documents=50)
    assert c.tokens.shape == c.documents.shape == c.mask.shape and c.tokens.shape[1] == LINES * WIDTH
    assert torch.equal(c.mask, c.documents >= 0) and torch.equal(c.mask, c.tokens != c.tokenizer.pad_token_id)
    assert 0 < (~c.mask).float().mean() < 0.2 and c.mask[:, 0].all()
    for row in c.documents:
        assert row[row >= 0].unique().numel() == 1
    assert c.documents.unique().tolist() == list(range(-1, 50))
    assert (
        c.documents[:, 0].diff() == 0
    ).any()  # documents of several rows: a split by rows alone would leak


def test_long_words_are_two_or_three_tokens(large: World) -> None:
    words = {word for text in large.corpus.texts for word in text.split()}
    assert 1800 < len(words) < 2200
    size = {word: len(large.tokenizer.encode(word)) for word in words}
    assert set(size.values()) == {1, 2, 3}
    assert all((n == 1) == (len(word) <= 6) for word, n in size.items())
    users: dict[int, set[str]] = {}
    for word in words:
        for piece in large.tokenizer.encode(word):
            users.setdefault(piece, set()).add(word)
    # pieces are shared: no token tells its word, and one that begins a word may be another word
    long = [word for word in words if size[word] > 1]
    assert sum(all(len(users[p]) > 1 for p in large.tokenizer.encode(word)) for word in long) > len(long) / 3
    begun = [large.tokenizer.texts[large.tokenizer.encode(word)[0]].strip() for word in long]
    assert sum(first in words for first in begun) > len(long) / 2
    assert 290_000 < large.mask.sum() < 330_000


@pytest.mark.parametrize("seed", range(5))
def test_no_filler_is_a_trap(seed: int) -> None:
    made = pools(seed)
    for pool in ("small", "common", "long"):
        assert len(set(made[pool])) == len(made[pool])
        for word in made[pool]:
            assert not any(planted in word for planted in PLANTED)
        lines = Lines.of_words([["x", word, "x"] for word in made[pool]])
        for concept in CONCEPTS:
            fires = concept.rule(lines)[:, 1]
            assert fires.all() if (pool, concept.name) == ("small", "small") else not fires.any()


def test_near_misses_occur(small: World) -> None:
    lines = lines_of(small)
    pairs = [(a, b) for line in lines for a, b in zip(["", *line], line, strict=False)]
    misses = {
        "hall": sum(b == "hall" for _, b in pairs),
        "mola": sum(b == "mola" for _, b in pairs),
        "Mola": sum(b == "Mola" for _, b in pairs),
        "inside": sum("ish" in b and not b.endswith("ish") for _, b in pairs),
        "oil": sum(b == "oil" and a != "olive" for a, b in pairs),
        "olive": sum(a == "olive" and b != "oil" for a, b in pairs),
        "unit": sum(b in UNITS and not is_number(a or "x") for a, b in pairs),
        "river": sum((a, b) == ("river", "bank") for a, b in pairs),
        **{t: sum(0 < sum(w in own for w in line) < 3 for line in lines) for t, own in TOPIC_WORDS.items()},
        "name": sum(is_name(b) and a != "" for a, b in pairs),
    }
    assert min(misses.values()) >= 25, misses


@pytest.mark.parametrize("seed", range(3))
def test_disjoint_concepts_never_meet(seed: int) -> None:
    w = world(seed, documents=200)
    on = fired(w).flatten(0, 1).float()
    meet = (on.T @ on) > 0
    found = {
        frozenset((a, b)) for i, a in enumerate(NAMES) for j, b in enumerate(NAMES) if i < j and meet[i, j]
    }
    unions = {frozenset((c.name, part)) for c in CONCEPTS if c.kind == "union" for part in c.of}
    assert found == unions | {frozenset(("closing", "small"))}
    assert set(DISJOINT) == set(NAMES) - {"closing", "colour or year", "ish or oil"} and len(DISJOINT) >= 24


def test_another_concept_tells_nothing(large: World) -> None:
    """A judge with the explanations of others is at chance: on lines, and on marked words."""
    alive = [NAMES.index(name) for name in DISJOINT if BY_NAME[name].kind != "dead"]
    on = fired(large)[:, :, alive].float()
    line = on.amax(1)
    share = line.mean(0)
    hit = (line.T @ line) / line.sum(0)[:, None]  # [truth, judge]: how often the judge says yes
    false = (share - hit * share[:, None]) / (1 - share[:, None])
    detection = (hit + 1 - false) / 2
    off = ~torch.eye(len(alive), dtype=torch.bool)
    assert detection[off].mean() == pytest.approx(0.5, abs=0.005)
    often = share > 0.01  # the rare one fires in 25 lines
    assert (detection - 0.5)[off & often[:, None]].abs().max() < 0.06
    for shift in range(1, len(alive)):
        judges = torch.arange(len(alive)).roll(shift)
        assert detection[torch.arange(len(alive)), judges].mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("documents", [90, 680])
def test_shares(documents: int, small: World, large: World) -> None:
    w = small if documents == 90 else large
    on = fired(w)
    share, in_lines = on.float().mean((0, 1)), on.any(1).sum(0)
    for name, tokens, lines in zip(NAMES, share.tolist(), in_lines.tolist(), strict=True):
        low, high = SHARES[name]
        assert low <= tokens <= high, (name, tokens)
        if BY_NAME[name].kind not in ("rare", "dead"):
            # enough to explain from and to score on, and enough silence
            assert lines >= 100 and len(on) - lines >= 200, (name, lines)
    assert in_lines[NAMES.index("quagga")] >= 3


def test_unions_are_their_parts_and_a_parent_leaves_its_child_out(small: World) -> None:
    on = {name: fired(small)[:, :, i] for i, name in enumerate(NAMES)}
    for concept in CONCEPTS:
        if concept.kind == "union":
            assert torch.equal(on[concept.name], on[concept.of[0]] | on[concept.of[1]])
            assert all(on[part].any() for part in concept.of)
    both = [[word.startswith("st") for word in line] for line in lines_of(small)]
    own = [(on["st"] | on["stone"])[i].any().item() for i in range(len(both))]
    assert own == [any(line) for line in both] and not (on["st"] & on["stone"]).any()


@pytest.mark.parametrize("name", ["echo", "recall"])
def test_a_copy_names_its_source(small: World, name: str) -> None:
    source = small.sources(name)
    on = small.fires[:, :, NAMES.index(name)]
    assert torch.equal(source >= 0, on)
    row, at = on.nonzero(as_tuple=True)
    earlier = source[row, at]
    assert torch.equal(small.tokens[row, at], small.tokens[row, earlier])
    assert torch.equal(earlier // WIDTH, at // WIDTH) and (earlier < at).all()
    texts = small.tokenizer.texts
    for r, t, s in zip(row.tolist(), at.tolist(), earlier.tolist(), strict=True):
        begin = t // WIDTH * WIDTH
        word = [texts[i].startswith(" ") for i in small.tokens[r, begin : begin + WIDTH]]
        of = lambda i: sum(word[: i - begin + 1]) - 1  # noqa: B023, E731
        line = small.tokenizer.decode(small.tokens[r, begin : begin + WIDTH]).split()
        assert of(s) == max(i for i in range(of(t)) if line[i] == line[of(t)])
        assert name == "recall" or of(s) == of(t) - 1


def test_a_feature_fires_where_its_predicate_does(large: World) -> None:
    """From text through the model, the harvest and the dictionary, on the whole corpus, bit for bit."""
    texts = list(large.corpus.texts)
    stream = harvest(large.model, texts, [HOOK_POINT], context=LINES * WIDTH, isolate=True, tokens=None)
    at = 0
    for batch in stream:
        own = slice(at, at + len(batch.mask))
        at += len(batch.mask)
        for field in ("tokens", "documents", "mask"):
            assert torch.equal(getattr(batch, field), getattr(large, field)[own])
        codes = large.dictionary.encode(batch.activations[HOOK_POINT]).to_dense()
        assert torch.equal(codes > 0, large.fires[own])
        written = large.model.module.magnitudes(large.tokens[own])
        assert (codes - written).abs().max() < 0.2
    assert at == len(large.tokens)


def test_token_rows_and_a_store_give_the_same(small: World, tmp_path) -> None:
    stream = harvest(small.model, small.tokens, [HOOK_POINT], tokens=None)
    found = torch.cat([small.dictionary.encode(b.activations[HOOK_POINT]).to_dense() > 0 for b in stream])
    assert torch.equal(found, small.fires)
    store = harvest(small.model, small.tokens, [HOOK_POINT], tokens=None, out=tmp_path / "store")
    rows = torch.cat([shard.rows(HOOK_POINT, slice(None)) for shard in store.shards])
    kept = torch.cat([torch.from_numpy(shard.array("mask").copy()) for shard in store.shards]).bool()
    assert torch.equal(kept, small.mask.flatten())
    assert torch.equal(small.dictionary.encode(rows[kept]).to_dense() > 0, small.fires[small.mask])


def test_the_dictionary_is_a_dictionary(small: World, tmp_path) -> None:
    d = small.dictionary
    assert d.reads == d.writes == (HOOK_POINT,) and small.model.hook_points() == [HOOK_POINT]
    saekit.save(d, tmp_path / "d")
    again = saekit.load(tmp_path / "d")
    x = small.model(small.tokens)[small.mask]
    assert torch.equal(again.encode(x).to_dense(), d.encode(x).to_dense())
    torch.testing.assert_close(d.W_dec @ d.W_enc, torch.eye(len(CONCEPTS)), atol=1e-5, rtol=0)
    written = small.model.module.magnitudes(small.tokens)[small.mask] @ d.W_dec
    assert (d(x) - written).norm(dim=1).max() < 0.5


def test_activations_have_a_top_and_a_tail(small: World) -> None:
    values = small.model.module.magnitudes(small.tokens) / small.model.module.scale
    for name, own in zip(NAMES, values.flatten(0, 1).T, strict=True):
        own = own[own > 0]
        if BY_NAME[name].kind not in ("rare", "dead"):
            assert 1 <= own.min() < 1.05 and 1.9 < own.max() <= 2
            assert own.mean() == pytest.approx(4 / 3, abs=0.1)


def test_a_yes_or_no_simulates_well(large: World) -> None:
    """Pearson's r of what a concept writes with whether it fires, on as many silent lines as others."""
    written = large.model.module.magnitudes(large.tokens)[large.mask].view(-1, WIDTH, len(CONCEPTS))
    for name, own in zip(NAMES, written.unbind(2), strict=True):
        on = (own > 0).any(1)
        if BY_NAME[name].kind != "dead":
            shown = torch.cat([own[on], own[~on][: on.sum()]]).flatten()
            assert torch.corrcoef(torch.stack([shown, (shown > 0).float()]))[0, 1] >= 0.95


def test_a_line_has_one_activation_wherever_it_stands(small: World) -> None:
    model = small.model.module
    lines = small.tokens[small.mask].view(-1, WIDTH)[:64]
    alone, rows = model(lines), model(lines.view(16, -1)).view(64, WIDTH, -1)
    torch.testing.assert_close(alone, rows, atol=1e-5, rtol=0)
    torch.testing.assert_close(model(lines.flip(0)).flip(0), alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seq", [1, 31, 32, 50, 128])
def test_the_model_reads_any_tokens(small: World, seq: int) -> None:
    ids = torch.randint(1, len(small.tokenizer), (20, seq), generator=torch.Generator().manual_seed(seq))
    found = firing(ids, small.tokenizer)
    for row, truth in zip(ids, found, strict=True):
        for begin in range(0, seq, WIDTH):
            texts = [small.tokenizer.texts[i] for i in row[begin : begin + WIDTH]]
            expected = [concept.on_tokens(texts) for concept in CONCEPTS]
            assert truth[begin : begin + WIDTH].T.tolist() == expected
    codes = small.dictionary.encode(small.model(ids))
    assert torch.equal(codes.to_dense() > 0, found)
    assert not firing(torch.zeros(2, seq, dtype=torch.int64), small.tokenizer).any()


def test_any_view_of_the_model_knows_its_tokenizer(small: World) -> None:
    again = load_model(small.model.module)
    assert again.tokenizer is small.tokenizer and again.device.type == "cpu" and again.identity()["digest"]


def digest(w: World) -> str:
    """Of everything that a seed decides."""
    parts = [w.tokens, w.documents, w.mask, w.fires, w.model.module(w.tokens), w.dictionary.W_enc]
    data = b"".join(part.detach().contiguous().numpy().tobytes() for part in parts)
    return hashlib.sha256(data + "".join(w.corpus.texts).encode()).hexdigest()


def test_a_seed_is_one_world_in_every_process(small: World) -> None:
    code = f"""
import hashlib, torch
from saekit.testbed.concepts import World, world
{inspect.getsource(digest)}
torch.set_num_threads(1)
print(digest(world(seed=0, documents=90)))
"""
    for salt in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": salt},
        )
        assert done.stdout.strip() == digest(small)


def test_another_seed_is_another_corpus(small: World) -> None:
    other = world(seed=1, documents=90)
    assert other.corpus.texts[0] != small.corpus.texts[0]
    assert set(pools(0)["common"]) != set(pools(1)["common"])
    assert not torch.equal(other.dictionary.W_enc, small.dictionary.W_enc)


@pytest.mark.parametrize("documents, seconds", [(90, 1.0), (680, 5.0)])
def test_it_is_built_at_once(documents: int, seconds: float) -> None:
    start = time.process_time()
    world(seed=2, documents=documents)
    assert time.process_time() - start < seconds


@pytest.mark.parametrize("documents", [0, -3])
def test_a_corpus_without_documents_is_refused(documents: int) -> None:
    with pytest.raises(SaekitError, match=f"documents = {documents} must be at least 1"):
        corpus(0, documents)


def test_an_unknown_word_is_refused(small: World) -> None:
    with pytest.raises(SaekitError, match="'zebra', which this world lacks"):
        small.tokenizer.encode("hal zebra")


@pytest.mark.parametrize("name", ["hal", "nothing"])
def test_what_copies_nothing_has_no_sources(small: World, name: str) -> None:
    with pytest.raises(SaekitError, match="choose one of echo, recall"):
        concepts.sources(small.tokens, small.tokenizer, name)
