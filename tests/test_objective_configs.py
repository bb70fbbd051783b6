"""Terms of an objective refuse settings without meaning, before any work."""

import math

import pytest
import torch

import saekit
from saekit.dictionaries import TrainState
from saekit.dictionaries.objective import OBJECTIVES
from saekit.types import SaekitError

WEIGHTS = [
    *((term, "coefficient", {}) for term in ("auxk", "l1", "l0", "p_annealed", "tanh", "gate", "load_balance")),
    *((term, "coefficient", {}) for term in ("orthogonality", "mutual")),
    ("l0_target", "coefficient", {"k": 4.0}),
    ("end_to_end", "kl", {}),
    ("end_to_end", "later", {}),
]  # fmt: skip
WARMUPS = [*((term, {}) for term in ("l1", "l0", "p_annealed", "tanh", "mutual")), ("l0_target", {"k": 4.0})]
NO_WEIGHT = (-0.5, math.nan, math.inf, -math.inf)
OTHERS = [
    ("tanh", {"slope": 0.0}, "slope = 0.0 must be a number above 0"),
    ("tanh", {"slope": math.nan}, "slope = nan must"),
    ("tanh", {"slope": math.inf}, "slope = inf must"),
    ("end_to_end", {"kl": 0.0}, "kl = 0 and later = 0 leave nothing to minimise"),
    ("hierarchical", {"budgets": ()}, "must rise from at least 1"),
    ("hierarchical", {"budgets": (0, 2)}, "must rise from at least 1"),
    ("hierarchical", {"budgets": (2, 2)}, "must rise from at least 1"),
    ("hierarchical", {"budgets": (4, 2)}, "must rise from at least 1"),
]


@pytest.mark.parametrize(("term", "field", "others"), WEIGHTS)
def test_weights_are_numbers_of_at_least_0(term: str, field: str, others: dict) -> None:
    config = OBJECTIVES[term].Config
    for value in NO_WEIGHT:
        with pytest.raises(SaekitError, match=f"{field} = {value} must be a number of at least 0"):
            config(**{field: value}, **others)
    for value in (0, 0.0, 3.5):
        also = {"kl": 1.0} if field == "later" else {"later": 1.0} if field == "kl" else {}
        assert getattr(config(**{field: value}, **others, **also), field) == value


@pytest.mark.parametrize(("term", "others"), WARMUPS)
def test_warm_ups_are_shares_of_the_run(term: str, others: dict) -> None:
    for value in (-0.1, 1.1, 500, math.nan):
        with pytest.raises(SaekitError, match=f"warmup = {value} must lie in 0..1"):
            OBJECTIVES[term].Config(warmup=value, **others)
    for value in (0, 0.5, 1):
        assert OBJECTIVES[term].Config(warmup=value, **others).warmup == value


@pytest.mark.parametrize(("term", "options", "words"), OTHERS)
def test_other_settings_without_meaning_are_refused(term: str, options: dict, words: str) -> None:
    with pytest.raises(SaekitError, match=words):
        OBJECTIVES[term].Config(**options)


def test_every_term_that_has_a_weight_is_in_the_tables() -> None:
    def having(field: str) -> set[str]:
        return {term for term in OBJECTIVES.table if field in OBJECTIVES[term].Config.__dataclass_fields__}

    assert {term for term, field, _ in WEIGHTS if field == "coefficient"} == having("coefficient")
    assert {term for term, _ in WARMUPS} == having("warmup")


def test_a_fixed_penalty_needs_no_end() -> None:
    d = saekit.create("jumprelu", d_in=16, n_features=64, coefficient=0.1)
    assert torch.isfinite(saekit.Trainer(d).step(torch.randn(64, 16))["loss"])


@pytest.mark.parametrize("alpha", [math.nan, math.inf, 0.0])
def test_a_support_that_is_no_number_is_refused(alpha: float) -> None:
    with pytest.raises(SaekitError, match=f"alpha = {alpha} must be a number above 0"):
        saekit.create("topk", d_in=8, n_features=16, k=2, alpha=alpha)


def test_budgets_above_k_are_refused() -> None:
    with pytest.raises(SaekitError, match=r"budgets = \(4, 64\) end above the 8 codes of a row"):
        saekit.create("hierarchical_topk", d_in=8, n_features=128, k=8, budgets=(4, 64))
    saekit.create("hierarchical_topk", d_in=8, n_features=128, k=8, budgets=(4, 8))


def test_budgets_above_a_k_that_anneals_are_met_by_all_of_a_row() -> None:
    d = saekit.create(
        "hierarchical_topk", d_in=16, n_features=64, k=16, k_start=4, anneal=1.0, budgets=(8, 16)
    )
    alone = saekit.create(
        "hierarchical_topk", d_in=16, n_features=64, k=5, budgets=(5,)
    )  # that of the first step
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    state = TrainState(step=0, steps=10)
    assert torch.equal(d.loss(x, state).total, alone.loss(x, state).total) and d.loss(x, state).total > 1


def test_create_refuses_them_too() -> None:
    with pytest.raises(SaekitError, match=r"coefficient = -1\.0 must"):
        saekit.create("topk", d_in=8, n_features=16, k=2, **{"auxk.coefficient": -1.0})


STEERED = [(name, {}) for name in ("relu", "jumprelu", "gated", "tanh")]


@pytest.mark.parametrize(("preset", "options"), [("p_annealing", {}), ("topk", {"k_start": 16}), *STEERED])
def test_what_falls_over_a_run_needs_its_length(preset: str, options: dict[str, int]) -> None:
    d = saekit.create(preset, d_in=16, n_features=64, k=4, **options)
    with pytest.raises(SaekitError, match="steps is not given"):
        saekit.Trainer(d)
    assert saekit.Trainer(d, steps=10).steps == 10
