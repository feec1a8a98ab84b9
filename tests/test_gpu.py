"""What needs a CUDA device: python -m pytest -m gpu tests/test_gpu.py (needs torch, transformers and pytest alone)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import EXACT, EXAMPLES, NOT_EXACT, tiny

from dpo.attention import use_attention
from dpo.layouts import LayoutCheck
from dpo.logps import ResponseLogps, response_logps
from dpo.packing import make_microbatches
from dpo.references import ModelReference
from losses import preference_loss

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("kind", ["flex_attention", "packed"])
@pytest.mark.parametrize("name", [name for name in EXACT if name not in ("GPTJ", "Gemma2")])
def test_the_shared_prefix_is_exact_on_a_gpu(name, kind):
    model = tiny(name).to(CUDA)
    use_attention(model, kind)
    assert LayoutCheck(ResponseLogps.wrap(model), EXAMPLES, "shared_prefix", 64).problem(torch.bfloat16) is None


@pytest.mark.parametrize("name", NOT_EXACT)
def test_models_that_cannot_take_the_shared_prefix_fall_back_on_a_gpu(name):
    model = tiny(name).to(CUDA)
    use_attention(model, "packed")
    assert LayoutCheck(ResponseLogps.wrap(model), EXAMPLES, "shared_prefix", 64).problem(torch.bfloat16) is not None


@pytest.mark.parametrize("kind", ["flex_attention", "packed"])
def test_gradients_on_a_gpu_are_those_of_the_cpu(kind):
    gradients = []
    for device, attention, layout in ((torch.device("cpu"), "sdpa", "padded"), (CUDA, kind, "shared_prefix")):
        model = tiny("Llama").to(device)
        use_attention(model, attention)
        for laid_out in make_microbatches(EXAMPLES, layout, 1000):
            ResponseLogps.wrap(model)(laid_out.to(device)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-3)


def test_the_first_margin_is_exactly_0_in_bfloat16_on_a_gpu():
    policy = tiny("Llama").to(CUDA)
    use_attention(policy, "flex_attention")
    reference = tiny("Llama").to(CUDA).requires_grad_(False)
    use_attention(reference, "flex_attention")
    live = ModelReference(ResponseLogps.wrap(reference), torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        (layout,) = (laid_out.to(CUDA) for laid_out in make_microbatches(EXAMPLES, "shared_prefix", 1000))
        logps = response_logps(ResponseLogps.wrap(policy), layout).sums
        _, chosen, rejected = preference_loss(*logps.unbind(1), *live.logps(layout).sums.unbind(1), beta=0.1)
    assert (chosen == 0).all() and (rejected == 0).all()


def test_the_benchmark_runs_on_a_gpu():
    command = [sys.executable, "benchmarks/throughput.py", "--pairs", "8", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| shared_prefix, bfloat16 |" in done.stdout
