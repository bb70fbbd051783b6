"""A selection of one's own, outside the package: the k largest, each fainter by its rank, in under 60 lines.

``import`` this module before creating, loading or resuming a dictionary that uses it.
"""

from dataclasses import dataclass

from torch import nn

from saekit.dictionaries.selection import SELECTIONS
from saekit.dictionaries.selection.topk import check_k, ranked
from saekit.dictionaries.training import Selected
from saekit.kernels import topk_encode


@dataclass(frozen=True)
class DampedConfig:
    """``k`` entries per row; each later one counts ``damping`` times as much as the one before."""

    k: int
    damping: float = 0.9

    def check(self, n_features):
        check_k(self.k, n_features)


class Damped(nn.Module):
    """TopK whose entries fade with their rank."""

    Config = DampedConfig
    offers = frozenset({"values", "ranked"})
    affine = True

    def __init__(self, config, n_features, d_in):
        super().__init__()
        self.config = config

    def forward(self, x, W_enc, b_enc):
        values, indices = topk_encode(x, W_enc, b_enc, self.config.k)
        fade = self.config.damping ** values.new_tensor(range(self.config.k))
        return ranked(indices, values * fade, len(W_enc))

    def train_codes(self, x, W_enc, b_enc, state, k_aux=0):
        return Selected(self(x, W_enc, b_enc))


if "damped" not in SELECTIONS:
    SELECTIONS.add("damped", f"{__name__}:Damped")
