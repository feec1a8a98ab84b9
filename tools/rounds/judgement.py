"""Judges a round's policy by one sample for each held-out prompt, and says when the rounds should stop.

A sample fails if it does not finish or has no text. Failures are never scored: theirs is the lowest score of the first
policy's other samples, and they lose against any sample that does not fail. So a policy gains nothing by failing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo.reporting.comparison import length_controlled, win_rate
from dpo.reporting.metric_table import interval
from dpo.reporting.statistics import mean, mean_per_token, wilson_interval
from dpo.system.errors import UserError
from dpo.system.files import atomic_write
from tools.rounds.records import Prompt, Record, Sample
from tools.rounds.scoring import is_usable
from tools.rounds.store import read_rows, write_rows

NGRAMS = (1, 2, 3)  # the lengths of the n-grams, in words, that diversity counts
ROUNDED = 1e-9  # above what rounding adds to a difference of two shares


class Estimate(NamedTuple):
    """A value with its 95% interval, if it has one."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_record(self) -> Record:
        return {name: value for name, value in self._asdict().items() if value is not None}


@dataclass(frozen=True)
class Judged:
    """A held-out sample, its score, and its win over the first policy's sample: 1, 0, or 0.5 for a tie.

    A scorer that answers in both orders may give a win between these values.
    """

    prompt: str  # as the model sees it
    sample: Sample
    score: float
    win: float

    def to_record(self) -> Record:
        return {"prompt_text": self.prompt, **asdict(self.sample), "score": self.score, "win": self.win}

    @classmethod
    def of(cls, record: Record) -> "Judged":
        rest = {"prompt_text", "score", "win"}
        sample = Sample(**{name: value for name, value in record.items() if name not in rest})
        return cls(record["prompt_text"], sample, record["score"], record["win"])


@dataclass(frozen=True)
class Judgement:
    """The metrics of a round's policy, by name, and its samples in the order of the held-out prompts.

    Round 0 is the first policy, which has no metrics that compare it with itself. LABELS in report.py says what each
    metric is.
    """

    round: int
    metrics: dict[str, Estimate]
    samples: list[Judged]

    @property
    def prompts(self) -> list[int]:
        return [judged.sample.prompt for judged in self.samples]

    @property
    def scores(self) -> np.ndarray:
        return np.array([judged.score for judged in self.samples])

    @property
    def lengths(self) -> np.ndarray:
        """In tokens, the stop token included."""
        return np.array([len(judged.sample.ids) for judged in self.samples])


# Scores


def to_ask(samples: Sequence[Sample], first: Sequence[Sample] | None = None) -> list[int]:
    """The indices of the samples that a scorer is asked about: those that do not fail.

    first has the first policy's samples for a scorer that compares two texts. It is not asked where one of the two
    fails, or where they are equal.
    """
    asked = [i for i, sample in enumerate(samples) if is_usable(sample)]
    if first is None:
        return asked
    return [i for i in asked if is_usable(first[i]) and samples[i].text != first[i].text]


def score_samples(
    prompts: Sequence[Prompt],
    samples: Sequence[Sample],
    answers: Mapping[int, float],
    is_pairwise: bool,
    first: Sequence[Judged] | None,
) -> list[Judged]:
    """Score samples, one per prompt, given the scorer's answers by their index (to_ask).

    first has the first policy's samples; None: these are its samples. The score of a sample is its answer. If texts
    are compared, the answer is the win over the first policy's sample, and the score is the win.
    UserError if all samples of the first policy fail.
    """
    assert [sample.prompt for sample in samples] == [prompt.id for prompt in prompts]
    if first is None and not any(map(is_usable, samples)):
        problem = f"of {len(samples)} held-out samples of the first policy, none finishes with a text"
        raise UserError(f"model: {problem}; raise max_length, or start from a model that ends its responses")
    opponents = samples if first is None else [judged.sample for judged in first]
    if is_pairwise:
        scores = [
            answers.get(i, compare(is_usable(one), is_usable(other)))
            for i, (one, other) in enumerate(zip(samples, opponents, strict=True))
        ]
        wins = scores
    else:
        known = answers.values() if first is None else [judged.score for judged in first]
        lowest = min(known)
        scores = [answers.get(i, lowest) for i in range(len(samples))]
        other_scores = scores if first is None else [judged.score for judged in first]
        wins = [
            compare((is_usable(one), score), (is_usable(other), other_score))
            for one, score, other, other_score in zip(samples, scores, opponents, other_scores, strict=True)
        ]
    texts = [prompt.text for prompt in prompts]
    return [Judged(*row) for row in zip(texts, samples, scores, wins, strict=True)]


def compare(one: Any, other: Any) -> float:
    return 0.5 if one == other else float(one > other)


# Metrics


def judge(
    number: int, samples: Sequence[Judged], logps: Mapping[str, Sequence[float]], history: Sequence[Judgement]
) -> Judgement:
    """Measure the policy of a round; history has the judgements of all earlier rounds, read_history(OUT)[:number].

    logps has log pi(response | prompt) of each sample under this round's policy ("policy"), the first one ("first")
    and that of the round before ("previous"). All three are the same in round 0.
    """
    result = Judgement(number, {}, list(samples))
    lengths, scores, prompts = result.lengths, result.scores, result.prompts
    assert len(history) == number and all(earlier.prompts == prompts for earlier in history)
    metrics = {"score": mean_of(scores)}
    if history:
        first, best = history[0], highest(history)
        wins = [judged.win for judged in samples]
        metrics["score_minus_first"] = mean_of(scores - first.scores)
        metrics["score_minus_best"] = mean_of(scores - best.scores)
        metrics["win_rate"] = Estimate(*win_rate(wins))
        metrics["win_rate_equal_length"] = Estimate(*length_controlled(wins, lengths.tolist(), first.lengths.tolist()))
    policy = np.array(logps["policy"])
    for name in ("first", "previous"):
        ratios = policy - np.array(logps[name])
        metrics[f"kl_{name}"] = mean_of(ratios)
        metrics[f"kl_{name}_per_token"] = mean_of_tokens(ratios, lengths)
    metrics["entropy_per_token"] = mean_of_tokens(-policy, lengths)
    metrics["length"] = mean_of(lengths)
    metrics["finished"] = share([judged.sample.finished for judged in samples])
    metrics["empty"] = share([not judged.sample.text.strip() for judged in samples])
    return Judgement(number, metrics | diversity([judged.sample.text for judged in samples]), list(samples))


def mean_of(values: np.ndarray) -> Estimate:
    """The mean; a single value has no interval."""
    return estimate(mean("x", values))


def mean_of_tokens(sums: np.ndarray, lengths: np.ndarray) -> Estimate:
    """The mean over all tokens, given sums over responses; 0 without tokens."""
    return estimate(mean_per_token("x", sums, lengths)) if lengths.any() else Estimate(0.0)


def estimate(figures: Mapping[str, float]) -> Estimate:
    low, high = interval(figures, "x") or (np.nan, np.nan)
    return Estimate(figures["x"]) if np.isnan(low) else Estimate(figures["x"], low, high)


def share(hits: Sequence[bool]) -> Estimate:
    return Estimate(sum(hits) / len(hits), *wilson_interval(sum(hits), len(hits)))


def diversity(texts: Sequence[str]) -> dict[str, Estimate]:
    """The share of n-grams of words that are distinct, over all texts, and of texts that occurred before."""
    words = [text.split() for text in texts]
    metrics = {}
    for n in NGRAMS:
        grams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
        metrics[f"distinct_{n}"] = Estimate(len(set(grams)) / max(1, len(grams)))
    return metrics | {"duplicates": Estimate(1 - len(set(texts)) / len(texts))}


# The verdict


def highest(history: Sequence[Judgement]) -> Judgement:
    """The round with the highest mean score, the earliest of several."""
    return max(history, key=lambda judgement: judgement.metrics["score"].value)


def stop_reason(history: Sequence[Judgement], min_entropy: float, max_unfinished: float) -> str | None:
    """Why the rounds should stop after the last judged one, with figures; None if they should not.

    Its score is significantly below that of the best earlier round, its entropy is below min_entropy times the first
    policy's, or the share of samples that do not finish rose by more than max_unfinished.
    """
    *earlier, last = history
    if not earlier:
        return None
    first, best = earlier[0].metrics, highest(earlier)
    reasons = []
    change, low, high = last.metrics["score_minus_best"]
    if low is not None and high is not None and high < 0:
        fall = f"{-change:.3g}, 95% interval {-high:.3g} to {-low:.3g}"
        reasons.append(f"its mean score is below that of round {best.round} by {fall}")
    entropy, start = last.metrics["entropy_per_token"].value, first["entropy_per_token"].value
    if entropy < min_entropy * start:
        limit = f"below {min_entropy:g} times the first policy's, which is {start:.3g}"
        reasons.append(f"its entropy is {entropy:.3g} nats per token, {limit}")
    unfinished, before = 1 - last.metrics["finished"].value, 1 - first["finished"].value
    if unfinished - before > max_unfinished + ROUNDED:
        limit = f"{before:.1%} of the first policy's; at most {max_unfinished:.1%} more are allowed"
        reasons.append(f"{unfinished:.1%} of its samples do not finish, and {limit}")
    return f"round {last.round} made the policy worse: {'; '.join(reasons)}" if reasons else None


def best_round(history: Sequence[Judgement], min_entropy: float, max_unfinished: float) -> Judgement:
    """The round with the highest mean score, the earliest of several, among those without a reason to stop."""
    limits = min_entropy, max_unfinished
    return highest([last for n, last in enumerate(history, 1) if stop_reason(history[:n], *limits) is None])


# Files


def judgement_files(out: Path, number: int) -> tuple[Path, Path]:
    """The metrics of a round, and its scored samples."""
    folder = out / f"round-{number}"
    return folder / "judgement.json", folder / "judgement" / "scored.jsonl"


def write_judgement(out: Path, judgement: Judgement) -> None:
    path, samples = judgement_files(out, judgement.round)
    write_rows(samples, (judged.to_record() for judged in judgement.samples))
    metrics = {name: value.to_record() for name, value in judgement.metrics.items()}
    content = {"round": judgement.round, "metrics": metrics}
    atomic_write(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_history(out: Path) -> list[Judgement]:
    """The judgements from round 0 on, up to the first round without one."""
    history: list[Judgement] = []
    while (files := judgement_files(out, len(history)))[0].exists():
        metrics = json.loads(files[0].read_text(encoding="utf-8"))["metrics"]
        estimates = {name: Estimate(**value) for name, value in metrics.items()}
        history.append(Judgement(len(history), estimates, [Judged.of(row) for row in read_rows(files[1])]))
    return history
