"""Transcoders: an MLP's function in sparse features, at no more loss than an SAE of its output (2406.11944, 2501.18823)."""

import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from saekit.dictionaries import Dictionary, create
from saekit.evaluate import evaluate
from saekit.harvest import harvest
from saekit.models import Model, load_model
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM
from saekit.papers.training import fit_all

MODULE, WIDTH, KS = "blocks.2.mlp", 1024, (16, 64)
TOKENS, STEPS, BATCH = 400_000, 200, 2048
TRANSCODER, SKIP, SAE = "transcoder", "skip transcoder", "SAE of the output"
RANDOM_K = (RANDOM, KS[-1])
KEYS = ("ce_recovered", "ce_spliced", "kl", "fvu", "l0")


def _dictionaries(seed: int) -> dict[tuple[str, int], Dictionary]:
    shape: dict[str, Any] = {"d_in": 256, "n_features": WIDTH, "seed": seed}
    out: dict[tuple[str, int], Any] = {}
    for k in KS:
        out[TRANSCODER, k] = create("transcoder", k=k, **shape)
        out[SKIP, k] = create("skip_transcoder", k=k, **shape)
        out[SAE, k] = create("topk", k=k, **shape)
    out[FROZEN, KS[-1]] = create("frozen", wiring="transcoder", k=KS[-1], **shape)
    for (name, _), d in out.items():
        d.reads, d.writes = d.wiring.sites([f"{MODULE}:out" if name == SAE else MODULE])
    return out


def _measured(
    ds: Mapping[tuple[str, int], Dictionary], model: Model, seed: int
) -> dict[tuple[str, int], dict[str, float]]:
    """What each dictionary and a random one lose on held-out text; those of one place in one pass over it."""
    out: dict[tuple[str, int], dict[str, float]] = {}
    for main in ((TRANSCODER, KS[-1]), (SAE, KS[-1])):
        beside = {f"{n} {k}": d for (n, k), d in ds.items() if d.reads == ds[main].reads and (n, k) != main}
        report = evaluate(ds[main], model, "stdlib", tokens=16_384, controls=beside, seed=seed)
        out[main] = {key: float(report[key]) for key in (*KEYS, "ce_original")}
        for name, k in (
            *((n, k) for n, k in ds if f"{n} {k}" in beside),
            *([RANDOM_K] if main[0] == TRANSCODER else []),
        ):
            shown = "random" if (name, k) == RANDOM_K else f"{name} {k}"
            out[name, k] = {key: report[key].control[shown] for key in KEYS}
    return out


def reproduce(seeds: Sequence[int], tell: Tell) -> Reproduction:
    """Transcoders with and without a skip, and an SAE of the same MLP's output, at the same L0."""
    model = load_model("code-lm")
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        points = [f"{MODULE}:in", f"{MODULE}:out"]
        store = harvest(model, "stdlib", points, out=f"{folder}/acts", tokens=TOKENS, dtype="bf16")
        for i, seed in enumerate(seeds):
            ds = _dictionaries(seed)
            named = {f"{name} {k}": d for (name, k), d in ds.items()}
            fit_all(named, store, STEPS, BATCH, seed=seed)
            for (name, k), measures in _measured(ds, model, seed).items():
                for key, value in measures.items():
                    found.setdefault(name, {}).setdefault(key, {}).setdefault(k, []).append(value)
            tell(i + 1, len(seeds), "seeds")
    ce = {name: found[name]["ce_spliced"] for name in (TRANSCODER, SKIP, SAE)}
    best = [max(values) for values in zip(*found[TRANSCODER]["ce_recovered"].values(), strict=True)]
    own = found[TRANSCODER]["ce_original"][KS[-1]]

    def lost(name: str, k: int) -> list[float]:
        return [a - b for a, b in zip(ce[name][k], own, strict=True)]

    def above(name: str, other: str) -> list[float]:
        """By how much the curve of one lies above another's where it is highest."""
        gaps = [[a - b for a, b in zip(ce[name][k], ce[other][k], strict=True)] for k in KS]
        return [max(values) for values in zip(*gaps, strict=True)]

    return Reproduction(
        title="A transcoder stands in for an MLP at no more loss than an SAE of its output",
        source="Dunefsky et al. 2024, arXiv 2406.11944; skips: Paulo et al. 2025, arXiv 2501.18823",
        setting=f"code-lm, {MODULE}, {WIDTH} features, k in {KS}; {STEPS * BATCH:,} tokens; spliced in on 16,384 held-out tokens",
        claims=[
            Claim("share of the gap to zero ablation that the transcoder recovers, best k", "comparable to SAEs (figure 2)", best, ">=", 0.9, found[RANDOM]["ce_recovered"][KS[-1]], "a random one"),
            Claim("nats by which its CE lies above the SAE's, at the worse k", "at or below", above(TRANSCODER, SAE), "<=", 0.0),
            Claim("nats by which the skip transcoder's CE lies above the transcoder's, at the worse k", "a better Pareto curve (2501.18823)", above(SKIP, TRANSCODER), "<=", 0.0),
        ],
        figure=bars("Cross-entropy with the MLP replaced, above the model's own", "nats per token", {name: {f"k = {k}": lost(name, k) for k in KS} for name in ce}, yaxis={"rangemode": "tozero"}),
        controls={key: {f"{n} {k}": v for n, m in found.items() for k, v in m[key].items()} for key in ("ce_recovered", "fvu", "l0", "kl")},
    )  # fmt: skip
