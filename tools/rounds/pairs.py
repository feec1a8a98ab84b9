"""Pairs of a prompt's samples, by their scores."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

from tools.rounds.records import Prompt, Record, Sample

TEST_SHARE = 0.1  # of the prompts, on whose pairs a training run is evaluated
# Why a prompt has no pair
TOO_FEW = "fewer than two usable samples"
TIED = "all scores equal"
TOO_CLOSE = "margin below min_margin"  # of every two
NO_SIMILAR_LENGTH = "no two of similar length"  # that differ enough in their scores
REASONS = (TOO_FEW, TIED, TOO_CLOSE, NO_SIMILAR_LENGTH)

# Why a sample cannot be in a pair, the first of these that holds; and those that can
UNFINISHED, EMPTY, DUPLICATE, UNSCORED, USABLE = "unfinished", "empty", "duplicate", "unscored", "usable"
KINDS = (UNFINISHED, EMPTY, DUPLICATE, UNSCORED, USABLE)


@dataclass(frozen=True)
class Scored:
    """A usable sample with its score."""

    sample: Sample
    score: float


@dataclass(frozen=True)
class Pair:
    chosen: Scored
    rejected: Scored

    @property
    def margin(self) -> float:
        return self.chosen.score - self.rejected.score

    @property
    def has_similar_lengths(self) -> bool:
        """Whether the shorter response has at least 80% of the longer one's tokens."""
        shorter, longer = sorted((len(self.chosen.sample.ids), len(self.rejected.sample.ids)))
        return 5 * shorter >= 4 * longer


# Chooses some of a prompt's possible pairs, of which there is at least one. They are in the order of the samples; of
# equally good ones the first is chosen.
Pairing = Callable[[Sequence[Pair], random.Random], Sequence[Pair]]


def best_worst(pairs: Sequence[Pair], rng: random.Random) -> Sequence[Pair]:
    """The pair with the largest margin: the best sample and the worst."""
    return [max(pairs, key=lambda pair: pair.margin)]


def best_random(pairs: Sequence[Pair], rng: random.Random) -> Sequence[Pair]:
    """The best sample and a random one of those that it forms a pair with."""
    best = max(pairs, key=lambda pair: pair.chosen.score).chosen
    return [rng.choice([pair for pair in pairs if pair.chosen == best])]


def every_pair(pairs: Sequence[Pair], rng: random.Random) -> Sequence[Pair]:
    return pairs


def length_matched(pairs: Sequence[Pair], rng: random.Random) -> Sequence[Pair]:
    """The pair with the largest margin of those with similar lengths, if there are any."""
    similar = [pair for pair in pairs if pair.has_similar_lengths]
    return best_worst(similar, rng) if similar else []


PAIRINGS: dict[str, Pairing] = {
    "best_worst": best_worst,
    "best_random": best_random,
    "all": every_pair,
    "length_matched": length_matched,
}


@dataclass
class PairCounts:
    """What became of the prompts, each of which is paired or has a reason, and of the samples, each of one kind."""

    prompts: int = 0
    paired: int = 0
    pairs: int = 0
    reasons: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    samples: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))

    def summary(self) -> str:
        """One line for the log."""
        unpaired = "".join(f", {n:,} without a pair ({reason})" for reason, n in self.reasons.items() if n)
        samples = ", ".join(f"{n:,} {kind}" for kind, n in self.samples.items() if n)
        return f"{self.pairs:,} pairs of {self.paired:,} of {self.prompts:,} prompts{unpaired}; samples: {samples or 0}"


def make_pairs(
    prompts: Sequence[Prompt],
    samples: Mapping[int, Sequence[Sample]],
    scores: Mapping[str, float | None],
    pairing: Pairing,
    min_margin: float,
    seed: int,
    name: str,
) -> tuple[list[Record], PairCounts]:
    """Make rows to train on of the samples of each prompt, given by the prompt's id; count what became of all.

    scores are by the samples' ids, finite, higher is better. A sample without one forms no pair, and neither do two
    with equal scores. The rows are in the order of prompts and samples. What pairing draws depends on the seed, the
    name of the round and the prompt's id alone.
    """
    rows: list[Record] = []
    counts = PairCounts()
    for prompt in prompts:
        usable = usable_samples(samples.get(prompt.id, ()), scores, counts.samples)
        rng = random.Random(f"{seed} {name}/{prompt.id}")
        pairs, reason = pairs_of(usable, pairing, min_margin, rng)
        counts.prompts += 1
        counts.paired += bool(pairs)
        counts.pairs += len(pairs)
        if not pairs:
            counts.reasons[reason] += 1
        rows += [to_row(prompt, pair) for pair in pairs]
    return rows, counts


def usable_samples(
    samples: Sequence[Sample], scores: Mapping[str, float | None], counts: dict[str, int]
) -> list[Scored]:
    """The samples of a prompt that can be in a pair, in the order of their indices; counts them all by kind."""
    usable: list[Scored] = []
    for sample in sorted(samples, key=lambda sample: sample.index):
        score = scores.get(sample.id)
        if not sample.finished:
            kind = UNFINISHED
        elif not sample.text.strip():
            kind = EMPTY
        elif any(sample.text == other.sample.text for other in usable):
            kind = DUPLICATE
        elif score is None:
            kind = UNSCORED
        else:
            kind = USABLE
            usable.append(Scored(sample, score))
        counts[kind] += 1
    return usable


def pairs_of(
    samples: Sequence[Scored], pairing: Pairing, min_margin: float, rng: random.Random
) -> tuple[Sequence[Pair], str]:
    """The pairs of a prompt's usable samples, and if there are none, the reason."""
    possible = [
        Pair(one, other) if one.score > other.score else Pair(other, one)
        for one, other in combinations(samples, 2)
        if one.score != other.score
    ]
    wide = [pair for pair in possible if pair.margin >= min_margin]
    if len(samples) < 2:
        return [], TOO_FEW
    if not possible:
        return [], TIED
    if not wide:
        return [], TOO_CLOSE
    return pairing(wide, rng), NO_SIMILAR_LENGTH


def to_row(prompt: Prompt, pair: Pair) -> Record:
    """A row of pairs.jsonl: texts or messages for readers, judges and reports, token ids for training."""
    chosen, rejected = pair.chosen.sample, pair.rejected.sample
    is_text = isinstance(prompt.prompt, str)
    answers = [each.text if is_text else [{"role": "assistant", "content": each.text}] for each in (chosen, rejected)]
    return {
        "id": f"{chosen.id}>{rejected.index}",
        "prompt": prompt.prompt,
        "chosen": answers[0],
        "rejected": answers[1],
        "score_chosen": pair.chosen.score,
        "score_rejected": pair.rejected.score,
        "sampled_ids": {"prompt": prompt.ids, "chosen": chosen.ids, "rejected": rejected.ids},
    }


def split_rows(rows: Sequence[Record], seed: int) -> tuple[list[Record], list[Record]]:
    """The rows to train on, and those to evaluate a training run on: a tenth of the prompts, the same in all rounds.

    If none of the rows' prompts is in that tenth, one of them is evaluated on.
    """
    order = {row["id"]: random.Random(f"{seed} {row['id'].split('/')[1]}").random() for row in rows}
    limit = max(TEST_SHARE, min(order.values(), default=0.0))
    return [row for row in rows if order[row["id"]] > limit], [row for row in rows if order[row["id"]] <= limit]
