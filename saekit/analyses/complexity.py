"""How late in a network, and in training, a feature can be read off linearly, and how much the output rests on it.

Fel, Bethune, Lampinen, Serre and Hermann 2024, "Understanding Visual Feature Reliance through the Lens of Complexity"
(2407.06076): complexity is what a linear reader lacks of the information about a feature, over the layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.analyses.axes import check_axes
from saekit.types import Codes, SaekitError

PENALTIES = tuple(10.0**i for i in range(-3, 6))  # of the squared weights, beside a sum of squared errors
FOLDS = 5
LEAST = 0.1  # information that a feature must reach to have been learnt
FLOOR = 1e-12  # of a feature's mean square: a variance below it is rounding


@dataclass(frozen=True)
class Complexity:
    """``information`` of each feature in each layer, and ``k``, 1 less its mean over the layers; all in [0, 1]."""

    information: Float[Tensor, "layers feature"]

    @property
    def k(self) -> Float[Tensor, " feature"]:
        """K: 0 where every layer tells all of it, 1 where none tells any."""
        return 1 - self.information.mean(0)


def v_information(
    x: Float[Tensor, "rows d"], z: Float[Tensor, "rows feature"], folds: int = FOLDS, seed: int = 0
) -> Float[Tensor, " feature"]:
    """What a linear reader of ``x`` tells of each feature, as the share of its variance, in [0, 1].

    With readers that are linear and Gaussian, V-information is H(z) - H(z | x) = -log(1 - R2) / 2; R2 stands for it. It is
    that of ridge regression on rows it wasn't fitted to, over all folds together; the penalty is chosen within the others
    by leave-one-out. Less than what a constant tells counts as 0.
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import KFold
    from sklearn.preprocessing import StandardScaler

    _check(x, z, folds)
    rows, targets = (one.detach().cpu().double().numpy() for one in (x, z))
    left, whole = np.zeros(targets.shape[1]), np.zeros(targets.shape[1])
    for fitted, judged in KFold(folds, shuffle=True, random_state=seed).split(rows):
        scaler = StandardScaler().fit(rows[fitted])
        model = RidgeCV(PENALTIES, alpha_per_target=True).fit(scaler.transform(rows[fitted]), targets[fitted])
        said = model.predict(scaler.transform(rows[judged])).reshape(len(judged), -1)
        left += np.square(targets[judged] - said).sum(0)
        whole += np.square(targets[judged] - targets[fitted].mean(0)).sum(0)
    return torch.from_numpy(1 - left / whole).clamp(0, 1)


def complexity(
    layers: Sequence[Float[Tensor, "rows _"]],
    z: Float[Tensor, "rows feature"],
    folds: int = FOLDS,
    seed: int = 0,
) -> Complexity:
    """K(z) = 1 - (1/n) sum_l I(f_l(x) -> z) over the ``layers`` f_1 .. f_n, on the same rows as ``z``.

    Layers may differ in width. The input is a layer if it is given; of codes, give ``codes.select(features)``.
    """
    if not layers:
        raise SaekitError("layers is empty; give the activations of at least one")
    return Complexity(torch.stack([v_information(x, z, folds, seed) for x in layers]))


def learning_time(
    steps: Sequence[int], information: Float[Tensor, "checkpoints feature"], share: float = 0.5
) -> Float[Tensor, " feature"]:
    """The step at which each feature's information first reaches ``share`` of the most it ever has, between checkpoints in line.

    Infinite for a feature that never has ``LEAST``: it was not learnt.
    """
    if len(steps) != len(information) or list(steps) != sorted(set(steps)):
        raise SaekitError(f"steps = {list(steps)} must rise, one for each of the {len(information)} checkpoints")  # fmt: skip
    if not 0 < share <= 1:
        raise SaekitError(f"share = {share} must lie in (0, 1]")
    if not information.isfinite().all():
        raise SaekitError("information holds NaN or Inf; measure it again")
    at, most = torch.tensor(steps, dtype=torch.float64), information.double().max(0).values
    level = share * most
    reached = (information.double() >= level).int().argmax(0)
    before = (reached - 1).clamp_min(0)
    low, high = (information.double().gather(0, i[None])[0] for i in (before, reached))
    part = torch.where(high > low, (level - low) / (high - low).clamp_min(1e-300), 1.0)
    return torch.where(most >= LEAST, at[before] + part * (at[reached] - at[before]), torch.inf)


def importance(
    z: Float[Tensor, "rows feature"] | Codes,
    effects: Float[Tensor, "_ outputs"],
    output: Int[Tensor, " _"],
) -> Float[Tensor, " feature"]:
    """Mean over rows of |z_i effects_io|, with o the ``output`` of the row, as the class that is said: gradient x input.

    ``effects`` is by how much an output rises with each feature: W_dec @ readout where features write to what a linear
    readout reads, so that a row's z @ effects are its outputs but for the bias. In units of the outputs.
    """
    rows, n = (z.rows, z.n_features) if isinstance(z, Codes) else z.shape
    check_axes("effects", effects, "feature", "outputs")
    if not rows:
        raise SaekitError("z has 0 rows; give at least one")
    if len(effects) != n:
        raise SaekitError(f"effects has {len(effects)} rows, and z {n} features; give one row a feature")
    if len(output) != rows:
        raise SaekitError(f"output has {len(output)} numbers, and z {rows} rows; give one a row")
    if not 0 <= int(output.min()) <= int(output.max()) < effects.shape[1]:
        raise SaekitError(f"output must hold one of 0..{effects.shape[1] - 1} for each row; it has {int(output.min())}..{int(output.max())}")  # fmt: skip
    own = z.values if isinstance(z, Codes) else z
    if not (own.isfinite().all() and effects.isfinite().all()):
        raise SaekitError("z or effects hold NaN or Inf; leave those rows or features out")
    size, values = effects.abs().double(), own.detach().double().abs()
    if isinstance(z, Tensor):
        return (values * size.T[output]).mean(0)
    feature = z.indices.long()
    contributed = values * size[feature, output[z.row_ids()]]
    return values.new_zeros(n).index_add(0, feature, contributed) / rows


def _check(x: Tensor, z: Tensor, folds: int) -> None:
    check_axes("x", x, "rows", "d")
    check_axes("z", z, "rows", "feature")
    if len(x) != len(z):
        raise SaekitError(f"x has {len(x)} rows, and z {len(z)}; give both the same rows, in the same order")
    if not 2 <= folds <= len(x) // 2:
        raise SaekitError(f"folds = {folds} must lie in 2..{len(x) // 2}, half of the {len(x)} rows; choose fewer, or give more rows")  # fmt: skip
    for name, one in (("x", x), ("z", z)):
        if not one.isfinite().all():
            raise SaekitError(f"{name} holds NaN or Inf; remove its row from all layers and from z")
    own = z.double()
    still = (own.var(0) <= FLOOR * own.square().mean(0)).nonzero()[:, 0]
    if len(still):
        raise SaekitError(f"z doesn't vary in feature {int(still[0])}, of which nothing can be told; leave it out")  # fmt: skip
