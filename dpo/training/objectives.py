"""Base classes of the losses, options that several losses share, and the mathematics.

torch is imported inside functions: importing it takes seconds, and checking settings needs only the classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from dpo.settings.constraints import START
from dpo.settings.schema import Flag, LossSettings, NotNegative, Positive, Probability

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dpo.data.examples import TokenizedExample
    from dpo.model.logps import Logps

    Metrics = dict[str, Tensor]
    ComputeLogps = Callable[[Sequence[TokenizedExample]], tuple[Tensor, Tensor]]

Sums = Mapping[str, float]
NO_SUMS: Sums = MappingProxyType({})
MAX_EXPONENT = 80.0  # e^80 is far below the largest float32, also after a product with beta


def logsigmoid(x: Tensor) -> Tensor:
    """Compute log sigmoid(x) elementwise, without the underflow of sigmoid."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


@dataclass(frozen=True)
class Context:
    """What a loss may read in addition to the log-probabilities of a microbatch.

    examples  the examples of the microbatch
    sums      what `Loss.batch_sums` returned for the whole batch: all its microbatches, on all ranks
    state     what `Loss.next_state` returned after the last batch; empty before the first
    """

    examples: Sequence[TokenizedExample] = ()
    sums: Sums = field(default_factory=dict)
    state: Sums = field(default_factory=dict)


class Loss(LossSettings, ABC):
    """A loss as the trainer sees it: called with log-probabilities, it returns one loss and some metrics per example.

    What a loss needs and refuses is defined here and in the subclasses, and nowhere else.
    """

    n_responses: ClassVar[int]  # per example: 2 for a pair (chosen first), 1 for the target of SFT
    needs_scores: ClassVar[bool] = False  # whether each response needs a score
    takes_labels: ClassVar[bool] = False  # whether an example may also be a single response with a label

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        """Refuse a field that would shadow a method."""
        super().__pydantic_init_subclass__(**options)
        for name in cls.model_fields:
            if any(name in vars(base) for base in cls.__mro__):
                problem = f"{cls.__name__}.{name}: losses have a method or an attribute of this name"
                raise TypeError(f"{problem}; rename the field, and its key in config/loss/")

    def problems(self, settings: Mapping[str, Any]) -> Iterator[str]:
        n, dtype = settings.get("sync_reference"), settings.get("model.reference_dtype")
        reference = settings.get("reference", START)
        if reference != START and not self.needs_reference:
            yield f"reference={reference}: the loss has no reference; set reference=start"
        if n is not None and not self.needs_reference:
            yield f"sync_reference={n}: the loss has no reference; set sync_reference=null"
        if n is not None and self.cached_reference:
            problem = "a precomputed reference cannot follow the policy; set one of them to null or false"
            yield f"sync_reference={n} loss.precompute_reference=true: {problem}"
        if dtype is not None and self.cached_reference and reference == START:
            problem = "the policy itself computes the reference's log-probabilities; set model.reference_dtype=null"
            yield f"model.reference_dtype={dtype} loss.precompute_reference=true: {problem}"
        name, label = settings.get("loss.name"), settings.get("columns.label")
        if label not in (None, "none") and self.n_responses == 2 and not self.takes_labels:
            mitigation = "set columns.label=null, or choose a loss of single responses, such as loss=kto"
            yield f"loss={name} columns.label={label}: this loss reads no label; {mitigation}"
        has_lists = settings.get("columns.scores") not in (None, "none")
        if self.needs_scores and settings.get("columns.score_chosen", "") is None and not has_lists:
            mitigation = "set columns.score_chosen=NAME and columns.score_rejected=NAME, or columns.scores=NAME"
            yield f"loss={name} columns.score_chosen=null: this loss reads a score of each response; {mitigation}"

    def label_notes(self, n_desirable: int, n_undesirable: int) -> list[str]:
        """Lines about the numbers of desirable and undesirable responses in an epoch, printed before training."""
        return []

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probabilities are computed."""
        return False

    @property
    def cached_reference(self) -> bool:
        """Whether the reference's log-probabilities are computed once, before training, without a second model."""
        return False

    @property
    def needs_collisions(self) -> bool:
        """Whether the policy's Logps hold collisions, for weights of tokens."""
        return False

    @abstractmethod
    def __call__(self, policy: Logps, reference: Logps | None, context: Context) -> tuple[Tensor, Metrics]:
        """Compute the losses, (batch,), and detached metrics of the same shape; reference is None if not needed."""

    def batch_sums(self, examples: Iterable[TokenizedExample], logps: ComputeLogps) -> dict[str, float]:
        """Compute sums over a whole batch that the losses of its examples depend on.

        logps returns the sums of log-probabilities of policy and reference, both (examples, n_responses), on the host,
        without a gradient, in any order of the examples.
        """
        return {}

    def next_state(self, state: Sums, means: Mapping[str, float]) -> Sums:
        """Update the state for later batches from a training batch's mean metrics; checkpoints store it."""
        return state


class PreferenceLoss(Loss):
    """A loss of a chosen and a rejected response, y_w and y_l.

    Rewards, beta log(pi(y) / ref(y)), are only metrics. Without a reference, ref(y) is 1.
    """

    n_responses: ClassVar[int] = 2
    beta: Positive

    @abstractmethod
    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor, context: Context) -> Tensor:
        """Compute the losses, (batch,), from log pi(y), log ref(y) (as in response_logps) and |y|, each (batch, 2)."""

    def response_logps(self, logps: Logps) -> Tensor:
        """The log pi(y) that the loss uses, (batch, 2): here the sum over the response's tokens."""
        return logps.sums

    def finish(self, losses: Tensor, policy: Logps) -> Tensor:
        """Apply the options' weights and terms to the losses, (batch,)."""
        return losses

    def __call__(self, policy: Logps, reference: Logps | None, context: Context) -> tuple[Tensor, Metrics]:
        logps = self.response_logps(policy)
        reference_logps = logps.new_zeros(logps.shape) if reference is None else self.response_logps(reference)
        losses = self.finish(self.losses(logps, reference_logps, policy.lengths, context), policy)
        rewards = self.beta * (logps - reference_logps).detach()
        return losses, self.metrics(logps.detach(), rewards, context) | {"loss": losses.detach()}

    def metrics(self, logps: Tensor, rewards: Tensor, context: Context) -> Metrics:
        """Compute metrics, (batch,), from log pi(y) and rewards, both (batch, 2)."""
        chosen_rewards, rejected_rewards = rewards.unbind(1)
        return {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float(),
            "rewards/margins": chosen_rewards - rejected_rewards,
            "logps/chosen": logps[:, 0],
            "logps/rejected": logps[:, 1],
        }


class ReferenceLoss(PreferenceLoss):
    """A loss of the log-ratios log(pi(y_w) / ref(y_w)) and log(pi(y_l) / ref(y_l))."""

    precompute_reference: Flag

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def cached_reference(self) -> bool:
        return self.precompute_reference

    @abstractmethod
    def ratio_losses(self, chosen: Tensor, rejected: Tensor, context: Context) -> Tensor:
        """Compute the losses from the two log-ratios; all (batch,)."""

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor, context: Context) -> Tensor:
        ratios = policy - reference
        return self.ratio_losses(ratios[:, 0], ratios[:, 1], context)


class PairLoss(PreferenceLoss):
    """A loss of h = log(pi(y_w) / pi(y_l)) - log(ref(y_w) / ref(y_l)), the difference of the log-ratios."""

    reference_free: Flag
    precompute_reference: Flag

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free

    @property
    def cached_reference(self) -> bool:
        return self.precompute_reference

    def problems(self, settings: Mapping[str, Any]) -> Iterator[str]:
        yield from super().problems(settings)
        if self.precompute_reference and self.reference_free:
            problem = "there is no reference to precompute; set one of them to false"
            yield f"loss.precompute_reference=true loss.reference_free=true: {problem}"

    @abstractmethod
    def pair_losses(self, h: Tensor) -> Tensor:
        """Compute the losses from h; both (batch,)."""

    def compute_h(self, policy: Tensor, reference: Tensor) -> Tensor:
        """Compute h, (batch,), from log pi(y) and log ref(y), both (batch, 2)."""
        return (policy[:, 0] - policy[:, 1]) - (reference[:, 0] - reference[:, 1])

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor, context: Context) -> Tensor:
        return self.pair_losses(self.compute_h(policy, reference))


class LabelLoss(PreferenceLoss):
    """A loss that compares the log-ratios of desirable and undesirable responses with a reference point.

    An example is one response with a label, or a pair: its chosen response counts as desirable, the other as
    undesirable.
    """

    takes_labels: ClassVar[bool] = True

    @property
    def needs_reference(self) -> bool:
        return True

    @abstractmethod
    def reference_point(self, context: Context) -> float:
        """The log-ratio that desirable responses should exceed and undesirable ones stay below."""

    @abstractmethod
    def response_losses(self, distances: Tensor, desirable: Tensor) -> Tensor:
        """Compute losses from how far rewards are on the right side of the reference point, (batch, n_responses)."""

    def losses(self, policy: Tensor, reference: Tensor, lengths: Tensor, context: Context) -> Tensor:
        desirable, above = desirable_responses(policy, context), policy - reference - self.reference_point(context)
        return self.response_losses(self.beta * above.where(desirable, -above), desirable).mean(1)

    def metrics(self, logps: Tensor, rewards: Tensor, context: Context) -> Metrics:
        """Compute metrics; for single responses, rewards and log-probabilities are separate metrics for each label.

        A single response counts as accurate if its reward is on the right side of the reference point.
        """
        if logps.shape[1] > 1:
            return super().metrics(logps, rewards, context)
        desirable, above = desirable_responses(logps, context), rewards - self.beta * self.reference_point(context)
        metrics = {"rewards/accuracies": (above.where(desirable, -above) > 0).float()[:, 0]}
        for name, values in (("rewards", rewards), ("logps", logps)):
            metrics |= by_label(name, values[:, 0], context.examples)
        return metrics


def desirable_responses(like: Tensor, context: Context) -> Tensor:
    """Which responses are desirable, as a mask of the shape of `like`, (batch, n_responses)."""
    is_pair = like.shape[1] > 1
    labels = [[True, False]] * len(like) if is_pair else [[example.text.label] for example in context.examples]
    return to_device_of(like, labels)


def by_label(name: str, values: Tensor, examples: Sequence[TokenizedExample]) -> Metrics:
    """Split the values, (batch,), of labelled examples into those of desirable and of undesirable ones."""
    rows = {label: [i for i, example in enumerate(examples) if example.text.label is label] for label in (True, False)}
    parts = {label: values[to_device_of(values, rows[label]).long()] for label in rows}
    return {f"{name}/desirable": parts[True], f"{name}/undesirable": parts[False]}


def to_device_of(like: Tensor, numbers: Sequence[Any], dtype: torch.dtype | None = None) -> Tensor:
    """Make a tensor of numbers on the device of another one, without waiting for a GPU as new_tensor does."""
    import torch

    return torch.tensor(numbers, dtype=dtype).to(like.device, non_blocking=True)


# Options that several losses share


class WeightOptions(PreferenceLoss):
    """Options that weight the loss or add a term to it.

    token_weights=wpo weights each pair by how likely the policy is to generate it: WPO, arXiv 2406.11827.
    nll_weight adds the chosen response's negative log-likelihood per token: RPO, arXiv 2404.19733, where it is alpha.
    """

    nll_weight: NotNegative
    token_weights: Literal["none", "wpo"]

    @property
    def needs_collisions(self) -> bool:
        return self.token_weights == "wpo"

    def finish(self, losses: Tensor, policy: Logps) -> Tensor:
        if self.token_weights == "wpo":
            losses = losses * wpo_weights(policy)
        return losses - self.nll_weight * policy.means[:, 0] if self.nll_weight else losses


class LengthOptions(WeightOptions):
    """Options for the log-probability of a response: the sum over its tokens, or one of two corrections for length.

    length_normalize divides by the number of tokens, as Tülu 3 does: arXiv 2411.15124. ld_alpha below 1 is LD-DPO,
    arXiv 2409.06411: tokens beyond the length of the pair's shorter response have weight ld_alpha. Both act on policy
    and reference alike, so that h is 0 if the two are equal; TRL's ld_alpha acts only on the policy.
    """

    length_normalize: Flag
    ld_alpha: Probability

    def problems(self, settings: Mapping[str, Any]) -> Iterator[str]:
        yield from super().problems(settings)
        if self.ld_alpha != 1 and self.cached_reference:
            problem = "the cache holds no log-probabilities of tokens; set loss.precompute_reference=false"
            yield f"loss.ld_alpha={self.ld_alpha} loss.precompute_reference=true: {problem}"
        if self.ld_alpha != 1 and self.length_normalize:
            problem = "both correct for length; set only one of them"
            yield f"loss.ld_alpha={self.ld_alpha} loss.length_normalize=true: {problem}"

    def response_logps(self, logps: Logps) -> Tensor:
        if self.length_normalize:
            return logps.means
        return logps.sums if self.ld_alpha == 1 else desensitized_sums(logps, self.ld_alpha)


class Divergence(PairLoss):
    """Option for the divergence that the reward is derived from: f-DPO, arXiv 2309.16240.

    With u = pi(y) / ref(y), h is f'(u_w) - f'(u_l). f'(u) is log u for reverse_kl, DPO's own; -1 / u for forward_kl;
    log(2u / (1 + u)) for js; (1 - u^-a) / a for alpha, where a is divergence_alpha, which gives reverse_kl as it
    approaches 0 and forward_kl at 1.
    """

    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"]
    divergence_alpha: float = Field(strict=True, gt=0, lt=1, description="a number between 0 and 1")

    def problems(self, settings: Mapping[str, Any]) -> Iterator[str]:
        yield from super().problems(settings)
        if self.divergence != "reverse_kl" and self.reference_free:
            problem = "without a reference there is no divergence from it; set only one of them"
            yield f"loss.divergence={self.divergence} loss.reference_free=true: {problem}"

    def compute_h(self, policy: Tensor, reference: Tensor) -> Tensor:
        if self.divergence == "reverse_kl":
            return super().compute_h(policy, reference)
        log_u = policy - reference
        if self.divergence == "js":
            slopes = logsigmoid(log_u)
        else:
            a = 1.0 if self.divergence == "forward_kl" else self.divergence_alpha
            exponents = (-a * log_u).clamp(max=MAX_EXPONENT)
            slopes = -exponents.expm1() / a
        return slopes[:, 0] - slopes[:, 1]


def desensitized_sums(logps: Logps, alpha: float) -> Tensor:
    """Compute sums, (batch, 2), where tokens beyond the length of the pair's shorter response have weight alpha."""
    import torch

    assert logps.tokens is not None, "a cached reference has no log-probabilities of tokens"
    lengths, n = logps.lengths.flatten(), len(logps.tokens)
    ends = lengths.cumsum(0)
    starts = (ends - lengths).repeat_interleave(lengths, output_size=n)  # whose size need not be read from the device
    public = logps.lengths.min(1, keepdim=True).values.expand_as(logps.lengths).flatten()
    positions = torch.arange(n, device=ends.device) - starts
    weights = (positions < public.repeat_interleave(lengths, output_size=n)).to(logps.tokens)
    weights = weights + alpha * (1 - weights)
    return type(logps).from_tokens(weights * logps.tokens, logps.lengths, logps.sizes).sums


def wpo_weights(logps: Logps) -> Tensor:
    """Compute w(y_w) w(y_l), (batch,), without gradient: WPO's sampled alignment, arXiv 2406.11827.

    w(y) is the geometric mean over the tokens of pi(y_t) / sum_v pi(v)^2: 1 on average for tokens that the policy
    samples. The product is clamped at 1, as in the authors' code.
    """
    assert logps.tokens is not None and logps.collisions is not None
    alignment = type(logps).from_tokens((logps.tokens - logps.collisions).detach(), logps.lengths, logps.sizes)
    return alignment.means.sum(1).exp().clamp(max=1)


def mismatch(examples: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """Pair each prompt with the responses of the next example with another prompt, or of the next one if all are equal.

    The first example follows the last. Responses are truncated so that no prompt with response gets longer than the
    longest of the examples.
    """
    longest, n = max(len(e.prompt) + max(map(len, e.responses)) for e in examples), len(examples)
    mismatched = []
    for i, example in enumerate(examples):
        following = (examples[(i + k) % n] for k in range(1, n))
        other = next((e for e in following if e.prompt != example.prompt), examples[(i + 1) % n])
        room = longest - len(example.prompt)
        responses = tuple(response[:room] for response in other.responses)
        masks = tuple(truncate_mask(mask, room) for mask in other.loss_masks)
        mismatched.append(replace(example, responses=responses, loss_masks=masks))
    return mismatched


def truncate_mask(mask: list[bool], n: int) -> list[bool]:
    """The first n values; all True if none is, so that no response is empty."""
    first = mask[:n]
    return first if any(first) else [True] * len(first)
