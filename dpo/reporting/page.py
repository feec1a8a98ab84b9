"""report.html: an HTML page about one or several runs, and pairs with likely wrong labels."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo.reporting.metric_table import METRICS, Chart, interval
from dpo.system.console import log_message
from dpo.system.errors import summarize_error

if TYPE_CHECKING:
    from dpo.reporting.figures import Line

TEMPLATE = Path(__file__).with_name("report.html.jinja")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """The settings, metrics, samples and evaluated pairs in a run directory."""

    path: Path

    @cached_property
    def metrics(self) -> list[Record]:
        return self.read("metrics.jsonl")

    @cached_property
    def samples(self) -> list[Record]:
        return self.read("samples.jsonl")

    @cached_property
    def pairs(self) -> list[Record]:
        return self.read("pairs.jsonl")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings as {dotted key: value}."""
        from dpo.settings.run_config import read_run_config
        from dpo.settings.schema import flatten

        return flatten(read_run_config(self.path))

    @property
    def evaluation(self) -> dict[str, float]:
        """The finite metrics of the newest evaluation."""
        record = next((record for record in reversed(self.metrics) if "loss/eval" in record), {})
        return {name: value for name, value in record.items() if value is not None}

    @property
    def name(self) -> str:
        return str(self.settings["exp_name"])

    def read(self, name: str) -> list[Record]:
        """Read a JSON lines file, without a last line that is still being written."""
        path = self.path / name
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # not splitlines
        return [json.loads(line) for line in lines]


def run_files(path: Path) -> RunFiles:
    """The files of a run; UserError if the folder is not a run directory."""
    from dpo.settings.run_config import find_run_dir

    files = RunFiles(find_run_dir(path))
    assert files.settings  # raises if config.yaml is missing
    return files


# Likely wrong labels


@dataclass(frozen=True)
class Suspect:
    """A pair with a negative margin at every evaluation after the first update.

    place is the row number and, if several pairs of the row were evaluated, the number of the pair. margin is the mean
    over these evaluations.
    """

    source: str
    place: str
    margin: float


def suspects(pairs: Iterable[Record]) -> list[Suspect]:
    """The suspects in the records of pairs.jsonl, lowest margin first."""
    margins: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    numbers: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)  # of the pairs of a row, by their checksums
    for pair in pairs:
        of_row = numbers[pair["source"], pair["row"]]
        number = of_row.setdefault(pair.get("pair", 0), len(of_row) + 1)  # earlier versions wrote no checksum
        if pair["examples"]:
            margins[pair["source"], pair["row"], number].append(float(pair["rewards/margins"]))
    suspected = []
    for (source, row, number), values in margins.items():
        if all(value < 0 for value in values):  # NaN is not negative
            place = f"{row}, pair {number}" if (source, row, 2) in margins else str(row)
            suspected.append(Suspect(source, place, sum(values) / len(values)))
    return sorted(suspected, key=lambda suspect: suspect.margin)


# The page


class Figure(NamedTuple):
    """A chart as SVG, and the sentence below it."""

    svg: str
    caption: str


class Table(NamedTuple):
    """Names of columns, if there are several, and rows by their name."""

    names: Sequence[str]
    rows: Mapping[str, Sequence[str]]


class Curve(NamedTuple):
    """A metric in metrics.jsonl that a chart draws; faint: noisy values of updates."""

    label: str
    metric: str
    faint: bool = False
    headline: bool = False


def curves_by_chart() -> dict[Chart, list[Curve]]:
    """The curves of each chart, in the order of METRICS."""
    charts: dict[Chart, list[Curve]] = defaultdict(list)
    for metric in METRICS:
        if metric.chart is None:
            continue
        curves = charts[metric.chart]
        if "train" in metric.splits:
            curves.append(Curve("train", metric.recorded("train"), faint=True))
        label = metric.label or ("evaluation" if metric.splits else "")
        curves.append(Curve(label, metric.recorded("eval"), headline=metric.headline))
    return charts


CURVES = curves_by_chart()


def write_report(path: Path, runs: Sequence[RunFiles]) -> None:
    """Write a page about one run, or about several overlaid."""
    write_page(path, page(runs))


def write_page(path: Path, page: str) -> None:
    from dpo.system.files import atomic_write

    atomic_write(path, page.encode())


def update_report(path: Path) -> None:
    """Write report.html into a run directory; a failure is only printed, and training continues."""
    try:
        write_report(path / "report.html", [RunFiles(path)])
    except Exception as error:  # of any kind
        log_message(f"report.html was not written ({summarize_error(error)})")


def page(runs: Sequence[RunFiles]) -> str:
    """The page as HTML, which needs neither a network nor JavaScript."""
    from dpo.reporting.diagnosis import displacement_advice

    several = len(runs) > 1
    names = names_of(runs)
    figures, numbers = figures_and_numbers(runs, names if several else [""])
    charts = {"Curves": figures}
    if not several:
        charts |= pair_figures(runs[0])
    return render(
        title=", ".join(names),
        tiles=({"runs": str(len(runs))} if several else headlines(runs[0])) | numbers,
        advice=None if several else displacement_advice(runs[0].evaluation),
        charts={heading: figures for heading, figures in charts.items() if figures},
        samples={
            f"Samples of {name}" if several else "Samples": samples_by_prompt(run)
            for name, run in zip(names, runs, strict=True)
            if run.samples
        },
        suspects=[] if several else suspects(runs[0].pairs),
        tables=settings_table(runs, names),
    )


def names_of(runs: Sequence[RunFiles]) -> list[str]:
    """The names of runs; folders if names are not unique, paths if folders are not."""
    choices = [[run.name for run in runs], [run.path.name for run in runs], [str(run.path) for run in runs]]
    return next((names for names in choices if len(set(names)) == len(names)), choices[-1])


def render(**values: Any) -> str:
    """Fill the template of the page."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(**values)


def headlines(run: RunFiles) -> dict[str, str]:
    """The numbers at the top of a run's page, by label."""
    newest = run.metrics[-1] if run.metrics else {}
    numbers = {name: f"{newest.get(name, 0):,}" for name in ("examples", "updates")}
    for chart, curves in CURVES.items():
        for curve in curves:
            if curve.headline and (line := line_of(run, curve)):
                numbers |= number(chart, line, run)
    return numbers


def number(chart: Chart, line: "Line", run: RunFiles) -> dict[str, str]:
    """A line's last value, by a label with its interval and, if it is not from the newest record, its step."""
    is_share = chart.scale == "share"
    label = [chart.title, line.label]
    if line.x[-1] != run.metrics[-1]["examples"]:
        label.append(f"after {line.x[-1]:,} examples")
    if line.band is not None:
        low, high = (f"{edge[-1]:.0%}" if is_share else f"{edge[-1]:.3g}" for edge in line.band)
        label.append(f"95% interval {low} to {high}")
    value = f"{line.y[-1]:.0%}" if is_share else f"{line.y[-1]:.4g}"
    return {", ".join(filter(None, label)): value}


def figures_and_numbers(runs: Sequence[RunFiles], names: Sequence[str]) -> tuple[list[Figure], dict[str, str]]:
    """A figure for each chart with a metric that was recorded more than once; the other metrics as numbers.

    Several runs are compared by evaluations, if a run has more than one.
    """
    from dpo.reporting.figures import line_chart

    figures: list[Figure] = []
    numbers: dict[str, str] = {}
    for chart, curves in CURVES.items():
        drawn = [(line_of(run, curve, name), run) for curve in curves for run, name in zip(runs, names, strict=True)]
        recorded = [(line, run) for line, run in drawn if line is not None]
        lines = [line for line, _ in recorded]
        evaluations = [line for line in lines if not line.faint]
        if len(runs) > 1 and any(len(line.x) > 1 for line in evaluations):
            lines = evaluations
        if any(len(line.x) > 1 for line in lines):
            figures.append(Figure(line_chart(chart.title, lines, chart.scale), chart.meaning))
            continue
        for line, run in recorded:
            numbers |= number(chart, line, run)
    return figures, numbers


def line_of(run: RunFiles, curve: Curve, name: str = "") -> "Line | None":
    """A run's curve, labelled with name if given; None if the run does not have the metric."""
    from dpo.reporting.figures import Line

    records = [record for record in run.metrics if record.get(curve.metric) is not None]
    if not records:
        return None
    label = ", ".join(filter(None, (name, curve.label)))
    x = [record["examples"] for record in records]
    y = [record[curve.metric] for record in records]
    intervals = [ends for record in records if (ends := interval(record, curve.metric)) is not None]
    band = None
    if len(intervals) == len(records):
        band = ([low for low, _ in intervals], [high for _, high in intervals])
    return Line(label, x, y, band, curve.faint)


def pair_figures(run: RunFiles) -> dict[str, list[Figure]]:
    """Charts of the newest evaluation's pairs, under a heading."""
    from dpo.reporting.figures import scatter_chart

    newest = [pair for pair in run.pairs if pair["examples"] == run.pairs[-1]["examples"]]
    if not newest:
        return {}
    ratios, margins = [], []
    for pair in newest:
        if "log_ratios/chosen" in pair:
            ratios.append((float(pair["log_ratios/chosen"]), float(pair["log_ratios/rejected"])))
        margins.append((pair["lengths/chosen"] - pair["lengths/rejected"], float(pair["rewards/margins"])))
    title = "Log-ratios to the reference (nats)"
    caption = "below the dashed line the margin is positive; left of 0 the chosen response has become less likely"
    figures = [
        (scatter_chart(title, ratios, "chosen response", "rejected response", diagonal=True), caption),
        (scatter_chart("Margin and length", margins, "tokens, chosen minus rejected", "reward margin"), ""),
    ]
    heading = f"Evaluation pairs after {newest[0]['examples']:,} examples"
    return {heading: [Figure(svg, caption) for svg, caption in figures if svg is not None]}


def samples_by_prompt(run: RunFiles) -> dict[str, dict[str, str]]:
    """For each prompt: the reference's sample, and the policy's samples by step."""
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for sample in run.samples:
        column = "reference" if sample["model"] == "reference" else f"after {sample['examples']:,}"
        texts[sample["prompt"]][column] = sample["sample"]
    # A stable sort: the reference comes first, the policy's samples keep their order.
    return {
        prompt: dict(sorted(columns.items(), key=lambda item: item[0] != "reference"))
        for prompt, columns in texts.items()
    }


def settings_table(runs: Sequence[RunFiles], names: Sequence[str]) -> dict[str, Table]:
    """The table of `settings` under its heading; names are those of the runs."""
    rows = settings(runs)
    return {"Settings that differ": Table(names, rows)} if len(runs) > 1 else {"Settings": Table([], rows)}


def settings(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """The settings of a run, or those that differ between several runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [str(run.settings.get(key, "")) for run in runs] for key in keys}
    return {key: row for key, row in values.items() if len(runs) == 1 or len(set(row)) > 1}
