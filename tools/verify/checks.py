"""All checks, in the order in which they are made, and what becomes of one that fails."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from dpo.model.pretrained import auto_class
from dpo.system.devices import available_memory
from dpo.training.budgets import estimate_before_loading
from tools.verify import gradients, processes, speed, training
from tools.verify.session import Session
from tools.verify.table import NotRun, Row, complete
from trainers import Inputs


@dataclass(frozen=True)
class Check:
    """What is promised, a row each, and the function that yields the rows.

    is_plain: whether it opens the model in a more precise dtype beside the run's own.
    """

    promises: Sequence[str]
    run: Callable[[Session, Inputs], Iterator[Row]]
    is_plain: bool = False

    def rows(self, session: Session, inputs: Inputs) -> Iterator[Row]:
        """Yield a row for each promise, also where the check ends with an error."""
        return complete(self.promises, self.checked(session, inputs))

    def checked(self, session: Session, inputs: Inputs) -> Iterator[Row]:
        check_memory(session, inputs, self.is_plain)
        yield from self.run(session, inputs)


def check_memory(session: Session, inputs: Inputs, is_plain: bool) -> None:
    """Raise NotRun if a run on one device is estimated not to fit: several may share a model that one cannot hold."""
    settings, loss = session.alone.validated
    dtype, longest = session.dtype(inputs), max(map(len, next(iter(inputs.train_batches.from_start())).examples))
    estimate = estimate_before_loading(inputs.model_config, settings, loss, dtype, 1, inputs.reference)
    needed = estimate.at(longest)
    if is_plain:
        with torch.device("meta"):
            model = auto_class(inputs.model_config).from_config(inputs.model_config)
        of_weights = (8 if dtype == torch.float32 else 4) * sum(parameter.numel() for parameter in model.parameters())
        needed += of_weights if settings.lora else 2 * of_weights  # with their gradient
    available = available_memory(inputs.device) if inputs.device.type != "mps" else float("inf")
    if needed > available:
        raise NotRun(f"estimated to need {needed / 1e9:.1f} of {available / 1e9:.1f} GB on one device")


CHECKS = (
    Check(gradients.PROMISES, gradients.check_gradients, is_plain=True),
    Check(training.PROMISES, training.check_training),
    Check(processes.PROMISES, processes.check_processes),
    Check(speed.PROMISES, speed.check_speed),
)
