"""A response that stands in several pairs of a prompt is computed once, and the other data in training's own passes."""

import json
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from conftest import ROOT
from tiny_models import mask_responses, respond

from dpo.distributed.ranks import Ranks
from dpo.distributed.splitting import BatchSplitter, Microbatch
from dpo.model.packing import LAYOUTS
from dpo.training import precomputation
from dpo.training.precomputation import Precomputation, merge_pairs
from dpo.training.references import CachedReference

SHARED = "each response is computed once"
SHORT = ("max_length=96", "max_prompt_length=48", "batch_size=4", "eval_batch_size=4", "max_tokens_per_pass=300")


@pytest.fixture
def rankings(tmp_path):
    """The setting of a data set with 3 prompts that have 4 answers each, all 6 pairs of them."""
    rows = []
    for i in range(3):
        answers = [f" It is {i + k}, " + "and so on, " * k + "as I said." for k in range(4)]
        pairs = combinations(answers, 2)
        rows += [{"prompt": f"\n\nHuman: How much is {i}?\n\nAssistant:", "chosen": a, "rejected": b} for a, b in pairs]
    for name, some in (("train", rows), ("test", rows[:4])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return f"datasets=['{tmp_path}']"


@pytest.fixture
def precompute(make_trainer, tmp_path):
    """A function that builds a trainer with a cached reference."""
    cached = ("loss=dpo", "loss.precompute_reference=true", f"local_dirs=['{tmp_path}']", "n_epochs=1")
    return lambda *overrides: make_trainer(*cached, *SHORT, *overrides)


# Merged examples


def test_each_response_to_a_prompt_is_kept_once_in_the_order_of_the_pairs():
    pairs = [respond([1], [2], [3]), respond([1], [4, 5], [2]), respond([9], [2], [3])]
    merged = list(merge_pairs(pairs, "shared_prefix", 100))
    assert [(one.prompt, one.responses) for one in merged] == [([1], ([2], [3], [4, 5])), ([9], ([2], [3]))]


def test_a_merged_example_has_no_more_tokens_than_a_microbatch_unless_it_holds_a_single_response():
    pairs = [respond([1], [2], [3]), respond([1], [4, 5], [6, 7, 8, 9])]
    assert [one.responses for one in merge_pairs(pairs, "shared_prefix", 4)] == [([2], [3]), ([4, 5],), ([6, 7, 8, 9],)]
    assert [one.responses for one in merge_pairs(pairs, "shared_prefix", 5)] == [([2], [3], [4, 5]), ([6, 7, 8, 9],)]


def test_a_padded_merged_example_fits_into_a_microbatch_with_its_padding():
    """Three rows of 1 + 2 tokens, or two of 1 + 4."""
    pairs = [respond([1], [2], [3]), respond([1], [4, 5], [6, 7, 8, 9])]
    assert [one.responses for one in merge_pairs(pairs, "padded", 9)] == [([2], [3], [4, 5]), ([6, 7, 8, 9],)]


# Caches


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_shared_responses_are_computed_once_and_get_the_numbers_of_a_second_model(
    layout, precompute, rankings, make_trainer, capsys, monkeypatch
):
    passes, compute = [], precomputation.response_logps
    monkeypatch.setattr(
        precomputation, "response_logps", lambda module, batch: passes.append(batch) or compute(module, batch)
    )
    trainer = precompute(rankings, f"layout={layout}")
    cost = LAYOUTS[layout].cost
    pairs = list(trainer.train_batches.examples)
    merged = list(merge_pairs(pairs, layout, 300))
    share = sum(cost([one]) for one in merged) / sum(cost([pair]) for pair in pairs)
    assert len(pairs) == 18 and sum(len(one.responses) for one in merged) == 12 and share < 0.5
    out = capsys.readouterr().out
    assert f"{SHARED}, together with the others of its prompt: about {share:.0%} of the pairs' tokens" in out
    n = sum(len(batch.lengths.flatten()) for batch in passes)
    assert n == 12 + 2 * 4  # then the evaluation's pairs
    assert max(batch.n_tokens for batch in passes) <= 300
    live = make_trainer("loss=dpo", *SHORT, rankings, f"layout={layout}").reference
    assert isinstance(trainer.reference, CachedReference)
    for batch in trainer.packer(pairs):
        torch.testing.assert_close(trainer.reference.logps(batch).sums, live.logps(batch).sums, rtol=0, atol=1e-3)


@pytest.mark.parametrize("other", ["n_examples=8", f"datasets=['{ROOT / 'tests' / 'goldens' / 'data'}']"])
def test_less_than_an_epoch_and_pairs_that_share_nothing_are_computed_in_the_microbatches_of_training(
    other, precompute, rankings, make_trainer, capsys
):
    trainer = precompute(rankings, other)
    assert SHARED not in capsys.readouterr().out
    live = make_trainer("loss=dpo", *SHORT, rankings, other).reference
    batch = next(iter(trainer.train_batches.from_start()))
    for part in trainer.packer(batch.examples):
        assert torch.equal(trainer.reference.logps(part).sums, live.logps(part).sums)


def test_merged_examples_and_training_have_caches_of_their_own(precompute, rankings, capsys, monkeypatch):
    precompute(rankings)
    capsys.readouterr()
    precompute(rankings)
    assert "read from" in capsys.readouterr().out
    monkeypatch.setattr(precomputation, "MAX_MERGED_SHARE", 0.0)
    precompute(rankings)
    assert "read from" not in capsys.readouterr().out


def test_pairs_are_merged_in_chunks_and_equally_many_responses_share_microbatches(precompute, rankings, monkeypatch):
    """18 pairs in one chunk: 3 examples of 4 responses. Chunks of 5 cut the prompts, to the same sums."""
    passes, compute = [], precomputation.response_logps
    monkeypatch.setattr(precomputation.CachedReference, "load", lambda *arguments: False)
    monkeypatch.setattr(
        precomputation, "response_logps", lambda module, batch: passes.append(batch) or compute(module, batch)
    )
    whole = precompute(rankings, "max_tokens_per_pass=100000").reference.sums
    assert passes[0].lengths.shape == (3, 4)
    monkeypatch.setattr(precomputation, "PAIRS_MERGED", 5)
    torch.testing.assert_close(precompute(rankings).reference.sums, whole, rtol=0, atol=1e-3)


class Half(Ranks):
    """One of two ranks, each of which computes every second example, and the first one again with scale 0."""

    world_size = 2

    def __init__(self, rank, kept):
        self.rank, self.kept = rank, kept

    def gather(self, value):
        return [value, *self.kept]


class SplitInHalves(BatchSplitter):
    def __call__(self, examples, n_equal=1):
        for example in examples[self.ranks.rank :: 2]:
            yield Microbatch(next(self.packer([example])), 2.0, False)
        yield Microbatch(next(self.packer(examples[:1])), 0.0, True)


def test_ranks_compute_a_part_each_and_together_all(precompute, rankings, monkeypatch):
    made = []
    monkeypatch.setattr(
        precomputation.Precomputation, "run", lambda self, reference, *paths: made.append((self, reference))
    )
    precompute(rankings, "max_tokens_per_pass=100")
    ((alone, reference),) = made

    def compute(split_batch):
        reference.sums.fill_(torch.nan)
        replace(alone, split_batch=split_batch).compute(reference, merged_share=0.5)
        return reference.sums.clone()

    whole = compute(alone.split_batch)
    first = compute(SplitInHalves(alone.packer, Half(0, [])))
    both = compute(SplitInHalves(alone.packer, Half(1, [first])))
    assert not whole.isnan().any() and 0 < first.isnan().sum() < first.numel()
    torch.testing.assert_close(both, whole, rtol=0, atol=1e-3)


# Masked responses


def test_the_same_tokens_with_other_masks_are_another_response():
    pairs = [
        mask_responses(respond([1], [2, 3], [4]), [1, 1], [1]),
        mask_responses(respond([1], [2, 3], [4]), [0, 1], [1]),
    ]
    merged = list(merge_pairs([*pairs, respond([1], [2, 3], [5])], "shared_prefix", 100))
    assert [(one.responses, one.loss_masks) for one in merged] == [
        (([2, 3], [4], [2, 3]), ([True, True], [True], [False, True])),
        (([2, 3], [5]), ()),
    ]
    assert [one.loss_masks for one in merge_pairs(pairs, "shared_prefix", 4)] == [
        ([True, True], [True]),
        ([False, True],),
    ]


@pytest.mark.parametrize("merged", [False, True])
def test_masked_responses_get_the_numbers_of_a_second_model(merged, precompute, rankings, make_trainer):
    """Of every other pair, the even tokens; so the same tokens stand in pairs with and without a mask."""
    trainer, live = precompute(rankings), make_trainer("loss=dpo", *SHORT, rankings).reference
    batches = trainer.train_batches
    pairs = list(batches.examples)
    masks = [[[i % 2 == 0 for i in range(len(response))] for response in pair.responses] for pair in pairs]
    pairs = [
        mask_responses(pair, *mask) if i % 2 else pair for i, (pair, mask) in enumerate(zip(pairs, masks, strict=True))
    ]
    splitter = BatchSplitter(trainer.packer)
    computed = Precomputation(trainer.policy, splitter, trainer.dtype, batches, trainer.eval_batches, 1, False)
    trainer.reference.sums.fill_(torch.nan)
    with torch.no_grad():
        (computed.fill_merged if merged else computed.fill)(trainer.reference, pairs)
        for batch in trainer.packer(pairs):
            torch.testing.assert_close(trainer.reference.logps(batch).sums, live.logps(batch).sums, rtol=0, atol=1e-3)
