"""A complete replacement model: a transcoder and a Lorsa in every layer, all spliced in at once (Ge et al. 2026)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saekit.dictionaries import Dictionary, create
from saekit.evaluate.together import evaluate_together
from saekit.harvest import harvest
from saekit.layers import attention
from saekit.models import load_model
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all

LAYERS, CONTEXT = 4, 128  # of code-lm
MLPS: dict[str, Any] = {"d_in": 256, "n_features": 1024, "k": 32}
HEADS: dict[str, Any] = {"n_features": 512, "k": 32}
TOKENS, STEPS, SEQUENCES = 200_000, 40, 16


def _dictionaries(layers: Sequence[Any], seed: int, frozen: bool) -> dict[str, Dictionary]:
    atoms: dict[str, Any] = {"atoms": "frozen"} if frozen else {}
    out: dict[str, Any] = {}
    for layer in range(LAYERS):
        out[f"{layer}.attn"] = create("lorsa", attention=layers[layer], seed=seed, **HEADS, **atoms)
        out[f"{layer}.mlp"] = create("transcoder", seed=seed, **MLPS, **atoms)
    for place, d in out.items():
        d.reads, d.writes = d.wiring.sites([f"blocks.{place}"])
    return out


def common(folder: Path) -> None:
    """What all halves of all layers read and write."""
    points = [f"blocks.{i}.{m}:{s}" for i in range(LAYERS) for m in ("attn", "mlp") for s in ("in", "out")]
    harvest(
        load_model("code-lm"),
        "stdlib",
        points,
        out=folder / "acts",
        tokens=TOKENS,
        dtype="bf16",
        context=CONTEXT,
    )


def measure(seed: int, tell: Tell, folder: Path) -> Found:
    """All MLPs and attention layers of code-lm replaced at once, with and without error terms."""
    model = load_model("code-lm")
    layers = [attention(model, f"blocks.{layer}.attn") for layer in range(LAYERS)]
    found: dict[str, dict[str, float]] = {name: {} for name in ("trained", FROZEN, RANDOM)}
    for i, name in enumerate(("trained", FROZEN)):
        tell(2 * i, 4, f"{name}: training")
        ds = _dictionaries(layers, seed, frozen=name == FROZEN)
        fit_all(ds, folder / "acts", STEPS, SEQUENCES, seed=seed)
        tell(1 + 2 * i, 4, f"{name}: evaluating")
        report = evaluate_together(
            list(ds.values()),
            model,
            "stdlib",
            tokens=16_384,
            context=CONTEXT,
            controls=name == "trained",
            ablation="mean",  # zeros everywhere leave 35 nats, against which anything recovers much
        )
        for key, m in report.items():
            found[name][key] = float(m)
            if "random" in m.control:
                found[RANDOM][key] = m.control["random"]
    return found


def judge(found: Found) -> Reproduction:
    """The replaced model's loss against the random control's, and what error terms leave of it."""
    own = found["trained"]
    over = [a - b for a, b in zip(own["ce_recovered"], found[RANDOM]["ce_recovered"], strict=True)]
    under = [a / b for a, b in zip(own["kl"], found[RANDOM]["kl"], strict=True)]
    off = [abs(a - b) for a, b in zip(own["ce_with_errors"], own["ce_original"], strict=True)]
    return Reproduction(
        title="Transcoders and Lorsas in every layer make a model of features alone",
        source="Ge et al. 2026 (complete replacement models); Ameisen et al. 2025, transformer-circuits.pub",
        setting=f"code-lm, {LAYERS} layers: transcoders of {MLPS['n_features']} features, k = {MLPS['k']}, Lorsas of {HEADS['n_features']}, k = {HEADS['k']}; {STEPS * SEQUENCES * CONTEXT:,} tokens; on 16,384 held-out tokens",
        claims=[
            Claim("KL(original || replaced) over the random control's", "no number", under, "<", 1.0, found[RANDOM]["kl"], "random dictionaries: the KL itself, nats per token"),
            Claim("share of the gap to mean ablation of everything that is recovered, less the random control's", "above it", over, ">", 0.0, found[RANDOM]["ce_recovered"], "random dictionaries: the share itself"),
            Claim("with error terms: distance from the model's own cross-entropy", "0 by construction", off, "<=", 1e-4),
            Claim("with error terms: KL(original || replaced)", "0 by construction", own["kl_with_errors"], "<=", 1e-4),
        ],
        figure=bars("Cross-entropy of the replaced model", "nats per token", {"code-lm": {"original": own["ce_original"], "means in all places": own["ce_ablated"], **{n: m["ce_replaced"] for n, m in found.items()}}}),
        controls={key: {n: m[key] for n, m in found.items() if key in m} for key in ("kl", "ce_replaced", "ce_recovered", "l0")},
    )  # fmt: skip


ROW = Row(measure, judge, common=common)
