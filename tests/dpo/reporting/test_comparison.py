"""Win rates, their intervals, and what is left of them when length is taken out."""

import pytest

from dpo.reporting.comparison import length_controlled, prompt_scores, win_rate


def test_a_prompt_counts_half_for_each_order():
    """A's text is preferred in both places; whichever is shown first; a tie, then A's text where it is second."""
    assert prompt_scores(["A", "A", "tie"], ["B", "A", "B"]) == [1.0, 0.5, 0.75]
    assert prompt_scores(["B", "tie"], ["A", "A"]) == [0.0, 0.25]


def test_the_win_rate_has_wilsons_interval_of_the_number_of_prompts():
    """3 of 4: center (3 + 1.9208) / 7.8416 = 0.6275, spread 1.96 sqrt(0.75 + 0.9604) / 7.8416 = 0.3269."""
    assert win_rate([1, 1, 0, 1]) == pytest.approx((0.75, 0.3006, 0.9544), abs=1e-4)
    assert win_rate([1, 1, 0.5, 0.5]) == win_rate([1, 1, 0, 1])


def test_length_is_taken_out_of_the_win_rate():
    """A is longer by 1 on half of the prompts, where it scores 0.9, and shorter by 1 elsewhere, where it scores 0.5.

    With tanh(1) = t: theta + phi t = logit 0.9 = log 9 and theta - phi t = 0, so theta = log(9) / 2 = log 3, and
    sigmoid(theta) = 0.75. The halves of n = 1000 are independent, so theta's variance is (1/90 + 1/250) / 4 = 0.003778,
    and 1.96 standard errors are 0.1205: sigmoid(1.0986 - 0.1205) = 0.7267, sigmoid(1.0986 + 0.1205) = 0.7719.
    """
    scores = [1] * 900 + [0] * 100 + [1] * 500 + [0] * 500
    rate = length_controlled(scores, [8] * 1000 + [7] * 1000, [7] * 1000 + [8] * 1000)
    assert rate == pytest.approx((0.75, 0.7267, 0.7719), abs=2e-4)
    assert win_rate(scores).value == 0.7


def test_differences_of_length_count_in_units_of_their_spread():
    """A is longer by 3 where it scores 0.9, and shorter by 1 where it scores 0.5: a standard deviation of 2.

    theta + phi tanh(1.5) = log 9 and theta + phi tanh(-0.5) = 0, so phi = 2.1972 / (0.9051 + 0.4621) = 1.6070,
    theta = 0.4621 phi = 0.7426, and sigmoid(theta) = 0.6776.
    """
    scores = [1] * 900 + [0] * 100 + [1] * 500 + [0] * 500
    assert length_controlled(scores, [8] * 2000, [5] * 1000 + [9] * 1000).value == pytest.approx(0.6776, abs=2e-4)


def test_a_judge_of_length_alone_gives_one_half_whoever_is_longer():
    """A wins the 30 prompts on which it is longer and loses the 10 on which it is shorter."""
    rate = length_controlled([1] * 30 + [0] * 10, [50] * 30 + [20] * 10, [35] * 40)
    assert win_rate([1] * 30 + [0] * 10).value == 0.75
    assert rate.low < 0.5 < rate.high and abs(rate.value - 0.5) < 0.2


def test_without_any_difference_of_length_the_two_rates_agree():
    scores = [1, 1, 1, 0.5, 0] * 200
    assert length_controlled(scores, [9] * 1000, [9] * 1000).value == pytest.approx(win_rate(scores).value, abs=1e-3)


@pytest.mark.parametrize("lengths", [[9, 9, 9, 9], [9, 12, 30, 4]])
def test_a_model_that_always_wins_has_finite_rates(lengths):
    rate = length_controlled([1] * 4, lengths, [9] * 4)
    assert 0.5 < rate.value < 1 and 0 < rate.low < rate.value < rate.high <= 1
