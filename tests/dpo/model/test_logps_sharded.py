"""ResponseLogps under FSDP2: two processes that share the work compute the gradient of one."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny_models import make_examples, tiny
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo.data.examples import TokenizedExample
from dpo.model.attention import use_attention
from dpo.model.logps import ResponseLogps
from dpo.model.packing import PackedBatch, make_microbatches


class Case(NamedTuple):
    """What is sharded.

    chunk: the number of tokens whose logits are computed at a time; apart: shard body and head by themselves too.
    """

    family: str
    layout: str
    float32_head: bool = False
    chunk: int = 128
    apart: bool = False

    def __str__(self) -> str:
        return "-".join(map(str, self))


CASES = (
    Case("Llama", "shared_prefix"),
    Case("Llama", "padded", apart=True),
    Case("GPT2", "shared_prefix", float32_head=True, chunk=5),  # its output embeddings are those of the input
    Case("Gemma2", "shared_prefix"),  # the model computes its logits itself
)
EXAMPLES = make_examples([(9, 5, 3), (4, 2, 8), (13, 1, 6), (2, 7, 7), (11, 3, 2), (5, 5, 9), (8, 2, 2)])
OWN = (EXAMPLES[:6], EXAMPLES[6:])  # the examples of each rank: three microbatches or more, and one
WEIGHTS = {example.text: 1.0 + i for i, example in enumerate(EXAMPLES)}  # so that no two examples can be exchanged


def make_module(case: Case) -> ResponseLogps:
    """Make the same module in every process."""
    module = ResponseLogps.wrap(tiny(case.family), case.float32_head)
    use_attention(module.model, "packed")
    assert module.separate_head == (case.family != "Gemma2")
    return module


def microbatches(case: Case, examples: Sequence[TokenizedExample]) -> list[PackedBatch]:
    return list(make_microbatches(examples, case.layout, 45 if case.layout == "shared_prefix" else 70))


def backward(module: ResponseLogps, batch: PackedBatch, scale: float) -> None:
    """Run the backward pass of a weighted sum of log-probabilities."""
    weights = torch.tensor([WEIGHTS[example.text] for example in batch.examples for _ in example.responses])
    per_token = weights.repeat_interleave(batch.lengths.flatten())
    (module(batch) @ per_token * scale / len(EXAMPLES)).backward()


def with_repeats(own: list[PackedBatch]) -> Iterator[tuple[PackedBatch, float, bool]]:
    """Yield as many (microbatch, weight, last) as the rank with the most has: of those missing, one with weight 0."""
    n = torch.tensor(len(own))
    dist.all_reduce(n, dist.ReduceOp.MAX)
    for i in range(int(n)):
        yield own[min(i, len(own) - 1)], float(i < len(own)), i == n - 1


def sharded_gradients(rank: int, n: int, folder: Path) -> None:
    """Write the gradient of each case, by parameter, as one of n processes computes it with the others."""
    dist.init_process_group("gloo")
    for case in CASES:
        module = make_module(case)
        for layer in module.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                fully_shard(layer)
        for part in (module.model.base_model, module.head) if case.apart else ():
            fully_shard(part)
        fully_shard(module)
        own = microbatches(case, OWN[rank])
        assert (len(own) >= 3) == (rank == 0) and len(own) >= 1
        with mock.patch.multiple("dpo.model.logps", CHUNK_BYTES=0, CHUNK_TOKENS=case.chunk):
            for batch, weight, last in with_repeats(own):
                module.set_requires_gradient_sync(last)
                # FSDP2 averages over the ranks, and gloo knows no other divisor.
                backward(module, batch, weight * n)
        parameters = dict(module.model.named_parameters())
        assert all(isinstance(parameter, DTensor) for parameter in parameters.values())
        gradients = {name: parameter.grad.full_tensor() for name, parameter in parameters.items()}
        if rank == 0:
            torch.save(gradients, folder / f"{case}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """The folder with the gradients that two processes computed together."""
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(len(OWN), sharded_gradients, folder)
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_with_unequal_work_compute_the_gradient_of_one(sharded, case):
    module = make_module(case)
    for batch in microbatches(case, EXAMPLES):
        backward(module, batch, 1.0)
    expected = {name: parameter.grad for name, parameter in module.model.named_parameters()}
    actual = torch.load(sharded / f"{case}.pt")
    assert actual.keys() == expected.keys()
    difference, norm = (
        torch.cat([gradient.flatten().double() for gradient in gradients]).norm()
        for gradients in ([actual[name] - expected[name] for name in expected], expected.values())
    )
    assert difference < 1e-6 * norm
