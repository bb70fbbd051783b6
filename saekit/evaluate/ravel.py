"""Disentanglement: whether features of one attribute of an entity can be swapped without touching its other attributes.

After RAVEL (Huang et al. 2024, 2402.17700), as SAEBench (Karvonen et al. 2025, 2503.09532) asks it of dictionaries. Texts are
prompts that end before an answer: ``{"text": "Paris is in the country of", "entity": "Paris", "asked": "country", "answer":
" France"}``. At the entity's last token the features of a mask take the values that they have in a prompt with another
entity. Where the mask is of what is asked for, the other entity's answer should follow (cause); where it is of another
attribute, the entity's own (isolation). Masks are learnt on other pairs of prompts than the score is of.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.dictionaries import Dictionary
from saekit.evaluate.core import Report, controls_for, opened
from saekit.evaluate.labelled import BATCH, CONTEXT, Texts, about, atoms_of
from saekit.evaluate.measure import Measure, Resampler, mean_of_means
from saekit.hooks import Site, capture, intervene
from saekit.models import Model
from saekit.types import SaekitError

FIELDS = ("entity", "asked", "answer")
PAIRS = 512  # of prompts, of each mask and of each thing that is asked for: to learn on, and half as many to judge on
PROMPTS = 2000  # that ask for one thing, of which pairs are drawn at most
FITTED = 0.7  # share of the entities whose prompts masks are learnt on
STEPS, EACH, RATE = (
    150,
    16,
    0.02,
)  # of learning a mask: pairs of a step that are to change, and as many that are not
COOLED = (1.0, 1e-3)  # temperature of a mask's sigmoids, at first and at last
COORDINATES, WHOLE = "coordinates", "activation"  # controls: a mask of coordinates, and all swapped at once


@dataclass(frozen=True)
class Prompts:
    """Prompts whose answers the model knows. ``places`` is where each one's entity ends, ``last`` where its answer is told.

    ``x`` is the activation at its entity; ``entities``, ``asked`` and ``answers`` (token ids) say what it is about.
    """

    tokens: Int[Tensor, "prompt seq"]
    attention: Bool[Tensor, "prompt seq"]
    places: Int[Tensor, " prompt"]
    last: Int[Tensor, " prompt"]
    x: Float[Tensor, "prompt d"]
    entities: Sequence[str]
    asked: Sequence[str]
    answers: Int[Tensor, " prompt"]


@dataclass(frozen=True)
class Pairs:
    """Prompts and those whose entity is put in their place; ``cause`` where the other's answer should follow."""

    base: Int[Tensor, " pair"]
    source: Int[Tensor, " pair"]
    cause: Bool[Tensor, " pair"]

    def at(self, some: Int[Tensor, " some"]) -> "Pairs":
        """Some of the pairs."""
        return Pairs(self.base[some], self.source[some], self.cause[some])


def disentanglement(
    dictionary: Dictionary, model: Model, texts: Texts, attribute: str | None = None, *,
    controls: bool = True, seed: int = 0, on_batch: Callable[[int, int], None] | None = None,
) -> Report:  # fmt: skip
    """Share of judged pairs whose answer changes as it should (``cause``) and stays as it should (``isolation``), and their mean.

    ``attribute``: the one that is swapped (None: each that is asked for, and their mean). Prompts whose answer the model
    doesn't give by itself are left out. The dictionary's error stays (SAEBench leaves it away): what isn't swapped is the
    activation's own. Intervals are over the entities of judged pairs.
    """
    atoms = atoms_of(dictionary, "ravel")
    prompts, site = _known(dictionary, model, texts)
    kinds = sorted(set(prompts.asked))
    swapped = kinds if attribute is None else [attribute]
    pairs = {kind: _pairs(prompts, kind, kinds, seed) for kind in swapped}
    changes = {"": _changes(dictionary, prompts, atoms)}
    if controls:
        codes = dictionary.encode(prompts.x.to(dictionary.device))
        random = controls_for(dictionary, codes, seed)["random"]
        changes["random"] = _changes(random, prompts, atoms_of(random, "ravel"))
        changes[COORDINATES] = (prompts.x, torch.eye(prompts.x.shape[1]))
    steps = len(changes) * len(swapped)
    hits: dict[str, dict[str, Bool[Tensor, " pair"]]] = {}
    for i, (name, change) in enumerate(changes.items()):
        hits[name] = {}
        for j, (kind, (fitted, judged)) in enumerate(pairs.items()):
            mask = _mask(model, site, prompts, change, fitted, seed)
            hits[name][kind] = _right(model, site, prompts, change, judged, mask)
            if on_batch:
                on_batch(i * len(swapped) + j + 1, steps)
    if controls:
        change = changes[COORDINATES]
        every = torch.ones(len(change[1]), dtype=torch.bool)
        hits[WHOLE] = {
            kind: _right(model, site, prompts, change, own[1], every) for kind, own in pairs.items()
        }
    causes = {kind: own[1].cause for kind, own in pairs.items()}
    each = {
        kind: {"cause": _share(hit[causes[kind]]), "isolation": _share(hit[~causes[kind]])}
        for kind, hit in hits[""].items()
    }
    facts = {
        "attribute": ", ".join(swapped),
        "each": each,
        "known": len(prompts.asked) / len(texts.texts),
        "seed": seed,
    }
    names = np.unique(prompts.entities, return_inverse=True)[1]
    ends = [
        np.concatenate([names[getattr(own[1], side).numpy()] for own in pairs.values()]) for side in ("base", "source")
    ]  # fmt: skip
    facts["entities"] = len(np.unique(np.concatenate(ends)))
    return Report(_measures(hits, causes, ends, seed), about("ravel", dictionary, model, texts, facts))


def _share(hit: Tensor) -> float:
    return hit.double().mean().item()


def _measures(
    hits: Mapping[str, Mapping[str, Tensor]], causes: Mapping[str, Tensor], ends: Sequence[np.ndarray], seed: int
) -> dict[str, Measure]:  # fmt: skip
    """Means over the attributes, of a dictionary ("") beside others."""

    def sides(own: Mapping[str, Tensor]) -> tuple[float, float]:
        both = [(_share(hit[causes[kind]]), _share(hit[~causes[kind]])) for kind, hit in own.items()]
        cause, isolation = np.mean(both, 0)
        return float(cause), float(isolation)

    # a column for each attribute and side: each counts as much, whatever the number of its pairs
    columns = [(kind, side if cause else ~side) for cause in (True, False) for kind, side in causes.items()]
    rows = sum(len(side) for side in causes.values())
    right, asked = np.zeros((2, rows, len(columns)))
    starts = np.cumsum([0, *(len(side) for side in causes.values())])
    for column, (kind, side) in enumerate(columns):
        at = starts[list(causes).index(kind)] + side.nonzero()[:, 0].numpy()
        asked[at, column], right[at, column] = 1, hits[""][kind][side].numpy()
    # pairs of few entities are no independent cases
    entities, which = np.unique(np.stack(ends), return_inverse=True)
    one, other = which.reshape(2, -1)
    resampler, half = Resampler(len(entities), seed).of_pairs(one, other), len(causes)
    values = {name: sides(own) for name, own in hits.items()}
    out = {}
    for key, some, weigh in (
        ("disentanglement", slice(None), lambda v: (v[0] + v[1]) / 2),
        ("cause", slice(half), lambda v: v[0]),
        ("isolation", slice(half, None), lambda v: v[1]),
    ):
        span = resampler.interval(mean_of_means, right[:, some], asked[:, some])
        beside = {name: weigh(value) for name, value in values.items() if name}
        n = int(asked[:, some].sum())
        out[key] = Measure(weigh(values[""]), n, "share of pairs", span, beside, "pairs")
    return out


# prompts


@torch.no_grad()
def _known(dictionary: Dictionary, model: Model, texts: Texts) -> tuple[Prompts, Site]:
    """The prompts whose answer the model gives, with what stands at their entities, and the place of it."""
    if not model.predicts_tokens or model.tokenizer is None:
        raise SaekitError(
            f"model {model.name!r} predicts no tokens of a tokenizer, and suite 'ravel' asks for answers; choose another suite"
        )
    missing = [name for name in FIELDS if name not in texts.attributes]
    if missing:
        raise SaekitError(
            f'texts {texts.name!r} lack {missing[0]!r}; suite \'ravel\' needs lines as {{"text": "Paris is in", "entity": "Paris", "asked": "country", "answer": " France"}}'
        )
    entities, asked, answers = (texts.attributes[name] for name in FIELDS)
    found = [_places(model, *own) for own in zip(texts.texts, entities, answers, strict=True)]
    longest = max(length for _, length, _ in found)
    context = min(longest + 2, model.context or longest + 2)
    stream, reads, writes = opened(
        dictionary, model, texts.texts, None, tokens=None, batch_rows=BATCH, split="all", context=context, isolate=True
    )  # fmt: skip
    if longest > CONTEXT or len(reads) > 1 or reads != writes:
        raise SaekitError(
            f"suite 'ravel' takes prompts of at most {CONTEXT} tokens (the longest has {longest}) and dictionaries of one hook point; choose others"
        )
    site = model.site(reads[0])
    parts = []
    seen = 0
    for given, batch in stream.inputs():
        assert batch.tokens is not None and batch.documents is not None
        own = found[seen : seen + len(batch.mask)]
        seen += len(batch.mask)
        first = batch.mask.int().argmax(1)
        places = first + torch.tensor([place for place, _, _ in own])
        last = first + torch.tensor([length - 1 for _, length, _ in own])
        rows = torch.arange(len(own))
        x = capture(partial(model, given), {"x": site})["x"]
        told = model.logits(given)[rows, last].argmax(-1).cpu()
        parts.append((batch.tokens, batch.documents >= 0, places, last, x[rows, places].float().cpu(), told))
    tokens, attention, places, last, x, told = map(torch.cat, zip(*parts, strict=True))
    wanted = torch.tensor([token for _, _, token in found])
    kept = (told == wanted).nonzero()[:, 0]
    if not x.isfinite().all():
        raise SaekitError(f"activations at {reads[0]!r} hold NaN or Inf; find what makes the model overflow")

    def some(values: Sequence[str]) -> list[str]:
        return [values[i] for i in kept.tolist()]

    if not len(kept):
        raise SaekitError(
            f"model {model.name!r} answers none of the {len(wanted)} prompts rightly, so nothing can be swapped; give prompts that it knows"
        )
    prompts = Prompts(
        tokens[kept], attention[kept], places[kept], last[kept], x[kept], some(entities), some(asked), wanted[kept]
    )  # fmt: skip
    return prompts, site


def _places(model: Model, text: str, entity: str, answer: str) -> tuple[int, int, int]:
    """Of a prompt the place of its entity's last token, its length in tokens, and the first token of its answer."""

    def ids(words: str) -> list[int]:
        return model.tokenizer(words, add_special_tokens=False)["input_ids"]

    own, at = ids(text), text.rfind(entity)
    if not entity or at < 0:
        raise SaekitError(f"text {text!r} does not hold its entity {entity!r}; write it as it stands there")
    whole = ids(text + answer)
    if whole[: len(own)] != own or len(whole) == len(own):
        raise SaekitError(
            f"answer {answer!r} begins with no token of its own behind {text!r}; begin it with a space, or end the text in a word"
        )
    # the first token that takes the text to the entity's end or further
    end = at + len(entity)
    decode = model.tokenizer.decode
    place = next(i for i in range(len(own)) if len(decode(own[: i + 1]).lstrip()) >= len(text[:end].lstrip()))
    return place, len(own), whole[len(own)]


def _pairs(prompts: Prompts, kind: str, kinds: Sequence[str], seed: int) -> tuple[Pairs, Pairs]:
    """Pairs to learn the mask of a kind of attribute on, and pairs of other entities to judge it on.

    Both prompts ask for the same, and their answers differ; half of the pairs ask for ``kind``, the others for other kinds.
    """
    if kind not in kinds or len(kinds) < 2:
        raise SaekitError(
            f"attribute {kind!r} can't be told from others: known prompts ask for {', '.join(kinds)}; give prompts that ask for it and for something else"
        )
    names = sorted(set(prompts.entities))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(names), generator=generator).tolist()
    cut = round(FITTED * len(names))
    sides = []
    for own, wanted in (
        ({names[i] for i in order[:cut]}, PAIRS),
        ({names[i] for i in order[cut:]}, PAIRS // 2),
    ):
        base, source = [], []
        for asked in (kind, *(k for k in kinds if k != kind)):
            some = torch.tensor([
                i for i, (e, a) in enumerate(zip(prompts.entities, prompts.asked, strict=True)) if e in own and a == asked
            ], dtype=torch.int64)  # fmt: skip
            if len(some) > PROMPTS:
                some = some[torch.randperm(len(some), generator=generator)[:PROMPTS]]
            a, b = torch.meshgrid(some, some, indexing="ij")
            differ = prompts.answers[a] != prompts.answers[b]
            a, b = a[differ], b[differ]
            if not len(a):
                raise SaekitError(
                    f"known prompts that ask for {asked!r} have no two answers among {len(own)} entities; give more entities"
                )
            drawn = torch.randperm(len(a), generator=generator)[
                : wanted if asked == kind else -(-wanted // (len(kinds) - 1))
            ]
            base.append(a[drawn])
            source.append(b[drawn])
        cause = torch.cat([torch.full((len(b),), i == 0) for i, b in enumerate(base)])
        sides.append(Pairs(torch.cat(base), torch.cat(source), cause))
    return sides[0], sides[1]


# masks

Change = tuple[
    Float[Tensor, "prompt part"], Float[Tensor, "part d"]
]  # how much of each part a prompt has, and what a unit writes


@torch.no_grad()
def _changes(dictionary: Dictionary, prompts: Prompts, atoms: Tensor) -> Change:
    """Values and atoms of the features that fire at any prompt's entity; others have nothing to swap."""
    codes = dictionary.encode(prompts.x.to(dictionary.device))
    used = codes.firing_counts().nonzero()[:, 0]
    return codes.select(used).float().cpu(), atoms[used.cpu()].float()


def _swapped(
    model: Model, site: Site, prompts: Prompts, change: Change, pairs: Pairs, mask: Float[Tensor, " part"]
) -> Float[Tensor, "pair vocabulary"]:
    """Logits of the answers where the masked parts at the entity are those of the other prompt."""
    values, atoms = change
    written = ((values[pairs.source] - values[pairs.base]) * mask) @ atoms
    rows, places = torch.arange(len(written)), prompts.places[pairs.base]

    def put(x: Tensor) -> Tensor:
        return x.index_put((rows, places), written.to(x), accumulate=True)

    given = model.inputs(prompts.tokens[pairs.base], prompts.attention[pairs.base])
    with intervene([(site, put)]):
        logits = model.logits(given)
    return logits[rows, prompts.last[pairs.base]].float().cpu()


def _wanted(prompts: Prompts, pairs: Pairs) -> Int[Tensor, " pair"]:
    return prompts.answers[pairs.source].where(pairs.cause, prompts.answers[pairs.base])


@torch.enable_grad()
def _mask(
    model: Model, site: Site, prompts: Prompts, change: Change, pairs: Pairs, seed: int
) -> Bool[Tensor, " part"]:
    """Which parts carry the attribute: sigmoids that become a step as they cool, by cross entropy with what should follow."""
    logit = nn.Parameter(torch.zeros(len(change[1])))
    optimizer = torch.optim.Adam([logit], lr=RATE)
    temperatures = torch.logspace(math.log10(COOLED[0]), math.log10(COOLED[1]), STEPS)
    kept = [p for p in model.module.parameters() if p.requires_grad]
    for p in kept:
        p.requires_grad_(False)
    try:
        for some, temperature in zip(_drawn(pairs, seed), temperatures, strict=True):
            own = pairs.at(some)
            out = _swapped(model, site, prompts, change, own, (logit / temperature).sigmoid())
            optimizer.zero_grad()
            nn.functional.cross_entropy(out, _wanted(prompts, own)).backward()
            optimizer.step()
    finally:
        for p in kept:
            p.requires_grad_(True)
    return logit.detach() > 0


def _drawn(pairs: Pairs, seed: int) -> Iterator[Int[Tensor, " some"]]:
    """As many pairs of each side, for each step."""
    generator = torch.Generator().manual_seed(seed)
    sides = [pairs.cause.nonzero()[:, 0], (~pairs.cause).nonzero()[:, 0]]
    for _ in range(STEPS):
        yield torch.cat([side[torch.randint(len(side), (EACH,), generator=generator)] for side in sides])


@torch.no_grad()
def _right(
    model: Model, site: Site, prompts: Prompts, change: Change, pairs: Pairs, mask: Bool[Tensor, " part"]
) -> Bool[Tensor, " pair"]:
    """Which pairs' answers are as they should be."""
    out = []
    for some in torch.arange(len(pairs.base)).split(BATCH):
        own = pairs.at(some)
        logits = _swapped(model, site, prompts, change, own, mask.float())
        out.append(logits.argmax(-1) == _wanted(prompts, own))
    return torch.cat(out)
