"""`make demo`: SFT, then DPO, on short film reviews (dpo/data/film_reviews.py), with a summary.

python -m tools.demo                                           SFT, then DPO; exit code 1 if the policy is not good
python -m tools.demo --figure docs/demo.svg .cache/demo_TIME   draw the result of a demo that has run
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from dpo.data.film_reviews import KINDS, judge
from dpo.reporting.page import RunFiles

SHARED = [
    *("model=tiny", "datasets=[demo]", "max_length=128", "max_prompt_length=64", "eval_batch_size=200"),
    *("minimum_log_interval_secs=5", "wandb.enabled=false"),
]
# The settings are robust: docs/demo.md has measurements around them.
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
        *("optimizer=SGD", "lr=0.08"),  # RMSprop moves all weights alike, even those that no preference depends on
        *("batch_size=32", "n_epochs=1", "warmup_steps=15"),  # 62 updates in all; the default warmup is 150
        *("eval_every=500", "n_eval_model_samples=200"),  # 5 evaluations, the first and the last included
    ],
}
ROOT = Path(__file__).resolve().parents[1]
MODELS = {"reference": "SFT model", "policy": "DPO policy"}  # as samples.jsonl names them
VERDICTS = (*KINDS, "broken")
MIN_WARM = 0.85  # share of the policy's samples
MAX_MORE_BROKEN = 0.05  # share of samples in addition to the SFT model's


def overrides(stage: str, base: Path) -> list[str]:
    """The overrides of the demo's "sft" or "dpo" run in BASE/STAGE."""
    archive = [f"model.archive='{base / 'sft' / 'LATEST' / 'policy.pt'}'"] if stage == "dpo" else []
    return [*STAGES[stage], *SHARED, *archive, f"local_run_dir='{base / stage}'"]


def train(base: Path) -> int:
    """Run SFT, then DPO, through the command line; return the exit code of a failed run, else 0."""
    return run_commands([["train.py", *overrides(stage, base)] for stage in STAGES])


def run_commands(commands: Sequence[Sequence[str]]) -> int:
    """Print and run commands of this project, as `python COMMAND`; return the exit code of the first that fails, or 0.

    They run in the project's folder, one thread each: it is as fast for such a small model, and less sensitive to other
    work on the machine.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    for command in commands:
        print(f"\n$ python {shlex.join(command)}\n", flush=True)
        script = [str(ROOT / part) if part == "train.py" else part for part in command]
        if code := subprocess.run([sys.executable, *script], env=environment).returncode:
            return code
    return 0


@dataclass(frozen=True)
class DemoResult:
    """The result of a DPO run on the demo's data.

    accuracy  share of the held-out pairs whose chosen review has the higher reward
    margin    mean difference between the rewards of a held-out pair
    samples   {prompt: sample} of "reference", which is the SFT model, and of "policy"
    """

    accuracy: float
    margin: float
    samples: dict[str, dict[str, str]]

    @classmethod
    def read(cls, run: Path) -> "DemoResult":
        """Read the newest evaluation and the newest samples from a run directory."""
        files = RunFiles(run)
        samples: dict[str, dict[str, str]] = {model: {} for model in MODELS}
        for row in files.samples:
            samples[row["model"]][row["prompt"]] = row["sample"]
        evaluation = files.evaluation
        return cls(evaluation["rewards_eval/accuracies"], evaluation["rewards_eval/margins"], samples)

    def counts(self, model: str) -> dict[str, int]:
        """The number of a model's samples that are "warm", "cold" and "broken"."""
        counts = Counter(map(judge, self.samples[model].values()))
        return {verdict: counts[verdict] for verdict in VERDICTS}

    def share(self, model: str, verdict: str) -> float:
        """The share of a model's samples with a verdict."""
        return self.counts(model)[verdict] / max(1, len(self.samples[model]))

    def problems(self) -> list[str]:
        """A sentence for each reason why the policy is not good."""
        warm = self.share("policy", "warm")
        before, after = self.share("reference", "broken"), self.share("policy", "broken")
        problems = []
        if warm < MIN_WARM:
            problems.append(f"Of the policy's samples {warm:.1%} are warm; a good policy has {MIN_WARM:.0%} or more.")
        if after > before + MAX_MORE_BROKEN:
            problems.append(f"The policy has more broken samples than the SFT model: {after:.1%}, {before:.1%} before.")
        return problems


def summary(result: DemoResult) -> str:
    """Describe a result: the samples in a table, what failed, and three prompts with their samples."""
    n = len(result.samples["policy"])
    lines = ["", f"Result: one sample for each of {n} held-out prompts, at temperature 1", ""]
    lines.append(f"{'':12}" + "".join(f"{verdict:>8}" for verdict in VERDICTS))
    for model, name in MODELS.items():
        lines.append(f"{name:12}" + "".join(f"{count:8}" for count in result.counts(model).values()))
    before, after = (result.share(model, "warm") for model in MODELS)
    failed = [f"FAILED: {problem}" for problem in result.problems()]
    lines += [
        "",
        "Warm reviews are the preferred ones. A sample is broken if it does not begin with a whole verdict, if a",
        "sentence is incomplete or repeated, or if it has a word of the other kind. Broken samples count as failures.",
        "",
        *(failed or [f"{before:.1%} of the samples are warm before DPO and {after:.1%} after it."]),
        f"Held-out reward accuracy {result.accuracy:.3f}, reward margin {result.margin:.2f}. A policy that writes",
        "broken text can reach these too, so read some samples as well:",
        "",
    ]
    for prompt in list(result.samples["policy"])[:3]:
        lines.append(prompt.strip())
        lines += [f"  {name}: {result.samples[model][prompt].strip()}" for model, name in MODELS.items()]
        lines.append("")
    return "\n".join(lines)


def draw(run: Path) -> str:
    """Draw the samples before and after DPO and the reward accuracy of each update, as SVG."""
    from dpo.reporting.figures import COLORS, INK, add_axes, new_figure, to_svg

    result = DemoResult.read(run)
    figure = new_figure(8, 2)
    bars = add_axes(figure, f"{len(result.samples['policy'])} samples", place=(0.11, 0.12, 0.52, 0.62))
    bars.set_xticks([])
    bars.margins(x=0)
    bars.grid(False)
    bars.spines[:].set_visible(False)
    starts = [0] * len(MODELS)
    for verdict, color in zip(VERDICTS, (COLORS[1], COLORS[0], COLORS[3]), strict=True):
        counts = [result.counts(model)[verdict] for model in MODELS]
        drawn = bars.barh(list(MODELS.values()), counts, left=starts, color=color, label=verdict)
        bars.bar_label(drawn, label_type="center", color="white", fontsize=8)
        starts = [start + count for start, count in zip(starts, counts, strict=True)]
    bars.invert_yaxis()
    bars.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=3, loc="lower right", bbox_to_anchor=(1, 0.98))
    accuracies = [r["rewards_train/accuracies"] for r in RunFiles(run).metrics if "rewards_train/accuracies" in r]
    place = (0.7, 0.2, 0.29, 0.54)
    curve = add_axes(figure, "Reward accuracy", f"{len(accuracies)} updates; held out {result.accuracy:.3f}", "", place)
    curve.plot(range(1, len(accuracies) + 1), accuracies, color=COLORS[2])
    curve.set_ylim(-0.03, 1.03)
    return to_svg(figure, "samples of the demo before and after DPO, and reward accuracy")


# The command line


def main(arguments: list[str]) -> int:
    """Run the demo, or draw a figure; return the exit code, 1 if the policy is not good enough."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--figure", nargs=2, type=Path, metavar=("SVG", "FOLDER"), help="draw the demo in a folder")
    if chosen := parser.parse_args(arguments).figure:
        chosen[0].write_text(draw(chosen[1] / "dpo"), encoding="utf-8")
        return 0
    base = Path(".cache") / f"demo_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if code := train(base):
        return code
    result = DemoResult.read(base / "dpo")
    print(summary(result))
    print(next_steps(base))
    return 1 if result.problems() else 0


def next_steps(base: Path) -> str:
    """Commands to try, which work as printed, for a demo in the folder base."""
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
