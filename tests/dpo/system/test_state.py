"""Random generators that come back, and tensors that are found, counted and copied."""

import random

import numpy as np
import torch
from torch.testing._internal.two_tensor import TwoTensor

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


def test_tensors_are_counted_once():
    one = torch.zeros(10)
    assert size_of([one, one, torch.zeros(3, dtype=torch.bfloat16)]) == 46
