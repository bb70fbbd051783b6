"""What analyses and probes can't work with is refused in one sentence, before any work."""

from collections.abc import Callable

import pytest
import torch

from saekit.analyses.complexity import complexity, importance, v_information
from saekit.analyses.concept_geometry import clustering_entropy, crystals, power_law, spectrum
from saekit.analyses.convergent import exact, lasso, one_to_one, relate, semi_matching
from saekit.analyses.convolutional import bandwidths, log_gabors
from saekit.analyses.coverage import coverage
from saekit.analyses.data_selection import select
from saekit.analyses.dynamics import nearest, outlier_scores
from saekit.analyses.gabor import fit_gabors
from saekit.analyses.lobes import cooccurrence
from saekit.analyses.operators import Convolutional, Lifted, atom_error
from saekit.analyses.subsets import best_subset, gain, repeats
from saekit.analyses.vision import grid_of
from saekit.analyses.world_models import aurocs, gathered
from saekit.probes import auroc, linear, sparse
from saekit.types import Codes, SaekitError

NAN = torch.tensor([[torch.nan, 1.0], [1.0, 2.0]])
LABELS = torch.tensor([[True], [False]])
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
RELATIONS = torch.arange(40) % 2
ON = RELATIONS > 0
FACTORS = ON[:, None]

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
    "a step that leads to infinity": (lambda: outlier_scores(lambda z: 10 * z, X, X, 60, 1), r"steps = 60: after \d\d .* not finite; choose fewer"),
    "other rows of features": (lambda: v_information(X, X.repeat(2, 1)), "x has 40 rows, and z 80"),
    "other rows of layers": (lambda: complexity([X, X[1:]], X), "x has 39 rows, and z 40"),
    "features without an axis": (lambda: v_information(X, X[:, 0]), r"shape of z is \[40\]; give \[rows, feature\]"),
    "no rows of importance": (lambda: importance(X[:0], X[:6], RELATIONS[:0]), "z has 0 rows"),
    "effects without an axis": (lambda: importance(X, X[:6, 0], RELATIONS), r"shape of effects is \[6\]"),
    "penalties that are no numbers": (lambda: lasso(relate(X, X), [0.1, torch.nan]), "must all be above 0, and finite"),
    "differences without an axis": (lambda: crystals(X[:, 0], RELATIONS), r"shape of differences is \[40\]; give \[pairs, d\]"),
    "atoms without an axis": (lambda: spectrum(X[0]), r"shape of atoms is \[6\]; give \[features, d\]"),
    "units without an axis": (lambda: relate(X, X[:, 0]), r"shape of b is \[40\]; give \[rows, units\]"),
    "nothing to match": (lambda: semi_matching(torch.zeros(3, 0)), r"scores have shape \[3, 0\]"),
    "a prototype without an axis": (lambda: select([Codes.from_dense(X.relu())], X[0].relu(), 2), r"shape of prototypes is \[6\]"),
    "one field": (lambda: fit_gabors(X), r"shape of fields is \[40, 6\]; give \[field, h, w\]"),
    "rows of another width": (lambda: Lifted(X[:3], torch.eye(6), 0.1, 3).encode(X[:, :5]), "x is 5 wide, and atoms 6"),
    "a shape of nothing": (lambda: grid_of(16, 0), "aspect = 0 must be above 0"),
    "a shape below 0": (lambda: grid_of(50, -1.0), "aspect = -1.0 must be above 0"),
    "factors of other rows": (lambda: coverage(X, FACTORS[1:], X, FACTORS), "labels has 39 rows, and chosen 40"),
    "truth of other rows": (lambda: coverage(X, FACTORS, X, FACTORS[1:]), "truth has 39 rows, and judged 40"),
    "no neurons": (lambda: coverage(X[:, :0], FACTORS, X[:, :0], FACTORS), "have 0 and 0 neurons"),
    "factors as numbers": (lambda: coverage(X, FACTORS.long(), X, FACTORS), "labels are int64; give a tensor of bools"),
    "labels without an axis": (lambda: aurocs(Codes.from_dense(X), ON), r"shape of labels is \[40\]; give \[rows, label\]"),
    "facts as numbers": (lambda: aurocs(Codes.from_dense(X), FACTORS.long()), "labels are int64; give a tensor of bools, as in labels == 1"),
    "labels as numbers": (lambda: linear(X, RELATIONS), "labels are int64; give a tensor of bools, as in labels == 1"),
    "labels as fractions": (lambda: best_subset(X, ON.float(), 2), "labels are float32; give a tensor of bools"),
    "labels in a list": (lambda: linear(X, ON.tolist()), "labels are list; give a tensor of bools"),
    "scores with numbers for labels": (lambda: auroc(X[:, 0], RELATIONS), "labels are int64; give a tensor of bools"),
    "rows without an axis": (lambda: linear(X[:, 0], ON), r"x has shape \[40\]; give \[rows, d\]"),
    "narrower rows held out": (lambda: sparse(X, ON, 2, held_out=(X[:, :1], ON)), "held_out is 1 wide, and x 6"),
    "narrower rows to repeat on": (lambda: repeats(X, ON, (X[:, :2], ON), 1, 0.5), "held_out is 2 wide, and x 6"),
    "a probe of other rows": (lambda: linear(X, ON)(X[:, :3]), "x is 3 wide, and the probe 6"),
    "a sparse probe of other rows": (lambda: sparse(X, ON, 6)(X[:, :3]), "x is 3 wide, and coordinate 5 is asked for"),
    "a sparse probe of other codes": (lambda: sparse(X, ON, 6)(Codes.from_dense(X[:, :3])), "x is 3 wide, and coordinate 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, said = REFUSED[name]
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # users run without checks of shapes
    with pytest.raises(SaekitError, match=said):
        call()
