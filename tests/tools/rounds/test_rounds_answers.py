"""Requests and their answers: what is asked, what is kept, and that nothing is asked twice, also over a kill."""

import json
import math
import os
import random
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import ROOT
from fake_server import serve
from tiny_classifiers import write_classifier

from dpo.system.errors import UserError
from tools.rounds import answers
from tools.rounds.answers import answer_requests, answers_of, requests_of, scores_of
from tools.rounds.scorers import Answers, CommandScorer, JudgeScorer, Request, RewardScorer, Scorer
from tools.rounds.store import Shards, read_rows

PAIRWISE = JudgeScorer(url="http://h/v1", model="m", mode="pairwise", at_once=1)
GRADES = JudgeScorer(url="http://h/v1", model="m", mode="grade", at_once=1)
REQUESTS = [Request("A prompt.", (text,)) for text in ("a", "bb", "ccc", "dddd", "eeeee")]


class Fake(Scorer):
    """Gives values in turn; one that is an error is raised."""

    values: list[Any]
    size: int = 1
    asked: list[Request] = []

    @property
    def setting(self) -> str:
        return "scorer.fake=1"

    def fingerprint(self) -> str:
        return "fake"

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        return [list(requests[i : i + self.size]) for i in range(0, len(requests), self.size)]

    @contextmanager
    def opened(self, device: str):
        def ask(batches: Sequence[Sequence[Request]]) -> Answers:
            for request in [request for batch in batches for request in batch]:
                self.asked.append(request)
                value = self.values.pop(0)
                if isinstance(value, Exception):
                    raise value
                yield request, value

        yield ask


@pytest.fixture
def cache(tmp_path):
    """Return a function that opens the cache anew, as a restart does."""
    return lambda: Shards(tmp_path / "answers.jsonl", "key")


# Requests and scores


def test_a_text_is_asked_about_alone_or_with_each_other_text_in_both_orders():
    assert requests_of(GRADES, "p", ["a", "b"]) == [("p", ("a",)), ("p", ("b",))]
    pairs = [request.texts for request in requests_of(PAIRWISE, "p", ["a", "b", "c"])]
    assert sorted(pairs) == [("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b")]
    assert requests_of(PAIRWISE, "p", ["a"]) == requests_of(PAIRWISE, "p", []) == []


def test_a_pairwise_score_is_the_mean_result_against_each_other_text_over_both_orders():
    answers = {("a", "b"): 1.0, ("b", "a"): 0.0, ("a", "c"): 1.0, ("c", "a"): 1.0, ("b", "c"): 0.5, ("c", "b"): 0.5}
    texts = ["a", "b", "c"]
    in_order = [answers[request.texts] for request in requests_of(PAIRWISE, "p", texts)]
    assert scores_of(PAIRWISE, texts, in_order) == [0.75, 0.25, 0.5]
    assert scores_of(PAIRWISE, ["a"], []) == [0.5] and scores_of(PAIRWISE, [], []) == []
    assert scores_of(GRADES, texts, [3.0, 1.0, 2.0]) == [3.0, 1.0, 2.0]


# What is kept


def test_answers_are_kept_and_only_those_that_lack_are_asked_for(cache, capsys):
    answer_requests(Fake(values=[1.0, 2.0]), "fake", "cpu", REQUESTS[:2], cache())
    later = Fake(values=[3.0, 4.0, 5.0])
    answer_requests(later, "fake", "cpu", [*REQUESTS, REQUESTS[4]], cache())
    assert later.asked == REQUESTS[2:]
    assert answers_of("fake", REQUESTS, cache()) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert "Scores: 2 of 5 answers are known." in capsys.readouterr().out
    answer_requests(Fake(values=[]), "fake", "cpu", REQUESTS, cache())


def test_another_scorer_prompt_or_text_has_an_answer_of_its_own(cache):
    chat = [{"role": "user", "content": "A prompt."}]
    others = [Request("A prompt", ("a",)), Request("A prompt.", ("a", "b")), Request(chat, ("a",))]
    answer_requests(Fake(values=[1.0, 2.0, 3.0, 4.0]), "fake", "cpu", [REQUESTS[0], *others], cache())
    answer_requests(Fake(values=[5.0]), "other", "cpu", REQUESTS[:1], cache())
    assert answers_of("fake", [REQUESTS[0], *others], cache()) == [1.0, 2.0, 3.0, 4.0]
    assert answers_of("other", REQUESTS[:1], cache()) == [5.0]
    reordered = Request([{"content": "A prompt.", "role": "user"}], ("a",))
    assert answers_of("fake", [reordered], cache()) == [4.0]


def test_the_first_answer_of_a_scorer_that_changes_its_answers_is_final(cache):
    answer_requests(Fake(values=[0.0, 1.0]), "fake", "cpu", REQUESTS[:2], cache())
    again = Fake(values=[7.0, 8.0, 9.0, 9.0, 9.0], size=3)  # asks for the whole batch
    answer_requests(again, "fake", "cpu", REQUESTS, cache())
    assert answers_of("fake", REQUESTS, cache()) == [0.0, 1.0, 9.0, 9.0, 9.0]


@pytest.mark.parametrize("failure", [UserError("it fails"), math.nan, math.inf, -math.inf])
def test_answers_before_a_failure_are_kept_and_the_request_is_named(failure, cache):
    message = "it fails"
    if not isinstance(failure, UserError):
        cause = f"gives {failure} instead of a finite number"
        message = f"^scorer.fake=1: {cause}, for the response 'ccc' to the prompt 'A prompt.'$"
    with pytest.raises(UserError, match=message):
        answer_requests(Fake(values=[1.0, 2.0, failure]), "fake", "cpu", REQUESTS, cache())
    assert len(cache().rows) == 2 and answers_of("fake", REQUESTS[:2], cache()) == [1.0, 2.0]


def test_answers_are_saved_at_once_if_they_are_paid_for_and_else_once_a_second(cache, monkeypatch):
    class Paid(Fake):
        is_paid = True

    class Observed(list):
        def pop(self, *args):
            saved.append(len(cache().rows))
            return super().pop(*args)

    cases = ((Paid, math.inf, [0, 1, 2, 3, 4]), (Fake, 0.0, [0, 1, 2, 3, 4]), (Fake, math.inf, [0, 0, 0, 0, 0]))
    for number, (kind, save_every, expected) in enumerate(cases):
        saved, known = [], len(cache().rows)
        monkeypatch.setattr(answers, "SAVE_EVERY", save_every)
        scorer = kind.model_construct(values=Observed([1.0] * 5), asked=[])
        answer_requests(scorer, str(number), "cpu", REQUESTS, cache())
        assert [n - known for n in saved] == expected
        assert len(cache().rows) == known + 5


def test_processes_share_the_requests_by_whole_batches_whoever_has_answered_before(cache, tmp_path):
    for n in (1, 2, 3):
        scorers = [Fake(values=[1.0] * 5, size=2) for _ in range(n)]
        caches = [Shards(tmp_path / str(n) / "answers.jsonl", "key") for _ in range(n)]
        for rank, scorer in enumerate(scorers):
            answer_requests(scorer, "fake", "cpu", REQUESTS, caches[rank], rank, n)
        assert Counter(request for scorer in scorers for request in scorer.asked) == Counter(REQUESTS)
        assert all(len(scorer.asked) <= 4 for scorer in scorers) or n == 1
        assert len(Shards(tmp_path / str(n) / "answers.jsonl", "key").rows) == 5


def test_a_reward_models_answers_are_the_same_bits_after_a_kill_at_any_row(tmp_path):
    write_classifier(tmp_path / "model")
    scorer = RewardScorer(model=str(tmp_path / "model"), batch_size=3)
    texts = [f"{'word ' * (n // 2)}{n}" for n in range(1, 9)]
    requests = requests_of(scorer, "Say a word.", texts)
    whole = Shards(tmp_path / "whole" / "answers.jsonl", "key")
    answer_requests(scorer, "f", "cpu", requests, whole)
    lines = (tmp_path / "whole" / "answers-0.jsonl").read_text().splitlines(keepends=True)
    for n in (1, 4, 7):
        path = tmp_path / str(n) / "answers.jsonl"
        path.parent.mkdir()
        (path.parent / "answers-0.jsonl").write_text("".join(lines[:n]) + lines[n][:9])
        answer_requests(scorer, "f", "cpu", random.Random(n).sample(requests, len(requests)), Shards(path, "key"))
        assert answers_of("f", requests, Shards(path, "key")) == answers_of("f", requests, whole)


# A command


def command_of(tmp_path, code):
    (tmp_path / "program.py").write_text(f"import sys, os, signal\n{code}\n")
    return CommandScorer(command=shlex.join([sys.executable, str(tmp_path / "program.py")]), timeout=60)


def test_answers_of_a_command_that_dies_are_kept_and_it_is_asked_for_the_others(cache, tmp_path):
    log = f"open('{tmp_path}/log', 'a').write(line)"
    die = "len(open(__file__[:-10] + 'log').readlines()) == 3 and os.kill(os.getpid(), signal.SIGKILL)"
    scorer = command_of(tmp_path, f"for line in sys.stdin:\n    {log}\n    print(len(line), flush=True)\n    {die}")
    with pytest.raises(UserError, match="failed with exit code 137 after 3 of 5 answers"):
        answer_requests(scorer, "f", "cpu", REQUESTS, cache())
    assert len(cache().rows) == 3
    answer_requests(scorer, "f", "cpu", REQUESTS, cache())
    assert len(cache().rows) == len((tmp_path / "log").read_text().splitlines()) == 5


@pytest.mark.parametrize(
    "code, message",
    [
        ("print(line.count('e'))\n    print(0)", "wrote more than 5 lines"),
        ("'bb' in line or print(1)", "ended after 4 of 5"),
    ],
)
def test_no_answer_of_a_command_that_answers_more_or_less_than_it_was_asked_is_kept(code, message, cache, tmp_path):
    known = Request("Another prompt.", ("x",))
    answer_requests(Fake(values=[1.0]), "f", "cpu", [known], cache())
    scorer = command_of(tmp_path, f"for line in sys.stdin:\n    {code}")
    with pytest.raises(UserError, match=message):
        answer_requests(scorer, "f", "cpu", REQUESTS, cache())
    assert answers_of("f", [known], cache()) == [1.0] and len(cache().rows) == 1


# A kill


KILLED = """
import sys
from pathlib import Path
from tools.rounds.answers import answer_requests, requests_of
from tools.rounds.scorers import JudgeScorer
from tools.rounds.store import Shards

url, at_once, path = sys.argv[1:]
scorer = JudgeScorer(url=url, model="m", mode="pairwise", at_once=int(at_once))
requests = requests_of(scorer, "A prompt.", ["a", "b", "c", "d"])
answer_requests(scorer, scorer.fingerprint(), "cpu", requests, Shards(Path(path), "key"))
"""


@pytest.mark.parametrize("at_once, n_before", [(1, 3), (4, 5)])
def test_no_call_that_was_answered_is_made_again_after_a_kill(at_once, n_before, tmp_path):
    held, release, allowed = threading.Event(), threading.Event(), threading.Semaphore(n_before)

    def reply(body):
        if not release.is_set() and not allowed.acquire(blocking=False):
            held.set()
            release.wait(60)
        return "A"

    with serve(reply) as server:
        arguments = [sys.executable, "-c", KILLED, server.url, str(at_once), str(tmp_path / "answers.jsonl")]
        process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE)
        try:
            assert held.wait(60)
            deadline = time.monotonic() + 60
            # All calls under way have arrived, so that none of them is taken for one that is made again.
            while len(shard_rows(tmp_path)) < n_before or len(server.asked) < n_before + at_once:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
        answered = list(server.answered)
        server.reply = lambda body: "A"
        server.asked.clear()
        subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True, text=True)
        again = [json.dumps(body) for body in server.asked]
        release.set()
    assert len(answered) == n_before and len(again) == len(set(again)) == 12 - n_before
    assert not {json.dumps(body) for body in answered} & set(again)
    assert len(shard_rows(tmp_path)) == 12


def shard_rows(folder):
    return read_rows(folder / "answers-0.jsonl")
