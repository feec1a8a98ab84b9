"""Statistics of an evaluation: means, intervals, correlation, calibration, edit distance, repetition in texts."""

import math
from collections.abc import Sequence

import numpy as np

BINS = 10  # of the calibration error
Z = 1.96  # standard errors on each side of a 95% interval


def mean(name: str, values: np.ndarray) -> dict[str, float]:
    """The mean of values, (n,), and its standard error, which is NaN for a single value."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return {name: float(values.mean()), f"{name}_stderr": error}


def mean_per_token(name: str, sums: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """The mean over all tokens, and its standard error, given sums over responses, (n,), and their lengths.

    The mean is a ratio of two means; its error comes from the residuals (Cochran, Sampling Techniques, 1977, eq. 6.13).
    """
    per_token = sums.sum() / lengths.sum()
    residuals = mean(name, (sums - per_token * lengths) / lengths.mean())
    return residuals | {name: float(per_token)}


def wilson_interval(hits: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share, between 0 and 1: Wilson's score interval (1927)."""
    center = (hits + Z**2 / 2) / (n + Z**2)
    spread = Z * math.sqrt(hits * (n - hits) / n + Z**2 / 4) / (n + Z**2)
    return max(0.0, center - spread), min(1.0, center + spread)


def calibration_error(margins: np.ndarray) -> float:
    """The expected calibration error of sigmoid(|margin|) as the probability of being right.

    arXiv 1706.04599, eq. 3, with ten bins of equal width. NaN if all margins are 0.
    """
    if not margins.any():
        return math.nan
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    is_right = margins > 0
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(float((is_right[bins == b] - confidence[bins == b]).sum())) for b in range(BINS)]
    return sum(gaps) / len(margins)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's correlation; NaN if x or y is constant."""
    if x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def edit_distance(one: Sequence[int], other: Sequence[int]) -> float:
    """The Levenshtein distance of two token sequences, divided by the longer length: from 0 (equal) to 1."""
    target = np.asarray(other)
    steps = np.arange(len(other) + 1)
    row = steps
    for i, token in enumerate(one, start=1):
        replaced_or_removed = np.minimum(row[:-1] + (target != token), row[1:] + 1)
        row = np.minimum.accumulate(np.concatenate(([i], replaced_or_removed)) - steps) + steps  # or inserted
    return float(row[-1]) / max(len(one), len(other), 1)


def distinct_ngrams(ids: Sequence[int], n: int) -> float:
    """The share of a text's n-grams that do not occur earlier in it; NaN without n-grams.

    1 minus this is seq-rep-n of arXiv 1908.04319.
    """
    ngrams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else math.nan


def longest_repeat(ids: Sequence[int]) -> int:
    """The length of the longest sequence that occurs twice in a text; the two may overlap."""
    tokens = np.asarray(ids)
    longest = 0
    common = np.zeros(
        len(tokens) + 1, dtype=int
    )  # at i + 1: how many last tokens of ids[: i + 1], ids[: end + 1] match
    for end in range(1, len(tokens)):
        common[1 : end + 1] = np.where(tokens[:end] == tokens[end], common[:end] + 1, 0)
        longest = max(longest, int(common.max()))
    return longest
