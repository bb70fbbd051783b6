"""Windows in which a feature is silent: the harder they are to tell apart, the more a score says.

Each kind is a function of the windows, the feature, the silent windows of a side and a generator, which returns them in
the order in which they are to be taken; adding one is a function and a line in ``NEGATIVES``.
"""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from saekit.autointerp.windows import NEAR, SIDES, Examples, Windows
from saekit.types import SaekitError

Order = Int64[ndarray, " _"]
TOKENS, NEIGHBOURS, QUERIES = (
    5,
    5,
    64,
)  # of a feature: frequent tokens, co-firing features, windows like which others are


def random(windows: Windows, feature: int, silent: Order, n: int, rng: np.random.Generator) -> Order:
    """Any."""
    return rng.permutation(silent)[:n]


def token(windows: Windows, feature: int, silent: Order, n: int, rng: np.random.Generator) -> Order:
    """With a token on which the feature mostly fires, in another context."""
    seen, values = _explained(windows, feature)
    fired, counts = np.unique(windows.tokens[seen][values > 0], return_counts=True)
    frequent = fired[np.argsort(-counts, kind="stable")[:TOKENS]]
    return rng.permutation(silent[np.isin(windows.tokens[silent], frequent).any(1)])[:n]


def neighbour(windows: Windows, feature: int, silent: Order, n: int, rng: np.random.Generator) -> Order:
    """In which a feature fires that often fires where this one does."""
    near = windows.neighbours(feature, NEIGHBOURS)
    fired = [windows.peaks(int(other))[0] for other in near]
    found = np.intersect1d(silent, np.concatenate([np.zeros(0, np.int64), *fired]))
    return rng.permutation(found)[:n]


def lexical(windows: Windows, feature: int, silent: Order, n: int, rng: np.random.Generator) -> Order:
    """Whose rare tokens are those of windows in which the feature fires."""
    seen, _ = _explained(windows, feature)
    like = np.asarray(windows.words[seen[rng.permutation(len(seen))[:QUERIES]]].sum(0)).reshape(-1)
    score = windows.words[silent] @ like
    near = silent[np.argsort(-score, kind="stable")[: NEAR * n]]
    return rng.permutation(near)[:n]


NEGATIVES: dict[str, Callable[[Windows, int, Order, int, np.random.Generator], Order]] = {
    "random": random, "token": token, "neighbour": neighbour, "lexical": lexical,
}  # fmt: skip


def _explained(windows: Windows, feature: int) -> tuple[Order, ndarray]:
    """Windows of the explaining side in which the feature fires, and its strengths there."""
    seen, _ = windows.peaks(feature)
    seen = seen[windows.side[seen] == SIDES.index("explain")]
    return seen, windows.values(feature, seen)


def silent(windows: Windows, feature: int, side: str, n: int, kinds: Sequence[str] = tuple(NEGATIVES), seed: int = 0) -> Examples:  # fmt: skip
    """Up to ``n`` windows of a side in which a feature fires nowhere, none twice, as many of each kind as there are.

    What a kind lacks is made up by random ones.
    """
    for kind in kinds:
        if kind not in NEGATIVES:
            raise SaekitError(f"negatives of kind {kind!r} are none of {', '.join(NEGATIVES)}")
    fired, _ = windows.peaks(feature)
    still = np.ones(len(windows), bool)
    still[fired] = False
    rng = np.random.default_rng([windows.seed, seed, feature, 4])
    left = windows.of_side(side)
    chosen: list[int] = []
    named: list[str] = []
    left = left[still[left]]
    share = -(-n // len(kinds))
    for kind in (*[kind for kind in kinds if kind != "random"], "random"):
        wanted = n - len(chosen) if kind == "random" else min(share, n - len(chosen))
        found = NEGATIVES[kind](windows, feature, left, wanted, rng).tolist() if wanted and len(left) else []
        chosen += found
        named += [kind] * len(found)
        left = np.setdiff1d(left, found, assume_unique=True)
    return windows.examples(feature, np.array(chosen, np.int64), named)
