"""Random generators that come back, and tensors that are found, counted and copied."""

import random

import numpy as np
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from dpo.system import state
from dpo.system.state import copy_to_host, random_states, set_random_states, size_of


def test_random_states_come_back_from_a_checkpoint_in_all_generators(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    before = random_states()
    torch.save({"state": before}, tmp_path / "states.pt")
    drawn = [draw() for _ in range(2)]
    assert len(set(drawn)) == 2
    set_random_states(torch.load(tmp_path / "states.pt", weights_only=True)["state"])
    assert [draw() for _ in range(2)] == drawn


def test_random_states_of_gpus_come_back_where_there_are_as_many(monkeypatch):
    came_back = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["first", "second"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", came_back.append)
    states = random_states()
    for n in (0, 1, 2):
        monkeypatch.setattr(torch.cuda, "device_count", lambda n=n: n)
        set_random_states(states)
    assert came_back == [["first", "second"]]


def test_a_copy_shares_no_memory_with_its_source_and_tied_weights_share_theirs():
    weight = torch.nn.Parameter(torch.ones(2, 3))
    source = {
        "a": weight,
        "b": weight.detach(),
        "t": weight.detach().T,
        "n": [1, (weight[:1], "x")],
        "e": torch.ones(0),
    }
    copied = copy_to_host(source, {})
    with torch.no_grad():
        weight += 1
    assert copied["a"] is copied["b"] and copied["a"].unique().tolist() == [1.0]
    assert copied["t"].shape == (3, 2) and copied["t"].unique().tolist() == [1.0]
    assert copied["n"][0] == 1 and copied["n"][1][0].tolist() == [[1.0] * 3] and copied["n"][1][1] == "x"
    assert not copied["a"].requires_grad


def test_a_copy_of_a_tensor_made_of_others_copies_these():
    source = TwoTensor(torch.ones(2), torch.zeros(2))
    copied = copy_to_host({"m": source}, {})["m"]
    source.a += 1
    source.b += 1
    assert type(copied) is TwoTensor and copied.a.tolist() == [1, 1] and copied.b.tolist() == [0, 0]


class Queue:
    """Copies that a GPU makes at once, or as late as it may: when the host waits for an event after them."""

    def __init__(self, monkeypatch, late):
        copies, copy, empty = [], torch.Tensor.copy_, torch.empty

        class Event:
            def record(self):
                self.n = len(copies)

            def synchronize(self):
                for i, pair in enumerate(copies[: self.n]):
                    if pair is not None:
                        copy(*pair)
                    copies[i] = None

        def enqueue(target, source, non_blocking=False):
            return copies.append((target, source)) if non_blocking and late else copy(target, source)

        def allocate(*shape, pin_memory=False, **options):
            self.pinned += [*shape] * pin_memory
            return empty(*shape, **options)

        self.pinned = []
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        monkeypatch.setattr(torch.Tensor, "copy_", enqueue)
        monkeypatch.setattr(torch, "empty", allocate)
        monkeypatch.setattr(torch.cuda, "Event", Event)


@pytest.mark.parametrize("late", [True, False])
def test_a_copy_from_a_gpu_is_whole_when_it_returns_and_goes_through_two_small_pinned_buffers(late, monkeypatch):
    """Buffers of 64 bytes for tensors from 0 to 960 bytes, of several dtypes, one not contiguous, one made of two."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5,), (), (3, 40), (0,), (2, 2, 2), (17,), (64,)]
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)
    source = [(100 * torch.rand(shape, generator=generator)).to(dtype) for shape in shapes for dtype in dtypes]
    expected = [tensor.clone() for tensor in source]
    queue = Queue(monkeypatch, late)
    monkeypatch.setattr(state, "STAGING_BYTES", 64)
    large = source[8]
    made = TwoTensor(source[0], source[0])
    copied = copy_to_host({"all": source, "transposed": large.T, "again": large, "made": made}, {})
    for tensor in source:
        tensor.zero_()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(copied["all"], expected, strict=True))
    assert torch.equal(copied["transposed"], expected[8].T) and copied["again"] is copied["all"][8]
    assert copied["made"].a is copied["made"].b is copied["all"][0]
    assert queue.pinned == [64, 64]


def test_tensors_are_counted_once():
    one = torch.zeros(10)
    assert size_of([one, one, torch.zeros(3, dtype=torch.bfloat16)]) == 46
