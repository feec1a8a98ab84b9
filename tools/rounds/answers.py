"""What a scorer is asked about samples, and scores from its answers; answers are kept, and never asked for twice."""

import hashlib
import json
import math
import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import permutations
from typing import Any

from dpo.system.console import log_message, progress
from dpo.system.errors import UserError
from tools.rounds.commands import MiscountError
from tools.rounds.records import Record
from tools.rounds.scorers import Request, Scorer
from tools.rounds.store import Shards

SAVE_EVERY = 1.0  # seconds


def requests_of(scorer: Scorer, prompt: Any, texts: Sequence[str]) -> list[Request]:
    """What to ask about distinct texts: each, or for a pairwise scorer every two in both orders."""
    if scorer.is_pairwise:
        return [Request(prompt, pair) for pair in permutations(texts, 2)]
    return [Request(prompt, (text,)) for text in texts]


def scores_of(scorer: Scorer, texts: Sequence[str], answers: Sequence[float]) -> list[float]:
    """The score of each text, from the answers to requests_of.

    Of a pairwise scorer it is the mean result against each other text, from 0 to 1; of a text without others 0.5.
    """
    if not scorer.is_pairwise:
        return list(answers)
    if len(texts) == 1:
        return [0.5]
    results: dict[str, list[float]] = {text: [] for text in texts}
    for (first, second), answer in zip(permutations(texts, 2), answers, strict=True):
        results[first].append(answer)
        results[second].append(1 - answer)
    return [math.fsum(results[text]) / len(results[text]) for text in texts]


def request_key(fingerprint: str, request: Request) -> str:
    """The key of a request's answer; the fingerprint is the scorer's."""
    content = json.dumps([fingerprint, request.prompt, request.texts], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def answers_of(fingerprint: str, requests: Sequence[Request], cache: Shards) -> list[float]:
    """The answers to requests, which answer_requests has asked for."""
    return [cache.rows[request_key(fingerprint, request)]["answer"] for request in requests]


def answer_requests(
    scorer: Scorer,
    fingerprint: str,
    device: str,
    requests: Sequence[Request],
    cache: Shards,
    rank: int = 0,
    n: int = 1,
) -> None:
    """Ask for the answers that the cache lacks; the rank-th of n processes asks for its share.

    The first answer is final. UserError, after all answers that arrived are kept, if a request fails or its answer is
    no finite number.
    """
    key_of = partial(request_key, fingerprint)
    distinct = {key_of(request): request for request in requests}
    share = scorer.batches(list(distinct.values()))[rank::n]
    keys = [key_of(request) for batch in share for request in batch]
    log_message(f"Scores: {sum(key in cache.rows for key in keys):,} of {len(keys):,} answers are known.")
    missing = [batch for batch in share if any(key_of(request) not in cache.rows for request in batch)]
    if not missing:
        return
    arrived: list[Record] = []
    saved = time.monotonic()
    try:
        with scorer.opened(device) as ask, closing(ask(missing)) as answers:
            for request, answer in progress(answers, "scoring", total=sum(map(len, missing))):
                if not math.isfinite(answer):
                    cause = f"gives {answer} instead of a finite number"
                    raise UserError(f"{scorer.setting}: {cause}, for {request.describe()}")
                arrived.append({"key": key_of(request), "answer": answer})
                if scorer.is_paid or time.monotonic() - saved >= SAVE_EVERY:
                    cache.append(arrived, rank)
                    arrived, saved = [], time.monotonic()
    except MiscountError:  # the answers may belong to other requests
        arrived = []
        cache.remove(keys, rank)
        raise
    finally:
        cache.append(arrived, rank)
