"""Two models' texts before a judge: how often it prefers one of them, and how much of that is their length."""

import json
import math
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dpo.reporting.statistics import Z, wilson_interval
from dpo.system.errors import UserError

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


# A comparison by a judge


def ask_judge(command: str, questions: Sequence[dict[str, Any]]) -> list[str]:
    """Return the judge's answer, A, B or tie, to each question; UserError if it fails or gives another answer."""
    lines = "".join(f"{json.dumps(question)}\n" for question in questions)
    try:
        done = subprocess.run(shlex.split(command), input=lines, stdout=subprocess.PIPE, encoding="utf-8")
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"--judge {command!r}: cannot be started ({error})") from None
    if done.returncode:
        raise UserError(f"--judge {command!r}: failed with exit code {done.returncode}")
    known = {"a": "A", "b": "B", "tie": "tie"}
    found = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if len(found) != len(questions):
        raise UserError(f"--judge {command!r}: gave {len(found)} answers to {len(questions)} lines")
    for number, line in enumerate(found, start=1):
        if line.lower() not in known:
            raise UserError(f"--judge {command!r}: line {number} of its answers is {line[:40]!r}, not A, B or tie")
    return [known[line.lower()] for line in found]


@dataclass(frozen=True)
class Comparison:
    """Texts of A and B for the same prompts, and what the judge answered when A's text was shown first, and second.

    swapped holds the judge's own words, so that its "A" is B's text.
    """

    prompts: list[Any]
    a: list[str]
    b: list[str]
    answers: list[str]
    swapped: list[str]

    @classmethod
    def judged(cls, command: str, prompts: list[Any], a: list[str], b: list[str]) -> "Comparison":
        """Ask a judge about each prompt in both orders."""
        orders = [zip(prompts, a, b, strict=True), zip(prompts, b, a, strict=True)]
        questions = [{"prompt": prompt, "a": one, "b": other} for order in orders for prompt, one, other in order]
        answers = ask_judge(command, questions)
        return cls(prompts, a, b, answers[: len(prompts)], answers[len(prompts) :])

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per prompt for people to read."""
        names = ("prompt", "a", "b", "answer_ab", "answer_ba")
        columns = (self.prompts, self.a, self.b, self.answers, self.swapped)
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def summary(self) -> list[str]:
        """Return the result in lines for the console."""
        scores, n = prompt_scores(self.answers, self.swapped), len(self.prompts)
        lengths, others = ([len(text) for text in texts] for texts in (self.a, self.b))
        rates = {"Win rate of A": win_rate(scores)}
        rates["Length-controlled win rate of A"] = length_controlled(scores, lengths, others)
        given = [*self.answers, *self.swapped]
        consistent = (("A", "B"), ("B", "A"), ("tie", "tie"))
        moved = sum(pair not in consistent for pair in zip(self.answers, self.swapped, strict=True))
        return [
            f"{n} prompts: A better on {sum(s > 0.5 for s in scores)}, B on {sum(s < 0.5 for s in scores)},"
            f" equal on {scores.count(0.5)}",
            *(f"{name}: {r.value:.1%}, 95% interval {r.low:.1%} to {r.high:.1%}" for name, r in rates.items()),
            f"Mean length: A {sum(lengths) / n:.0f}, B {sum(others) / n:.0f} characters",
            f"The judge preferred the text shown first {given.count('A')} times, the second {given.count('B')} times;"
            f" its answer depends on the order for {moved} prompts",
        ]
