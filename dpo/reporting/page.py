"""report.html: an HTML page about one or several runs, and pairs with likely wrong labels."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo.reporting.findings import SMALL, Finding, figures_of_pairs, findings, verdict
from dpo.reporting.metric_table import LOSS, METRICS, Chart, interval
from dpo.system.console import log_message, log_warning
from dpo.system.errors import summarize_error

if TYPE_CHECKING:
    from dpo.reporting.figures import Line

TEMPLATE = Path(__file__).with_name("report.html.jinja")
LOG_2 = math.log(2)  # minus log sigmoid of a margin of 0
NOTHING: Mapping[str, Any] = MappingProxyType({})
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
    def warnings(self) -> list[str]:
        """What the run warned of at its start."""
        path = self.path / "warnings.json"
        return list(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else []

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings as {dotted key: value}.

        Interpolations are not looked up: whoever wrote the file could have this page show a secret.
        """
        from omegaconf import OmegaConf

        from dpo.settings.run_config import read_run_config
        from dpo.settings.schema import flatten_plain

        stored: Any = OmegaConf.to_container(read_run_config(self.path, setting=""), resolve=False)
        return flatten_plain(stored)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """The defaults of these settings; model.name_or_path, for example, has none."""
        from dpo.settings.schema import default_values
        from dpo.system.installation import CONFIG

        name = self.settings.get("loss.name")
        values = default_values(CONFIG, name, resumed=True) | default_values(CONFIG, name)  # resumed has older defaults
        chosen = {key for key in values if key == "loss.name" or key.startswith("lora.")}
        return {key: value for key, value in values.items() if key not in chosen} | {"lora": None}

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
    """The files of RUN, RUN/LATEST, RUN/BEST or RUN/step-N; UserError if the folder is not a run directory."""
    files = RunFiles(path.parent if re.fullmatch(r"LATEST|BEST|step-\d+", path.name) else path)
    assert files.settings  # raises if config.yaml is missing
    return files


# What the figures say


def figures_of_run(run: RunFiles) -> dict[str, float]:
    """The figures of a training run that `findings` and `verdict` read; FIGURES explains them."""
    from dpo.reporting.stopping import Stop

    stop = Stop.read(run.path)
    evaluations = [record for record in run.metrics if "loss/eval" in record]
    figures = run.evaluation | {"updates": run.metrics[-1]["updates"] if run.metrics else 0}
    figures["stopped"] = float(stop is not None and stop.is_bad)
    if figures["updates"] and "warmup_steps" in run.settings:
        figures["warmup_share"] = run.settings["warmup_steps"] / figures["updates"]
    if evaluations and not evaluations[0]["updates"]:
        first = {name: value for name, value in evaluations[0].items() if value is not None}
        figures["first_loss"] = first["loss/eval"]
        if "diagnosis/entropy_per_token" in first:
            figures["first_entropy_per_token"] = first["diagnosis/entropy_per_token"]
        if "diagnosis/chosen_log_ratio_per_token" in first:
            figures["first_log_ratio"] = abs(first["diagnosis/chosen_log_ratio_per_token"])
    trained = [record for record in run.metrics if record.get("rewards_train/accuracies") is not None]
    if trained:
        n = trained[-1]["examples"]
        newest = [record for record in trained if record["examples"] > n - max(n / 10, SMALL)]
        figures["train_accuracy"] = fmean(record["rewards_train/accuracies"] for record in newest)
    figures |= figures_of_pairs([pair for pair in run.pairs if pair["examples"] == run.pairs[-1]["examples"]])
    samples = [sample for sample in run.samples if sample["model"] == "policy"]
    texts = [sample["sample"] for sample in samples if sample["examples"] == samples[-1]["examples"]]
    if texts:
        figures |= {"samples": len(texts), "empty_samples": fmean(not text.strip() for text in texts)}
    return figures


def ending(run: RunFiles) -> str:
    """Why an evaluation ended the run, in one or two sentences; "" if none did."""
    from dpo.reporting.stopping import Stop

    stop = Stop.read(run.path)
    if stop is None:
        return ""
    kept = f" LATEST is step-{stop.step}, the last good checkpoint." if stop.is_bad and stop.step is not None else ""
    return f"The run was {stop}.{kept}"


def log_verdict(run: RunFiles) -> None:
    """Print the verdict, the warnings of the start and the findings; a failure is only printed."""
    try:
        figures = figures_of_run(run)
        result = verdict(figures)
        log_message(f"\nVerdict: {result}")
        for warning in run.warnings:
            log_warning(warning)
        for finding in findings(figures):
            rule, is_said = finding.rule, finding.text in result
            log_message(
                f"Finding: {rule.name}: {rule.cause}. Try {rule.first_advice}." if is_said else f"Finding: {finding}"
            )
    except Exception as error:  # of any kind
        log_message(f"There is no verdict ({summarize_error(error)})")


# Likely wrong labels


@dataclass(frozen=True)
class Suspect:
    """A pair with a negative margin at every evaluation after the first update.

    place   the row number and, if several pairs of the row were evaluated, the number of the pair
    margin  the mean over these evaluations
    texts   the prompt, the chosen and the rejected response; None if they were not recorded
    """

    source: str
    place: str
    margin: float
    texts: tuple[str, str, str] | None = None


def suspects(pairs: Iterable[Record]) -> list[Suspect]:
    """The suspects in the records of pairs.jsonl, lowest margin first."""
    margins: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    numbers: dict[tuple[str, int], dict[int, int]] = defaultdict(dict)  # of the pairs of a row, by their checksums
    texts: dict[tuple[str, int, int], tuple[str, str, str]] = {}
    for pair in pairs:
        of_row = numbers[pair["source"], pair["row"]]
        number = of_row.setdefault(pair.get("pair", 0), len(of_row) + 1)  # earlier versions wrote no checksum
        key = pair["source"], pair["row"], number
        if "chosen" in pair:
            texts[key] = pair["prompt"], pair["chosen"], pair["rejected"]
        if pair["examples"]:
            margins[key].append(float(pair["rewards/margins"]))
    suspected = []
    for (source, row, number), values in margins.items():
        if all(value < 0 for value in values):  # NaN is not negative
            place = f"{row}, pair {number}" if (source, row, 2) in margins else str(row)
            mean = sum(values) / len(values)
            suspected.append(Suspect(source, place, mean, texts.get((source, row, number))))
    return sorted(suspected, key=lambda suspect: suspect.margin)


# The page


class Figure(NamedTuple):
    """A chart as SVG, and the sentence below it."""

    svg: str
    caption: str


class Table(NamedTuple):
    """Names of columns, if there are several, and rows by their name; folded: shown on a click."""

    names: Sequence[str]
    rows: Mapping[str, Sequence[str]]
    folded: bool = False


class Curve(NamedTuple):
    """A metric in metrics.jsonl that a chart draws; faint: noisy values of updates.

    meaning is the label in MEANINGS whose colour it has, if any.
    """

    label: str
    metric: str
    meaning: str = ""
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
            label = ", ".join(filter(None, (metric.label, "train")))
            curves.append(Curve(label, metric.recorded("train"), label, faint=True))
        label = metric.label or ("evaluation" if metric.splits else "")
        meaning = label if metric.splits or metric.name.startswith("diagnosis/") else "train"  # of updates
        curves.append(Curve(label, metric.recorded("eval"), meaning, meaning == "train", metric.headline))
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
    several = len(runs) > 1
    names = names_of(runs)
    measured = None if several else figures_of_run(runs[0])
    figures, numbers = figures_and_numbers(runs, names if several else [""])
    large = {} if several else headlines(runs[0])
    small = ({"runs": str(len(runs))} if several else counts(runs[0])) | numbers
    charts = {"Curves": figures}
    if not several:
        charts |= pair_figures(runs[0])
    return render(
        title=", ".join(names),
        headlines=large,
        tiles={label: value for label, value in small.items() if label not in large},
        verdict=None if measured is None else verdict(measured),
        ending="" if several else ending(runs[0]),
        findings=[] if measured is None else findings(measured),
        warnings=[] if several else runs[0].warnings,
        charts={heading: figures for heading, figures in charts.items() if figures},
        samples={
            f"Samples of {name}" if several else "Samples": samples_by_prompt(run)
            for name, run in zip(names, runs, strict=True)
            if run.samples
        },
        suspects=[] if several else suspects(runs[0].pairs),
        tables=settings_tables(runs, names),
    )


def names_of(runs: Sequence[RunFiles]) -> list[str]:
    """The names of runs; folders if names are not unique, paths if folders are not."""
    choices = [[run.name for run in runs], [run.path.name for run in runs], [str(run.path) for run in runs]]
    return next((names for names in choices if len(set(names)) == len(names)), choices[-1])


def render(
    *,
    title: str,
    verdict: str | None = None,
    ending: str = "",
    findings: Sequence[Finding] = (),
    warnings: Sequence[str] = (),
    headlines: Mapping[str, str] = NOTHING,
    tiles: Mapping[str, str] = NOTHING,
    charts: Mapping[str, Sequence[Figure]] = NOTHING,
    samples: Mapping[str, Mapping[str, Mapping[str, str]]] = NOTHING,
    suspects: Sequence[Suspect] = (),
    tables: Mapping[str, Table] = NOTHING,
) -> str:
    """The page as HTML, with the parts that are given, in this order.

    headlines and tiles are large and small numbers, values by label; what follows a label's first ", " is written
    small. samples are {heading: {prompt: {name: text}}}: the first two texts of a prompt stand side by side, the others
    are folded. charts and tables are named by their headings.
    """
    from jinja2 import Environment

    from dpo.reporting.figures import MEANINGS

    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        title=title,
        verdict=verdict,
        ending=ending,
        findings=findings,
        warnings=warnings,
        headlines=headlines,
        tiles=tiles,
        charts=charts,
        samples=samples,
        suspects=suspects,
        tables=tables,
        colors=MEANINGS,
        first_words=first_words,
        last_words=last_words,
    )


def last_words(text: str, width: int) -> str:
    """The last words of a text in at most width characters, after an ellipsis if there are more."""
    if len(text) <= width:
        return text
    end = text[-width - 1 :]  # with the character before, to know whether its first word is whole
    space = re.search(r"\s+", end)
    return f"\N{HORIZONTAL ELLIPSIS} {end[space.end() :]}" if space else f"\N{HORIZONTAL ELLIPSIS}{end[1:]}"


def first_words(text: str, width: int) -> str:
    """The first words of a text, as in last_words."""
    return last_words(text[::-1], width)[::-1]


def counts(run: RunFiles) -> dict[str, str]:
    newest = run.metrics[-1] if run.metrics else {}
    return {name: f"{newest.get(name, 0):,}" for name in ("examples", "updates")}


def headlines(run: RunFiles) -> dict[str, str]:
    """The large numbers at the top of a run's page, by label."""
    numbers: dict[str, str] = {}
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
    value = f"{line.y[-1]:.0%}" if is_share else f"{line.y[-1]:.3g}"
    return {", ".join(filter(None, label)): value}


def figures_and_numbers(runs: Sequence[RunFiles], names: Sequence[str]) -> tuple[list[Figure], dict[str, str]]:
    """A figure for each chart with a metric that was recorded more than once; the other metrics as numbers.

    Several runs are compared by evaluations, if a run has more than one.
    """
    from dpo.reporting.figures import COLORS, line_chart

    colors = [COLORS[i % len(COLORS)] if len(runs) > 1 else "" for i in range(len(runs))]
    figures: list[Figure] = []
    numbers: dict[str, str] = {}
    for chart, curves in CURVES.items():
        drawn = [
            (line_of(run, curve, name, color), run)
            for curve in curves
            for run, name, color in zip(runs, names, colors, strict=True)
        ]
        recorded = [(line, run) for line, run in drawn if line is not None]
        lines = [line for line, _ in recorded]
        evaluations = [line for line in lines if not line.faint]
        if len(runs) > 1 and any(len(line.x) > 1 for line in evaluations):
            lines = evaluations
        if any(len(line.x) > 1 for line in lines):
            level = (LOG_2, "log 2 = 0.693") if chart == LOSS and all(map(starts_at_log_2, runs)) else chart.level
            figures.append(Figure(line_chart(chart.title, lines, chart.scale, level=level), chart.meaning))
            continue
        for line, run in recorded:
            numbers |= number(chart, line, run)
    return figures, numbers


def starts_at_log_2(run: RunFiles) -> bool:
    """Whether the loss is log 2 before the first update, as minus log sigmoid is where policy and reference agree."""
    first = run.metrics[0] if run.metrics else {}
    loss = first.get("loss/eval", first.get("loss/train"))  # of an update: before it
    return loss is not None and first["updates"] <= 1 and abs(loss - LOG_2) < 1e-3


def line_of(run: RunFiles, curve: Curve, name: str = "", color: str = "") -> "Line | None":
    """A run's curve; None if the run does not have the metric.

    name and color are those of the run, if there are several; in the charts of one run, colours are those of MEANINGS.
    """
    from dpo.reporting.figures import MEANINGS, Line

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
    dashed = curve.meaning in ("rejected", "undesirable")
    return Line(label, x, y, band, curve.faint, color=color or MEANINGS.get(curve.meaning, ""), dashed=dashed)


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
    """For each prompt: the policy's newest sample, the reference's, and the policy's earlier ones, newest first."""
    policy: dict[str, dict[str, str]] = defaultdict(dict)
    reference: dict[str, dict[str, str]] = defaultdict(dict)
    for sample in reversed(run.samples):
        if sample["model"] == "reference":
            reference[sample["prompt"]].setdefault("reference", sample["sample"])
        else:
            policy[sample["prompt"]][f"policy after {sample['examples']:,} examples"] = sample["sample"]
    texts = {}
    for prompt in reversed(policy):
        newest, *earlier = policy[prompt].items()
        texts[prompt] = dict([newest, *reference[prompt].items(), *earlier])
    return texts


def settings_tables(runs: Sequence[RunFiles], names: Sequence[str]) -> dict[str, Table]:
    """The tables of settings under their headings; names are those of the runs.

    Of one run, those that differ from their defaults, and the others.
    """
    rows = settings(runs)
    if len(runs) > 1:
        return {"Settings that differ": Table(names, rows)}
    defaults = runs[0].defaults
    changed = {key for key in rows if key not in defaults or runs[0].settings[key] != defaults[key]}
    return {
        "Settings that differ from the defaults": Table([], {key: rows[key] for key in rows if key in changed}),
        "Other settings": Table([], {key: rows[key] for key in rows if key not in changed}, folded=True),
    }


def settings(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """The settings of a run, or those that differ between several runs, as on the command line."""
    from dpo.settings.config_files import format_value

    keys = dict.fromkeys(key for run in runs for key in run.settings)
    values = {key: [format_value(run.settings.get(key, "")) for run in runs] for key in keys}
    return {key: row for key, row in values.items() if len(runs) == 1 or len(set(row)) > 1}
