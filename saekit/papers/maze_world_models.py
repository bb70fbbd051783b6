"""A model that solves mazes has features of passages, and takes passages that only its features tell of (2412.11867)."""

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from saekit.analyses.world_models import Facts, aurocs, choose, continued, gathered, held
from saekit.dictionaries import Dictionary, create
from saekit.hooks import capture
from saekit.layers import attention
from saekit.metrics import fvu
from saekit.models import Model, load_model
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed.lattice import Change, Maze, changes
from saekit.testbed.solver import CONFIG, LATTICE, STEPS, solver
from saekit.testbed.transformer import Transformer

POINT = "blocks.0.hook_resid_post"
WIDTH, K, FITTED, BATCH, LR, MAZES = 256, 4, 500, 1024, 2e-3, 1500
CHOSEN, JUDGED = 600, 1000  # mazes that features are chosen on, and that they are judged on
TUNED, CHANGED = 100, 200  # mazes that strengths are chosen on, and that interventions are judged on
SOME = 4  # features of a passage
STRENGTHS, PLACES = (1.0, 2.0, 4.0), (1, 8)
CLEAR = 0.98
NUMBER = {frozenset(edge): i for i, edge in enumerate(LATTICE.edges)}
SECOND = 4 * torch.arange(LATTICE.passages) + 3  # positions of the listed passages' second cells
END = LATTICE.words[-1]
SAE, UNLEARNT = "SAE", "SAE of a model with random weights"
EDGES = "passages with a feature"
AFTER, USES, DIFFERS = "the other world's path", "uses the passage", "differs"
ADD, REMOVE = "added", "removed"
OTHER, SINGLE, ONCE, RANDOMLY, NOTHING, TOLD = "another passage's", "its clearest feature alone", "at their mean in one place", "random features", "no edit", "written in the prompt"  # fmt: skip


def _drawn(n: int, seed: int) -> list[Maze]:
    rng = random.Random(seed)
    return [LATTICE.draw(rng) for _ in range(n)]


def _tokens(mazes: Sequence[Maze]) -> Tensor:
    return torch.tensor([LATTICE.prompt(*one) for one in mazes])


def _read(model: Model, mazes: Sequence[Maze], point: str) -> Tensor:
    tokens = _tokens(mazes)
    given = model.inputs(tokens, torch.ones_like(tokens, dtype=torch.bool))
    return capture(lambda: model.logits(given), {"x": model.site(point)})["x"]


def _rows(model: Model, mazes: Sequence[Maze]) -> Tensor:
    """The stream behind the first block at each passage's second cell, where the passage is known."""
    return _read(model, mazes, POINT)[:, SECOND].flatten(0, 1)


def _written(mazes: Sequence[Maze]) -> Bool[Tensor, "row passage"]:
    numbers = torch.tensor([NUMBER[frozenset(one)] for passages, _, _ in mazes for one in passages])
    return torch.nn.functional.one_hot(numbers, len(NUMBER)).bool()


def _attended(model: Model, seed: int) -> Found:
    """Where heads of the first block look from second cells and from separators; the head is chosen on other mazes."""
    record, found = attention(model, "blocks.0.self_attn"), []
    for one in (seed, seed + 1):
        patterns = record.patterns(_read(model, _drawn(CHANGED, one), "blocks.0.self_attn:in"))
        own, before = (gathered(patterns, SECOND[1:], [back])[:, 0] for back in (2, 6))
        found.append((own, before, gathered(patterns, SECOND[1:] + 1, [1, 3]).sum(1)))
    head = int(found[0][0].argmax())
    own, before, separator = found[1]
    return {"own": own[head].item(), "before": before[head].item(), "separator": separator.max().item()}


def _dictionaries(x: Tensor, presets: dict[str, str], seed: int) -> dict[str, Dictionary]:
    ds = {
        name: create(preset, d_in=CONFIG.d_model, n_features=WIDTH, k=K, seed=seed)
        for name, preset in presets.items()
    }
    for d in ds.values():
        d.reads = d.writes = (POINT,)
    fit_all(ds, x, FITTED, BATCH, lr=LR, seed=seed)
    return ds


@torch.no_grad()
def _features(model: Model, d: Any, some: Sequence[Maze], other: Sequence[Maze]) -> tuple[Facts, Found]:
    """Features of passages, and how well they tell them on other mazes."""
    x = _rows(model, other)
    codes = d.encode(x)
    facts = choose(d.encode(_rows(model, some)), _written(some), SOME)
    clear = aurocs(codes, _written(other)).gather(0, facts.features[:, 0][None])[0]
    return facts, {
        EDGES: (clear >= CLEAR).double().mean().item(), "mean AUROC": clear.mean().item(), "FVU": fvu(x, d(x))
    }  # fmt: skip


def _scored(worlds: Sequence[Change], said: Tensor) -> Found:
    """Shares of paths that are the other world's, that use the passage, and that are not what they would be without it."""
    out = {AFTER: 0, USES: 0, DIFFERS: 0}
    for world, row in zip(worlds, said.tolist(), strict=True):
        way = [world.maze[1], *(row[: row.index(END)] if END in row else row)]
        out[AFTER] += way == world.after
        out[USES] += any(set(step) == set(world.passage) for step in pairwise(way))
        out[DIFFERS] += way != world.before
    return {key: count / len(worlds) for key, count in out.items()}


def _places(world: Change, n: int) -> list[int]:
    """Second cells of ``n`` passages on neither path, some of them again where there are fewer; of ``at`` first."""
    steps = {frozenset(step) for way in (world.before, world.after) for step in pairwise(way)}
    free = [i for i, passage in enumerate(world.maze[0]) if frozenset(passage) not in steps and i != world.at]
    every = [world.at, *free]
    return [int(SECOND[every[i % len(every)]]) for i in range(n)]


def _edited(
    model: Model, d: Any, facts: Facts, worlds: Sequence[Change], strength: float,
    places: int = 1, some: int = SOME, other: bool = False, generator: torch.Generator | None = None,
) -> Found:  # fmt: skip
    """Paths with a passage's features held at ``strength`` times their mean; 0 removes it where it is written.

    ``other``: those of a passage without which the path is the same. With a generator, features that it draws.
    """
    passages = [world.other if other else world.passage for world in worlds]
    numbers = torch.tensor([NUMBER[frozenset(passage)] for passage in passages])
    features, values = (one[numbers, :some] for one in (facts.features, strength * facts.mean))
    if generator is not None:
        features = torch.randint(d.n_features, features.shape, generator=generator)
    if strength:
        at = torch.tensor([_places(world, places) for world in worlds])
    else:
        at = SECOND[torch.tensor([[world.other_at if other else world.at] for world in worlds])]
    with held(model, d, features, at, values):
        said = continued(model, _tokens([world.maze for world in worlds]), END, LATTICE.cells)
    return _scored(worlds, said)


def _intervened(model: Model, d: Any, facts: Facts, tuned: Sequence[Change], add: Sequence[Change], remove: Sequence[Change], seed: int) -> Found:  # fmt: skip
    """Passages added, as strongly as suits other mazes, and removed, beside controls."""
    tries = {(s, n): _edited(model, d, facts, tuned, s, n)[AFTER] for n in PLACES for s in STRENGTHS}
    strength, places = max(tries, key=lambda key: tries[key])
    drawn = torch.Generator().manual_seed(seed)
    return {
        "strength": strength, "places": float(places),
        ADD: {
            SAE: _edited(model, d, facts, add, strength, places), OTHER: _edited(model, d, facts, add, strength, places, other=True),
            RANDOMLY: _edited(model, d, facts, add, strength, places, generator=drawn),
            SINGLE: _edited(model, d, facts, add, strength, places, 1), ONCE: _edited(model, d, facts, add, 1.0),
        },
        REMOVE: {
            SAE: _edited(model, d, facts, remove, 0.0), OTHER: _edited(model, d, facts, remove, 0.0, other=True),
            RANDOMLY: _edited(model, d, facts, remove, 0.0, generator=drawn), SINGLE: _edited(model, d, facts, remove, 0.0, some=1),
        },
    }  # fmt: skip


def _unedited(model: Model, worlds: Sequence[Change]) -> dict[str, Found]:
    """Paths of the mazes as they are, and with the passage written in place of one that no path needs."""
    out = {}
    for name, told in ((NOTHING, False), (TOLD, True)):
        mazes = []
        for world in worlds:
            passages, begin, end = world.maze
            listed = [world.passage if told and i == world.at else p for i, p in enumerate(passages)]
            mazes.append((listed, begin, end))
        out[name] = _scored(worlds, continued(model, _tokens(mazes), END, LATTICE.cells))
    return out


def _solved(model: Model, mazes: Sequence[Maze]) -> Found:
    """Shares of mazes with a path of passages to the end, and with a shortest one."""
    valid = shortest = 0
    for (passages, begin, end), row in zip(mazes, continued(model, _tokens(mazes), END, LATTICE.cells).tolist(), strict=True):  # fmt: skip
        way, there = (
            [begin, *(row[: row.index(END)] if END in row else row)],
            {frozenset(p) for p in passages},
        )
        valid += way[-1] == end and all(frozenset(step) in there for step in pairwise(way))
        shortest += way in LATTICE.shortest(passages, begin, end)
    return {"valid": valid / len(mazes), "shortest": shortest / len(mazes)}


def measure(seed: int, tell: Tell, folder: Path) -> Found:
    """A solver of mazes, features of passages in its stream, and what it does when they are changed."""
    total = STEPS + 4 * STEPS // 8

    def learning(step: int) -> None:
        tell(step, total, "learning to solve mazes")

    model, base = solver(seed, folder, on_step=learning), 100 * seed + 10_000
    tell(STEPS, total, "dictionaries")
    ds = _dictionaries(_rows(model, _drawn(MAZES, base)), {SAE: "topk", FROZEN: "frozen"}, seed)
    ds[RANDOM] = untrained(ds[FROZEN])
    some, other = _drawn(CHOSEN, base + 1), _drawn(JUDGED, base + 2)
    tuned, add = (changes(LATTICE, n, random.Random(base + i), True) for i, n in ((3, TUNED), (4, CHANGED)))
    remove = changes(LATTICE, CHANGED, random.Random(base + 5), False)
    raw = load_model(Transformer(CONFIG, 1000 + seed).eval(), name="random weights")
    unlearnt = _dictionaries(_rows(raw, _drawn(MAZES, base)), {UNLEARNT: "topk"}, seed)[UNLEARNT]
    out: Found = {
        "solved": _solved(model, other), "attended": _attended(model, base + 6),
        "read": {UNLEARNT: _features(raw, unlearnt, some, other)[1]}, "edited": {},
    }  # fmt: skip
    for i, (name, d) in enumerate(ds.items(), 1):
        tell(STEPS + i * STEPS // 8, total, f"interventions: {name}")
        facts, out["read"][name] = _features(model, d, some, other)
        out["edited"][name] = _intervened(model, d, facts, tuned, add, remove, base)
    out["unedited"] = {ADD: _unedited(model, add), REMOVE: {NOTHING: _unedited(model, remove)[NOTHING]}}
    return out


def judge(found: Found) -> Reproduction:
    """Features of passages, attention that gathers them, and passages added; what removing does is told beside it."""
    read, edited, unedited, seen = found["read"], found["edited"], found["unedited"], found["attended"]
    own = edited[SAE]

    gap, once = (
        [a - b for a, b in zip(own[ADD][how][AFTER], own[REMOVE][SAE][AFTER], strict=True)]
        for how in (SAE, ONCE)
    )
    shown = {**{f"{kind}: {name}": own[kind][key] for kind in (ADD, REMOVE) for name, key in (("its features", SAE), (SINGLE, SINGLE), (OTHER, OTHER))}, "nothing added": unedited[ADD][NOTHING], f"{ADD}: {TOLD}": unedited[ADD][TOLD]}  # fmt: skip
    return Reproduction(
        title="A solver of mazes knows passages by features, and goes through passages that only features tell of",
        source="Spies, Edwards, Ivanitskiy et al. 2024, arXiv 2412.11867",
        setting=f"{LATTICE.side} x {LATTICE.side} cells, {LATTICE.passages} passages of {len(LATTICE.edges)}, up to {LATTICE.moved} of a random tree's standing elsewhere; 3 layers of width {CONFIG.d_model}, {STEPS} steps: {fmean(found['solved']['shortest']):.1%} of paths are shortest ones, {fmean(found['solved']['valid']):.1%} valid. {WIDTH} features, k = {K}, of the stream behind the first block at passages' second cells; features chosen on {CHOSEN} mazes, judged on {JUDGED}; strengths chosen on {TUNED}, interventions judged on {CHANGED}, right or wrong without them",
        claims=[
            Claim(f"passages that a feature tells from all others with an AUROC of {CLEAR}", "one or few features for each connection", read[SAE][EDGES], ">=", 0.9, read[UNLEARNT][EDGES], UNLEARNT),
            Claim("attention of a head of the first block from a passage's second cell to its first one", "heads that gather a connection in its separator (figures)", seen["own"], ">=", 0.8, seen["before"], "to the first cell of the passage before"),
            Claim(f"passage added by {SOME} features: paths that are then the shortest of the other world", "added connections are taken (figures)", own[ADD][SAE][AFTER], ">=", 0.7, own[ADD][OTHER][AFTER], "features of another passage"),
        ],
        figure=bars("Paths with a passage added or removed by its features", "share of paths", {key: {name: one[key] for name, one in shown.items()} for key in (AFTER, USES, DIFFERS)}),
        notes=[
            f"Adding less removing: {fmean(gap):+.2f} of paths ({', '.join(f'{one:+.2f}' for one in gap)} by seed), and {fmean(once):+.2f} where what is added is in one place and no stronger than it would be there, as what is removed is. Added: {fmean(own[ADD][SAE][AFTER]):.2f} become the other world's path, {fmean(own[ADD][SAE][USES]):.2f} use the passage, {fmean(own[ADD][SAE][DIFFERS]):.2f} differ; removed, with the features set to 0: {fmean(own[REMOVE][SAE][AFTER]):.2f}, {fmean(own[REMOVE][SAE][USES]):.2f} and {fmean(own[REMOVE][SAE][DIFFERS]):.2f}. The paper found that removing works less reliably.",
            f"At their mean in one place the features make {fmean(own[ADD][ONCE][AFTER]):.2f} of paths the other world's, and the clearest of them alone, as strongly as all, {fmean(own[ADD][SINGLE][AFTER]):.2f}. Strengths and places that suited other mazes: {', '.join(f'{s:g} x the mean in {n:g}' for s, n in zip(own['strength'], own['places'], strict=True))}. With the passage written in the prompt instead, {fmean(unedited[ADD][TOLD][AFTER]):.2f}.",
            f"Unlike the paper's, these models gather a passage in its second cell, not in the separator behind it: there no head gives the passage's two cells more than {fmean(seen['separator']):.2f}. Features are read and held at second cells. Of the seeds' heads the least sharp one gives the first cell {min(seen['own']):.2f}.",
            f"Passages lie so far apart there that features of atoms that nothing has learnt tell {fmean(read[FROZEN][EDGES]):.0%} (trained encoder) and {fmean(read[RANDOM][EDGES]):.0%} of them as clearly: AUROCs alone don't show that a dictionary has learnt passages. Held as strongly as suits them, they make {fmean(edited[FROZEN][ADD][SAE][AFTER]):.2f} and {fmean(edited[RANDOM][ADD][SAE][AFTER]):.2f} of paths the other world's.",
            f"Width, k and the number of features were chosen on mazes of seed 0. Where {STEPS} steps of Muon leave {1 - fmean(found['solved']['shortest']):.1%} of paths wrong, most of them long ones, 10,000 of AdamW left 11 % (one seed, in more time).",
        ],
        controls={
            **{key: {name: read[name][key] for name in (SAE, FROZEN, RANDOM, UNLEARNT)} for key in (EDGES, "mean AUROC", "FVU")},
            **{f"{kind}: {key}": {**{name: edited[name][kind][SAE][key] for name in edited}, **{f"{SAE}, {name}": own[kind][name][key] for name in own[kind] if name != SAE}, **{name: one[key] for name, one in unedited[kind].items()}} for kind in (ADD, REMOVE) for key in (AFTER, USES, DIFFERS)},
            "strength": {name: one["strength"] for name, one in edited.items()},
        },
    )  # fmt: skip


def _kept(folder: Path) -> None:
    """A place for the models, so that a row that was stopped needn't learn them again."""
    folder.mkdir(parents=True, exist_ok=True)


ROW = Row(measure, judge, common=_kept, slow=True)
