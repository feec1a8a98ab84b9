"""Compares two models' texts with a judge: win rates, also controlled for length."""

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

SCORES = {"A": 1.0, "tie": 0.5, "B": 0.0}  # A's score for each answer of the judge
RIDGE = 0.1  # inverse variance of the normal prior that keeps the regression's weights finite


class Rate(NamedTuple):
    """A share from 0 to 1, with its 95% interval."""

    value: float
    low: float
    high: float


def prompt_scores(answers: Sequence[str], swapped: Sequence[str]) -> list[float]:
    """A's mean score per prompt, from the answers with A's text first and those with B's text first."""
    return [(SCORES[one] + 1 - SCORES[other]) / 2 for one, other in zip(answers, swapped, strict=True)]


def win_rate(scores: Sequence[float]) -> Rate:
    """The mean of the prompts' scores; a tie counts half.

    Wilson's interval counts each prompt as one trial, since its two answers are not independent. It is too wide if
    there are many ties: scores of one half vary less than wins and losses.
    """
    low, high = wilson_interval(sum(scores), len(scores))
    return Rate(sum(scores) / len(scores), low, high)


def length_controlled(scores: Sequence[float], lengths: Sequence[int], other_lengths: Sequence[int]) -> Rate:
    """Estimate A's win rate if its texts were as long as B's: arXiv 2404.04475.

    A logistic regression models the score of prompt i by d_i, the length of A's text minus the length of B's:

        score_i = sigmoid(theta + phi tanh(d_i / std(d))).

    The length term is 0 if both texts have the same length, so sigmoid(theta) is the win rate without it. The paper's
    third term, the difficulty of a prompt, needs comparisons of many models and is left out. The weights maximize the
    posterior under a wide normal prior; the interval of theta comes from the inverse Hessian there.
    """
    differences = np.subtract(lengths, other_lengths).astype(float)
    spread = float(differences.std()) or 1.0
    x = np.stack([np.ones_like(differences), np.tanh(differences / spread)], axis=1)
    y, weights = np.asarray(scores), np.zeros(2)
    for _ in range(100):
        p = 1 / (1 + np.exp(-x @ weights))
        hessian = (x.T * (p * (1 - p))) @ x + RIDGE * np.eye(2)
        step = np.linalg.solve(hessian, x.T @ (y - p) - RIDGE * weights)
        weights += step / max(1.0, float(np.linalg.norm(step)))  # a full Newton step may overshoot
        if np.abs(step).max() < 1e-10:
            break
    theta, error = float(weights[0]), math.sqrt(np.linalg.inv(hessian)[0, 0])
    value, low, high = (1 / (1 + math.exp(-x)) for x in (theta, theta - Z * error, theta + Z * error))
    return Rate(value, low, high)


# A comparison by a judge


def ask_judge(command: str, questions: Sequence[dict[str, Any]]) -> list[str]:
    """The judge's answer to each question, A, B or tie; UserError if it fails or gives another answer."""
    text = "".join(f"{json.dumps(question)}\n" for question in questions)
    try:
        done = subprocess.run(shlex.split(command), input=text, stdout=subprocess.PIPE, encoding="utf-8")
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"--judge {command!r}: cannot be started ({error})") from None
    if done.returncode:
        raise UserError(f"--judge {command!r}: failed with exit code {done.returncode}")
    answers = {"a": "A", "b": "B", "tie": "tie"}
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if len(lines) != len(questions):
        raise UserError(f"--judge {command!r}: gave {len(lines)} answers to {len(questions)} questions")
    for number, line in enumerate(lines, start=1):
        if line.lower() not in answers:
            raise UserError(f"--judge {command!r}: line {number} of its answers is {line[:40]!r}, not A, B or tie")
    return [answers[line.lower()] for line in lines]


@dataclass(frozen=True)
class Comparison:
    """Texts of A and B for the same prompts, and the answers of a judge that sees them in both orders.

    answers are given with A's text first. In swapped, B's text is first, so that the answer "A" means B's text.
    """

    prompts: list[Any]
    a: list[str]
    b: list[str]
    answers: list[str]
    swapped: list[str]

    @classmethod
    def judged(cls, command: str, prompts: list[Any], a: list[str], b: list[str]) -> "Comparison":
        """Ask a judge about each prompt in both orders."""
        questions = [{"prompt": prompt, "a": one, "b": two} for prompt, one, two in zip(prompts, a, b, strict=True)]
        swapped = [question | {"a": question["b"], "b": question["a"]} for question in questions]
        answers = ask_judge(command, questions + swapped)
        return cls(prompts, a, b, answers[: len(prompts)], answers[len(prompts) :])

    def rows(self) -> list[dict[str, Any]]:
        """A readable row per prompt."""
        names = ("prompt", "a", "b", "answer_ab", "answer_ba")
        columns = (self.prompts, self.a, self.b, self.answers, self.swapped)
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]

    def summary(self) -> list[str]:
        """The result in lines for the console."""
        n = len(self.prompts)
        scores = prompt_scores(self.answers, self.swapped)
        lengths_of_a = [len(text) for text in self.a]
        lengths_of_b = [len(text) for text in self.b]
        rates = {
            "Win rate of A": win_rate(scores),
            "Length-controlled win rate of A": length_controlled(scores, lengths_of_a, lengths_of_b),
        }
        answers = [*self.answers, *self.swapped]
        consistent = (("A", "B"), ("B", "A"), ("tie", "tie"))
        inconsistent = sum(pair not in consistent for pair in zip(self.answers, self.swapped, strict=True))
        return [
            f"{n} prompts: A better on {sum(s > 0.5 for s in scores)}, B on {sum(s < 0.5 for s in scores)},"
            f" equal on {scores.count(0.5)}",
            *(f"{name}: {r.value:.1%}, 95% interval {r.low:.1%} to {r.high:.1%}" for name, r in rates.items()),
            f"Mean length: A {sum(lengths_of_a) / n:.0f}, B {sum(lengths_of_b) / n:.0f} characters",
            f"The judge preferred the text shown first {answers.count('A')} times, the second {answers.count('B')} "
            f"times; its answer depends on the order for {inconsistent} prompts",
        ]
