"""Where a preference loss gets the reference's log-probabilities: a second model, the policy's base, or a cache."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from dpo.adapters import AdapterWeights, reference_weights
from dpo.checkpoints import atomic_write
from dpo.console import log_message, prefetch, progress
from dpo.devices import autocast
from dpo.distributed import Ranks
from dpo.errors import RunError, UserError
from dpo.examples import BatchIterator, TextExample, TokenizedExample
from dpo.logps import Logps, ResponseLogps, response_logps
from dpo.packing import PackedBatch, Packer
from dpo.sampling import Sampler

CACHE_VERSION = 4  # part of a cache's key; raise it where the code computes other numbers or orders them anew


class Reference(Protocol):
    """The frozen model that a policy is compared with, as a trainer sees it."""

    knows_any_response: bool = True  # whether `logps` takes responses beyond those of the data, such as samples

    def logps(self, batch: PackedBatch) -> Logps:
        """Return the log-probabilities of the batch's responses."""

    def generate(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        """Return each prompt with one sampled response, the same at every call while the reference stays."""

    def after_update(self, n_updates: int) -> None:
        """Follow the policy, of which n_updates have been made; most references stay."""
        return

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs; nothing where the reference stays what the policy was at the start."""
        return {}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load what `state_dict` returned."""
        return


@torch.no_grad()
def sums_of_logps(
    policy: ResponseLogps,
    reference: Reference | None,
    packer: Packer,
    ranks: Ranks,
    examples: Sequence[TokenizedExample],
    before_pass: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log pi(response) of policy and reference, both (examples, n_responses), in the order of the passes.

    Each rank computes its share, and all return all of them, on the host. before_pass may stop it, on all ranks.
    """
    assert reference is not None
    found = []
    for batch, scale, _ in ranks.passes(packer, examples):
        before_pass()
        with packer.memory_hint(batch):
            sums = torch.stack((response_logps(policy, batch).sums, reference.logps(batch).sums))
        if scale:
            found.append(sums.cpu())
    policy_sums, reference_sums = torch.cat([sums for part in ranks.gather_parts(found) for sums in part], dim=1)
    return policy_sums, reference_sums


class ModelReference(Reference):
    """A second model, computed in dtype where its parameters are in float32, else in their own dtype."""

    def __init__(self, module: ResponseLogps, dtype: torch.dtype, sampler: Sampler | None = None):
        self.module, self.sampler = module, sampler
        self.in_float32 = module.model.dtype == torch.float32
        self.samples: list[TokenizedExample] | None = None
        if self.in_float32 and dtype != torch.float32:
            store_linear_weights(module.model, dtype)

    @torch.no_grad()
    def logps(self, batch: PackedBatch) -> Logps:
        """Return the log-probabilities of the batch's responses."""
        if self.in_float32:  # under the caller's autocast, as the policy
            return response_logps(self.module, batch)
        with torch.autocast(batch.targets.device.type, enabled=False):
            return response_logps(self.module, batch)

    def generate(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        """Return each prompt with one sampled response; the model never changes, so they are sampled once."""
        assert self.sampler is not None
        if self.samples is None:
            self.samples = self.sampler.sample(self.module.model, prompts, "sampling the reference")
        return self.samples


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
            self.samples = None
            for own, new in zip(self.module.parameters(), self.policy.parameters(), strict=True):
                own.lerp_(new, self.mix)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the weights."""
        return self.module.model.state_dict()

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Load the weights."""
        self.module.model.load_state_dict(state)


def store_linear_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Store the weights of linear layers in the dtype to which autocast would cast them in each pass: same numbers.

    Weights that an embedding shares keep theirs, since autocast does not cast embeddings.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and id(module.weight) not in embeddings:
            module.to(dtype)


class AdapterReference(Reference):
    """The policy without its adapter, or with a frozen one in its place: no second model."""

    def __init__(self, policy: ResponseLogps, adapter: AdapterWeights, sampler: Sampler):
        self.policy, self.adapter, self.sampler = policy, adapter, sampler
        self.samples: list[TokenizedExample] | None = None

    @torch.no_grad()
    def logps(self, batch: PackedBatch) -> Logps:
        """Return the log-probabilities of the batch's responses."""
        with self.adapter.as_reference():
            return response_logps(self.policy, batch)

    def generate(self, prompts: Sequence[TokenizedExample]) -> list[TokenizedExample]:
        """Return each prompt with one sampled response; the frozen weights never change, so they are sampled once."""
        if self.samples is None:
            with self.adapter.as_reference():
                self.samples = self.sampler.sample(self.policy.model, prompts, "sampling the reference")
        return self.samples


@torch.no_grad()
def check_first_margin(policy: ResponseLogps, reference: Reference, batch: PackedBatch) -> None:
    """Raise UserError unless a policy that has made no update gives a batch the reference's log-probabilities."""
    policy.eval()
    apart = (response_logps(policy, batch).sums - reference.logps(batch).sums).abs().max().item()
    if apart != 0:
        raise UserError(
            f"lora: the policy begins {apart:.2g} nats from its reference, where it should begin exactly at it; this"
            " model cannot be trained with these settings of lora"
        )


class CachedReference(Reference):
    """Log-probabilities per response, and samples, computed before the first update, when the policy is the reference.

    `sums` has one row per distinct example, (examples, n_responses), in the order of their digests; NaN where nothing
    is computed yet. No text is kept.
    """

    knows_any_response = False

    def __init__(
        self, examples: Iterable[TextExample], n_responses: int, samples: list[TokenizedExample] | None = None
    ):
        in_order = np.fromiter(map(digest_of, examples), dtype=np.uint64)
        self.order = hashlib.sha256(in_order.tobytes()).hexdigest()  # on which the composition of passes depends
        self.digests = np.unique(in_order)
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
    content = repr(tuple(example)[:5]).encode("utf-8", "backslashreplace")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def checksum(values: torch.Tensor) -> str:
    """Return the SHA-256 of a tensor's numbers; torch reads a flipped bit without an error."""
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Precomputation:
    """Computes a CachedReference by the policy, before its first update.

    It walks the very passes of the first epoch and of the evaluation, so that these get the numbers that a second model
    would give; what the first epoch leaves out and a later one needs is computed in passes of its own.
    """

    policy: ResponseLogps
    packer: Packer
    dtype: torch.dtype
    train_batches: BatchIterator
    eval_batches: BatchIterator
    n_microbatches: int
    compiled: bool
    ranks: Ranks

    @torch.no_grad()
    def run(self, reference: CachedReference, own: Path | None, shared_dir: Path) -> None:
        """Fill the cache, from the run's own file or one in the shared folder where they fit, and write both."""
        key = self.key(reference)
        shared = shared_dir / f"{key}.pt"
        paths = [path for path in (own, shared) if path is not None]
        found = self.ranks.on_main(lambda: next((path for path in paths if reference.load(path, key)), None))
        if found is not None:
            log_message(f"Reference: log-probabilities taken from {found}")
        else:
            self.compute(reference)
            self.ranks.on_main(lambda: reference.save(shared, key))
        reference.sums = self.ranks.on_main(lambda: reference.sums)
        if self.train_batches.walks_beyond_first_epoch:
            self.log_rounding(reference)
        if own is not None and found != own:
            self.ranks.on_main(lambda: reference.save(own, key))

    def compute(self, reference: CachedReference) -> None:
        """Compute the log-probabilities of all examples that the run will meet."""
        train = self.train_batches
        epoch = replace(train, n_epochs=1).from_start()
        for batch in progress(prefetch(epoch), "reference, training data", total=len(epoch)):
            self.fill(reference, batch.examples, self.n_microbatches)
        for batch in progress(self.eval_batches.from_start(), "reference, evaluation data"):
            self.fill(reference, batch.examples)
        reference.merge(self.ranks.gather(reference.sums))  # what other ranks have computed is not missing
        groups = train.groups if train.walks_beyond_first_epoch else []
        left = reference.missing(example for group in groups for example in group)  # fewer than fill a batch
        for start in range(0, len(left), train.batch_size):
            self.fill(reference, train.tokenize(left[start : start + train.batch_size]), self.n_microbatches)
        reference.merge(self.ranks.gather(reference.sums))

    def fill(self, reference: CachedReference, examples: Sequence[TokenizedExample], n_microbatches: int = 1) -> None:
        """Compute the examples' log-probabilities in the passes of a batch."""
        with autocast(self.policy.model.dtype, self.dtype, self.packer.device):
            for batch, scale, _ in self.ranks.passes(self.packer, examples, n_microbatches):
                with self.packer.memory_hint(batch):
                    logps = response_logps(self.policy, batch)
                if scale:
                    reference.fill(batch, logps)

    def log_rounding(self, reference: CachedReference) -> None:
        """Print how far the numbers of a few examples move when they share no pass, as in later epochs' passes."""
        examples = next(iter(self.train_batches.from_start())).examples[:8]
        with autocast(self.policy.model.dtype, self.dtype, self.packer.device):
            batches = list(replace(self.packer, max_tokens=1)(examples))
            apart = [(response_logps(self.policy, b).sums - reference.logps(b).sums).abs().flatten() for b in batches]
        moved = torch.cat(apart)
        log_message(
            f"Reference: other passes move a log-probability by {moved.mean():.2g} nats, at most {moved.max():.2g}."
        )

    def key(self, reference: CachedReference) -> str:
        """Return the SHA-256 of all that the numbers depend on: weights, texts in their order, settings, versions."""
        packer, model = self.packer, self.policy.model
        kind = (self.dtype, packer.device.type, self.compiled, self.policy.float32_head)
        how = (CACHE_VERSION, self.n_microbatches, packer.layout, packer.max_tokens, *kind)
        ranks = (self.ranks.world_size, self.ranks.data_size)  # which share a batch's passes
        several = ranks if self.ranks.world_size > 1 else ()
        settings = (self.train_batches.settings(), self.eval_batches.settings(), (*how, *several))
        versions = (torch.__version__, transformers.__version__)
        return fingerprint(model, (reference.order, settings, versions))


def fingerprint(model: PreTrainedModel, settings: object) -> str:
    """Return the SHA-256 of a model's weights and config, and of settings."""
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    digest = hashlib.sha256(repr((settings, config, model.config._attn_implementation)).encode())
    for name, value in reference_weights(model).items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        whole: torch.Tensor = value.full_tensor() if isinstance(value, DTensor) else value
        digest.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
