"""How far results are from the truth, in units of the rounding that a plain computation has in the run's dtype.

The truth is the plain computation in a more precise dtype: float64, or float32 where the run computes in 16 bits. The
same computation in the run's own dtype shows what rounding alone does to this model and these rows. What a run computes
in other ways may differ from the truth by a small multiple of that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from tools.verify.plain import Result, Tokens

EPSILON = 2.0**-23  # of float32, in which losses are summed


def largest_error(tokens: Tokens, truth: Tokens) -> float:
    """The largest error of a token's log-probability, in nats; inf if there is another number of tokens."""
    errors = [0.0]
    for texts, true_texts in zip(tokens, truth, strict=True):
        for one, true in zip(texts, true_texts, strict=True):
            errors.append((one.double() - true.double()).abs().max().item() if len(one) == len(true) else float("inf"))
    return max(errors)


@dataclass(frozen=True)
class Rounding:
    """The truth, and what rounding does to it.

    logps      the largest error of a token's log-probability, in nats
    loss       the error of the loss, if the errors of all log-probabilities added up
    gradient   the norm of the error of each tensor's gradient
    """

    truth: Result
    logps: float
    loss: float
    gradient: dict[str, float]

    @classmethod
    def of(cls, truth: Result, plain: Result) -> "Rounding":
        """Measure by a plain computation in the run's dtype."""
        loss = EPSILON * abs(truth.loss)
        pairs = [(plain.policy, truth.policy)]
        if truth.reference is not None and plain.reference is not None:
            pairs.append((plain.reference, truth.reference))
        for tokens, true in pairs:
            for one, exact, slopes in zip(flat(tokens), flat(true), flat(truth.slopes), strict=True):
                loss += ((one.double() - exact) * slopes).abs().sum().item()
        return cls(truth, largest_error(plain.policy, truth.policy), loss, errors(plain.gradient, truth.gradient))

    def around(self, loss: float, gradient: dict[str, Tensor]) -> "Rounding":
        """The same units around another loss and gradient than the true ones."""
        return replace(self, truth=replace(self.truth, loss=loss, gradient=gradient))

    def of_logps(self, tokens: Tokens) -> float:
        return ratio(largest_error(tokens, self.truth.policy), self.logps)

    def of_loss(self, loss: float) -> float:
        return ratio(abs(loss - self.truth.loss), self.loss)

    def of_gradient(self, gradient: Mapping[str, Tensor]) -> tuple[float, str]:
        """The error of the worst tensor, in units of rounding, and its name.

        The unit is what rounding does to this tensor or, if that is more, the share of its norm that rounding changes
        of the whole gradient: a tensor of a few numbers may be nearly exact by chance.
        """
        norms = {name: tensor.norm().item() for name, tensor in self.truth.gradient.items()}
        share = ratio(total(self.gradient), total(norms))
        error = errors(gradient, self.truth.gradient)
        ratios = {name: ratio(each, max(self.gradient[name], share * norms[name])) for name, each in error.items()}
        worst = max(ratios, key=lambda name: ratios[name])
        return ratios[worst], worst


def errors(gradient: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """The norm of each tensor's error; a missing tensor counts as 0."""
    return {
        name: (gradient[name].to(true.dtype) - true if name in gradient else true).norm().item()
        for name, true in truth.items()
    }


def flat(tokens: Tokens) -> list[Tensor]:
    return [each for texts in tokens for each in texts]


def total(norms: Mapping[str, float]) -> float:
    return sum(norm**2 for norm in norms.values()) ** 0.5


def ratio(error: float, unit: float) -> float:
    """error / unit; an error of 0 is 0 units, whatever the unit."""
    return 0.0 if error == 0 else error / unit if unit else float("inf")
