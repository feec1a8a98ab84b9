"""Which models can be split over ranks, and the gradient of those that are."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import run_ranks
from tiny_models import tiny, tiny_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from dpo.distributed.tensor_parallel import STYLES, parallelize, plan_problem

SPLIT = ("Llama", "Qwen2", "Qwen3", "GPTNeoX", "Gemma2", "Gemma3Text", "Phi3", "Olmo2")


def test_models_without_a_plan_and_sizes_that_do_not_divide_are_refused_by_name():
    assert plan_problem(tiny_config("GPT2"), 2) == "transformers has no tensor-parallel plan for gpt2 models"
    assert plan_problem(tiny_config("Llama"), 4) == "the model's num_key_value_heads, 2, is not a multiple of 4"
    assert [plan_problem(tiny_config(name), 2) for name in SPLIT] == [None] * len(SPLIT)


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss", "Olmoe", "GraniteMoe", "DeepseekV3", "Llama4Text"])
def test_mixtures_of_experts_are_refused_by_name(name):
    config = getattr(transformers, f"{name}Config")()
    assert re.search(f"plan (of|for) {config.model_type} models( has unsupported styles|$)", plan_problem(config, 2))


def attention_alone(name: str) -> dict[str, str]:
    """The known styles in a mixture's plan: those of its attention, and rowwise for a tensor of all experts."""
    plan = tiny_config(name).base_model_tp_plan
    known = {pattern: style for pattern, style in plan.items() if style in STYLES}
    assert "layers.*.mlp.experts.down_proj" in known
    return known


def gradient_of(model) -> dict[str, torch.Tensor]:
    """Return the gradient of a loss that depends on every logit."""
    ids = torch.arange(1, 25).view(2, 12)
    model(input_ids=ids, use_cache=False).logits.log_softmax(-1).square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def compare_gradients(rank: int, n: int, folder: Path) -> None:
    """Assert that two ranks hold half of the split weights each, and compute the gradient of one process."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (n,), mesh_dim_names=("tensor",))
    for name in (*SPLIT, "Mixtral"):  # whose experts stay whole
        model = tiny(name)
        if name == "Mixtral":
            model.config.base_model_tp_plan = attention_alone(name)
        parallelize(model, mesh, model.modules())
        split = [p for p in model.parameters() if isinstance(p, DTensor) and p.placements[0].is_shard()]
        assert len(split) >= 8 and all(2 * p.to_local().numel() == p.numel() for p in split), name
        found, expected = gradient_of(model), gradient_of(tiny(name))
        for key, gradient in expected.items():
            whole = found[key].full_tensor() if isinstance(found[key], DTensor) else found[key]
            assert (whole - gradient).norm() <= 1e-5 * gradient.norm(), (name, key)


def test_ranks_that_share_the_layers_of_a_model_compute_the_gradient_of_one_process(tmp_path):
    run_ranks(2, compare_gradients, tmp_path)
