"""Computing a cached reference: the policy's log-probabilities of all responses, before its first update."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path

import torch
import transformers
from torch.distributed.tensor import DTensor

from dpo.data.batches import BatchIterator
from dpo.data.examples import TokenizedExample
from dpo.distributed.ranks import Ranks
from dpo.distributed.splitting import BatchSplitter
from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.lora import reference_weights
from dpo.model.packing import LAYOUTS, Packer
from dpo.system.console import log_message, prefetch, progress
from dpo.system.devices import autocast
from dpo.training.references import ROUNDED, CachedReference

CACHE_VERSION = 4  # part of a cache's key; increase it if the code computes or orders the numbers differently
MAX_MERGED_SHARE = 0.8  # merged examples are used if they have at most this share of the pairs' tokens
PAIRS_SAMPLED = 2000  # to estimate that share
PAIRS_MERGED = 512  # at a time


@dataclass(frozen=True)
class Precomputation:
    """Computes a CachedReference with the policy, before its first update.

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
        key = self.key(reference, is_merged)
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
        prompts = (train.groups[i] for i in range(0, len(train.groups), -(-train.n_items // PAIRS_SAMPLED)))
        pairs = train.tokenize(list(islice((text for group in prompts for text in group), PAIRS_SAMPLED)))
        merged = merge_pairs(pairs, self.packer.layout, self.packer.max_tokens)
        return sum(cost([one]) for one in merged) / sum(cost([pair]) for pair in pairs)

    def compute(self, reference: CachedReference, merged_share: float) -> None:
        train = self.train_batches
        if merged_share <= MAX_MERGED_SHARE:
            log_message(
                "Reference: each response is computed once, together with the others of its prompt: about"
                f" {merged_share:.0%} of the pairs' tokens."
            )
            texts = (text for group in train.groups for text in group)
            n_chunks = -(-train.n_items // PAIRS_MERGED)
            chunks = (train.tokenize(list(islice(texts, PAIRS_MERGED))) for _ in range(n_chunks))
            for pairs in progress(prefetch(chunks), "reference, training data", total=n_chunks):
                self.fill_merged(reference, pairs)
        else:
            epoch = replace(train, n_epochs=1).from_start()
            for batch in progress(prefetch(epoch), "reference, training data", total=len(epoch)):
                self.fill(reference, batch.examples, self.n_microbatches)
        for batch in progress(self.eval_batches.from_start(), "reference, evaluation data"):
            self.fill(reference, batch.examples)
        reference.merge(self.ranks.gather(reference.sums))  # values from other ranks are not missing
        groups = train.groups if train.walks_beyond_first_epoch else []
        left = reference.missing(example for group in groups for example in group)  # less than a batch
        for start in range(0, len(left), train.batch_size):
            self.fill(reference, train.tokenize(left[start : start + train.batch_size]), self.n_microbatches)
        reference.merge(self.ranks.gather(reference.sums))

    def fill(self, reference: CachedReference, examples: Sequence[TokenizedExample], n_microbatches: int = 1) -> None:
        with autocast(self.policy.model.dtype, self.dtype, self.packer.device):
            for batch, scale, _ in self.split_batch(examples, n_microbatches):
                with self.packer.memory_hint(batch):
                    logps = response_logps(self.policy, batch)
                if scale:
                    reference.fill(batch, logps)

    def fill_merged(self, reference: CachedReference, pairs: Sequence[TokenizedExample]) -> None:
        """Compute each response of the pairs once, and store its log-probability for every pair that contains it."""
        logps: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}  # by prompt and response
        merged = sorted(merge_pairs(pairs, self.packer.layout, self.packer.max_tokens), key=n_responses)
        with autocast(self.policy.model.dtype, self.dtype, self.packer.device):
            for _, examples in groupby(merged, key=n_responses):  # a microbatch needs the same number in each example
                for batch, scale, _ in self.split_batch(list(examples)):
                    with self.packer.memory_hint(batch):
                        sums = response_logps(self.policy, batch).sums.tolist()
                    for example, row in zip(batch.examples, sums, strict=True) if scale else ():
                        logps.update(zip(prompt_responses(example), row, strict=True))
        sums_of_pairs = [[logps.get(response, torch.nan) for response in prompt_responses(pair)] for pair in pairs]
        reference.sums[reference.rows(pair.text for pair in pairs)] = torch.tensor(sums_of_pairs)

    def key(self, reference: CachedReference, merged: bool = False) -> str:
        """A SHA-256 of everything that the numbers depend on: weights, texts in order, settings, versions."""
        packer = self.packer
        how = [CACHE_VERSION, self.n_microbatches, packer.layout, packer.max_tokens]
        how += [self.dtype, packer.device.type, self.compiled, self.policy.float32_head]
        if self.ranks.world_size > 1:
            how += [self.ranks.world_size, self.ranks.data_size]
        if merged:
            how.append("merged")
        settings = (self.train_batches.settings(), self.eval_batches.settings(), tuple(how))
        versions = (torch.__version__, transformers.__version__)
        model = self.policy.model
        config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
        content = ((reference.order, settings, versions), config, model.config._attn_implementation)
        digest = hashlib.sha256(repr(content).encode())
        for name, value in reference_weights(model).items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            whole: torch.Tensor = value.full_tensor() if isinstance(value, DTensor) else value
            digest.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def merge_pairs(pairs: Sequence[TokenizedExample], layout: str, max_tokens: int) -> Iterator[TokenizedExample]:
    """Yield examples with each response to a prompt once: as many responses as fit into max_tokens, at least one."""
    texts = {tuple(pair.prompt): pair.text for pair in pairs}
    responses: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {prompt: {} for prompt in texts}
    for pair in pairs:
        responses[tuple(pair.prompt)] |= dict.fromkeys(map(tuple, pair.responses))
    for prompt, distinct in responses.items():
        one = TokenizedExample(texts[prompt], list(prompt), ())
        for response in distinct:
            more = replace(one, responses=(*one.responses, list(response)))
            if one.responses and LAYOUTS[layout].cost([more]) > max_tokens:
                yield one
                more = replace(one, responses=(list(response),))
            one = more
        yield one


def prompt_responses(example: TokenizedExample) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(example.prompt), tuple(response)) for response in example.responses]


def n_responses(example: TokenizedExample) -> int:
    return len(example.responses)
