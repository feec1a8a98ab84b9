"""Losses and metrics against numbers derived by hand."""

import inspect
import math

import pytest
import torch

import trainers
from dpo.logps import Logps
from dpo.metrics import BatchMetrics
from losses import LOSSES, preference_loss

TRAIN_METRICS = {
    *(f"rewards_train/{what}" for what in ("chosen", "rejected", "accuracies", "margins")),
    *("logps_train/chosen", "logps_train/rejected", "loss/train"),
}


def tensor(*values):
    """Make a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def make_loss(name, **settings):
    """Make a loss with the settings that it reads."""
    defaults = {"beta": 0.5, "label_smoothing": 0.0, "average_log_prob": False}
    defaults |= {"reference_free": False, "precompute_reference": False}
    fields = LOSSES[name].model_fields
    return LOSSES[name](**{key: value for key, value in (defaults | settings).items() if key in fields})


def compute(loss, logps, reference, lengths):
    """Call a loss with sums of log-probabilities (batch, n_responses), and lengths of the same shape."""
    return loss(Logps(logps, lengths), None if reference is None else Logps(reference, lengths))


def preference(h, beta, **settings):
    """Return the one loss, chosen reward and rejected reward of policy -10 and -10 - h, reference -11 and -11."""
    values = preference_loss(tensor(-10.0), tensor(-10.0 - h), tensor(-11.0), tensor(-11.0), beta, **settings)
    return tuple(value.item() for value in values)


def test_dpo_is_minus_log_sigmoid_of_beta_h():
    """h = (-10 + 12) - (-11 + 11) = 2. With beta = ln(3)/2, sigmoid(beta h) = 1 / (1 + 1/3) = 3/4: loss ln(4/3).

    Rewards: beta (-10 + 11) = ln(3)/2 and beta (-12 + 11) = -ln(3)/2.
    """
    loss, chosen, rejected = preference(2.0, math.log(3) / 2)
    assert loss == pytest.approx(math.log(4 / 3), rel=1e-12)
    assert (chosen, rejected) == pytest.approx((math.log(3) / 2, -math.log(3) / 2), rel=1e-12)


def test_dpo_subtracts_the_references_log_ratio():
    """h = (-5 + 9) - (-7 + 10) = 1. With beta = ln 4, sigmoid(beta h) = 4/5: loss ln(5/4)."""
    loss, chosen, rejected = preference_loss(tensor(-5.0), tensor(-9.0), tensor(-7.0), tensor(-10.0), math.log(4))
    assert loss.item() == pytest.approx(math.log(5 / 4), rel=1e-12)
    assert chosen.item() == pytest.approx(2 * math.log(4), rel=1e-12)
    assert rejected.item() == pytest.approx(math.log(4), rel=1e-12)


def test_dpo_of_a_policy_equal_to_its_reference_is_log_2():
    """h = 0, sigmoid(0) = 1/2."""
    loss, chosen, rejected = preference_loss(tensor(-5.0), tensor(-9.0), tensor(-5.0), tensor(-9.0), 0.1)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-12)
    assert chosen.item() == rejected.item() == 0.0


def test_dpo_gradient_is_minus_beta_times_the_probability_of_being_wrong():
    """d/dh of -log sigmoid(beta h) is -beta sigmoid(-beta h) = -(ln(3)/2) / 4 where sigmoid(beta h) = 3/4."""
    chosen, rejected = tensor(-10.0).requires_grad_(), tensor(-12.0).requires_grad_()
    preference_loss(chosen, rejected, tensor(-11.0), tensor(-11.0), math.log(3) / 2)[0].sum().backward()
    assert chosen.grad.item() == pytest.approx(-math.log(3) / 8, rel=1e-12)
    assert rejected.grad.item() == pytest.approx(math.log(3) / 8, rel=1e-12)


def test_rewards_carry_no_gradient():
    logps = [tensor(-10.0).requires_grad_() for _ in range(4)]
    losses, chosen, rejected = preference_loss(*logps, beta=0.1)
    assert losses.requires_grad
    assert not chosen.requires_grad and not rejected.requires_grad


def test_dpo_stays_finite_where_a_sigmoid_would_not():
    """h = -2,000 with beta 1: sigmoid underflows, -log sigmoid(-2,000) = 2,000 does not."""
    assert preference(-2000.0, 1.0)[0] == pytest.approx(2000.0, rel=1e-12)


def test_conservative_dpo_mixes_both_labels():
    """sigmoid(beta h) = 3/4 and eps = 1/4: loss -(3/4) ln(3/4) - (1/4) ln(1/4), the entropy and so the minimum."""
    loss = preference(2.0, math.log(3) / 2, label_smoothing=0.25)[0]
    assert loss == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel=1e-12)
    for h in (1.9, 2.1):
        assert preference(h, math.log(3) / 2, label_smoothing=0.25)[0] > loss


def test_ipo_is_the_squared_distance_of_h_to_its_target():
    """beta = 0.25: the target is 1 / (2 beta) = 2; h = 5 gives (5 - 2)^2 = 9, h = 2 gives 0, h = 0 gives 4."""
    assert [preference(h, 0.25, ipo=True)[0] for h in (5.0, 2.0, 0.0)] == pytest.approx([9.0, 0.0, 4.0], abs=1e-12)


def test_hinge_falls_with_slope_beta_up_to_a_log_ratio_of_1_over_beta():
    """beta = 1/4: max(0, 1 - h/4) of h = -2, 0, 2, 4, 6 is 3/2, 1, 1/2, 0, 0, with slope -1/4 below h = 4, then 0."""
    h = tensor(-2.0, 0.0, 2.0, 4.0, 6.0).requires_grad_()
    losses = make_loss("hinge", beta=0.25).pair_losses(h)
    losses.sum().backward()
    assert losses.tolist() == [1.5, 1.0, 0.5, 0.0, 0.0]
    assert h.grad.tolist()[:3] == [-0.25] * 3 and h.grad[4] == 0.0


def test_hinge_takes_sums_and_the_reference():
    """beta = 1/4: h = (-4 + 8) - (-5 + 7) = 2, loss 1/2; rewards (-4 + 5) / 4 and (-8 + 7) / 4."""
    arguments = tensor([-4.0, -8.0]), tensor([-5.0, -7.0]), torch.tensor([[2, 9]])
    losses, metrics = compute(make_loss("hinge", beta=0.25), *arguments)
    assert losses.tolist() == [0.5]
    assert (metrics["rewards/chosen"].item(), metrics["rewards/rejected"].item()) == (0.25, -0.25)


def test_reference_free_ignores_the_reference_in_h_and_keeps_it_in_rewards():
    """h = -5 + 7 = 2, whatever the reference. With beta = ln(3)/2: loss ln(4/3); chosen reward beta (-5 + 100)."""
    beta = math.log(3) / 2
    reference = tensor(-100.0), tensor(-3.0)
    loss, chosen, rejected = preference_loss(tensor(-5.0), tensor(-7.0), *reference, beta, reference_free=True)
    assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-12)
    assert (chosen.item(), rejected.item()) == pytest.approx((95 * beta, -4 * beta), rel=1e-12)


def test_preference_loss_keeps_its_original_signature_and_places():
    parameters = inspect.signature(preference_loss).parameters
    sides = ["policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"]
    defaults = [parameter.default for parameter in parameters.values()][5:]
    others = ["beta", "label_smoothing", "ipo", "reference_free"]
    assert list(parameters) == [f"{side}_logps" for side in sides] + others
    assert defaults == [0.0, False, False]
    assert trainers.preference_loss is preference_loss


# Losses as a trainer sees them: log-probabilities (batch, n_responses), chosen first


def test_sft_is_minus_the_log_probability_summed_over_tokens():
    """Losses 12 and 3.5 whatever the lengths; the reference is never looked at."""
    loss = make_loss("sft")
    losses, metrics = compute(loss, tensor([-12.0], [-3.5]), None, torch.tensor([[4], [2]]))
    assert losses.tolist() == [12.0, 3.5]
    assert metrics["logps/chosen"].tolist() == [-12.0, -3.5]
    assert metrics["loss"].tolist() == [12.0, 3.5]
    assert loss.n_responses == 1 and not loss.needs_reference


def test_dpo_takes_sums_and_gives_one_loss_a_pair():
    """beta = 1/2. Pair 1: h = (-4 + 8) - (-5 + 5) = 4, loss ln(1 + e^-2). Pair 2: h = (-6 + 6) - (-1 + 3) = -2."""
    logps, reference = tensor([-4.0, -8.0], [-6.0, -6.0]), tensor([-5.0, -5.0], [-1.0, -3.0])
    losses, metrics = compute(make_loss("dpo"), logps, reference, torch.tensor([[2, 9], [5, 1]]))
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-2)), math.log1p(math.exp(1))], rel=1e-12)
    assert metrics["rewards/chosen"].tolist() == [0.5, -2.5]
    assert metrics["rewards/rejected"].tolist() == [-1.5, -1.5]
    assert metrics["rewards/margins"].tolist() == [2.0, -1.0]
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0]
    assert metrics["logps/chosen"].tolist() == [-4.0, -6.0]
    assert metrics["logps/rejected"].tolist() == [-8.0, -6.0]
    assert metrics["loss"].tolist() == losses.tolist()


def test_dpo_and_ipo_honour_their_settings():
    """h = 2 in all. beta = ln(3)/2, eps = 1/4 as above; IPO with beta 0.25 hits its target 2."""
    logps, reference, lengths = tensor([-10.0, -12.0]), tensor([-11.0, -11.0]), torch.tensor([[3, 3]])
    smooth = compute(make_loss("dpo", beta=math.log(3) / 2, label_smoothing=0.25), logps, reference, lengths)[0]
    assert smooth.item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25), rel=1e-12)
    assert compute(make_loss("ipo", beta=0.25), logps, reference, lengths)[0].item() == pytest.approx(0.0, abs=1e-12)


def test_ipo_can_average_over_tokens():
    """Means: policy -12/4 = -3 and -10/2 = -5, reference -8/4 = -2 and -2/2 = -1; h = 2 - (-1) = 3.

    With beta 0.25 the target is 2: loss 1. Rewards 0.25 (-3 + 2) and 0.25 (-5 + 1). By sums h = -2 + 6 = 4: loss 4.
    """
    arguments = tensor([-12.0, -10.0]), tensor([-8.0, -2.0]), torch.tensor([[4, 2]])
    losses, metrics = compute(make_loss("ipo", beta=0.25, average_log_prob=True), *arguments)
    assert losses.tolist() == [1.0]
    assert (metrics["rewards/chosen"].item(), metrics["rewards/rejected"].item()) == (-0.25, -1.0)
    assert compute(make_loss("ipo", beta=0.25), *arguments)[0].tolist() == [4.0]


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_reference_free_needs_no_reference_and_rewards_are_beta_times_the_log_probability(name):
    """h = -4 + 6 = 2, beta 1/2: DPO ln(1 + e^-1); IPO's target is 1, so (2 - 1)^2 = 1. Rewards -2 and -3."""
    loss = make_loss(name, reference_free=True)
    losses, metrics = compute(loss, tensor([-4.0, -6.0]), None, torch.tensor([[3, 3]]))
    assert not loss.needs_reference and make_loss(name).needs_reference
    assert losses.item() == pytest.approx({"dpo": math.log1p(math.exp(-1)), "ipo": 1.0}[name], rel=1e-12)
    assert (metrics["rewards/chosen"].item(), metrics["rewards/rejected"].item()) == (-2.0, -3.0)


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_a_tie_is_not_accurate(name):
    metrics = compute(make_loss(name), tensor([-7.0, -9.0]), tensor([-7.0, -9.0]), torch.tensor([[2, 2]]))[1]
    assert metrics["rewards/accuracies"].tolist() == [0.0]


@pytest.mark.parametrize("name", ["sft", "dpo", "ipo"])
def test_metrics_have_the_originals_names_and_no_gradient(name):
    loss = make_loss(name)
    logps = torch.full((2, loss.n_responses), -3.0).requires_grad_()
    reference = torch.full((2, 2), -3.0) if loss.needs_reference else None
    values = compute(loss, logps, reference, torch.ones(2, loss.n_responses))[1]
    assert not any(value.requires_grad for value in values.values())
    assert all(value.shape == (2,) for value in values.values())
    metrics = BatchMetrics()
    metrics.add((), values)
    assert set(metrics.means("train")) == ({"logps_train/chosen", "loss/train"} if name == "sft" else TRAIN_METRICS)
    assert set(metrics.means("eval")) == {key.replace("train", "eval") for key in metrics.means("train")}


def test_an_update_logs_everything_that_the_original_does(make_trainer):
    trainer = make_trainer("loss=dpo")
    metrics = trainer.train_step(next(iter(trainer.train_batches)))
    others = {"grad_norm", "examples_per_second", "counters/examples", "counters/updates"}
    assert TRAIN_METRICS | others <= set(metrics)
    assert metrics["counters/examples"] == 8 and metrics["counters/updates"] == 1


def test_metrics_are_means_over_examples_not_over_passes():
    """One pass of three examples and one of a single one: (1 + 2 + 3 + 10) / 4 = 4; the mean of means would be 6."""
    metrics = BatchMetrics()
    metrics.add((), {"loss": tensor(1.0, 2.0, 3.0)})
    metrics.add((), {"loss": tensor(10.0)})
    assert metrics.means("train") == {"loss/train": 4.0}
