"""Every selection with every kind of atoms, fit, penalty and normalisation: what has a meaning passes the contract."""

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import saekit
from saekit.contract import CONTRACT, laws
from saekit.dictionaries import Dictionary
from saekit.dictionaries.atoms import ATOMS
from saekit.dictionaries.objective import OBJECTIVES
from saekit.dictionaries.selection import SELECTIONS
from saekit.dictionaries.wiring import WIRINGS
from saekit.types import SaekitError

FITS = [name for name in OBJECTIVES if OBJECTIVES[name].fit]
PENALTIES = [
    "none",
    *(n for n in OBJECTIVES if n not in (*FITS, "end_to_end")),
]  # it needs a model: test_end_to_end
NORMALISE = ["scale", "none", "centre", "whiten"]
TRAINED = [name for name in ATOMS if ATOMS[name].trained]
FACTORS = (list(SELECTIONS), TRAINED, FITS, PENALTIES, NORMALISE, list(WIRINGS))
WIDTHS: dict[str, dict[str, Any]] = {
    "autoencoder": {"d_in": 16},
    "cross_layer": {"d_in": 8, "n_layers": 2, "d_out": 6},
    "crosscoder": {"d_in": (6, 10), "dedicated": (4, 8)},
    "lorsa": {"d_in": 16, "d_out": 12, "n_qk": 2, "d_qk": 4, "rotary": 2},
    "molt": {"d_in": 16, "d_out": 12, "ranks": (2, 3)},
    "transcoder": {"d_in": 16, "d_out": 12, "skip": True},
}
Combination = tuple[str, str, str, str, str, str]

# presets show these; a pair of choices needn't suit each other
SUITED = {"training_helps", "recovers_planted_features"}
RANKED = {"topk", "abstopk", "pursuit", "omp", "switch"}
STEERED = {"l1", "l0", "l0_target", "tanh", "p_annealed"}
THRESHOLDED = {"iterative", "unrolled"}  # L0 is up to a fixed weight
PURSUING = ("pursuit", "omp", *THRESHOLDED)
CUT = ("omp", "iterative")  # codes carry no gradient
SHIFTED = ("convolutional", "fourier")
FREE_L0 = {"relu", "jumprelu", "gated"}


def meaningful(selection: str, atoms: str, fit: str, penalty: str, normalise: str, wiring: str) -> bool:
    """What should be possible, said once more in other words than the code's."""
    allowed = {
        "auxk": selection not in PURSUING,
        "l0": selection == "jumprelu",
        "l0_target": selection == "jumprelu",
        "gate": selection == "gated",
        "load_balance": selection == "switch",
    }
    tied = atoms in ("tied", *SHIFTED)
    if atoms in SHIFTED and wiring != "autoencoder":
        return False  # a place of one row is none of several
    if atoms == "frozen" and penalty in ("orthogonality", "mutual"):
        return False
    if wiring == "crosscoder" and (normalise == "whiten" or atoms == "archetypal"):
        return False  # whitening mixes sources; a hull has no corner for one source alone
    if wiring == "cross_layer" and (normalise == "whiten" or penalty == "mutual"):
        return False  # whitening mixes layers; each layer has a decoder of its own
    if wiring == "lorsa" and selection in (*PURSUING, "switch"):
        return False  # attention stands between what is read and the residual; a router reads one input
    if wiring == "molt" and (selection in ("gated", *PURSUING) or fit != "reconstruction"):
        return False  # codes switch maps on; prefixes would cut maps apart
    if wiring in ("transcoder", "cross_layer", "lorsa", "molt") and (
        tied or selection in (*CUT, "codebook")
    ):  # one space for both ways
        return False
    if selection == "codebook" and (
        not tied or fit == "hierarchical" or penalty not in ("none", "orthogonality", "mutual")
    ):
        return False  # codes are constants, and of one importance
    if selection in CUT and (not tied or penalty in ("l1", "tanh", "p_annealed")):
        return False
    return (fit != "hierarchical" or selection in RANKED) and allowed.get(penalty, True)


def make(selection: str, atoms: str, fit: str, penalty: str, normalise: str, wiring: str) -> Dictionary:
    terms = tuple(
        dict.fromkeys((fit, *([penalty] * (penalty != "none")), *(["gate"] * (selection == "gated"))))
    )
    ranked = selection not in FREE_L0 | THRESHOLDED
    k = {"k": 4} if ranked or (penalty in STEERED and selection in FREE_L0) else {}
    experts = {"experts": 4} if selection == "switch" else {}
    weight = {"weight": 0.01} if selection in THRESHOLDED else {}  # some rows are as small, unnormalised
    return saekit.create(
        "topk", wiring=wiring, **WIDTHS[wiring], n_features=64, selection=selection, atoms=atoms, objective=terms, normalise=normalise,
        seed=1, **k, **experts, **weight,
    )  # fmt: skip


def columns(combination: Combination, rows: torch.Tensor) -> torch.Tensor:
    """Rows of training data: for a transcoder the target is a map of what is read, of another width."""
    if combination[3] == "tanh":
        rows = rows / 20  # of codes as large as these, unnormalised, it has levelled off
    two = combination[5] in ("transcoder", "cross_layer", "lorsa", "molt")
    rows = torch.cat([rows, rows[:, 4:].abs()], 1) if two else rows
    return rows.unflatten(0, (-1, 8)) if combination[5] == "lorsa" else rows


def pairwise() -> list[Combination]:
    """A greedy covering array: every meaningful pair of two factors' values occurs in some combination."""
    every = [c for c in itertools.product(*FACTORS) if meaningful(*c)]

    def pairs(c: Combination) -> set[tuple[int, str, int, str]]:
        return {(i, c[i], j, c[j]) for i, j in itertools.combinations(range(len(FACTORS)), 2)}

    wanted, chosen = set().union(*map(pairs, every)), []
    while wanted:
        # looking at each 7th keeps the search short; all are looked at where those bring nothing
        best = max(every[len(chosen) % 7 :: 7], key=lambda c: len(pairs(c) & wanted))
        if not pairs(best) & wanted:
            best = max(every, key=lambda c: len(pairs(c) & wanted))
        chosen.append(best)
        wanted -= pairs(best)
    return chosen


def keeps_the_contract(combination: Combination, rows: torch.Tensor, folder: Path) -> None:
    for law in laws(make(*combination)):
        if law not in SUITED:
            (folder / law).mkdir(parents=True)
            CONTRACT[law](lambda: make(*combination), columns(combination, rows), folder / law)


@pytest.mark.parametrize("combination", pairwise(), ids="-".join)
def test_a_combination_keeps_the_contract(
    combination: Combination, planted_rows: torch.Tensor, tmp_path: Path
) -> None:
    keeps_the_contract(combination, planted_rows, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("wiring", list(WIRINGS))
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("selection", list(SELECTIONS))
def test_all_combinations_keep_the_contract(
    selection: str, fit: str, wiring: str, planted_rows: torch.Tensor, tmp_path: Path
) -> None:
    broken = []
    for c in itertools.product([selection], TRAINED, [fit], PENALTIES, NORMALISE, [wiring]):
        if meaningful(*c):
            try:
                keeps_the_contract(c, planted_rows, tmp_path / "-".join(c))
            except Exception as error:  # of one combination, which is not to hide the others
                broken.append(f"{'-'.join(c)}: {error!r}"[:400])
            shutil.rmtree(tmp_path / "-".join(c), ignore_errors=True)
    assert not broken, "\n".join(broken)


def test_a_meaningless_combination_is_refused_with_its_reason() -> None:
    # normalisation excludes nothing; l0_target wants k first
    every = [c for c in itertools.product(*FACTORS) if c[4] == "scale" and c[3] != "l0_target"]
    for c in every[::11]:  # a stride that no factor's size divides
        if meaningful(*c):
            make(*c)
        else:
            with pytest.raises(
                SaekitError,
                match=f"objective '.*' with selection '{c[0]}'|selection '(omp|iterative|codebook)' (sends|reads)|atoms 'tied' read by|moves atoms|from one place|would cut them|has one for each layer|at every place of one row|with wiring .lorsa.|with wiring .molt.|cuts features off",
            ):
                make(*c)
