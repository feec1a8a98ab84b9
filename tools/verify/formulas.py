"""The losses written out from their papers, with no code of this project: what an update's loss is compared with."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Settings = Mapping[str, Any]  # of the loss
Tokens = list[list[Tensor]]  # the log-probability of each trained token, by example and response


class Pair(NamedTuple):
    """A pair as a formula sees it.

    w, l        log(pi(y) / ref(y)) of the chosen and of the rejected response, or log pi(y) without a reference
    n_w, n_l    numbers of their tokens
    """

    w: Tensor
    l: Tensor  # noqa: E741  (as in the papers)
    n_w: int
    n_l: int

    @property
    def h(self) -> Tensor:
        return self.w - self.l


def dpo(s: Settings, y: Pair) -> Tensor:
    eps = s["label_smoothing"]
    return -(1 - eps) * logsigmoid(s["beta"] * y.h) - eps * logsigmoid(-s["beta"] * y.h)


def robust(s: Settings, y: Pair) -> Tensor:
    eps = s["label_smoothing"]
    return (-(1 - eps) * logsigmoid(s["beta"] * y.h) + eps * logsigmoid(-s["beta"] * y.h)) / (1 - 2 * eps)


def ipo(s: Settings, y: Pair) -> Tensor:
    return (y.h - 1 / (2 * s["beta"])) ** 2


def hinge(s: Settings, y: Pair) -> Tensor:
    return (1 - s["beta"] * y.h).clamp(min=0)


def rdpo(s: Settings, y: Pair) -> Tensor:
    return -logsigmoid(s["beta"] * y.h + s["alpha"] * (y.n_w - y.n_l))


def dpop(s: Settings, y: Pair) -> Tensor:
    return -logsigmoid(s["beta"] * (y.h - s["penalty"] * (-y.w).clamp(min=0)))


def nca(s: Settings, y: Pair) -> Tensor:
    w, l = s["beta"] * y.w, s["beta"] * y.l  # noqa: E741
    return -logsigmoid(w) - logsigmoid(-w) / 2 - logsigmoid(-l) / 2


def apo_zero(s: Settings, y: Pair) -> Tensor:
    return 1 - torch.sigmoid(s["beta"] * y.w) + torch.sigmoid(s["beta"] * y.l)


def apo_down(s: Settings, y: Pair) -> Tensor:
    return torch.sigmoid(s["beta"] * y.w) + 1 - torch.sigmoid(s["beta"] * y.h)


def sppo(s: Settings, y: Pair) -> Tensor:
    eta = 1 / s["beta"]
    return (y.w - eta / 2) ** 2 + (y.l + eta / 2) ** 2


def simpo(s: Settings, y: Pair) -> Tensor:
    return -logsigmoid(s["beta"] * y.h - s["gamma"])


def orpo(s: Settings, y: Pair) -> Tensor:
    log_odds = [m - torch.log1p(-m.exp()) for m in (y.w, y.l)]
    return -y.w - s["beta"] * logsigmoid(log_odds[0] - log_odds[1])


def cpo(s: Settings, y: Pair) -> Tensor:
    return -logsigmoid(s["beta"] * y.h) - s["nll_weight"] * y.w / (y.n_w if s["average_nll"] else 1)


FORMULAS: dict[str, Callable[[Settings, Pair], Tensor]] = {
    each.__name__: each
    for each in (dpo, robust, ipo, hinge, rdpo, dpop, nca, apo_zero, apo_down, sppo, simpo, orpo, cpo)
}
OF_MEANS = ("simpo", "orpo")  # losses of mean log-probabilities per token


def written_out(s: Settings) -> Callable[[Tokens, Tokens | None, Sequence[float]], Tensor] | None:
    """The weighted mean loss of a batch by its settings, from log-probabilities and the weights of the examples.

    None if the loss, or one of its options, is not written out here.
    """
    if s["name"] == "sft":
        return lambda policy, reference, weights: sft(s, [texts[0] for texts in policy], weights)
    if s["name"] not in FORMULAS or s.get("token_weights", "none") != "none":
        return None

    def mean_loss(policy: Tokens, reference: Tokens | None, weights: Sequence[float]) -> Tensor:
        references = (
            [[torch.zeros_like(tokens) for tokens in texts] for texts in policy] if reference is None else reference
        )
        losses = [pair_loss(s, *pair) for pair in zip(policy, references, strict=True)]
        return sum_of(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)

    return mean_loss


def sft(s: Settings, responses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Negative log-likelihood: its sum over tokens, its mean over them, or the mean over the tokens of the batch."""
    weighted = list(zip(weights, responses, strict=True))
    if s["normalize"] == "tokens":
        n_tokens = sum(weight * len(tokens) for weight, tokens in weighted)
        return sum_of(-weight * tokens.sum() for weight, tokens in weighted) / n_tokens
    by_example = {"sum": Tensor.sum, "example": Tensor.mean}[s["normalize"]]
    return sum_of(-weight * by_example(tokens) for weight, tokens in weighted) / sum(weights)


def pair_loss(s: Settings, policy: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    n_w, n_l = map(len, policy)
    ratios = [
        value(s, tokens, min(n_w, n_l)) - value(s, of_reference, min(n_w, n_l))
        for tokens, of_reference in zip(policy, reference, strict=True)
    ]
    slopes = [slope_of_divergence(s, ratio) for ratio in ratios]
    loss = FORMULAS[s["name"]](s, Pair(slopes[0], slopes[1], n_w, n_l))
    return loss if s["name"] == "cpo" else loss - s.get("nll_weight", 0) * policy[0].mean()


def value(s: Settings, tokens: Tensor, n_shorter: int) -> Tensor:
    """What a loss takes for log pi(y): the sum over tokens, their mean, or a sum with smaller weights at the end."""
    if s["name"] in OF_MEANS or s.get("length_normalize") or s.get("average_log_prob"):
        return tokens.mean()
    return tokens[:n_shorter].sum() + s.get("ld_alpha", 1) * tokens[n_shorter:].sum()


def slope_of_divergence(s: Settings, log_u: Tensor) -> Tensor:
    """f'(u) of an f-divergence, up to a constant that is the same for both responses."""
    kind, u = s.get("divergence", "reverse_kl"), log_u.exp()
    if kind == "forward_kl":
        return -1 / u
    if kind == "js":
        return torch.log(u / (1 + u))
    return (1 - u ** -s["divergence_alpha"]) / s["divergence_alpha"] if kind == "alpha" else log_u


def sum_of(terms: Any) -> Tensor:
    return torch.stack(list(terms)).sum()
