"""What needs a CUDA device: python -m pytest -m gpu tests/test_gpu.py.

Needs what the other tests need (requirements-dev.txt), a GPU of compute capability 8.0 or more, and Triton.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import EXACT, EXAMPLES, NOT_EXACT, tiny, tiny_config

from dpo.model.attention import attention_kinds, use_attention
from dpo.model.layout_check import LayoutCheck
from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.packing import make_microbatches
from dpo.system.devices import pick_device, read_facts
from dpo.training.references import ModelReference
from losses import preference_loss

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
HEAD_DIM = 16  # the least that flex attention computes on a GPU
EAGER = ("GPTJ", "Gemma2")  # keep an attention of their own
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # Compiling kernels imports modules of Triton and torch that use what Python deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def tiny_on_gpu(name):
    """Make a tiny model with heads of HEAD_DIM on the GPU."""
    heads = tiny_config(name).num_attention_heads
    own = {"head_dim": HEAD_DIM} if "head_dim" in EXACT[name] else {}
    return tiny(name, hidden_size=HEAD_DIM * heads, **own).to(pick_device("cuda"))


def kinds_of(name):
    """Return the kinds of attention that a family has on a GPU; GPT-2 has no flex attention."""
    return [kind for kind in ("flex_attention", "packed") if (name, kind) != ("GPT2", "flex_attention")]


def test_cudnn_attention_is_off_and_flex_attention_is_tried_first():
    pick_device("cuda")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert attention_kinds(read_facts(CUDA))[0] == "flex_attention"


@pytest.mark.parametrize("name, kind", [(name, kind) for name in EXACT if name not in EAGER for kind in kinds_of(name)])
def test_the_shared_prefix_is_exact_on_a_gpu(name, kind):
    model = tiny_on_gpu(name)
    use_attention(model, kind)
    assert LayoutCheck(ResponseLogps.wrap(model), EXAMPLES, "shared_prefix", 64).find_problem(torch.bfloat16) is None


@pytest.mark.parametrize("name", NOT_EXACT)
def test_models_that_cannot_take_the_shared_prefix_fall_back_on_a_gpu(name):
    model = tiny(name).to(pick_device("cuda"))
    use_attention(model, "packed")
    assert (
        LayoutCheck(ResponseLogps.wrap(model), EXAMPLES, "shared_prefix", 64).find_problem(torch.bfloat16) is not None
    )


@pytest.mark.parametrize("kind", ["flex_attention", "packed"])
def test_gradients_on_a_gpu_are_those_of_the_cpu(kind):
    gradients = []
    for device, attention, layout in ((torch.device("cpu"), "sdpa", "padded"), (CUDA, kind, "shared_prefix")):
        model = tiny_on_gpu("Llama").to(device)
        use_attention(model, attention)
        for laid_out in make_microbatches(EXAMPLES, layout, 1000):
            ResponseLogps.wrap(model)(laid_out.to(device)).sum().backward()
        gradients.append(torch.cat([p.grad.flatten().cpu() for p in model.parameters()]))
    assert torch.allclose(*gradients, rtol=1e-3, atol=1e-3)


def test_the_first_margin_is_exactly_0_in_bfloat16_on_a_gpu():
    policy = tiny_on_gpu("Llama")
    use_attention(policy, "flex_attention")
    reference = tiny_on_gpu("Llama").requires_grad_(False)
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
