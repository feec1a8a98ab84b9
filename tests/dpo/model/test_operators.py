"""Training uses operators that every kind of device has, by torch's own table of which kernel exists where."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchgen
import yaml
from tiny_models import EXAMPLES, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from dpo.model.accumulation import accumulate_in_place
from dpo.model.attention import sdpa_attention_forward, use_attention
from dpo.model.logps import Logps, ResponseLogps, response_logps
from dpo.model.packing import LAYOUTS
from losses import preference_loss

TABLE = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
ATTENTION = "aten::_scaled_dot_product_"  # torch picks another of these kernels on each kind of device


class Recorder(TorchDispatchMode):
    """Notes which operators are called, how many in all, and which of them give float64."""

    def __init__(self):
        super().__init__()
        self.names, self.float64, self.count = set(), set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name + (f".{function._schema.overload_name}" if function._schema.overload_name else "")
        self.names.add(name)
        self.count += 1
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            self.float64.add(name)
        return result


@cache
def table() -> dict[str, dict]:
    entries = yaml.safe_load(TABLE.read_text())
    return {f"aten::{entry['func'].split('(')[0]}": entry for entry in entries}


def runs_on_mps(name: str) -> bool:
    """Whether an operator has a kernel for MPS, or is made of others."""
    entry = table()[name]
    if "structured_delegate" in entry:
        return runs_on_mps(f"aten::{entry['structured_delegate']}")
    keys = [key.strip() for keys in entry.get("dispatch", {}) for key in keys.split(",")]
    return not keys or any(key == "MPS" or key.startswith("Composite") for key in keys)


def as_on_a_gpu(query, key, value, mask, lengths, **how):
    """Attend in one example by torch's own attention."""
    module = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1])
    return sdpa_attention_forward(module, query, key, value, mask, **how)[0]


def test_the_table_knows_what_mps_lacks():
    assert runs_on_mps("aten::mm") and runs_on_mps("aten::cat") and runs_on_mps("aten::reshape")
    assert not runs_on_mps("aten::segment_reduce") and not runs_on_mps("aten::_segment_reduce_backward")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["Llama", "GPT2", "Gemma2"])
def test_an_update_uses_operators_that_mps_has_and_no_float64(name, layout, dtype, monkeypatch):
    """Both ways to the logits, and chunks of them; a CPU's own attention is left out as a GPU leaves it out."""
    monkeypatch.setattr("dpo.model.logps.CHUNK_BYTES", 0)
    monkeypatch.setattr("dpo.model.logps.CHUNK_TOKENS", 7)
    monkeypatch.setattr("dpo.model.attention.cpu_attention", as_on_a_gpu)
    module = accumulate_in_place(ResponseLogps.wrap(tiny(name), float32_head=dtype != torch.float32))
    use_attention(module.model, "packed")
    optimizer = torch.optim.RMSprop(module.parameters(), lr=1e-3)
    with Recorder() as recorder:
        batch = LAYOUTS[layout].pack(EXAMPLES).to(torch.device("cpu"))
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logps = response_logps(module, batch)
        losses, _, _ = preference_loss(*logps.means.unbind(1), *logps.sums.detach().unbind(1), beta=0.1)
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    used = {name for name in recorder.names if name.startswith("aten::") and not name.startswith(ATTENTION)}
    assert len(used) > 20
    assert not {name for name in used if not runs_on_mps(name)}
    assert not recorder.float64


def test_sums_are_those_of_each_response_and_their_gradient_reaches_each_token_once():
    """Tokens 1, 2, 4, ... make every sum unique; lengths 2, 1 and 3, 4."""
    tokens = (2.0 ** torch.arange(10)).requires_grad_()
    lengths = torch.tensor([[2, 1], [3, 4]])
    logps = Logps.from_tokens(tokens, lengths)
    assert logps.sums.tolist() == [[1 + 2, 4], [8 + 16 + 32, 64 + 128 + 256 + 512]]
    assert torch.allclose(logps.means, torch.tensor([[1.5, 4.0], [56 / 3, 240.0]]))
    (logps.sums * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert tokens.grad.tolist() == [1, 1, 2, 3, 3, 3, 4, 4, 4, 4]


@pytest.mark.parametrize("n", [1, 64])
def test_sums_take_as_many_operations_for_one_pair_as_for_many(n):
    """Each is a kernel's launch on a GPU. A pass of 64 pairs had 1,166 of them, forward and backward, as a loop."""
    lengths = torch.tensor([[3, 5]] * n)
    tokens = torch.ones(8 * n, requires_grad=True)
    with Recorder() as recorder:
        Logps.from_tokens(tokens, lengths, [3, 5] * n).sums.sum().backward()
    assert recorder.count < 30


def test_sums_have_the_bits_of_padded_rows_and_empty_responses_have_none():
    """As split and pad_sequence gave them, which earlier versions trained with."""
    sizes = [7, 0, 1, 300, 129, 64]
    tokens = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0))
    expected = torch.nn.utils.rnn.pad_sequence(tokens.split(sizes), batch_first=True).sum(1)
    assert torch.equal(Logps.from_tokens(tokens, torch.tensor(sizes).view(3, 2)).sums.flatten(), expected)
