"""Shards a module over devices: FSDP2, HSDP or replicas, through PyTorch's fully_shard and replicate."""

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo.model.logps import ResponseLogps
from dpo.system.errors import UserError

M = TypeVar("M", bound=nn.Module)
Weights = Callable[[nn.Parameter], Tensor]  # from a parameter, perhaps one without memory: its weights
Split = Callable[[list[nn.Module]], None]  # divides modules over further ranks, in place


def shard(
    module: ResponseLogps,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    block_name: str | None,
    weights: Weights,
    split: Split = lambda modules: None,
) -> ResponseLogps:
    """Shard a module's parameters in place: each layer separately, then the rest (embeddings, norms and head).

    mesh has the dimensions replicate and shard, and perhaps others. Within shard, every rank holds a part of each
    parameter, and gathers a layer to compute it. Over replicate, such groups repeat. With shard of size 1, every rank
    holds whole parameters.

    Each layer gets its weights right before it is sharded, so that a rank holds at most one whole layer. split may
    divide the modules of a layer over further dimensions of the mesh.

    Where layers are gathered in 16 bits, autocast's casts are saved. It does not cast embeddings and norms, so these
    are gathered as they are stored, those of layers with the rest. So hidden states between layers have the dtype that
    they have on one device, and so does the first parameter, by which autocast is turned on, gathered or not.
    """
    options: dict[str, Any] = {"mesh": mesh["replicate", "shard"]}
    apply: Any = fully_shard
    if mesh["shard"].size() == 1 and mesh["replicate"].size() > 1:
        apply, options["mesh"] = replicate, mesh["replicate"]
    elif mesh["replicate"].size() == 1:
        options["mesh"] = mesh["shard"]
    precision = mixed_precision(mesh, module.model.dtype, dtype)
    done: set[nn.Module] = set()
    norms = nn.ModuleList()
    for part in (*layers(module.model, block_name), module):
        new = [each for each in part.modules() if each not in done]
        done.update(new)
        set_weights(new, weights)
        split(new)
        if part is not module:
            own = [each for each in new if is_norm(each)] if precision.param_dtype else []
            norms.extend(own)
            others = {parameter for norm in own for parameter in norm.parameters()}
            apply(part, mp_policy=precision, ignored_params=others, **options)
    module.norms = norms  # so that fully_shard finds them beside the layers, which it passes over
    apply(module, mp_policy=replace(precision, param_dtype=None), **options)
    del module.norms
    # Autograd sums the gradient of a cast that autocast has kept from an earlier pass too late: once the gradients of
    # the layer are reduced.
    module.register_forward_pre_hook(lambda *arguments: torch.clear_autocast_cache())
    # Sampling calls generate instead of forward, so FSDP must gather there too. All ranks sample the same texts;
    # synced_gpus keeps each of them computing, and so gathering, until all are done.
    generate: Any = module.model.generate
    module.generate = partial(generate, synced_gpus=True)  # type: ignore[assignment]
    register_fsdp_forward_method(module, "generate")
    module.model.generate = module.generate
    return module


def set_weights(modules: Iterable[nn.Module], weights: Weights) -> None:
    """Give the parameters of modules their weights; tied ones stay tied."""
    new: dict[int, nn.Parameter] = {}
    for module in modules:
        for key, old in module._parameters.items():
            if old is not None:
                if id(old) not in new:
                    new[id(old)] = nn.Parameter(weights(old), old.requires_grad)
                module._parameters[key] = new[id(old)]


def weights_of_main(device: torch.device) -> Weights:
    """Broadcast the main rank's weights to a device; every rank calls the result for the same parameters in turn."""

    def send(parameter: nn.Parameter) -> Tensor:
        if parameter.is_meta:
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        else:
            value = parameter.detach().to(device)
        dist.broadcast(value.contiguous(), src=0)
        return value

    return send


def no_weights(parameter: nn.Parameter) -> Tensor:
    """Reserve memory for a parameter's weights on the host, which takes no room until they are written."""
    return torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")


@torch.no_grad()
def copy_shards(source: nn.Module, module: nn.Module) -> None:
    """Copy this rank's weights of a sharded module into another module that is sharded in the same way."""
    for weight, target in zip(source.parameters(), module.parameters(), strict=True):
        local_part(target).copy_(local_part(weight))


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, sharing its memory."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


def without_weights(module: M) -> M:
    """Copy a module with parameters on the meta device and buffers on the host."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("cpu", copy=True)
    return copy.deepcopy(module, memo)


def reshard(module: nn.Module) -> None:
    """Free the parameters that forward passes without a backward pass leave gathered, as the optimizer needs it."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_norm(module: nn.Module) -> bool:
    """Whether a module holds vectors and nothing else."""
    parameters = list(module.parameters())
    return bool(parameters) and not list(module.children()) and all(each.dim() == 1 for each in parameters)


def mixed_precision(mesh: DeviceMesh, stored: torch.dtype, dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Choose how layers are gathered: on GPUs in 16 bits if they compute so, with gradients summed in float32.

    On a CPU they are gathered in float32, since gloo has no bfloat16, and autocast casts them as on one device. It
    keeps its casts of all layers during a pass, which may be too much for a GPU.
    """
    if mesh.device_type == "cpu" or dtype in (stored, torch.float32):
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)


def layers(model: PreTrainedModel, block_name: str | None) -> list[nn.Module]:
    """Find a model's layers: modules of the class block_name, or of transformers' class for layers.

    UserError if there are none.
    """
    if block_name:
        blocks = [module for module in model.modules() if type(module).__name__ == block_name]
        if not blocks:
            raise UserError(f"model.block_name={block_name}: the model has no module of this class; set it to null")
        return blocks
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        problem = "the class of this model's layers is not known; set model.block_name to its name"
        raise UserError(f"model.block_name=null: {problem}")
    return blocks


def distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep tensors with several names (tied weights) under the first of them."""
    first_names: dict[int, str] = {}
    return {name: value for name, value in tensors.items() if first_names.setdefault(id(value), name) == name}


def whole_tensors(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Gather sharded tensors on the host, one at a time. Every rank must call it; those with `keep` get the tensors.

    Tied weights share their memory, as in the model.
    """
    first_names: dict[int, str] = {}
    weights: dict[str, Tensor] = {}
    for name, value in tensors.items():
        first = first_names.setdefault(id(value), name)
        if first == name:
            whole: Tensor = (value.full_tensor() if isinstance(value, DTensor) else value).detach().cpu()
        if keep:
            weights[name] = whole if first == name else weights[first]
    return weights


def clip_gradient(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients on any meshes in place, to a joint norm of at most max_norm; return the norm before that.

    The scale stays on the device, as in torch.nn.utils.clip_grad_norm_: reading it would wait for a GPU.
    """
    meshes: dict[DeviceMesh | None, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            meshes[getattr(parameter.grad, "device_mesh", None)].append(parameter.grad)
    norms = [torch.nn.utils.get_total_norm(gradients) for gradients in meshes.values()]
    norm = torch.stack([part.full_tensor() if isinstance(part, DTensor) else part for part in norms]).norm()
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for gradients in meshes.values():
        torch._foreach_mul_([local_part(gradient) for gradient in gradients], scale)
    return norm
