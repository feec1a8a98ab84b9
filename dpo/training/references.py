"""References: a second model, the policy without its adapter, or a cache of log-probabilities."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from dpo.data.examples import TokenizedExample
from dpo.distributed.splitting import BatchSplitter
from dpo.model.logps import Logps, ResponseLogps, response_logps
from dpo.model.packing import PackedBatch
from dpo.model.sampling import Sampler
from dpo.runs.weights import AdapterWeights
from dpo.system.console import log_message
from dpo.system.errors import RunError
from dpo.system.files import atomic_write

OTHER_WAYS = "try another device, precision or layout, or another version of the model's libraries"
ROUNDED = 0.05  # nats per token: far above what rounding changes, below the difference of another model


class Reference(Protocol):
    """The frozen model that the policy is compared with, as the trainer sees it."""

    knows_any_response: bool = True  # whether `logps` accepts responses that are not in the data, such as samples
    # The allowed difference from the policy before the first update, in nats per token on average; inf: not compared.
    start_tolerance: float = 0.0
    mitigation: str = OTHER_WAYS  # advice for a larger difference

    def logps(self, batch: PackedBatch) -> Logps:
        """Compute or look up the log-probabilities of the batch's responses."""

    def generate(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        """Sample one response per prompt, the same at every call; return the prompts with the responses."""

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """A context for microbatches that every evaluation repeats; some references compute them only once."""
        yield

    def after_update(self, n_updates: int) -> None:
        """Follow the policy after its n_updates-th update; most references do not change."""
        return

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a resumed run needs; empty if the reference is the initial policy."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        return


def repeated(reference: Reference | None) -> AbstractContextManager[None]:
    """Reference.repeated, or no context without a reference."""
    return nullcontext() if reference is None else reference.repeated()


@torch.no_grad()
def sums_of_logps(
    policy: ResponseLogps,
    reference: Reference | None,
    split_batch: BatchSplitter,
    examples: Sequence[TokenizedExample],
    before_microbatch: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log pi(response) of policy and reference, both (examples, n_responses), in the order of microbatches.

    Each rank computes its share, and every rank returns all values, on the host. before_microbatch may stop all ranks.
    """
    assert reference is not None
    computed = []
    for batch, scale, _ in split_batch(examples):
        before_microbatch()
        with split_batch.packer.memory_hint(batch):
            sums = torch.stack((response_logps(policy, batch).sums, reference.logps(batch).sums))
        if scale:
            computed.append(sums)
    share = [torch.cat(computed, dim=1).cpu()] if computed else []  # one copy, since each one waits for a GPU
    shares = split_batch.ranks.gather_shares(share)
    policy_sums, reference_sums = torch.cat([sums for share in shares for sums in share], dim=1)
    return policy_sums, reference_sums


class ComputedReference(Reference):
    """A reference that computes; what every evaluation repeats is computed only once, and again after `forget`."""

    def __init__(self, sampler: Sampler | None):
        self.sampler = sampler
        self.samples: list[TokenizedExample] | None = None
        self.known: dict[bytes, Logps] = {}  # of finished evaluations, by the tokens of a microbatch
        self.new: dict[bytes, Logps] | None = None  # of the current evaluation

    @abstractmethod
    def compute(self, batch: PackedBatch) -> Logps:
        """Compute the log-probabilities of the batch's responses."""

    @abstractmethod
    def sample(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        """Sample one response per prompt."""

    @torch.no_grad()
    def logps(self, batch: PackedBatch) -> Logps:
        if self.new is None:
            return self.compute(batch)
        tokens = [(one.prompt, one.responses, one.loss_masks) for one in batch.examples]  # KTO swaps responses
        key = hashlib.sha256(repr(tokens).encode()).digest()
        if key in self.known:
            return self.known[key]
        self.new[key] = self.compute(batch)
        return self.new[key]

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Keep the log-probabilities computed inside, unless an error occurs, and reuse those of earlier contexts.

        A microbatch that occurs twice inside is computed twice, so that all ranks run the same number of forward
        passes.
        """
        self.new = {}
        try:
            yield
            self.known |= self.new
        finally:
            self.new = None

    def forget(self) -> None:
        """Drop the kept values, since the weights have changed."""
        self.samples = None
        self.known = {}

    def generate(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        if self.samples is None:
            self.samples = self.sample(prompts)
        return self.samples


class ModelReference(ComputedReference):
    """A second model, computed in dtype if its parameters are in float32, else in their own dtype."""

    def __init__(self, module: ResponseLogps, dtype: torch.dtype, sampler: Sampler | None = None):
        super().__init__(sampler)
        self.module = module
        self.in_float32 = module.model.dtype == torch.float32
        if self.in_float32 and dtype != torch.float32:
            store_linear_weights(module.model, dtype)

    def compute(self, batch: PackedBatch) -> Logps:
        if self.in_float32:  # under the caller's autocast, like the policy
            return response_logps(self.module, batch)
        with torch.autocast(batch.targets.device.type, enabled=False):
            return response_logps(self.module, batch)

    def sample(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        assert self.sampler is not None
        return self.sampler.sample(self.module.model, prompts, "sampling the reference")


class SyncedReference(ModelReference):
    """A second model that follows the policy: TR-DPO, arXiv 2404.09656.

    After every `every` updates its weights become mix * the policy's + (1 - mix) * its own: hard at mix=1, else soft.
    """

    def __init__(self, module: ResponseLogps, policy: ResponseLogps, sampler: Sampler, every: int, mix: float):
        super().__init__(module, module.model.dtype, sampler)  # the weights keep the policy's dtype
        self.policy = policy
        self.every = every
        self.mix = mix

    @torch.no_grad()
    def after_update(self, n_updates: int) -> None:
        if n_updates % self.every == 0:
            self.forget()
            for weights, policy_weights in zip(self.module.parameters(), self.policy.parameters(), strict=True):
                weights.lerp_(policy_weights, self.mix)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.module.model.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.forget()
        self.module.model.load_state_dict(state)


def store_linear_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Store the weights of linear layers in the dtype that autocast would cast them to; results stay the same.

    Weights shared with an embedding keep their dtype, since autocast does not cast embeddings.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and id(module.weight) not in embeddings:
            module.to(dtype)


class AdapterReference(ComputedReference):
    """The policy without its adapter, or with a frozen adapter instead; there is no second model."""

    def __init__(self, policy: ResponseLogps, adapter: AdapterWeights, sampler: Sampler):
        super().__init__(sampler)
        self.policy = policy
        self.adapter = adapter

    def compute(self, batch: PackedBatch) -> Logps:
        with self.adapter.as_reference():
            return response_logps(self.policy, batch)

    def sample(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        assert self.sampler is not None
        with self.adapter.as_reference():
            return self.sampler.sample(self.policy.model, prompts, "sampling the reference")


class CachedReference(Reference):
    """Log-probabilities of responses, and samples, computed before the first update.

    `sums` is (examples, n_responses): a row per example of the training data, then of the evaluation data, NaN until
    computed.
    """

    knows_any_response = False
    mitigation = "set loss.precompute_reference=false"

    def __init__(self, n_examples: int, n_responses: int, samples: list[TokenizedExample] | None = None):
        self.sums = torch.full((n_examples, n_responses), torch.nan)
        self.samples = samples

    def logps(self, batch: PackedBatch) -> Logps:
        sums = self.sums[self.rows(batch.examples)]
        return Logps(sums=sums.to(batch.targets.device, non_blocking=True), lengths=batch.lengths)

    def generate(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        assert self.samples is not None and len(self.samples) == len(prompts)
        return self.samples

    def rows(self, examples: Sequence[TokenizedExample]) -> torch.Tensor:
        rows = torch.tensor([example.index for example in examples])
        assert 0 <= rows.min() and rows.max() < len(self.sums), "the cache was not made for this example"
        return rows

    def missing(self) -> list[int]:
        """The numbers of the examples that are not computed yet."""
        indices: list[int] = self.sums.isnan().any(dim=1).nonzero()[:, 0].tolist()
        return indices

    def fill(self, batch: PackedBatch, logps: Logps) -> None:
        self.sums[self.rows(batch.examples)] = logps.sums.float().cpu()

    def merge(self, sums: Iterable[torch.Tensor]) -> None:
        """Fill missing values from other caches."""
        for other in sums:
            self.sums = torch.where(self.sums.isnan(), other, self.sums)

    def save(self, path: Path, key: str) -> None:
        """Write the cache atomically, with the key of everything that its numbers depend on."""
        content = {"values": self.sums, "key": key, "sha256": checksum(self.sums)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda staging: torch.save(content, staging))
        except (OSError, RunError) as error:  # not fatal: a later run computes it again
            log_message(f"{path}: cannot be written ({error}), so a later run may compute it again.")

    def load(self, path: Path, key: str) -> bool:
        """Read a cache that was written under this key; False if there is no valid one."""
        try:
            stored = torch.load(path, weights_only=True)
            sums = stored["values"]
            is_valid = stored["key"] == key and sums.shape == self.sums.shape and stored["sha256"] == checksum(sums)
        except Exception:  # torch raises many kinds for a missing, corrupt or foreign file; the cache is computed then
            return False
        if is_valid:
            self.sums = sums
        return is_valid


def checksum(values: torch.Tensor) -> str:
    """The SHA-256 of a tensor's values: torch reads a flipped bit without an error."""
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
