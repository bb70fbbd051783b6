"""Codebook features: a model that works through discrete codes, which stand for states and steer it (2310.17230)."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from saekit.dictionaries import Dictionary, create
from saekit.harvest import harvest
from saekit.hooks import intervene
from saekit.models import Model, load_model
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM
from saekit.papers.row import Found, Row
from saekit.replacement import Replacement
from saekit.testbed import states
from saekit.testbed.states import STATES, StateLanguage, tokens_of
from saekit.trainers.finetune import finetune
from saekit.types import Codes

BASE_STEPS, STEPS, WALKS, SEQUENCES = 500, 500, 4096, 64
CODES = {"attn.c_proj:in": (64, states.HEADS), "mlp:out": (128, 1)}  # codes of each group, and groups
OFTEN, PRECISION, SWAPS = 10, 0.9, 200
PLACES = [f"blocks.{layer}.{place}" for layer in range(states.LAYERS) for place in CODES]


def _codebooks(seed: int) -> list[Dictionary]:
    out = []
    for i, point in enumerate(PLACES):
        codes, groups = CODES[point.split(".", 2)[2]]
        d: Any = create(
            "codebook", d_in=states.WIDTH, n_features=codes * groups, k=1, groups=groups, seed=seed + i
        )
        d.reads = d.writes = (point,)
        out.append(d)
    return out


def _logits(model: Model, tokens: Tensor, replacement: Replacement | None) -> Tensor:
    inside = nullcontext() if replacement is None else replacement.spliced()
    with torch.no_grad(), inside:
        return model.logits(model.inputs(tokens, torch.ones_like(tokens, dtype=torch.bool)))


def _chosen(replacement: Replacement, tokens: Tensor) -> list[Tensor]:
    """The codes [n, state, group] of each codebook where a state is complete, inside the replaced model."""
    found: dict[str, Tensor] = {}

    def keeper(d: Dictionary) -> Any:
        def keep(x: Tensor) -> None:  # before the dictionary replaces it
            found[d.reads[0]] = d.encode(x).rectangular()[0].view(*x.shape[:2], -1)

        return keep

    model = replacement.model
    with intervene([(model.site(d.reads[0]), keeper(d)) for d in replacement.dictionaries]):
        _logits(model, tokens, replacement)
    return [found[d.reads[0]][:, 2::2] for d in replacement.dictionaries]


def _counts(codes: Tensor, walks: Tensor, n_features: int) -> Tensor:
    """How often each code [feature, state] fires at each state."""
    flat = codes.long() * STATES + walks[..., None]
    return torch.bincount(flat.flatten(), minlength=n_features * STATES).view(n_features, STATES).double()


def _owned(counts: Sequence[Tensor], visits: Tensor, recall: float = 0.0) -> float:
    """Share of the states that have a code which fires for them alone, or nearly, and on so much of their visits."""
    every = torch.cat(list(counts))
    precision = every / every.sum(1, keepdim=True).clamp(min=1)
    precise = (precision >= PRECISION) & (every >= OFTEN) & (every >= recall * visits)
    return precise.any(0).double().mean().item()


def _swapped(replacement: Replacement, walks: Tensor) -> float:
    """Of the mass by which the next digit's distributions of two states differ, the share that swapping codes moves.

    Where a walk is at state A all codebooks write the codes that they write where another walk is at state B:
    1 - TV(swapped, B) / TV(A, B), in total over pairs of walks.
    """
    at = states.LENGTH // 2
    mine, other = walks[:SWAPS], walks[SWAPS : 2 * SWAPS]
    position, hooks = 2 * at + 2, []
    for d, codes in zip(replacement.dictionaries, _chosen(replacement, tokens_of(other)), strict=True):
        indices = codes[:, at].int()
        written = d.decode(Codes.from_rectangular(indices, torch.ones(indices.shape), d.n_features)).detach()
        hooks.append((replacement.model.site(d.writes[0]), _putter(position, written)))
    a, b = (
        _logits(replacement.model, tokens_of(w), replacement)[:, position].softmax(-1) for w in (mine, other)
    )
    tokens = tokens_of(mine)
    with torch.no_grad(), replacement.spliced(), intervene(hooks):
        given = replacement.model.inputs(tokens, torch.ones_like(tokens, dtype=torch.bool))
        swapped = replacement.model.logits(given)[:, position].softmax(-1)
    return 1 - ((swapped - b).abs().sum() / (a - b).abs().sum()).item()


def _putter(at: int, written: Tensor) -> Any:
    def put(y: Tensor) -> Tensor:
        y = y.clone()
        y[:, at] = written
        return y

    return put


def _scores(replacement: Replacement, language: StateLanguage, walks: Tensor) -> dict[str, float]:
    tokens = tokens_of(walks)
    codes = _chosen(replacement, tokens)
    visits = torch.bincount(walks.flatten(), minlength=STATES)
    counts = [_counts(c, walks, d.n_features) for c, d in zip(codes, replacement.dictionaries, strict=True)]
    return {
        "accuracy": language.accuracy(_logits(replacement.model, tokens, replacement), walks),
        "states with a code": _owned(counts, visits),
        "that fires on half their visits": _owned(counts, visits, 0.5),
        "mass moved": _swapped(replacement, walks),
    }


def measure(seed: int, tell: Tell) -> Found:
    """A small model of a language of states, trained on with codebooks at every head and MLP."""
    language, g = StateLanguage.draw(seed), torch.Generator().manual_seed(5000 + seed)
    model = states.trained(language, BASE_STEPS, seed)
    train, walks = language.walks(WALKS, g), language.walks(1000, g)
    base = language.accuracy(_logits(model, tokens_of(walks), None), walks)
    found: Found = {}
    for i, name in enumerate(("codebooks", FROZEN, RANDOM)):
        tell(1 + i, 4, name)
        own = load_model(copy.deepcopy(model.module), name="states")
        replacement = Replacement(own, _codebooks(seed))
        stream = harvest(own, list(tokens_of(train).split(SEQUENCES)), PLACES, tokens=None)
        for d in replacement.dictionaries if name == FROZEN else ():
            d.prepare(d.gather([next(iter(stream))]))
            d.atoms.weight.requires_grad_(False)
        if name == RANDOM:
            for d in replacement.dictionaries:
                d.prepare(d.gather([next(iter(stream))]))
        else:
            finetune(replacement, stream, STEPS, batch_size=SEQUENCES, seed=seed)
        found[name] = _scores(replacement, language, walks)
    return {"base": base, "found": found}


def judge(found: Found) -> Reproduction:
    """Accuracy, codes and swaps of the trained codebooks against those of the data."""
    base, found = found["base"], found["found"]
    mine = found["codebooks"]
    ratio = [a / b for a, b in zip(mine["accuracy"], base, strict=True)]
    random = found[RANDOM]
    return Reproduction(
        title="A model can work through codebooks, whose codes are its states",
        source="Tamkin et al. 2023, arXiv 2310.17230",
        setting=f"a walk on {STATES} states with {states.EDGES} ways out of each, written as two digits; {states.LAYERS} layers, {states.WIDTH} wide; codebooks at {states.HEADS} heads (64 codes each) and the MLP (128) of every layer, k = 1; {STEPS} steps with them in place",
        claims=[
            Claim("accuracy of transitions over the model's without codebooks", "about the same (table 1)", ratio, ">=", 0.98, [a / b for a, b in zip(random["accuracy"], base, strict=True)], "codes of the data, nothing trained on"),
            Claim("share of states with a code of precision 0.9", "97 % precision (section 4)", mine["states with a code"], ">=", 0.8, random["states with a code"], "codes of the data, nothing trained on"),
            Claim("share of the mass by which the next digit differs that moves from one state's to another's, when all codes at a position are swapped for those of another walk there", "redirects (figure)", mine["mass moved"], ">=", 0.8, random["mass moved"], "codes of the data, nothing trained on"),
        ],
        figure=bars("Codebooks in a model of states", "share", {name: found[name] for name in found}),
        controls={key: {n: m[key] for n, m in found.items()} for key in mine},
    )  # fmt: skip


ROW = Row(measure, judge)
