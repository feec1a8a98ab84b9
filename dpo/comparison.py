"""How often a judge prefers one model's texts to another's, and how much of that is their length."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpo.diagnosis import Z, wilson_interval

SCORES = {"A": 1.0, "tie": 0.5, "B": 0.0}  # what an answer of the judge gives to A
RIDGE = 0.1  # inverse variance of a normal prior of the regression's weights, which keeps them finite


class Rate(NamedTuple):
    """A share from 0 to 1, with its 95% interval."""

    value: float
    low: float
    high: float


def prompt_scores(answers: Sequence[str], swapped: Sequence[str]) -> list[float]:
    """Return A's mean score per prompt: a judge's answers with A's text shown first, and with B's text shown first."""
    return [(SCORES[one] + 1 - SCORES[other]) / 2 for one, other in zip(answers, swapped, strict=True)]


def win_rate(scores: Sequence[float]) -> Rate:
    """Return the mean of the prompts' scores, a tie counting half.

    The two answers on a prompt are not independent, so each prompt is one trial of Wilson's interval. Scores of one
    half vary less than wins and losses of the same mean, so with many of them the interval is rather too wide.
    """
    low, high = wilson_interval(sum(scores), len(scores))
    return Rate(sum(scores) / len(scores), low, high)


def length_controlled(scores: Sequence[float], lengths: Sequence[int], other_lengths: Sequence[int]) -> Rate:
    """Return the win rate that A would have if its texts were as long as B's, as arXiv 2404.04475 estimates it.

    A logistic regression explains the score of prompt i by the difference d_i of the two lengths:

        score_i = sigmoid(theta + phi tanh(d_i / std(d))),

    whose length term is 0 where both texts are equally long, so that sigmoid(theta) is the win rate without it. The
    paper's third term, a prompt's difficulty, needs comparisons of many models and is left out. Weights are those of
    the highest posterior under a wide normal prior; the interval is that of theta, from the inverse Hessian there.
    """
    differences = np.subtract(lengths, other_lengths).astype(float)
    spread = float(differences.std()) or 1.0
    x = np.stack([np.ones_like(differences), np.tanh(differences / spread)], axis=1)
    y, weights = np.asarray(scores), np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ weights))
        hessian = (x.T * (p * (1 - p))) @ x + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, x.T @ (y - p) - RIDGE * weights)
        weights += step / max(1.0, float(np.linalg.norm(step)))  # a whole Newton step may leave where it is valid
        if np.abs(step).max() < 1e-10:
            break
    theta, error = float(weights[0]), math.sqrt(np.linalg.inv(hessian)[0, 0])
    return Rate(*(1 / (1 + math.exp(-value)) for value in (theta, theta - Z * error, theta + Z * error)))
