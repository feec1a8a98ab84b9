"""A run, or several, as one HTML page; the evaluation pairs that are likely mislabelled."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.reporting.statistics import Z
from dpo.system.console import log_message
from dpo.system.errors import summarize_error

if TYPE_CHECKING:
    from dpo.reporting.figures import Line


TEMPLATE = Path(__file__).with_name("report.html.jinja")
Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What a run directory holds for people to read."""

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
    def evaluation(self) -> Record:
        """The numbers of the newest evaluation that are finite; metrics.jsonl has null for the others."""
        record = next((record for record in reversed(self.metrics) if "loss/eval" in record), {})
        return {name: value for name, value in record.items() if value is not None}

    @property
    def name(self) -> str:
        return str(self.settings["exp_name"])

    def read(self, name: str) -> list[Record]:
        """Return the whole lines of a file of records; a last one that is being written is left out."""
        path = self.path / name
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # texts hold other line ends
        return [json.loads(line) for line in lines]

    def records_of(self, metric: str) -> list[Record]:
        """Return the records in which a metric is a finite number."""
        return [record for record in self.metrics if record.get(metric) is not None]


def run_files(path: Path) -> RunFiles:
    """Return a run's files; UserError if the folder is not a run directory."""
    from dpo.settings.run_config import find_run_dir

    files = RunFiles(find_run_dir(path))
    assert files.settings
    return files


# Likely wrong labels


@dataclass(frozen=True)
class Suspect:
    """A pair whose margin was negative at every evaluation after an update; margin is the mean of these.

    place is the number of its row, and which of the evaluated pairs of this row it is, if there are several.
    """

    source: str
    place: str
    margin: float


def suspects(pairs: Iterable[Record]) -> list[Suspect]:
    """Return the pairs whose reward margin was negative at every evaluation of a trained policy, the worst first."""
    margins: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    known: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)  # of a row: its pairs' numbers in pairs.jsonl
    for pair in pairs:
        of_row = known[pair["source"], pair["row"]]
        n = of_row.setdefault(pair.get("pair", 0), len(of_row) + 1)  # earlier versions gave a row one key
        if pair["examples"]:
            margins[pair["source"], pair["row"], n].append(float(pair["rewards/margins"]))
    found = [
        Suspect(source, f"{row}, pair {n}" if (source, row, 2) in margins else str(row), sum(values) / len(values))
        for (source, row, n), values in margins.items()
        if all(value < 0 for value in values)  # NaN is not negative
    ]
    return sorted(found, key=lambda suspect: suspect.margin)


# The page


@dataclass(frozen=True)
class Curve:
    """A metric over the course of a run.

    faint: noise of updates beside a curve of evaluations. headline: its newest value stands at the top of the page.
    """

    label: str
    metric: str
    faint: bool = False
    headline: bool = False


def train_and_evaluation(kind: str, name: str = "") -> list[Curve]:
    """Return the curves of a metric that updates and evaluations record."""
    return [
        Curve("train", f"{kind}_train/{name}" if name else f"{kind}/train", faint=True),
        Curve("evaluation", f"{kind}_eval/{name}" if name else f"{kind}/eval", headline=True),
    ]


def of_responses(metric: str) -> list[Curve]:
    """Return the curves of a metric of each kind of response, {} in whose name stands for the kind."""
    return [Curve(side, metric.format(side)) for side in ("chosen", "rejected", "desirable", "undesirable")]


LOGARITHMIC = "Gradient norm"
SHARES = ("Reward accuracy", "Share of chosen responses less likely than at first")
CURVES = {
    "Loss": train_and_evaluation("loss"),
    SHARES[0]: train_and_evaluation("rewards", "accuracies"),
    "Reward margin": train_and_evaluation("rewards", "margins"),
    "Rewards, evaluation": of_responses("rewards_eval/{}"),
    "Log-ratio to the reference per token, evaluation": of_responses("diagnosis/{}_log_ratio_per_token"),
    SHARES[1]: [Curve("evaluation", "diagnosis/displaced", headline=True)],
    LOGARITHMIC: [Curve("before clipping", "grad_norm")],
    "KL from the reference, nats per response": [Curve("samples", "diagnosis/kl", headline=True)],
    "Entropy of the policy, nats per token": [Curve("samples", "diagnosis/entropy_per_token")],
    "Length of samples minus the reference's, tokens": [Curve("samples", "diagnosis/sample_length_difference")],
    "Learning rate": [Curve("", "lr")],
    "Pairs per second": [Curve("", "examples_per_second")],
    "Share of the matrix rate (mfu)": [Curve("", "mfu")],
}


def write_report(path: Path, runs: Sequence[RunFiles]) -> None:
    """Write a page about one run, or about several laid over each other."""
    write_page(path, page(runs))


def write_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all."""
    from dpo.system.files import atomic_write

    atomic_write(path, page.encode())


def update_report(path: Path) -> None:
    """Write a run's page anew; what goes wrong is printed in one line and stops no training."""
    try:
        write_report(path / "report.html", [RunFiles(path)])
    except Exception as error:  # whatever it is
        log_message(f"report.html was not written ({summarize_error(error)})")


def page(runs: Sequence[RunFiles]) -> str:
    """Return the page as HTML, which needs neither a network nor JavaScript."""
    from dpo.reporting.diagnosis import displacement_advice

    several, names = len(runs) > 1, names_of(runs)
    curves, numbers = curves_and_numbers(runs, names if several else [""])
    charts = {"Curves": curves}
    if not several:
        charts |= pair_charts(runs[0])
    return render(
        title=", ".join(names),
        tiles=({"runs": str(len(runs))} if several else headlines(runs[0])) | numbers,
        advice=None if several else displacement_advice(runs[0].evaluation),
        charts={heading: figures for heading, figures in charts.items() if figures},
        samples={
            f"Samples of {name}" if several else "Samples": samples(run)
            for name, run in zip(names, runs, strict=True)
            if run.samples
        },
        suspects=[] if several else suspects(runs[0].pairs),
        names=names if several else [],
        settings=settings(runs),
    )


def names_of(runs: Sequence[RunFiles]) -> list[str]:
    """Return the names of some runs, or of equal names the folders, or of equal folders the paths."""
    choices = [[run.name for run in runs], [run.path.name for run in runs], [str(run.path) for run in runs]]
    return next((names for names in choices if len(set(names)) == len(names)), choices[-1])


def render(**parts: Any) -> str:
    """Return the page that is made of some parts, by the names that the template gives them."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(**parts)


def headlines(run: RunFiles) -> dict[str, str]:
    """Return the newest figures of a run, by what they are."""
    newest = run.metrics[-1] if run.metrics else {}
    found = {name: f"{newest.get(name, 0):,}" for name in ("examples", "updates")}
    for title, curves in CURVES.items():
        for curve in curves:
            if curve.headline and (line := line_of(run, curve)):
                found |= number(title, line, run)
    return found


def number(title: str, line: "Line", run: RunFiles) -> dict[str, str]:
    """Return the last value of a line by its label, which says after how many examples, if there are more by now."""
    value, end = ("{:.0%}", "{:.0%}") if title in SHARES else ("{:.4g}", "{:.3g}")
    age = "" if line.x[-1] == run.metrics[-1]["examples"] else f"after {line.x[-1]:,} examples"
    ends = [] if line.band is None else [end.format(edge[-1]) for edge in line.band]
    label = (title, line.label, age, f"95% interval {' to '.join(ends)}" if ends else "")
    return {", ".join(filter(None, label)): value.format(line.y[-1])}


def curves_and_numbers(runs: Sequence[RunFiles], names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return charts of what some runs recorded more than once, and by their labels the numbers recorded once.

    Several runs are compared by their evaluations, if one of them has more than one.
    """
    from dpo.reporting.figures import line_chart

    charts: list[str] = []
    numbers: dict[str, str] = {}
    for title, curves in CURVES.items():
        found = [
            (line, run)
            for curve in curves
            for run, name in zip(runs, names, strict=True)
            if (line := line_of(run, curve, name))
        ]
        lines, evaluations = [line for line, _ in found], [line for line, _ in found if not line.faint]
        if len(runs) > 1 and any(len(line.x) > 1 for line in evaluations):
            lines = evaluations
        if any(len(line.x) > 1 for line in lines):
            charts.append(line_chart(title, lines, log_y=title == LOGARITHMIC, share=title in SHARES))
        else:
            numbers |= {label: text for line, run in found for label, text in number(title, line, run).items()}
    return charts, numbers


def line_of(run: RunFiles, curve: Curve, name: str = "") -> "Line | None":
    """Return a curve as a run recorded it, if it did; its label has a name if one is given."""
    from dpo.reporting.figures import Line

    records = run.records_of(curve.metric)
    if not records:
        return None
    label = ", ".join(filter(None, (name, curve.label)))
    x, y = [record["examples"] for record in records], [record[curve.metric] for record in records]
    ends = [found for record in records if (found := interval(record, curve.metric)) is not None]
    band = ([low for low, _ in ends], [high for _, high in ends]) if len(ends) == len(records) else None
    return Line(label, x, y, band, curve.faint)


def interval(record: Record, metric: str) -> tuple[float, float] | None:
    """Return the lower and the upper end of a metric's 95% interval, if it has one."""
    if metric == "rewards_eval/accuracies" and "diagnosis/accuracy_low" in record:
        return record["diagnosis/accuracy_low"], record["diagnosis/accuracy_high"]
    error = record.get(f"{metric}_stderr")
    return None if error is None else (record[metric] - Z * error, record[metric] + Z * error)


def pair_charts(run: RunFiles) -> dict[str, list[str]]:
    """Return charts of the pairs of the newest evaluation, under a heading."""
    from dpo.reporting.figures import scatter_chart

    newest = [pair for pair in run.pairs if pair["examples"] == run.pairs[-1]["examples"]]
    if not newest:
        return {}
    title, labels = "Log-ratios to the reference (nats)", ("chosen response", "rejected response")
    names = ("log_ratios/chosen", "log_ratios/rejected")
    ratios = [(float(pair[names[0]]), float(pair[names[1]])) for pair in newest if names[0] in pair]
    lengths = [(pair["lengths/chosen"] - pair["lengths/rejected"], float(pair["rewards/margins"])) for pair in newest]
    figures = [
        scatter_chart(title, ratios, *labels, diagonal=True),
        scatter_chart("Margin and length", lengths, "tokens, chosen minus rejected", "reward margin"),
    ]
    return {f"Evaluation pairs after {newest[0]['examples']:,} examples": [chart for chart in figures if chart]}


def samples(run: RunFiles) -> dict[str, dict[str, str]]:
    """Return for each prompt what the reference, and the policy after some examples, made of it."""
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for sample in run.samples:
        is_reference = sample["model"] == "reference"
        texts[sample["prompt"]]["reference" if is_reference else f"after {sample['examples']:,}"] = sample["sample"]
    order = {prompt: sorted(columns, key=lambda name: name != "reference") for prompt, columns in texts.items()}
    return {prompt: {name: texts[prompt][name] for name in names} for prompt, names in order.items()}


def settings(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Return the settings of a run, or those that differ between several."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [str(run.settings.get(key, "")) for run in runs] for key in keys}
    return {key: row for key, row in values.items() if len(runs) == 1 or len(set(row)) > 1}
