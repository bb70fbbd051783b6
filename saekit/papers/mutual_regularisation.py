"""Mutual feature regularisation: dictionaries trained together are drawn to common features (2411.01220)."""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from saekit import metrics
from saekit.dictionaries import Dictionary
from saekit.evaluate.stability import mmcs
from saekit.papers.claims import Claim, Reproduction, Tell, figure
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.planted import make, stream
from saekit.papers.row import Found, Row
from saekit.papers.training import fit_all
from saekit.testbed.planted import PlantedConfig, PlantedWorld
from saekit.testbed.recovery import mcc

WIDTH, K, STEPS, BATCH, PEERS = 96, 3, 800, 256, 2
ALPHAS = (0.0, 0.03, 0.1, 0.3, 1.0)
MEASURES = ("MMCS", "MCC", "FVU")


def scores(
    world: PlantedWorld, x: Float[Tensor, "rows d_in"], ds: Sequence[Dictionary]
) -> tuple[float, float, float]:
    """Likeness of two dictionaries (MMCS), and the mean of their likeness to the truth (MCC) and of their FVU."""
    first, second = (d.W_dec.detach() for d in ds)
    shared = (mmcs(first, second) + mmcs(second, first)) / 2
    truth = sum(mcc(d.W_dec.detach(), world.directions) for d in ds) / PEERS
    return shared, truth, sum(metrics.fvu(x, d(x).detach()) for d in ds) / PEERS


def _world() -> PlantedWorld:
    config = PlantedConfig(n_features=64, d_in=24, roots=0, correlation=0.0, p_max=0.1, p_min=0.02, seed=1)
    return PlantedWorld(config)


def measure(seed: int, tell: Tell) -> Found:
    """Pairs of TopK dictionaries, trained together at several strengths of the regularisation."""
    world = _world()
    x = world.evaluation_set(8192)[0]

    def pair(preset: str, **options: Any) -> list[Dictionary]:
        ds = {f"peer-{p}": make(world, preset, WIDTH, PEERS * seed + p, k=K, **options) for p in range(PEERS)}
        fit_all(ds, stream(world), STEPS, BATCH, seed=seed)
        return list(ds.values())

    found = {}
    for j, alpha in enumerate(ALPHAS):
        term = {"mutual.coefficient": alpha}
        ds = pair("topk", objective=("reconstruction", "mutual"), **term)
        found[_name(alpha)] = scores(world, x, ds)
        tell(j + 1, len(ALPHAS) + 1, _name(alpha))
    frozen = pair("frozen")
    found[FROZEN] = scores(world, x, frozen)
    found[RANDOM] = scores(world, x, [untrained(d) for d in frozen])
    return {key: {name: v[at] for name, v in found.items()} for at, key in enumerate(MEASURES)}


def _name(alpha: float) -> str:
    return f"alpha = {alpha:g}"


def judge(found: Found) -> Reproduction:
    """Likeness, recovery and error by strength."""
    shared, truth, error = ({a: found[key][_name(a)] for a in ALPHAS} for key in MEASURES)
    mean = {a: sum(v) / len(v) for a, v in shared.items()}
    rises = [b - a for a, b in zip(mean.values(), list(mean.values())[1:], strict=False)]
    low, high = ALPHAS[0], ALPHAS[-1]
    shown = (_name(low), _name(high), FROZEN, RANDOM)
    config = _world().config
    recovered = [b - a for a, b in zip(truth[low], truth[high], strict=True)]
    worse = [b / a for a, b in zip(error[low], error[high], strict=True)]
    names = {"between the two (MMCS)": shared, "with the truth (MCC)": truth, "FVU": error}
    return Reproduction(
        title="Dictionaries trained together become alike",
        source="Marks, Paren, Krueger and Barez 2024, arXiv 2411.01220",
        setting=f"{config.n_features} planted features in {config.d_in} dimensions; {PEERS} TopK dictionaries of {WIDTH} latents, k = {K}, {STEPS} steps of {BATCH} rows from one stream; alpha of {', '.join(f'{a:g}' for a in ALPHAS)} on a loss of about d_out * FVU",
        claims=[
            Claim(f"likeness of the two at alpha = {high:g} less that at {low:g} (MMCS)", "the term's purpose", [b - a for a, b in zip(shared[low], shared[high], strict=True)], ">", 0.0),
            Claim("likeness of the two rises with every step of alpha (smallest rise of mean MMCS)", "the term's purpose", [min(rises)], ">", 0.0, [mean[a] for a in ALPHAS], "MMCS by alpha, mean"),
            Claim(f"FVU at alpha = {high:g} over that without", "up to 21 % lower reconstruction loss on GPT-2 small (abstract)", worse, "<=", 1.2),
        ],
        figure=figure("Likeness and recovery by strength", "alpha", "cosine, or FVU", {n: (ALPHAS, [sum(v[a]) / len(v[a]) for a in ALPHAS]) for n, v in names.items()}),
        notes=[
            f"Recovery of the truth changes by {sum(recovered) / len(recovered):+.3f} (MCC, alpha = {high:g} less 0; per seed {', '.join(f'{v:+.3f}' for v in recovered)}), the error by a factor of {sum(worse) / len(worse):.3f}. "
            "The paper reports higher likeness to the truth on synthetic data; that gain is not claimed here."
        ],
        controls={key: {name: table[name] for name in shown} for key, table in found.items()},
    )  # fmt: skip


ROW = Row(measure, judge)
