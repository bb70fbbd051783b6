"""What analyses can't work with is refused in one sentence, before any work."""

from collections.abc import Callable

import pytest
import torch

from saekit.analyses.complexity import importance
from saekit.analyses.concept_geometry import clustering_entropy, crystals, power_law
from saekit.analyses.convergent import exact, lasso, one_to_one, relate, semi_matching
from saekit.analyses.convolutional import bandwidths, log_gabors
from saekit.analyses.coverage import coverage
from saekit.analyses.dynamics import nearest, outlier_scores
from saekit.analyses.lobes import cooccurrence
from saekit.analyses.operators import Convolutional, Lifted, atom_error
from saekit.analyses.subsets import best_subset, gain
from saekit.analyses.world_models import gathered
from saekit.types import Codes, SaekitError

NAN = torch.tensor([[torch.nan, 1.0], [1.0, 2.0]])
LABELS = torch.tensor([[True], [False]])
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
RELATIONS = torch.arange(40) % 2

REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "more components than relations tell": (lambda: crystals(X, RELATIONS, components=2), r"components = 2 must lie in 1\.\.1"),
    "pairs that are all alike": (lambda: crystals(torch.ones(40, 6), RELATIONS), "differences are the same for all pairs"),
    "no draw of a power law": (lambda: power_law(X, (1, 4), draws=0), "draws = 0"),
    "no draw of an entropy": (lambda: clustering_entropy(X, 2, draws=0), "draws = 0"),
    "neurons of another width": (lambda: coverage(X[:2, :3], LABELS, X[:2], LABELS), "have 3 and 6 neurons"),
    "effects that are no numbers": (lambda: importance(X[:2, :2], NAN, torch.zeros(2, dtype=torch.int64)), "hold NaN or Inf"),
    "scores that are no numbers": (lambda: one_to_one(NAN), "scores hold NaN"),
    "units that don't vary": (lambda: lasso(relate(torch.ones(9, 2), X[:9]), [0.1]), "no unit of a varies"),
    "a frequency of 0": (lambda: log_gabors(9, 4, (0.2,), frequency=0.0), r"frequency = 0\.0 must lie"),
    "a bandwidth that is no number": (lambda: log_gabors(9, 4, (torch.nan,)), "above 0"),
    "kernels of nothing": (lambda: bandwidths(torch.zeros(2, 5, 5)), "0 everywhere"),
    "attention that is no number": (lambda: gathered(torch.full((1, 1, 4, 4), torch.nan), torch.tensor([2]), [1]), "patterns hold NaN"),
    "a gain of no numbers": (lambda: gain(NAN.repeat(5, 1), LABELS.repeat(5, 1)[:, 0]), "x holds NaN"),
    "as few rows as coordinates": (lambda: best_subset(X[:4], RELATIONS[:4] > 0, 3), "4 rows are explained by any 3"),
    "as few rows as units": (lambda: exact(relate(X[:4], X[:4]), 3), "4 rows are explained by any 3"),
    "no scores to match": (lambda: semi_matching(NAN), "scores hold NaN"),
    "codes that are no numbers": (lambda: nearest(NAN, X[:, :2]), r"x has shape \[2, 2\], or holds NaN"),
    "steps back": (lambda: outlier_scores(torch.tanh, X, X, steps=-3), "steps = -3"),
    "codes of two widths": (lambda: outlier_scores(torch.tanh, X, X[:, :3], steps=3), "6 wide, and new ones 3"),
    "atoms that are 0": (lambda: Lifted(torch.zeros(3, 6), torch.eye(6), 0.1, 3), r"atoms has shape \[3, 6\], or a row that is 0"),
    "no kernels": (lambda: Convolutional(torch.zeros(0, 6), 0.1, 3), r"kernels has shape \[0, 6\]"),
    "atoms that are no numbers": (lambda: atom_error(NAN, X[:2, :2]), "found has shape"),
    "features that never fire together": (lambda: cooccurrence([Codes.from_dense(torch.eye(4))], 1), "no two of 4 features"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str) -> None:
    call, said = REFUSED[name]
    with pytest.raises(SaekitError, match=said):
        call()
