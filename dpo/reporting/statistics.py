"""Statistics of an evaluation: means with their standard errors, intervals, correlation, calibration, distances."""

import math
from collections.abc import Sequence

import numpy as np

BINS = 10  # of the calibration error
Z = 1.96  # standard errors on each side of a 95% interval


def mean(name: str, values: np.ndarray) -> dict[str, float]:
    """Return the mean of values, (n,), and its standard error, NaN of a single value."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return {name: float(values.mean()), f"{name}_stderr": error}


def mean_per_token(name: str, sums: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Return the mean over all tokens of responses' sums, (n,), and its standard error.

    It is a ratio of two means, whose error is that of its residuals (Cochran, Sampling Techniques, 1977, eq. 6.13).
    """
    per_token = sums.sum() / lengths.sum()
    residuals = mean(name, (sums - per_token * lengths) / lengths.mean())
    return residuals | {name: float(per_token)}


def wilson_interval(hits: float, n: int) -> tuple[float, float]:
    """Return the 95% interval of a share, by Wilson's score (1927), which stays between 0 and 1."""
    center, spread = (hits + Z**2 / 2) / (n + Z**2), Z * math.sqrt(hits * (n - hits) / n + Z**2 / 4) / (n + Z**2)
    return max(0.0, center - spread), min(1.0, center + spread)


def calibration_error(margins: np.ndarray) -> float:
    """Return the expected calibration error of sigmoid(|margin|) as the chance of being right; NaN if all are 0.

    arXiv 1706.04599, eq. 3, with ten bins of equal width.
    """
    if not margins.any():
        return math.nan
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), margins > 0
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(float((right[bins == b] - confidence[bins == b]).sum())) for b in range(BINS)]
    return sum(gaps) / len(margins)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation, NaN where one of the two is constant."""
    if x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def edit_distance(one: Sequence[int], other: Sequence[int]) -> float:
    """Return the Levenshtein distance of two token sequences over the length of the longer, from 0 (equal) to 1."""
    target, steps = np.asarray(other), np.arange(len(other) + 1)
    row = steps
    for i, token in enumerate(one, start=1):
        changed = np.minimum(row[:-1] + (target != token), row[1:] + 1)  # a token replaced, or removed
        row = np.minimum.accumulate(np.concatenate(([i], changed)) - steps) + steps  # or inserted
    return float(row[-1]) / max(len(one), len(other), 1)
