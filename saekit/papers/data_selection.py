"""Samples of a task are found in a pool by the features that they fire (MoNA, 2503.15573)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from saekit.analyses.data_selection import POOLINGS, pooled, prototype, select
from saekit.dictionaries import Dictionary, create
from saekit.hooks import capture
from saekit.models import Model
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed import grammars
from saekit.testbed.grammars import CONFIG, GRAMMARS, POINT, texts

ROWS, EXEMPLARS, POOL, BATCH = 600, 8, 2400, 200  # texts
SHARES = (0.05, 0.02, 0.10)
WIDTH, K, STEPS = 128, 4, 400
TRAINED, CHANCE = "TopK", "at random"
RAW = {"raw cosine": False, "raw cosine, centred": True}  # less the pool's mean, which the paper's lacks


def _read(model: Model, tokens: Tensor) -> Tensor:
    return capture(lambda: model.module(tokens), {POINT: model.site(POINT)})[POINT]


def _dictionaries(model: Model, g: torch.Generator, seed: int) -> dict[str, Dictionary]:
    x = _read(model, texts(torch.randint(GRAMMARS, (ROWS,), generator=g), g)).flatten(0, 1)
    shape: dict[str, Any] = {"d_in": CONFIG.d_model, "n_features": WIDTH, "k": K, "seed": seed}
    ds = {TRAINED: create("topk", **shape), FROZEN: create("frozen", **shape)}
    fit_all(ds, x, STEPS, 512, lr=3e-3, seed=seed)
    return ds | {RANDOM: untrained(ds[FROZEN])}


def _chosen(d: Dictionary, how: str, pool: list[Tensor], exemplars: Tensor, count: int) -> Tensor:
    """Places in the pool of what a dictionary's codes choose, which passes by in batches."""
    one = prototype(pooled(d.encode(exemplars), how))
    return select((pooled(d.encode(x), how) for x in pool), one[None], count).samples


def _by_cosine(pool: Tensor, exemplars: Tensor, how: str, centred: bool, count: int) -> Tensor:
    """The same of activations themselves."""
    samples, own = (x.amax(1) if how == "max" else x.mean(1) for x in (pool, exemplars))
    centre = samples.mean(0) if centred else torch.zeros(samples.shape[1])
    return (normalize(samples - centre, dim=1) @ normalize(own.mean(0) - centre, dim=0)).topk(count).indices


def measure(seed: int, tell: Tell) -> Found:
    """The share of what is chosen that is of the target's grammar, mean over the six targets."""
    tell(0, 3, "a language model")
    model, g = grammars.model(seed), torch.Generator().manual_seed(1000 + seed)
    tell(1, 3, "dictionaries")
    ds = _dictionaries(model, g, seed)
    tell(2, 3, "a pool")
    own = torch.randperm(POOL, generator=g) % GRAMMARS
    batches = [_read(model, texts(part, g)) for part in own.split(BATCH)]
    whole = torch.cat(batches)
    exemplars = [_read(model, texts(torch.full((EXEMPLARS,), t), g)) for t in range(GRAMMARS)]
    out: Found = {}
    for share in SHARES:
        count, found = round(share * POOL), dict[str, list[float]]()
        for target, asked in enumerate(exemplars):
            ways: dict[str, Tensor] = {}
            for how in POOLINGS:
                ways |= {f"{name}, {how}": _chosen(d, how, batches, asked, count) for name, d in ds.items()}
                ways |= {f"{name}, {how}": _by_cosine(whole, asked, how, centred, count) for name, centred in RAW.items()}  # fmt: skip
            ways[CHANCE] = torch.randperm(POOL, generator=g)[:count]
            for name, chosen in ways.items():
                found.setdefault(name, []).append((own[chosen] == target).double().mean().item())
        out[f"{share:.0%}"] = {name: sum(values) / GRAMMARS for name, values in found.items()}
    return out


def judge(found: Found) -> Reproduction:
    """Codes against activations, and a trained dictionary against those that learnt nothing."""
    rows = found["5%"]
    ours = rows[f"{TRAINED}, max"]
    raw = max((name for name in rows if name.startswith("raw")), key=lambda name: sum(rows[name]))
    return Reproduction(
        title="Samples of a task are found in a pool by the features that they fire",
        source="MoNA: Ma et al. 2025 (2503.15573)",
        setting=f"a transformer of two layers trained on {GRAMMARS} grammars that share {1 - grammars.MARKED:.0%} of their tokens; TopK of {WIDTH} features, k = {K}, at {POINT}; {EXEMPLARS} exemplars of each target, a pool of {POOL} texts in which grammars are as frequent",
        claims=[
            Claim("precision of the 5 % chosen by generalised Jaccard over codes, mean of the targets", "no truth is known; best of the methods compared (tables)", ours, ">=", 0.9, rows[f"{RANDOM}, max"], RANDOM),
            Claim(f"the same, less that of cosine between activations (the best of four: {raw})", "codes choose better than neurons (ablation)", [a - b for a, b in zip(ours, rows[raw], strict=True)], ">=", 0.1, rows[raw], raw),
        ],
        figure=bars("Share of the chosen 5 % that is of the target", "precision", {how: {name: rows[f"{name}, {how}"] for name in (TRAINED, FROZEN, RANDOM, *RAW)} for how in POOLINGS}),
        notes=[
            "A maximum over tokens says which features fire, whatever a text's own shares of common words are; a mean is led by these. The paper's pooling is one of the two.",
            f"Codes of a random dictionary reach {sum(rows[f'{RANDOM}, max']) / len(ours):.2f}, and of a frozen decoder {sum(rows[f'{FROZEN}, max']) / len(ours):.2f}: what is above the cosine is owed to sparse codes, their maximum and the similarity more than to what the dictionary learnt.",
            "The cosine of the paper's kind is not centred; less the pool's mean it does better, and the claim is against the best.",
        ],
        controls={f"precision at {share}": dict(values) for share, values in found.items()},
    )  # fmt: skip


ROW = Row(measure, judge)
