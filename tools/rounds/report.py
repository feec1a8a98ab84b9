"""OUT/report.html: the rounds side by side, from the files in OUT."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo.reporting.figures import Line, line_chart
from dpo.reporting.metric_table import Chart
from dpo.reporting.page import Figure, Table, render, write_page
from tools.rounds.judgement import Estimate, Judged, Judgement, best_round, read_history, stop_reason
from tools.rounds.scoring import is_usable

N_PROMPTS = 10  # held-out prompts whose samples are shown

SCORE = Chart(
    "Score", "mean over the held-out prompts; failures count as the lowest score of the first policy's others"
)
WIN_RATE = Chart("Win rate over the first policy", "a tie counts half; failures lose", "share")
KL = Chart("KL, nats per response", "mean of log(policy / other policy) over the policy's samples")
ENTROPY = Chart("Entropy, nats per token", "mean of -log(policy) over the tokens of its samples")
LENGTH = Chart("Length, tokens")
FAILURES = Chart("Samples that finish, and empty ones", "share of the held-out samples", "share")
DIVERSITY = Chart(
    "Diversity", "distinct n-grams of words, and texts that occurred before; longer texts repeat more", "share"
)


@dataclass(frozen=True)
class Metric:
    """How a metric of a judgement is shown; curve is its label in its chart."""

    label: str
    chart: Chart | None = None
    curve: str = ""

    def format(self, estimate: Estimate | None) -> str:
        """The value with its interval; empty without a value."""
        if estimate is None:
            return ""
        value, *interval = (self.format_value(x) for x in estimate if x is not None)
        return f"{value} [{', '.join(interval)}]" if interval else value

    def format_value(self, value: float) -> str:
        return f"{value:.1%}" if self.chart is not None and self.chart.scale == "share" else f"{value:.3g}"


METRICS = {
    "score": Metric("score", SCORE),
    "score_minus_first": Metric("score minus round 0's"),
    "score_minus_best": Metric("score minus the best earlier round's"),
    "win_rate": Metric("win rate", WIN_RATE, "all"),
    "win_rate_equal_length": Metric("win rate at equal length", WIN_RATE, "at equal length"),
    "kl_first": Metric("KL to the first policy, nats per response", KL, "to the first policy"),
    "kl_first_per_token": Metric("KL to the first policy, nats per token"),
    "kl_previous": Metric("KL to the previous policy, nats per response", KL, "to the previous policy"),
    "kl_previous_per_token": Metric("KL to the previous policy, nats per token"),
    "entropy_per_token": Metric("entropy, nats per token", ENTROPY),
    "length": Metric("length, tokens", LENGTH),
    "finished": Metric("samples that finish", FAILURES, "finish"),
    "empty": Metric("empty samples", FAILURES, "empty"),
    "distinct_1": Metric("distinct words", DIVERSITY, "words"),
    "distinct_2": Metric("distinct 2-grams of words", DIVERSITY, "2-grams"),
    "distinct_3": Metric("distinct 3-grams of words", DIVERSITY, "3-grams"),
    "duplicates": Metric("texts that occurred before", DIVERSITY, "repeated texts"),
}


def write_report(out: Path, min_entropy: float, max_unfinished: float) -> None:
    """Write OUT/report.html about the rounds that have been judged, one at least."""
    history = read_history(out)
    reason = stop_reason(history, min_entropy, max_unfinished)
    best = best_round(history, min_entropy, max_unfinished)
    write_page(out / "report.html", page(history, best, reason, stages(out)))


def summary_line(judgement: Judgement) -> str:
    """A round's main metrics for the console, score and win rate with their 95% intervals."""
    known = [name for name in ("score", "win_rate") if name in judgement.metrics]
    kl, entropy, length, finished = (
        judgement.metrics[name].value for name in ("kl_first", "entropy_per_token", "length", "finished")
    )
    parts = [
        *(f"{METRICS[name].label} {METRICS[name].format(judgement.metrics[name])}" for name in known),
        f"KL to the first policy {kl:.3g} nats per response",
        f"entropy {entropy:.3g} nats per token",
        f"length {length:.3g} tokens",
        f"{finished:.1%} finish",
    ]
    return f"round {judgement.round}: {', '.join(parts)}"


def page(history: Sequence[Judgement], best: Judgement, reason: str | None, stages: Table | None) -> str:
    n = len(history[0].samples)
    rounds = [f"round {judgement.round}" for judgement in history]
    table = {
        metric.label: [metric.format(judgement.metrics.get(name)) for judgement in history]
        for name, metric in METRICS.items()
    }
    return render(
        title="On-policy rounds",
        headlines=headlines(history, best),
        verdict=reason and f"Stopped: {reason}; the best round is {best.round}.",
        charts={f"Rounds, judged on {n:,} held-out prompts": [*charts(history), frontier(history)]},
        samples={"Samples of the same prompts": samples(history)},
        tables={"Rounds side by side, with 95% intervals": Table(rounds, table)}
        | ({"Stages": stages} if stages is not None else {}),
    )


def headlines(history: Sequence[Judgement], best: Judgement) -> dict[str, str]:
    """The large numbers at the top of the page, by label."""
    numbers = {"rounds": str(history[-1].round), "best round": str(best.round)}
    for name in ("score", "win_rate"):
        if estimate := best.metrics.get(name):
            value, *edges = (METRICS[name].format_value(x) for x in estimate if x is not None)
            interval = f", 95% interval {' to '.join(edges)}" if edges else ""
            numbers[f"{METRICS[name].label} of the best round{interval}"] = value
    return numbers


def charts(history: Sequence[Judgement]) -> list[Figure]:
    """A chart of each kind over the rounds, with 95% intervals as bands."""
    lines: dict[Chart, list[Line]] = defaultdict(list)
    for name, metric in METRICS.items():
        known = [judgement for judgement in history if name in judgement.metrics]
        if metric.chart is not None and known:
            x = [judgement.round for judgement in known]
            y = [judgement.metrics[name].value for judgement in known]
            lines[metric.chart].append(Line(metric.curve, x, y, interval_edges(known, name)))
    return [
        Figure(line_chart(chart.title, curves, chart.scale, "round"), chart.meaning) for chart, curves in lines.items()
    ]


def interval_edges(history: Sequence[Judgement], name: str) -> tuple[list[float], list[float]] | None:
    """The lower and the upper ends of a metric's intervals, if all rounds have one."""
    estimates = [judgement.metrics[name] for judgement in history]
    lows = [estimate.low for estimate in estimates if estimate.low is not None]
    highs = [estimate.high for estimate in estimates if estimate.high is not None]
    return (lows, highs) if len(lows) == len(estimates) else None


def frontier(history: Sequence[Judgement]) -> Figure:
    """Score against the KL to the first policy, a point per round."""
    kl, scores = ([judgement.metrics[name].value for judgement in history] for name in ("kl_first", "score"))
    line = Line("", kl, scores, interval_edges(history, "score"), names=[str(judgement.round) for judgement in history])
    title = "Score against KL to the first policy"
    return Figure(line_chart(title, [line], x_label="KL, nats per response"), "a point per round, with its number")


def samples(history: Sequence[Judgement]) -> dict[str, dict[str, str]]:
    """For each of the first prompts: the newest round's text, the first's, and the others', by headings with scores."""
    order = [history[-1], history[0], *reversed(history[1:-1])]
    return {
        first.prompt: {heading(judgement, i): judgement.samples[i].sample.text for judgement in order}
        for i, first in enumerate(history[0].samples[:N_PROMPTS])
    }


def heading(judgement: Judgement, i: int) -> str:
    judged: Judged = judgement.samples[i]
    failure = "" if is_usable(judged.sample) else ", fails"
    return f"round {judgement.round}: {METRICS['score'].format_value(judged.score)}{failure}"


def stages(out: Path) -> Table | None:
    """The counts of each finished stage of OUT/manifest.json; None if there is no such file."""
    path = out / "manifest.json"
    if not path.exists():
        return None
    finished = json.loads(path.read_text(encoding="utf-8"))["stages"]
    rows = {
        name: [", ".join(f"{key}: {value}" for key, value in stage["counts"].items())]
        for name, stage in finished.items()
    }
    return Table([], rows)
