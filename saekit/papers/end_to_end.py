"""End-to-end training: the last tokens on the model's own loss close part of the gap (2405.12241, 2503.17272)."""

from pathlib import Path

from saekit.dictionaries import create
from saekit.dictionaries.surgery import with_objective
from saekit.evaluate import evaluate
from saekit.harvest import ContinuedSource, SequenceSource, harvest
from saekit.models import load_model
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.row import Found, Row
from saekit.papers.training import fit

POINT, WIDTH, K = "blocks.1.hook_resid_post", 1024, 16
TOKENS, STEPS, BATCH = 400_000, 200, 2048
POOL = 1 << 21  # so that all tokens for tuning are held and drawn from
TUNE_STEPS, SEQUENCES, RATE = 100, 4, 1e-3
HELD_OUT = 8192  # tokens
KEYS = ("ce_spliced", "ce_recovered", "kl", "fvu", "l0")
KINDS = {"MSE alone": ("reconstruction", "auxk"), "MSE and KL": ("reconstruction", "end_to_end")}


def common(folder: Path) -> None:
    """The store that dictionaries are trained on first."""
    harvest(load_model("code-lm"), "stdlib", [POINT], out=folder / "acts", tokens=TOKENS, dtype="bf16")


def measure(seed: int, tell: Tell, folder: Path) -> Found:
    """A TopK dictionary of code-lm's residual stream, then the same tokens more with and without KL."""
    model = load_model("code-lm")
    stream = harvest(model, "stdlib", [POINT], tokens=2_000_000)
    sources = {"MSE alone": SequenceSource(stream, POOL), "MSE and KL": ContinuedSource(stream, POOL)}
    shape = {"d_in": 256, "n_features": WIDTH, "k": K, "seed": seed}
    d, frozen = create("topk", **shape), create("frozen", **shape)
    fit(d, folder / "acts", STEPS, BATCH, seed=seed, control=frozen)
    beside = {FROZEN: frozen, RANDOM: untrained(frozen)}
    for i, (name, objective) in enumerate(KINDS.items()):
        tell(1 + i, 4, f"tuning on {name}")
        tuned = with_objective(d, objective)
        fit(tuned, sources[name], TUNE_STEPS, SEQUENCES, lr=RATE, decay=1.0, seed=seed)
        beside[name] = tuned
    tell(3, 4, "evaluating")
    report = evaluate(d, model, "stdlib", tokens=HELD_OUT, controls=beside)
    before = {key: float(report[key]) for key in (*KEYS, "ce_original")}
    return {"before": before, **{name: {key: report[key].control[name] for key in KEYS} for name in beside}}


def judge(found: Found) -> Reproduction:
    """The share of the gap that each tuning closes."""
    before = found["before"]

    def closed(name: str) -> list[float]:
        gaps = zip(before["ce_spliced"], found[name]["ce_spliced"], before["ce_original"], strict=True)
        return [(a - b) / (a - own) for a, b, own in gaps]

    same = [abs(a - b) for a, b in zip(found["MSE and KL"]["l0"], before["l0"], strict=True)]
    less = [a / b for a, b in zip(found["MSE and KL"]["kl"], before["kl"], strict=True)]
    return Reproduction(
        title="Fine-tuning on the model's predictions closes part of the gap in cross-entropy",
        source="Braun et al. 2024, arXiv 2405.12241; KL fine-tuning: Karvonen 2025, arXiv 2503.17272",
        setting=f"code-lm, {POINT}, {WIDTH} features, k = {K}; {STEPS * BATCH:,} tokens on MSE, then {TUNE_STEPS * SEQUENCES * 512:,} tokens with the rate falling to 0; evaluated on {HELD_OUT:,} held-out tokens",
        claims=[
            Claim("share of the gap to the unchanged model's cross-entropy that MSE + KL closes", "20 to 50 % (2503.17272)", closed("MSE and KL"), ">=", 0.2, closed("MSE alone"), "the same tokens on MSE alone"),
            Claim("KL(original || spliced) over that before", "lower", less, "<", 1.0),
            Claim("L0 is what it was (difference)", "compared at equal L0", same, "<=", 0.05),
        ],
        figure=bars("Cross-entropy behind the dictionary", "nats per token", {name: {"CE": found[name]["ce_spliced"], "KL": found[name]["kl"]} for name in ("before", *KINDS)}, yaxis={"rangemode": "tozero"}),
        notes=[
            f"CE {sum(before['ce_original']) / len(before['ce_original']):.3f} unchanged. FVU rises where KL falls: the error moves to directions that the model doesn't read. "
            "The frozen decoder has seen the tokens of the dictionary before tuning."
        ],
        controls={
            key: {name: v[measure] for name, v in found.items()}
            for measure, key in {"ce_spliced": "CE", "ce_recovered": "CE recovered", "kl": "KL", "fvu": "FVU", "l0": "L0"}.items()
        },
    )  # fmt: skip


ROW = Row(measure, judge, common=common)
