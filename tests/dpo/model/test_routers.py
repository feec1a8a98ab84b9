"""The load-balancing loss of a mixture's routers is transformers' own on unpacked batches, whatever is packed how."""

import copy

import pytest
import torch
from conftest import TINY, inputs_of, validated
from tiny_models import EXAMPLES, MIXTURES, PLENTY, tiny, tiny_config
from transformers import AutoModelForCausalLM

from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.packing import LAYOUTS, make_microbatches, padded
from dpo.model.routers import load_balancing_loss, make_router_loss, router_loss_weight
from dpo.system.errors import UserError

WEIGHT = "model.router_loss_weight=0.1"


def own_loss(model, examples) -> torch.Tensor:
    """The load-balancing loss that the model's class computes: every response after its own prompt, padding masked."""
    return model(**padded(examples).inputs, output_router_logits=True, use_cache=False).aux_loss


@pytest.mark.parametrize("name", ["Mixtral", *MIXTURES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_microbatches_of_a_batch_add_up_to_the_loss_and_gradient_of_the_unpacked_batch(name, layout):
    model = tiny(name)
    expected = own_loss(model, EXAMPLES)
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(gradients) > 4 and all(gradient.norm() > 0 for gradient in gradients.values())
    module = ResponseLogps.wrap(model)
    module.router_loss = make_router_loss(model, validated("loss=sft", "model=tiny", WEIGHT)[0].model)
    for max_tokens in (PLENTY, 30):
        model.zero_grad()
        microbatches = list(make_microbatches(EXAMPLES, layout, max_tokens))
        assert len(microbatches) == 1 or max_tokens == 30
        computed = [response_logps(module, microbatch).routers for microbatch in microbatches]
        terms = [load_balancing_loss(routers, sum(computed)) for routers in computed]
        assert sum(terms).item() == pytest.approx(expected.item(), rel=1e-6)
        sum(terms).backward()
        for key, parameter in model.named_parameters():
            if key in gradients:
                assert (parameter.grad - gradients[key]).norm() <= 1e-5 * gradients[key].norm(), key


# A whole update


@pytest.fixture
def folder(write_tiny_folder):
    """A tiny Mixtral whose config asks for the loss with weight 0.5."""
    return write_tiny_folder("mixtral")


def update(trainer) -> tuple[dict[str, float], list, dict[str, torch.Tensor]]:
    """The metrics, the examples and the gradient of a trainer's first update."""
    gradients, clip = {}, trainer.clip_gradient

    def keep():
        trained = trainer.policy.model.named_parameters()
        gradients.update({name: each.grad.clone() for name, each in trained if each.grad is not None})
        return clip()

    trainer.clip_gradient = keep
    batch = next(iter(trainer.train_batches))
    return trainer.train_step(batch), batch.examples, gradients


def plain_sums(model, examples) -> torch.Tensor:
    """Log-probabilities of responses, (responses,), of a transformers model, all first ones before all second ones."""
    batch = padded(examples)
    logits = model(**batch.inputs, output_router_logits=False, use_cache=False).logits.flatten(0, 1)[batch.sources]
    tokens = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    return torch.stack([part.sum() for part in tokens.split(batch.lengths.flatten().tolist())]).view(
        batch.lengths.shape
    )


def plain_gradient(folder, loss_name, examples, weight) -> tuple[float, dict[str, torch.Tensor]]:
    """The gradient of a plain loop over one unpacked batch, and the load-balancing loss that transformers computes."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    sums = plain_sums(model, examples)
    losses = -sums[:, 0]
    if loss_name == "dpo":
        h = (sums - sums.detach()) @ torch.tensor([1.0, -1.0])
        losses = -(0.1 * h).sigmoid().log()
    router_loss = own_loss(model, examples)
    (losses.mean() + weight * router_loss).backward()
    return router_loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


WAYS = {
    "one microbatch": ("max_tokens_per_pass=100000",),
    "small microbatches": ("max_tokens_per_pass=300", "gradient_accumulation_steps=2"),
    "padded": ("layout=padded", "max_tokens_per_pass=600"),
    "recomputed": ("activation_checkpointing=true", "max_tokens_per_pass=300"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", ["sft", "dpo"])
def test_an_update_has_the_gradient_of_a_plain_loop_with_transformers_own_loss(loss, way, folder, make_trainer):
    trainer = make_trainer(f"loss={loss}", f"model.name_or_path='{folder}'", *WAYS[way])
    metrics, examples, gradients = update(trainer)
    expected, plain = plain_gradient(folder, loss, examples, 0.5)
    assert metrics["router_loss/train"] == pytest.approx(expected, rel=1e-6)
    _, without = plain_gradient(folder, loss, examples, 0.0)
    assert plain.keys() == gradients.keys()
    for name, gradient in plain.items():
        assert (gradients[name] - gradient).norm() <= 2e-5 * gradient.norm(), name
    moved = [name for name, gradient in plain.items() if (gradient - without[name]).norm() > 1e-3 * gradient.norm()]
    assert any("gate" in name for name in moved)


def test_an_adapter_gets_the_gradient_of_the_frozen_routers_loss(folder, make_trainer):
    settings = ("lora=default", "lora.r=4", "max_tokens_per_pass=300", f"model.name_or_path='{folder}'")
    trainers = [make_trainer("loss=sft", *settings, f"model.router_loss_weight={weight}") for weight in (0, 50)]
    model = copy.deepcopy(trainers[0].policy.model)
    (without, _, plain), (metrics, examples, gradients) = map(update, trainers)
    assert "router_loss/train" not in without and all(".lora_" in name for name in gradients)
    assert metrics["loss/train"] == without["loss/train"]
    (50 * own_loss(model, examples)).backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.norm() > 0}
    assert len(expected) >= 4 and all(".lora_B." in name for name in expected)  # A multiplies B, which is still 0
    for name, gradient in expected.items():
        assert (gradients[name] - plain[name] - gradient).norm() <= 1e-4 * gradients[name].norm(), name


def test_an_evaluation_has_the_loss_of_all_its_examples_and_a_run_without_it_has_none(folder, make_trainer):
    settings = ("loss=dpo", f"model.name_or_path='{folder}'", "n_eval_examples=12", "eval_batch_size=5")
    trainer = make_trainer(*settings, "max_tokens_per_pass=300")
    examples = [example for batch in trainer.eval_batches.from_start() for example in batch.examples]
    with torch.no_grad():
        expected = own_loss(trainer.policy.model, examples).item()
    metrics = trainer.evaluate()
    assert metrics["router_loss/eval"] == pytest.approx(expected, rel=1e-6)
    without = make_trainer(*settings, "model.router_loss_weight=0").evaluate()
    assert metrics.keys() - without.keys() == {"router_loss/eval"}
    assert metrics["loss/eval"] == pytest.approx(without["loss/eval"], rel=1e-6)


# Which models


def weight_of(name: str, setting: str = "null", **own) -> float:
    settings = validated("loss=sft", "model=tiny", f"model.router_loss_weight={setting}")[0]
    return router_loss_weight(settings.model, tiny_config(name, **own))


def test_the_weight_is_the_settings_or_that_of_a_config_that_asks_for_the_loss():
    assert weight_of("Mixtral", router_aux_loss_coef=0.02) == 0.02
    assert weight_of("Mixtral", router_aux_loss_coef=0.02, output_router_logits=False) == 0
    assert weight_of("JetMoe", aux_loss_coef=0.03) == 0.03
    assert weight_of("Mixtral", "0.5", output_router_logits=False) == 0.5
    assert weight_of("Mixtral", "0", router_aux_loss_coef=0.02) == 0


def test_a_model_without_a_router_is_refused_before_data_is_read(tmp_path):
    line = "model.router_loss_weight=0.1: transformers computes no load-balancing loss for gpt2 models; set it to 0"
    with pytest.raises(UserError, match=line):
        inputs_of("loss=sft", *TINY, WEIGHT, f"datasets=['{tmp_path / 'missing.jsonl'}']")


def test_a_loss_that_is_not_switch_transformers_is_refused_by_name():
    """Nothing else tells it from the others: its class has a function of the same name."""
    settings = validated("loss=sft", "model=tiny")[0].model
    model = tiny("Mixtral", router_aux_loss_coef=0.02)
    forward = type(model).forward

    def other(*args, **options):
        outputs = forward(model, *args, **options)
        outputs.aux_loss = 1.01 * outputs.aux_loss
        return outputs

    model.forward = other
    line = "model.router_loss_weight=null, 0.02 in the model's config: the load-balancing loss of mixtral models is not"
    with pytest.raises(UserError, match=line):
        make_router_loss(model, settings)
    model.forward = lambda *args, **options: forward(model, *args, **{**options, "output_router_logits": False})
    with pytest.raises(UserError, match="transformers computes no load-balancing loss for mixtral models"):
        make_router_loss(model, settings)
