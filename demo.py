"""The demo: a data set of short film reviews, warm (chosen) or cold (rejected), a judge of samples, and `make demo`.

python demo.py                                           SFT, then DPO; exit code 1 if the policy is not good
python demo.py --figure docs/demo.svg .cache/demo_TIME   draw the result of a demo that has run
"""

import argparse
import itertools
import json
import os
import random
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

SIZES = {"train": 2000, "test": 200}
KINDS = ("warm", "cold")


def phrases(text: str) -> list[str]:
    """Split a list of phrases at its commas."""
    return text.split(", ")


# What fills each {slot} of a prompt or a review. Of [this|that] a warm review takes this and a cold one that.
FIRST = "Silent Golden Broken Distant Crooked Hidden Frozen Borrowed Scarlet Wooden Northern Paper Stolen Quiet".split()
LAST = "Harbour Window Orchard River Lantern Kingdom Summer Bridge Mirror Station Island Garden Winter Forest".split()
SLOTS = {
    "title": [f"The {first} {last}" for first, last in itertools.product(FIRST, LAST)],
    "genre": phrases("drama, comedy, thriller, western, musical, mystery, romance, fantasy, satire, fable"),
    "subject": phrases(
        "two sisters, three thieves, two rival bakers, an old teacher, a country doctor, a night train, old friends, "
        "a lost painting, a family farm, a mountain village, a boxing club, a winter wedding, a young sailor"
    ),
    "verdict": phrases(
        "[lovely|dreadful], [superb|tedious], [delightful|clumsy], [brilliant|dull], [charming|hollow], "
        "[moving|dreary], [splendid|careless], [beautiful|shallow], [perfect|pointless], [tender|feeble], "
        "[wonderful|terrible], [graceful|muddled]"
    ),
    "role": phrases("lead actor, young star, narrator, villain, hero, chorus, stranger, singer"),
    "sound": phrases("piano, organ, violin, guitar, brass, folk, jazz, dance"),
    "place": phrases("a small town, a seaside hotel, a desert camp, a busy market, a snowy pass, a royal court"),
    "time": phrases("one long night, a single week, three stormy days, ten years, a whole summer, half a century"),
    "act": phrases("dreams, waits, argues, laughs, sings, hides, travels, remembers"),
}
# A verdict to open with, then one or two sentences on the film, which carry no verdict and so suit either.
OPENINGS = [
    "I [loved|hated] this {genre} from start to finish.",
    "We left the cinema [smiling|yawning] that evening.",
    "Critics [praised|mocked] this {genre} for weeks.",
    "What a {verdict} film this is!",
    "My friends and I found it {verdict}.",
    "They have made a {verdict} {genre} here.",
]
BODY = [
    "It follows {subject} through {time} in {place}.",
    "The {role} {act} while {sound} music plays softly.",
    "{title} begins in {place} and lasts for {time}.",
    "Its {sound} music tells us that the {role} {act}.",
    "We meet {subject} just before the {role} {act}.",
]


def take_side(text: str, kind: str) -> str:
    """Take the warm or the cold side of each [warm|cold] in a text."""
    return re.sub(r"\[(.*?)\|(.*?)\]", lambda sides: sides[1 + KINDS.index(kind)], text)


def write_review(film: dict[str, str], rng: random.Random) -> str:
    """Write a review of two or three sentences with both sides still in it."""
    words = {slot: rng.choice(choices) for slot, choices in SLOTS.items()} | film
    body = rng.sample(BODY, rng.choice([1, 2]))
    return " ".join(template.format(**words) for template in [rng.choice(OPENINGS), *body])


def make_rows(split: str) -> list[dict[str, str]]:
    """Return the rows of "train" or "test"; the SFT target is the chosen response in exactly half of them."""
    if split not in SIZES:
        raise ValueError(f"split={split!r}: the demo data set has {' and '.join(SIZES)}")
    # One draw serves both splits, so that no film is in both.
    films = list(itertools.product(SLOTS["title"], SLOTS["genre"], SLOTS["subject"]))
    films = random.Random(0).sample(films, sum(SIZES.values()))
    films = films[: SIZES["train"]] if split == "train" else films[SIZES["train"] :]
    rng = random.Random(split)
    targets = ["chosen", "rejected"] * (len(films) // 2)
    rng.shuffle(targets)
    rows = []
    for (title, genre, subject), target in zip(films, targets, strict=True):
        film = {"title": title, "genre": genre, "subject": subject}
        request = rng.choice(["Please review", "How was", "Write about"])
        review = write_review(film, rng)
        row = {
            "prompt": f"\n\nHuman: {request} {title}, a {genre} about {subject}.\n\nAssistant:",
            "chosen": " " + take_side(review, "warm"),
            "rejected": " " + take_side(review, "cold"),
        }
        rows.append(row | {"sft_target": row[target]})
    return rows


def opening_pattern(kind: str) -> re.Pattern[str]:
    """Return the pattern of every verdict sentence of this kind."""
    choices = {slot: f"({'|'.join(take_side(text, kind) for text in texts)})" for slot, texts in SLOTS.items()}
    # The marks need no escape: "!" means itself, and judge has made sure that "." stands for "." or "!".
    return re.compile("|".join(take_side(text, kind).format(**choices) for text in OPENINGS))


def vocabulary(kind: str) -> set[str]:
    """Return every word that a review of this kind may use, in lower case."""
    texts = itertools.chain(OPENINGS, BODY, *SLOTS.values())
    return set(re.findall("[a-z]+", re.sub("{.*?}", "", take_side(" ".join(texts), kind)).lower()))


OPENING = {kind: opening_pattern(kind) for kind in KINDS}
VOCABULARY = {kind: vocabulary(kind) for kind in KINDS}


def judge(text: str) -> str:
    """Return "warm" or "cold" by the verdict that opens the review, or "broken".

    Broken is any text that does not open with a whole verdict sentence of one kind, or uses a word that no review of
    that kind uses (so a warm verdict with a cold word after it), or is not 2 to 4 different sentences, one space apart,
    each of plain words from a capital letter to "." or "!", or has the same word twice in a row.
    """
    text = text.strip()
    sentences = re.findall(r"[A-Z][A-Za-z]*(?: [A-Za-z]+)*[.!]", text)
    words = re.findall("[a-z]+", text.lower())
    well_formed = " ".join(sentences) == text and 2 <= len(sentences) == len(set(sentences)) <= 4
    if not well_formed or any(word == after for word, after in itertools.pairwise(words)):
        return "broken"
    for kind in KINDS:
        if OPENING[kind].fullmatch(sentences[0]) and VOCABULARY[kind].issuperset(words):
            return kind
    return "broken"


# make demo

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
        command = [sys.executable, str(Path(__file__).with_name("train.py")), *command[1:]]
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
            f"  {python} demo.py --figure demo.svg {base}",
            "",
            "To train on your own pairs, see the worked example in README.md.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
