"""Features about a topic are found by embeddings of documents, and the model is steered by their scores (Joshi et al. 2025)."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from saekit import metrics
from saekit.dictionaries import Dictionary, create
from saekit.hooks import capture
from saekit.interventions import intervened
from saekit.models import Model
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.probes import auroc
from saekit.testbed import topics as language
from saekit.testbed.topics import D_MODEL, FEATURE_TOPIC, FEATURES, HOOK_POINT, SENTENCE, WORD_TOPIC, K
from saekit.topics import Topic, clamp, distances, lexical, ruled, swap, topic_of, weight

REFERENCE, ALIGNED, TEST, ROWS = 400, 100, 100, 600  # documents
STEPS, BATCH = 300, 512
PLANTED, TRAINED = "planted", "trained"
SWAP, WEIGHT, CLAMP, PAPERS, ANY = (
    "swap",
    "weight",
    "clamp, at swap's probability",
    "clamp, + 10",
    "swap, scores shuffled",
)
CLAMPED, BY = 5, 10.0  # the paper's
STRENGTHS = [0.1 * 1.5**i for i in range(15)]  # of clamping, up to about 29
ASKED = [
    i for i in range(language.LENGTH - 1) if SENTENCE[i % len(SENTENCE)] is None
]  # a content word comes next


def _said(model: Model, documents: Tensor) -> dict[str, float]:
    """Probability of the topic's words where a content word comes next, and CE of all next tokens and of grammar's."""
    with torch.no_grad():
        logits = model.module(documents)[:, :-1]
    losses = metrics.cross_entropy(logits, documents[:, 1:])
    grammar = torch.ones(losses.shape[1], dtype=torch.bool)
    grammar[ASKED] = False
    topic = logits[:, ASKED].softmax(-1)[..., WORD_TOPIC == 0].sum(-1)
    return {
        "probability": topic.mean().item(),
        "CE": losses.mean().item(),
        "grammar": losses[:, grammar].mean().item(),
    }


def _moved(
    own: dict[str, float], model: Model, documents: Tensor, changed: AbstractContextManager
) -> dict[str, float]:
    """How many times as probable the topic's words become, and by how much CE rises."""
    with changed:
        new = _said(model, documents)
    return {"times": new["probability"] / own["probability"]} | {
        key: new[key] - own[key] for key in ("CE", "grammar")
    }


def _equal(own: dict[str, float], model: Model, d: Dictionary, documents: Tensor, scores: Tensor, times: float) -> dict[str, float]:  # fmt: skip
    """Clamping by as much as makes the topic as probable as the swap does; NaN where no strength does."""

    def at(by: float) -> dict[str, float]:
        return _moved(own, model, documents, intervened(model, [(d, clamp(scores, by, CLAMPED))]))

    high = next((by for by in STRENGTHS if at(by)["times"] >= times), None)
    if high is None:
        return dict.fromkeys(("times", "CE", "grammar"), float("nan"))
    low = 0.0
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (low, middle) if at(middle)["times"] >= times else (middle, high)
    return at(high)


def _dictionaries(world: language.TopicWorld, g: torch.Generator, seed: int) -> dict[str, Dictionary]:
    """The planted one, one that is trained on the stream, and the controls."""
    documents = language.documents(torch.randint(2, (ROWS,), generator=g), g)
    site = {HOOK_POINT: world.model.site(HOOK_POINT)}
    x = capture(lambda: world.model.module(documents), site)[HOOK_POINT][:, 1:].flatten(0, 1)
    shape: dict[str, Any] = {"d_in": D_MODEL, "n_features": FEATURES, "k": K, "seed": seed}
    ds = {TRAINED: create("topk", **shape), FROZEN: create("frozen", **shape)}
    fit_all(ds, x, STEPS, BATCH, lr=3e-3, seed=seed)
    ds |= {PLANTED: world.dictionary, RANDOM: untrained(ds[FROZEN])}
    for d in ds.values():
        d.reads = d.writes = (HOOK_POINT,)
    return ds


def _one(world: language.TopicWorld, d: Dictionary, topic: Topic, documents: Tensor, seed: int) -> Found:
    """What the scores of one dictionary's features are worth."""
    model, scores = world.model, topic.scores
    own = _said(model, documents)
    shuffled = scores[torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))]
    cosines = torch.nn.functional.normalize(d.W_dec.detach(), dim=1) @ world.dictionary.W_dec.detach().T
    true = FEATURE_TOPIC[cosines.argmax(1)] == 0
    out: Found = {"AUROC": auroc(scores, true), "coverage": topic.coverage}
    ways = {SWAP: swap(d, scores), WEIGHT: weight(d, scores), ANY: swap(d, shuffled)}
    out |= {name: _moved(own, model, documents, ruled(model, d, rule)) for name, rule in ways.items()}
    out[PAPERS] = _moved(own, model, documents, intervened(model, [(d, clamp(scores, BY, CLAMPED))]))
    out[CLAMP] = _equal(own, model, d, documents, scores, out[SWAP]["times"])
    return out


def measure(seed: int, tell: Tell) -> Found:
    """A world of two topics, and four dictionaries of it whose features are scored for the first one."""
    tell(0, 3, "a world")
    world, g = language.world(seed), torch.Generator().manual_seed(1000 + seed)
    about = torch.arange(REFERENCE) % 2
    reference = language.documents(about, g)
    aligned, other = (language.documents(torch.full((n,), t), g) for n, t in ((ALIGNED, 0), (TEST, 1)))
    tell(1, 3, "dictionaries")
    ds = _dictionaries(world, g, seed)
    tell(2, 3, "topics")
    embedded = lexical(language.words(reference) + language.words(aligned))
    distance = distances(embedded[:REFERENCE], embedded[REFERENCE:])
    out: Found = {name: _one(world, d, topic_of(world.model, d, reference, distance), other, seed) for name, d in ds.items()}  # fmt: skip
    return out | {"before": _said(world.model, other)}


def judge(found: Found) -> Reproduction:
    """The scores against the truth, and steering by them against clamping and shuffled scores."""
    planted, names = found[PLANTED], (PLANTED, TRAINED, FROZEN, RANDOM)

    def over(a: list[float], b: list[float]) -> list[float]:
        return [x / y for x, y in zip(a, b, strict=True)]

    def all_of(*path: str) -> dict[str, list[float]]:
        out = {}
        for name in names:
            values: Any = found[name]
            for key in path:
                values = values[key]
            out[name] = values
        return out

    ways = (SWAP, WEIGHT, CLAMP, PAPERS, ANY)
    return Reproduction(
        title="Embeddings of documents tell which features are about a topic, and swapping by them steers a model to it",
        source="Joshi, Cintas and Speakman 2025 (Enabling Precise Topic Alignment via SAEs)",
        setting=f"a language of two topics with {FEATURES} planted features in {D_MODEL} dimensions, a world a seed, k = {K}; {REFERENCE} reference documents of both topics and {ALIGNED} about the one, embedded by TF-IDF and SVD; steered: {TEST} documents about the other topic, at every token, errors kept",
        claims=[
            Claim("AUROC of scores against the topic's true features", "no truth is known", planted["AUROC"], ">=", 0.9, found[RANDOM]["AUROC"], RANDOM),
            Claim("how many times as probable swapping makes the topic's words", "no number at this scale", planted[SWAP]["times"], ">=", 2.0, planted[ANY]["times"], "scores shuffled"),
            Claim("CE that swapping costs, over what the paper's clamping (+ 10 on 5 features) costs", "better language at equal topicality (acceptability .5 against .25 of fine-tuning)", over(planted[SWAP]["CE"], planted[PAPERS]["CE"]), "<=", 0.5),
            Claim("the same where clamping makes the topic as probable as swapping does", "no number", over(planted[SWAP]["CE"], planted[CLAMP]["CE"]), "<=", 0.5),
            Claim("a trained dictionary: how many times as probable swapping makes the topic's words", "no number", found[TRAINED][SWAP]["times"], ">=", 2.0, found[FROZEN][SWAP]["times"], FROZEN),
        ],
        figure=bars("Documents about the other topic, steered", "CE, more than before, in nats", {name: {way: found[name][way]["CE"] for way in ways if way != PAPERS} for name in (PLANTED, TRAINED)}),
        notes=[
            "A document about the other topic goes on about it, so that whatever makes the topic probable costs CE there. Swapping takes the other topic's features away, and with them what foretells its words; a clamp of just the strength needed leaves them. "
            "Clamping costs more only where it is stronger than needed, and its right strength has to be found for each topic; swapping has none to be chosen.",
            "Features of the other dictionaries count as the topic's where their nearest planted direction is one of its. Scores are relative to what fired: features that did not get 0 (the published code turns all scores into 0 then).",
        ],
        controls={
            "AUROC": all_of("AUROC"), "coverage": all_of("coverage"),
            **{f"{way}: times": all_of(way, "times") for way in ways},
            **{f"{way}: CE": all_of(way, "CE") for way in ways},
            **{f"{way}: CE of grammar": all_of(way, "grammar") for way in (SWAP, CLAMP)},
        },
    )  # fmt: skip


ROW = Row(measure, judge)
