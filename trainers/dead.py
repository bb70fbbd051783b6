"""Which features are dead: those that have not fired for a stated number of rows."""

from jaxtyping import Bool, Int
from torch import Tensor

from saekit.trainers.optim import Chosen

DEAD_AFTER = 10_000_000


def dead_after(rows_of_run: int | None) -> Chosen:
    """Rows without firing after which a feature counts as dead: 10M, or 5 % of a shorter run."""
    if rows_of_run is None or rows_of_run // 20 >= DEAD_AFTER:
        return Chosen(DEAD_AFTER, "10M rows")
    return Chosen(max(1, rows_of_run // 20), "5 % of the run")


def update(silent: Int[Tensor, " feature"], fired: Int[Tensor, " feature"], rows: int) -> None:
    """Count the rows of a batch for the features that stayed silent in it; in place."""
    silent.add_(rows)
    silent.masked_fill_(fired > 0, 0)


def dead(silent: Int[Tensor, " feature"], limit: int) -> Bool[Tensor, " feature"]:
    """Mask of the dead features."""
    return silent >= limit
