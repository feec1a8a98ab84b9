"""Recorded steps: compared with computed ones before they are used, over more than one step."""

from contextlib import nullcontext
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


@pytest.mark.parametrize("kind", [Counter, Waiting])
def test_a_cuda_graph_is_recorded_only_of_a_step_that_has_run_without_waiting(kind, monkeypatch):
    """With stand-ins for what only a GPU has: where such a step runs, the mode in which waiting is an error is on."""
    log, counter = [], kind()
    stream = SimpleNamespace(wait_stream=lambda other: log.append("wait"))

    class Graph:
        capture_stream = stream

        def __init__(self, graph, capture_error_mode):
            assert capture_error_mode == "thread_local"

        def __enter__(self):
            log.append("record")

        def __exit__(self, *error):
            log.append("recorded")

    def step():
        counter.step()
        if kind is Waiting and log[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        log.append("step")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay="replay"))
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", log.append)
    if kind is Waiting:
        with pytest.raises(RuntimeError, match="synchronizing"):
            record_cuda_graph(step)
        assert log == ["wait", "error", 0]
    else:
        assert record_cuda_graph(step) == "replay"
        assert log == ["wait", "error", "step", 0, "wait", "record", "step", "recorded"]
