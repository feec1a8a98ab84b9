"""Computing a cached reference: log-probabilities of all responses, before the policy's first update."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice, repeat
from pathlib import Path

import torch
import transformers
from torch.distributed.tensor import DTensor

from dpo.data.batches import BatchIterator
from dpo.data.examples import TokenizedExample
from dpo.distributed.ranks import Ranks
from dpo.distributed.splitting import BatchSplitter
from dpo.model.logps import Logps, ResponseLogps, response_logps
from dpo.model.lora import reference_weights
from dpo.model.packing import LAYOUTS, PackedBatch, Packer
from dpo.system.console import log_message, prefetch, progress
from dpo.system.devices import autocast
from dpo.training.references import ROUNDED, AdapterReference, CachedReference, ModelReference

CACHE_VERSION = 5  # part of a cache's key; increase it if the code computes or orders the numbers differently
MAX_MERGED_SHARE = 0.8  # merged examples are used if they have at most this share of the pairs' tokens
PAIRS_SAMPLED = 2000  # to estimate that share
PAIRS_MERGED = 512  # at a time

Response = tuple[tuple[int, ...], tuple[bool, ...]]  # its tokens and its loss mask, which is () without one


@dataclass(frozen=True)
class Precomputation:
    """Computes a CachedReference before the policy's first update: with a reference, or None: with the policy itself.

    It uses the microbatches of the first epoch and of the evaluation, so that they get the numbers that a second model
    would give. Examples that the first epoch leaves out, but a later one needs, are computed afterwards. If pairs share
    prompts and responses, as in rankings, each response is computed only once, together with the others of its prompt.
    """

    policy: ResponseLogps
    split_batch: BatchSplitter
    dtype: torch.dtype
    train_batches: BatchIterator
    eval_batches: BatchIterator
    n_microbatches: int
    compiled: bool
    reference: ModelReference | AdapterReference | None = None

    @property
    def packer(self) -> Packer:
        return self.split_batch.packer

    @property
    def ranks(self) -> Ranks:
        return self.split_batch.ranks

    @torch.no_grad()
    def run(self, reference: CachedReference, run_path: Path | None, shared_dir: Path) -> None:
        """Load the cache from the run's file or the shared folder; if neither has it, compute it. Write both files."""
        merged_share = self.merged_share()
        is_merged = merged_share <= MAX_MERGED_SHARE
        key = self.key(is_merged)
        shared = shared_dir / f"{key}.pt"
        paths = [path for path in (run_path, shared) if path is not None]
        source = self.ranks.run_on_main(lambda: next((path for path in paths if reference.load(path, key)), None))
        if source is not None or is_merged:  # computed elsewhere, or in other microbatches
            reference.start_tolerance = ROUNDED
        if source is not None:
            log_message(f"Reference: log-probabilities read from {source}")
        else:
            self.compute(reference, merged_share)
            self.ranks.run_on_main(lambda: reference.save(shared, key))
        reference.sums = self.ranks.run_on_main(lambda: reference.sums)
        if run_path is not None and source != run_path:
            self.ranks.run_on_main(lambda: reference.save(run_path, key))

    def merged_share(self) -> float:
        """Estimate the tokens of merged examples as a share of the pairs' tokens, from pairs across the data set.

        1 for a run of less than an epoch, which needs only some of the pairs.
        """
        train = self.train_batches
        cost = LAYOUTS[self.packer.layout].cost
        if len(train) < train.batches_per_epoch:
            return 1.0
        pairs = sample_groups(train)
        merged = merge_pairs(pairs, self.packer.layout, self.packer.max_tokens)
        return sum(cost([one]) for one in merged) / sum(cost([pair]) for pair in pairs)

    def compute(self, reference: CachedReference, merged_share: float) -> None:
        train = self.train_batches
        if merged_share <= MAX_MERGED_SHARE:
            log_message(
                "Reference: each response is computed once, together with the others of its prompt: about"
                f" {merged_share:.0%} of the pairs' tokens."
            )
            n_chunks = -(-train.n_items // PAIRS_MERGED)
            pairs_in_order = iter(train.examples)
            chunks = (list(islice(pairs_in_order, PAIRS_MERGED)) for _ in range(n_chunks))
            for pairs in progress(prefetch(chunks), "reference, training data", total=n_chunks):
                self.fill_merged(reference, pairs)
        else:
            epoch = replace(train, n_epochs=1).from_start()
            for batch in progress(prefetch(epoch), "reference, training data", total=len(epoch)):
                self.fill(reference, batch.examples, self.n_microbatches)
        for batch in progress(self.eval_batches.from_start(), "reference, evaluation data"):
            self.fill(reference, batch.examples)
        reference.merge(self.ranks.gather(reference.sums))  # values from other ranks are not missing
        left = [i for i in reference.missing() if i < train.n_items] if train.walks_beyond_first_epoch else []
        for start in range(0, len(left), train.batch_size):  # less than a batch
            examples = [train.examples[i] for i in left[start : start + train.batch_size]]
            self.fill(reference, examples, self.n_microbatches)
        reference.merge(self.ranks.gather(reference.sums))

    def fill(self, reference: CachedReference, examples: Sequence[TokenizedExample], n_microbatches: int = 1) -> None:
        with autocast(self.policy.model.dtype, self.dtype, self.packer.device):
            for batch, scale, _ in self.split_batch(examples, n_microbatches):
                with self.packer.memory_hint(batch):
                    logps = self.compute_logps(batch)
                if scale:
                    reference.fill(batch, logps)

    def fill_merged(self, reference: CachedReference, pairs: Sequence[TokenizedExample]) -> None:
        """Compute each response of the pairs once, and store its log-probability for every pair that contains it."""
        logps: dict[tuple[tuple[int, ...], Response], float] = {}  # by prompt and response
        merged = sorted(merge_pairs(pairs, self.packer.layout, self.packer.max_tokens), key=n_responses)
        with autocast(self.policy.model.dtype, self.dtype, self.packer.device):
            for _, examples in groupby(merged, key=n_responses):  # a microbatch needs the same number in each example
                for batch, scale, _ in self.split_batch(list(examples)):
                    with self.packer.memory_hint(batch):
                        sums = self.compute_logps(batch).sums.tolist()
                    for example, row in zip(batch.examples, sums, strict=True) if scale else ():
                        logps.update(zip(prompt_responses(example), row, strict=True))
        sums_of_pairs = [[logps.get(response, torch.nan) for response in prompt_responses(pair)] for pair in pairs]
        reference.sums[reference.rows(pairs)] = torch.tensor(sums_of_pairs)

    def compute_logps(self, batch: PackedBatch) -> Logps:
        return response_logps(self.policy, batch) if self.reference is None else self.reference.compute(batch)

    def key(self, merged: bool = False) -> str:
        """A SHA-256 of everything that the numbers depend on: weights, examples in order, settings, versions."""
        packer = self.packer
        how = [CACHE_VERSION, self.n_microbatches, packer.layout, packer.max_tokens]
        how += [self.dtype, packer.device.type, self.compiled, self.policy.float32_head]
        if self.ranks.world_size > 1:
            how += [self.ranks.world_size, self.ranks.data_size]
        if merged:
            how.append("merged")
        model = self.policy.model
        if isinstance(self.reference, ModelReference):
            how.append(model.dtype)  # of the policy, which decides about autocast
            model = self.reference.module.model
        config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
        settings = (self.train_batches.settings(), self.eval_batches.settings(), tuple(how))
        versions = (torch.__version__, transformers.__version__)
        order = (self.train_batches.examples.digest(), self.eval_batches.examples.digest())
        content = ((order, settings, versions), config, model.config._attn_implementation)
        digest = hashlib.sha256(repr(content).encode())
        for name, value in reference_weights(model).items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            whole: torch.Tensor = value.full_tensor() if isinstance(value, DTensor) else value
            digest.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def sample_groups(train: BatchIterator) -> list[TokenizedExample]:
    """Examples of groups across the training data: whole groups, since prompts are what they share."""
    ends = train.examples.sizes.cumsum()
    every = -(-train.n_items // PAIRS_SAMPLED)
    indices = (
        i
        for end, size in zip(ends[::every], train.examples.sizes[::every], strict=True)
        for i in range(end - size, end)
    )
    return [train.examples[i] for i in islice(indices, PAIRS_SAMPLED)]


def merge_pairs(pairs: Sequence[TokenizedExample], layout: str, max_tokens: int) -> Iterator[TokenizedExample]:
    """Yield examples with each response to a prompt once: as many responses as fit into max_tokens, at least one."""
    by_prompt: dict[tuple[tuple[int, ...], bool], list[TokenizedExample]] = defaultdict(list)
    for pair in pairs:
        by_prompt[tuple(pair.prompt), bool(pair.loss_masks)].append(pair)
    for same_prompt in by_prompt.values():
        distinct = dict.fromkeys(response for pair in same_prompt for response in responses_with_masks(pair))
        empty = replace(same_prompt[-1], responses=(), truncated=(), loss_masks=())
        one = empty
        for response, mask in distinct:
            masks = (list(mask),) if mask else ()
            more = replace(one, responses=(*one.responses, list(response)), loss_masks=(*one.loss_masks, *masks))
            if one.responses and LAYOUTS[layout].cost([more]) > max_tokens:
                yield one
                more = replace(empty, responses=(list(response),), loss_masks=masks)
            one = more
        yield one


def responses_with_masks(example: TokenizedExample) -> list[Response]:
    masks = map(tuple, example.loss_masks or repeat((), len(example.responses)))
    return list(zip(map(tuple, example.responses), masks, strict=True))


def prompt_responses(example: TokenizedExample) -> list[tuple[tuple[int, ...], Response]]:
    return [(tuple(example.prompt), response) for response in responses_with_masks(example)]


def n_responses(example: TokenizedExample) -> int:
    return len(example.responses)
