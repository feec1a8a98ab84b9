"""Intervals, errors and distances, by numbers derived by hand."""

import math

import numpy as np
import pytest

from dpo.reporting.statistics import calibration_error, correlation, edit_distance, mean_per_token, wilson_interval


@pytest.mark.parametrize(
    "hits, n, low, high", [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962)]
)
def test_the_interval_is_wilsons(hits, n, low, high):
    """From (p + z^2 / 2n -+ z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n) with z = 1.96."""
    assert wilson_interval(hits, n) == pytest.approx((low, high), abs=1e-4)


def test_calibration_error_is_the_gap_between_confidence_and_the_share_of_right_pairs():
    """Margin log 3 means a chance of 3/4. Of four pairs three are right: no gap; all right: a gap of 1/4."""
    margin = math.log(3)
    assert calibration_error(np.array([margin, margin, margin, -margin])) == pytest.approx(0.0)
    assert calibration_error(np.array([margin] * 4)) == pytest.approx(0.25)
    two_bins = np.array([margin] * 4 + [-math.log(1.5)] * 4)  # 4 at 0.75, all right; 4 at 0.6, none
    assert calibration_error(two_bins) == pytest.approx((0.25 + 0.6) / 2)
    assert math.isnan(calibration_error(np.zeros(3)))


def test_a_margin_of_any_size_has_a_bin():
    assert calibration_error(np.array([1e6, 800.0])) == pytest.approx(0.0)


def test_correlation_of_a_constant_is_unknown():
    assert correlation(np.array([1.0, 2.0, 4.0]), np.array([2.0, 4.0, 8.0])) == pytest.approx(1.0)
    assert math.isnan(correlation(np.ones(3), np.arange(3.0)))


@pytest.mark.parametrize(
    "one, other, edits",
    [("kitten", "sitting", 3), ("flaw", "lawn", 2), ("abc", "abc", 0), ("", "ab", 2), ("ab", "", 2), ("ab", "ba", 2)],
)
def test_the_edit_distance_counts_replaced_removed_and_inserted_tokens(one, other, edits):
    length = max(len(one), len(other))
    assert edit_distance([*map(ord, one)], [*map(ord, other)]) == pytest.approx(edits / length)
    assert edit_distance([], []) == 0.0


def test_the_error_per_token_counts_that_long_responses_weigh_more():
    """Sums 1 and 4 over 2 and 2 tokens: 5/4 per token, residuals -1.5 and 1.5, over the mean length 0.75 each way.

    Their deviation is 1.5 / sqrt(2), and the error 0.75. Against sums of 1 and 4 over 2 and 8 tokens: none.
    """
    found = mean_per_token("x", np.array([1.0, 4.0]), np.array([2.0, 2.0]))
    assert found == pytest.approx({"x": 1.25, "x_stderr": 0.75})
