"""dry_run=true for several processes: the memory that each of them will need, computed by one process.

A process group that does not exist shards a copy of the model, by the very code that shards it in training; what one
pass keeps for its backward pass is measured.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpo.data.batches import Batch
from dpo.distributed.launch import count_processes
from dpo.distributed.process_group import ProcessGroup, init_mesh
from dpo.distributed.sharding import layers, without_weights
from dpo.model.loading import recompute_activations
from dpo.model.logps import ResponseLogps
from dpo.model.packing import PackedBatch, balance
from dpo.settings.schema import Settings
from dpo.system.console import log_message
from dpo.system.devices import total_memory
from dpo.system.state import tensors_in
from dpo.training.optimizers import stepped_optimizer
from dpo.training.references import ModelReference
from tools.forecast import MEASURED, Workload

if TYPE_CHECKING:
    from trainers import BasicTrainer

T = TypeVar("T")
Prepare = Callable[..., ResponseLogps]
CASTS = ("ToCopyBackward0", "TBackward0")  # what autocast does to a weight before a product


class PlannedRanks(ProcessGroup):
    """Rank 0, whose shards are the largest, of ranks that do not exist."""

    def __init__(self, n: int):
        self.rank, self.world_size, self.is_main, self.device_type = 0, n, True, "cpu"

    def run_on_main(self, work: Callable[[], T]) -> T:
        return work()


@contextmanager
def planned_ranks(n: int, settings: Settings) -> Iterator[PlannedRanks]:
    """Arrange n ranks as settings ask, all but one of which do not exist."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # PyTorch's own for such purposes

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    try:
        ranks = PlannedRanks(n)
        init_mesh(ranks, settings)
        yield ranks
    finally:
        dist.destroy_process_group()


def print_memory_plan(trainer: "BasicTrainer", settings: Settings, prepare: Prepare) -> None:
    """Print what each of the processes of settings needs, given a new trainer of a process alone."""
    n = count_processes(settings.n_processes, settings.device)
    parts = memory_plan(trainer, settings, prepare, n)
    total, there = sum(parts.values()), total_memory(trainer.device)
    log_message(f"On the process with the most, of {n}:")
    for what, size in parts.items():
        log_message(f"  {what}: {size / 1e9:.3f} GB")
    where = "the memory of a GPU here"
    if trainer.device.type != "cuda":
        there, where = there // n, "its share of the memory here"
    verdict = "fits" if total <= there else "does not fit"
    log_message(
        f"A process needs {total / 1e9:.2f} GB, libraries not counted. That {verdict} into "
        f"{there / 1e9:.1f} GB, {where}."
    )


def memory_plan(trainer: "BasicTrainer", settings: Settings, prepare: Prepare, n: int) -> dict[str, int]:
    """Return the bytes that the process with the most needs, by what they are for.

    Weights, gradients and optimizer state are exact; activations are measured on the pass with the most tokens.
    """
    batch = Workload.of(trainer, MEASURED).longest
    second = trainer.reference.module if isinstance(trainer.reference, ModelReference) else None
    with planned_ranks(n, settings) as ranks:
        passes = passes_of(trainer, batch, ranks.data_size)
        policy = prepare(without_weights(trainer.policy), settings, ranks, trainer.dtype)
        reference = None if second is None else prepare(without_weights(second), settings, ranks, trainer.dtype)
        trained = policy.trained_parameters()
        optimizer = stepped_optimizer(settings, policy)
        state = tensors_in([*optimizer.state.values()])
        models = [policy] if reference is None else [policy, reference]
        gathered = 0 if settings.ddp else sum(gathered_bytes(model, settings, trainer) for model in models)
        several = max(map(len, passes)) > 1 and not settings.reduce_every_pass and not settings.ddp
        found = {
            "weights": sum(map(local_bytes, policy.parameters())),
            "gradients": sum(map(local_bytes, trained)),
            "optimizer state": sum(map(local_bytes, state)),
            "reference": sum(map(local_bytes, reference.parameters())) if reference is not None else 0,
            "gathered layers, embeddings and head": gathered,
            "whole gradient between the passes of an update": sum(map(whole_bytes, trained)) if several else 0,
        }
    if settings.background_saves and trainer.device.type != "cuda":
        found["copy from which a checkpoint is written"] = found["gradients"] + found["optimizer state"]
    longest = max((one for part in passes for one in part), key=lambda one: one.n_tokens)
    what = f"activations of a pass of {longest.n_tokens:,} tokens, measured"
    return found | {what: activation_bytes(trainer, longest, settings)}


def passes_of(trainer: "BasicTrainer", batch: Batch, n: int) -> list[list[PackedBatch]]:
    """Return the forward passes of each of n parts of a batch."""
    examples, n_parts = batch.examples, trainer.settings.gradient_accumulation_steps
    shares = [[examples[i] for i in share] for share in balance(list(map(len, examples)), n)]
    return [list(trainer.packer(share, n_parts)) for share in shares]


def local_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor that a rank holds."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes


def whole_bytes(parameter: Tensor, in_half: bool = False) -> int:
    """Return the bytes of a parameter once it is gathered, in 16 bits or as it is stored.

    Without what other ranks of a tensor-parallel group hold.
    """
    element = 2 if in_half else parameter.element_size()
    if not isinstance(parameter, DTensor):
        return parameter.numel() * element
    mesh, parts = parameter.device_mesh, 1
    for name, size, placement in zip(mesh.mesh_dim_names or (), mesh.shape, parameter.placements, strict=True):
        parts *= size if name == "tensor" and placement.is_shard() else 1
    return parameter.numel() * element // parts


def gathered_bytes(module: ResponseLogps, settings: Settings, trainer: "BasicTrainer") -> int:
    """Return the bytes that are gathered at a time: two layers, and all that is in none, in the dtype of a pass."""
    own = layers(module.model, settings.model.block_name)
    in_half = trainer.device.type == "cuda" and trainer.dtype == torch.bfloat16

    def size_of(part: nn.Module) -> int:
        return sum(whole_bytes(parameter, in_half) for parameter in part.parameters())

    sizes = sorted(map(size_of, own))
    return size_of(module) - sum(sizes) + sum(sizes[-2:])


def activation_bytes(trainer: "BasicTrainer", batch: PackedBatch, settings: Settings) -> int:
    """Return the bytes that a pass keeps for its backward pass.

    With activation checkpointing they are what is kept besides the layers, the input of each, and a layer's own at a
    time.
    """
    model = trainer.policy.model
    if not settings.activation_checkpointing:
        return kept_bytes(trainer, batch)
    own, inputs = layers(model, settings.model.block_name), []
    recompute_activations(model, on=False)
    in_all = kept_bytes(trainer, batch)
    recompute_activations(model)
    handles = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0].nbytes)) for layer in own]
    outside = kept_bytes(trainer, batch)
    for handle in handles:
        handle.remove()
    return outside + sum(inputs) + (in_all - outside) // len(own)


def kept_bytes(trainer: "BasicTrainer", batch: PackedBatch) -> int:
    """Return the bytes that a forward pass keeps for its backward pass, each once, without parameters."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.policy.parameters()}
    frozen = {
        tuple(sorted(parameter.shape)) for parameter in trainer.policy.parameters() if not parameter.requires_grad
    }
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # so that no address is used twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not is_cast_weight(tensor, frozen):
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor.detach())
        return tensor

    trainer.policy.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), trainer.autocast():
        trainer.policy(batch)
    return sum(kept.values())


def is_cast_weight(tensor: Tensor, frozen: Collection[tuple[int, ...]]) -> bool:
    """Return whether a tensor is a parameter in another dtype, whose memory FSDP shards.

    One of a frozen parameter has no history, and is known by its sizes, in any order.
    """
    if not tensor.requires_grad:
        return tensor.dim() == 2 and tuple(sorted(tensor.shape)) in frozen
    node: Any = tensor.grad_fn
    while node is not None and node.name() in CASTS:
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), nn.Parameter)
