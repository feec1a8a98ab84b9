"""Computes a cached reference: the policy's log-probabilities of all responses, before its first update."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path

import torch
import transformers
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

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

CACHE_VERSION = 4  # part of a cache's key; raise it where the code computes other numbers or orders them anew
WORTHWHILE = 0.8  # share of the pairs' tokens up to which merged examples are computed in their place
SEEN = 2000  # pairs by which that share is estimated, of prompts from all of the data
MERGED = 512  # pairs that are merged at a time


@dataclass(frozen=True)
class Precomputation:
    """Computes a CachedReference by the policy, before its first update.

    It walks the very passes of the first epoch and of the evaluation, so that these get the numbers that a second model
    would give; what the first epoch leaves out and a later one needs is computed in passes of its own. But where the
    pairs share prompts and responses, as in rankings, each response is computed once, beside the others of its prompt.
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
        """How microbatches are packed."""
        return self.split_batch.packer

    @property
    def ranks(self) -> Ranks:
        """The processes of the run."""
        return self.split_batch.ranks

    @torch.no_grad()
    def run(self, reference: CachedReference, own: Path | None, shared_dir: Path) -> None:
        """Fill the cache, from the run's own file or one in the shared folder where they fit, and write both."""
        merged_share = self.merged_share()
        key = self.key(reference, merged_share <= WORTHWHILE)
        shared = shared_dir / f"{key}.pt"
        paths = [path for path in (own, shared) if path is not None]
        found = self.ranks.run_on_main(lambda: next((path for path in paths if reference.load(path, key)), None))
        if found is not None or merged_share <= WORTHWHILE:  # computed elsewhere, or in other microbatches
            reference.start_tolerance = ROUNDED
        if found is not None:
            log_message(f"Reference: log-probabilities taken from {found}")
        else:
            self.compute(reference, merged_share)
            self.ranks.run_on_main(lambda: reference.save(shared, key))
        reference.sums = self.ranks.run_on_main(lambda: reference.sums)
        if self.train_batches.walks_beyond_first_epoch or merged_share <= WORTHWHILE:
            self.log_rounding(reference)
        if own is not None and found != own:
            self.ranks.run_on_main(lambda: reference.save(own, key))

    def merged_share(self) -> float:
        """Return the tokens of merged examples as a share of the pairs' tokens, over pairs from all of the data.

        1 for less than an epoch, whose pairs alone are worth computing.
        """
        train, cost = self.train_batches, LAYOUTS[self.packer.layout].cost
        if len(train) < train.batches_per_epoch:
            return 1.0
        prompts = (train.groups[i] for i in range(0, len(train.groups), -(-train.n_items // SEEN)))
        pairs = train.tokenize(list(islice((text for group in prompts for text in group), SEEN)))
        merged = merge(pairs, self.packer.layout, self.packer.max_tokens)
        return sum(cost([one]) for one in merged) / sum(cost([pair]) for pair in pairs)

    def compute(self, reference: CachedReference, merged_share: float) -> None:
        """Compute the log-probabilities of all examples that the run will meet."""
        train = self.train_batches
        if merged_share <= WORTHWHILE:
            share = f"{merged_share:.0%} of the pairs' tokens"
            log_message(f"Reference: each response is computed once, beside the others of its prompt: about {share}.")
            texts = (text for group in train.groups for text in group)
            parts = (train.tokenize(list(islice(texts, MERGED))) for _ in range(0, train.n_items, MERGED))
            for pairs in progress(prefetch(parts), "reference, training data", total=-(-train.n_items // MERGED)):
                self.fill_merged(reference, pairs)
        else:
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
            for batch, scale, _ in self.split_batch(examples, n_microbatches):
                with self.packer.memory_hint(batch):
                    logps = response_logps(self.policy, batch)
                if scale:
                    reference.fill(batch, logps)

    def fill_merged(self, reference: CachedReference, pairs: Sequence[TokenizedExample]) -> None:
        """Compute each response of the pairs once, and store its log-probability for every pair that has it."""
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}  # of a prompt and a response
        merged = sorted(merge(pairs, self.packer.layout, self.packer.max_tokens), key=n_responses)
        with autocast(self.policy.model.dtype, self.dtype, self.packer.device):
            for _, examples in groupby(merged, key=n_responses):  # those of a pass have equally many
                for batch, scale, _ in self.split_batch(list(examples)):
                    with self.packer.memory_hint(batch):
                        sums = response_logps(self.policy, batch).sums.tolist()
                    for example, row in zip(batch.examples, sums, strict=True):
                        found |= dict(zip(responses_of(example), row, strict=True)) if scale else {}
        sums_of_pairs = [[found.get(response, torch.nan) for response in responses_of(pair)] for pair in pairs]
        reference.sums[reference.rows(pair.text for pair in pairs)] = torch.tensor(sums_of_pairs)

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

    def key(self, reference: CachedReference, merged: bool = False) -> str:
        """Return the SHA-256 of all that the numbers depend on: weights, texts in their order, settings, versions."""
        packer, model = self.packer, self.policy.model
        kind = (self.dtype, packer.device.type, self.compiled, self.policy.float32_head)
        how = (CACHE_VERSION, self.n_microbatches, packer.layout, packer.max_tokens, *kind)
        ranks = (self.ranks.world_size, self.ranks.data_size)  # which share a batch's passes
        several = ranks if self.ranks.world_size > 1 else ()
        others = (*how, *several, *(["merged"] if merged else []))
        settings = (self.train_batches.settings(), self.eval_batches.settings(), others)
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


def merge(pairs: Sequence[TokenizedExample], layout: str, max_tokens: int) -> Iterator[TokenizedExample]:
    """Yield examples that hold each response to a prompt once, as many in one as max_tokens allow, but at least one."""
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


def responses_of(example: TokenizedExample) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return prompt and response for each response of an example."""
    return [(tuple(example.prompt), tuple(response)) for response in example.responses]


def n_responses(example: TokenizedExample) -> int:
    """Return how many responses an example has."""
    return len(example.responses)
