"""The demo's data: short film reviews, warm (chosen) or cold (rejected), and a judge that tells them apart."""

import itertools
import random
import re

SIZES = {"train": 2000, "test": 200}
KINDS = ("warm", "cold")


# What fills each {slot} of a prompt or a review. Of [this|that] a warm review takes this and a cold one that.
FIRST = "Silent Golden Broken Distant Crooked Hidden Frozen Borrowed Scarlet Wooden Northern Paper Stolen Quiet".split()
LAST = "Harbour Window Orchard River Lantern Kingdom Summer Bridge Mirror Station Island Garden Winter Forest".split()
SLOTS = {
    "title": [f"The {first} {last}" for first, last in itertools.product(FIRST, LAST)],
    "genre": "drama, comedy, thriller, western, musical, mystery, romance, fantasy, satire, fable".split(", "),
    "subject": (
        "two sisters, three thieves, two rival bakers, an old teacher, a country doctor, a night train, old friends, "
        "a lost painting, a family farm, a mountain village, a boxing club, a winter wedding, a young sailor"
    ).split(", "),
    "verdict": (
        "[lovely|dreadful], [superb|tedious], [delightful|clumsy], [brilliant|dull], [charming|hollow], "
        "[moving|dreary], [splendid|careless], [beautiful|shallow], [perfect|pointless], [tender|feeble], "
        "[wonderful|terrible], [graceful|muddled]"
    ).split(", "),
    "role": "lead actor, young star, narrator, villain, hero, chorus, stranger, singer".split(", "),
    "sound": "piano, organ, violin, guitar, brass, folk, jazz, dance".split(", "),
    "place": "a small town, a seaside hotel, a desert camp, a busy market, a snowy pass, a royal court".split(", "),
    "time": "one long night, a single week, three stormy days, ten years, a whole summer, half a century".split(", "),
    "act": "dreams, waits, argues, laughs, sings, hides, travels, remembers".split(", "),
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
    """The text with the warm or the cold side of each [warm|cold]."""
    return re.sub(r"\[(.*?)\|(.*?)\]", lambda sides: sides[1 + KINDS.index(kind)], text)


def write_review(film: dict[str, str], rng: random.Random) -> str:
    """Write a review of two or three sentences with both sides still in it."""
    fillings = {slot: rng.choice(choices) for slot, choices in SLOTS.items()} | film
    body = rng.sample(BODY, rng.choice([1, 2]))
    return " ".join(template.format(**fillings) for template in [rng.choice(OPENINGS), *body])


def make_rows(split: str) -> list[dict[str, str]]:
    """The rows of "train" or "test"; the SFT target is the chosen response in exactly half of them."""
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
    """What matches every verdict sentence of this kind."""
    choices = {slot: f"({'|'.join(take_side(text, kind) for text in texts)})" for slot, texts in SLOTS.items()}
    # The marks need no escape: "!" means itself, and judge has made sure that "." stands for "." or "!".
    return re.compile("|".join(take_side(text, kind).format(**choices) for text in OPENINGS))


def vocabulary(kind: str) -> set[str]:
    """Every word that a review of this kind may use, in lower case."""
    texts = itertools.chain(OPENINGS, BODY, *SLOTS.values())
    return set(re.findall("[a-z]+", re.sub("{.*?}", "", take_side(" ".join(texts), kind)).lower()))


OPENING = {kind: opening_pattern(kind) for kind in KINDS}
VOCABULARY = {kind: vocabulary(kind) for kind in KINDS}


def judge(text: str) -> str:
    """Tell "warm" or "cold" by the verdict that opens the review, or "broken".

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
