"""What is sharded by itself; that shards compute the same is shown by test_trainers_sharded.py."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from recording import Recording
from tiny_models import EXACT, NOT_EXACT, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dpo.distributed.sharding import (
    clip_gradient,
    distinct,
    layers,
    mixed_precision,
    set_weights,
    whole_tensors,
    without_weights,
)
from dpo.system.errors import UserError


def test_layers_are_those_of_transformers_or_of_the_class_that_is_named():
    model = tiny("Llama")
    assert layers(model, None) == layers(model, "LlamaDecoderLayer") == list(model.model.layers)
    assert layers(model, "LlamaMLP") == [layer.mlp for layer in model.model.layers]


def test_a_class_that_the_model_does_not_have_is_refused():
    with pytest.raises(UserError, match="model.block_name=Block: the model has no module of this class"):
        layers(tiny("Llama"), "Block")


def test_a_model_whose_layers_are_not_known_is_refused():
    with pytest.raises(UserError, match="set model.block_name to its name"):
        layers(torch.nn.Sequential(torch.nn.Linear(2, 2)), None)


def test_tied_weights_are_stored_once_and_gathered_as_one():
    model = tiny("GPT2")
    names = {"transformer.wte.weight", "lm_head.weight"}
    assert len(names & distinct(model.state_dict(keep_vars=True)).keys()) == 1
    weights = whole_tensors(model.state_dict(keep_vars=True), keep=True)
    assert weights.keys() == model.state_dict().keys()
    assert len({weights[name].data_ptr() for name in names}) == 1
    assert whole_tensors(model.state_dict(keep_vars=True), keep=False) == {}


@pytest.mark.parametrize("family", [*EXACT, *NOT_EXACT])
def test_a_model_that_travels_without_its_weights_computes_the_same_once_it_gets_them(family):
    """Rotary frequencies and other buffers that no checkpoint holds travel along; tied weights are asked for once."""
    model = tiny(family)
    empty = without_weights(model)
    assert all(parameter.is_meta for parameter in empty.parameters()) and not any(p.is_meta for p in model.parameters())
    sent = pickle.loads(pickle.dumps(empty))
    by_name, asked = dict(model.named_parameters()), []
    names = {id(parameter): name for name, parameter in sent.named_parameters()}
    set_weights(sent.modules(), lambda own: asked.append(names[id(own)]) or by_name[asked[-1]].detach().clone())
    assert sorted(asked) == sorted(by_name)  # without the second name of a tied weight
    ids = torch.arange(1, 25).view(2, 12)
    with torch.no_grad():
        found, expected = (each(input_ids=ids, use_cache=False).logits for each in (sent, model))
    assert torch.equal(found, expected)
    assert [p.requires_grad for p in sent.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    "device, stored, dtype, gathered",
    [
        ("cuda", "float32", "bfloat16", torch.bfloat16),
        ("cuda", "float32", "float32", None),
        ("cuda", "bfloat16", "bfloat16", None),
        ("cuda", "bfloat16", "float32", None),
        ("cpu", "float32", "bfloat16", None),
    ],
)
def test_layers_are_gathered_as_they_are_stored_unless_a_gpu_computes_in_fewer_bits(device, stored, dtype, gathered):
    mesh = SimpleNamespace(device_type=device)
    precision = mixed_precision(mesh, getattr(torch, stored), getattr(torch, dtype))
    assert precision.param_dtype == gathered
    assert precision.reduce_dtype == (torch.float32 if gathered else None)


def clip_on_two_meshes(rank: int, n: int, folder: Path) -> None:
    """Assert that a gradient of (3, 4) is clipped to norm 1, whichever meshes its parts lie on."""
    dist.init_process_group("gloo")
    both = init_device_mesh("cpu", (1, n), mesh_dim_names=("shard", "tensor"))
    parameters = []
    for value, mesh, placements in ((3.0, both, [Replicate(), Shard(0)]), (4.0, both["shard"], [Shard(0)])):
        whole = torch.full((4,), value / 2)  # of norm `value`
        parameters.append(torch.nn.Parameter(distribute_tensor(whole, mesh, placements)))
        parameters[-1].grad = distribute_tensor(whole.clone(), mesh, placements)
    for expected_norm, max_norm, factor in ((5.0, 10.0, 1.0), (5.0, 1.0, 0.2)):
        norm = clip_gradient(parameters, max_norm)
        assert norm.item() == pytest.approx(expected_norm)
        for parameter in parameters:
            expected = factor * parameter.detach().full_tensor()
            torch.testing.assert_close(parameter.grad.full_tensor(), expected, rtol=1e-5, atol=0)


def test_the_gradient_is_clipped_by_the_norm_over_all_meshes(tmp_path):
    run_ranks(2, clip_on_two_meshes, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_clipping_reads_no_number_and_gives_the_bits_of_one_device(dtype):
    def make_parameters():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.zeros(*shape, dtype=dtype)) for shape in ((5, 7), (3,), (11, 2))]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape).to(dtype)
        return parameters

    parameters, expected = make_parameters(), make_parameters()
    with Recording():  # refuses what reads a number
        norm = clip_gradient(parameters, 1.0)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(expected, 1.0))
    for actual, other in zip(parameters, expected, strict=True):
        assert torch.equal(actual.grad, other.grad)
