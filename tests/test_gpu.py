"""What needs a CUDA device: python -m pytest -m gpu tests/test_gpu.py.

Needs what the other tests need (requirements-dev.txt), a GPU of compute capability 8.0 or more, and Triton.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import EXACT, EXAMPLES, NOT_EXACT, make_examples, tiny, tiny_config
from torch._dynamo.utils import counters

from dpo.model.attention import attention_kinds, half_precision_kinds, use_attention
from dpo.model.decoding import CachedRows, Decoder, StaticRows, choose_rows
from dpo.model.layout_check import LayoutCheck, choose_layout
from dpo.model.loading import compile_layers
from dpo.model.logps import Float32Product, ResponseLogps, response_logps, uses_float32_product
from dpo.model.packing import LAYOUTS, Packer
from dpo.system.devices import autocast, pick_device, read_facts
from dpo.training import compiling
from dpo.training.references import ModelReference
from losses import preference_loss
from tools import demo

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
HEAD_DIM = 16  # the least that flex attention computes on a GPU
OWN = ("GPTJ", "Falcon")  # have attention of their own, whatever kind is asked for
KINDS = ("varlen", "flex_attention", "packed")
REFUSED = {("GPT2", "flex_attention"), ("Gemma2", "varlen")}  # transformers does; scores are capped
TINY_RUN = (
    *("loss=dpo", "model=tiny", "datasets=[demo]", "max_length=128", "max_prompt_length=64", "batch_size=8"),
    *("lr=1e-4", "warmup_steps=2", "n_eval_examples=8", "do_first_eval=false", "sample_during_eval=false"),
    "wandb.enabled=false",
)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Compiling kernels imports modules of Triton and torch that use what Python deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def tiny_on_gpu(name, kind="sdpa"):
    """Make a tiny model with heads of HEAD_DIM on the GPU."""
    heads = tiny_config(name).num_attention_heads
    own = {"head_dim": HEAD_DIM} if "head_dim" in EXACT[name] else {}
    model = tiny(name, hidden_size=HEAD_DIM * heads, **own).to(pick_device("cuda"))
    use_attention(model, kind)
    return model


def row(*examples):
    return LAYOUTS["shared_prefix"].pack(examples).to(CUDA)


def logps_of(module, batch):
    with autocast(torch.float32, torch.bfloat16, CUDA):
        return response_logps(module, batch).sums


# Attention


def test_cudnn_attention_is_off_and_the_kernel_for_any_lengths_is_tried_first():
    pick_device("cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    facts = read_facts(CUDA)
    assert [*half_precision_kinds(facts, torch.bfloat16), *attention_kinds(facts)] == list(KINDS)


@pytest.mark.parametrize(
    "name, kind", [(name, kind) for name in EXACT if name not in OWN for kind in KINDS if (name, kind) not in REFUSED]
)
def test_the_shared_prefix_is_exact_on_a_gpu(name, kind):
    model = tiny_on_gpu(name, kind)
    used = "eager" if (name, kind) == ("Gemma2", "packed") else kind
    assert LayoutCheck(ResponseLogps.wrap(model), EXAMPLES, "shared_prefix", 128).find_problem(torch.bfloat16) is None
    assert model.config._attn_implementation == used


@pytest.mark.parametrize("name", [*EXACT, *NOT_EXACT])
def test_each_family_gets_the_first_kind_that_is_exact_or_the_padded_layout(name):
    model = tiny_on_gpu(name) if name in EXACT else tiny(name).to(pick_device("cuda"))
    choice = choose_layout(ResponseLogps.wrap(model), EXAMPLES, "shared_prefix", 64, torch.bfloat16)
    assert choice.layout == ("padded" if name in NOT_EXACT else "shared_prefix")
    if name in EXACT and name not in OWN:
        assert choice.attention == ("flex_attention" if name == "Gemma2" else "varlen")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_on_a_gpu_are_those_of_the_cpu(kind):
    """In bfloat16 as far as it rounds: the weights are large, and a CPU's gradient differs by a tenth of its norm."""
    gradients = {}
    for device, dtype in ((torch.device("cpu"), torch.float32), (CUDA, torch.float32), (CUDA, torch.bfloat16)):
        model = tiny_on_gpu("Llama", kind if device == CUDA else "sdpa").to(device)
        batch = LAYOUTS["shared_prefix" if device == CUDA else "padded"].pack(EXAMPLES).to(device)
        with autocast(torch.float32, dtype, device):
            response_logps(ResponseLogps.wrap(model), batch).sums.sum().backward()
        gradients[device.type, dtype] = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
    expected = gradients["cpu", torch.float32]
    assert torch.allclose(gradients["cuda", torch.float32], expected, rtol=1e-3, atol=1e-3)
    assert (gradients["cuda", torch.bfloat16] - expected).norm() < 0.25 * expected.norm()


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_margin_is_exactly_0_in_bfloat16_on_a_gpu(kind, compiled):
    policy, reference = tiny_on_gpu("Llama", kind), tiny_on_gpu("Llama", kind).requires_grad_(False)
    if compiled:
        torch.compiler.reset()
        compile_layers(policy)
        compile_layers(reference)
    live = ModelReference(ResponseLogps.wrap(reference), torch.bfloat16)
    batch = row(*EXAMPLES)
    logps = logps_of(ResponseLogps.wrap(policy), batch)
    with autocast(torch.float32, torch.bfloat16, CUDA):
        expected = live.logps(batch).sums
    _, chosen, rejected = preference_loss(*logps.unbind(1), *expected.unbind(1), beta=0.1)
    # Compiled with and without gradients, a layer may round differently.
    limit = 0.1 * 0.1 if compiled else 0.0
    assert chosen.abs().max() <= limit and rejected.abs().max() <= limit


@pytest.mark.parametrize("compiled", [False, True], ids=["plain", "compiled layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_lengths_compile_nothing_anew_and_memory_stays_flat(kind, compiled):
    """Of 20 updates of policy and reference, each with other lengths, the first 4 may compile and allocate."""
    torch.compiler.reset()
    module = ResponseLogps.wrap(tiny_on_gpu("Llama", kind))
    reference = ResponseLogps.wrap(tiny_on_gpu("Llama", kind).requires_grad_(False))
    optimizer = torch.optim.RMSprop(module.parameters(), lr=1e-4)
    if compiled:
        compile_layers(module.model)
        compile_layers(reference.model)
    graphs, memory = [], []
    for n in range(20):
        batch = row(*make_examples([(30 + n, 20, 9 + n), (5, 40 - n, 7)] * (2 + n % 5)))
        with torch.no_grad():
            expected = logps_of(reference, batch)
        logps = logps_of(module, batch)
        losses, _, _ = preference_loss(*logps.unbind(1), *expected.unbind(1), beta=0.1)
        losses.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        del batch, expected, logps, losses
        graphs.append(counters["stats"]["unique_graphs"])
        memory.append(torch.cuda.memory_allocated())
    assert graphs[-1] == graphs[3]
    assert memory[-1] <= memory[3] + 2**16  # of workspaces


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_pass_waits_for_nothing_on_the_gpu():
    """torch raises an error where the host waits for the GPU."""
    module = ResponseLogps.wrap(tiny_on_gpu("Llama", "varlen"))
    logps_of(module, row(*EXAMPLES)).sum().backward()  # first allocations
    torch.cuda.set_sync_debug_mode("error")
    try:
        logps_of(module, row(*EXAMPLES)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_log_probabilities_do_not_depend_on_the_microbatch_beyond_rounding():
    module = ResponseLogps.wrap(tiny_on_gpu("Llama", "varlen"))
    found = []
    for max_tokens in (1, 1000):
        rows = Packer("shared_prefix", max_tokens, CUDA)(EXAMPLES)
        by_example = {id(e): s for part in rows for e, s in zip(part.examples, logps_of(module, part), strict=True)}
        found.append(torch.stack([by_example[id(example)] for example in EXAMPLES]).double())
    assert torch.allclose(*found, rtol=0, atol=0.25)


def test_a_product_of_bfloat16_is_computed_in_float32_and_its_gradients_in_bfloat16():
    """The products of bfloat16 numbers are exact in float32. The gradients are sums of up to 1,000 products."""
    torch.manual_seed(0)
    inputs = [torch.randn(n, 64, device=CUDA).bfloat16().requires_grad_() for n in (37, 1000)]
    upstream = torch.randn(37, 1000, device=CUDA).bfloat16()
    assert uses_float32_product(inputs[1])
    logits = Float32Product.apply(*inputs)
    gradients = torch.autograd.grad(logits, inputs, upstream.float())
    exact = [each.detach().double().requires_grad_() for each in inputs]
    product = exact[0] @ exact[1].T
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), product, rtol=1e-5, atol=1e-4)
    for found, expected in zip(gradients, torch.autograd.grad(product, exact, upstream.double()), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() < 0.01 * expected.norm()


# Runs


def run(*command, minutes=5):
    """Run a command of the project; return its standard output."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=60 * minutes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def train(folder, *settings, device="cuda"):
    """Train in a folder; return the losses of the updates."""
    run("train.py", f"local_run_dir='{folder}'", f"device={device}", *TINY_RUN, *settings)
    return losses_of(folder)


def losses_of(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([record["loss/train"] for record in records if "loss/train" in record], dtype=torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("compile=true",),
        ("lora=default",),
        ("loss.precompute_reference=true",),
        ("activation_checkpointing=true",),
        ("precision=float32",),
        ("trainer=FSDPTrainer", "n_processes=1"),
    ],
    ids=lambda settings: " ".join(settings) or "default",
)
def test_a_run_on_a_gpu_has_the_losses_of_a_cpu(settings, tmp_path):
    """The first update's is ln 2: policy and reference are the same."""
    losses = train(tmp_path / "gpu", "n_examples=32", *settings)
    adapter = [setting for setting in settings if setting.startswith("lora")]
    on_cpu = train(tmp_path / "cpu", "n_examples=32", "precision=float32", *adapter, device="cpu")
    assert losses[0].item() == pytest.approx(0.6931, abs=1e-3)
    assert len(losses) == 4 and torch.allclose(losses, on_cpu, rtol=0, atol=0.02)


def test_a_long_run_compiles_its_layers_and_has_the_losses_of_one_that_does_not(make_trainer, monkeypatch):
    monkeypatch.setattr(compiling, "MIN_TOKENS", 1)
    torch.compiler.reset()
    losses = []
    for setting in ("auto", "false"):
        settings = ("device=cuda", "precision=bfloat16", f"compile={setting}", "n_examples=32", "n_eval_examples=8")
        trainer = make_trainer("loss=dpo", "lr=1e-4", "warmup_steps=2", *settings)
        trainer.train()
        assert trainer.run.config.compile is (setting == "auto")
        losses.append(losses_of(trainer.run.path))
    assert len(losses[0]) == 4 and torch.allclose(*losses, rtol=0, atol=0.02)


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path):
    """Within the spread of two runs: a GPU adds gradients in no fixed order."""
    whole, again = (train(tmp_path / name, "n_examples=48") for name in ("whole", "again"))
    train(tmp_path / "stopped", "n_examples=24")
    run("train.py", f"resume='{tmp_path / 'stopped'}'", "n_examples=48")
    resumed = losses_of(tmp_path / "stopped")
    assert len(resumed) == len(whole) == 6
    assert (resumed - whole).abs().max() <= 5 * (again - whole).abs().max() + 1e-4


def test_the_demo_ends_well_on_a_gpu(tmp_path):
    for stage in demo.STAGES:
        run("train.py", *demo.overrides(stage, tmp_path), minutes=10)
    assert not demo.DemoResult.read(tmp_path / "dpo").problems()


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Mistral"])
def test_samples_of_cuda_graphs_are_those_of_a_growing_cache(name):
    model = tiny(name).to(pick_device("cuda"))
    prompts = [range(20, 20 + n) for n in (3, 9, 30, 6, 17)]
    decoder = Decoder(64, 1.0, 0, 1.0, torch.float32, (96,))
    kind = choose_rows(model, decoder.max_length, torch.bfloat16)
    assert kind.func is StaticRows and kind.keywords["recorder"].works
    drawn = decoder.decode(model, prompts, range(5), kind)
    assert kind.keywords["recorder"].works
    assert [one.ids for one in drawn] == [one.ids for one in decoder.decode(model, prompts, range(5), CachedRows)]


def test_the_benchmark_runs_on_a_gpu():
    table = run("benchmarks/throughput.py", "--pairs", "8", "--repeats", "1", minutes=15)
    assert "| shared_prefix, bfloat16 |" in table
