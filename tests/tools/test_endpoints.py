"""Requests to a server: what is tried again, after which pause, and what an error says; several at the same time."""

import threading

import pytest
from fake_server import serve

from dpo.system.errors import UserError
from tools import endpoints
from tools.endpoints import ATTEMPTS, MAX_PAUSE, Endpoint, url_problem


class Pauses(threading.Event):
    """Keeps the pauses between attempts, which take no time."""

    def __init__(self):
        super().__init__()
        self.made = []

    def wait(self, timeout=None):
        self.made.append(timeout)
        return self.is_set()


@pytest.fixture
def pauses():
    return Pauses()


def ask(server, pauses, **options):
    return Endpoint("--url", server.url, stopped=pauses, **options).chat("m", [])


def failing(*failures):
    """Make a server's reply: these failures, then "yes"."""
    left = list(failures)
    return lambda body: left.pop(0) if left else "yes"


@pytest.mark.parametrize(
    "asked_for, pauses_made",
    [("7", [7.0, 7.0, 8.0]), ("1", [2.0, 4.0, 8.0]), ("9999", [MAX_PAUSE] * 3), ("Fri, 01 Jan 2027", [2.0, 4.0, 8.0])],
)
def test_a_busy_server_is_asked_again_after_the_pause_that_it_asks_for(asked_for, pauses_made, pauses):
    busy = (429, {"Retry-After": asked_for}, {})
    with serve(failing(busy, busy, busy)) as server:
        assert ask(server, pauses) == "yes"
    assert pauses.made == pauses_made and len(server.asked) == ATTEMPTS


@pytest.mark.parametrize("failure", [(503, {}, {}), (200, {"Content-Length": "1000"}, {}), (200, {}, {"text": "yes"})])
def test_a_failure_a_reply_that_breaks_off_and_one_in_another_form_are_tried_again(failure, pauses):
    with serve(failing(failure)) as server:
        assert ask(server, pauses) == "yes" and len(server.asked) == 2
    with serve(lambda body: failure) as server:
        with pytest.raises(UserError, match="^--url: (HTTP Error 503|IncompleteRead|'choices')"):
            ask(server, pauses)
    assert len(server.asked) == ATTEMPTS


@pytest.mark.parametrize(
    "body, message",
    [
        ({"error": {"message": "no\nmodel"}}, " (no model)"),  # OpenAI, vLLM
        ({"error": "no model"}, " (no model)"),
        ({"detail": "no model"}, " (no model)"),  # FastAPI
        ({"object": "error", "message": "no model"}, " (no model)"),  # SGLang
        ({"detail": [{"loc": []}]}, ""),
        (["?"], ""),
    ],
)
def test_a_refusal_is_final_and_has_the_servers_own_message_in_one_line(body, message, pauses):
    with serve(failing((404, {}, body))) as server:
        with pytest.raises(UserError) as failure:
            ask(server, pauses)
    assert str(failure.value) == f"--url: HTTP Error 404: Not Found{message}"
    assert len(server.asked) == 1


def test_a_request_that_was_not_answered_in_time_is_not_repeated(pauses):
    with serve(lambda body: None) as server:
        with pytest.raises(UserError, match="^--url: no answer after 0.1 s$"):
            ask(server, pauses, timeout=0.1)
    assert len(server.asked) == 1


def test_a_server_answers_once_it_has_started_and_until_it_ends():
    with serve(lambda body: "yes", starts=1) as server:
        assert [Endpoint("--url", server.url).answers() for _ in range(2)] == [False, True]
    assert not Endpoint("--url", server.url).answers()


@pytest.mark.parametrize("end", ["/chat/completions", "/completions/", "/models"])
def test_a_url_of_a_path_is_refused(end):
    assert url_problem("http://h/v1/") is None
    assert url_problem(f"http://h/v1{end}").startswith(f"must be the part before {end.rstrip('/')}, ")


# Several requests


@pytest.fixture
def call_concurrently():
    return Endpoint("it", "http://h").call_concurrently


def test_calls_run_at_the_same_time_and_no_more_than_allowed(call_concurrently):
    together = threading.Barrier(3, timeout=10)  # passes three calls that wait for each other
    running, most = [], []

    def call(item):
        running.append(item)
        most.append(len(running))
        together.wait()
        running.remove(item)
        return -item

    assert sorted(call_concurrently(call, range(9), 3)) == [(item, -item) for item in range(9)]
    assert max(most) == 3


def test_after_an_error_calls_under_way_are_yielded_and_no_other_begins(call_concurrently):
    began, failed = [], threading.Event()

    def call(item):
        began.append(item)
        if item == 1:
            failed.set()
            raise UserError("no")
        failed.wait(10)
        return item

    yielded = []
    with pytest.raises(UserError, match="no"):
        for item, _ in call_concurrently(call, range(100), 3):
            yielded.append(item)
    assert 1 not in yielded and set(began) - {1} == set(yielded) and len(began) < 10


def test_after_ctrl_c_calls_under_way_are_yielded(monkeypatch, call_concurrently):
    wait, presses = endpoints.wait, [1]

    def interrupted(*args, **options):
        if presses and presses.pop():
            raise KeyboardInterrupt
        return wait(*args, **options)

    monkeypatch.setattr(endpoints, "wait", interrupted)
    results, yielded = call_concurrently(lambda item: item, range(100), 2), []
    with pytest.raises(KeyboardInterrupt):
        for item, _ in results:
            yielded.append(item)
    assert sorted(yielded) == [0, 1]


def test_after_an_error_no_request_is_tried_again():
    """The second request is answered once the first one was refused, and would be tried again after a pause."""
    pausing = threading.Event()

    def reply(body):
        if body["messages"] == [1]:
            pausing.wait(10)
            return 400, {}, {}
        pausing.set()
        return 429, {"Retry-After": "100"}, {}

    with serve(reply) as server:
        endpoint = Endpoint("it", server.url)
        with pytest.raises(UserError, match="^it: HTTP Error 400"):
            list(endpoint.call_concurrently(lambda number: endpoint.chat("m", [number]), [1, 2], 2))
    assert len(server.asked) == 2


def test_nobody_waits_for_calls_under_way_when_the_generator_is_closed(call_concurrently):
    going_on, ended = threading.Event(), []

    def call(item):
        if item > 0:
            going_on.wait(10)
            ended.append(item)

    results = call_concurrently(call, range(100), 2)
    assert next(results) == (0, None)
    results.close()
    assert ended == []
    going_on.set()
