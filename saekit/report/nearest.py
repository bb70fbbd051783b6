"""Which features are alike: by what they write, and by the tokens that they fire on."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool
from numpy import ndarray
from torch import Tensor

from saekit.dictionaries import Dictionary
from saekit.types import Codes, SaekitError

Near = list[list[tuple[int, float]]]  # of each feature asked for: (feature, how alike), closest first
CAPACITY = 1 << 23  # active codes kept for counting: 32 MiB
BLOCK = 4096  # rows of a decoder compared at once
CELLS = 1 << 20  # of a block of counts


@torch.no_grad()
def nearest_by_decoder(dictionary: Dictionary, features: Sequence[int], n: int = 5) -> Near:
    """The ``n`` features whose decoder rows have the highest cosine to each feature's, in the units of the data.

    Blocks of rows are compared: nothing is [features, features]. Empty for dictionaries that write no one direction.
    """
    if dictionary.wiring.kind == "transforms":
        return [[] for _ in features]
    weight, chosen = dictionary.W_dec, torch.tensor(features, dtype=torch.int64)

    def unit(rows: Tensor) -> Tensor:
        return torch.nn.functional.normalize(dictionary.norm_out.directions(rows).float(), dim=-1)

    own = unit(weight[chosen.to(weight.device)])
    best = torch.full((len(chosen), n), -torch.inf)
    place = torch.zeros(len(chosen), n, dtype=torch.int64)
    for start in range(0, len(weight), BLOCK):
        cosine = (own @ unit(weight[start : start + BLOCK]).T).cpu()
        stop = start + cosine.shape[1]
        inside = ((chosen >= start) & (chosen < stop)).nonzero().squeeze(1)
        cosine[inside, chosen[inside] - start] = -torch.inf  # a feature is not its own neighbour
        value, at = cosine.topk(min(n, cosine.shape[1]), -1)
        best, order = torch.cat([best, value], 1).topk(n, -1)
        place = torch.cat([place, at + start], 1).gather(1, order)
    pairs = zip(place.tolist(), best.tolist(), strict=True)
    return [
        [(f, c) for f, c in zip(found, cosines, strict=True) if c > -torch.inf] for found, cosines in pairs
    ]


class CoFiring:
    """Counts on how many tokens two features fire together, of a few features with all others.

    It keeps which features are active on each unmasked token, up to ``capacity`` entries. Where there are more, it
    goes on with every second batch, then every fourth, and so on, over the whole text: memory is bounded, and
    ``n_tokens`` says how many tokens the counts are of.
    """

    def __init__(self, n_features: int, features: Sequence[int], capacity: int = CAPACITY):
        if capacity < 1:
            raise SaekitError(f"capacity = {capacity} must be at least 1")
        self.n_features, self.features, self.capacity = n_features, list(features), capacity
        self._stride, self._seen = 1, 0
        # of every batch: how many features are active on each token, and which
        self._kept: list[tuple[ndarray, ndarray]] = []

    @property
    def n_tokens(self) -> int:
        """Tokens that are counted."""
        return sum(len(counts) for counts, _ in self._kept)

    def add(self, mask: Bool[Tensor, "*shape"], codes: Codes) -> None:
        """Read one batch; ``mask`` is true where a token counts."""
        self._seen += 1
        if (self._seen - 1) % self._stride:
            return
        row, feature = codes.active()
        flat = mask.to(row.device).reshape(-1)
        counted = flat[row]
        counts = torch.bincount(row[counted], minlength=len(flat))[flat]
        self._kept.append((counts.int().cpu().numpy(), feature[counted].int().cpu().numpy()))
        while len(self._kept) > 1 and sum(len(features) for _, features in self._kept) > self.capacity:
            self._kept, self._stride = self._kept[::2], 2 * self._stride

    def nearest(self, n: int = 5) -> Near:
        """The ``n`` features with the highest Jaccard index to each one, once all is read: tokens of both over those of either."""
        from scipy.sparse import csr_array

        empty = np.zeros(0, dtype=np.int32)
        parts = zip((empty, empty), *self._kept, strict=True)
        counts, indices = (np.concatenate(part) for part in parts)
        self._kept = [(counts, indices)]  # held once
        offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
        shape = (len(counts), self.n_features)
        fires = csr_array((np.ones(len(indices), dtype=np.int32), indices, offsets), shape=shape)
        fires.sum_duplicates()  # a pursuit may choose a unit twice for one token
        fires.data[:] = 1
        total = fires.sum(0)
        out: Near = []
        size = max(1, CELLS // self.n_features)
        own = fires[:, self.features].T.tocsr()
        for start in range(0, len(self.features), size):
            both = (own[start : start + size] @ fires).tocsr()
            for row, feature in enumerate(self.features[start : start + size]):
                part = slice(both.indptr[row], both.indptr[row + 1])
                others, together = both.indices[part], both.data[part]
                alike = together / (total[feature] + total[others] - together)
                alike[others == feature] = 0
                order = np.lexsort((others, -alike))[:n]
                out.append([(int(others[at]), float(alike[at])) for at in order if alike[at] > 0])
        return out
