"""`make demo`: SFT and then DPO on short film reviews (dpo/data/film_reviews.py), and what came of it.

python -m tools.demo                                           SFT, then DPO; exit code 1 if the policy is not good
python -m tools.demo --figure docs/demo.svg .cache/demo_TIME   draw the result of a demo that has run
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from dpo.data.film_reviews import KINDS, judge

SHARED = [
    *("model=tiny", "datasets=[demo]", "max_length=128", "max_prompt_length=64", "eval_batch_size=200"),
    *("minimum_log_interval_secs=5", "wandb.enabled=false"),
]
# The settings lie far from any edge: docs/demo.md has what was measured around them.
STAGES = {
    "sft": [
        "loss=sft",
        *("optimizer=AdamW", "lr=1e-3", "warmup_steps=30"),  # a model from random weights needs larger steps
        *("batch_size=16", "n_epochs=6"),  # until nearly all samples are whole: DPO needs a model that can write
        "do_first_eval=false",
        "sample_during_eval=false",  # the DPO run samples from the SFT model too, as its reference
    ],
    "dpo": [
        "loss=dpo",
        "loss.beta=2",  # lets the gradient fade once a warm review is some 10 times likelier than the cold one
        *("optimizer=SGD", "lr=0.08"),  # RMSprop moves weights that no preference is about as far as any other
        *("batch_size=32", "n_epochs=1", "warmup_steps=15"),  # 62 updates in all; the default warmup is 150
        *("eval_every=500", "n_eval_model_samples=200"),  # 5 evaluations, the first and the last included
    ],
}
MODELS = {"reference": "SFT model", "policy": "DPO policy"}  # as samples.jsonl names them
VERDICTS = (*KINDS, "broken")
MIN_WARM = 0.85  # of all samples of the policy
MAX_MORE_BROKEN = 0.05  # of all samples, beyond the SFT model's


def overrides(stage: str, base: Path) -> list[str]:
    """Return the overrides of the demo's "sft" or "dpo" run, whose run directory is BASE/STAGE."""
    archive = [f"model.archive='{base / 'sft' / 'LATEST' / 'policy.pt'}'"] if stage == "dpo" else []
    return [*STAGES[stage], *SHARED, *archive, f"local_run_dir='{base / stage}'"]


def train(base: Path) -> int:
    """Run SFT and then DPO through the command line; return the exit code of the one that failed, else 0."""
    # So small a model computes as fast on one thread, which other work on the machine cannot hold up.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for stage in STAGES:
        command = ["train.py", *overrides(stage, base)]
        print(f"\n$ python {shlex.join(command)}\n", flush=True)
        command = [sys.executable, str(Path(__file__).resolve().parents[1] / "train.py"), *command[1:]]
        if code := subprocess.run(command, env=environment).returncode:
            return code
    return 0


@dataclass(frozen=True)
class Outcome:
    """What a DPO run on the demo data set reached."""

    accuracy: float  # share of the held-out pairs whose chosen review has the higher reward
    margin: float  # mean difference of the two rewards of a held-out pair
    samples: dict[str, dict[str, str]]  # {prompt: sample} of the "reference", which is the SFT model, and the "policy"

    def counts(self, model: str) -> dict[str, int]:
        """Return how many of a model's samples are "warm", "cold" and "broken"."""
        counts = Counter(map(judge, self.samples[model].values()))
        return {verdict: counts[verdict] for verdict in VERDICTS}

    def share(self, model: str, verdict: str) -> float:
        """Return the share of all of a model's samples that have a verdict, from 0 to 1."""
        return self.counts(model)[verdict] / max(1, len(self.samples[model]))

    def problems(self) -> list[str]:
        """Return one sentence for each way in which the policy is not good."""
        warm = self.share("policy", "warm")
        before, after = self.share("reference", "broken"), self.share("policy", "broken")
        problems = []
        if warm < MIN_WARM:
            problems += [
                f"Only {warm:.1%} of all the policy's samples are warm; a good policy has {MIN_WARM:.0%} or more."
            ]
        if after > before + MAX_MORE_BROKEN:
            problems += [
                f"The policy writes worse than the SFT model: {after:.1%} broken samples, {before:.1%} before."
            ]
        return problems


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_outcome(run: Path) -> Outcome:
    """Read what a DPO run on the demo data set reached from its run directory."""
    last, rows = read_lines(run / "metrics.jsonl")[-1], read_lines(run / "samples.jsonl")
    samples = {model: {row["prompt"]: row["sample"] for row in rows if row["model"] == model} for model in MODELS}
    return Outcome(last["rewards_eval/accuracies"], last["rewards_eval/margins"], samples)


def summary(outcome: Outcome) -> str:
    """Describe an outcome in plain words: the samples in a table, what failed, and three prompts with their samples."""
    n = len(outcome.samples["policy"])
    lines = ["", f"Result: one sample for each of {n} held-out prompts, at temperature 1", ""]
    lines += [f"{'':12}" + "".join(f"{verdict:>8}" for verdict in VERDICTS)]
    for model, name in MODELS.items():
        lines += [f"{name:12}" + "".join(f"{count:8}" for count in outcome.counts(model).values())]
    lines += [
        "",
        "Warm reviews are the preferred ones. Broken: the text does not open with a whole verdict, a sentence is not",
        "whole or comes twice, or a word belongs to the other kind. Broken samples count as failures.",
        "",
    ]
    before, after = (outcome.share(model, "warm") for model in MODELS)
    failed = [f"FAILED: {problem}" for problem in outcome.problems()]
    lines += failed or [f"Of all samples, {before:.1%} are warm before DPO and {after:.1%} after it."]
    lines += [
        f"Held-out reward accuracy {outcome.accuracy:.3f}, reward margin {outcome.margin:.2f}. A policy that writes",
        "broken text can have these too, so read some samples as well:",
        "",
    ]
    for prompt in list(outcome.samples["policy"])[:3]:
        lines += [prompt.strip()]
        lines += [f"  {name}: {outcome.samples[model][prompt].strip()}" for model, name in MODELS.items()] + [""]
    return "\n".join(lines)


# The figure for the README

COLORS = {"warm": "#e07b39", "cold": "#3f86d6", "broken": "#8f5fbf"}
INK = "#7d8590"  # a gray that can be read on white and on black
LINE = "#2f9e6e"
COLUMNS = {"warm": 424, "cold": 468, "broken": 530}


def text(x: float, y: float, words: object, anchor: str = "start", color: str = INK) -> str:
    """Return an SVG text; anchor is start, middle or end."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="{color}">{words}</text>'


def bar(counts: dict[str, int], y: float) -> list[str]:
    """Return a stacked bar of the counts, and beside it each count in the column of its verdict."""
    x, parts = 108.0, []
    for verdict, count in counts.items():
        width = 260 * count / max(1, sum(counts.values()))
        parts += [f'<rect x="{x:g}" y="{y}" width="{width:g}" height="32" fill="{COLORS[verdict]}"/>']
        parts += [text(COLUMNS[verdict], y + 21, count, "end", COLORS[verdict])]
        x += width
    return parts


def curve(values: list[float], x: float, y: float, width: float, height: float) -> list[str]:
    """Return a line chart of values from 0 to 1 over the updates, with its two axes."""
    points = [(x + width * i / max(1, len(values) - 1), y + height * (1 - value)) for i, value in enumerate(values)]
    line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
    return [
        f'<path d="M{x} {y}V{y + height}H{x + width}" fill="none" stroke="{INK}"/>',
        f'<polyline points="{line}" fill="none" stroke="{LINE}" stroke-width="2.5"/>',
        *(text(x - 6, y + 5, 1, "end"), text(x - 6, y + height + 5, 0, "end")),
    ]


def figure(run: Path) -> str:
    """Return an SVG of a DPO run on the demo data set: the samples before and after, and the reward accuracy."""
    outcome, records = read_outcome(run), read_lines(run / "metrics.jsonl")
    accuracies = [r["rewards_train/accuracies"] for r in records if "rewards_train/accuracies" in r]
    parts = [text(16, 28, f"{len(outcome.samples['policy'])} samples"), text(556, 28, "Reward accuracy")]
    parts += [text(x, 28, verdict, "end", COLORS[verdict]) for verdict, x in COLUMNS.items()]
    for y, (model, name) in zip((46, 94), MODELS.items(), strict=True):
        parts += [text(98, y + 21, name, "end"), *bar(outcome.counts(model), y)]
    parts += curve(accuracies, 572, 46, 200, 80)
    parts += [text(772, 146, f"{len(accuracies)} updates; held out {outcome.accuracy:.3f}", "end")]
    style = 'font-family="system-ui, sans-serif" font-size="14" font-weight="600"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 790 160" {style}>', *parts, "</svg>", ""])


# The command line


def main(arguments: list[str]) -> int:
    """Run the demo, or draw the figure of one; return the exit code, 1 if the policy is not good."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", nargs=2, type=Path, metavar=("SVG", "FOLDER"), help="draw the demo in a folder")
    if chosen := parser.parse_args(arguments).figure:
        chosen[0].write_text(figure(chosen[1] / "dpo"), encoding="utf-8")
        return 0
    base = Path(".cache") / f"demo_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if code := train(base):
        return code
    outcome = read_outcome(base / "dpo")
    print(summary(outcome))
    print(next_steps(base))
    return 1 if outcome.problems() else 0


def next_steps(base: Path) -> str:
    """Return commands that work as they are printed, for a demo that has run in a folder."""
    python = shlex.quote(os.path.relpath(sys.executable))
    prompt = r"\n\nHuman: How was The Golden Harbour, a comedy about two sisters.\n\nAssistant:"
    load = f"pipe = pipeline('text-generation', '{base / 'dpo' / 'LATEST' / 'hf'}')"
    ask = f"print(pipe('{prompt}', max_new_tokens=50)[0]['generated_text'])"
    return "\n".join(
        [
            f"Everything is in {base}/. Ask the policy for another review, or draw this result:",
            "",
            f'  {python} -c "from transformers import pipeline; {load}; {ask}"',
            f"  {python} -m tools.demo --figure demo.svg {base}",
            "",
            "To train on your own pairs, see the worked example in README.md.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
