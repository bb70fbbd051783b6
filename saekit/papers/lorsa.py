"""Lorsa: low-rank sparse attention takes superposed attention units apart (2504.20938)."""

from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import normalize

from saekit.dictionaries import Dictionary, create
from saekit.evaluate import evaluate
from saekit.harvest import harvest
from saekit.layers import attention
from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM
from saekit.papers.row import Found, Row
from saekit.papers.training import fit, fit_all
from saekit.testbed import heads, induction

PLANTED: dict[str, Any] = {"d_in": heads.D, "d_out": heads.D, "n_qk": 2, "d_qk": 16, "n_features": 8, "k": 2}
PLANTED_STEPS, PLANTED_ROWS, PLANTED_LR = 1500, 6000, 5e-3
INDUCTION_STEPS, MODULE = 1500, "blocks.1.attn"
COPIED, OFTEN = "the layer's heads, features untrained", 20
WIDTH, K, STEPS, BATCH, LR, SEQUENCES = 256, 8, 400, 128, 2e-3, 8192


def _units(world: heads.PlantedHeads, d: Dictionary, x: Tensor) -> dict[str, float]:
    """Mean cosines of the units' directions with those of the features that match them best, and of patterns."""
    written = normalize(d.norm_out.directions(d.W_dec.detach()), dim=1) @ world.written.T
    read = normalize(d.norm_in.fold(d.W_enc.T.detach())[0].float(), dim=1) @ world.read.T
    features, units = linear_sum_assignment(-(written + read).numpy())
    with torch.no_grad():
        mine = d.wiring.patterns(d.norm_in(x.flatten(0, 1).clone()).view(x.shape))
        true = world.patterns(x)
    seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    each = d.n_features // PLANTED["n_qk"]
    correlations = [
        torch.corrcoef(
            torch.stack([mine[:, f // each][:, seen].flatten(), true[:, u // 2][:, seen].flatten()])
        )[0, 1]
        for f, u in zip(features, units, strict=True)
    ]
    return {
        "output directions": written[features, units].mean().item(),
        "value directions": read[features, units].mean().item(),
        "patterns": torch.stack(correlations).mean().item(),
    }


def _planted(seed: int) -> dict[str, dict[str, float]]:
    world, g = heads.PlantedHeads.draw(seed), torch.Generator().manual_seed(1000 + seed)
    rows, x = world.rows(PLANTED_ROWS, g), world.rows(200, g)[..., : heads.D]
    d, frozen, random = (
        create("lorsa", seed=seed, atoms=a, **PLANTED) for a in ("unit_norm", "frozen", "unit_norm")
    )
    for one in (d, frozen):
        fit(one, rows, PLANTED_STEPS, 64, lr=PLANTED_LR, seed=seed)
    random.norm_in, random.norm_out = d.norm_in, d.norm_out
    return {name: _units(world, one, x) for name, one in (("Lorsa", d), (FROZEN, frozen), (RANDOM, random))}


def _induced(model: Any, seed: int) -> dict[str, dict[str, float]]:
    """Lorsas of the layer with the induction heads: error, loss of the model, and where its features look."""
    g = torch.Generator().manual_seed(2000 + seed)
    tokens, _ = induction.sequences(SEQUENCES, g)
    (chosen_on, first), (held_out, periods) = induction.sequences(256, g), induction.sequences(256, g)
    layer = attention(model, MODULE)
    ds: dict[str, Any] = {
        name: create("lorsa", attention=layer, n_features=WIDTH, k=K, seed=seed, atoms=atoms)
        for name, atoms in (("Lorsa", "unit_norm"), (FROZEN, "frozen"))
    }
    points = [f"{MODULE}:in", f"{MODULE}:out"]
    fit_all(ds, harvest(model, tokens, points, tokens=None), STEPS, BATCH, lr=LR, seed=seed)
    copied: Any = create("lorsa", attention=layer, n_features=WIDTH, k=K, seed=seed)
    (some,) = harvest(model, [chosen_on], points, tokens=None)
    copied.reads, copied.writes = ds["Lorsa"].reads, ds["Lorsa"].writes
    copied.prepare(copied.gather([some]))
    random: Any = create(
        "lorsa", d_in=induction.WIDTH, n_qk=induction.HEADS, d_qk=16, n_features=WIDTH, k=K, seed=seed
    )
    random.norm_in, random.norm_out = ds["Lorsa"].norm_in, ds["Lorsa"].norm_out
    random.reads, random.writes = ds["Lorsa"].reads, ds["Lorsa"].writes
    (batch,) = harvest(model, [held_out], points, tokens=None)
    out = {}
    for name, d in {**ds, COPIED: copied, RANDOM: random}.items():
        report = evaluate(d, model, [held_out], tokens=held_out.numel(), controls=False)
        out[name] = {key: float(report[key]) for key in ("fvu", "ce_recovered", "kl", "l0")}
        looks, fired = _after_previous(d, some.activations[points[0]], first)
        feature = looks.where(fired >= OFTEN, 0.0).argmax()
        judged, _ = _after_previous(d, batch.activations[points[0]], periods)
        out[name]["attention after the previous occurrence"] = judged[feature].item()
    return out


@torch.no_grad()
def _after_previous(d: Any, x: Tensor, periods: Tensor) -> tuple[Tensor, Tensor]:
    """Each feature's attention on the token behind the previous occurrence of the query's, mean over where it fires.

    Of all queries whose token has occurred before; and on how many of them it fires (0 where it doesn't).
    """
    sequence, query = induction.known(periods).nonzero(as_tuple=True)
    active = d.encode(x).to_dense()[sequence, query] > 0
    mass = d.patterns(x)[sequence, :, query, query - periods[sequence] + 1]
    heads = torch.arange(d.n_features) // (d.n_features // d.n_qk)
    often = active.sum(0)
    return (mass[:, heads] * active).sum(0) / often.clamp(min=1), often


def measure(seed: int, tell: Tell) -> Found:
    """Planted units that one dense head would superpose, and the induction layer of a small trained model."""
    model = induction.trained(INDUCTION_STEPS)
    tell(1, 3, "planted units")
    planted = _planted(seed)
    tell(2, 3, "induction layer")
    return {"planted": planted, "induced": _induced(model, seed)}


def judge(found: Found) -> Reproduction:
    """Planted units against those of frozen atoms, and the induction layer against its heads copied."""
    planted, induced = found["planted"], found["induced"]
    mine, frozen, real = planted["Lorsa"], planted[FROZEN], induced["Lorsa"]
    looks = "attention after the previous occurrence"
    return Reproduction(
        title="Lorsa finds the attention units that heads superpose",
        source="He et al. 2025, arXiv 2504.20938",
        setting=f"{heads.UNITS} planted rank-one units under 2 patterns, {PLANTED['n_features']} features, k = {PLANTED['k']}; a 2-layer attention-only model that has learnt induction, {WIDTH} features on its second layer, k = {K}",
        claims=[
            Claim("planted: cosine of output directions", "no planted test in the paper", mine["output directions"], ">=", 0.95, frozen["output directions"], FROZEN),
            Claim("planted: cosine of value directions", "no planted test in the paper", mine["value directions"], ">=", 0.9, frozen["value directions"], FROZEN),
            Claim("planted: correlation of patterns", "no planted test in the paper", mine["patterns"], ">=", 0.95, frozen["patterns"], FROZEN),
            Claim(f"induction layer: FVU at k = {K}", "no number at this scale", real["fvu"], "<=", 0.1, induced[FROZEN]["fvu"], FROZEN),
            Claim("induction layer: share of the gap to zero ablation recovered", "no number at this scale", real["ce_recovered"], ">=", 0.9, induced[COPIED]["ce_recovered"], COPIED),
            Claim("a feature's attention on the token behind the previous occurrence, chosen on other text", "induction heads are recovered (figure)", real[looks], ">=", 0.8, induced[COPIED][looks], COPIED),
        ],
        figure=bars("Planted units found", "cosine or correlation", planted),
        controls={
            **{f"planted: {key}": {n: m[key] for n, m in planted.items()} for key in mine},
            **{f"induction: {key}": {n: m[key] for n, m in induced.items()} for key in real},
        },
    )  # fmt: skip


ROW = Row(measure, judge)
