"""What evaluations decide: which one is the best (keep_best), and whether they end the run (stop_after, stop_if).

`Judge` is pure: from the `Progress` before an evaluation and its metrics it makes the progress after it.
"""

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from dpo.reporting.metric_table import METRICS
from dpo.reporting.statistics import Z
from dpo.settings.config_files import format_value
from dpo.settings.schema import Settings
from dpo.system.console import log_message
from dpo.system.errors import RunError, UserError
from dpo.system.files import atomic_write
from dpo.training.objectives import Loss

STOPPED = "stopped.json"
FEW_SAMPLES = 64  # with these, an entropy has an error of a few percent; docs/runs.md has measurements
BETTER = {metric.recorded("eval"): metric.better for metric in METRICS}
# Metrics that need samples, and of these those that need a reference which knows any response.
OF_SAMPLES = re.compile(r"diagnosis/(sample_length|entropy|kl|finished|distinct_4grams|longest_repeat|reference_)")
OF_KL = re.compile(r"diagnosis/kl")
OF_PAIRS = re.compile(r"(rewards|log_ratios)_eval/|diagnosis/(accuracy|calibration|margin|length_corr|displaced)")
OF_RATIOS = re.compile(r"log_ratios_eval/|diagnosis/(displaced|chosen_log_ratio|rejected_log_ratio)")


class Estimate(NamedTuple):
    """A figure or a bound, and its standard error."""

    value: float
    error: float = 0.0


MakeBound = Callable[[float, Mapping[str, float]], Estimate]


def as_it_is(value: float, first: Mapping[str, float]) -> Estimate:
    return Estimate(value)


def share_of(metric: str) -> MakeBound:
    """The setting times a metric before the first update; NaN if that was not measured or is not above 0."""

    def bound(value: float, first: Mapping[str, float]) -> Estimate:
        start = first.get(metric, math.nan)
        return Estimate(value * start if start > 0 else math.nan, value * first.get(f"{metric}_stderr", 0.0))

    return bound


class Condition(NamedTuple):
    """A condition of stop_if.

    setting    its key below stop_if
    metrics    of evaluations; their sum is compared
    sign       1 if the sum must stay below the bound, -1 if above
    bound      computes the bound from the setting and the metrics before the first update; NaN is never broken
    """

    setting: str
    metrics: tuple[str, ...]
    sign: int
    bound: MakeBound = as_it_is

    def figure(self, metrics: Mapping[str, float]) -> Estimate:
        """The sum of the metrics, with its standard error; NaN if one was not measured."""
        errors = (metrics.get(f"{name}_stderr", 0.0) for name in self.metrics)
        return Estimate(sum(metrics.get(name, math.nan) for name in self.metrics), math.hypot(*errors))

    def is_broken(self, figure: Estimate, bound: Estimate) -> bool:
        """Whether the figure is on the wrong side of the bound by more than chance explains (95%)."""
        return self.sign * (figure.value - bound.value) > Z * math.hypot(figure.error, bound.error)


ENTROPY, FINISHED, LOSS = "diagnosis/entropy_per_token", "diagnosis/finished", "loss/eval"
CONDITIONS = (
    Condition("min_entropy", (ENTROPY,), -1, share_of(ENTROPY)),
    Condition("max_entropy", (ENTROPY,), 1, share_of(ENTROPY)),
    Condition("max_cross_entropy", (ENTROPY, "diagnosis/kl_per_token"), 1, share_of(ENTROPY)),
    Condition("max_unfinished", (FINISHED,), -1, lambda value, first: Estimate(first.get(FINISHED, math.nan) - value)),
    Condition("min_log_ratio", ("diagnosis/chosen_log_ratio_per_token",), -1),
    Condition("max_loss", (LOSS,), 1, share_of(LOSS)),
)


@dataclass(frozen=True)
class Criterion:
    """The metric of keep_best, and whether more of it is better (sign 1) or less (-1)."""

    name: str
    sign: int

    @classmethod
    def parse(cls, text: str) -> "Criterion":
        """Read keep_best: NAME, or max:NAME or min:NAME; UserError if the direction is needed and missing."""
        direction, _, name = text.rpartition(":")
        direction = direction or BETTER.get(name) or ""
        if direction in ("max", "min") and name:
            return cls(name, 1 if direction == "max" else -1)
        advice = f"write max:{name} if more of it is better, min:{name} if less is"
        known = [metric for metric, better in BETTER.items() if better]
        near = [metric for metric in known if metric.startswith(f"{name}/")]
        near = near or difflib.get_close_matches(name, known, n=1, cutoff=0.8)
        problem = f"did you mean {near[0]}? Otherwise {advice}" if near else advice
        raise UserError(f"keep_best={text}: {problem}")

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value is better than the best one; NaN is not, nor is an equal value."""
        return not math.isnan(value) and (best is None or self.sign * value > self.sign * best)


@dataclass(frozen=True)
class Progress:
    """What the evaluations of a run have shown so far.

    first      the metrics of the one before the first update
    metric     keep_best, which the next three belong to
    best       its best value in an evaluation with a checkpoint
    best_step  the examples that this evaluation came after
    waited     evaluations since then
    good_step  the examples after which stop_if was last checked and not broken
    """

    first: Mapping[str, float] = field(default_factory=dict)
    metric: str | None = None
    best: float | None = None
    best_step: int | None = None
    waited: int = 0
    good_step: int | None = None

    @classmethod
    def load(cls, state: Mapping[str, Any], keep_best: str | None) -> "Progress":
        """Read the state of a checkpoint; {} in those of earlier versions. Another keep_best begins anew."""
        progress = cls(**state)
        if progress.metric == keep_best:
            return progress
        return cls(progress.first, good_step=progress.good_step)

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def describe_best(self) -> str:
        assert self.metric is not None
        name = self.metric.rpartition(":")[2]
        before = f", {self.first[name]:.4g} before the first update" if name in self.first else ""
        return f"step-{self.best_step} ({name} {self.best:.4g}{before})"


@dataclass(frozen=True)
class Cause:
    """A setting with its value, and the metric with its figure and the bound that it should have kept."""

    setting: str
    value: float
    metric: str
    figure: float
    bound: float


@dataclass(frozen=True)
class Stop:
    """Why an evaluation ended a run, as in RUN/stopped.json.

    step is that of the last good checkpoint, None if there is none.
    """

    examples: int
    updates: int
    step: int | None
    causes: Sequence[Cause]

    @property
    def is_bad(self) -> bool:
        """Whether stop_if ended the run, so that the evaluation's checkpoint is not written."""
        return self.causes[0].setting != "stop_after"

    def holds(self, settings: Settings) -> bool:
        """Whether a run with these settings would stop again: at least one cause has the same value."""
        return any(setting_of(settings, cause.setting) == cause.value for cause in self.causes)

    def __str__(self) -> str:
        figures = "; ".join(
            f"{cause.setting}={format_value(cause.value)}: {cause.metric} is {cause.figure:.4g}, "
            f"{'the best is' if cause.setting == 'stop_after' else 'the bound'} {cause.bound:.4g}"
            for cause in self.causes
        )
        return f"ended by its evaluation after {self.examples:,} examples: {figures}"

    def report(self, run: Path) -> None:
        """Log why the run was ended; RunError if it has no good checkpoint."""
        if self.step is None:
            advice = "no evaluation before it was good, so nothing is exported; try a lower lr, or a smaller eval_every"
            raise RunError(f"{run}: {self}; {advice}", "no good checkpoint")
        log_message(f"{run}: {self}. LATEST is step-{self.step}. Another value of the setting lets a resume continue.")

    def write(self, run: Path) -> None:
        atomic_write(run / STOPPED, (json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def read(cls, run: Path) -> "Stop | None":
        """Read RUN/stopped.json; None if evaluations have not ended the run."""
        try:
            content = json.loads((run / STOPPED).read_text(encoding="utf-8"))
            return cls(**content | {"causes": [Cause(**cause) for cause in content["causes"]]})
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError):
            raise UserError(f"{run / STOPPED}: cannot be read; remove it to continue the run") from None


def setting_of(settings: Settings, name: str) -> float | None:
    group, _, key = name.rpartition(".")
    value: float | None = getattr(settings.stop_if if group else settings, key)
    return value


class Judge:
    """What the settings keep_best, stop_after and stop_if make of evaluations."""

    def __init__(self, settings: Settings):
        self.metric, self.stop_after = settings.keep_best, settings.stop_after
        self.criterion = None if self.metric is None else Criterion.parse(self.metric)
        self.bounds, self.debug = active(settings), settings.debug

    def __call__(
        self, progress: Progress, examples: int, updates: int, metrics: Mapping[str, float]
    ) -> tuple[Progress, Stop | None]:
        """The progress after an evaluation, and why it ends the run, if it does.

        The evaluation before the first update has no checkpoint: it is not the best one, and ends nothing. UserError if
        the first evaluation of keep_best has no such metric.
        """
        if progress.metric != self.metric:
            self.check(metrics)
            progress = replace(progress, metric=self.metric)
        if not updates:
            return replace(progress, first=dict(metrics)), None
        if broken := self.broken(progress.first, metrics):
            return progress, Stop(examples, updates, progress.good_step, broken)
        progress = progress if self.debug else replace(progress, good_step=examples)
        if self.criterion is None:
            return progress, None
        value = metrics.get(self.criterion.name, math.nan)
        if self.criterion.is_better(value, progress.best):
            return replace(progress, best=value, best_step=examples, waited=0), None
        progress = replace(progress, waited=progress.waited + 1)
        if self.stop_after is None or progress.waited < self.stop_after or progress.best is None:
            return progress, None
        cause = Cause("stop_after", self.stop_after, self.criterion.name, value, progress.best)
        return progress, Stop(examples, updates, examples, [cause])

    def broken(self, first: Mapping[str, float], metrics: Mapping[str, float]) -> list[Cause]:
        """The conditions that an evaluation breaks; one whose metric or bound was not measured is not broken."""
        causes = []
        for condition, value in self.bounds.items():
            figure, bound = condition.figure(metrics), condition.bound(value, first)
            if condition.is_broken(figure, bound):
                setting, metric = f"stop_if.{condition.setting}", " + ".join(condition.metrics)
                causes.append(Cause(setting, value, metric, figure.value, bound.value))
        return causes

    def check(self, metrics: Mapping[str, float]) -> None:
        """Raise UserError if the evaluations of this run do not have the metric of keep_best."""
        undefined = "diagnosis/length_correlation"  # while all margins are 0
        if self.criterion is not None and self.criterion.name not in (*metrics, undefined):
            names = ", ".join(name for name in metrics if not name.startswith(("seconds/", "memory_gb/")))
            raise UserError(f"keep_best={self.metric}: the evaluations of this run have no such metric, but {names}")


def active(settings: Settings) -> dict[Condition, float]:
    """The conditions of stop_if that are on, with their values."""
    values = settings.stop_if.model_dump()
    return {one: values[one.setting] for one in CONDITIONS if values[one.setting] is not None}


# What is known before a model loads


def keep_best_problems(settings: Settings, loss: Loss) -> list[str]:
    """A line if keep_best cannot be used: no direction, or a metric that this run will not record."""
    if settings.keep_best is None:
        return []
    try:
        name = Criterion.parse(settings.keep_best).name
    except UserError as error:
        return [str(error)]
    reason = why_unrecorded(name, settings, loss)
    return [f"keep_best={settings.keep_best}: {reason}; choose another metric"] if reason else []


def stop_if_notes(settings: Settings, loss: Loss) -> list[str]:
    """A line for each condition of stop_if that this run will never measure, and one if there are few samples."""
    lines = []
    n_samples, reads_samples = settings.n_eval_model_samples, False
    for condition, value in active(settings).items():
        reasons = [why_unrecorded(name, settings, loss) for name in condition.metrics]
        reason = next((reason for reason in reasons if reason), None)
        if condition.bound is not as_it_is and not settings.do_first_eval:
            reason = "it is relative to the evaluation before the first update, which do_first_eval=false leaves out"
        if reason:
            lines.append(f"stop_if.{condition.setting}={value:g} is never checked: {reason}.")
        else:
            reads_samples = reads_samples or any(OF_SAMPLES.match(name) for name in condition.metrics)
    if reads_samples and n_samples < FEW_SAMPLES:
        lines.append(
            f"n_eval_model_samples={n_samples}: so few samples show only large changes to stop_if; "
            f"set it to {FEW_SAMPLES} or more."
        )
    return lines


def resumed_notes(settings: Settings, first: Mapping[str, float]) -> list[str]:
    """A line for each condition of stop_if that a resumed run cannot check, for lack of a figure of its start."""
    lines = []
    for condition, value in active(settings).items():
        of_samples = any(OF_SAMPLES.match(name) for name in condition.metrics)
        is_known = not settings.do_first_eval or (of_samples and not settings.sample_during_eval)  # by stop_if_notes
        if math.isnan(condition.bound(value, first).value) and not is_known:
            reason = "the evaluation before the first update did not measure what it is relative to"
            lines.append(f"stop_if.{condition.setting}={value:g} is never checked: {reason}.")
    return lines


def why_unrecorded(name: str, settings: Settings, loss: Loss) -> str | None:
    """Why a run's evaluations will not have a metric; None if they may have it."""
    kind, slash, side = name.partition("/")
    if kind.endswith("_train") or name in ("loss/train", "router_loss/train", "grad_norm", "lr"):
        return "it is a metric of updates, not of evaluations"
    if OF_SAMPLES.match(name) and not settings.sample_during_eval:
        return "sample_during_eval=false draws no samples"
    if OF_KL.match(name) and (not loss.needs_reference or loss.cached_reference):
        return "the reference is precomputed" if loss.needs_reference else "the loss has no reference"
    if OF_PAIRS.match(name) and loss.n_responses == 1:
        return "the loss has no pairs"
    if OF_RATIOS.match(name) and not loss.needs_reference:
        return "the loss has no reference"
    return None
