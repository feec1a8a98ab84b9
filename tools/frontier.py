"""Summarizes the runs of a sweep, and plots reward against KL, as in Figure 2 of arXiv 2305.18290.

python -m tools.frontier SWEEP                            write SWEEP/frontier.html, as a sweep does when it ends
python -m tools.frontier RUN1 RUN2 …                      write frontier.html here
python -m tools.frontier SWEEP --judge COMMAND            with a judge's win rate over the reference (docs/compare.md)
python -m tools.frontier SWEEP --svg FILE                 also write the first chart to FILE
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from dpo.reporting.figures import Line, line_chart
from dpo.reporting.metric_table import ACCURACY, HEADLINES, MARGIN, Chart, format_values
from dpo.reporting.page import Figure, Record, RunFiles, render, run_files, settings, settings_table, write_page
from dpo.system.console import guard_streams, log_message
from dpo.system.errors import UserError, exit_on_error

NAMES = ("exp_name", "local_run_dir", "seed")  # settings that do not distinguish curves
CHARTS = {ACCURACY: "rewards_eval/accuracies", MARGIN: "rewards_eval/margins"}
WIN_RATE = Chart("Win rate over the reference, by the judge")
X_LABEL = "KL to the reference, nats per response"
Points = tuple[list[float], list[float]]  # for each evaluation: KL and a metric


def labels(runs: Sequence[RunFiles]) -> list[str]:
    """For each run, the settings that differ between runs, without the seed."""
    if len(runs) == 1:
        return [runs[0].name]
    differing = {key: values for key, values in settings(runs).items() if key not in NAMES}
    rows = [", ".join(f"{key}={values[i]}" for key, values in differing.items()) for i in range(len(runs))]
    return [row or run.name for row, run in zip(rows, runs, strict=True)]


def summary(runs: Sequence[RunFiles]) -> list[str]:
    """A line per run with the headline metrics of its last evaluation."""
    return [f"{run.path.name}: {format_values(run.evaluation, HEADLINES) or 'no evaluation'}" for run in runs]


def evaluations_with_kl(run: RunFiles) -> list[Record]:
    return [record for record in run.metrics if record.get("diagnosis/kl") is not None]


def points(run: RunFiles, metric: str) -> Points:
    """The KL and a metric of each evaluation that has both."""
    records = [record for record in evaluations_with_kl(run) if record.get(metric) is not None]
    return [record["diagnosis/kl"] for record in records], [record[metric] for record in records]


def win_rates(run: RunFiles, command: str) -> Points:
    """For each evaluation: the KL, and how often a judge prefers the samples to the reference's."""
    from dpo.reporting.comparison import Comparison, prompt_scores

    texts: dict[tuple[int, str], dict[str, str]] = defaultdict(dict)
    for sample in run.samples:
        texts[sample["examples"], sample["model"]][sample["prompt"]] = sample["sample"]
    kl: list[float] = []
    rates: list[float] = []
    for record in evaluations_with_kl(run):
        policy = texts[record["examples"], "policy"]
        reference = texts[record["examples"], "reference"]
        if prompts := [prompt for prompt in policy if prompt in reference]:
            a = [policy[prompt] for prompt in prompts]
            b = [reference[prompt] for prompt in prompts]
            comparison = Comparison.judged(command, prompts, a, b)
            scores = prompt_scores(comparison.answers, comparison.swapped)
            kl.append(record["diagnosis/kl"])
            rates.append(sum(scores) / len(scores))
    return kl, rates


def curves(runs: Sequence[RunFiles], judge: str | None = None) -> dict[Chart, list[Line]]:
    """The curves of each chart, reward against KL; empty if no run has recorded a KL."""
    by_chart = {chart: [points(run, metric) for run in runs] for chart, metric in CHARTS.items()}
    if judge is not None:
        by_chart = {WIN_RATE: [win_rates(run, judge) for run in runs]} | by_chart
    names = labels(runs)
    lines = {
        chart: [Line(name, x, y) for name, (x, y) in zip(names, rows, strict=True) if x]
        for chart, rows in by_chart.items()
    }
    return {chart: curves for chart, curves in lines.items() if curves}


def draw(chart: Chart, lines: Sequence[Line]) -> str:
    return line_chart(chart.title, lines, chart.scale, X_LABEL)


def page(runs: Sequence[RunFiles], charts: dict[Chart, list[Line]]) -> str:
    return render(
        title="Reward against KL",
        tiles={"runs": str(len(runs))},
        charts={
            "Each point is an evaluation, each curve the course of a run": [
                Figure(draw(chart, lines), chart.meaning) for chart, lines in charts.items()
            ]
        },
        samples={},
        suspects=[],
        tables=settings_table(runs, [run.name for run in runs]),
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
