"""Drawing samples: what is missing of a file of samples, by the engine, on all devices."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from dpo.system.devices import pick_device
from dpo.system.errors import UserError
from tools.rounds.devices import split_over
from tools.rounds.engines import Engine
from tools.rounds.manifest import Counts
from tools.rounds.policies import Policy, sums_of_samples
from tools.rounds.records import Prompt, Record, Sample, Task
from tools.rounds.store import Shards, read_rows

FEW = 8  # samples that are written together, at most


@dataclass(frozen=True)
class Drawing:
    """Samples of a policy to draw: n for each prompt.

    name is a part of their ids and seeds. Where it is the same, as for the held-out prompts of all rounds, so are the
    random numbers, which makes differences between rounds smaller than those between independent samples.
    """

    engine: Engine
    policy: Policy
    prompts: Sequence[Prompt]
    n: int
    name: str
    path: Path

    def run(self) -> Counts:
        """Draw what is missing, and write the file in the order of prompts and indices."""
        tasks = self.tasks()
        settings = self.policy.candidate.settings
        split_over(settings, None if self.engine.on_devices else 1, partial(draw_share, self))
        shards = Shards(self.path)
        samples = [Sample(**shards.rows[task.id]) for task in tasks]
        self.check(samples)
        shards.merge(task.id for task in tasks)
        return counts(samples)

    def check(self, samples: Sequence[Sample]) -> None:
        """Let the engine compare a few of its samples with the policy."""
        settings = self.policy.candidate.settings
        device = pick_device(settings.device)
        try:
            self.engine.check(samples, lambda few: sums_of_samples(self.policy, few, self.prompts, device))
        except UserError as error:
            files = f"{self.path.parent / self.path.stem}-*.jsonl"
            raise UserError(f"{error}; resumed rounds keep these samples unless you remove {files}") from None

    def tasks(self) -> list[Task]:
        seed = self.policy.candidate.settings.seed
        return [Task.of(seed, self.name, prompt, index) for prompt in self.prompts for index in range(self.n)]


def draw_share(drawing: Drawing, rank: int, n: int, device: str) -> None:
    """Draw this rank's share of the batches that are not there yet."""
    shards = Shards(drawing.path)
    batches = drawing.engine.batches(drawing.tasks())
    missing = [batch for batch in batches if any(task.id not in shards.rows for task in batch)]
    if not missing[rank::n]:
        return
    drawn: list[Record] = []
    try:
        with drawing.engine.opened(drawing.policy, device) as draw:
            for sample in draw(missing[rank::n]):
                drawn.append(asdict(sample))
                if len(drawn) == FEW:
                    shards.append(drawn, rank)
                    drawn = []
    finally:  # an engine that fails has given some samples before
        shards.append(drawn, rank)


def counts(samples: Sequence[Sample]) -> Counts:
    tokens = sum(len(sample.ids) for sample in samples)
    unfinished = sum(not sample.finished for sample in samples)
    return {"samples": len(samples), "tokens": tokens, "unfinished": unfinished}


def read_samples(path: Path) -> list[Sample]:
    return [Sample(**row) for row in read_rows(path)]
