"""Circuits without patching, in the features of everything that writes to the stream of a model of Othello (2402.12201)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.circuits.qk import Heads
from saekit.circuits.rows import Trace
from saekit.circuits.targets import Feature
from saekit.circuits.trace import trace, traced
from saekit.dictionaries import Dictionary, create
from saekit.harvest import harvest
from saekit.hooks import capture
from saekit.models import Model, load_model
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed import othello
from saekit.testbed.tasks import Prompts, trained
from saekit.testbed.transformer import Transformer
from saekit.types import Codes

LAYERS = othello.TASK.config.n_layers
POINTS = ("layers.0:in", *(f"layers.{i}.{half}:out" for i in range(LAYERS) for half in ("self_attn", "mlp")))
WIDTH, K, STEPS, BATCH, LR, GAMES = 256, 16, 400, 512, 2e-3, 4000
SAE, UNLEARNT, PROBE = "SAE", "SAE of a model with random weights", "linear probes of the stream"
JUDGED = 500  # games that features are picked on, and as many that they are measured on
CLEAR = 0.95  # AUROC of a feature that tells mine from yours
TRACED, WHOLE = 20, 2  # games in which features are followed down, and of which there are whole graphs
KNOWN, BEST = "squares with a feature", "mean AUROC of the squares' best"
STRONGEST, OTHER, ANY = (
    "strongest move touched the square",
    "of another feature's",
    "a move drawn from those so far",
)


def _dictionaries(model: Model, presets: Mapping[str, str], seed: int) -> dict[str, list[Dictionary]]:
    """Of each kind one dictionary for each place that is written, trained on the same games."""
    ds = {}
    for kind, preset in presets.items():
        for point in POINTS:
            ds[f"{kind} {point}"] = d = create(
                preset, d_in=othello.TASK.config.d_model, n_features=WIDTH, k=K, seed=seed
            )
            d.reads = d.writes = (point,)
    tokens = othello.prompts(GAMES, torch.Generator().manual_seed(2000 + seed)).tokens
    fit_all(ds, harvest(model, tokens, POINTS, tokens=None), STEPS, BATCH, lr=LR, seed=seed)
    return {kind: [ds[f"{kind} {point}"] for point in POINTS] for kind in presets}


@torch.no_grad()
def _codes(model: Model, stands: Sequence[Dictionary], tokens: Tensor) -> list[Codes]:
    """Codes of every dictionary at every position of games."""
    sites = {d.reads[0]: model.site(d.reads[0]) for d in stands}
    given = model.inputs(tokens, torch.ones_like(tokens, dtype=torch.bool))
    seen = capture(lambda: model.logits(given), sites, stop=False)
    return [d.encode(seen[d.reads[0]].flatten(0, 1)) for d in stands]


def aurocs(
    codes: Codes, mine: Bool[Tensor, "row square"], yours: Bool[Tensor, "row square"]
) -> Float[Tensor, "feature square"]:
    """How often a feature is larger where a square is mine than where it is yours, ties counted half; in [0, 1].

    Over all pairs of a row where the square is mine and one where it is yours; empty squares are left out.
    """
    rows, f, values = codes.row_ids(), codes.indices.flatten().long(), codes.values.flatten()
    on = values > 0
    rows, f, values = rows.flatten()[on], f[on], values[on]
    order = torch.argsort(values, stable=True)
    order = order[torch.argsort(f[order], stable=True)]
    rows, f = rows[order], f[order]
    a, b = (side[rows].double() for side in (mine, yours))
    ours, theirs = (
        torch.zeros(codes.n_features, a.shape[1], dtype=a.dtype).index_add_(0, f, x) for x in (a, b)
    )
    below = b.cumsum(0) - b - (theirs.cumsum(0) - theirs)[f]
    still_a, still_b = mine.sum(0) - ours, yours.sum(0) - theirs  # rows in which the feature is off
    won = torch.zeros_like(ours).index_add_(0, f, a * (below + still_b[f])) + 0.5 * still_a * still_b
    return won / (mine.sum(0) * yours.sum(0)).clamp(min=1)


def _boards(games: Prompts) -> tuple[Tensor, Tensor]:
    """Where squares are mine and where yours, [row, square]; nowhere where the game is over."""
    mine, yours = othello.boards(games.tokens)
    going = games.asked[..., None]
    return (mine & going).flatten(0, 1), (yours & going).flatten(0, 1)


def _read(model: Model, stands: Sequence[Dictionary], games: Sequence[Prompts]) -> dict[str, Any]:
    """Each square's clearest feature on the first games, and how clear it is on the second ones."""
    first, second = (
        torch.cat([aurocs(codes, *_boards(some)) for codes in _codes(model, stands, some.tokens)])
        for some in games
    )
    picked = torch.maximum(first, 1 - first).argmax(0)
    squares = torch.arange(othello.SQUARES)
    mine = first[picked, squares] > 0.5
    clear = torch.where(mine, second[picked, squares], 1 - second[picked, squares])
    return {"picked": picked.tolist(), **_summary(clear)}


def _summary(clear: Float[Tensor, " square"]) -> dict[str, float]:
    return {KNOWN: (clear >= CLEAR).double().mean().item(), BEST: clear.mean().item()}


def _probed(model: Model, games: Sequence[Prompts]) -> dict[str, float]:
    """What a linear probe of a layer's whole stream tells, fitted by least squares: a feature reads no more than that.

    Of the layer whose probes are the clearest on the games that they are fitted on.
    """
    found = []
    for layer in range(LAYERS):
        site, sides = {"x": model.site(f"layers.{layer}:out")}, []
        for some in games:
            given = model.inputs(some.tokens, torch.ones_like(some.tokens, dtype=torch.bool))
            x = capture(partial(model.logits, given), site, stop=False)["x"].flatten(0, 1)
            sides.append(torch.nn.functional.pad(x, (0, 1), value=1.0))
        mine, yours = _boards(games[0])
        probes = torch.zeros(sides[0].shape[1], othello.SQUARES)
        for square in range(othello.SQUARES):
            rows = mine[:, square] | yours[:, square]
            told = mine[rows, square].float() - yours[rows, square].float()
            probes[:, square] = torch.linalg.lstsq(sides[0][rows], told[:, None], driver="gelsd").solution[
                :, 0
            ]
        # aurocs takes what is on, above 0
        scores = [(x @ probes).sub((x @ probes).min() - 1) for x in sides]
        found.append([
            aurocs(Codes.from_dense(score), *_boards(some)).diagonal() for score, some in zip(scores, games, strict=True)
        ])  # fmt: skip
    return _summary(max(found, key=lambda pair: pair[0].mean().item())[1])


def touched(tokens: Tensor) -> Bool[Tensor, "n seq square"]:
    """The squares on which each move of games sets a disc or turns one over."""
    mine, yours = othello.boards(tokens)
    move = torch.nn.functional.one_hot(tokens, othello.SQUARES + 1)[..., :-1].bool()
    # behind a pass who moved moves again, and the disc just set is theirs
    again = (move & mine).any(-1, keepdim=True)
    own = torch.where(again, mine, yours)
    before = torch.cat([torch.zeros_like(yours[:, :1]), yours[:, :-1]], 1)
    return move | before & own & move.any(-1, keepdim=True)


def _sources(run: Trace, targets: Sequence[Feature]) -> Float[Tensor, "target position"]:
    """For each target by position: what the strongest feature of the embeddings there adds to it, over all paths."""
    own = next(part for part in run.parts if part.stand == 0)
    totals = run.targets(targets, through=True)[:, own.nodes].abs()
    out = torch.zeros(len(targets), run.seq, dtype=totals.dtype)
    return out.scatter_reduce(1, own.part.positions.expand(len(targets), -1), totals, "amax")


def _followed(
    run: Trace, read: Mapping[str, Any], moves: Tensor, generator: torch.Generator
) -> dict[str, list[float]]:
    """Of squares' features at their last firing in a game: whether the strongest move is one that touched the square.

    Beside it the same for another feature that fires there, and for a move drawn from those so far.
    """
    strongest, other, any_move = [], [], []
    for square, picked in enumerate(read["picked"]):
        stand, feature = divmod(picked, WIDTH)
        part = next(own.part for own in run.parts if own.stand == stand)
        at = part.positions[part.features == feature]
        if stand == 0 or not len(at) or not moves[: (last := int(at.max())) + 1, square].any():
            continue
        beside = [
            Feature(int(f), own.stand, last)
            for own in run.parts
            if own.stand == stand
            for f in own.part.features[own.part.positions == last].tolist()
            if f != feature
        ]
        drawn = beside[int(torch.randint(len(beside), (), generator=generator))]
        first, second = _sources(run, [Feature(feature, stand, last), drawn])[:, 1 : last + 1].argmax(1) + 1
        strongest.append(float(moves[first, square]))
        other.append(float(moves[second, square]))
        any_move.append(moves[1 : last + 1, square].float().mean().item())
    return {STRONGEST: strongest, OTHER: other, ANY: any_move}


def _scores(run: Trace) -> list[float]:
    """By how much sums over pairs miss the scores that heads have where they look most, over the larger of 1 and these."""
    heads, out = Heads(run), []
    for layer in range(LAYERS):
        for query in (run.seq // 2, run.seq - 1):
            for qk in heads.layer(layer, query):
                true = float(run.frozen.queries[layer].scores[qk.head[1]][qk.places])
                pairs = float((qk.query_parts.T.astype(np.float64) @ qk.key_parts.astype(np.float64)).sum())
                out.append(abs(pairs - true) / max(1.0, abs(true)))
    return out


def _circuits(model: Model, stands: Sequence[Dictionary], read: Mapping[str, Any], seed: int) -> Found:
    """Of some games: how far rows and scores close, and from which moves squares' features come."""
    g = torch.Generator().manual_seed(4000 + seed)
    games = othello.held_out(TRACED, g).tokens
    out: dict[str, list[float]] = {key: [] for key in ("row", "score", STRONGEST, OTHER, ANY)}
    for i, (tokens, moves) in enumerate(zip(games, touched(games), strict=True)):
        run = traced(model, stands, tokens)
        if i < WHOLE:
            out["row"].append(float(trace(model, stands, tokens).closure().max()))
            out["score"].append(max(_scores(run)))
        for key, found in _followed(run, read, moves, g).items():
            out[key] += found
    misses = {key: max(out.pop(key)) for key in ("row", "score")}
    return {
        **misses,
        **{key: sum(v) / max(1, len(v)) for key, v in out.items()},
        "followed": len(out[STRONGEST]),
    }


def measure(seed: int, tell: Tell) -> Found:
    """Dictionaries of everything that writes to the stream of a model of Othello, and circuits of their features."""
    tell(0, 4, "learning the game")
    learnt = trained("othello", seed)
    tell(1, 4, "training dictionaries")
    stands = _dictionaries(learnt.model, {SAE: "topk", FROZEN: "frozen"}, seed)
    stands[RANDOM] = [untrained(d) for d in stands[FROZEN]]
    tell(2, 4, "training dictionaries of a model with random weights")
    other = load_model(Transformer(othello.TASK.config, 1000 + seed), name="random weights")
    g = torch.Generator().manual_seed(3000 + seed)
    games = [othello.held_out(JUDGED, g) for _ in range(2)]
    read = {kind: _read(learnt.model, ds, games) for kind, ds in stands.items()}
    read[UNLEARNT] = _read(other, _dictionaries(other, {UNLEARNT: "topk"}, seed)[UNLEARNT], games)
    read[PROBE] = _probed(learnt.model, games)
    tell(3, 4, "circuits")
    circuits = _circuits(learnt.model, stands[SAE], read[SAE], seed)
    kept = {kind: {key: one[key] for key in (KNOWN, BEST)} for kind, one in read.items()}
    return {"legal": learnt.accuracy, "read": kept, "circuits": circuits}


def judge(found: Found) -> Reproduction:
    """Conservation, squares that have a feature, and where these come from."""
    read, circuits = found["read"], found["circuits"]
    none = "no number at this scale"
    return Reproduction(
        title="Circuits in features of all that writes to the stream add up; whether features know the board",
        source="He et al. 2024, arXiv 2402.12201",
        setting=f"Othello on {othello.SIZE}x{othello.SIZE}, {LAYERS}-layer models, one a seed ({sum(found['legal']) / len(found['legal']):.3f} of their likeliest moves are legal in games of openings that they never saw); {WIDTH} features, k = {K}, on the embeddings and on what each attention layer and MLP writes, {STEPS * BATCH:,} positions; features of squares are picked on {JUDGED} games and measured on as many others; circuits of {TRACED} further games",
        claims=[
            Claim("contributions, biases and errors against a feature's pre-activation, largest relative miss", "an identity", circuits["row"], "<=", 1e-4),
            Claim("pairs of features, errors and biases against attention scores, largest miss over the larger of 1 and the score", "an identity", circuits["score"], "<=", 1e-4),
            Claim(f"squares of which a feature tells mine from yours by an AUROC of {CLEAR}", "features of the board's state (figures)", read[SAE][KNOWN], ">=", 0.6, read[UNLEARNT][KNOWN], UNLEARNT),
            Claim("of the squares' clearest features the strongest move by total effects set or turned the square's disc", none, circuits[STRONGEST], ">=", 0.6, circuits[OTHER], "another feature that fires there"),
        ],
        figure=bars("Features of squares", "share or AUROC", read),
        notes=[
            f"Of the moves so far {sum(circuits[ANY]) / len(circuits[ANY]):.2f} set or turned a square's disc, on average.",
            f"What a feature tells is read by a linear encoder: where linear probes of the whole stream don't reach {CLEAR} (see the controls), the model plays by the rules without a board that is linear in its stream, and no width of a dictionary can be expected to find one.",
        ],
        controls={key: {name: read[name][key] for name in (SAE, FROZEN, RANDOM, UNLEARNT, PROBE)} for key in (KNOWN, BEST)},
    )  # fmt: skip


ROW = Row(measure, judge)
