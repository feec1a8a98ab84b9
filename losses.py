"""All losses, one class each: the fields are the settings, the docstring has the equation and the paper.

dpo/training/objectives.py has the base classes and defines h and the log-ratios. docs/losses.md compares all losses.
CONTRIBUTING.md shows how to add one: a class here, its name in LOSSES, config/loss/NAME.yaml, and a test with numbers
derived by hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dpo.settings.schema import Flag, NotNegative, Positive, Rate, Smoothing
from dpo.training.objectives import (
    Context,
    Divergence,
    LabelLoss,
    LengthOptions,
    Loss,
    PairLoss,
    PreferenceLoss,
    ReferenceLoss,
    Sums,
    WeightOptions,
    logsigmoid,
    mismatch,
    to_device_of,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dpo.data.examples import TokenizedExample
    from dpo.model.logps import Logps
    from dpo.training.objectives import ComputeLogps, Metrics


class SFT(Loss):
    """Supervised fine-tuning: -log pi(y).

    normalize=sum sums over a response's tokens. normalize=example takes their mean, so that all examples count the
    same. normalize=tokens takes the mean over all tokens of the batch, so that all tokens count the same.
    """

    n_responses: ClassVar[int] = 1
    normalize: Literal["sum", "example", "tokens"]

    def batch_sums(self, examples: Iterable[TokenizedExample], logps: ComputeLogps) -> dict[str, float]:
        if self.normalize != "tokens":
            return {}
        weights_and_lengths = [(example.text.weight, len(example.trained_responses[0])) for example in examples]
        n_examples = sum(weight for weight, _ in weights_and_lengths)
        return {"examples": n_examples, "tokens": sum(weight * length for weight, length in weights_and_lengths)}

    def __call__(self, policy: Logps, reference: Logps | None, context: Context) -> tuple[Tensor, Metrics]:
        losses = -(policy.means if self.normalize == "example" else policy.sums)[:, 0]
        if self.normalize == "tokens":  # the trainer takes the weighted mean over examples
            losses = losses * (context.sums["examples"] / context.sums["tokens"])
        return losses, {"logps/chosen": policy.sums[:, 0].detach(), "loss": losses.detach()}


# Losses of h


class DPO(LengthOptions, Divergence):
    """Direct preference optimization: -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h).

    arXiv 2305.18290, eq. 7. eps is label_smoothing. With eps above 0 this is conservative DPO, eq. 3 of
    https://ericmitchell.ai/cdpo.pdf, which assumes that a share eps of the labels is wrong.
    """

    label_smoothing: Smoothing

    def pair_losses(self, h: Tensor) -> Tensor:
        eps, logits = self.label_smoothing, self.beta * h
        return -(1 - eps) * logsigmoid(logits) - eps * logsigmoid(-logits)


class IPO(WeightOptions, PairLoss):
    """Identity preference optimization: (h - 1 / (2 beta))^2; arXiv 2310.12036, eq. 17, where beta is called tau.

    In the equation log pi(y) is the sum over tokens. The authors' code takes the mean, as average_log_prob=true does.
    """

    average_log_prob: Flag

    def response_logps(self, logps: Logps) -> Tensor:
        return logps.means if self.average_log_prob else logps.sums

    def pair_losses(self, h: Tensor) -> Tensor:
        return (h - 1 / (2 * self.beta)) ** 2


class Hinge(LengthOptions, PairLoss):
    """Hinge loss: max(0, 1 - beta h), which arXiv 2309.06657 calls hinge-norm; after SLiC, arXiv 2305.10425."""

    def pair_losses(self, h: Tensor) -> Tensor:
        return (1 - self.beta * h).relu()


class Robust(LengthOptions, Divergence):
    """Robust DPO (rDPO): (-(1 - eps) log sigmoid(beta h) + eps log sigmoid(-beta h)) / (1 - 2 eps); arXiv 2403.00409.

    If a share eps of the labels is flipped at random, the expected loss is the DPO loss of the correct labels.
    """

    label_smoothing: Smoothing

    def pair_losses(self, h: Tensor) -> Tensor:
        eps, logits = self.label_smoothing, self.beta * h
        return (-(1 - eps) * logsigmoid(logits) + eps * logsigmoid(-logits)) / (1 - 2 * eps)


class EXO(LengthOptions, PairLoss):
    """Efficient exact optimization (EXO-pref): p log(p / (1 - eps)) + (1 - p) log((1 - p) / eps), p = sigmoid(beta h).

    arXiv 2402.00856: the reverse KL divergence of the policy's preference from labels smoothed by eps, where eps must
    be above 0. The minimum, 0, is at p = 1 - eps.
    """

    label_smoothing: float = Field(strict=True, gt=0, lt=0.5, description="a number between 0 and 0.5")

    def pair_losses(self, h: Tensor) -> Tensor:
        eps, right, wrong = self.label_smoothing, logsigmoid(self.beta * h), logsigmoid(-self.beta * h)
        return right.exp() * (right - math.log(1 - eps)) + wrong.exp() * (wrong - math.log(eps))


class DiscoPOP(LengthOptions, PairLoss):
    """Log-ratio modulated loss: (1 - m) (-log sigmoid(beta h)) + m exp(-beta h), m = sigmoid(beta h / temperature).

    DiscoPOP, arXiv 2406.08414, discovered by a language model.
    """

    temperature: Positive

    def pair_losses(self, h: Tensor) -> Tensor:
        logits = self.beta * h
        modulation = logits / self.temperature
        # m exp(-logits) as one exponential: two factors would be 0 * infinity for very negative logits
        return -modulation.neg().sigmoid() * logsigmoid(logits) + (logsigmoid(modulation) - logits).exp()


class RDPO(WeightOptions, PairLoss):
    """Length-regularized DPO: -log sigmoid(beta h + alpha |y_w| - alpha |y_l|); arXiv 2403.19159."""

    alpha: NotNegative

    def pair_losses(self, h: Tensor) -> Tensor:
        return -logsigmoid(self.beta * h)

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor, context: Context) -> Tensor:
        penalty = self.alpha * (lengths[:, 0] - lengths[:, 1])
        return self.pair_losses(self.compute_h(policy, reference) + penalty / self.beta)


class ODPO(LengthOptions, PairLoss):
    """DPO with an offset: -log sigmoid(beta h - alpha log(score(y_w) - score(y_l))); arXiv 2402.10571.

    The scores come from the data; the chosen response has the higher one.
    """

    needs_scores: ClassVar[bool] = True
    alpha: NotNegative

    def pair_losses(self, h: Tensor) -> Tensor:
        return -logsigmoid(self.beta * h)

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor, context: Context) -> Tensor:
        scores = (example.text.scores for example in context.examples)
        gaps = to_device_of(policy, [chosen - rejected for chosen, rejected in scores], policy.dtype)
        return self.pair_losses(self.compute_h(policy, reference) - self.alpha / self.beta * gaps.log())


# Losses of the two log-ratios a_w = log(pi(y_w) / ref(y_w)) and a_l; rewards are beta a


class DPOP(LengthOptions, ReferenceLoss):
    """DPO-Positive: -log sigmoid(beta (a_w - a_l - penalty max(0, -a_w))); arXiv 2402.13228, eq. 3.

    penalty is the paper's lambda. Its term is positive if the chosen response is less likely than under the reference;
    beta multiplies it as well.
    """

    penalty: NotNegative

    def ratio_losses(self, chosen: Tensor, rejected: Tensor, context: Context) -> Tensor:
        return -logsigmoid(self.beta * (chosen - rejected - self.penalty * chosen.neg().relu()))


class NCA(LengthOptions, ReferenceLoss):
    """Noise contrastive alignment of pairs: -log sigmoid(r_w) - (log sigmoid(-r_w) + log sigmoid(-r_l)) / 2.

    r = beta a; arXiv 2402.05369. The minimum is at r_w = log 2 and r_l = -infinity.
    """

    def ratio_losses(self, chosen: Tensor, rejected: Tensor, context: Context) -> Tensor:
        chosen, rejected = self.beta * chosen, self.beta * rejected
        return -logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2


class APOZero(LengthOptions, ReferenceLoss):
    """Anchored preference optimization: sigmoid(-beta a_w) + sigmoid(beta a_l); arXiv 2408.06266, plus 1."""

    def ratio_losses(self, chosen: Tensor, rejected: Tensor, context: Context) -> Tensor:
        return (-self.beta * chosen).sigmoid() + (self.beta * rejected).sigmoid()


class APODown(LengthOptions, ReferenceLoss):
    """Anchored preference optimization: sigmoid(beta a_w) + sigmoid(-beta (a_w - a_l)); arXiv 2408.06266, plus 1."""

    def ratio_losses(self, chosen: Tensor, rejected: Tensor, context: Context) -> Tensor:
        return (self.beta * chosen).sigmoid() + (-self.beta * (chosen - rejected)).sigmoid()


class SPPO(WeightOptions, ReferenceLoss):
    """Self-play preference optimization with hard labels: (a_w - 1 / (2 beta))^2 + (a_l + 1 / (2 beta))^2.

    arXiv 2405.00675, where 1 / beta is called eta, for a chosen response that wins with probability 1.
    """

    def ratio_losses(self, chosen: Tensor, rejected: Tensor, context: Context) -> Tensor:
        target = 1 / (2 * self.beta)
        return (chosen - target) ** 2 + (rejected + target) ** 2


# Losses without a reference


class SimPO(WeightOptions):
    """Simple preference optimization: -log sigmoid(beta (m_w - m_l) - gamma); arXiv 2405.14734, eq. 6.

    m is the mean log-probability per token. gamma is in units of the reward, as in the equation. Code with
    gamma_beta_ratio computes gamma = gamma_beta_ratio * beta.
    """

    gamma: NotNegative

    def response_logps(self, logps: Logps) -> Tensor:
        return logps.means

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor, context: Context) -> Tensor:
        return -logsigmoid(self.beta * (policy[:, 0] - policy[:, 1]) - self.gamma)


class ORPO(PreferenceLoss):
    """Odds ratio preference optimization: -m_w - beta log sigmoid(log odds(m_w) - log odds(m_l)); arXiv 2403.07691.

    m is the mean log-probability per token, odds(m) = e^m / (1 - e^m). The first term is the paper's SFT loss, here
    over the chosen response only; the authors' code takes the mean over the tokens of prompt and response.
    """

    def response_logps(self, logps: Logps) -> Tensor:
        return logps.means

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor, context: Context) -> Tensor:
        below_0 = policy.clamp(max=-(2.0**-126))  # else the odds of probability 1 have no gradient
        log_odds = policy - (-below_0.expm1()).log()
        return -policy[:, 0] - self.beta * logsigmoid(log_odds[:, 0] - log_odds[:, 1])


class CPO(PreferenceLoss):
    """Contrastive preference optimization: -log sigmoid(beta log(pi(y_w) / pi(y_l))) - nll_weight log pi(y_w).

    arXiv 2401.08417. In the second term, log pi(y_w) is the sum over tokens in the paper; in the authors' code, and
    with average_nll=true, it is the mean.
    """

    nll_weight: NotNegative
    average_nll: Flag

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor, context: Context) -> Tensor:
        likelihood = policy[:, 0] / lengths[:, 0] if self.average_nll else policy[:, 0]
        return -logsigmoid(self.beta * (policy[:, 0] - policy[:, 1])) - self.nll_weight * likelihood


# Losses that depend on the whole batch or on earlier batches


class KTO(LabelLoss):
    """Kahneman-Tversky optimization: D sigmoid(z - r) for desirable and U sigmoid(r - z) for undesirable responses.

    arXiv 2402.01306, with rewards r = beta a, for rows of one response with a label. A pair counts as the mean of its
    two responses. D is desirable_weight, U is undesirable_weight. z is beta times an estimate of the KL divergence of
    the policy from the reference, without gradient: the mean over the batch of log(pi(y') / ref(y')), clamped at 0. y'
    replaces an example's response: it is the response of the next example with another prompt.
    """

    desirable_weight: Positive
    undesirable_weight: Positive

    def problems(self, settings: Mapping[str, Any]) -> Iterator[str]:
        yield from super().problems(settings)
        if settings.get("batch_size") == 1:
            yield "batch_size=1: KTO compares each prompt with another example's response; set batch_size=2 or more"

    def label_notes(self, n_desirable: int, n_undesirable: int) -> list[str]:
        """A line if D n_D / (U n_U) is not in the range of eq. 9, with weights that bring it to the middle."""
        counts = f"Labels: {n_desirable:,} desirable and {n_undesirable:,} undesirable responses"
        if not n_desirable or not n_undesirable:
            return [f"{counts}; KTO needs both kinds to learn a preference."]
        imbalance = n_desirable / n_undesirable
        ratio = self.desirable_weight / self.undesirable_weight * imbalance
        if 1 <= ratio <= 1.5:
            return []
        desirable, undesirable = 1.25 / imbalance * self.undesirable_weight, imbalance / 1.25 * self.desirable_weight
        weights = f"loss.desirable_weight={desirable:.3g} or loss.undesirable_weight={undesirable:.3g}"
        weighted = f"with their weights {ratio:.3g} to 1, where KTO's paper advises 1 to 1.5"
        return [f"{counts}, {weighted}; set {weights}."]

    def batch_sums(self, examples: Iterable[TokenizedExample], logps: ComputeLogps) -> dict[str, float]:
        policy, reference = logps(mismatch(list(examples)))
        return {"log_ratios": float((policy - reference).double().sum()), "responses": policy.numel()}

    def reference_point(self, context: Context) -> float:
        return max(0.0, context.sums["log_ratios"] / context.sums["responses"])

    def response_losses(self, distances: Tensor, desirable: Tensor) -> Tensor:
        losses = (-distances).sigmoid()
        return (self.desirable_weight * losses).where(desirable, self.undesirable_weight * losses)


class BCO(LengthOptions, ReferenceLoss):
    """Binary classifier optimization: -log sigmoid(r_w - d) - log sigmoid(d - r_l), with rewards r = beta a.

    arXiv 2404.04656. The shift d is the mean reward of chosen and rejected responses: an exponential moving average
    over the earlier batches, which starts at 0 and gives each new batch the weight 1 - shift_decay. TRL's average
    includes the current batch.
    """

    shift_decay: Rate

    def next_state(self, state: Sums, means: Mapping[str, float]) -> Sums:
        shift = (means["rewards_train/chosen"] + means["rewards_train/rejected"]) / 2
        return {"shift": self.shift_decay * state.get("shift", 0.0) + (1 - self.shift_decay) * shift}

    def ratio_losses(self, chosen: Tensor, rejected: Tensor, context: Context) -> Tensor:
        shift = context.state.get("shift", 0.0)
        return -logsigmoid(self.beta * chosen - shift) - logsigmoid(shift - self.beta * rejected)


LOSSES: dict[str, type[Loss]] = {
    "sft": SFT,
    "dpo": DPO,
    "ipo": IPO,
    "hinge": Hinge,
    "robust": Robust,
    "exo": EXO,
    "discopop": DiscoPOP,
    "rdpo": RDPO,
    "odpo": ODPO,
    "dpop": DPOP,
    "nca": NCA,
    "apo_zero": APOZero,
    "apo_down": APODown,
    "sppo": SPPO,
    "simpo": SimPO,
    "orpo": ORPO,
    "cpo": CPO,
    "kto": KTO,
    "bco": BCO,
}


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
    """The original's function; returns losses, detached chosen rewards and detached rejected rewards, each (batch,).

    As in the original, reference_free leaves the reference out of the loss but not out of the rewards.
    """
    h = policy_chosen_logps - policy_rejected_logps
    if not reference_free:
        h = h - (reference_chosen_logps - reference_rejected_logps)
    beta, eps = float(beta), float(label_smoothing)
    # pair_losses, the only method called, reads no other field
    loss: PairLoss = IPO.model_construct(beta=beta) if ipo else DPO.model_construct(beta=beta, label_smoothing=eps)
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps).detach()
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps).detach()
    return loss.pair_losses(h), chosen_rewards, rejected_rewards
