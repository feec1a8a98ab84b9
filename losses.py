"""Every loss: a class whose fields are its settings in config/loss/, and whose docstring has its equation and paper.

torch is imported where it is called: settings are checked against these classes, and importing it takes seconds.

To add one: a class here, its name in LOSSES, config/loss/NAME.yaml, and a test with numbers derived by hand.
CONTRIBUTING.md shows the whole of it for `hinge`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from dpo.settings import Flag, Positive, Smoothing

if TYPE_CHECKING:
    from torch import Tensor

    from dpo.logps import Logps

    Metrics = dict[str, Tensor]


def logsigmoid(x: Tensor) -> Tensor:
    """Return log sigmoid(x) elementwise, without the underflow of sigmoid."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


class Loss(BaseModel, ABC):
    """A loss as a trainer sees it: called with log-probabilities, it returns one loss and some metrics per example."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    n_responses: ClassVar[int]  # per example: 2 for a pair (chosen first), 1 for the target of SFT

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probabilities are computed."""
        return False

    @property
    def cached_reference(self) -> bool:
        """Whether the reference's log-probabilities are computed once, before training, and no second model is held."""
        return False

    @abstractmethod
    def __call__(self, policy: Logps, reference: Logps | None) -> tuple[Tensor, Metrics]:
        """Return the losses, (batch,), and detached metrics of the same shape; reference is None where not needed."""


class SFT(Loss):
    """Supervised fine-tuning: -log pi(y), summed over the tokens of the one response."""

    n_responses: ClassVar[int] = 1

    def __call__(self, policy: Logps, reference: Logps | None) -> tuple[Tensor, Metrics]:
        losses = -policy.sums[:, 0]
        return losses, {"logps/chosen": policy.sums[:, 0].detach(), "loss": losses.detach()}


class PairLoss(Loss):
    """A loss of h = log(pi(y_w) / pi(y_l)) - log(ref(y_w) / ref(y_l)); y_w is the chosen, y_l the rejected response.

    Rewards, which are metrics alone, are beta log(pi(y) / ref(y)). Without a reference ref(y) counts as 1.
    """

    n_responses: ClassVar[int] = 2
    beta: Positive
    reference_free: Flag
    precompute_reference: Flag

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free

    @property
    def cached_reference(self) -> bool:
        return self.precompute_reference

    @abstractmethod
    def pair_losses(self, h: Tensor) -> Tensor:
        """Return the losses, (batch,), of h, (batch,)."""

    def response_logps(self, logps: Logps) -> Tensor:
        """Return what counts as log pi(y), (batch, 2): the sum over the response's tokens."""
        return logps.sums

    def __call__(self, policy: Logps, reference: Logps | None) -> tuple[Tensor, Metrics]:
        logps = self.response_logps(policy)
        reference_logps = logps.new_zeros(logps.shape) if reference is None else self.response_logps(reference)
        chosen, rejected = logps.unbind(1)
        reference_chosen, reference_rejected = reference_logps.unbind(1)
        losses = self.pair_losses((chosen - rejected) - (reference_chosen - reference_rejected))
        chosen_rewards = self.beta * (chosen - reference_chosen).detach()
        rejected_rewards = self.beta * (rejected - reference_rejected).detach()
        return losses, {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": chosen.detach(),
            "logps/rejected": rejected.detach(),
            "loss": losses.detach(),
        }


class DPO(PairLoss):
    """Direct preference optimization: -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h).

    arXiv 2305.18290, eq. 7. eps is label_smoothing: above 0 it is conservative DPO, eq. 3 of
    https://ericmitchell.ai/cdpo.pdf, for labels of which a share eps is wrong.
    """

    label_smoothing: Smoothing

    def pair_losses(self, h: Tensor) -> Tensor:
        eps, logits = self.label_smoothing, self.beta * h
        return -(1 - eps) * logsigmoid(logits) - eps * logsigmoid(-logits)


class IPO(PairLoss):
    """Identity preference optimization: (h - 1 / (2 beta))^2; arXiv 2310.12036, eq. 17, where beta is called tau.

    The equation's log pi(y) is the sum over tokens; its authors' code averages, which average_log_prob chooses.
    """

    average_log_prob: Flag

    def response_logps(self, logps: Logps) -> Tensor:
        return logps.means if self.average_log_prob else logps.sums

    def pair_losses(self, h: Tensor) -> Tensor:
        return (h - 1 / (2 * self.beta)) ** 2


class Hinge(PairLoss):
    """Hinge loss: max(0, 1 - beta h), which arXiv 2309.06657 calls hinge-norm; after SLiC, arXiv 2305.10425."""

    def pair_losses(self, h: Tensor) -> Tensor:
        return (1 - self.beta * h).relu()


LOSSES: dict[str, type[Loss]] = {"sft": SFT, "dpo": DPO, "ipo": IPO, "hinge": Hinge}


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses, detached chosen rewards and detached rejected rewards, each (batch,): the original's function.

    reference_free leaves the reference out of the loss but, as in the original, not out of the rewards.
    """
    h = policy_chosen_logps - policy_rejected_logps
    if not reference_free:
        h = h - (reference_chosen_logps - reference_rejected_logps)
    beta, eps, free = float(beta), float(label_smoothing), reference_free
    loss: PairLoss
    if ipo:
        loss = IPO(beta=beta, reference_free=free, precompute_reference=False, average_log_prob=False)
    else:
        loss = DPO(beta=beta, reference_free=free, precompute_reference=False, label_smoothing=eps)
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps).detach()
    return loss.pair_losses(h), chosen_rewards, rejected_rewards
