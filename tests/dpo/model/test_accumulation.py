"""Gradients of embeddings and head, added in place."""

import pytest
import torch
from tiny_models import EXACT, EXAMPLES, NOT_EXACT, respond, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.model import logps
from dpo.model.accumulation import EmbeddingGradient, HeadGradient, accumulate_in_place
from dpo.model.loading import recompute_activations
from dpo.model.logps import ResponseLogps
from dpo.model.packing import make_microbatches
from dpo.system.devices import autocast

# Heads with a bias, and embeddings with a scale, have autograd's gradients.
OTHER_TYPES = {"GPTJ": {HeadGradient}, **dict.fromkeys(("Gemma2", "Gemma3Text"), {EmbeddingGradient})}
PASSES = [respond([5, 0, 7, 0], [4, 0], [3]), *EXAMPLES]  # 0 is these models' padding, whose embedding has no gradient


def backward(module, layout, dtype=torch.float32, n=4):
    """Run a forward and a backward pass of each example, of the first n."""
    for example in PASSES[:n]:
        (batch,) = make_microbatches([example], layout, 1000)
        with autocast(torch.float32, dtype, torch.device("cpu")):
            found = module(batch)
            (found * torch.arange(len(found)).sin()).sum().backward()


def gradients(module, *args):
    """Return the gradient of each parameter, by name, or None."""
    module.zero_grad()
    backward(module, *args)
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same_gradients(module, layout, dtype=torch.float32, rtol=1e-5, atol=1e-5):
    expected = gradients(module, layout, dtype)
    found = gradients(accumulate_in_place(module), layout, dtype)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", [*EXACT, *NOT_EXACT])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_of_several_passes_are_those_of_autograd(name, tied, monkeypatch):
    used = []
    for function in (HeadGradient, EmbeddingGradient):
        own = function.apply
        monkeypatch.setattr(
            function, "apply", lambda *args, own=own, function=function: used.append(function) or own(*args)
        )
    assert_same_gradients(ResponseLogps.wrap(tiny(name, tie_word_embeddings=tied)), "padded")
    assert set(used) == {HeadGradient, EmbeddingGradient} - OTHER_TYPES.get(name, set())


def test_gradients_are_those_of_autograd_where_layers_and_logits_are_recomputed(monkeypatch):
    monkeypatch.setattr(logps, "CHUNK_BYTES", 1)
    monkeypatch.setattr(logps, "CHUNK_TOKENS", 2)
    module = ResponseLogps.wrap(tiny("Llama", tie_word_embeddings=True).train())
    recompute_activations(module.model)
    assert_same_gradients(module, "shared_prefix")


@pytest.mark.parametrize("float32_head", [True, False])
def test_gradients_are_those_of_autograd_under_autocast(float32_head):
    module = ResponseLogps.wrap(tiny("Llama", tie_word_embeddings=True), float32_head)
    assert_same_gradients(module, "shared_prefix", torch.bfloat16, rtol=0.02, atol=0.02)


def test_gradients_of_bfloat16_weights_are_those_of_autograd():
    module = ResponseLogps.wrap(tiny("Llama", tie_word_embeddings=True).bfloat16())
    assert_same_gradients(module, "shared_prefix", rtol=0.05, atol=0.1)


def test_models_may_change_embeddings_and_logits_in_place():
    """As CTRL scales its embeddings."""
    module = ResponseLogps.wrap(tiny("Llama", tie_word_embeddings=True))
    expected = gradients(module, "shared_prefix")
    accumulate_in_place(module)
    for part in (module.model.get_input_embeddings(), module.head):
        part.register_forward_hook(lambda part, inputs, output: output.mul_(1.0))
    torch.testing.assert_close(gradients(module, "shared_prefix"), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_frozen_weight_gets_no_gradient(frozen):
    module = ResponseLogps.wrap(tiny("Llama", tie_word_embeddings=False))
    module.model.get_parameter(frozen).requires_grad_(False)
    module.model.enable_input_require_grads()  # as recomputing layers below frozen embeddings may need
    accumulate_in_place(module)
    assert module.model.get_input_embeddings()(torch.tensor([5])).requires_grad
    missing = [name for name, gradient in gradients(module, "shared_prefix").items() if gradient is None]
    assert missing == [f"model.{frozen}"]


class New(TorchDispatchMode):
    """Counts new tensors as large as a weight of (97, 32)."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {tensor.data_ptr() for tensor in args if isinstance(tensor, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.numel() == 97 * 32 and result.data_ptr() not in given:
            self.count += 1
        return result


@pytest.mark.parametrize("n", [1, len(PASSES)])
def test_passes_make_one_tensor_of_the_size_of_tied_weights_in_an_update(n):
    module = accumulate_in_place(ResponseLogps.wrap(tiny("Llama", tie_word_embeddings=True)))
    with New() as new:
        backward(module, "shared_prefix", n=n)
    assert new.count == 1


@pytest.mark.parametrize("device, embeds", [("cpu", 1), ("meta", 0)])
def test_embeddings_add_in_place_where_the_order_is_certain(device, embeds):
    module = accumulate_in_place(ResponseLogps(tiny("Llama").to(device)))
    hooks = [len(part._forward_hooks) for part in (module.model.get_input_embeddings(), module.head)]
    assert hooks == [embeds, 1]


def test_training_on_one_device_adds_gradients_in_place(make_trainer):
    trainer = make_trainer("loss=sft")
    embeddings = trainer.policy.model.get_input_embeddings()
    assert len(embeddings._forward_hooks) == len(trainer.policy.head._forward_hooks) == 1
