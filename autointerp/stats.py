"""Measures of judges and their 95 % intervals: pure functions of truth and judgement."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

Interval = tuple[float, float]
Z = 1.959964  # of a 95 % interval
DRAWS = 400  # of a bootstrap
SKILL = 0.1  # of a judge, sensitivity + specificity - 1, below which its errors can't be taken off


def wilson(hits: float, n: float) -> Interval:
    """Wilson's interval of a share, ``hits`` of ``n``; all of 0 to 1 where n is 0."""
    if n <= 0:
        return 0.0, 1.0
    p, square = hits / n, Z * Z / n
    middle = (p + square / 2) / (1 + square)
    half = Z / (1 + square) * np.sqrt(p * (1 - p) / n + square / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def jeffreys(hits: float, n: int) -> Interval:
    """Jeffreys' interval of a share, which ends at 0 and 1 where all or none are hits."""
    from scipy.special import betaincinv

    low = float(betaincinv(hits + 0.5, n - hits + 0.5, 0.025)) if hits > 0 else 0.0
    high = float(betaincinv(hits + 0.5, n - hits + 0.5, 0.975)) if hits < n else 1.0
    return low, high


def balanced_accuracy(truth: Bool[ndarray, " n"], judged: Bool[ndarray, " n"]) -> float | None:
    """Mean of the shares judged rightly among true and among false; 0.5 is chance. None unless there are both."""
    if truth.all() or not truth.any():
        return None
    return float((judged[truth].mean() + (~judged[~truth]).mean()) / 2)


def balanced_interval(truth: Bool[ndarray, " n"], judged: Bool[ndarray, " n"]) -> Interval:
    """Interval of the balanced accuracy: Jeffreys' of both shares, combined by the method of variance estimates recovery.

    Zou and Donner (2008): the half-width towards each side is the root of the squared half-widths of the parts. With
    Wilson's intervals as parts it covers shares near 1 too rarely.
    """
    shares = [
        (float(judged[truth].sum()), int(truth.sum())),
        (float((~judged[~truth]).sum()), int((~truth).sum())),
    ]
    ends = [jeffreys(hits, n) for hits, n in shares]
    means = [hits / max(n, 1) for hits, n in shares]
    middle = sum(means) / 2
    down = np.sqrt(sum((mean - low) ** 2 for mean, (low, _) in zip(means, ends, strict=True))) / 2
    up = np.sqrt(sum((high - mean) ** 2 for mean, (_, high) in zip(means, ends, strict=True))) / 2
    return float(max(0.0, middle - down)), float(min(1.0, middle + up))


def auc(truth: Bool[ndarray, " n"], score: Float[ndarray, " n"]) -> float | None:
    """Chance that a true one scores above a false one, ties counting half. None unless there are both."""
    if truth.all() or not truth.any():
        return None
    above, ties = _pairs(truth, score)
    return float((above + ties / 2).mean())


def auc_interval(truth: Bool[ndarray, " n"], score: Float[ndarray, " n"]) -> Interval:
    """Interval of the AUC: DeLong's variance (1988) on the logit scale; where it is 0 or 1, Wilson's of the smaller side."""
    above, ties = _pairs(truth, score)
    wins = above + ties / 2
    value, (n, m) = float(wins.mean()), wins.shape
    if value in (0.0, 1.0) or n < 2 or m < 2:
        return wilson(value * min(n, m), min(n, m))
    variance = wins.mean(1).var(ddof=1) / n + wins.mean(0).var(ddof=1) / m
    half = Z * np.sqrt(variance) / (value * (1 - value))
    middle = np.log(value / (1 - value))
    low, high = (1 / (1 + np.exp(-(middle + sign * half))) for sign in (-1, 1))
    return float(low), float(high)


def _pairs(truth: Bool[ndarray, " n"], score: Float[ndarray, " n"]) -> tuple[ndarray, ndarray]:
    """For each true and each false one whether the true one scores above, and whether they tie."""
    true, false = score[truth][:, None], score[~truth][None, :]
    return true > false, true == false


def pearson(truth: Float[ndarray, " n"], guess: Float[ndarray, " n"]) -> float | None:
    """Correlation; None where either doesn't vary."""
    a, b = truth - truth.mean(), guess - guess.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / size) if size > 0 else None


def correlation_interval(
    truth: Float[ndarray, "n width"], guess: Float[ndarray, "n width"], kind: Bool[ndarray, " n"]
) -> "Interval | None":
    """Interval of the correlation over all tokens of windows of two kinds; None unless there are two of each.

    The jackknife over windows within their kind, on Fisher's scale, with Student's quantile. With ten windows of a kind
    a bootstrap's percentiles cover too rarely where windows differ, and too often where it draws the kinds' shares.
    """
    from scipy.stats import t

    def scaled(some: ndarray) -> float:
        value = pearson(truth[some].reshape(-1), guess[some].reshape(-1)) or 0.0
        return float(np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12)))

    every, variance = np.arange(len(truth)), 0.0
    kinds = [np.flatnonzero(kind == one) for one in (True, False)]
    fewest = min(len(rows) for rows in kinds)
    if fewest < 2:
        return None
    for rows in kinds:
        left_out = np.array([scaled(np.delete(every, row)) for row in rows])
        variance += (len(rows) - 1) * float(left_out.var())
    half = float(t.ppf(0.975, fewest - 1)) * np.sqrt(variance)
    middle = scaled(every)
    return float(np.tanh(middle - half)), float(np.tanh(middle + half))


def bootstrap(
    n: int, measure: Callable[[ndarray], float | None], seed: int, draws: int = DRAWS
) -> "Interval | None":
    """Percentile interval of a measure of numbers 0 to n - 1, drawn with replacement; None if most draws have none."""
    rng = np.random.default_rng(seed)
    found = [measure(rng.integers(0, n, n)) for _ in range(draws)] if n else []
    known = [one for one in found if one is not None]
    if 2 * len(known) <= len(found) or not known:
        return None
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: Float[ndarray, " n"]) -> Interval:
    """Student's interval of a mean over independent features."""
    from scipy.stats import t

    n = len(values)
    if n < 2:
        return (float(values[0]),) * 2 if n else (float("nan"),) * 2
    half = float(t.ppf(0.975, n - 1)) * values.std(ddof=1) / np.sqrt(n)
    return float(values.mean() - half), float(values.mean() + half)


def corrected(value: float, skill: float) -> float | None:
    """A balanced accuracy without its judge's own errors (Rogan and Gladen 1978), 0 to 1.

    ``skill`` is the judge's sensitivity + specificity - 1 where it is known what explanations say. None for a judge that
    knows next to nothing.
    """
    return float(np.clip(0.5 + (value - 0.5) / skill, 0, 1)) if skill > SKILL else None
