"""Recorded steps: compared with computed ones before they are used, over more than one step."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from recording import record

from dpo.model.cuda_graphs import Recorder, record_cuda_graph


class Counter:
    """A step adds 1 to a number, and its square to the logits; what a subclass reads from the host does not change."""

    def __init__(self):
        self.n, self.logits = torch.zeros(1), torch.zeros(2, 3)

    def step(self):
        self.n.add_(1)
        self.logits[:, 0] = self.n * self.n


class FromHost(Counter):
    """A step reads a number of the host, which is fixed in a recording."""

    n_on_host = 0

    def step(self):
        self.n_on_host += 1
        self.n.add_(1)
        self.logits[:, 0] = torch.full((2,), 1.0 * self.n_on_host)


class Waiting(Counter):
    def step(self):
        super().step()
        self.n.item()


def test_a_recorded_step_does_the_same_work_and_leaves_no_trace_before():
    counter = Counter()
    recorded = Recorder(record)(counter.step, [counter.n], counter.logits)
    assert counter.n == 0 and counter.logits.sum() == 0
    for n in (1, 2, 3):
        recorded()
        assert counter.n == n and counter.logits[:, 0].tolist() == [n * n] * 2


@pytest.mark.parametrize("kind, reason", [(FromHost, "log-probabilities change by"), (Waiting, "waits for the device")])
def test_a_step_that_cannot_be_recorded_is_refused_once_and_for_all(kind, reason, capsys):
    counter, recorder = kind(), Recorder(record)
    for _ in range(2):
        assert recorder(counter.step, [counter.n], counter.logits) is None
        assert counter.n == 0 and counter.logits.sum() == 0
    messages = capsys.readouterr().out
    assert messages.count("Sampling uses no CUDA graphs") == 1 and reason in messages


def test_a_recorded_step_that_is_right_only_once_is_refused():
    counter = Counter()

    def record_once(step):
        steps = iter([step])
        return lambda: next(steps, lambda: None)()

    assert Recorder(record_once)(counter.step, [counter.n], counter.logits) is None


def test_logits_that_are_not_finite_are_no_reason_to_trust_a_recording(capsys):
    counter = Counter()
    counter.logits[0, 1] = torch.nan
    assert Recorder(record)(counter.step, [counter.n], counter.logits) is None


def test_a_lack_of_memory_is_no_reason_to_go_on():
    def fail(step):
        raise RuntimeError("CUDA out of memory")

    counter = Counter()
    with pytest.raises(RuntimeError, match="out of memory"):
        Recorder(fail)(counter.step, [counter.n], counter.logits)


@pytest.mark.parametrize("fails", [None, "error", "record"])
def test_a_cuda_graph_is_recorded_only_of_a_step_that_has_run_without_waiting(fails, monkeypatch):
    """With stand-ins for what only a GPU has: where such a step runs, the mode in which waiting is an error is on.

    A recording that fails does not restore the current stream.
    """
    log, counter = [], Counter()
    current = own, side = [SimpleNamespace(wait_stream=lambda other: log.append("wait")) for _ in range(2)]

    @contextmanager
    def use(stream):
        before, current[0] = current[0], stream
        try:
            yield
        finally:
            current[0] = before

    class Graph:
        capture_stream = side

        def __init__(self, graph, capture_error_mode):
            assert capture_error_mode == "thread_local"

        def __enter__(self):
            log.append("record")
            current[0] = side

        def __exit__(self, *error):
            if fails != "record":
                log.append("recorded")
                current[0] = own

    def step():
        counter.step()
        if log[-1] == fails:
            raise RuntimeError("called a synchronizing CUDA operation")
        assert current[0] is side
        log.append("step")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", log.append)
    if fails:
        with pytest.raises(RuntimeError, match="synchronizing"):
            record_cuda_graph(step)
    else:
        assert record_cuda_graph(step) == "replay"
    whole = ["wait", "error", "step", 0, "wait", "record", "step", "recorded"]
    assert log == {None: whole, "error": ["wait", "error", 0], "record": whole[:6]}[fails]
    assert current[0] is own
