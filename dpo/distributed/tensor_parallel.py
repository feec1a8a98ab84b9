"""Splits the linear layers of a model over ranks that compute each layer together, by the model's own plan.

A transformers config names which projections are split by their columns (outputs) and which by their rows (inputs),
after Megatron-LM (arXiv 1909.08053): one all-reduce per attention and per MLP. PyTorch's parallelize_module does the
work. Embeddings, norms and the head are computed whole on every rank.
"""

import logging
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import partial

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import PreTrainedConfig, PreTrainedModel

from dpo.distributed.process_group import tensor_size
from dpo.settings.schema import Settings

# Keys are transformers' names. Norms of q and k see only one rank's heads, like sequence parallelism's see its tokens.
STYLES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": partial(ColwiseParallel, output_layouts=Replicate()),
    "rowwise_split_input": partial(RowwiseParallel, input_layouts=Replicate()),
    "replicated_with_grad_allreduce": partial(SequenceParallel, use_local_output=True),
}


def plan_problem(config: PreTrainedConfig, n: int) -> str | None:
    """Say why n ranks cannot share the layers of a model with this config; None if they can."""
    text = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None)
    if not plan:
        return f"transformers has no tensor-parallel plan for {text.model_type} models"
    unknown = sorted(set(plan.values()) - STYLES.keys())
    if unknown:
        return f"the tensor-parallel plan of {text.model_type} models has unsupported styles: {', '.join(unknown)}"
    for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        size = getattr(text, key, None)
        if isinstance(size, int) and size % n:
            return f"the model's {key}, {size}, is not a multiple of {n}"
    return None


def plan_problems(settings: Settings, config: PreTrainedConfig) -> list[str]:
    """Check that trainer=TensorParallelTrainer, if set, can split the layers of the model over its ranks."""
    if settings.trainer != "TensorParallelTrainer":
        return []
    problem = plan_problem(config, tensor_size(settings))
    return [] if problem is None else [f"trainer=TensorParallelTrainer: {problem}; use trainer=FSDPTrainer"]


def parallelize(model: PreTrainedModel, mesh: DeviceMesh, modules: Iterable[nn.Module]) -> None:
    """Split the modules that the plan of the model's config names over a one-dimensional mesh, in place."""
    # Gathering a tensor over two dimensions of a mesh takes two steps, and DTensor warns about it.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    plan = model.config.get_text_config().base_model_tp_plan or {}
    names = {module: name for name, module in model.base_model.named_modules()}
    for module in modules:
        for pattern, style in plan.items():
            if fnmatchcase(names.get(module, ""), pattern):
                parallelize_module(module, mesh, STYLES[style]())
