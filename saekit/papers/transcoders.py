"""Transcoders: an MLP's function in sparse features, at no more loss than an SAE of its output (2406.11944, 2501.18823)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saekit.dictionaries import Dictionary, create
from saekit.evaluate import evaluate
from saekit.harvest import harvest
from saekit.models import Model, load_model
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM
from saekit.papers.row import Found, Row
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


def _measured(ds: Mapping[tuple[str, int], Dictionary], model: Model, seed: int) -> Found:
    """What each dictionary and a random one lose on held-out text; those of one place in one pass over it."""
    out: Found = {}
    for main in ((TRANSCODER, KS[-1]), (SAE, KS[-1])):
        beside = {f"{n} {k}": d for (n, k), d in ds.items() if d.reads == ds[main].reads and (n, k) != main}
        report = evaluate(ds[main], model, "stdlib", tokens=16_384, controls=beside, seed=seed)
        own = {key: float(report[key]) for key in (*KEYS, "ce_original")}
        out.setdefault(main[0], {})[str(main[1])] = own
        for name, k in (
            *((n, k) for n, k in ds if f"{n} {k}" in beside),
            *([RANDOM_K] if main[0] == TRANSCODER else []),
        ):
            shown = "random" if (name, k) == RANDOM_K else f"{name} {k}"
            out.setdefault(name, {})[str(k)] = {key: report[key].control[shown] for key in KEYS}
    return out


def common(folder: Path) -> None:
    """What the MLP reads and writes."""
    points = [f"{MODULE}:in", f"{MODULE}:out"]
    harvest(load_model("code-lm"), "stdlib", points, out=folder / "acts", tokens=TOKENS, dtype="bf16")


def measure(seed: int, tell: Tell, folder: Path) -> Found:
    """Transcoders with and without a skip, and an SAE of the same MLP's output, at the same L0."""
    ds = _dictionaries(seed)
    named = {f"{name} {k}": d for (name, k), d in ds.items()}
    fit_all(named, folder / "acts", STEPS, BATCH, seed=seed)
    tell(1, 2, "evaluating")
    return _measured(ds, load_model("code-lm"), seed)


def judge(found: Found) -> Reproduction:
    """Cross-entropy with each kind in the MLP's place, at each k."""
    ce = {name: {k: found[name][str(k)]["ce_spliced"] for k in KS} for name in (TRANSCODER, SKIP, SAE)}
    recovered = [m["ce_recovered"] for m in found[TRANSCODER].values()]
    best = [max(values) for values in zip(*recovered, strict=True)]
    own = found[TRANSCODER][str(KS[-1])]["ce_original"]

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
            Claim("share of the gap to zero ablation that the transcoder recovers, best k", "comparable to SAEs (figure 2)", best, ">=", 0.9, found[RANDOM][str(KS[-1])]["ce_recovered"], "a random one"),
            Claim("nats by which its CE lies above the SAE's, at the worse k", "at or below", above(TRANSCODER, SAE), "<=", 0.0),
            Claim("nats by which the skip transcoder's CE lies above the transcoder's, at the worse k", "a better Pareto curve (2501.18823)", above(SKIP, TRANSCODER), "<=", 0.0),
        ],
        figure=bars("Cross-entropy with the MLP replaced, above the model's own", "nats per token", {name: {f"k = {k}": lost(name, k) for k in KS} for name in ce}, yaxis={"rangemode": "tozero"}),
        controls={key: {f"{n} {k}": m[key] for n, by_k in found.items() for k, m in by_k.items()} for key in ("ce_recovered", "fvu", "l0", "kl")},
    )  # fmt: skip


ROW = Row(measure, judge, common=common)
