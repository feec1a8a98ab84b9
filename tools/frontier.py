"""The runs of a sweep: a line for each, and their reward against their KL, as in Figure 2 of arXiv 2305.18290.

python -m tools.frontier SWEEP                            write SWEEP/frontier.html, as a sweep does when it ends
python -m tools.frontier RUN1 RUN2 …                      write frontier.html here
python -m tools.frontier SWEEP --judge COMMAND            with a judge's win rate over the reference (tools/compare.py)
python -m tools.frontier SWEEP --svg FILE                 write the first chart to FILE, too
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from dpo.reporting.figures import Line, line_chart, standalone
from dpo.reporting.page import RunFiles, render, run_files, settings, write_page
from dpo.system.console import guard_streams, log_message
from dpo.system.errors import UserError, exit_on_error

KL = "diagnosis/kl"
NAMES = ("exp_name", "local_run_dir", "seed")  # settings by which curves do not differ
COLUMNS = {
    "loss": "loss/eval",
    "accuracy": "rewards_eval/accuracies",
    "margin": "rewards_eval/margins",
    "reward of chosen": "rewards_eval/chosen",
    "KL": KL,
}
ACCURACY = "Reward accuracy"
CHARTS = {ACCURACY: "rewards_eval/accuracies", "Reward margin": "rewards_eval/margins"}


def labels(runs: Sequence[RunFiles]) -> list[str]:
    """Return for each run the settings by which it differs from the others; runs that only differ in seed share one."""
    if len(runs) == 1:
        return [runs[0].name]
    differing = {key: values for key, values in settings(runs).items() if key not in NAMES}
    rows = [", ".join(f"{key}={values[i]}" for key, values in differing.items()) for i in range(len(runs))]
    return [row or run.name for row, run in zip(rows, runs, strict=True)]


def summary(runs: Sequence[RunFiles]) -> list[str]:
    """Return a line per run with the figures of its last evaluation."""
    lines = []
    for run in runs:
        last = next((record for record in reversed(run.metrics) if "loss/eval" in record), {})
        values = [f"{name} {last[key]:.4g}" for name, key in COLUMNS.items() if last.get(key) is not None]
        lines.append(f"{run.path.name}: {', '.join(values) or 'no evaluation'}")
    return lines


def points(run: RunFiles, metric: str) -> tuple[list[float], list[float]]:
    """Return the KL of a run's evaluations, and a metric of each, in their order."""
    found = [(r[KL], r[metric]) for r in run.metrics if r.get(KL) is not None and r.get(metric) is not None]
    return [kl for kl, _ in found], [value for _, value in found]


def win_rates(run: RunFiles, command: str) -> tuple[list[float], list[float]]:
    """Return the KL of a run's evaluations, and how often a judge prefers the policy's samples to the reference's."""
    from dpo.reporting.comparison import Comparison, prompt_scores

    kl = {record["examples"]: record[KL] for record in run.metrics if record.get(KL) is not None}
    texts: dict[tuple[int, str], dict[str, str]] = defaultdict(dict)
    for sample in run.samples:
        texts[sample["examples"], sample["model"]][sample["prompt"]] = sample["sample"]
    found = []
    for examples in kl:
        policy, reference = texts[examples, "policy"], texts[examples, "reference"]
        if prompts := list(policy.keys() & reference.keys()):
            sides = ([side[prompt] for prompt in prompts] for side in (policy, reference))
            judged = Comparison.judged(command, prompts, *sides)
            scores = prompt_scores(judged.answers, judged.swapped)
            found.append((kl[examples], sum(scores) / len(scores)))
    return [x for x, _ in found], [y for _, y in found]


def curves(runs: Sequence[RunFiles], judge: str | None = None) -> dict[str, list[Line]]:
    """Return by its title each chart's curves of runs' reward against their KL; none where no run has recorded a KL."""
    names = labels(runs)
    columns = {title: [points(run, metric) for run in runs] for title, metric in CHARTS.items()}
    if judge is not None:
        columns = {"Win rate over the reference, by the judge": [win_rates(run, judge) for run in runs], **columns}
    found = {
        title: [Line(name, x, y) for name, (x, y) in zip(names, rows, strict=True) if x]
        for title, rows in columns.items()
    }
    return {title: lines for title, lines in found.items() if lines}


def draw(title: str, lines: Sequence[Line]) -> str:
    """Return a chart of reward against KL."""
    return line_chart(title, lines, share=title == ACCURACY, x_label="KL to the reference, nats per response")


def is_number(lines: Sequence[Line]) -> bool:
    """Return whether a chart would have a single point."""
    return sum(len(line.x) for line in lines) == 1


def page(runs: Sequence[RunFiles], found: dict[str, list[Line]]) -> str:
    """Return the page of some runs and their charts, of which one of a single point is a number."""
    numbers = {
        f"{title}, at a KL of {lines[0].x[0]:.3g} nats per response": f"{lines[0].y[0]:.3g}"
        for title, lines in found.items()
        if is_number(lines)
    }
    figures = [draw(title, lines) for title, lines in found.items() if not is_number(lines)]
    return render(
        title="Reward against KL",
        tiles={"runs": len(runs)} | numbers,
        charts={"Each point is an evaluation, each curve the course of a run": figures} if figures else {},
        samples={},
        suspects=[],
        names=[run.name for run in runs],
        settings=settings(runs),
    )


def close_sweep(folder: Path, paths: Sequence[Path], judge: str | None = None, svg: Path | None = None) -> None:
    """Print a line per run of a sweep that has left a run directory, and write frontier.html into its folder.

    svg is a file for the first chart by itself.
    """
    runs = [run_files(path) for path in paths if (path / "config.yaml").is_file()]
    if not runs:
        return
    log_message("\n".join(["", *summary(runs)]))
    found = curves(runs, judge)
    if not found:
        needs = "sample_during_eval=true, and a reference that is a model, so loss.precompute_reference=false"
        log_message(f"No frontier.html: no evaluation recorded a KL (diagnosis/kl), which needs {needs}.")
        return
    files = {folder / "frontier.html": page(runs, found)}
    if svg is not None:
        title, lines = next(iter(found.items()))
        if is_number(lines):
            raise UserError(f"--svg {svg}: {title} has a single evaluation, which is no chart; lower eval_every")
        files[svg] = standalone(draw(title, lines))
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
    parser.add_argument(
        "--judge", metavar="COMMAND", help="a command that answers A, B or tie, as for tools/compare.py"
    )
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the first chart to this file, too")
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
