"""Where a preference loss gets the reference's log-probabilities: a second model, the policy's base, or a cache."""

import hashlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from dpo.data.examples import TextExample, TokenizedExample
from dpo.distributed.splitting import BatchSplitter
from dpo.model.logps import Logps, ResponseLogps, response_logps
from dpo.model.packing import PackedBatch
from dpo.model.sampling import Sampler
from dpo.runs.weights import AdapterWeights
from dpo.system.console import log_message
from dpo.system.errors import RunError
from dpo.system.files import atomic_write

OTHER_WAYS = "try another device, precision or layout, or another version of the model's libraries"
ROUNDED = 0.05  # nats per token: far more than rounding moves a response's mean, less than another model does


class Reference(Protocol):
    """The frozen model that a policy is compared with, as a trainer sees it."""

    knows_any_response: bool = True  # whether `logps` takes responses beyond those of the data, such as samples
    # How far it may be from the policy before the first update, in nats per token on average; infinity: not compared.
    start_tolerance: float = 0.0
    mitigation: str = OTHER_WAYS  # where it is further away

    def logps(self, batch: PackedBatch) -> Logps:
        """Return the log-probabilities of the batch's responses."""

    def generate(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        """Return each prompt with one sampled response, the same at every call while the reference stays."""

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Run passes that come again, the same ones, in every evaluation; some references compute them once."""
        yield

    def after_update(self, n_updates: int) -> None:
        """Follow the policy, of which n_updates have been made; most references stay."""
        return

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs; nothing where the reference stays what the policy was at the start."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load what `state_dict` returned."""
        return


def repeated(reference: Reference | None) -> AbstractContextManager[None]:
    """Return a context for passes that come again in every evaluation, with the reference if there is one."""
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

    Each rank computes its share, and all return all of them, on the host. before_microbatch may stop it, on all ranks.
    """
    assert reference is not None
    computed = []
    for batch, scale, _ in split_batch(examples):
        before_microbatch()
        with split_batch.packer.memory_hint(batch):
            sums = torch.stack((response_logps(policy, batch).sums, reference.logps(batch).sums))
        if scale:
            computed.append(sums.cpu())
    shares = split_batch.ranks.gather_shares(computed)
    policy_sums, reference_sums = torch.cat([sums for share in shares for sums in share], dim=1)
    return policy_sums, reference_sums


class ComputedReference(Reference):
    """A reference that computes; what comes again in every evaluation is computed once, or after `forget` once more."""

    def __init__(self, sampler: Sampler | None):
        self.sampler = sampler
        self.samples: list[TokenizedExample] | None = None
        self.known: dict[bytes, Logps] = {}  # of the passes of evaluations that ended, by their tokens
        self.new: dict[bytes, Logps] | None = None  # of the passes of an evaluation that runs

    @abstractmethod
    def compute(self, batch: PackedBatch) -> Logps:
        """Compute the log-probabilities of the batch's responses."""

    @abstractmethod
    def sample(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        """Return each prompt with one sampled response."""

    @torch.no_grad()
    def logps(self, batch: PackedBatch) -> Logps:
        """Return the log-probabilities of the batch's responses."""
        if self.new is None:
            return self.compute(batch)
        tokens = [(example.prompt, example.responses) for example in batch.examples]  # KTO pairs texts with others'
        key = hashlib.sha256(repr(tokens).encode()).digest()
        if key in self.known:
            return self.known[key]
        self.new[key] = self.compute(batch)
        return self.new[key]

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Keep the log-probabilities of the passes within, if all succeed, and compute none that is kept.

        A pass that comes twice within is computed twice, so that ranks with different passes compute equally often.
        """
        self.new = {}
        try:
            yield
            self.known |= self.new
        finally:
            self.new = None

    def forget(self) -> None:
        """Compute anew what is kept, since the weights have changed."""
        self.samples, self.known = None, {}

    def generate(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        """Return each prompt with one sampled response."""
        if self.samples is None:
            self.samples = self.sample(prompts)
        return self.samples


class ModelReference(ComputedReference):
    """A second model, computed in dtype where its parameters are in float32, else in their own dtype."""

    def __init__(self, module: ResponseLogps, dtype: torch.dtype, sampler: Sampler | None = None):
        super().__init__(sampler)
        self.module = module
        self.in_float32 = module.model.dtype == torch.float32
        if self.in_float32 and dtype != torch.float32:
            store_linear_weights(module.model, dtype)

    def compute(self, batch: PackedBatch) -> Logps:
        """Compute the log-probabilities of the batch's responses."""
        if self.in_float32:  # under the caller's autocast, as the policy
            return response_logps(self.module, batch)
        with torch.autocast(batch.targets.device.type, enabled=False):
            return response_logps(self.module, batch)

    def sample(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        """Return each prompt with one sampled response."""
        assert self.sampler is not None
        return self.sampler.sample(self.module.model, prompts, "sampling the reference")


class SyncedReference(ModelReference):
    """A second model that follows the policy: TR-DPO, arXiv 2404.09656.

    Every some updates its weights become mix * the policy's + (1 - mix) * its own: hard at mix=1, else soft.
    """

    def __init__(self, module: ResponseLogps, policy: ResponseLogps, sampler: Sampler, every: int, mix: float):
        super().__init__(module, module.model.dtype, sampler)  # whose weights stay in the dtype of the policy's
        self.policy, self.every, self.mix = policy, every, mix

    @torch.no_grad()
    def after_update(self, n_updates: int) -> None:
        """Move the weights if it is time to."""
        if n_updates % self.every == 0:
            self.forget()
            for own, new in zip(self.module.parameters(), self.policy.parameters(), strict=True):
                own.lerp_(new, self.mix)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights."""
        return self.module.model.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load the weights."""
        self.forget()
        self.module.model.load_state_dict(state)


def store_linear_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Store the weights of linear layers in the dtype to which autocast would cast them in each pass: same numbers.

    Weights that an embedding shares keep theirs, since autocast does not cast embeddings.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and id(module.weight) not in embeddings:
            module.to(dtype)


class AdapterReference(ComputedReference):
    """The policy without its adapter, or with a frozen one in its place: no second model."""

    def __init__(self, policy: ResponseLogps, adapter: AdapterWeights, sampler: Sampler):
        super().__init__(sampler)
        self.policy, self.adapter = policy, adapter

    def compute(self, batch: PackedBatch) -> Logps:
        """Compute the log-probabilities of the batch's responses."""
        with self.adapter.as_reference():
            return response_logps(self.policy, batch)

    def sample(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        """Return each prompt with one sampled response."""
        assert self.sampler is not None
        with self.adapter.as_reference():
            return self.sampler.sample(self.policy.model, prompts, "sampling the reference")


class CachedReference(Reference):
    """Log-probabilities per response, and samples, computed before the first update, when the policy is the reference.

    `sums` has one row per distinct example, (examples, n_responses), in the order of their digests; NaN where nothing
    is computed yet. No text is kept.
    """

    knows_any_response = False
    mitigation = "set loss.precompute_reference=false"

    def __init__(
        self, examples: Iterable[TextExample], n_responses: int, samples: list[TokenizedExample] | None = None
    ):
        in_order = np.fromiter(map(digest_of, examples), dtype=np.uint64)
        self.order = hashlib.sha256(in_order.tobytes()).hexdigest()  # on which the composition of passes depends
        self.digests = np.unique(in_order)
        if len(self.digests) < len(in_order):  # an example of both splits gets the numbers of one of its microbatches
            self.start_tolerance = ROUNDED
        self.sums = torch.full((len(self.digests), n_responses), torch.nan)
        self.samples = samples

    def logps(self, batch: PackedBatch) -> Logps:
        """Return the log-probabilities of the batch's responses."""
        sums = self.sums[self.rows(example.text for example in batch.examples)]
        return Logps(sums=sums.to(batch.targets.device, non_blocking=True), lengths=batch.lengths)

    def generate(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        """Return the samples that were drawn before the first update."""
        assert self.samples is not None and len(self.samples) == len(prompts)
        return self.samples

    def rows(self, examples: Iterable[TextExample]) -> torch.Tensor:
        """Return the row of each example, (examples,)."""
        wanted = np.fromiter(map(digest_of, examples), dtype=np.uint64)
        rows = np.searchsorted(self.digests, wanted)
        assert (self.digests[rows] == wanted).all(), "an example is not among those that the cache was made for"
        return torch.from_numpy(rows)

    def missing(self, examples: Iterable[TextExample]) -> list[TextExample]:
        """Return the examples that have no log-probabilities yet."""
        left = set(self.digests[self.sums.isnan().any(dim=1).numpy()].tolist())
        return [example for example in examples if digest_of(example) in left]

    def fill(self, batch: PackedBatch, logps: Logps) -> None:
        """Store the log-probabilities of a batch."""
        self.sums[self.rows(example.text for example in batch.examples)] = logps.sums.float().cpu()

    def merge(self, sums: Iterable[torch.Tensor]) -> None:
        """Take the numbers of several caches, each of which lacks those that another one has."""
        for other in sums:
            self.sums = torch.where(self.sums.isnan(), other, self.sums)

    def save(self, path: Path, key: str) -> None:
        """Write the cache, whole or not at all, under the fingerprint of all that its numbers depend on."""
        content = {"values": self.sums, "key": key, "sha256": checksum(self.sums)}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, lambda staging: torch.save(content, staging))
        except (OSError, RunError) as error:  # no reason to stop: it is computed again where it is missed
            log_message(f"{path}: cannot be written ({error}), so it may be computed again.")

    def load(self, path: Path, key: str) -> bool:
        """Take the numbers of a cache written under this key; False if there is none that is whole and fits."""
        try:
            stored = torch.load(path, weights_only=True)
            sums = stored["values"]
            fits = stored["key"] == key and sums.shape == self.sums.shape and stored["sha256"] == checksum(sums)
        except Exception:  # missing, corrupt or another file: torch raises many kinds, and each means to compute it
            return False
        self.sums = sums if fits else self.sums
        return fits


def digest_of(example: TextExample) -> int:
    """Return 64 bits by which an example is known, without its scores, which change no log-probability."""
    content = repr((*example.content, example.row, example.source)).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def checksum(values: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's numbers; torch reads a flipped bit without an error."""
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()
