"""compile=auto: which runs compile, and what becomes of a compiler that fails."""

import pytest
import torch
from conftest import TINY, validated, without_measurements
from omegaconf import OmegaConf
from test_trainers import SHORTER
from tiny_models import tiny

import build
from dpo.model.loading import compile_layers
from dpo.settings.run_config import changes_of_command
from dpo.system.devices import DeviceFacts
from dpo.system.errors import RunError
from dpo.training import compiling
from dpo.training.compiling import MIN_TOKENS, compiling_pays

GPU = DeviceFacts("cuda", 10**11, capability=(9, 0), triton=True)
CASES = [
    # facts, tokens of the run, model, settings
    (GPU, MIN_TOKENS, "Llama", [], True),
    (GPU, MIN_TOKENS - 1, "Llama", [], False),
    (GPU, MIN_TOKENS, "Mixtral", [], False),
    (GPU, MIN_TOKENS, "Llama", ["activation_checkpointing=true"], False),
    (GPU, MIN_TOKENS, "Llama", ["trainer=FSDPTrainer", "device=cpu"], False),
    (DeviceFacts("cuda", 10**11, capability=(9, 0)), MIN_TOKENS, "Llama", [], False),  # no Triton
    (DeviceFacts("cuda", 10**11, capability=(6, 1), triton=True), MIN_TOKENS, "Llama", [], False),
    (DeviceFacts("cpu", 10**11, bfloat16=True), MIN_TOKENS, "Llama", [], False),
]


@pytest.mark.parametrize("facts, n_tokens, model, overrides, expected", CASES)
def test_long_runs_on_gpus_with_triton_compile_where_they_can(facts, n_tokens, model, overrides, expected):
    settings, _ = validated(*TINY, "loss=dpo", *overrides)
    assert settings.compile == "auto" and compiling_pays(settings, facts, tiny(model), n_tokens) == expected


def test_a_model_without_known_layers_is_not_compiled():
    settings, _ = validated(*TINY, "loss=dpo")
    assert not compiling_pays(settings, GPU, torch.nn.Linear(2, 2), MIN_TOKENS)


@pytest.fixture
def on_gpu(monkeypatch):
    """Take this machine for one with a GPU, every run for a long one, and compile by Dynamo alone, with a hook."""
    compiled, compile_module = [], torch.nn.Module.compile

    def compile_with(backend):
        def start(module, dynamic):
            compiled.append(module)
            compile_module(module, backend=backend, dynamic=dynamic)

        monkeypatch.setattr(torch.nn.Module, "compile", start)

    monkeypatch.setattr(build, "read_facts", lambda device: GPU)
    monkeypatch.setattr(build, "float32_products", lambda facts: "highest")
    monkeypatch.setattr(compiling, "MIN_TOKENS", 1)
    compile_with("eager")
    torch.compiler.reset()
    return compiled, compile_with


def train(trainer):
    """Return the records of a short run."""
    records = []
    trainer.logger.log = lambda record, thin=False: records.append(without_measurements(record))
    trainer.train()
    return records


@pytest.mark.parametrize("overrides", [(), ("loss.precompute_reference=true",)], ids=["live", "cached"])
def test_a_long_run_on_a_gpu_compiles_its_layers_and_a_resumed_one_does_what_it_did(overrides, make_trainer, on_gpu):
    compiled, _ = on_gpu
    trainer = make_trainer("loss=dpo", *overrides, *SHORTER)
    layers = list(trainer.policy.model.transformer.h)
    assert compiled[: len(layers)] == layers and len(compiled) == len(layers) * (1 if overrides else 2)
    assert all(parameter.grad is None for parameter in trainer.policy.parameters())
    assert trainer.reference.start_tolerance == compiling.ROUNDED
    again = OmegaConf.merge(trainer.run.config, {"compile": "auto"})
    assert trainer.run.config.compile is True
    assert "compile" not in changes_of_command(trainer.run.config, again, ["compile"])


@pytest.mark.parametrize("how", ["raises", "computes something else"])
def test_a_compiler_that_fails_leaves_the_run_as_it_would_be_without(how, make_trainer, on_gpu, monkeypatch, capsys):
    _, compile_with = on_gpu

    def broken(graph, inputs):
        if how == "raises":
            raise SyntaxError("unterminated string literal")
        return lambda *args: tuple(2 * value for value in graph(*args))

    compile_with(broken)
    records = [train(make_trainer("loss=dpo", f"compile={setting}", *SHORTER)) for setting in ("auto", "false")]
    assert records[0] == records[1] and len(records[0]) > 1
    assert "compile=auto: layers are not compiled, since that fails here (" in capsys.readouterr().out


def test_a_lack_of_memory_ends_the_run_and_is_not_taken_for_a_compilers_error(make_trainer, on_gpu, monkeypatch):
    def no_memory(model):
        raise MemoryError("out of memory")

    monkeypatch.setattr(compiling, "compile_layers", no_memory)
    with pytest.raises(RunError, match="out of memory before training"):
        make_trainer("loss=dpo")


def test_layers_can_be_compiled_no_more():
    model = tiny("Llama")
    compile_layers(model)
    compile_layers(model, on=False)
    assert all(module._compiled_call_impl is None for module in model.modules())
