"""Engines: what samples. Each is a frozen object whose fields are the settings of config/engine/NAME.yaml."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, ClassVar

from dpo.settings.schema import Group, Settings, whole
from dpo.system.console import progress
from dpo.system.errors import actionable_errors
from tools.rounds.records import Sample, Task

if TYPE_CHECKING:
    from tools.rounds.policies import Policy

# Yields the samples of batches of tasks as they are drawn; UserError or RunError if the engine fails, after the samples
# that it has given.
Draw = Callable[[Sequence[Sequence[Task]]], Iterator[Sample]]
# log pi(response | prompt) of samples at temperature 1, by the policy that they are said to be of.
Logps = Callable[[Sequence[Sample]], Sequence[float]]


class Engine(Group):
    on_devices: ClassVar[bool] = False  # whether it uses the devices of the run, a process on each

    def problems(self, settings: Settings) -> Iterator[str]:
        """Yield a line for each combination of settings that is refused."""
        yield from ()

    @abstractmethod
    def batches(self, tasks: Sequence[Task]) -> list[list[Task]]:
        """The batches that are drawn together, and whole: samples depend on the others of a batch by rounding."""

    @abstractmethod
    def opened(self, policy: "Policy", device: str) -> AbstractContextManager[Draw]:
        """Load or start what is needed, and end it in the end."""

    def check(self, samples: Sequence[Sample], logps: Logps) -> None:
        """Compare the log-probabilities that the engine gave with our own; UserError if they are of another model.

        It loads the policy, so that the engine has to be ended before.
        """


class BuiltinEngine(Engine):
    """This project's decoding, on a device of this machine."""

    on_devices: ClassVar[bool] = True

    batch_size: int = whole("samples", ge=1)

    def batches(self, tasks: Sequence[Task]) -> list[list[Task]]:
        """Prompts of similar length together, so that little is padded, and samples of one prompt, so that it is
        computed once."""
        ordered = sorted(tasks, key=lambda task: (len(task.prompt.ids), task.prompt.id, task.index))
        return [ordered[start : start + self.batch_size] for start in range(0, len(ordered), self.batch_size)]

    @contextmanager
    def opened(self, policy: "Policy", device: str) -> Iterator[Draw]:
        import torch

        from dpo.model.decoding import Decoder, choose_rows
        from dpo.model.loading import set_quantized_products
        from dpo.system.devices import compute_dtype, pick_device

        settings = policy.candidate.settings
        place = pick_device(device)
        dtype = compute_dtype(settings.compute_precision, getattr(torch, settings.model.policy_dtype), place)
        decoder = Decoder.of(settings, policy.tokenizer, policy.stops, dtype)
        hint = f"while drawing {self.batch_size} samples at a time; lower engine.batch_size"
        title = f"sampling {policy.candidate.name}"
        model = policy.load(place).eval()
        kind = choose_rows(model, settings.max_length, dtype)
        set_quantized_products(model, dtype)
        for parameter in model.parameters():
            # Autocast keeps the casts of those alone that need a gradient; others, as an adapter's base, it would cast
            # again for every token.
            parameter.requires_grad_(parameter.is_floating_point())
        loaded = [model]
        del model

        def draw(batches: Sequence[Sequence[Task]]) -> Iterator[Sample]:
            for batch in progress(batches, title):
                with actionable_errors(hint):
                    prompts, seeds = [task.prompt.ids for task in batch], [task.seed for task in batch]
                    drawn = decoder.decode(loaded[0], prompts, seeds, kind)
                texts = policy.tokenizer.batch_decode([one.ids for one in drawn], skip_special_tokens=True)
                for task, one, text in zip(batch, drawn, texts, strict=True):
                    yield Sample(task.id, task.prompt.id, task.index, text, one.ids, one.finished, one.logp)

        try:
            yield draw
        finally:
            loaded.clear()  # whoever still holds draw no longer holds the model
            if place.type == "cuda":
                torch.cuda.empty_cache()
