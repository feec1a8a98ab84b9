"""Runs as one HTML page, and the evaluation pairs that are likely mislabelled.

python report.py RUN                write RUN/report.html, which a run also does by itself at each evaluation
python report.py RUN1 RUN2 …        write report.html here, with the runs laid over each other
python report.py RUN --suspects     list the pairs whose reward margin stayed negative, the worst first
"""

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo.console import log_message
from dpo.errors import UserError, exit_on_error, summarize_error

TEMPLATE = Path(__file__).with_name("dpo") / "report.html.jinja"
Record = Mapping[str, Any]
Z = 1.96  # standard errors on each side of a 95% interval


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
        from dpo.run_configs import read_run_config
        from dpo.settings import flatten

        return flatten(read_run_config(self.path))

    @property
    def evaluation(self) -> Record:
        """The record of the newest evaluation."""
        return next((record for record in reversed(self.metrics) if "loss/eval" in record), {})

    @property
    def name(self) -> str:
        return str(self.settings["exp_name"])

    def read(self, name: str) -> list[Record]:
        """Return the whole lines of a file of records; a last one that is being written is left out."""
        path = self.path / name
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # texts hold other line ends
        return [json.loads(line) for line in lines]

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Return the numbers of examples at which a metric was recorded, and its values."""
        found = [(record["examples"], record[name]) for record in self.metrics if record.get(name) is not None]
        return [x for x, _ in found], [y for _, y in found]


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
        if max(values) < 0
    ]
    return sorted(found, key=lambda suspect: suspect.margin)


# The page


@dataclass(frozen=True)
class Curve:
    """A metric over the course of a run; of one that every update records, the noise is drawn faintly."""

    label: str
    metric: str
    every_update: bool = False


def train_and_evaluation(kind: str, name: str = "") -> list[Curve]:
    """Return the curves of a metric that updates and evaluations record."""
    return [
        Curve("train", f"{kind}_train/{name}" if name else f"{kind}/train", True),
        Curve("evaluation", f"{kind}_eval/{name}" if name else f"{kind}/eval"),
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
    SHARES[1]: [Curve("evaluation", "diagnosis/displaced")],
    LOGARITHMIC: [Curve("before clipping", "grad_norm", True)],
    "KL from the reference, nats per response": [Curve("samples", "diagnosis/kl")],
    "Entropy of the policy, nats per token": [Curve("samples", "diagnosis/entropy_per_token")],
    "Length of samples minus the reference's, tokens": [Curve("samples", "diagnosis/sample_length_difference")],
    "Learning rate": [Curve("", "lr", True)],
    "Pairs per second": [Curve("", "examples_per_second", True)],
    "Share of the matrix rate (mfu)": [Curve("", "mfu", True)],
}


def write_report(path: Path, runs: Sequence[RunFiles]) -> None:
    """Write a page about one run, or about several laid over each other."""
    write_page(path, page(runs))


def write_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all."""
    from dpo.checkpoints import atomic_write

    atomic_write(path, page.encode())


def update_report(path: Path) -> None:
    """Write a run's page anew; what goes wrong is printed in one line and stops no training."""
    try:
        write_report(path / "report.html", [RunFiles(path)])
    except Exception as error:  # whatever it is
        log_message(f"report.html was not written ({summarize_error(error)})")


def page(runs: Sequence[RunFiles]) -> str:
    """Return the page as HTML, which needs neither a network nor JavaScript."""
    from dpo.diagnosis import displacement_advice

    several = len(runs) > 1
    charts = {"Curves": curve_charts(runs)}
    if not several:
        charts |= pair_charts(runs[0])
    return render(
        title=", ".join(run.name for run in runs),
        tiles={"runs": len(runs)} if several else tiles(runs[0]),
        advice=None if several else displacement_advice(runs[0].evaluation),
        charts={heading: figures for heading, figures in charts.items() if figures},
        samples={f"Samples of {run.name}" if several else "Samples": samples(run) for run in runs if run.samples},
        suspects=[] if several else suspects(runs[0].pairs),
        names=[run.name for run in runs] if several else [],
        settings=settings(runs),
    )


def render(**parts: Any) -> str:
    """Return the page that is made of some parts, by the names that the template gives them."""
    from jinja2 import Environment

    template = Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(**parts)


def tiles(run: RunFiles) -> dict[str, str]:
    """Return the newest figures of a run, by what they are."""
    evaluation = run.evaluation
    newest = run.metrics[-1] if run.metrics else {}
    found = {name: f"{newest.get(name, 0):,}" for name in ("examples", "updates")}
    if evaluation.get("loss/eval") is not None:
        found["loss, evaluation"] = f"{evaluation['loss/eval']:.4g}"
    if "diagnosis/accuracy_low" in evaluation:
        low, high = (100 * evaluation[f"diagnosis/accuracy_{side}"] for side in ("low", "high"))
        accuracy = 100 * evaluation["rewards_eval/accuracies"]
        found[f"reward accuracy, 95% interval {low:.0f} to {high:.0f}%"] = f"{accuracy:.0f}%"
        found["reward margin"] = f"{evaluation['rewards_eval/margins']:.3g}"
    if "diagnosis/displaced" in evaluation:
        share = 100 * evaluation["diagnosis/displaced"]
        found["chosen responses that are less likely than under the reference"] = f"{share:.0f}%"
    if "diagnosis/kl" in evaluation:
        kl, spread = evaluation["diagnosis/kl"], Z * evaluation.get("diagnosis/kl_stderr", math.nan)
        found[f"KL from the reference in nats per response, 95% interval ±{spread:.2g}"] = f"{kl:.3g}"
    return found


def curve_charts(runs: Sequence[RunFiles]) -> list[str]:
    """Return the curves of a run, or of several runs those of their evaluations where there are any."""
    from dpo.figures import Line, line_chart

    figures = []
    for title, curves in CURVES.items():
        if len(runs) > 1:
            curves = [curve for curve in curves if not curve.every_update] or curves
        lines = []
        for run in runs:
            for curve in curves:
                x, y = run.column(curve.metric)
                label = ", ".join(filter(None, (run.name if len(runs) > 1 else "", curve.label)))
                if x:
                    band = interval(run, curve.metric)
                    lines.append(Line(label, x, y, band, faint=curve.every_update and len(curves) > 1))
        if lines:
            figures.append(line_chart(title, lines, log_y=title == LOGARITHMIC, share=title in SHARES))
    return figures


def interval(run: RunFiles, metric: str) -> tuple[list[float], list[float]] | None:
    """Return the lower and the upper ends of a metric's 95% intervals, where each of its values has one."""
    _, values = run.column(metric)
    if metric == "rewards_eval/accuracies":
        low, high = (run.column(f"diagnosis/accuracy_{side}")[1] for side in ("low", "high"))
    else:
        spreads = [Z * error for error in run.column(f"{metric}_stderr")[1]]
        low = [value - spread for value, spread in zip(values, spreads, strict=False)]
        high = [value + spread for value, spread in zip(values, spreads, strict=False)]
    return (low, high) if len(low) == len(values) else None


def pair_charts(run: RunFiles) -> dict[str, list[str]]:
    """Return charts of the pairs of the newest evaluation, under a heading."""
    from dpo.figures import scatter_chart

    newest = [pair for pair in run.pairs if pair["examples"] == run.pairs[-1]["examples"]]
    if not newest:
        return {}
    margins = [float(pair["rewards/margins"]) for pair in newest]
    longer = [pair["lengths/chosen"] - pair["lengths/rejected"] for pair in newest]
    figures = [scatter_chart("Margin and length", longer, margins, "tokens, chosen minus rejected", "reward margin")]
    if "log_ratios/chosen" in newest[0]:
        chosen, rejected = ([float(pair[f"log_ratios/{side}"]) for pair in newest] for side in ("chosen", "rejected"))
        title = "Log-ratios to the reference (nats)"
        figures.insert(0, scatter_chart(title, chosen, rejected, "chosen response", "rejected response", diagonal=True))
    return {f"Evaluation pairs after {newest[0]['examples']:,} examples": figures}


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


# The command line


def run_files(path: Path) -> RunFiles:
    """Return a run's files; UserError if the folder is not a run directory."""
    from dpo.run_configs import find_run_dir

    files = RunFiles(find_run_dir(path))
    assert files.settings
    return files


def main() -> None:
    """Write a report, or list suspects."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--suspects", action="store_true", help="list likely wrong labels as tab-separated lines")
    options = parser.parse_args()
    runs = [run_files(path) for path in options.runs]
    if options.suspects:
        for run in runs:
            if not run.pairs:
                raise UserError(f"{run.path}: holds no pairs.jsonl with evaluated pairs")
            for pair in suspects(run.pairs):
                print(f"{pair.source}\t{pair.place}\t{pair.margin:.4g}")
        return
    path = runs[0].path / "report.html" if len(runs) == 1 else Path("report.html")
    write_report(path, runs)
    log_message(f"Wrote {path}")


if __name__ == "__main__":
    exit_on_error(main)
