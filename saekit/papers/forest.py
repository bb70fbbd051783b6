"""What the papers on small forests of features share: training on one, and how far children absorb their parents."""

from collections.abc import Mapping
from typing import Any

import torch

from saekit import metrics
from saekit.activations import DrawnSource
from saekit.dictionaries import Dictionary, create
from saekit.papers.training import fit
from saekit.testbed.forest import Forest

ROWS = 20_000  # to measure on
HELD_OUT = 1 << 30  # seeds from here on are never trained on


def trained(
    forest: Forest, preset: str, seed: int, train_with: Mapping[str, Any], **options: Any
) -> Dictionary:
    """A dictionary as wide as the forest, trained on batches of 200 rows (the papers' setting)."""
    n = forest.config.n_features
    d = create(preset, d_in=n, n_features=n, seed=seed, **options)
    source = DrawnSource(lambda rows, step, s: forest.batch(rows, 100_003 * s + step)[0], n, "forest")
    fit(d, source, batch_size=200, seed=seed, **train_with)
    return d


def standing(forest: Forest, d: Dictionary) -> dict[str, float]:
    """How the dictionary's features stand to the forest's.

    ``matched``: mean cosine of true features with theirs (Hungarian). ``absorption``: mean over children
    of the cosine of the child's feature with its parent's direction, less what their true cosine
    explains, absolute. ``recall``: of the rows in which a child is on, the share in which its parent's feature is.
    """
    from scipy.optimize import linear_sum_assignment

    x, true = forest.batch(ROWS, HELD_OUT)
    codes, on = d.encode(x).to_dense() > 0, true.to_dense() > 0
    decoder = torch.nn.functional.normalize(d.norm_out.directions(d.W_dec.detach()), dim=-1)
    cosine = decoder @ forest.directions.T
    feature, of = linear_sum_assignment(cosine.numpy(), maximize=True)
    mine = torch.empty(len(of), dtype=torch.int64)
    mine[torch.from_numpy(of)] = torch.from_numpy(feature)
    children = (forest.parent >= 0).nonzero()[:, 0]
    parents = forest.parent[children]
    between = (forest.directions[children] * forest.directions[parents]).sum(-1)
    recalled = torch.cat([codes[on[:, c], mine[p]] for c, p in zip(children, parents, strict=True)])
    return {
        "matched": cosine[mine, torch.arange(len(mine))].mean().item(),
        "absorption": (cosine[mine[children], parents] - between).abs().mean().item(),
        "recall": recalled.float().mean().item(),
        "l0": metrics.l0(d.encode(x)),
        "fvu": metrics.fvu(x, d(x).detach()),
    }
