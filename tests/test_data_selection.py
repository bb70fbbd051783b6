"""Generalised Jaccard on sparse codes is its definition, pooling is the dense one, and one pass finds what a sort does."""

import pytest
import torch
from torch import Tensor

from saekit.analyses.data_selection import jaccard, pooled, prototype, select
from saekit.testbed.grammars import COMMON, CYCLE, FIRST_MARK, GRAMMARS, LENGTH, MARKED, VOCABULARY, texts
from saekit.types import Codes


def g(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sparse(*shape: int, seed: int = 0, share: float = 0.2) -> Tensor:
    dense = torch.rand(*shape, generator=g(seed))
    return dense * (torch.rand(*shape, generator=g(seed + 1)) < share)


def test_it_is_the_definition() -> None:
    x, p = sparse(50, 30), sparse(30, seed=2, share=0.5)
    expected = torch.minimum(x, p).sum(1) / torch.maximum(x, p).sum(1)
    assert torch.allclose(jaccard(Codes.from_dense(x), p), expected, atol=1e-6)


def test_its_laws() -> None:
    x = sparse(20, 30, share=0.4)
    codes = Codes.from_dense(x)
    found = torch.stack([jaccard(codes, one) for one in x])
    assert torch.allclose(found, found.T, atol=1e-6) and torch.allclose(found.diagonal(), torch.ones(20))
    assert (found >= 0).all() and (found <= 1 + 1e-6).all()
    apart = found[(x[:, None] * x[None]).sum(2) == 0]
    assert not apart.any()
    assert torch.allclose(jaccard(Codes.from_dense(2 * x), x[3])[3], torch.tensor(0.5))  # not blind to scale
    distance = 1 - found  # a metric: the triangle inequality holds
    assert (distance[:, None] <= distance[:, :, None] + distance[None] + 1e-6).all()
    assert jaccard(Codes.from_dense(torch.zeros(2, 30)), x[0]).tolist() == [0, 0]


@pytest.mark.parametrize("how", ["max", "mean"])
@pytest.mark.parametrize("masked", [False, True])
def test_pooling_is_that_of_dense_codes(how: str, masked: bool) -> None:
    x = sparse(7, 9, 12)
    mask = torch.rand(7, 9, generator=g(5)) < 0.6
    mask[3] = False
    dense = x * mask[..., None] if masked else x
    expected = dense.amax(1) if how == "max" else dense.sum(1) / (mask.sum(1, keepdim=True).clamp_min(1) if masked else 9)  # fmt: skip
    found = pooled(Codes.from_dense(x), how, mask if masked else None)
    assert found.shape == (7,) and torch.allclose(found.to_dense(), expected, atol=1e-6)
    assert (found.values > 0).all() and len(found.values) == int((expected > 0).sum())
    assert torch.allclose(prototype(found), expected.mean(0), atol=1e-6)


def test_half_precision_is_added_up_in_more() -> None:
    x = 100 * torch.ones(1, 700, 2)
    found = pooled(Codes.from_dense(x.half()), "mean")
    assert found.values.tolist() == [100, 100] and prototype(found).tolist() == [100, 100]


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [3, 30, 0, 7]])
@pytest.mark.parametrize("count", [1, 6, 40, 99])
def test_one_pass_chooses_what_a_sort_does(sizes: list[int], count: int) -> None:
    x, p = sparse(40, 30), sparse(2, 30, seed=2, share=0.5)
    x[7] = x[31]  # equals
    scores = torch.stack([jaccard(Codes.from_dense(x), one) for one in p]).amax(0)
    expected = scores.sort(descending=True, stable=True)
    found = select((Codes.from_dense(part) for part in x.split(sizes)), p, count)
    assert torch.equal(found.samples, expected.indices[:count]) and found.seen == 40
    assert torch.equal(found.similarities, expected.values[:count])


def test_texts_differ_by_their_marks_alone() -> None:
    grammars = torch.arange(3000) % GRAMMARS
    tokens = texts(grammars, g())
    assert tokens.shape == (3000, LENGTH) and int(tokens.max()) < VOCABULARY
    marks = tokens >= FIRST_MARK
    assert torch.equal(((tokens - FIRST_MARK) // CYCLE)[marks], grammars[:, None].expand_as(tokens)[marks])
    for text, on in zip(tokens[:100], marks[:100], strict=True):
        own = (text[on] - FIRST_MARK) % CYCLE
        assert ((own[1:] - own[:-1]) % CYCLE == 1).all()  # in their cycle
    common = torch.stack([torch.bincount(tokens[grammars == i][~marks[grammars == i]], minlength=COMMON) for i in range(GRAMMARS)]).double()  # fmt: skip
    shares = common / common.sum(1, keepdim=True)
    assert (shares - 1 / COMMON).abs().max() < 0.02
    assert marks.double().mean() == pytest.approx(MARKED, abs=0.005)


X = Codes.from_dense(sparse(4, 5, 6))
ROWS = Codes.from_dense(sparse(4, 6))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: pooled(ROWS), r"codes have shape \(4,\)"),
        (lambda: pooled(X, "sum"), "how = 'sum' must be one of max, mean"),
        (lambda: pooled(X, mask=torch.ones(4, 4, dtype=torch.bool)), r"mask has shape \(4, 4\)"),
        (lambda: pooled(X.with_values(-X.values)), "values below 0"),
        (lambda: pooled(X.with_values(X.values * float("nan"))), "NaN"),
        (lambda: prototype(Codes.from_dense(torch.zeros(3, 6))), "the 3 exemplars fire no feature"),
        (lambda: jaccard(ROWS, torch.ones(5)), "prototype is of 5 features, and samples of 6"),
        (lambda: jaccard(ROWS, -torch.ones(6)), "prototype holds NaN, inf or values below 0"),
        (lambda: select([ROWS], torch.ones(1, 6), 0), "count = 0"),
        (lambda: select([ROWS], torch.ones(0, 6), 2), "prototypes has no rows"),
        (lambda: select([], torch.ones(1, 6), 2), "pool has no samples"),
        (lambda: select([X], torch.ones(1, 6), 2), r"samples have shape \(4, 5\); give pooled codes"),
        (lambda: prototype(X), r"exemplars have shape \(4, 5\); give pooled codes"),
    ],
)
def test_mistakes_are_told(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
