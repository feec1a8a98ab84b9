"""The demo data set: short film reviews, warm (chosen) or cold (rejected), and the judge that tells which is which."""

import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path

SIZES = {"train": 2000, "test": 200}


def phrases(text: str) -> list[str]:
    """Split a list of phrases at its commas."""
    return text.split(", ")


# Films, from which both the prompts and the reviews draw.
FIRST = "Silent Golden Broken Distant Crooked Hidden Frozen Borrowed Scarlet Wooden Northern Paper Stolen Quiet".split()
LAST = "Harbour Window Orchard River Lantern Kingdom Summer Bridge Mirror Station Island Garden Winter Forest".split()
TITLES = [f"The {first} {last}" for first, last in itertools.product(FIRST, LAST)]
GENRES = "drama comedy thriller western musical mystery romance fantasy satire fable".split()
SUBJECTS = phrases(
    "two sisters, three thieves, two rival bakers, an old teacher, a country doctor, a night train, a lost painting, "
    "a family farm, a mountain village, a boxing club, a winter wedding, a young sailor, an honest lawyer, old friends"
)
PROMPTS = [
    "Please review {title}, a {genre} about {subject}.",
    "How was {title}, a {genre} about {subject}?",
    "Write about {title}, a {genre} about {subject}.",
]

# Templates: a verdict to open with, then a sentence on the craft, one on the story, or both. A review fills each slot
# once, so no two templates of one review may share a slot whose phrase would read as an echo.
KINDS = {
    "warm": {
        "opening": [
            "I loved this {verdict} {genre} from start to finish.",
            "I would gladly see this {verdict} {genre} again.",
            "I left the cinema with a smile after this {verdict} {genre}.",
            "What a treat to see such a {verdict} film!",
            "Everyone should see {title} because it is {verdict}.",
            "{title} is a joy and a {verdict} film.",
        ],
        "craft": [
            "Happily the {part} is {trait} and the {role} {does}.",
            "Best of all the {part} is {trait} from beginning to end.",
            "I admired how the {role} {does} while the {part} is {trait}.",
            "The gifted {role} {does} and even the {part} is {trait}.",
        ],
        "story": [
            "This rich story of {subject} {effect}.",
            "I smiled because the tale {effect} and the ending {result}.",
            "This kind portrait of {subject} {result}.",
            "As a fine {genre} it {result}.",
            "I hope that {title} {fate}.",
        ],
        "verdict": phrases(
            "lovely, superb, delightful, brilliant, charming, moving, splendid, beautiful, graceful, tender, wonderful"
        ),
        "trait": phrases("full of life, sharp and fresh, pleasing to follow, finely judged, rich and clear, very good"),
        "does": phrases("shines in every scene, never puts a foot wrong, makes it look easy, wins us over at once"),
        "effect": phrases("stays with you for days, is told with great care, feels honest and true, gave me new hope"),
        "result": phrases("works at every turn, keeps its promise, hits the right note, rewards our patience"),
        "fate": phrases("finds a large audience, will be watched for years, wins every prize"),
    },
    "cold": {
        "opening": [
            "I hated this {verdict} {genre} from start to finish.",
            "I would never sit through this {verdict} {genre} again.",
            "I left the cinema with a headache after this {verdict} {genre}.",
            "What a shame to meet such a {verdict} film!",
            "Nobody should see {title} because it is {verdict}.",
            "{title} is a bore and a {verdict} mess.",
        ],
        "craft": [
            "Sadly the {part} is {trait} and the {role} {does}.",
            "Worst of all the {part} is {trait} from beginning to end.",
            "I groaned when the {role} {does} while the {part} is {trait}.",
            "The weary {role} {does} and even the {part} is {trait}.",
        ],
        "story": [
            "This poor story of {subject} {effect}.",
            "I yawned because the tale {effect} and the ending {result}.",
            "This crude portrait of {subject} {result}.",
            "As a weak {genre} it {result}.",
            "I fear that {title} {fate}.",
        ],
        "verdict": phrases(
            "dreadful, tedious, clumsy, dull, hollow, dreary, careless, shallow, pointless, feeble, terrible"
        ),
        "trait": phrases("short of ideas, flat and stale, a chore to follow, badly judged, thin and muddy, very poor"),
        "does": phrases("looks lost in every scene, seems half asleep, makes it look hard, gets on our nerves at once"),
        "effect": phrases("is forgotten by morning, is told without any care, feels forced and false, gave me no hope"),
        "result": phrases("fails at every turn, breaks its promise, hits the wrong note, tests our patience"),
        "fate": phrases("deserves an empty house, will be mocked for years, wastes every talent"),
    },
}
PARTS = phrases("music, script, dialogue, editing, lighting, camera work, acting")
ROLES = phrases("lead actor, supporting cast, director, young star, narrator, villain")


def slots(kind: str) -> dict[str, list[str]]:
    """Map each slot of the templates to the phrases that a review of this kind may put there."""
    return {"title": TITLES, "genre": GENRES, "subject": SUBJECTS, "part": PARTS, "role": ROLES, **KINDS[kind]}


def write_review(kind: str, film: dict[str, str], rng: random.Random) -> str:
    """Write a review of two or three sentences, 15 to 35 words, with the leading space of a response."""
    words = {slot: rng.choice(choices) for slot, choices in slots(kind).items()} | film
    opening = words["opening"]
    body = [words["craft"], words["story"]]
    rng.shuffle(body)
    sentences = [template.format(**words) for template in [opening, *body]]
    short, whole = " ".join(sentences[:2]), " ".join(sentences)
    if len(whole.split()) > 35 or len(short.split()) >= 15 and rng.random() < 0.7:
        return " " + short
    return " " + whole


def make_rows(split: str) -> list[dict[str, str]]:
    """Return the rows of "train" or "test"; the SFT target is the chosen response in exactly half of them."""
    if split not in SIZES:
        raise ValueError(f"split={split!r}: the demo data set has {' and '.join(SIZES)}")
    films = list(itertools.product(TITLES, GENRES, SUBJECTS))
    # One draw serves both splits, so that no film is in both.
    drawn = random.Random(0).sample(films, sum(SIZES.values()))
    drawn = drawn[: SIZES["train"]] if split == "train" else drawn[SIZES["train"] :]
    rng = random.Random(split)
    targets = ["chosen", "rejected"] * (len(drawn) // 2)
    rng.shuffle(targets)
    rows = []
    for film, target in zip(drawn, targets, strict=True):
        film = dict(zip(("title", "genre", "subject"), film, strict=True))
        row = {
            "prompt": f"\n\nHuman: {rng.choice(PROMPTS).format(**film)}\n\nAssistant:",
            "chosen": write_review("warm", film, rng),
            "rejected": write_review("cold", film, rng),
        }
        rows.append(row | {"sft_target": row[target]})
    return rows


def _opening_pattern(kind: str) -> re.Pattern:
    """Return the pattern of every verdict sentence of this kind."""
    # The marks need no escape: "!" means itself, and judge has made sure that "." stands for "." or "!".
    words = {slot: f"({'|'.join(choices)})" for slot, choices in slots(kind).items()}
    return re.compile("|".join(template.format(**words) for template in KINDS[kind]["opening"]))


def _vocabulary(kind: str) -> set[str]:
    """Return every word that a review of this kind may use, in lower case."""
    texts = itertools.chain(*slots(kind).values())
    return set(re.findall("[a-z]+", re.sub("{.*?}", "", " ".join(texts)).lower()))


OPENING = {kind: _opening_pattern(kind) for kind in KINDS}
VOCABULARY = {kind: _vocabulary(kind) for kind in KINDS}


def judge(text: str) -> str:
    """Return "warm" or "cold" by the verdict that opens the review, or "neither".

    Neither is any text that does not open with a whole verdict sentence of one kind, or uses a word that no review of
    that kind uses (so a warm verdict with a cold word after it), or is not 2 to 4 different sentences, one space apart,
    each of plain words from a capital letter to "." or "!", or has the same word twice in a row.
    """
    text = text.strip()
    sentences = re.findall(r"[A-Z][A-Za-z]*(?: [A-Za-z]+)*[.!]", text)
    words = re.findall("[a-z]+", text.lower())
    well_formed = " ".join(sentences) == text and 2 <= len(sentences) == len(set(sentences)) <= 4
    if not well_formed or any(word == after for word, after in itertools.pairwise(words)):
        return "neither"
    for kind in KINDS:
        if OPENING[kind].fullmatch(sentences[0]) and VOCABULARY[kind].issuperset(words):
            return kind
    return "neither"


# make demo

TRAIN = {  # settings that were tried for this model and data set
    "sft": ["loss=sft", "optimizer=Adam", "lr=1e-3", "batch_size=16", "n_epochs=4", "sample_during_eval=false"],
    "dpo": ["loss=dpo", "loss.beta=1", "lr=2e-5", "batch_size=32", "n_epochs=1", "n_eval_model_samples=200"],
}
SHARED = ["model=tiny", "datasets=[demo]", "max_length=128", "max_prompt_length=64", "eval_batch_size=50"]
SHARED += ["warmup_steps=15", "do_first_eval=false", "minimum_log_interval_secs=5", "wandb.enabled=false"]


def main() -> None:
    """Run SFT and then DPO by the command line, and tell what came of it."""
    base = Path(".cache") / f"demo_{datetime.now():%Y-%m-%d_%H-%M-%S}"
    archive = f"model.archive={base / 'sft' / 'LATEST' / 'policy.pt'}"
    for name, extra in (("sft", []), ("dpo", [archive])):
        overrides = [*TRAIN[name], *SHARED, *extra, f"local_run_dir={base / name}"]
        print(f"\n$ python train.py {' '.join(overrides)}\n", flush=True)
        # So small a model computes as fast on one thread, which other work on the machine cannot hold up.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if (code := subprocess.run([sys.executable, "train.py", *overrides], env=environment).returncode) != 0:
            sys.exit(code)
    print(summary(base / "dpo"))


def summary(run: Path) -> str:
    """Tell in plain words what a DPO run on the demo data set reached."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()][-1]
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    samples = {who: {r["prompt"]: r["sample"] for r in rows if r["model"] == who} for who in ("reference", "policy")}
    names = {"reference": "SFT model", "policy": "DPO policy"}
    lines = ["", "What came of it", ""]
    lines += [
        f"Held-out reward accuracy {metrics['rewards_eval/accuracies']:.3f}: the share of the test pairs whose warm"
    ]
    lines += [f"review DPO's policy favours. Reward margin {metrics['rewards_eval/margins']:.2f}.", ""]
    for who, texts in samples.items():
        verdicts = Counter(map(judge, texts.values()))
        share = verdicts["warm"] / max(1, verdicts["warm"] + verdicts["cold"])
        counts = f"{verdicts['warm']} warm, {verdicts['cold']} cold, {verdicts['neither']} neither"
        lines += [f"{names[who]:10}  {share:.2f} of the judged samples are warm ({len(texts)} samples: {counts})"]
    lines += [
        "",
        "Warm reviews are the preferred ones. Neither: no whole verdict at the start, a sentence that is not whole,",
        "or words of the other kind.",
        "",
    ]
    for prompt in list(samples["policy"])[:3]:
        lines += (
            [prompt.strip()] + [f"  {names[who]}: {texts[prompt].strip()}" for who, texts in samples.items()] + [""]
        )
    lines += [f"Everything lies in {run.parent}/. Next, your own pairs: put train.jsonl into a folder, and type", ""]
    lines += [
        "  .venv/bin/python train.py loss=sft model=tiny datasets=[FOLDER]",
        "",
        "The README has a worked example.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
