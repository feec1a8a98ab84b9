"""`make demo-rounds`: from the demo's SFT model, two rounds on its own samples, scored by the demo's judge.

Prints how many held-out samples of each policy are warm, cold and broken; the exit code is 1 if the policy is not good.
"""

import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from dpo.data.film_reviews import judge
from tools.demo import MAX_MORE_BROKEN, MIN_WARM, VERDICTS, overrides, run_commands
from tools.rounds.judgement import read_history

SCORES = {"warm": 1.0, "cold": 0.0, "broken": -1.0}
SETTINGS = [
    *("loss=dpo", "model=tiny", "prompts=[demo]", "eval_prompts=[demo]", "scorer=tools.rounds.demo:score"),
    *("rounds=2", "samples=4", "prompts_per_round=600"),
    *("max_length=128", "max_prompt_length=64", "wandb.enabled=false", "minimum_log_interval_secs=5"),
    *("loss.beta=2", "optimizer=SGD", "lr=0.015", "batch_size=32", "warmup_steps=5"),
]


def score(prompt: Any, response: str) -> float:
    """The scorer of the demo."""
    return SCORES[judge(response)]


def commands(base: Path, *others: str) -> list[list[str]]:
    """The commands of the demo in a folder; others are further settings of both."""
    archive = f"model.archive='{base / 'sft' / 'LATEST' / 'policy.pt'}'"
    rounds = ["-m", "tools.rounds", *SETTINGS, archive, f"local_run_dir='{base / 'rounds'}'", *others]
    return [["train.py", *overrides("sft", base), *others], rounds]


def counts(out: Path) -> list[dict[str, int]]:
    """The held-out samples of each round by the judge's verdict."""
    rounds = [Counter(judge(one.sample.text) for one in judgement.samples) for judgement in read_history(out)]
    return [{verdict: found[verdict] for verdict in VERDICTS} for found in rounds]


def problems(rounds: list[dict[str, int]]) -> list[str]:
    """A sentence for each reason why the last policy is not good."""
    first, last, n = rounds[0], rounds[-1], sum(rounds[0].values())
    found = []
    if last["warm"] < MIN_WARM * n:
        found.append(f"Of the last policy's samples {last['warm'] / n:.1%} are warm; a good policy has {MIN_WARM:.0%}.")
    if last["broken"] > first["broken"] + MAX_MORE_BROKEN * n:
        found.append(f"The last policy has {last['broken']} broken samples, the SFT model {first['broken']}.")
    return found


def summary(rounds: list[dict[str, int]], out: Path) -> str:
    names = ["SFT model", *(f"round {k}" for k in range(1, len(rounds)))]
    lines = ["", f"{'':12}" + "".join(f"{verdict:>8}" for verdict in VERDICTS)]
    lines += [f"{name:12}" + "".join(f"{n:8}" for n in row.values()) for name, row in zip(names, rounds, strict=True)]
    lines += ["", *(f"FAILED: {problem}" for problem in problems(rounds))]
    lines += [f"The rounds side by side, with samples: {out / 'report.html'}"]
    return "\n".join(lines)


def main() -> int:
    base = Path(".cache") / f"demo_rounds_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if code := run_commands(commands(base)):
        return code
    rounds = counts(base / "rounds")
    print(summary(rounds, base / "rounds"))
    return 1 if problems(rounds) else 0


if __name__ == "__main__":
    sys.exit(main())
