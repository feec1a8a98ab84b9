"""Summarizes the runs of a sweep, and plots reward against KL, as in Figure 2 of arXiv 2305.18290.

python -m tools.frontier SWEEP                            write SWEEP/frontier.html, as a sweep does when it ends
python -m tools.frontier RUN1 RUN2 …                      write frontier.html here
python -m tools.frontier SWEEP --judge COMMAND            with a judge's win rate over the reference (docs/compare.md)
python -m tools.frontier SWEEP --svg FILE                 also write the first chart to FILE
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import NamedTuple

from dpo.reporting.figures import Line, line_chart
from dpo.reporting.metric_table import ACCURACY, HEADLINES, MARGIN, Chart, format_values, interval
from dpo.reporting.page import (
    Figure,
    Record,
    RunFiles,
    names_of,
    render,
    run_files,
    settings,
    settings_tables,
    write_page,
)
from dpo.reporting.statistics import Z
from dpo.system.console import guard_streams, log_message
from dpo.system.errors import UserError, exit_on_error

NAMES = ("exp_name", "local_run_dir", "seed")  # settings that do not distinguish curves
CHARTS = {ACCURACY: "rewards_eval/accuracies", MARGIN: "rewards_eval/margins"}
WIN_RATE = Chart("Win rate over the reference, by the judge", "", "share", (0.5, "50%"))
KL = "diagnosis/kl"
MAX_LABEL = 45  # characters that fit beside the line of a legend
X_LABEL = "KL to the reference, nats per response"


class Point(NamedTuple):
    """An evaluation's KL and a metric, each with the ends of its 95% interval if that is known."""

    kl: float
    value: float
    kl_ends: tuple[float, float] | None
    ends: tuple[float, float] | None


def labels(runs: Sequence[RunFiles]) -> list[str]:
    """For each run, the settings that differ between runs, without the seed; its name if that is too long."""
    if len(runs) == 1:
        return [runs[0].name]
    differing = {key: values for key, values in settings(runs).items() if key not in NAMES}
    rows = [", ".join(f"{key}={values[i]}" for key, values in differing.items()) for i in range(len(runs))]
    if any(len(row) > MAX_LABEL for row in rows):
        return names_of(runs)
    return [row or run.name for row, run in zip(rows, runs, strict=True)]


def summary(runs: Sequence[RunFiles]) -> list[str]:
    """A line per run with the headline metrics of its last evaluation."""
    return [f"{run.path.name}: {format_values(run.evaluation, HEADLINES) or 'no evaluation'}" for run in runs]


def evaluations_with_kl(run: RunFiles) -> list[Record]:
    return [record for record in run.metrics if record.get(KL) is not None]


def points(run: RunFiles, metric: str) -> list[Point]:
    """The evaluations that have both the KL and a metric."""
    records = [record for record in evaluations_with_kl(run) if record.get(metric) is not None]
    return [
        Point(
            record[KL],
            record[metric],
            interval(record, KL),
            metric_interval(run, record, metric),
        )
        for record in records
    ]


def metric_interval(run: RunFiles, record: Record, metric: str) -> tuple[float, float] | None:
    """A metric's 95% interval; the margin's comes from the evaluated pairs, two or more."""
    margins = [float(pair["rewards/margins"]) for pair in run.pairs if pair["examples"] == record["examples"]]
    if metric != CHARTS[MARGIN] or len(margins) < 2:
        return interval(record, metric)
    half = Z * stdev(margins) / math.sqrt(len(margins))
    return record[metric] - half, record[metric] + half


def win_rates(run: RunFiles, command: str) -> list[Point]:
    """For each evaluation: the KL, and how often a judge prefers the samples to the reference's."""
    from dpo.reporting.comparison import Comparison, prompt_scores, win_rate

    texts: dict[tuple[int, str], dict[str, str]] = defaultdict(dict)
    for sample in run.samples:
        texts[sample["examples"], sample["model"]][sample["prompt"]] = sample["sample"]
    rates = []
    for record in evaluations_with_kl(run):
        policy = texts[record["examples"], "policy"]
        reference = texts[record["examples"], "reference"]
        if prompts := [prompt for prompt in policy if prompt in reference]:
            a = [policy[prompt] for prompt in prompts]
            b = [reference[prompt] for prompt in prompts]
            comparison = Comparison.judged(command, prompts, a, b)
            scores = prompt_scores(comparison.answers, comparison.swapped)
            rate = win_rate(scores)
            kl = record[KL]
            rates.append(Point(kl, rate.value, interval(record, KL), (rate.low, rate.high)))
    return rates


def curves(runs: Sequence[RunFiles], judge: str | None = None) -> dict[Chart, list[Line]]:
    """The curves of each chart, reward against KL; empty if no run has recorded a KL."""
    by_chart = {chart: [points(run, metric) for run in runs] for chart, metric in CHARTS.items()}
    if judge is not None:
        by_chart = {WIN_RATE: [win_rates(run, judge) for run in runs]} | by_chart
    names = labels(runs)
    lines = {
        chart: [line_of(name, row) for name, row in zip(names, rows, strict=True) if row]
        for chart, rows in by_chart.items()
    }
    return {chart: curves for chart, curves in lines.items() if curves}


def line_of(name: str, row: Sequence[Point]) -> Line:
    """The points in their order, with bars for intervals; a value whose interval is not known has a bar of length 0."""
    kl, values = [point.kl for point in row], [point.value for point in row]
    x_ends = [point.kl_ends or (point.kl, point.kl) for point in row]
    ends = [point.ends or (point.value, point.value) for point in row]
    x_band = [low for low, _ in x_ends], [high for _, high in x_ends]
    return Line(name, kl, values, ([low for low, _ in ends], [high for _, high in ends]), x_band=x_band)


def draw(chart: Chart, lines: Sequence[Line]) -> str:
    return line_chart(chart.title, lines, chart.scale, X_LABEL, chart.level)


def page(runs: Sequence[RunFiles], charts: dict[Chart, list[Line]]) -> str:
    return render(
        title="Reward against KL",
        tiles={"runs": str(len(runs))},
        charts={
            "Each point is an evaluation with its 95% intervals, each curve the course of a run": [
                Figure(draw(chart, lines), chart.meaning) for chart, lines in charts.items()
            ]
        },
        tables=settings_tables(runs, names_of(runs)),
    )


def close_sweep(folder: Path, paths: Sequence[Path], judge: str | None = None, svg: Path | None = None) -> None:
    """Print a line per run that has a run directory, and write frontier.html into the sweep's folder.

    svg is a file for the first chart.
    """
    runs = [run_files(path) for path in paths if (path / "config.yaml").is_file()]
    if not runs:
        return
    log_message("\n".join(["", *summary(runs)]))
    charts = curves(runs, judge)
    if not charts:
        needs = "sample_during_eval=true and a reference model (loss.precompute_reference=false)"
        log_message(f"No frontier.html: no evaluation recorded a KL (diagnosis/kl), which needs {needs}.")
        return
    files = {folder / "frontier.html": page(runs, charts)}
    if svg is not None:
        files[svg] = draw(*next(iter(charts.items())))
    for path, text in files.items():
        write_page(path, text)
        log_message(f"Wrote {path}")


def main() -> None:
    """Run the command line."""
    guard_streams()
    parser = argparse.ArgumentParser(
        prog="python -m tools.frontier", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", type=Path, metavar="RUN", help="run directories, or the folder of a sweep")
    parser.add_argument("--judge", metavar="COMMAND", help="a command that answers A, B or tie, as for tools.compare")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also write the first chart to this file")
    options = parser.parse_args()
    if options.svg is not None and not options.svg.parent.is_dir():
        raise UserError(f"--svg {options.svg}: there is no folder {options.svg.parent}")
    paths, folder = options.paths, Path()
    if len(paths) == 1 and not (paths[0] / "config.yaml").is_file():
        folder = paths[0]
        paths = sorted(path.parent for path in folder.glob("*/config.yaml"))
        if not paths:
            raise UserError(f"{folder}: is neither a run directory nor the folder of a sweep")
    close_sweep(folder, paths, options.judge, options.svg)


if __name__ == "__main__":
    exit_on_error(main)
