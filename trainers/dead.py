"""Which features are dead, those that have not fired for a stated number of rows; and their resampling."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.dictionaries import Dictionary, TrainState
from saekit.trainers.optim import Adam, Chosen
from saekit.types import SaekitError

DEAD_AFTER = 10_000_000
# in the first batches many features lose by chance; AuxK, which teaches dead ones to be as small as what is left,
# would keep them from winning later (measured in LOG.md)
LEAST_BATCHES = 100
ENCODER_SHARE = 0.2  # of the live features' mean norm, for the encoder of a resampled one behind a ReLU
PURPOSE = 3  # of the random numbers


def dead_after(steps: int, rows_per_step: int) -> Chosen:
    """Rows without firing after which a feature counts as dead: 10M, or 5 % of a shorter run, but 100 batches."""
    share, least = steps * rows_per_step // 20, LEAST_BATCHES * rows_per_step
    if max(share, least) >= DEAD_AFTER:
        return Chosen(DEAD_AFTER, "10M rows")
    return Chosen(share, "5 % of the run") if share > least else Chosen(least, f"{LEAST_BATCHES} batches")


def update(silent: Int[Tensor, " feature"], fired: Int[Tensor, " feature"], rows: int) -> None:
    """Count the rows of a batch for the features that stayed silent in it; in place."""
    silent.add_(rows)
    silent.masked_fill_(fired > 0, 0)


def dead(silent: Int[Tensor, " feature"], limit: int) -> Bool[Tensor, " feature"]:
    """Mask of the dead features."""
    return silent >= limit


def check_resampling(dictionary: Dictionary) -> None:
    """Raise unless features have atoms of their own that can be written anew."""
    name = dictionary.config.atoms[0]
    if dictionary.wiring.kind != "rows":
        raise SaekitError(
            f"resample_every gives features the directions of rows, and a dictionary of wiring {dictionary.config.wiring[0]!r} reads others; leave it out"
        )
    if not isinstance(getattr(dictionary.atoms, "weight", None), torch.nn.Parameter):
        raise SaekitError(
            f"resample_every needs atoms that are trained one by one, and those of {name!r} aren't; leave it out"
        )


@torch.no_grad()
def resample(
    dictionary: Dictionary,
    dead: Bool[Tensor, " feature"],
    x: Float[Tensor, "batch columns"],
    state: TrainState,
    optimizer: Adam,
) -> None:
    """Give dead features new directions: rows that are reconstructed badly (Bricken et al. 2023, appendix).

    Rows are drawn with probability proportional to their squared loss; the atom is the row's direction,
    the encoder the same, the bias 0, the moments cleared. The encoder gets a fifth of the live ones' mean
    norm, so that it doesn't disturb; where features compete by rank, their whole norm, or it would never win.
    """
    if not dead.any():
        return
    given, target = dictionary.wiring.split(x)
    loss = (dictionary(given) - target).square().sum(-1)
    chance = loss.square().cpu() + 1e-30
    chosen = torch.multinomial(chance, int(dead.sum()), replacement=True, generator=state.generator(PURPOSE))
    chosen = chosen.to(x.device)
    written = torch.nn.functional.normalize(dictionary.norm_out(target[chosen]), dim=-1)
    read = torch.nn.functional.normalize(dictionary.norm_in(given[chosen]), dim=-1)
    if dictionary.encoder is not None:
        live = dictionary.encoder[~dead]
        share = ENCODER_SHARE if "free_l0" in dictionary.selection.offers else 1.0
        size = live.norm(dim=-1).mean() if len(live) else torch.ones(())
        dictionary.encoder[dead] = read * (1 if dictionary.encoder_unit else share * size)
    dictionary.atoms.weight[dead] = written
    dictionary.b_enc[dead] = 0
    if hasattr(dictionary.selection, "reset"):
        dictionary.selection.reset(dead)
    learnt = [p for p in dictionary.selection.parameters() if len(p) == len(dead)]
    optimizer.forget(dead, [dictionary.atoms.weight, dictionary.b_enc, dictionary.encoder, *learnt])
