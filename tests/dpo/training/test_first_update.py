"""What the first update checks: the first margin, and that a gradient reaches every trained parameter."""

import warnings

import pytest
import torch
from torch import nn

from dpo.distributed.ranks import Ranks
from dpo.reporting.metrics import BatchMetrics
from dpo.system.errors import RunError, UserError
from dpo.training.first_update import FirstMargin, check_gradients, strict_autograd

ONE_UPDATE = ("loss=dpo", "n_examples=8", "n_eval_examples=8", "eval_batch_size=8", "debug=true")
APART = "policy and reference differ by up to .* nats per response"


# The first margin


@torch.no_grad()
def move_second_model(trainer) -> None:
    next(trainer.reference.module.parameters()).add_(1e-3)


def move_cache(trainer) -> None:
    trainer.reference.sums += 1e-4


@pytest.mark.parametrize("evaluates_first", ["true", "false"])
@pytest.mark.parametrize(
    "precomputed, move", [("false", move_second_model), ("true", move_cache)], ids=["second model", "cache"]
)
def test_a_run_with_another_reference_than_its_start_ends_before_its_first_update(
    precomputed, move, evaluates_first, make_trainer
):
    settings = (f"loss.precompute_reference={precomputed}", f"do_first_eval={evaluates_first}")
    trainer = make_trainer(*ONE_UPDATE, *settings)
    before = {name: value.clone() for name, value in trainer.policy.state_dict().items()}
    move(trainer)
    with pytest.raises(UserError, match=APART):
        trainer.train()
    assert trainer.updates == 0 and all(torch.equal(v, before[n]) for n, v in trainer.policy.state_dict().items())


def test_after_the_first_update_policy_and_reference_may_differ(make_trainer):
    trainer = make_trainer(*ONE_UPDATE, "n_examples=16", "lr=1e-3")
    trainer.train()
    assert trainer.updates == 2 and trainer.evaluate()["rewards_eval/margins"] != 0


@pytest.mark.parametrize(
    "overrides",
    [
        ("model.reference_dtype=bfloat16",),
        ("lora=default", "lora.path={adapter}", "lora.dropout=0.5"),
    ],
    ids=["another dtype", "dropout of an adapter that computes something"],
)
def test_a_reference_that_rounds_or_draws_otherwise_is_no_error(overrides, make_trainer):
    adapter = ""
    if "{adapter}" in "".join(overrides):
        first = make_trainer("loss=dpo", "n_examples=8", "lora=default", "lr=1e-2", "warmup_steps=0")
        first.train()
        adapter = first.run.path / "LATEST" / "hf"
    trainer = make_trainer(*ONE_UPDATE, *(override.replace("{adapter}", f"'{adapter}'") for override in overrides))
    trainer.train()
    assert trainer.updates == 1


def test_a_cache_that_an_earlier_run_has_written_may_be_rounded_otherwise(make_trainer):
    """As by another number of threads."""
    make_trainer(*ONE_UPDATE, "loss.precompute_reference=true")
    second, third = (make_trainer(*ONE_UPDATE, "loss.precompute_reference=true") for _ in range(2))
    second.reference.sums += 1e-3
    second.train()
    third.reference.sums += 20.0  # of about 50 tokens a response
    with pytest.raises(UserError, match=f"{APART}.*; set loss.precompute_reference=false"):
        third.train()


def test_a_microbatch_that_is_computed_to_keep_up_with_another_rank_is_not_compared(make_trainer):
    """It holds an example alone, which a cache has with the rounding of its neighbours."""
    trainer = make_trainer(*ONE_UPDATE, "loss.precompute_reference=true")
    trainer.first_margin = FirstMargin(trainer.reference, "")
    move_cache(trainer)
    microbatch = next(trainer.packer(next(iter(trainer.train_batches)).examples))
    trainer.losses(microbatch, None)
    with pytest.raises(UserError, match=APART):
        trainer.losses(microbatch, BatchMetrics())


# Gradients


class Model(nn.Module):
    """Log-probabilities of four parameters: one is used, one cut off, one used and one not used as LoRA's matrix B."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.cut, self.frozen = (nn.Parameter(torch.ones(2)) for _ in range(3))
        self.adapter = nn.ModuleDict({"lora_B": nn.ParameterDict({"used": torch.zeros(2), "unused": torch.zeros(2)})})
        self.frozen.requires_grad_(False)

    def forward(self) -> torch.Tensor:
        return self.used + self.cut.detach() + self.frozen + self.adapter["lora_B"]["used"]


def backward(model: Model, scale: float = 1.0) -> Model:
    (model().sum() * scale).backward()
    return model


def check(model: Model) -> bool:
    with torch.no_grad():
        return check_gradients(model, model, Ranks())


def test_a_parameter_that_is_cut_off_ends_the_run_with_its_name_and_the_model_as_it_was():
    model = backward(Model())
    state, random = model.state_dict(), torch.get_rng_state()
    before = {name: value.clone() for name, value in state.items()}
    with pytest.raises(UserError, match="no gradient reaches 2 of 4 trained tensors.*: cut, adapter.lora_B.unused; "):
        check(model)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), random) and model.training


def test_parameters_that_a_batch_does_not_use_are_named_and_trained_on(capsys):
    model = Model()
    model.cut.requires_grad_(False)
    assert check(backward(model))
    told = capsys.readouterr().out
    assert "Of 3 trained tensors, 1 have no gradient in the first update" in told and "adapter.lora_B.unused." in told


def test_a_matrix_b_with_a_gradient_of_exactly_0_is_cut_off_and_another_parameter_is_not():
    model = Model()
    model.cut.requires_grad_(False)
    backward(model)
    model.used.grad.zero_()
    assert check(model)
    model.adapter["lora_B"]["used"].grad.zero_()
    model.used.grad.fill_(1.0)
    with pytest.raises(UserError, match="no gradient reaches 2 of 3 trained tensors.*adapter.lora_B.used"):
        check(model)


def test_a_gradient_that_is_0_everywhere_shows_nothing():
    """As of a hinge loss whose margin every pair has reached."""
    assert not check(backward(Model(), scale=0.0))


def test_a_gradient_on_any_rank_counts_and_a_change_on_any_rank_does():
    class Others(Ranks):
        def gather(self, value):
            return [value, {"cut", "adapter.lora_B.unused"} if isinstance(value, set) else value]

    class Sees(Ranks):
        def any(self, flag):
            return True

    model = backward(Model())
    with torch.no_grad():
        assert check_gradients(model, model, Others())
        model.cut.requires_grad_(False)
        with pytest.raises(UserError, match="no gradient reaches 1 of 3"):
            check_gradients(model, model, Sees())


def test_numbers_that_differ_from_pass_to_pass_show_nothing():
    """As of a kernel that sums in no certain order."""
    model = backward(Model())
    model.forward = lambda: torch.rand(2)
    assert check(model)


def test_weights_that_are_not_finite_are_reported_as_such(make_trainer):
    trainer = make_trainer(*ONE_UPDATE)
    layer = trainer.policy.model.transformer.h[1].mlp.c_fc
    layer.register_forward_hook(lambda module, inputs, output: output.detach() * torch.nan)
    with pytest.raises(RunError, match="is not finite|a loss of nan"):
        trainer.train()


def test_a_run_of_a_model_that_cuts_its_graph_ends_before_the_first_update(make_trainer):
    trainer = make_trainer(*ONE_UPDATE)
    trainer.policy.model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(UserError, match=r"no gradient reaches 4 of .* model.transformer.h.1.mlp.c_fc.weight, "):
        trainer.train()
    assert trainer.updates == 0


def test_an_adapter_behind_a_layer_without_a_gradient_ends_the_run(make_trainer):
    """The residual stream carries a gradient past the layer, to all adapters but those of the layer's input."""
    trainer = make_trainer(*ONE_UPDATE, "lora=default")
    layer = trainer.policy.model.transformer.h[1].attn.c_proj.base_layer
    layer.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(UserError, match=r"no gradient reaches 1 of .*: model.transformer.h.1.attn.c_attn.lora_B"):
        trainer.train()


def test_a_run_checks_its_gradients_once_also_after_a_resume(make_trainer, monkeypatch):
    calls = []
    monkeypatch.setattr("trainers.check_gradients", lambda *_: calls.append(1) or len(calls) > 1)
    trainer = make_trainer(*ONE_UPDATE, "n_examples=32")
    trainer.train()
    assert trainer.updates == 4 and len(calls) == 2  # the first showed nothing
    resumed = make_trainer(*ONE_UPDATE, "n_examples=40")
    resumed.load_state_dict(trainer.state_dict([]))
    resumed.train()
    assert resumed.updates == 5 and len(calls) == 3


def test_an_operation_without_a_backward_pass_ends_a_run_by_its_name(make_trainer):
    with torch.library._scoped_library("dpo_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: 2 * x, "CPU")
        trainer = make_trainer(*ONE_UPDATE, "loss=sft")
        layer = trainer.policy.model.transformer.h[0].mlp
        layer.register_forward_hook(lambda module, inputs, output: torch.ops.dpo_test.twice(output))
        with pytest.raises(UserError, match="dpo_test::twice has no backward pass here"):
            trainer.train()
    assert trainer.updates == 0


def test_other_warnings_stay_warnings_in_training():
    with pytest.warns(UserWarning, match="another"), strict_autograd():
        warnings.warn("another", stacklevel=1)
