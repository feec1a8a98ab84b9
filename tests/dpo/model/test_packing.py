"""Layouts and microbatches: which token stands where, and which example lies in which pass."""

import re

import pytest
import torch
from tiny_models import make_examples, mask_responses, respond

from dpo.model.packing import LAYOUTS, Packer, balance, make_microbatches
from dpo.system.errors import RunError

PLENTY = 2**30  # tokens a microbatch
EOS = 4
PAIRS = [respond([3, 3, 3], [1, EOS], [2, 2, 0, EOS]), respond([0], [EOS], [3, 1, EOS]), respond([1] * 9, [2], [0, 0])]


@pytest.mark.parametrize("max_tokens", [PLENTY, 12, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_example_is_in_exactly_one_microbatch_with_its_targets_and_lengths(layout, max_tokens):
    passes = list(make_microbatches(PAIRS, layout, max_tokens))
    assert sorted(PAIRS.index(example) for part in passes for example in part.examples) == [0, 1, 2]
    for part in passes:
        responses = [response for example in part.examples for response in example.responses]
        assert part.targets.tolist() == sum(responses, [])
        assert part.lengths.tolist() == [[len(response) for response in example.responses] for example in part.examples]
        assert len(part.sources) == len(part.targets)
    assert len(passes) == {PLENTY: 1, 1: 3}.get(max_tokens, len(passes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_target_is_predicted_from_the_token_before_it(layout):
    for part in make_microbatches(PAIRS, layout, PLENTY):
        before = part.inputs["input_ids"].flatten()[part.sources].tolist()
        expected = [
            token
            for example in part.examples
            for response in example.responses
            for token in [example.prompt[-1], *response[:-1]]
        ]
        assert before == expected


def test_a_shared_prefix_is_computed_once_and_without_padding():
    (part,) = make_microbatches(PAIRS, "shared_prefix", PLENTY)
    assert part.inputs["input_ids"].tolist() == [
        [*[3, 3, 3], *[1, EOS], *[2, 2, 0, EOS], *[0], *[EOS], *[3, 1, EOS], *[1] * 9, *[2], *[0, 0]]
    ]
    assert part.inputs["position_ids"].tolist() == [
        [*[0, 1, 2], *[3, 4], *[3, 4, 5, 6], *[0], *[1], *[1, 2, 3], *range(9), *[9], *[9, 10]]
    ]
    assert part.segments.tolist() == [
        [0] * 9 + [1] * 5 + [2] * 12,
        [*[0] * 3, *[1] * 2, *[2] * 4, *[0], *[1], *[2] * 3, *[0] * 9, *[1], *[2] * 2],
    ]
    assert part.branch_lengths == ((3, 2, 4), (1, 1, 3), (9, 1, 2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_context_in_a_response_is_computed_and_no_target(layout):
    """Of [5, 6, 7, 8] 5 and 8 are trained: 5 is predicted from the prompt's 4, and 8 from the context's 7."""
    masked = mask_responses(respond([3, 4], [5, 6, 7, 8], [9]), [1, 0, 0, 1], [1])
    (part,) = make_microbatches([masked, PAIRS[0]], layout, PLENTY)
    (whole,) = make_microbatches([respond([3, 4], [5, 6, 7, 8], [9]), PAIRS[0]], layout, PLENTY)
    assert part.targets.tolist() == [5, 8, 9, *[1, EOS], *[2, 2, 0, EOS]]
    assert part.inputs["input_ids"].flatten()[part.sources].tolist() == [4, 7, 4, *[3, 1], *[3, 2, 2, 0]]
    assert part.lengths.tolist() == [[2, 1], [2, 4]]
    assert part.branch_lengths == whole.branch_lengths
    assert all(torch.equal(part.inputs[name], tensor) for name, tensor in whole.inputs.items())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_mask_of_all_tokens_is_none(layout):
    masked = [mask_responses(pair, *([1] * len(response) for response in pair.responses)) for pair in PAIRS]
    for one, other in zip(*(make_microbatches(some, layout, 12) for some in (PAIRS, masked)), strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("sources", "targets", "lengths"))


def test_a_padded_microbatch_has_a_row_per_response_the_first_ones_first_and_masks_what_fills_them():
    (part,) = make_microbatches(PAIRS[:2], "padded", PLENTY)
    rows = [[3, 3, 3, 1, EOS], [0, EOS], [3, 3, 3, 2, 2, 0, EOS], [0, 3, 1, EOS]]
    assert part.inputs["input_ids"].tolist() == [row + [0] * (7 - len(row)) for row in rows]
    assert part.inputs["attention_mask"].tolist() == [[1] * len(row) + [0] * (7 - len(row)) for row in rows]
    assert part.segments is None and part.branch_lengths == ()


@pytest.mark.parametrize("layout, cost", [("shared_prefix", 9 + 5 + 12), ("padded", 11 * 3 * 2)])
def test_examples_that_just_fit_keep_their_order_and_else_the_longest_come_first(layout, cost):
    """26 tokens in all, or 6 rows of 11; one token less, and the last one, of 12 tokens, opens the first pass."""
    (part,) = make_microbatches(PAIRS, layout, cost)
    assert part.n_tokens == cost and list(part.examples) == PAIRS
    passes = [list(part.examples) for part in make_microbatches(PAIRS, layout, cost - 1)]
    assert passes == [[PAIRS[2], PAIRS[0]], [PAIRS[1]]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_tensors_of_a_microbatch_are_on_the_packers_device(layout):
    (part,) = Packer(layout, PLENTY, torch.device("meta"))(PAIRS)
    tensors = [*part.inputs.values(), part.sources, part.targets, part.lengths]
    tensors += [part.segments] if layout == "shared_prefix" else []
    assert {tensor.device.type for tensor in tensors} == {"meta"}


@pytest.mark.parametrize(
    "n, where",
    [
        (1, "9 tokens, 1 examples, the longest of 9 tokens; lower max_length in a new run"),
        (2, "14 tokens, 2 examples, the longest of 9 tokens; lower max_tokens_per_pass, which is 1000"),
    ],
)
def test_a_lack_of_memory_names_the_microbatch_and_the_setting_that_makes_it_smaller(n, where):
    packer = Packer("shared_prefix", 1000, torch.device("cpu"))
    (part,) = packer(PAIRS[:n])
    line = f"out of memory in a microbatch of {where}, or set activation_checkpointing=true (MemoryError)"
    with pytest.raises(RunError, match=f"^{re.escape(line)}$"), packer.memory_hint(part):
        raise MemoryError


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_every_example_lies_in_exactly_one_microbatch_within_the_budget(layout):
    examples = make_examples([(n, n % 5 + 1, n % 3 + 1) for n in range(1, 60, 3)])
    passes = list(make_microbatches(examples, layout, 100))
    assert sorted(e.text.row for p in passes for e in p.examples) == list(range(len(examples)))
    assert all(p.n_tokens <= 100 or len(p.examples) == 1 for p in passes)
    assert 1 < len(passes) < len(examples)


def test_ranks_get_nearly_equal_numbers_of_tokens():
    """9 to rank 0, 8 to 1, 5 to 1 (8 < 9): 13, 4 to 0: 13, 2 to either, the first: 15; all in the batch's order."""
    assert balance([5, 9, 2, 8, 4], 2) == [[1, 2, 4], [0, 3]]
    assert balance([3], 2) == [[0], []]
    assert balance([1, 1, 1, 1], 4) == [[0], [1], [2], [3]]
    assert balance([7, 1, 5], 1) == [[0, 1, 2]]


def test_each_of_as_many_ranks_as_examples_gets_one_even_if_examples_are_empty():
    assert sorted(balance([0, 0, 100], 3)) == [[0], [1], [2]]
