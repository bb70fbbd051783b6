"""Sparse attention decomposition: heads look by few singular directions of their scores (2410.00340)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from saekit.circuits import directions
from saekit.circuits.directions import Firing, Writer
from saekit.circuits.frozen import Frozen
from saekit.circuits.weights import Weights, weights
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.row import Found, Row
from saekit.testbed import induction
from saekit.testbed.handbuilt import SHARP, Builder
from saekit.testbed.tasks import trained

DIMS, CONTEXT = 16, 17  # of every head; of the planted prompts
PAIRS, FILLERS = 4, 16  # bigrams that the planted head looks for; other tokens
NOISE = 0.1  # of the size of scores, in the directions that no bigram takes
PROMPTS, SEQUENCES = 60, 12
MASS = 0.9
PLANTED, NOISY, RANDOM = "planted head", "planted head with noise", "random head"
INDUCTION = "trained induction heads"
KEPT, BY_MASS = "directions in S", "directions with 90 % of the terms' sizes"
ERROR = "largest error of the sum"
CUT, CUT_RANDOM = "attention cut", "attention cut by other directions"
FOUND, AT_QUERY = "strongest writer looks at the token before", "the same on the query's side"
LOST, LOST_RANDOM = "probability lost", "probability lost by other directions"


def _planted(seed: int) -> Weights:
    """Two layers: a previous-token head, and behind it heads that look for bigrams, without and with noise, and one of random weights."""
    n = 1 + 2 * PAIRS + FILLERS
    b = Builder({"tok": n, "prev": PAIRS, "pos": CONTEXT, "out": FILLERS}, n, CONTEXT, layers=2)
    tok, prev, pos, out = (b.rows(space) for space in b.spaces)
    asking, asked, fillers = tok[1 : 1 + PAIRS], tok[1 + PAIRS : 1 + 2 * PAIRS], tok[1 + 2 * PAIRS :]
    g = torch.Generator().manual_seed(1000 + seed)

    def drawn(rows: int) -> Tensor:
        return torch.randn(rows, b.n, generator=g) / b.n**0.5

    b.W_E += tok
    b.W_pos += pos
    b.W_U[n - FILLERS :] = out
    b.head(0, [(SHARP * pos[1:], pos[:-1])], [(asked, prev)])
    # different strengths: directions of the same sigma can't be told apart
    strong = SHARP * torch.linspace(1.5, 1, PAIRS)[:, None]
    b.head(1, [(strong * asking, prev)], [(fillers, out)])
    beside = (NOISE * SHARP * drawn(DIMS - PAIRS), drawn(DIMS - PAIRS))
    b.head(1, [(strong * asking, prev), beside], [(fillers, out)])
    b.head(1, [(SHARP * drawn(DIMS), drawn(DIMS))], [(fillers, out)])
    return weights(b.finish(lambda n, g: [], range(n - FILLERS, n), rotate=True, seed=seed).model)


def _prompt(g: torch.Generator) -> tuple[Tensor, int]:
    """Random tokens that end in the asking token of a bigram, and the position behind the token it looks for."""
    pair, at = (
        int(torch.randint(low, high, (), generator=g)) for low, high in ((0, PAIRS), (1, CONTEXT - 4))
    )
    others = [t for t in range(1, 1 + 2 * PAIRS + FILLERS) if t != 1 + PAIRS + pair]
    tokens = torch.tensor(others)[torch.randint(len(others), (CONTEXT,), generator=g)]
    tokens[0], tokens[at], tokens[-1] = 0, 1 + PAIRS + pair, 1 + pair
    return tokens, at + 1


def _sparsity(firing: Firing) -> dict[str, float]:
    terms = firing.terms
    score = float(firing.frozen.queries[firing.layer].scores[firing.head, firing.query, firing.source])
    sizes = terms.abs().sort(descending=True).values
    return {
        ERROR: abs(float(terms.sum()) - score) / float(terms.norm()),
        KEPT: len(firing.kept),
        BY_MASS: int((sizes.cumsum(0) < MASS * sizes.sum()).sum()) + 1,
    }


def _others(firing: Firing, g: torch.Generator) -> Tensor:
    """As many directions that are not kept, as far as there are."""
    rest = torch.ones(DIMS, dtype=torch.bool)
    rest[firing.kept] = False
    where = rest.nonzero()[:, 0]
    return where[torch.randperm(len(where), generator=g)[: len(firing.kept)]]


def _removed(firing: Firing, g: torch.Generator) -> list[list[directions.Change]]:
    """What the firing's directions, and as many others, read of the heads before it, taken away at the source."""
    names, written = directions.writers(firing.frozen, firing.layer)
    heads = torch.tensor([name.kind == "head" for name in names])
    of = written[heads, firing.source].sum(0)
    return [
        [directions.scaled(firing, "source", of, 0.0, some)] for some in (firing.kept, _others(firing, g))
    ]


def _cuts(firing: Firing, changes: Sequence[Sequence[directions.Change]]) -> dict[str, float]:
    was = float(firing.frozen.seen[firing.layer]["patterns"][firing.head, firing.query, firing.source])
    cut, other = (1 - directions.attention_with(firing, change) / was for change in changes)
    return {CUT: cut, CUT_RANDOM: other}


def _lost(firing: Firing, changes: Sequence[Sequence[directions.Change]]) -> dict[str, float]:
    """How much of the probability of the token at the source goes, where all behind the firing's layer responds."""
    answer = firing.frozen.tokens[firing.source]
    after = [directions.logits_with(firing, change) for change in changes]
    was, own, other = (float(x[firing.query].softmax(-1)[answer]) for x in (firing.frozen.logits, *after))
    return {LOST: was - own, LOST_RANDOM: was - other}


def _traced(firing: Firing) -> dict[str, float]:
    """Whether what adds most on each side is a head that looks at the token before."""
    out = {}
    for name, side in ((FOUND, "source"), (AT_QUERY, "query")):
        shares = {w: s for w, s in directions.upstream(firing, side).items() if w.kind != "bias"}
        best: Writer = max(shares, key=lambda writer: shares[writer])
        at = firing.position(side)
        looks = (
            best.kind == "head"
            and firing.frozen.seen[best.layer]["patterns"][best.head, at].argmax() == at - 1
        )
        out[name] = float(looks)
    return out


def _summary(of: Sequence[dict[str, float]]) -> dict[str, float]:
    means = {key: sum(one[key] for one in of) / len(of) for key in of[0]}
    return {**means, ERROR: max(one[ERROR] for one in of), "firings": len(of)}


def measure(seed: int, tell: Tell) -> Found:
    """A planted head beside a random one, and the heads of a small model that has learnt induction."""
    g = torch.Generator().manual_seed(seed)
    planted = _planted(seed)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (PLANTED, NOISY, RANDOM, INDUCTION)}
    for _ in range(PROMPTS):
        tokens, source = _prompt(g)
        frozen = Frozen(planted, tokens)
        for head, name in enumerate((PLANTED, NOISY)):
            own = Firing(frozen, 1, head, CONTEXT - 1, source)
            found[name].append({**_sparsity(own), **_cuts(own, _removed(own, g))})
        found[RANDOM] += [_sparsity(firing) for firing in directions.firings(frozen, 1, 2)]
    tell(1, 3, "training a model on induction")
    learnt = weights(trained("induction", seed).model)
    tell(2, 3, "its heads")
    for tokens, period in zip(*induction.sequences(SEQUENCES, g), strict=True):
        frozen = Frozen(learnt, tokens)
        for head in range(induction.HEADS):
            own_firings = directions.firings(frozen, 1, head)
            mine = [f for f in own_firings if f.query > period and f.source == f.query - period + 1]
            for f in mine:
                changes = _removed(f, g)
                found[INDUCTION].append(
                    {**_sparsity(f), **_cuts(f, changes), **_lost(f, changes), **_traced(f)}
                )
    return {name: _summary(of) for name, of in found.items()}


def judge(found: Found) -> Reproduction:
    """How few directions a planted head looks by, and what is left without them."""
    planted, noisy, random, learnt = (found[name] for name in (PLANTED, NOISY, RANDOM, INDUCTION))
    worst = [max(values) for values in zip(*(one[ERROR] for one in found.values()), strict=True)]
    none = "no number at this scale"
    return Reproduction(
        title="Heads look by few singular directions of their scores",
        source="Franco & Crovella 2024, arXiv 2410.00340",
        setting=f"heads of {DIMS} dimensions: one built to look for {PAIRS} bigrams behind a previous-token head, without and with noise in its other directions, one of random weights, and those of a 2-layer model trained on induction; firings: at least {directions.FIRING:g} of the attention; removed from what the heads before wrote at the source",
        claims=[
            Claim("sum over directions against the score, largest relative error", "an identity (1e-3 in their code)", worst, "<=", 1e-5),
            Claim("planted head: directions in S, the smallest set whose terms reach the score", "a handful of 64 (GPT-2 small)", planted[KEPT], "<=", 2, random[KEPT], RANDOM),
            Claim("planted head with noise: directions with 90 % of the terms' sizes", none, noisy[BY_MASS], "<=", 2, random[BY_MASS], RANDOM),
            Claim("random head: directions with 90 % of the terms' sizes", none, random[BY_MASS], ">=", 8),
            Claim("random head: directions in S", none, random[KEPT], ">=", 8),
            Claim("planted head with noise: share of its attention that goes with what S reads", "interventions on S move attention, on others don't (figures)", noisy[CUT], ">=", 0.9, noisy[CUT_RANDOM], "as many other directions"),
            Claim("planted head with noise: share that goes with as many other directions", "about none", noisy[CUT_RANDOM], "<=", 0.15),
            Claim("induction heads: share of their attention that goes with what S reads", "interventions on S move attention, on others don't (figures)", learnt[CUT], ">=", 0.9, learnt[CUT_RANDOM], "as many other directions"),
            Claim("induction heads: share that goes with as many other directions", "about none", learnt[CUT_RANDOM], "<=", 0.15),
            Claim("induction heads: probability of the right token that goes with what S reads", "the logit difference moves (figures)", learnt[LOST], ">=", 0.5, learnt[LOST_RANDOM], "as many other directions"),
            Claim("induction heads: firings whose strongest writer in S at the source is a head that looks at the token before", "traced graphs find the known heads of IOI", learnt[FOUND], ">=", 0.9, learnt[AT_QUERY], "at the query"),
        ],
        figure=bars("Directions that a firing takes, of 16", "directions", {key: {name: m[key] for name, m in found.items()} for key in (KEPT, BY_MASS)}),
        notes=[
            "The rule of the paper takes terms from the largest down until they reach the score. In a random head nearly as many terms are negative as positive, so few of the positive ones reach it: S is small there for another reason than sparsity. By noise of a tenth of a planted head's scores it grows to what it is in a random head. The sizes of the terms tell the two apart.",
            "A trained induction head matches any of 63 tokens, and takes half of its 16 directions for it.",
        ],
        controls={key: {name: m[key] for name, m in found.items() if key in m} for key in (KEPT, BY_MASS, "firings")},
    )  # fmt: skip


ROW = Row(measure, judge)
