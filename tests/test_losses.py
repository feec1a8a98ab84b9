"""Losses and metrics against numbers derived by hand."""

import inspect
import itertools
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from conftest import make_loss as default_loss
from tiny_models import PLENTY, make_examples, mask_responses, respond, tiny, weigh

import trainers
from dpo.model.logps import Logps, ResponseLogps, response_logps
from dpo.model.packing import make_microbatches
from dpo.reporting.metrics import BatchMetrics
from dpo.training.objectives import Context
from losses import LOSSES, preference_loss

METRICS_PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
TRAIN_METRICS = {
    *(f"rewards_train/{what}" for what in ("chosen", "rejected", "accuracies", "margins")),
    *("logps_train/chosen", "logps_train/rejected", "loss/train"),
}


def tensor(*values):
    """Make a float64 tensor."""
    return torch.tensor(values, dtype=torch.float64)


def make_loss(name, **settings):
    """Make a loss with its defaults, but for beta=0.5, where it has one, and the given settings."""
    return default_loss(name, **({"beta": 0.5} if name != "sft" else {}) | settings)


def compute(loss, logps, reference, lengths, **context):
    """Call a loss with sums of log-probabilities (batch, n_responses), and lengths of the same shape."""
    return loss(Logps(logps, lengths), None if reference is None else Logps(reference, lengths), Context(**context))


def scored(*differences):
    """Return examples whose scores differ so, of a rejected response with -3."""
    return [SimpleNamespace(text=SimpleNamespace(scores=(d - 3.0, -3.0))) for d in differences]


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


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_have_the_originals_names_and_no_gradient(name):
    loss = make_loss(name)
    logps = torch.full((2, loss.n_responses), -3.0).requires_grad_()
    reference = torch.full((2, 2), -3.0) if loss.needs_reference else None
    sums = {"log_ratios": 0.0, "responses": 4}
    values = compute(loss, logps, reference, torch.ones(2, loss.n_responses), sums=sums, examples=scored(1.0, 2.0))[1]
    assert not any(value.requires_grad for value in values.values())
    assert all(value.shape == (2,) for value in values.values())
    metrics = BatchMetrics()
    metrics.add([respond([1], [2])] * 2, values)
    assert set(metrics.means("train")) == ({"logps_train/chosen", "loss/train"} if name == "sft" else TRAIN_METRICS)
    assert set(metrics.means("eval")) == {key.replace("train", "eval") for key in metrics.means("train")}


def test_an_update_logs_everything_that_the_original_does(make_trainer):
    trainer = make_trainer("loss=dpo")
    metrics = trainer.train_step(next(iter(trainer.train_batches)))
    others = {"grad_norm", "examples_per_second", "counters/examples", "counters/updates"}
    assert TRAIN_METRICS | others <= set(metrics)
    assert metrics["counters/examples"] == 8 and metrics["counters/updates"] == 1


# Every preference loss on two pairs, value and gradient
#
# Log-probabilities of the policy, (chosen, rejected), and of the reference: (-4, -8) and (-5, -7), then (-6, -4) and
# (-5, -6). Log-ratios a_w = 1, -1 and a_l = -1, 2; h = a_w - a_l = 2, -3. Lengths (2, 2) and (3, 4).
# With beta = B = ln 2, sigmoid(B k) = 2^k / (1 + 2^k): of B h 4/5, 1/9; of B a_w 2/3, 1/3; of B a_l 1/3, 4/5.
# The slope of sigmoid is s (1 - s): 4/25, 8/81; 2/9, 2/9; 2/9, 4/25; that of log sigmoid is 1 - s.

B = math.log(2)
POLICY, REFERENCE, LENGTHS = [[-4.0, -8.0], [-6.0, -4.0]], [[-5.0, -7.0], [-5.0, -6.0]], [[2, 2], [3, 4]]
ln = math.log
CASES = {
    # -log of 4/5 and 1/9; the gradient of h is -B (1 - s)
    "dpo": ({}, (ln(5 / 4), ln(9)), (-B / 5, -B * 8 / 9), (B / 5, B * 8 / 9)),
    # eps = 1/4: 3/4 of -log s, less 1/4 of -log(1 - s), over 1/2. Gradient -B (3/4 (1 - s) + 1/4 s) / (1/2)
    "robust": (
        {"label_smoothing": 0.25},
        (1.5 * ln(5 / 4) + 0.5 * ln(1 / 5), 1.5 * ln(9) + 0.5 * ln(8 / 9)),
        (-B * 7 / 10, -B * 25 / 18),
        (B * 7 / 10, B * 25 / 18),
    ),
    # target 1 / (2 beta) = 2: 0 and (-5)^2; gradient 2 (h - 2)
    "ipo": ({"beta": 0.25}, (0, 25), (0, -10), (0, 10)),
    # 1 - 2/4 and 1 + 3/4, both with slope -1/4
    "hinge": ({"beta": 0.25}, (1 / 2, 7 / 4), (-1 / 4, -1 / 4), (1 / 4, 1 / 4)),
    # eps = 1/4, p = 4/5 and 1/9: p log(p / (3/4)) + (1 - p) log((1 - p) / (1/4)).
    # Gradient B p (1 - p) log(p / (1 - p) * 1/3), where p / (1 - p) is 4 and 1/8
    "exo": (
        {"label_smoothing": 0.25},
        (4 / 5 * ln(16 / 15) + 1 / 5 * ln(4 / 5), 1 / 9 * ln(4 / 27) + 8 / 9 * ln(32 / 9)),
        (B * 4 / 25 * ln(4 / 3), B * 8 / 81 * ln(1 / 24)),
        (-B * 4 / 25 * ln(4 / 3), -B * 8 / 81 * ln(1 / 24)),
    ),
    # temperature 1/2: m = sigmoid(2 B h) = 16/17, 1/65 with slope 2 m (1 - m) = 32/289, 128/4225; exp(-B h) = 1/4, 8.
    # Gradient by the product rule: m' (exp(-B h) + log s) - (1 - m) (1 - s) - m exp(-B h)
    "discopop": (
        {"temperature": 0.5},
        (1 / 17 * ln(5 / 4) + 16 / 17 / 4, 64 / 65 * ln(9) + 8 / 65),
        (
            B * (32 / 289 * (1 / 4 - ln(5 / 4)) - 1 / 17 / 5 - 16 / 17 / 4),
            B * (128 / 4225 * (8 - ln(9)) - 64 / 65 * 8 / 9 - 8 / 65),
        ),
        (
            -B * (32 / 289 * (1 / 4 - ln(5 / 4)) - 1 / 17 / 5 - 16 / 17 / 4),
            -B * (128 / 4225 * (8 - ln(9)) - 64 / 65 * 8 / 9 - 8 / 65),
        ),
    ),
    # alpha = 2 B: lengths differ by 0 and -1, so the logits are 2 B and -3 B - 2 B, s = 4/5 and 1/33
    "rdpo": ({"alpha": 2 * B}, (ln(5 / 4), ln(33)), (-B / 5, -B * 32 / 33), (B / 5, B * 32 / 33)),
    # scores differ by 2 and 1/2, alpha = 1: log 2 = B and -B, so the logits are 2 B - B and -3 B + B, s = 2/3 and 1/5
    "odpo": ({"alpha": 1.0}, (ln(3 / 2), ln(5)), (-B / 3, -B * 4 / 5), (B / 3, B * 4 / 5)),
    # penalty 2: nothing for a_w = 1; for a_w = -1 the logits are B (-3 - 2), s = 1/33, and a_w counts three times
    "dpop": ({"penalty": 2.0}, (ln(5 / 4), ln(33)), (-B / 5, -3 * B * 32 / 33), (B / 5, B * 32 / 33)),
    # -log s_w - (log(1 - s_w) + log(1 - s_l)) / 2: s_w = 2/3, 1/3 and s_l = 1/3, 4/5.
    # Gradients B (-(1 - s_w) + s_w / 2), which is 0 at s_w = 2/3, and B s_l / 2
    "nca": (
        {},
        (ln(3 / 2) + ln(9 / 2) / 2, ln(3) + ln(15 / 2) / 2),
        (0, -B / 2),
        (B / 6, B * 2 / 5),
    ),
    # 1 - s_w + s_l
    "apo_zero": ({}, (2 / 3, 22 / 15), (-B * 2 / 9, -B * 2 / 9), (B * 2 / 9, B * 4 / 25)),
    # s_w + 1 - s
    "apo_down": (
        {},
        (13 / 15, 11 / 9),
        (B * (2 / 9 - 4 / 25), B * (2 / 9 - 8 / 81)),
        (B * 4 / 25, B * 8 / 81),
    ),
    # targets 2 and -2: (1 - 2)^2 + (-1 + 2)^2 and (-1 - 2)^2 + (2 + 2)^2
    "sppo": ({"beta": 0.25}, (2, 25), (-2, -6), (2, 8)),
    # means -2, -4 and -2, -1; beta = 2 B, gamma = B: logits 4 B - B and -2 B - B, s = 8/9 and 1/9.
    # Gradients -2 B (1 - s) over the length
    "simpo": (
        {"beta": 2 * B, "gamma": B},
        (ln(9 / 8), ln(9)),
        (-2 * B / 9 / 2, -2 * B * 8 / 9 / 3),
        (2 * B / 9 / 2, 2 * B * 8 / 9 / 4),
    ),
    # without a reference the logits are 4 B and -2 B, s = 16/17 and 1/5; -log pi(y_w) per token is 2 and 2, weight 3
    "cpo": (
        {"nll_weight": 3.0},
        (ln(17 / 16) + 6, ln(5) + 6),
        (-B / 17 - 3 / 2, -B * 4 / 5 - 3 / 3),
        (B / 17, B * 4 / 5),
    ),
    # z = (8 / 8) B: rewards B (a - 1), so 1 - s_w = 1/2, 4/5 and s_l = 1/5, 2/3, weighted 2 and 3, and halved
    "kto": (
        {"desirable_weight": 2.0, "undesirable_weight": 3.0},
        ((1 + 3 / 5) / 2, (8 / 5 + 2) / 2),
        (-2 * B / 4 / 2, -2 * B * 4 / 25 / 2),
        (3 * B * 4 / 25 / 2, 3 * B * 2 / 9 / 2),
    ),
    # shift B: r_w - d = 0, -2 B and d - r_l = 2 B, -B, with sigmoids 1/2, 1/5 and 4/5, 1/3
    "bco": ({}, (ln(2) + ln(5 / 4), ln(5) + ln(3)), (-B / 2, -B * 4 / 5), (B / 5, B * 2 / 3)),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_derived_by_hand(name):
    """The derivations stand beside the numbers, above."""
    settings, values, chosen, rejected = CASES[name]
    logps = tensor(*POLICY).requires_grad_()
    context = {"examples": scored(2.0, 0.5), "sums": {"log_ratios": 8.0, "responses": 8}, "state": {"shift": B}}
    loss = make_loss(name, **{"beta": B} | settings)
    reference = tensor(*REFERENCE) if loss.needs_reference else None
    losses, metrics = compute(loss, logps, reference, torch.tensor(LENGTHS), **context)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx(values, rel=1e-12, abs=1e-12)
    assert logps.grad[:, 0].tolist() == pytest.approx(chosen, rel=1e-12, abs=1e-12)
    assert logps.grad[:, 1].tolist() == pytest.approx(rejected, rel=1e-12, abs=1e-12)
    assert metrics["loss"].tolist() == losses.tolist()


def test_every_loss_has_its_case():
    assert {*CASES, "sft", "orpo"} == set(LOSSES)


def test_orpo_adds_the_likelihood_and_the_weighted_log_odds_ratio():
    """Means -B, -2 B: probabilities 1/2, 1/4, odds 1, 1/3, ratio 3, s = 3/4; then the other way round, s = 1/4.

    With beta = 1/2: B + ln(4/3) / 2 and 2 B + ln(4) / 2. The slope of log odds is 1 / (1 - p): 2 and 4/3, or 4/3 and 2,
    that of the mean 1 over the length, and that of the term -beta (1 - s).
    """
    lengths = torch.tensor([[2, 3], [1, 4]])
    logps = (-B * tensor([1.0, 2.0], [2.0, 1.0]) * lengths).requires_grad_()
    losses = compute(make_loss("orpo"), logps, None, lengths)[0]
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([B + ln(4 / 3) / 2, 2 * B + ln(4) / 2], rel=1e-12)
    assert logps.grad[0].tolist() == pytest.approx([(-1 - 1 / 8 * 2) / 2, 1 / 8 * 4 / 3 / 3], rel=1e-12)
    assert logps.grad[1].tolist() == pytest.approx([-1 - 3 / 8 * 4 / 3, 3 / 8 * 2 / 4], rel=1e-12)


def test_orpo_stays_finite_for_certain_and_impossible_responses():
    logps = tensor([-1e-9, -5000.0]).requires_grad_()
    losses = compute(make_loss("orpo"), logps, None, torch.tensor([[1, 2]]))[0]
    losses.sum().backward()
    assert losses.isfinite().all() and logps.grad.isfinite().all()


# Symmetries and limits


def pair_losses(name, *h, **settings):
    """Return a loss of h at each of some h."""
    return make_loss(name, **settings).pair_losses(tensor(*h)).tolist()


def ratio_losses(name, chosen, rejected, **settings):
    """Return a loss of two log-ratios."""
    return make_loss(name, **settings).ratio_losses(tensor(chosen), tensor(rejected), Context()).item()


@pytest.mark.parametrize("h", [-3.0, 0.0, 2.0])
def test_the_mean_of_robust_dpo_over_flipped_labels_is_dpo(h):
    """A share eps of flips: (1 - eps) L(h) + eps L(-h) is the loss of the right label."""
    right, flipped = pair_losses("robust", h, -h, label_smoothing=0.2)
    assert 0.8 * right + 0.2 * flipped == pytest.approx(pair_losses("dpo", h)[0], rel=1e-12)


def test_robust_and_length_regularized_dpo_and_dpop_without_their_terms_are_dpo():
    assert pair_losses("robust", 2.0, label_smoothing=0.0) == pair_losses("dpo", 2.0)
    case = tensor(*POLICY), tensor(*REFERENCE), torch.tensor([[9, 2], [1, 5]])
    expected = compute(make_loss("dpo"), *case)[0].tolist()
    assert compute(make_loss("rdpo", alpha=0.0), *case)[0].tolist() == pytest.approx(expected, rel=1e-12)
    odpo = compute(make_loss("odpo", alpha=0.0), *case, examples=scored(2.0, 9.0))[0].tolist()
    assert odpo == pytest.approx(expected, rel=1e-12)
    assert compute(make_loss("dpop", penalty=0.0), *case)[0].tolist() == pytest.approx(expected, rel=1e-12)


def test_length_regularized_dpo_asks_less_of_a_longer_chosen_response():
    case = tensor([-4.0, -8.0], [-4.0, -8.0]), tensor([-5.0, -7.0], [-5.0, -7.0]), torch.tensor([[9, 2], [2, 9]])
    longer, shorter = compute(make_loss("rdpo"), *case)[0].tolist()
    assert longer < shorter


def test_exo_is_smallest_where_the_policy_prefers_as_the_smoothed_labels():
    """p = 1 - eps = 3/4 at beta h = ln 3, where both logarithms are 0."""
    best = ln(3) / 0.5
    lowest, below, above = pair_losses("exo", best, best - 0.1, best + 0.1, label_smoothing=0.25)
    assert lowest == pytest.approx(0, abs=1e-15) and below > 0 and above > 0


def test_discopop_is_the_logistic_loss_for_wrong_pairs_and_the_exponential_for_right_ones():
    """At temperature 0.05 and beta h = -5 and 5, m is e^-100 and 1; at -1,000 the exponential alone would overflow."""
    wrong, right, hopeless = pair_losses("discopop", -10.0, 10.0, -2000.0, temperature=0.05)
    assert wrong == pytest.approx(math.log1p(math.exp(5)), rel=1e-12)
    assert right == pytest.approx(math.exp(-5), rel=1e-12)
    assert hopeless == pytest.approx(1000, rel=1e-12)


def test_dpop_is_dpo_for_chosen_responses_that_gained():
    assert ratio_losses("dpop", 0.5, 0.2) == pytest.approx(pair_losses("dpo", 0.3)[0], rel=1e-12)
    assert ratio_losses("dpop", -0.5, -0.8) > pair_losses("dpo", 0.3)[0]


def test_nca_is_smallest_at_a_chosen_reward_of_log_2():
    """beta = 1/2: a_w = 2 ln 2; the rejected reward has no bound, and its loss falls with it."""
    best = ratio_losses("nca", 2 * B, 0.0)
    assert best < min(ratio_losses("nca", 2 * B - 0.1, 0.0), ratio_losses("nca", 2 * B + 0.1, 0.0))
    assert ratio_losses("nca", 0.0, -9.0) < ratio_losses("nca", 0.0, -8.0)


def test_apo_moves_the_chosen_response_up_or_down():
    assert ratio_losses("apo_zero", 1.0, 0.0) < ratio_losses("apo_zero", 0.0, 0.0) == 1
    assert ratio_losses("apo_down", -1.0, -2.0) < ratio_losses("apo_down", 0.0, -1.0)
    assert ratio_losses("apo_down", 0.0, 0.0) == 1


def test_sppo_is_0_where_log_ratios_are_its_targets():
    assert ratio_losses("sppo", 5.0, -5.0, beta=0.1) == pytest.approx(0, abs=1e-12)


def test_simpo_looks_at_lengths_and_not_at_a_reference():
    """The same sums over other lengths: means -2, -4 and -4, -2, so the margin of 2 B turns into -2 B."""
    loss = make_loss("simpo", beta=B, gamma=0.0)
    losses = compute(loss, tensor([-4.0, -8.0], [-8.0, -4.0]), None, torch.tensor([[2, 2], [2, 2]]))[0].tolist()
    assert losses == pytest.approx([ln(5 / 4), ln(5)], rel=1e-12)
    assert not any(make_loss(name).needs_reference for name in ("simpo", "orpo", "cpo"))


def test_cpo_can_sum_the_likelihood_over_tokens_as_its_paper_does():
    """As in the case above, with -log pi(y_w) = 4 and 6."""
    loss = make_loss("cpo", beta=B, nll_weight=3.0, average_nll=False)
    losses = compute(loss, tensor(*POLICY), None, torch.tensor(LENGTHS))[0].tolist()
    assert losses == pytest.approx([ln(17 / 16) + 12, ln(5) + 18], rel=1e-12)


def labels(*values):
    """Return examples of one response with a label."""
    return [SimpleNamespace(text=SimpleNamespace(label=label)) for label in values]


def test_kto_of_rows_with_a_label_has_one_weighted_term_per_row():
    """Log-ratios 1, -1, -1, 2 and z = B, as in the case above: rewards less z are 0, -2 B, -2 B, B.

    Desirable, undesirable, desirable, undesirable: 1 - s = 1/2 and 4/5, weighted 2, and s = 1/5 and 2/3, weighted 3.
    Accurate are those of which a right reward lies beyond z: the second alone, since the first is at z.
    """
    logps = tensor([-4.0], [-8.0], [-6.0], [-4.0]).requires_grad_()
    reference, lengths = tensor([-5.0], [-7.0], [-5.0], [-6.0]), torch.tensor([[2], [2], [3], [4]])
    loss = make_loss("kto", beta=B, desirable_weight=2.0, undesirable_weight=3.0)
    context = {"sums": {"log_ratios": 8.0, "responses": 8}, "examples": labels(True, False, True, False)}
    losses, metrics = compute(loss, logps, reference, lengths, **context)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([1, 3 / 5, 8 / 5, 2], rel=1e-12)
    slopes = [-2 * B / 4, 3 * B * 4 / 25, -2 * B * 4 / 25, 3 * B * 2 / 9]
    assert logps.grad[:, 0].tolist() == pytest.approx(slopes, rel=1e-12)
    assert {name: values.tolist() for name, values in metrics.items()} == {
        "rewards/accuracies": [0.0, 1.0, 0.0, 0.0],
        "rewards/desirable": [B, -B],
        "rewards/undesirable": [-B, 2 * B],
        "logps/desirable": [-4.0, -6.0],
        "logps/undesirable": [-8.0, -4.0],
        "loss": losses.tolist(),
    }
    assert not any(values.requires_grad for values in metrics.values())


def test_kto_of_pairs_is_that_of_their_responses_as_rows_with_a_label():
    """Also with a z that is not 0, and with weights that float32 does not hold exactly."""
    loss = make_loss("kto", desirable_weight=1.1, undesirable_weight=0.7)
    sums, policy, reference = {"log_ratios": 3.0, "responses": 4}, tensor(*POLICY), tensor(*REFERENCE)
    pairs = compute(loss, policy, reference, torch.tensor(LENGTHS), sums=sums)[0]
    rows = (policy.view(-1, 1), reference.view(-1, 1), torch.tensor(LENGTHS).view(-1, 1))
    single = compute(loss, *rows, sums=sums, examples=labels(True, False, True, False))[0]
    assert pairs.tolist() == pytest.approx(single.view(2, 2).mean(1).tolist(), rel=1e-15)
    a = math.exp(0.5 * (1 - 3 / 4))  # of the first chosen response: beta (log-ratio - z)
    assert single[0].item() == pytest.approx(1.1 / (1 + a), rel=1e-12)


def test_a_label_counts_as_accurate_only_beyond_the_reference_point():
    """Equal policy and reference, z = 0: no row is accurate, as a tie is not with pairs.

    Log-ratios 1 and 1/2, of which beta = 1/2 makes rewards of 1/2 and 1/4, lie on both sides of 1/2 * 3/4.
    """
    for chosen, rejected, estimate, accurate in ((-4.0, -4.0, 0.0, 0.0), (-3.0, -3.5, 0.75, 1.0)):
        case = tensor([chosen], [rejected]), tensor([-4.0], [-4.0]), torch.ones(2, 1)
        for order in ((True, False), (False, True)):
            context = {"sums": {"log_ratios": estimate, "responses": 1}, "examples": labels(*order)}
            found = compute(make_loss("kto"), *case, **context)[1]["rewards/accuracies"].tolist()
            assert found == [accurate if order[0] else 0.0] * 2


def test_kto_prints_weights_for_numbers_of_labels_outside_the_papers_range():
    """arXiv 2402.01306, eq. 9: D n_D / (U n_U) from 1 to 3/2; its example: 1 to 10 needs U = 1 and D from 10 to 15."""
    assert make_loss("kto").label_notes(1, 10) == [
        "Labels: 1 desirable and 10 undesirable responses, with their weights 0.1 to 1, where KTO's paper advises 1 to"
        " 1.5; set loss.desirable_weight=12.5 or loss.undesirable_weight=0.08."
    ]
    for n, weights in (((7, 7), {}), ((15, 10), {}), ((1, 10), {"desirable_weight": 10}), ((131, 131), {})):
        assert make_loss("kto", **weights).label_notes(*n) == []
    for n in ((1501, 1000), (999, 1000), (3, 100_000), (5_000_000, 7)):
        for own in ({}, {"desirable_weight": 3.0, "undesirable_weight": 0.7}):
            (line,) = make_loss("kto", **own).label_notes(*n)
            for name, value in re.findall(r"loss\.(\w+)=(\S+?)(?= or|\.$)", line):
                assert make_loss("kto", **own | {name: float(value)}).label_notes(*n) == []
    for n in ((0, 8), (8, 0)):
        (line,) = make_loss("kto").label_notes(*n)
        assert line.endswith("KTO needs both kinds to learn a preference.")


def test_other_losses_say_nothing_of_numbers_of_labels():
    assert {name for name in LOSSES if make_loss(name).label_notes(1, 10)} == {"kto"}


def test_ktos_divergence_is_at_least_0():
    """A policy equal to its reference: both sigmoids are 1/2, weighted 2 and 1, whatever a negative estimate says."""
    case = tensor([-4.0, -8.0]), tensor([-4.0, -8.0]), torch.tensor([[2, 2]])
    for estimate in (0.0, -3.0):
        loss = make_loss("kto", desirable_weight=2.0)
        losses = compute(loss, *case, sums={"log_ratios": estimate, "responses": 2})[0]
        assert losses.tolist() == [0.75]


def test_kto_estimates_its_divergence_from_mismatched_pairs():
    """Log-ratios -3 + 4, -1 + 1, -2 + 5 and -5 + 4 of 4 responses sum to 3.

    After the prompt of 9 tokens a response is cut to 5, since no example is longer than 9 + 5.
    """
    examples = make_examples([(9, 5, 3), (4, 2, 8)])
    seen = []

    def logps(mismatched):
        seen.extend(mismatched)
        return torch.tensor([[-3.0, -1.0], [-2.0, -5.0]]), torch.tensor([[-4.0, -1.0], [-5.0, -4.0]])

    assert make_loss("kto").batch_sums(iter(examples), logps) == {"log_ratios": 3.0, "responses": 4}
    assert [example.prompt for example in seen] == [example.prompt for example in examples]
    assert seen[0].responses == (examples[1].responses[0], examples[1].responses[1][:5])
    assert seen[1].responses == examples[0].responses


def test_bcos_shift_is_a_moving_average_of_the_mean_reward():
    """Mean rewards 2 and 4: mean 3. From 0: 0.1 * 3 = 0.3. Then rewards 1 and 0: 0.9 * 0.3 + 0.1 * 0.5 = 0.32."""
    loss = make_loss("bco", shift_decay=0.9)
    first = loss.next_state({}, {"rewards_train/chosen": 2.0, "rewards_train/rejected": 4.0})
    second = loss.next_state(first, {"rewards_train/chosen": 1.0, "rewards_train/rejected": 0.0})
    assert (first["shift"], second["shift"]) == pytest.approx((0.3, 0.32), rel=1e-12)
    assert make_loss("dpo").next_state({}, {}) == {}


def test_bcos_first_batch_has_no_shift():
    """Policy and reference are equal: -log(1/2) twice."""
    case = tensor([-4.0, -8.0]), tensor([-4.0, -8.0]), torch.tensor([[2, 2]])
    assert compute(make_loss("bco"), *case)[0].tolist() == pytest.approx([2 * B], rel=1e-12)


def test_sft_can_average_over_an_examples_or_the_batchs_tokens():
    """Sums 12 of 4 tokens and 4 of 2: means 3 and 2. In a batch of 3 examples and 9 tokens: 12 * 3/9 and 4 * 3/9."""
    arguments = tensor([-12.0], [-4.0]), None, torch.tensor([[4], [2]])
    assert compute(make_loss("sft", normalize="example"), *arguments)[0].tolist() == [3.0, 2.0]
    loss = make_loss("sft", normalize="tokens")
    losses, metrics = compute(loss, *arguments, sums={"examples": 3, "tokens": 9})
    assert losses.tolist() == pytest.approx([4.0, 4 / 3], rel=1e-12)
    assert metrics["logps/chosen"].tolist() == [-12.0, -4.0]
    examples = [respond([1], [5, 6, 7]), respond([1, 2], [8])]
    assert loss.batch_sums(iter(examples), None) == {"examples": 2, "tokens": 4}
    assert loss.batch_sums(iter([weigh(examples[0], 2.0), examples[1]]), None) == {"examples": 3, "tokens": 7}
    assert loss.batch_sums(iter([mask_responses(examples[0], [1, 0, 1])]), None) == {"examples": 1, "tokens": 2}
    assert make_loss("sft").batch_sums(iter(examples), None) == {}


def test_a_mean_loss_is_weighted_and_other_means_are_not():
    """(3 * 1 + 1 * 5) / 4 = 2; and (1 + 5) / 2 = 3."""
    metrics = BatchMetrics()
    for weight, value in ((3.0, 1.0), (1.0, 5.0)):
        metrics.add([weigh(respond([1], [2]), weight)], {"loss": tensor(value), "rewards/margins": tensor(value)})
    assert metrics.means("train") == {"loss/train": 2.0, "rewards_train/margins": 3.0}


def test_metrics_are_means_over_examples_not_over_passes():
    """One pass of three examples and one of a single one: (1 + 2 + 3 + 10) / 4 = 4; the mean of means would be 6."""
    metrics = BatchMetrics()
    metrics.add([respond([1], [2])] * 3, {"loss": tensor(1.0, 2.0, 3.0)})
    metrics.add([respond([1], [2])], {"loss": tensor(10.0)})
    assert metrics.means("train") == {"loss/train": 4.0}


EXTREME = (0.0, -1e-7, -1e-3, -1.0, -50.0, -1e4)  # nats per response
OPTIONS = [(name, {}) for name in LOSSES] + [
    ("dpo", {"divergence": "forward_kl"}),
    ("dpo", {"divergence": "js"}),
    ("dpo", {"divergence": "alpha"}),
    ("dpo", {"length_normalize": True, "label_smoothing": 0.1}),
]


@pytest.mark.parametrize("name, options", OPTIONS, ids=str)
def test_a_loss_and_its_gradient_are_finite_wherever_log_probabilities_are(name, options):
    """ORPO's log odds are infinite at probability 1, where its gradient was NaN."""
    loss = make_loss(name, **options)
    sums = {"log_ratios": 3.0, "responses": 4, "examples": 1, "tokens": 4}
    for policy in itertools.product(EXTREME, repeat=loss.n_responses):
        for reference in itertools.product((0.0, -1e-7, -1e4), repeat=loss.n_responses):
            logps = torch.tensor([policy], requires_grad=True)
            lengths = torch.tensor([(1, 500)[: loss.n_responses]])
            arguments = logps, torch.tensor([reference]) if loss.needs_reference else None, lengths
            losses, _ = compute(loss, *arguments, sums=sums, examples=scored(2.0))
            losses.sum().backward()
            assert losses.isfinite().all() and logps.grad.isfinite().all(), (policy, reference)


@pytest.mark.parametrize("name", LOSSES)
def test_the_page_of_metrics_says_which_losses_can_be_negative(name):
    """By the equations only rDPO's can: its second term, eps log sigmoid(-beta h), has no lower bound."""
    sums = {"log_ratios": 3.0, "responses": 4, "examples": 1, "tokens": 4}
    loss, lowest = make_loss(name), 0.0
    for policy in itertools.product(EXTREME, repeat=loss.n_responses):
        for reference in itertools.product(EXTREME, repeat=loss.n_responses):
            arguments = tensor(policy), tensor(reference), torch.tensor([(1, 500)[: loss.n_responses]])
            lowest = min(lowest, compute(loss, *arguments, sums=sums, examples=scored(2.0))[0].item())
    (row,) = re.findall(r"^\| `loss` .*", METRICS_PAGE, re.MULTILINE)
    assert (lowest < -1e-9) == (f"`{name}` can be negative" in row)


MEANS = [("ipo", {"average_log_prob": True})] + [
    (name, {"length_normalize": True}) for name in LOSSES if "length_normalize" in LOSSES[name].model_fields
]


@pytest.mark.parametrize("name, options", [*((name, {}) for name in LOSSES), *MEANS], ids=str)
def test_the_page_of_metrics_says_for_which_losses_log_probabilities_are_means(name, options):
    """A sum of -12 over 4 tokens is a mean of -3."""
    loss = make_loss(name, **options)
    logps = tensor([-12.0, -5.0][: loss.n_responses])
    sums = {"log_ratios": 3.0, "responses": 4, "examples": 1, "tokens": 4}
    lengths = torch.tensor([[4, 5][: loss.n_responses]])
    _, metrics = compute(loss, logps, logps, lengths, sums=sums, examples=scored(2.0))
    (row,) = re.findall(r"^\| `logps/chosen`.*", METRICS_PAGE, re.MULTILINE)
    means = row.partition("its mean per token")[2].partition("|")[0]
    named = f"`loss.{next(iter(options))}=true`" if options else f"`{name}`"
    assert metrics["logps/chosen"].item() == (-3.0 if named in means else -12.0)


MASKED = [
    ("dpo", {"token_weights": "wpo", "nll_weight": 1.0}),
    ("dpo", {"ld_alpha": 0.5}),
    ("ipo", {"average_log_prob": True}),
    ("cpo", {"average_nll": True}),
    ("sft", {"normalize": "example"}),
    ("sft", {"normalize": "tokens"}),
]


@pytest.fixture(scope="module")
def passes():
    """A function that computes examples with a policy and a reference, of which the policy is float64 and random."""
    modules = [ResponseLogps.wrap(tiny(name).double()) for name in ("Llama", "Qwen2")]

    @torch.no_grad()
    def compute_logps(examples):
        (batch,) = make_microbatches(examples, "shared_prefix", PLENTY)
        for module in modules:
            module.with_collisions = True
        return [response_logps(module, batch) for module in modules]

    return compute_logps


@pytest.mark.parametrize("name, options", OPTIONS + MASKED, ids=str)
def test_a_loss_of_masked_responses_is_that_of_their_trained_tokens(name, options, passes):
    """Against the log-probabilities of all tokens, of which the trained ones are chosen here by hand."""
    loss = make_loss(name, **options)
    masks = [([1, 0, 0, 1, 1], [0, 1, 1]), ([1, 1], [1, 0, 1, 1, 0, 0, 0, 1])]
    examples = make_examples([(9, 5, 3), (4, 2, 8)])
    examples = [replace(one, responses=one.responses[: loss.n_responses]) for one in examples]
    examples = [replace(one, text=replace(one.text, scores=(2.0, 1.0), label=True)) for one in examples]
    masked = [mask_responses(one, *mask[: loss.n_responses]) for one, mask in zip(examples, masks, strict=True)]
    chosen = torch.tensor([bit for one in masked for mask in one.loss_masks for bit in mask])
    lengths = torch.tensor([[sum(mask) for mask in one.loss_masks] for one in masked])
    by_hand = [
        replace(Logps.from_tokens(all_tokens.tokens[chosen], lengths), collisions=all_tokens.collisions[chosen])
        for all_tokens in passes(examples)
    ]
    sums = loss.batch_sums(iter(masked), lambda mismatched: [logps.sums for logps in passes(mismatched)])
    context = Context(masked, sums)
    expected, actual = loss(*by_hand, context)[0], loss(*passes(masked), context)[0]
    assert actual.tolist() == pytest.approx(expected.tolist(), rel=1e-9)
    assert actual.tolist() != pytest.approx(loss(*passes(examples), context)[0].tolist(), rel=1e-3)
