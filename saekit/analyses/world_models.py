"""Whether a model holds a world in its features, and acts on it: Spies et al. 2024, "Transformers Use Causal World Models in
Maze-Solving Tasks" (2412.11867).

A fact of the world (a passage between two cells) is a label of rows, as of the tokens at which a fact has just been told. A
feature stands for a fact if it tells its rows from all others (:func:`aurocs`, :func:`choose`), if the rows' heads gather what
it consists of (:func:`gathered`), and if the model goes by it: with the feature held at another value (:func:`held`) it
continues as it would in another world (:func:`continued`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.analyses.axes import check_axes
from saekit.hooks import intervene
from saekit.interventions import written_by
from saekit.models import Model
from saekit.probes import check_bools
from saekit.types import Codes, SaekitError


@dataclass(frozen=True)
class Facts:
    """For each label the features that tell it best, the best one first: how well, and their mean values where it is true."""

    features: Int[Tensor, "label some"]
    auroc: Float[Tensor, "label some"]
    mean: Float[Tensor, "label some"]


def aurocs(codes: Codes, labels: Bool[Tensor, "rows label"]) -> Float[Tensor, "feature label"]:
    """Share of pairs of a true and a false row that a feature puts in this order, ties by half; in [0, 1], 0.5 is chance.

    That of scikit-learn's ``roc_auc_score`` for each feature and label, by ranks of the entries alone: of the rows in which a
    feature is silent there is a count. Takes memory for the entries and for the result, whatever the number of rows.
    Raises unless each label has rows of both classes, and all values are numbers.
    """
    _check(codes, labels)
    labels = labels.to(codes.values.device)
    rows, feature, value = codes.row_ids(), codes.indices.long(), codes.values.detach().double()
    on = value != 0
    rows, feature, value = rows[on], feature[on], value[on]
    order = value.argsort(stable=True)
    order = order[feature[order].argsort(stable=True)]
    rows, feature, value = rows[order], feature[order], value[order]
    # equal values of a feature are one group, and a group's first entry stands behind all that are smaller
    new = torch.ones_like(feature, dtype=torch.bool)
    new[1:] = (feature[1:] != feature[:-1]) | (value[1:] != value[:-1])
    group = new.long().cumsum(0) - 1
    of, above = feature[new], value[new] > 0
    out = torch.empty(codes.n_features, labels.shape[1], dtype=torch.float64, device=value.device)
    for j, label in enumerate(labels.unbind(1)):
        own = label[rows].double()
        true, false = (torch.zeros(len(of), dtype=torch.float64, device=value.device).index_add_(0, group, x) for x in (own, 1 - own))  # fmt: skip
        n, m = label.sum().double(), (~label).sum().double()
        seen, others, negative = (torch.zeros_like(out[:, 0]).index_add_(0, of, x) for x in (true, false, false * ~above))  # fmt: skip
        silent = m - others
        before = false.cumsum(0) - false
        before = before - (others.cumsum(0) - others)[of]  # of the feature itself
        won = torch.zeros_like(seen).index_add_(0, of, true * (before + 0.5 * false + above * silent[of]))
        out[:, j] = (won + (n - seen) * (negative + 0.5 * silent)) / (n * m)
    return out


def choose(codes: Codes, labels: Bool[Tensor, "rows label"], some: int = 1) -> Facts:
    """The features with the largest AUROCs of each label, the lowest of equals first; judge them on other rows than these."""
    if not 1 <= some <= codes.n_features:
        raise SaekitError(
            f"some = {some} must lie in 1..{codes.n_features}, the number of features; choose fewer"
        )
    found = aurocs(codes, labels).sort(dim=0, descending=True, stable=True)
    features, auroc = found.indices[:some].T.contiguous(), found.values[:some].T.contiguous()
    columns, which = features.unique(return_inverse=True)
    own = labels.to(codes.values).T
    means = own @ codes.select(columns).view(codes.rows, -1) / own.sum(1, keepdim=True)
    return Facts(features, auroc, means.gather(1, which))


def gathered(
    patterns: Float[Tensor, "batch head query source"], at: Int[Tensor, " some"], back: Sequence[int]
) -> Float[Tensor, "head back"]:
    """Share of its attention that each head gives, from the positions ``at``, to the tokens so far back; means over them.

    ``patterns`` are those of :class:`saekit.attention.Patterns`, whose rows sum to 1. Chance is 1 / (position + 1) a token.
    """
    if not len(at) or not len(back):
        raise SaekitError("at and back must name a position and a distance; give one or more of each")
    if not patterns.isfinite().all():
        raise SaekitError("patterns hold NaN or Inf; leave those texts out")
    far, seq = max(back), patterns.shape[2]
    if min(back) < 0 or int(at.min()) < far or int(at.max()) >= seq:
        raise SaekitError(f"back = {list(back)} from positions {int(at.min())}..{int(at.max())} must stay within the {seq} tokens; leave out the first {far} positions")  # fmt: skip
    return torch.stack([patterns[:, :, at, at - steps].mean((0, 2)) for steps in back], 1)


@contextmanager
def held(
    model: Model,
    dictionary: Any,
    features: Int[Tensor, "batch some"],
    positions: Int[Tensor, "batch at"],
    values: Float[Tensor, "batch some"],
) -> Iterator[Model]:
    """Run the model with features of its own for each text set to values, at positions of its own.

    What the dictionary doesn't say of the activation stays, as in :func:`saekit.interventions.intervened`, whose edits are
    the same for all texts. A feature that is named twice is held at the mean of its values. The dictionary reads and writes
    one and the same hook point; texts are whole, without cached keys.
    """
    _check_edit(dictionary, features, positions, values)
    features, positions, values = (one.to(model.device) for one in (features, positions, values))
    batch, width = positions.shape
    rows = torch.arange(batch, device=model.device)[:, None]
    named = features.repeat_interleave(width, 0)
    times = (features[:, :, None] == features[:, None]).sum(2).repeat_interleave(width, 0)

    def write(x: Tensor) -> Tensor:
        if len(x) != batch or x.shape[1] <= int(positions.max()):
            raise SaekitError(f"the model runs on {len(x)} texts of {x.shape[1]} tokens, and features are held in {batch} texts up to position {int(positions.max())}; give the same texts")  # fmt: skip
        here = x[rows, positions]
        change = (values.to(x).repeat_interleave(width, 0) - _at(dictionary.encode(here), named)) / times
        codes = Codes.from_rectangular(named, change, dictionary.n_features, (batch, width))
        return x.index_put((rows, positions), here + written_by(dictionary, codes, here, 0, 0, False))

    with torch.no_grad(), intervene([(model.site(dictionary.reads[0]), write)]):
        yield model


@torch.no_grad()
def continued(
    model: Model, prompts: Int[Tensor, "batch seq"], end: int, limit: int
) -> Int[Tensor, "batch limit"]:
    """What the model says behind prompts, always the most probable token, up to ``limit`` tokens; from ``end`` on, ``end``."""
    if limit < 1:
        raise SaekitError(f"limit = {limit} tokens must be 1 or more")
    tokens, seq = prompts, prompts.shape[1]
    over = torch.zeros(len(prompts), dtype=torch.bool, device=prompts.device)
    while tokens.shape[1] < seq + limit and not over.all():
        given = model.inputs(tokens, torch.ones_like(tokens, dtype=torch.bool))
        said = model.logits(given)[:, -1].argmax(-1).to(tokens.device).where(~over, end)
        tokens, over = torch.cat([tokens, said[:, None]], 1), over | (said == end)
    return torch.nn.functional.pad(tokens[:, seq:], (0, seq + limit - tokens.shape[1]), value=end)


def _at(codes: Codes, features: Int[Tensor, "rows some"]) -> Float[Tensor, "rows some"]:
    """Values of features that each row names for itself."""
    rows = codes.row_ids()
    hits = codes.indices[:, None] == features[rows]
    return codes.values.new_zeros(features.shape).index_add(0, rows, codes.values[:, None] * hits)


def _check(codes: Codes, labels: Tensor) -> None:
    check_axes("labels", labels, "rows", "label")
    check_bools("labels", labels)
    if len(labels) != codes.rows:
        raise SaekitError(f"labels are of {len(labels)} rows, and codes of {codes.rows}; give one row of labels to each")  # fmt: skip
    if not codes.values.isfinite().all():
        raise SaekitError("codes hold NaN or infinity; remove these rows")
    true = labels.sum(0)
    alone = ((true == 0) | (true == len(labels))).nonzero()[:, 0].tolist()
    if alone:
        raise SaekitError(f"label {alone[0]} is true of {int(true[alone[0]])} of {len(labels)} rows; give rows of both classes, or leave it out")  # fmt: skip


def _check_edit(dictionary: Any, features: Tensor, positions: Tensor, values: Tensor) -> None:
    if len(dictionary.reads) != 1 or dictionary.reads != dictionary.writes:
        raise SaekitError(f"dictionary reads {list(dictionary.reads)} and writes {list(dictionary.writes)}; give one that reads and writes one and the same hook point")  # fmt: skip
    if features.numel() == 0 or positions.numel() == 0:
        raise SaekitError("features and positions must name one or more for each text")
    if int(features.min()) < 0 or int(features.max()) >= dictionary.n_features:
        raise SaekitError(f"features {int(features.min())}..{int(features.max())} must lie in 0..{dictionary.n_features - 1}, those of the dictionary")  # fmt: skip
    if int(positions.min()) < 0:
        raise SaekitError(f"position {int(positions.min())} must be counted from the beginning, from 0")
    if not values.isfinite().all():
        raise SaekitError("values hold NaN or infinity; give numbers to hold features at")
