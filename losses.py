"""Losses on log-probabilities: pure functions of tensors, one number an example."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

Metrics = dict[str, torch.Tensor]


def preference_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the losses and the detached chosen and rejected rewards of a batch of pairs, each of shape (batch,).

    With h = log(pi(y_w) / pi(y_l)) - log(ref(y_w) / ref(y_l)), where y_w is the chosen and y_l the rejected response:
    DPO      -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h)
             (arXiv 2305.18290, eq. 7; eps > 0 is conservative DPO, eq. 3 of https://ericmitchell.ai/cdpo.pdf)
    IPO      (h - 1 / (2 beta))^2   (arXiv 2310.12036, eq. 17, where beta is called tau)
    rewards  beta log(pi(y) / ref(y))
    """
    h = policy_chosen_logps - policy_rejected_logps
    if not reference_free:
        h = h - (reference_chosen_logps - reference_rejected_logps)
    if ipo:
        losses = (h - 1 / (2 * beta)) ** 2
    else:
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps).detach()
    return losses, chosen_rewards, rejected_rewards


@dataclass(frozen=True)
class Loss:
    """A loss as a trainer sees it.

    compute takes the policy's and the reference's log-probabilities, each (batch, n_responses), the reference's None
    where none is needed, and the number of tokens of each response, same shape; it returns losses (batch,) and metrics.
    """

    n_responses: int
    needs_reference: bool
    compute: Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor], tuple[torch.Tensor, Metrics]]


def make_sft(config: Any) -> Loss:
    """Make the loss of supervised fine-tuning, -log pi(y) summed over the tokens of the one response."""

    def compute(logps, reference_logps, lengths):
        losses = -logps[:, 0]
        return losses, {"logps/chosen": logps[:, 0].detach(), "loss": losses.detach()}

    return Loss(n_responses=1, needs_reference=False, compute=compute)


def make_dpo(config: Any) -> Loss:
    """Make DPO from config.beta, label_smoothing and reference_free."""
    settings = {"label_smoothing": config.label_smoothing, "reference_free": config.reference_free}
    return make_preference(config, settings)


def make_ipo(config: Any) -> Loss:
    """Make IPO from config.beta, reference_free and average_log_prob (a mean over tokens in place of the sum)."""
    return make_preference(config, {"ipo": True, "reference_free": config.reference_free}, config.average_log_prob)


def make_preference(config: Any, settings: dict[str, Any], average: bool = False) -> Loss:
    """Make the loss of pairs (chosen first) that preference_loss computes with these settings.

    A reference that is not needed counts as log-probability 0, so the rewards are then beta log pi(y).
    """

    def compute(logps, reference_logps, lengths):
        if reference_logps is None:
            reference_logps = torch.zeros_like(logps)
        if average:
            logps, reference_logps = logps / lengths, reference_logps / lengths
        columns = (*logps.unbind(1), *reference_logps.unbind(1))
        losses, chosen_rewards, rejected_rewards = preference_loss(*columns, beta=config.beta, **settings)
        return losses, {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": logps[:, 0].detach(),
            "logps/rejected": logps[:, 1].detach(),
            "loss": losses.detach(),
        }

    return Loss(n_responses=2, needs_reference=not config.reference_free, compute=compute)


LOSSES: dict[str, Callable[[Any], Loss]] = {"sft": make_sft, "dpo": make_dpo, "ipo": make_ipo}
