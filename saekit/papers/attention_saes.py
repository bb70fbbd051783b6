"""Attention SAEs: features of what heads gather, put down to heads, sources and what was written there (2406.17759)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saekit.circuits import attention_saes
from saekit.circuits.frozen import Frozen
from saekit.circuits.places import Neurons, place
from saekit.circuits.rows import Trace
from saekit.circuits.weights import Weights, weights
from saekit.dictionaries import Dictionary, create
from saekit.graph import KINDS
from saekit.harvest import harvest
from saekit.models import Model
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed import induction
from saekit.testbed.tasks import trained

POINT = "blocks.{}.self_attn.o_proj:in"
WIDTH, K, STEPS, BATCH, LR, SEQUENCES = 128, 2, 800, 1024, 2e-3, 4096
SAE = "SAE"
JUDGED, OFTEN = (
    120,
    10,
)  # sequences that features are chosen on, and as many that they are judged on; firings of a feature
TRACED, PAIRS = (
    60,
    12,
)  # sequences whose shares are followed further, and pairs of head and source of each firing
MASS, SHIFTED, ONE = "right source", "another source", "one token"
ONES, LIVE, BY_WEIGHTS = "features of one token", "live features", "strongest head is the one by weights"
FOLLOWED, CLEAR = (
    "RDFA",
    0.8,
)  # of a feature's firings that have one token at the right source, for a feature of it


def _dictionaries(model: Model, seed: int) -> tuple[dict[str, Dictionary], Dictionary]:
    """Of the second layer's heads an SAE and its controls, and an SAE of the first layer's heads."""
    shape: dict[str, Any] = {"d_in": induction.WIDTH, "n_features": WIDTH, "k": K, "seed": seed}
    ds = {SAE: create("topk", **shape), FROZEN: create("frozen", **shape), "below": create("topk", **shape)}
    for name, d in ds.items():
        d.reads = d.writes = (POINT.format(0 if name == "below" else 1),)
    tokens, _ = induction.sequences(SEQUENCES, torch.Generator().manual_seed(2000 + seed))
    stream = harvest(model, tokens, [POINT.format(0), POINT.format(1)], tokens=None)
    fit_all(ds, stream, STEPS, BATCH, lr=LR, seed=seed)
    below = ds.pop("below")
    return {**ds, RANDOM: untrained(ds[FROZEN])}, below


def _firings(model: Model, record: Weights, d: Dictionary, tokens: Tensor, periods: Tensor, g: torch.Generator) -> dict[str, Tensor]:  # fmt: skip
    """Of every firing of a feature at a token that has come before: the share of its DFA on the right source, and on
    another one, ``token`` at the right source, and ``miss``, by how much DFA is off."""
    out: dict[str, list[Tensor]] = {
        key: [] for key in ("feature", MASS, SHIFTED, "token", "miss", BY_WEIGHTS)
    }
    by_weights = attention_saes.head_shares(d, induction.HEADS).argmax(1)
    for row, period in zip(tokens, periods.tolist(), strict=True):
        frozen = Frozen(record, row)
        ((part, read, _),) = place(frozen, model, d).parts
        shares = attention_saes.by_source(frozen, part, read)
        size = torch.maximum(part.values.abs(), shares.flatten(1).norm(dim=1))
        out["miss"].append((shares.sum((1, 2)) + part.b - part.values).abs() / size)
        known = part.positions > period
        at, feature, by_source = part.positions[known], part.features[known], shares[known].sum(1)
        mass = by_source / by_source.abs().sum(1, keepdim=True)
        right, rows = at - period + 1, torch.arange(len(at))
        drawn = (torch.rand(len(at), generator=g) * at).long()
        out["feature"].append(feature)
        out[MASS].append(mass[rows, right])
        out[SHIFTED].append(mass[rows, torch.where(drawn >= right, drawn + 1, drawn)])
        out["token"].append(row[right])
        out[BY_WEIGHTS].append(shares[known].sum(2).argmax(1) == by_weights[feature])
    return {key: torch.cat(parts) for key, parts in out.items()}


def _by_feature(firings: Mapping[str, Tensor], key: str) -> Tensor:
    """Mean over the firings of each feature."""
    n = torch.bincount(firings["feature"], minlength=WIDTH)
    return torch.bincount(firings["feature"], firings[key].double(), WIDTH) / n.clamp(min=1)


def _tokens(firings: Mapping[str, Tensor]) -> Tensor:
    """How often each feature fires where each token stands at the right source."""
    counts = torch.zeros(WIDTH, induction.VOCABULARY, dtype=torch.float64)
    ones = torch.ones(len(firings["token"]), dtype=torch.float64)
    return counts.index_put_((firings["feature"], firings["token"]), ones, accumulate=True)


def _judged(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> dict[str, float]:
    """Of the feature that is clearest on other text, and of all that fire often there."""
    often = torch.bincount(first["feature"], minlength=WIDTH) >= OFTEN
    again = torch.bincount(second["feature"], minlength=WIDTH) > 0
    counts = _tokens(first)
    most, token = counts.max(1)
    best = int((2 * most - counts.sum(1)).where(again, -torch.inf).argmax())  # its token less all others
    same = {**second, ONE: second["token"] == token[second["feature"]]}
    one = _by_feature(same, ONE)
    return {
        MASS: _by_feature(second, MASS)[best].item(),
        SHIFTED: _by_feature(second, SHIFTED)[best].item(),
        ONE: one[best].item(),
        ONES: (one >= CLEAR)[often & again].double().mean().item(),
        LIVE: int((often & again).sum()),
        BY_WEIGHTS: second[BY_WEIGHTS].double().mean().item(),
        "miss": max(first["miss"].max().item(), second["miss"].max().item()),
        "best": best,
    }


def _followed(model: Model, record: Weights, d: Dictionary, below: Dictionary, best: int, tokens: Tensor, periods: Tensor) -> dict[str, float]:  # fmt: skip
    """RDFA of a feature's firings: how far it is off, and how often the token at the right source is strongest there."""
    misses, there = [], []
    for row, period in zip(tokens, periods.tolist(), strict=True):
        frozen = Frozen(record, row)
        run = Trace(frozen, [place(frozen, model, stand) for stand in (d, below, Neurons("blocks.0.mlp"))])
        own = next(o for o in run.parts if o.stand == 0)
        shares = attention_saes.by_source(frozen, own.part, own.read)
        leaves = torch.from_numpy(run.columns.table().kind != KINDS.index("feature"))
        at = own.part.positions
        for entry in ((own.part.features == best) & (at > period)).nonzero()[:, 0].tolist():
            top = shares[entry].abs().flatten().topk(PAIRS).indices
            pairs = torch.stack([top // shares.shape[2], top % shares.shape[2]], 1)
            true = shares[entry, pairs[:, 0], pairs[:, 1]]
            for through in (False, True):
                rows, bias = attention_saes.recursive(run, own, entry, pairs, through)
                rows = rows * leaves if through else rows
                size = torch.maximum(true.abs(), rows.norm(dim=1))
                misses.append(((rows.sum(1) + bias - true).abs() / size).max().item())
            right = int(at[entry]) - period + 1
            leaves_there = rows[pairs[:, 1] == right].sum(0)
            there.append(int(leaves_there[run.tokens].abs().argmax()) == right)
    return {"miss": max(misses), "token there": sum(there) / len(there)}


def measure(seed: int, tell: Tell) -> Found:
    """SAEs of what the heads of a small model gather that has learnt induction, and controls."""
    model = trained("induction", seed).model
    tell(1, 4, "training dictionaries")
    ds, below = _dictionaries(model, seed)
    tell(2, 4, "attribution to sources")
    record, g = weights(model), torch.Generator().manual_seed(3000 + seed)
    texts = [induction.sequences(JUDGED, g) for _ in range(2)]
    out: Found = {}
    for name, d in ds.items():
        out[name] = _judged(*(_firings(model, record, d, *text, g) for text in texts))
    tell(3, 4, "attribution further down")
    some = [part[:TRACED] for part in texts[1]]
    out[FOLLOWED] = _followed(model, record, ds[SAE], below, int(out[SAE]["best"]), *some)
    return out


def judge(found: Found) -> Reproduction:
    """Conservation, and where the best feature's value comes from, beside controls."""
    own, followed = found[SAE], found[FOLLOWED]
    kinds, shown = (SAE, FROZEN, RANDOM), (MASS, SHIFTED, ONE, ONES)
    none = "no number at this scale"
    return Reproduction(
        title="Features of what heads gather are put down to the right heads and tokens",
        source="Kissane et al. 2024, arXiv 2406.17759",
        setting=f"2-layer models that have learnt induction (one a seed), {WIDTH} features of what the second layer's heads gather, k = {K}, {STEPS * BATCH:,} positions; firings at tokens that have come before, in {JUDGED} sequences; the best feature is the one that fires most at one token, less at others, in as many others",
        claims=[
            Claim("DFA and bias against the feature's value, largest relative miss", "an identity", own["miss"], "<=", 1e-4),
            Claim("RDFA against DFA, directly and down to tokens, errors and biases, largest relative miss", "an identity", followed["miss"], "<=", 1e-4),
            Claim("best feature: share of its DFA on the token after the previous occurrence", "induction features look there (figures)", own[MASS], ">=", 0.8, own[SHIFTED], "another source, drawn at random"),
            Claim("best feature: share of its firings that have its token there", "'this token is next by induction' features (figures)", own[ONE], ">=", 0.8, found[RANDOM][ONE], RANDOM),
            Claim("live features that are of one token", none, own[ONES], ">=", 0.4, found[RANDOM][ONES], RANDOM),
            Claim("RDFA of the best feature's right source: firings whose strongest token is the one there", none, followed["token there"], ">=", 0.8),
        ],
        figure=bars("Features of the second layer's heads", "share", {name: {key: found[name][key] for key in shown} for name in kinds}),
        notes=[
            "Features of a random dictionary have their DFA on the right source as well: all heads of the layer look there, and DFA is made of that. What the SAE adds is that a feature stands for one token.",
        ],
        controls={key: {name: found[name][key] for name in kinds} for key in (*shown, LIVE, BY_WEIGHTS)},
    )  # fmt: skip


ROW = Row(measure, judge)
