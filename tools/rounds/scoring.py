"""Scores of samples: those that are worth a score go to the scorer, on all devices, and each answer is kept."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dpo.settings.schema import Settings
from tools.rounds.answers import answer_requests, answers_of, requests_of, scores_of
from tools.rounds.devices import split_over
from tools.rounds.records import Prompt, Sample
from tools.rounds.scorers import Request, Scorer
from tools.rounds.store import Shards

Texts = dict[int, list[str]]  # by the prompt's id


@dataclass(frozen=True)
class Scoring:
    """A scorer with the answers that it has given, which are kept in a file."""

    scorer: Scorer
    fingerprint: str
    settings: Settings  # of the run, for its devices
    cache: Path

    def __call__(self, prompts: Sequence[Prompt], texts: Texts) -> dict[tuple[int, str], float]:
        """The score of each distinct text of each prompt."""
        by_id = {prompt.id: prompt.prompt for prompt in prompts}
        requests = {id: requests_of(self.scorer, by_id[id], texts[id]) for id in texts}
        asked = [request for group in requests.values() for request in group]
        split_over(self.settings, None if self.scorer.on_devices else 1, partial(ask_share, self, asked))
        cache = Shards(self.cache, "key")
        scores = {}
        for id, group in requests.items():
            answers = answers_of(self.fingerprint, group, cache)
            for text, score in zip(texts[id], scores_of(self.scorer, texts[id], answers), strict=True):
                scores[id, text] = score
        return scores


def ask_share(scoring: Scoring, requests: Sequence[Request], rank: int, n: int, device: str) -> None:
    answer_requests(scoring.scorer, scoring.fingerprint, device, requests, Shards(scoring.cache, "key"), rank, n)


def distinct_texts(samples: Sequence[Sample]) -> Texts:
    """The distinct texts of each prompt's samples, in their order."""
    texts: dict[int, dict[str, None]] = defaultdict(dict)
    for sample in samples:
        texts[sample.prompt][sample.text] = None
    return {id: list(group) for id, group in texts.items()}


def is_usable(sample: Sample) -> bool:
    """Whether a sample can be a part of a pair: it has ended, and says something."""
    return sample.finished and bool(sample.text.strip())
