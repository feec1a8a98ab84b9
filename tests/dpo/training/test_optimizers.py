"""Optimizers for bfloat16 parameters: stochastic rounding, its state, and what rounding to nearest would lose."""

import copy
import io
import sys
import types
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import TINY, inputs_of, validated
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.system.errors import UserError
from dpo.system.state import tensors_in
from dpo.training import optimizers
from dpo.training.optimizers import (
    OptimizerOptions,
    StochasticRoundingOptimizer,
    bfloat16_note,
    make_optimizer,
    optimizer_problems,
    stochastic_round,
)

NAMES = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")
MAX = torch.finfo(torch.bfloat16).max


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def spread_values(n: int) -> Tensor:
    """Make n float32 values of both signs, whose magnitudes are spread from 1e-30 to 1e30."""
    return torch.randn(n) * 10 ** torch.empty(n).uniform_(-30, 30)


def neighbours(values: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest bfloat16 numbers towards zero and, where values aren't bfloat16 numbers, away from it."""
    cut = values.view(torch.int32) & -0x10000
    away = torch.where(cut == values.view(torch.int32), cut, cut + 0x10000)
    return cut.view(torch.float32), away.view(torch.float32)


# Rounding


def test_the_mean_of_many_roundings_is_the_exact_value():
    values, n = spread_values(200), 20_000
    low, high = neighbours(values)
    mean = stochastic_round(values.expand(n, -1).contiguous()).double().mean(0)
    # Each rounding is a Bernoulli variable times an ulp, so its standard deviation is at most half an ulp; 5 sigma of
    # 200 means fail once in 10,000 seeds, and this one is fixed.
    bound = 5 * 0.5 * (high - low).abs().double() / n**0.5
    assert ((mean - values.double()).abs() <= bound).all()


def test_the_probability_of_rounding_up_is_the_fraction_that_is_cut_off():
    n, ulp = 40_000, 2**-7
    for fraction in (0.0, 1 / 16, 0.5, 15 / 16):
        rounded = stochastic_round(torch.full((n,), -1 - fraction * ulp)).float()
        share = (rounded == -1 - ulp).double().mean().item()
        assert abs(share - fraction) <= 5 * (fraction * (1 - fraction) / n) ** 0.5


def test_every_result_is_one_of_the_two_neighbours_and_both_occur():
    values = spread_values(5_000)
    low, high = neighbours(values)
    rounded = stochastic_round(values).float()
    assert ((rounded == low) | (rounded == high)).all()
    assert (rounded == low).any() and (rounded == high).any()


def test_values_that_bfloat16_has_stay_exact():
    values = spread_values(5_000).bfloat16()
    special = torch.tensor([0.0, -0.0, MAX, -MAX, torch.inf, -torch.inf, 1e-40], dtype=torch.bfloat16)
    values = torch.cat((values, special))
    assert torch.equal(stochastic_round(values.float()).view(torch.int16), values.view(torch.int16))


def test_nan_stays_nan_and_finite_values_beyond_the_largest_stay_finite():
    largest = torch.finfo(torch.float32).max
    assert stochastic_round(torch.full((1_000,), torch.nan)).isnan().all()
    for sign in (1, -1):
        assert (stochastic_round(torch.full((1_000,), sign * largest)) == sign * MAX).all()


def test_shapes_and_strides_are_kept():
    assert stochastic_round(torch.ones(2, 3, 4)).shape == (2, 3, 4)
    assert stochastic_round(torch.tensor(1.5)).shape == ()
    values = spread_values(64).bfloat16().float().view(8, 8).T
    assert torch.equal(stochastic_round(values).float(), values)


# Optimizers


def start(dtype: torch.dtype, n: int = 16_384) -> list[Parameter]:
    """Parameters of two shapes with weights around 1, exact in bfloat16, and one without gradients."""
    generator = torch.Generator().manual_seed(1)
    weights = 1 + torch.rand(n, generator=generator).bfloat16()
    return [Parameter(part.to(dtype)) for part in (weights.view(-1, 64), weights[:100].clone(), weights[:3].clone())]


def train(optimizer: torch.optim.Optimizer, parameters: list[Parameter], steps: int) -> None:
    """Make updates by gradients whose sizes vary over weights and steps, and whose signs stay."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        for parameter in parameters[:2]:
            parameter.grad = (0.5 + torch.rand(parameter.shape, generator=generator)).bfloat16().to(parameter.dtype)
        optimizer.step()
        optimizer.zero_grad()


def small_lr(name: str) -> float:
    """A learning rate with steps of 1e-4 to 1e-3, below half an ulp, 4e-3, of the weights of `start`."""
    return {"Adadelta": 0.05, "RMSprop": 5e-5, "Adagrad": 1e-3}.get(name, 3e-4)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_follows_float32_on_average_where_rounding_to_nearest_stands_still(name):
    lr, steps = small_lr(name), 12
    moved = {}
    for kind, dtype, make in (
        ("exact", torch.float32, make_optimizer),
        ("stochastic", torch.bfloat16, make_optimizer),
        ("nearest", torch.bfloat16, lambda name, parameters, lr: getattr(torch.optim, name)(parameters, lr=lr)),
    ):
        parameters = start(dtype)
        train(make(name, parameters, lr), parameters, steps)
        moved[kind] = parameters[0].detach().float() - start(torch.float32)[0].detach()
    exact, ulp = moved["exact"].mean().item(), 2**-7
    # Weights move apart from each other by independent roundings, `steps` of them, each with a variance of at most
    # p ulp^2, p the probability of moving, whose sum over the steps is |exact| / ulp.
    sigma = (abs(exact) * ulp / moved["exact"].numel()) ** 0.5
    assert abs(exact) > 20 * sigma
    assert abs(moved["stochastic"].mean().item() - exact) < 5 * sigma
    assert moved["nearest"].abs().max() == 0


@pytest.mark.parametrize("name", NAMES)
def test_float32_parameters_get_the_very_optimizer_of_torch(name):
    ours, theirs = start(torch.float32), start(torch.float32)
    optimizer, expected = make_optimizer(name, iter(ours), 1e-3), getattr(torch.optim, name)(theirs, lr=1e-3)
    assert type(optimizer) is type(expected)
    train(optimizer, ours, 3)
    train(expected, theirs, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert str(optimizer.state_dict()) == str(expected.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_float32_parameters_beside_bfloat16_ones_are_updated_as_torch_does(name):
    ours, theirs = start(torch.float32), start(torch.float32)
    optimizer = make_optimizer(name, [*ours, Parameter(torch.ones(2, dtype=torch.bfloat16))], 1e-3)
    assert isinstance(optimizer, StochasticRoundingOptimizer)
    train(optimizer, ours, 3)
    train(getattr(torch.optim, name)(theirs, lr=1e-3), theirs, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_chunks_change_nothing_but_the_noise(name, monkeypatch):
    """Without noise, the weights of chunks of 128 and of whole parameters are the same bits."""
    monkeypatch.setattr(optimizers, "stochastic_round", lambda values: values.to(torch.bfloat16))
    results = []
    for chunk in (2**22, 128):
        monkeypatch.setitem(optimizers.CHUNK, "cpu", chunk)
        parameters = start(torch.bfloat16)
        optimizer = make_optimizer(name, parameters, 10.0)
        train(optimizer, parameters, 3)
        results.append((parameters, optimizer.state_dict()))
    (whole, state), (parts, state_of_parts) = results
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert not torch.equal(whole[0], start(torch.bfloat16)[0])
    assert_same(state, state_of_parts)


def assert_same(a: object, b: object) -> None:
    """Compare nested states bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b


@pytest.mark.parametrize("name", NAMES)
def test_many_parameters_at_a_time_get_the_bits_of_each_by_itself(name, monkeypatch):
    """With its noise, which is drawn for weights and moments of a parameter after another."""
    results = []
    for divide in (optimizers.in_parts, lambda items, size, limit: ([item] for item in items)):
        monkeypatch.setattr(optimizers, "in_parts", divide)
        torch.manual_seed(0)
        parameters = [*start(torch.bfloat16, n=128), Parameter(torch.tensor(1.5)), *start(torch.float32, n=128)]
        optimizer = make_optimizer(name, parameters, 0.1)
        for _ in range(3):
            for parameter in parameters[:-1]:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        results.append((parameters, optimizer.state_dict()))
    (together, state), (alone, its_state) = results
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert_same(state, its_state)


class Operations(TorchDispatchMode):
    """Counts operations, and the bytes of tensors that they allocate and that still live."""

    def __init__(self):
        super().__init__()
        self.counts, self.bytes, self.peak = Counter(), {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {tensor.data_ptr() for tensor in tensors_in([*args, kwargs or {}])}
        results = function(*args, **(kwargs or {}))
        self.counts[function.overloadpacket.__name__] += 1
        for tensor in tensors_in(results):
            if (key := tensor.data_ptr()) not in known and key not in self.bytes:
                self.bytes[key] = tensor.nbytes
                weakref.finalize(tensor, self.bytes.pop, key)
        self.peak = max(self.peak, sum(self.bytes.values()))
        return results


FOREACH = OptimizerOptions({"foreach": True})  # as on a GPU by default: lists of tensors are updated together


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_needs_temporaries_of_a_few_parameters_at_a_time_and_computes_the_same(name, monkeypatch):
    """8 parameters of 1 KB in parts of 2 KB; at once, the smallest optimizers but SGD need 8 KB more."""
    results = []
    for limit in (2**20, 2**11):
        monkeypatch.setattr(optimizers, "PART_BYTES", limit)
        parameters = [Parameter(torch.linspace(-1, i, 256)) for i in range(8)]
        optimizer = make_optimizer(name, parameters, 0.1, replace(FOREACH, weight_decay=0.1))
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = parameter.detach().cos()
            with Operations() as operations:
                optimizer.step()
            scheduler.step()
        results.append((parameters, optimizer.state_dict(), operations.peak))
    (whole, state, peak), (parts, state_of_parts, peak_of_parts) = results
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert_same(state, state_of_parts)
    assert peak >= 8 * 1024 * (name != "SGD") and peak_of_parts <= 0.3 * peak


@pytest.mark.parametrize("name", [*NAMES, "Muon"])
def test_the_state_of_an_optimizer_is_freed_with_it(name):
    """Python's collector of cycles runs rarely: a second optimizer would find the memory of the first one taken."""
    parameters = [Parameter(torch.ones(4, 4)), Parameter(torch.ones(4))]
    optimizer = make_optimizer(name, parameters, 0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    parts = [weakref.ref(part) for part in getattr(optimizer, "optimizers", [optimizer])]
    del optimizer
    assert [part() for part in parts] == [None] * len(parts)


@pytest.mark.parametrize("name", NAMES)
def test_more_bfloat16_parameters_take_no_more_kernels(name):
    """Views, allocations and counters on the host are not kernels."""
    counts = []
    for n in (10, 20):
        parameters = [Parameter(torch.ones(8, 8, dtype=torch.bfloat16)) for _ in range(n)]
        optimizer = make_optimizer(name, parameters, 1e-3, FOREACH)
        for _ in range(2):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            with Operations() as operations:
                optimizer.step()
        on_host = ("detach", "slice", "view", "empty_like", "clone", "_local_scalar_dense", "lift_fresh", "full_like")
        counts.append({key: value for key, value in operations.counts.items() if key not in on_host})
    assert counts[0] == counts[1] and sum(counts[0].values()) < 40


@pytest.mark.parametrize("name", NAMES)
def test_a_run_resumed_from_its_states_is_the_same_bit_for_bit(name):
    parameters = start(torch.bfloat16)
    optimizer = make_optimizer(name, parameters, 1e-2)
    train(optimizer, parameters, 3)
    file = io.BytesIO()
    torch.save({"weights": parameters, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, file)
    train(optimizer, parameters, 3)

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    resumed = [Parameter(weights.detach()) for weights in saved["weights"]]
    other = make_optimizer(name, resumed, 0.5)
    other.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["rng"])
    train(other, resumed, 3)
    assert all(torch.equal(a, b) for a, b in zip(parameters, resumed, strict=True))
    assert_same(optimizer.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_bfloat16_and_counters_are_not(name):
    parameters = start(torch.bfloat16, n=128)
    optimizer = make_optimizer(name, parameters, 1e-2)
    train(optimizer, parameters, 300)
    assert parameters[2] not in optimizer.state or not optimizer.state[parameters[2]]
    state = optimizer.state[parameters[0]]
    if name != "SGD":
        assert state["step"] == 300  # which bfloat16 lacks: it counts to 256
    for key, value in state.items():
        shape, dtype = (parameters[0].shape, torch.bfloat16) if value.dim() else ((), torch.float32)
        assert (value.shape, value.dtype) == (shape, dtype), key


def test_moments_in_bfloat16_follow_those_in_float32():
    """A second moment with beta2 of 0.999 shrinks by less than half an ulp a step: rounded to nearest it would stay."""
    ours, exact = start(torch.bfloat16), start(torch.float32)
    states = []
    for parameters in (ours, exact):
        optimizer = make_optimizer("Adam", parameters, 1e-9)
        for gradient in (1.0, *[0.0] * 300):
            parameters[0].grad = torch.full_like(parameters[0], gradient)
            optimizer.step()
        states.append(optimizer.state[parameters[0]]["exp_avg_sq"].double().mean().item())
    # 300 roundings with a standard deviation of at most half an ulp, 2^-8 of the value, each of 16,384 weights
    assert states[0] == pytest.approx(states[1], rel=5 * 2**-8 * 300**0.5 / 16_384**0.5)
    assert states[1] < 0.75 * 1e-3


def test_a_scalar_parameter_is_updated_and_resumed():
    parameter = Parameter(torch.tensor(1.0, dtype=torch.bfloat16))
    optimizer = make_optimizer("Adam", [parameter], 0.1)
    for _ in range(3):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert parameter.shape == () and parameter.item() == pytest.approx(0.7, abs=3 * 2**-8)
    assert optimizer.state[parameter]["step"] == 3


def test_the_learning_rate_of_a_scheduler_is_the_one_used():
    parameter = Parameter(torch.zeros(1_000, dtype=torch.bfloat16))
    optimizer = make_optimizer("SGD", [parameter], 1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (0.5, 0.0, 0.25, 0.0)[step])
    for expected in (-0.5, -0.5, -0.75):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        scheduler.step()
        assert (parameter == expected).all()


def test_gradients_are_cleared_and_missing_ones_skipped():
    parameters = start(torch.bfloat16)
    optimizer = make_optimizer("RMSprop", parameters, 1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, start(torch.bfloat16), strict=True))
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.zero_grad(set_to_none=True)
    assert parameters[0].grad is None


def test_noise_comes_from_the_global_generator():
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        parameters = start(torch.bfloat16)
        train(make_optimizer("RMSprop", parameters, 1e-4), parameters, 2)
        results.append(parameters[0])
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


# What the user is warned of


def test_the_note_names_the_memory_that_float32_needs():
    parameters = [Parameter(torch.ones(1_000, 1_000, dtype=torch.bfloat16)), Parameter(torch.ones(5))]
    expected = {"SGD": "0.004 GB", "RMSprop": "0.006 GB", "Adam": "0.008 GB", "AdamW8bit": "0.004 GB"}
    for name, memory in expected.items():
        note = bfloat16_note(parameters, name)
        assert "model.policy_dtype=bfloat16: " in note and "\n" not in note
        assert f"needs {memory} more" in note
    assert bfloat16_note(parameters[1:], "RMSprop") is None


# Arguments, weight decay, Muon, 8 bits


def policy_of(*shapes: tuple[int, ...]) -> torch.nn.Module:
    """A module with an embedding, whose weight is tied to a head, and parameters of some shapes."""
    module = torch.nn.Module()
    module.embedding = torch.nn.Embedding(5, 4)
    module.head = torch.nn.Linear(4, 5, bias=False)
    module.head.weight = module.embedding.weight
    module.layers = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(shape)) for shape in shapes])
    return module


def options_of(module: torch.nn.Module, *overrides: str) -> OptimizerOptions:
    return OptimizerOptions.of(validated("loss=dpo", *TINY, *overrides)[0], module)


def test_weight_decay_acts_on_matrices_alone():
    """SGD with lr 1/2 and decay 1/4 of a zero gradient: 1 - 1/8; a bias stays."""
    module = policy_of((3, 4), (4,), ())
    parameters = list(module.layers)
    optimizer = make_optimizer("SGD", parameters, 0.5, options_of(module, "weight_decay=0.25"))
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert [float(parameter.detach().max()) for parameter in parameters] == [0.875, 1.0, 1.0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.0]


def test_without_weight_decay_the_optimizers_default_holds_for_all():
    module = policy_of((3, 4), (4,))
    (group,) = make_optimizer("AdamW", module.layers, 0.5, options_of(module)).param_groups
    assert group["weight_decay"] == 0.01 and len(group["params"]) == 2
    (group,) = make_optimizer("SGD", list(module.layers)[:1], 0.5, options_of(module, "weight_decay=0.1")).param_groups
    assert len(group["params"]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arguments_reach_the_constructor(dtype):
    module = policy_of((3, 4)).to(dtype)
    options = options_of(module, "optimizer_args={betas: [0.8, 0.9], eps: 1e-3}")
    optimizer = make_optimizer("Adam", module.layers, 0.5, options)
    (group,) = optimizer.param_groups
    assert (tuple(group["betas"]), group["eps"], group["lr"]) == ((0.8, 0.9), 1e-3, 0.5)
    assert isinstance(optimizer, StochasticRoundingOptimizer) == (dtype == torch.bfloat16)


def test_bfloat16_parameters_decay_in_their_groups():
    module = policy_of((3, 4), (4,)).to(torch.bfloat16)
    optimizer = make_optimizer("SGD", module.layers, 1.0, options_of(module, "weight_decay=0.5"))
    for parameter in module.layers:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert [float(parameter.detach().max()) for parameter in module.layers] == [0.5, 1.0]


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["optimizer_args={beta: 1}"], "optimizer_args.beta: RMSprop has no such argument; it takes alpha, eps, "),
        (["optimizer_args={lr: 1}"], "optimizer_args.lr=1: is a separate setting; use lr=1"),
        (["optimizer_args={weight_decay: 1}"], "optimizer_args.weight_decay=1: is a separate setting; use weight"),
        (["optimizer=Adam", "optimizer_args={betas: 3}"], "optimizer_args={'betas': 3}: Adam does not accept them ("),
        (
            ["optimizer=Adam", "optimizer_args={eps: -1}"],
            "optimizer_args={'eps': -1}: Adam does not accept them (Invali",
        ),
        (["optimizer=SGD", "optimizer_args={nesterov: true}"], "optimizer_args={'nesterov': True}: SGD does not acc"),
    ],
)
def test_arguments_are_checked_before_anything_loads(overrides, line, monkeypatch):
    monkeypatch.setattr("build.load_model_config", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(UserError) as error:
        inputs_of("loss=dpo", *TINY, *overrides)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_muon_takes_the_matrices_of_layers_and_adamw_the_rest():
    module = policy_of((3, 4), (4,), (2, 2, 2))
    options = options_of(module, "optimizer=Muon", "optimizer_args={momentum: 0.5}")
    optimizer = make_optimizer("Muon", list(module.parameters()), 0.5, options)
    muon, adamw = optimizer.optimizers
    assert [tuple(p.shape) for group in muon.param_groups for p in group["params"]] == [(3, 4)]
    assert [tuple(p.shape) for group in adamw.param_groups for p in group["params"]] == [(5, 4), (4,), (2, 2, 2)]
    (group,) = muon.param_groups
    assert (group["momentum"], group["adjust_lr_fn"]) == (0.5, "match_rms_adamw")
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_muon_and_adamw_step_as_torchs_own_and_resume_bit_for_bit():
    module, twin = policy_of((3, 4), (4,)), policy_of((3, 4), (4,))
    twin.load_state_dict(module.state_dict())
    ours = make_optimizer("Muon", list(module.parameters()), 0.1, options_of(module, "optimizer=Muon"))
    theirs = [
        torch.optim.Muon([twin.layers[0]], lr=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([twin.embedding.weight, twin.layers[1]], lr=0.1),
    ]
    schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda t: 1 - t / 8)
    for step in range(6):
        if step == 3:
            saved, rates = io.BytesIO(), schedule.state_dict()
            torch.save(ours.state_dict(), saved)
            ours = make_optimizer("Muon", list(module.parameters()), 9.0, options_of(module, "optimizer=Muon"))
            schedule = torch.optim.lr_scheduler.LambdaLR(ours, lambda t: 1 - t / 8)
            ours.load_state_dict(torch.load(io.BytesIO(saved.getvalue()), weights_only=True))
            schedule.load_state_dict(rates)
        for optimizer in theirs:
            optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 8)
        for a, b in zip(module.parameters(), twin.parameters(), strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        ours.step()
        schedule.step()
        ours.zero_grad(set_to_none=True)
        for optimizer in theirs:
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True)), step
        assert all(parameter.grad is None for parameter in module.parameters())


def test_a_run_with_muon_trains_and_its_head_is_adamws(make_trainer):
    trainer = make_trainer("loss=sft", "loss.normalize=tokens", "optimizer=Muon", "lr=1e-3", "warmup_steps=0")
    muon, adamw = trainer.optimizer.optimizers
    head = trainer.policy.head.weight
    assert any(parameter is head for group in adamw.param_groups for parameter in group["params"])
    assert all(parameter.dim() == 2 for group in muon.param_groups for parameter in group["params"])
    losses = [trainer.train_step(batch)["loss/train"] for batch in trainer.train_batches]
    assert losses[-1] < losses[0]


def test_8_bit_adamw_is_refused_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError) as error:
        inputs_of("loss=dpo", *TINY, "optimizer=AdamW8bit")
    assert str(error.value) == "optimizer=AdamW8bit: needs torchao; pip install torchao, or use optimizer=AdamW"


def test_8_bit_adamw_is_torchaos_with_stochastic_rounding(monkeypatch):
    """torchao is heavy and optional, so a class that keeps its arguments stands in for it."""

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, params, lr, *, bf16_stochastic_round=False, block_size=256, **others):
            super().__init__(params, lr, **others)
            self.kept = (bf16_stochastic_round, block_size)

    library = types.SimpleNamespace(AdamW8bit=AdamW8bit)
    monkeypatch.setitem(sys.modules, "torchao.optim", library)
    monkeypatch.setitem(sys.modules, "torchao", types.SimpleNamespace(optim=library))
    choice = ("loss=dpo", *TINY, "optimizer=AdamW8bit", "optimizer_args={block_size: 64}", "weight_decay=0")
    settings = validated(*choice)[0]
    assert optimizer_problems(settings) == []
    module = policy_of((3, 4), (4,)).to(torch.bfloat16)
    optimizer = make_optimizer("AdamW8bit", module.layers, 0.1, OptimizerOptions.of(settings, module))
    assert optimizer.kept == (True, 64)


def test_muon_alone_updates_an_adapter_whose_weights_are_all_matrices():
    matrices = [torch.nn.Parameter(torch.eye(4)), torch.nn.Parameter(torch.eye(4))]
    optimizer = make_optimizer("Muon", matrices, 0.1)
    sum(matrix.sum() for matrix in matrices).backward()
    optimizer.step()
    assert all((matrix != torch.eye(4)).any() for matrix in matrices)
    optimizer.load_state_dict(optimizer.state_dict())
