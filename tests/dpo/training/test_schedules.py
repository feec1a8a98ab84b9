"""The learning rate over a run, against numbers derived by hand."""

import math

import pytest
import torch

from dpo.training.schedules import SHAPES, lr_factor, make_scheduler


def factors(name, n_updates=10, warmup=4, min_ratio=0.0):
    """What lr is multiplied by in each update of a run."""
    return [lr_factor(t, n_updates, warmup, SHAPES[name], min_ratio) for t in range(n_updates)]


@pytest.mark.parametrize("name", SHAPES)
def test_every_schedule_rises_as_the_original_does(name):
    """(t + 1) / (warmup + 1) in the warmup's updates; the update after it has lr itself."""
    assert factors(name)[:5] == [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1]


def test_constant_stays():
    assert factors("constant")[4:] == [1.0] * 6


def test_linear_falls_by_the_same_each_update():
    """6 updates after the warmup: 0, 1/6, ... 5/6 of them are done; the one after the last would have 0."""
    assert factors("linear")[4:] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6], rel=1e-12)
    assert lr_factor(10, 10, 4, SHAPES["linear"], 0.0) == lr_factor(99, 10, 4, SHAPES["linear"], 0.0) == 0
    assert lr_factor(5, 5, 4, SHAPES["linear"], 0.0) == 0  # one update after the warmup


def test_cosine_falls_along_half_a_cosine():
    """At 1/6, 2/6, 3/6 of the way: (1 + cos 30 deg) / 2, (1 + cos 60 deg) / 2 = 3/4, 1/2."""
    assert factors("cosine")[5:8] == pytest.approx([(1 + math.sqrt(3) / 2) / 2, 3 / 4, 1 / 2], rel=1e-12)


def test_wsd_is_constant_and_falls_over_the_last_fifth():
    """Of 20 updates after the warmup, the last 4: 1, 3/4, 2/4, 1/4."""
    assert factors("wsd", n_updates=24)[4:20] == [1.0] * 16
    assert factors("wsd", n_updates=24)[20:] == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4], rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine", "wsd"])
def test_min_lr_ratio_is_where_the_fall_ends(name):
    """f becomes 1/10 + 9/10 f after the warmup."""
    plain, raised = factors(name), factors(name, min_ratio=0.1)
    assert raised[4:] == pytest.approx([0.1 + 0.9 * value for value in plain[4:]], rel=1e-12)
    assert lr_factor(10, 10, 4, SHAPES[name], 0.1) == pytest.approx(0.1, rel=1e-12)


def test_a_run_that_ends_within_its_warmup_rises_to_its_end():
    assert factors("cosine", n_updates=3, warmup=4) == [1 / 5, 2 / 5, 3 / 5]


def test_a_trainer_follows_its_schedule_and_a_resumed_one_goes_on(make_trainer):
    """5 updates of 8 examples after 0 of warmup: linear factors 1, 4/5, 3/5, 2/5, 1/5 of lr."""
    settings = ("loss=sft", "n_examples=40", "warmup_steps=0", "lr=1e-3", "scheduler=linear")
    trainer = make_trainer(*settings)
    batches = iter(trainer.train_batches)
    rates = [trainer.train_step(next(batches))["lr"] for _ in range(2)]
    resumed = make_trainer(*settings)
    resumed.load_state_dict(trainer.state_dict([0, 0]))
    rates += [resumed.train_step(batch)["lr"] for batch in resumed.train_batches]
    assert rates == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4], rel=1e-12)


def test_the_scheduler_sets_every_group_of_an_optimizer(make_trainer):
    trainer = make_trainer("loss=sft", "scheduler=cosine", "warmup_steps=1", "lr=1.0", "weight_decay=0.1")
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1, 1)]}, {"params": [torch.zeros(1)]}], lr=1.0)
    make_scheduler(trainer.settings, optimizer, 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]
