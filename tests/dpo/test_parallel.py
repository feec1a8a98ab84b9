"""What is sharded by itself; that shards compute the same is shown by test_trainers_sharded.py."""

import pytest
import torch
from tiny_models import tiny

from dpo.errors import UserError
from dpo.parallel import distinct_tensors, full_weights, layers


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
    assert len(names & distinct_tensors(model).keys()) == 1
    weights = full_weights(model, keep=True)
    assert weights.keys() == model.state_dict().keys()
    assert len({weights[name].data_ptr() for name in names}) == 1
    assert full_weights(model, keep=False) == {}
