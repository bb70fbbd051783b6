"""The n-gram baseline is a probability distribution, equals a slow definition, and knows its text."""

from collections import Counter

import numpy as np
import pytest

from saekit.testbed.ngram import KneserNey


def slow(train: list[int], vocab: int, order: int, history: tuple[int, ...], word: int) -> float:
    """Interpolated Kneser-Ney from the formulas, with dictionaries."""
    counts = {order: Counter(tuple(train[i : i + order]) for i in range(len(train) - order + 1))}
    for n in range(order - 1, 0, -1):
        counts[n] = Counter(gram[1:] for gram in counts[n + 1])

    def p(n: int, history: tuple[int, ...]) -> float:
        if n == 0:
            return 1 / vocab
        c = counts[n]
        ones, twos = sum(v == 1 for v in c.values()), sum(v == 2 for v in c.values())
        discount = ones / max(1, ones + 2 * twos)
        same = {g: v for g, v in c.items() if g[:-1] == history}
        total = sum(same.values())
        below = p(n - 1, history[1:])
        if not total:
            return below
        return (max(c[(*history, word)] - discount, 0) + discount * len(same) * below) / total

    return p(order, history)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_it_equals_the_definition_and_sums_to_one(order: int) -> None:
    rng = np.random.default_rng(0)
    train = rng.choice(6, 200, p=[0.4, 0.3, 0.1, 0.1, 0.05, 0.05])
    model = KneserNey(train, 6, order)
    for history in [(0, 0), (5, 4), (1, 2)]:
        own = history[2 - (order - 1) :] if order > 1 else ()
        found = [model.probabilities(np.array([*own, word]))[0] for word in range(6)]
        assert sum(found) == pytest.approx(1, abs=1e-12)
        assert found == pytest.approx([slow(train.tolist(), 6, order, own, w) for w in range(6)], rel=1e-12)


def test_a_periodic_text_is_predicted() -> None:
    text = np.resize(np.arange(50), 5000)
    assert KneserNey(text, 4096, 5).probabilities(text).min() > 0.9


def test_too_long_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 64"):
        KneserNey(np.arange(100), 4096, 6)
