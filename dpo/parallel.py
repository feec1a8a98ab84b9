"""Sharding a module over devices: FSDP2, HSDP or replicas, by PyTorch's own fully_shard and replicate."""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo.errors import UserError
from dpo.logps import ResponseLogps


def shard(module: ResponseLogps, mesh: DeviceMesh, dtype: torch.dtype, block_name: str | None) -> ResponseLogps:
    """Shard a module's parameters in place: each layer by itself, then what is left (embeddings, norm and head).

    mesh has the dimensions replicate and shard, and perhaps others: within shard every rank holds a part of each
    parameter, and gathers a layer when it computes it; over replicate such groups repeat. With shard of size 1 every
    rank holds all of it.
    """
    options: dict[str, Any] = {"mesh": mesh["replicate", "shard"], "mp_policy": mixed_precision(mesh, dtype)}
    apply: Any = fully_shard
    if mesh["shard"].size() == 1 and mesh["replicate"].size() > 1:
        apply, options["mesh"] = replicate, mesh["replicate"]
    elif mesh["replicate"].size() == 1:
        options["mesh"] = mesh["shard"]
    for layer in layers(module.model, block_name):
        apply(layer, **options)
    apply(module, **options)
    # Sampling enters by generate: gather for it what forward would find gathered. Ranks make the same texts, and
    # synced_gpus lets none of them stop computing, and so gathering, before the others.
    generate: Any = module.model.generate
    module.generate = partial(generate, synced_gpus=True)  # type: ignore[assignment]
    register_fsdp_forward_method(module, "generate")
    module.model.generate = module.generate
    return module


def reshard(module: nn.Module) -> None:
    """Free what forward passes without a backward pass leave gathered; parameters are then those of the optimizer."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def mixed_precision(mesh: DeviceMesh, dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Return how parameters are gathered: on GPUs in the dtype of the computation, with gradients summed in float32.

    On a CPU in float32, since gloo has no bfloat16; autocast casts there as on one device.
    """
    if mesh.device_type == "cpu" or dtype == torch.float32:
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def layers(model: PreTrainedModel, block_name: str | None) -> list[nn.Module]:
    """Return a model's layers: modules of the class block_name, or of transformers' own class of layers.

    UserError if there are none.
    """
    if block_name:
        found = [module for module in model.modules() if type(module).__name__ == block_name]
        if not found:
            raise UserError(f"model.block_name={block_name}: the model has no module of this class; set it to null")
        return found
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        words = "the class of this model's layers is not known; set model.block_name to its name"
        raise UserError(f"model.block_name=null: {words}")
    return found


def distinct_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and stored buffers, those with several names (tied weights) under the first."""
    seen: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if seen.setdefault(id(value), name) == name}


def full_weights(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Gather a model's weights on the host, one tensor at a time; every rank must call it, and keeps them if `keep`.

    Tied weights share their memory, as in the model.
    """
    names: dict[int, str] = {}
    weights: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        first = names.setdefault(id(value), name)
        if first == name:
            whole: Tensor = (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        if keep:
            weights[name] = whole if first == name else weights[first]
    return weights


def clip_gradient(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients in place to at most max_norm, whatever meshes they lie on, and return their norm before that."""
    meshes: dict[DeviceMesh | None, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            meshes[getattr(parameter.grad, "device_mesh", None)].append(parameter.grad)
    norms = [torch.nn.utils.get_total_norm(gradients) for gradients in meshes.values()]
    norm = torch.stack([part.full_tensor() if isinstance(part, DTensor) else part for part in norms]).norm()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).item()  # as torch.nn.utils.clip_grad_norm_
    for gradients in meshes.values():
        torch._foreach_mul_(gradients, scale)
    return norm
