"""Measures of judges and their 95 % intervals: pure functions of truth and judgement.

Examples are taken as independent. Windows of one document are alike, so that for other documents intervals are too narrow:
by about a sixth (a design effect of 1.4) in the median of counted rules on code-lm, by more where few documents are scored.
"""

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

Interval = tuple[float, float]
Z = 1.959963984540054  # of a 95 % interval
SKILL = 0.1  # of a judge, sensitivity + specificity - 1, below which its errors can't be taken off


def wilson(hits: float, n: float) -> Interval:
    """Wilson's interval of a share, ``hits`` of ``n``; all of 0 to 1 where n is 0."""
    if n <= 0:
        return 0.0, 1.0
    p, square = hits / n, Z * Z / n
    middle = (p + square / 2) / (1 + square)
    half = Z / (1 + square) * np.sqrt(p * (1 - p) / n + square / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def jeffreys(hits: float, n: float) -> Interval:
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


def f1_interval(
    hits: Float[ndarray, " firing"], false: Float[ndarray, " firing"], true: Float[ndarray, " firing"],
    silent: Float[ndarray, " silent"], ratio: float,
) -> Interval:  # fmt: skip
    """Interval of F1 over tokens, from windows of two kinds of which the text has ``ratio`` silent ones for each firing one.

    Of each firing window: how many tokens are found, said falsely, and true; of each silent one how many are said. Recall,
    true tokens and false ones of either kind get an interval each, over windows, and these are combined as in
    :func:`balanced_interval`: by how far F1 moves with each. Where no window says anything false, some may.
    """
    from scipy.stats import t

    def f1(parts: list[float]) -> float:
        recall, each, here, elsewhere = parts
        return 2 * recall * each / (each * (1 + recall) + here + ratio * elsewhere)

    said, n, mean = hits + false, len(true), float(true.mean())
    size = float(said[said > 0].mean()) if said.any() else 1.0
    half = float(t.ppf(0.975, n - 1)) * float(true.std(ddof=1)) / np.sqrt(n)
    parts = [
        _ratio(hits, true), (mean, max(1.0, mean - half), mean + half),  # a window that fires has a true token
        _rate(false, size), _rate(silent, size) if len(silent) else (0.0, 0.0, 0.0),
    ]  # fmt: skip
    middle = [value for value, _, _ in parts]
    found, down, up = f1(middle), 0.0, 0.0
    for i, (_, low, high) in enumerate(parts):
        ends = sorted(f1([*middle[:i], end, *middle[i + 1 :]]) for end in (low, high))
        down, up = down + min(0.0, ends[0] - found) ** 2, up + max(0.0, ends[1] - found) ** 2
    return float(max(0.0, found - np.sqrt(down))), float(min(1.0, found + np.sqrt(up)))


def _ratio(part: Float[ndarray, " n"], whole: Float[ndarray, " n"]) -> tuple[float, float, float]:
    """A share of tokens, and Jeffreys' interval for as many draws as its variance over windows is worth."""
    from scipy.stats import t

    n, share = len(part), float(part.sum() / whole.sum())
    variance = float(np.square(part - share * whole).sum()) / (n * (n - 1) * float(whole.mean()) ** 2)
    worth = share * (1 - share) / variance * (Z / float(t.ppf(0.975, n - 1))) ** 2 if variance > 0 else n
    worth = min(worth, float(whole.sum()))  # never more than there are tokens
    return share, *jeffreys(share * worth, worth)


def _rate(counts: Float[ndarray, " n"], size: float) -> tuple[float, float, float]:
    """Mean of counts that mostly are 0: Jeffreys' interval of how often, times how many; ``size`` where it isn't seen."""
    total, n = float(counts.sum()), len(counts)
    each = float(np.square(counts).sum()) / total if total else size
    low, high = jeffreys(min(total / each, n), n)  # as many events of equal size as vary as much
    return total / n, low * each, high * each


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
