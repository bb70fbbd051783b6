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
NOISE = 0.1  # of the size of scores, in the directions of the planted head that no bigram takes
PROMPTS, SEQUENCES = 60, 12
MASS = 0.9
PLANTED, RANDOM, INDUCTION = "planted head", "random head", "trained induction heads"
KEPT, BY_MASS, ERROR = (
    "directions, the paper's rule",
    "directions with 90 % of the terms' sizes",
    "error of the sum",
)
CUT, CUT_RANDOM = "attention cut", "attention cut by other directions"
FOUND, AT_QUERY = "strongest writer looks at the token before", "the same on the query's side"
LOST, LOST_RANDOM = "probability lost", "probability lost by other directions"


def _planted(seed: int) -> Weights:
    """Two layers: a previous-token head, and behind it a head that looks for bigrams and one with random weights."""
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


def _cuts(firing: Firing, g: torch.Generator) -> dict[str, float]:
    """What is left of a firing when what its directions read of the heads before it is removed at the source."""
    names, written = directions.writers(firing.frozen, firing.layer)
    heads = torch.tensor([name.kind == "head" for name in names])
    of = written[heads, firing.source].sum(0)
    was = float(firing.frozen.seen[firing.layer]["patterns"][firing.head, firing.query, firing.source])
    changes = [
        [directions.scaled(firing, "source", of, 0.0, some)] for some in (firing.kept, _others(firing, g))
    ]
    cut, other = (1 - directions.attention_with(firing, change) / was for change in changes)
    answer = int(firing.frozen.tokens[firing.source])
    before = float(firing.frozen.logits[firing.query].softmax(-1)[answer])
    after = [
        float(directions.logits_with(firing, change)[firing.query].softmax(-1)[answer]) for change in changes
    ]
    return {CUT: cut, CUT_RANDOM: other, LOST: before - after[0], LOST_RANDOM: before - after[1]}


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


def _mean(of: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: sum(one[key] for one in of) / len(of) for key in of[0]} | {"firings": len(of)}


def measure(seed: int, tell: Tell) -> Found:
    """A planted head beside a random one, and the heads of a small model that has learnt induction."""
    g = torch.Generator().manual_seed(seed)
    planted = _planted(seed)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in (PLANTED, RANDOM, INDUCTION)}
    for _ in range(PROMPTS):
        tokens, source = _prompt(g)
        frozen = Frozen(planted, tokens)
        own = Firing(frozen, 1, 0, CONTEXT - 1, source)
        found[PLANTED].append({**_sparsity(own), **_cuts(own, g), **_traced(own)})
        found[RANDOM] += [_sparsity(firing) for firing in directions.firings(frozen, 1, 1)]
    tell(1, 3, "training a model on induction")
    learnt = weights(trained("induction", seed).model)
    tell(2, 3, "its heads")
    for tokens, period in zip(*induction.sequences(SEQUENCES, g), strict=True):
        frozen = Frozen(learnt, tokens)
        for head in range(induction.HEADS):
            own_firings = directions.firings(frozen, 1, head)
            mine = [f for f in own_firings if f.query > period and f.source == f.query - period + 1]
            found[INDUCTION] += [{**_sparsity(f), **_cuts(f, g), **_traced(f)} for f in mine]
    return {name: _mean(of) for name, of in found.items()}


def judge(found: Found) -> Reproduction:
    """How few directions a planted head looks by, and what is left without them."""
    planted, random, learnt = found[PLANTED], found[RANDOM], found[INDUCTION]
    worst = [max(values) for values in zip(*(one[ERROR] for one in found.values()), strict=True)]
    none = "no number at this scale"
    return Reproduction(
        title="Heads look by few singular directions of their scores",
        source="Franco & Crovella 2024, arXiv 2410.00340",
        setting=f"heads of {DIMS} dimensions: one built to look for {PAIRS} bigrams behind a previous-token head, with noise in its other directions, one of random weights, and those of a 2-layer model trained on induction; firings: at least {directions.FIRING:g} of the attention; removed from what the heads before wrote at the source",
        claims=[
            Claim("sum over directions against the score, mean relative error", "an identity (1e-3 in their code)", worst, "<=", 1e-5),
            Claim("planted head: directions in S, the smallest set whose terms reach the score", "a handful of 64 (GPT-2 small)", planted[KEPT], "<=", 2, random[KEPT], RANDOM),
            Claim("planted head: directions with 90 % of the terms' sizes", none, planted[BY_MASS], "<=", 2, random[BY_MASS], RANDOM),
            Claim("random head: directions with 90 % of the terms' sizes", none, random[BY_MASS], ">=", 8),
            Claim("random head: directions in S", none, random[KEPT], ">=", 8),
            Claim("planted head: share of its attention that goes with what S reads", "interventions on S move attention, on others don't (figures)", planted[CUT], ">=", 0.9, planted[CUT_RANDOM], "as many other directions"),
            Claim("planted head: share that goes with as many other directions", "about none", planted[CUT_RANDOM], "<=", 0.15),
            Claim("induction heads: share of their attention that goes with what S reads", "interventions on S move attention, on others don't (figures)", learnt[CUT], ">=", 0.9, learnt[CUT_RANDOM], "as many other directions"),
            Claim("induction heads: share that goes with as many other directions", "about none", learnt[CUT_RANDOM], "<=", 0.15),
            Claim("induction heads: firings whose strongest writer in S at the source is a head that looks at the token before", "traced graphs find the known heads of IOI", learnt[FOUND], ">=", 0.9, learnt[AT_QUERY], "at the query"),
        ],
        figure=bars("Directions that a firing takes, of 16", "directions", {key: {name: m[key] for name, m in found.items()} for key in (KEPT, BY_MASS)}),
        notes=[
            "The rule of the paper takes terms from the largest down until they reach the score. In a random head nearly as many terms are negative as positive, so few of the positive ones reach it: S is small there for another reason than sparsity, and only the sizes of the terms tell the two apart.",
            "A trained induction head matches any of 63 tokens, and takes half of its 16 directions for it.",
        ],
        controls={key: {name: m[key] for name, m in found.items() if key in m} for key in (KEPT, BY_MASS, CUT, CUT_RANDOM, LOST, LOST_RANDOM, "firings")},
    )  # fmt: skip


ROW = Row(measure, judge)
