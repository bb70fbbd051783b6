"""Scores are sums over singular directions, which heads before them write, and which can be taken away."""

import pytest
import torch
from test_weights import TOYS, toy

from saekit.circuits import directions
from saekit.circuits.directions import SIDES, Firing, Writer
from saekit.circuits.frozen import Frozen
from saekit.circuits.weights import weights
from saekit.testbed import known_circuits
from saekit.types import SaekitError

TOKENS = torch.randint(64, (12,), generator=torch.Generator().manual_seed(0))
HEADS = ((0, 3), (1, 0), (1, 2))


def some_pairs(frozen: Frozen, layer: int, head: int) -> list[Firing]:
    """A head at every source that some queries see."""
    return [Firing(frozen, layer, head, i, j) for i in (0, 4, 11) for j in range(i + 1)]


@pytest.mark.parametrize("case", TOYS)
@pytest.mark.parametrize("double", [False, True])
def test_terms_add_up_to_the_score(case: str, double: bool) -> None:
    """With biases, rotary positions, grouped keys and QK norms."""
    m = toy(case)
    if double:
        m.module.double()
    frozen = Frozen(weights(m), TOKENS)
    for layer, head in HEADS:
        scores = frozen.queries[layer].scores[head].double()
        for one in some_pairs(frozen, layer, head):
            off = (one.terms.sum() - scores[one.query, one.source]).abs()
            # angles of rotary positions are fp32
            exact = 1e-12 if TOYS[case].get("positions") != "rotary" else 1e-6
            assert off <= (exact if double else 1e-5) * one.terms.norm()
            assert len(one.terms) == 8


@pytest.mark.parametrize("case", TOYS)
def test_directions_are_singular(case: str) -> None:
    patterns = weights(toy(case)).blocks[1].attention.patterns
    found = directions.directions(patterns, 3, offset=2)
    for basis in (found.u, found.v):
        torch.testing.assert_close(basis @ basis.T, torch.eye(8).double(), rtol=0, atol=1e-12)
    assert (found.sigma.diff() <= 0).all() and (found.sigma >= 0).all()


@pytest.mark.parametrize("case", TOYS)
def test_what_was_written_adds_up_to_the_terms_on_either_side(case: str) -> None:
    """To those that are kept, and to those of any directions; and all that is written is the stream."""
    frozen = Frozen(weights(toy(case)), TOKENS)
    for layer, head in HEADS:
        _, written = directions.writers(frozen, layer)
        torch.testing.assert_close(written.sum(0), frozen.seen[layer]["resid_pre"], rtol=0, atol=1e-5)
        one = Firing(frozen, layer, head, 9, 4)
        for some in (one.kept, torch.tensor([5, 1, 2])):
            for side in SIDES:
                _, bias = one.covector(side, some)
                total = sum(directions.upstream(one, side, some).values()) + bias
                assert abs(total - float(one.terms[some].sum())) <= 1e-5 * float(one.terms.norm())


def test_the_smallest_set_reaches_the_score_and_no_smaller_one_does() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(50):
        terms = torch.randn(16, generator=g, dtype=torch.float64)
        terms *= terms.sum().sign()
        kept = directions.smallest(terms)
        assert terms[kept].sum() >= terms.sum() * (1 - 1e-6)
        assert terms.sort(descending=True).values[: len(kept) - 1].sum() < terms.sum()
    assert directions.smallest(torch.tensor([0.1, 5.0, -0.5, -1.0])).tolist() == [1]


@pytest.mark.parametrize("case", TOYS)
def test_scaling_a_span_scales_its_terms(case: str) -> None:
    """Where the sizes that norms divide by stay as they are."""
    frozen = Frozen(weights(toy(case)), TOKENS)
    one = Firing(frozen, 1, 2, 9, 4)
    for side in SIDES:
        stream = frozen.seen[1]["resid_pre"][one.position(side)].double()
        covector, bias = one.covector(side)
        was = float(one.terms[one.kept].sum()) - bias
        for factor in (0.0, 3.0):
            position, change = directions.scaled(one, side, stream, factor)
            assert position == one.position(side)
            assert float((stream + change) @ covector) == pytest.approx(factor * was, abs=1e-5)


def test_a_known_circuit_is_followed_and_cut() -> None:
    """Of hand-built induction: the head before is found, and without what it wrote there is no attention."""
    known = known_circuits.induction(distractors=2, rotate=True)
    record, g = weights(known.model), torch.Generator().manual_seed(0)
    for prompt in known.prompts(5, g):
        frozen = Frozen(record, prompt.tokens)
        (pair,) = (p for p in prompt.pairs if p.head[1] == 1)
        found = [f for f in directions.firings(frozen, 1, 0) if f.query == pair.query[1]]
        (one,) = found
        assert one.source == pair.at
        shares = directions.upstream(one, "source")
        assert max(shares, key=lambda w: shares[w]) == Writer("head", 0, 0)
        assert shares[Writer("head", 0, 0)] >= 0.95 * float(one.terms[one.kept].sum())
        query = directions.upstream(one, "query")
        assert max(query, key=lambda w: query[w]) == Writer("token")
        steps = [s for s in directions.follow(one) if s.side == "source" and s.of[0] == 1]
        assert [(s.layer, s.head) for s in steps] == [(0, 0)]
        names, written = directions.writers(frozen, 1)
        was = directions.attention_with(one, [])
        cut, beside = (
            directions.attention_with(one, [directions.scaled(one, "source", written[i, one.source], 0.0)])
            for i in (names.index(Writer("head", 0, 0)), names.index(Writer("token")))
        )
        assert was >= 0.99 and cut <= 0.2 and beside >= 0.99


def test_logits_follow_a_change_through_everything_behind() -> None:
    for case in TOYS:
        frozen = Frozen(weights(toy(case)), TOKENS)
        one = Firing(frozen, 1, 2, 9, 4)
        torch.testing.assert_close(directions.logits_with(one, []), frozen.logits, rtol=1e-5, atol=1e-5)
        moved = directions.logits_with(
            one, [(4, torch.randn(32, generator=torch.Generator().manual_seed(0)))]
        )
        assert torch.allclose(moved[:4], frozen.logits[:4], atol=1e-5)
        assert not torch.allclose(moved[4], frozen.logits[4], atol=1e-3)


def test_a_head_that_is_not_there_is_refused() -> None:
    patterns = weights(toy("no norms, gelu")).blocks[0].attention.patterns
    with pytest.raises(SaekitError, match="head = 4 is not one of the layer's 4"):
        directions.directions(patterns, 4)
