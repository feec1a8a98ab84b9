"""The pace of a rank's layers, by a clock that the tests move, and which rank is named."""

from types import SimpleNamespace

import pytest
import torch

from dpo.distributed.stragglers import LayerClock, StragglerWatch


def test_only_passes_that_train_are_timed_and_each_token_counts_once_per_layer(monkeypatch):
    """Two layers of 3 seconds each, 2 x 4 tokens: 6 seconds for 16 tokens; without a gradient none."""
    now = iter(range(0, 100, 3))
    monkeypatch.setattr("dpo.distributed.stragglers.time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock, model = LayerClock(torch.device("cpu")), torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 5))
    clock.watch(model)
    model(torch.zeros(2, 4, 5))
    with torch.no_grad():
        model(torch.zeros(2, 4, 5))
    assert clock.take() == (6, 16) and clock.take() == (0, 0)


def messages(*updates):
    """Return the messages of a watch on updates, each with the seconds of the ranks for 100 tokens."""
    watch = StragglerWatch()
    return [message for update in updates for message in watch.look([(seconds, 100) for seconds in update])]


def test_a_rank_that_is_slow_in_five_updates_in_a_row_is_named_once():
    (message,) = messages(*[(1.0, 3.0, 1.1)] * 12)
    assert message.startswith("Rank 1 is slow: its layers take 2.9 times")  # 3 / 1.05, the median of the others


@pytest.mark.parametrize("slow", [(1.0, 3.0), (3.0, 1.0)])
def test_of_two_ranks_the_slower_one_is_named(slow):
    assert [m.split(" is slow")[0] for m in messages(*[slow] * 5)] == [f"Rank {slow.index(3.0)}"]


@pytest.mark.parametrize("updates", [[(1.0, 3.0)] * 4, ([(1.0, 3.0)] * 4 + [(1.0, 1.0)]) * 3, [(1.0, 1.4)] * 20])
def test_a_rank_that_is_slow_now_and_then_or_by_little_is_not_named(updates):
    assert messages(*updates) == []


def test_a_rank_with_more_tokens_is_not_slow():
    watch = StragglerWatch()
    assert not any(watch.look([(1.0, 100), (3.0, 300)]) for _ in range(10))


def test_a_record_without_training_passes_and_a_rank_alone_are_nothing_to_compare():
    watch = StragglerWatch()
    assert watch.look([(0.0, 0), (0.0, 0)]) == watch.look([(1.0, 10)]) == []
