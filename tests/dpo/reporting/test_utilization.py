"""How much of the measured matrix rate an update reaches, against FLOPs that are counted by hand."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, validated
from tiny_models import EXAMPLES, mask_responses, respond, tiny

from dpo.model.logps import ResponseLogps
from dpo.reporting import utilization
from dpo.reporting.utilization import Utilization
from dpo.runs.weights import add_adapter

LIVE, CACHED = SimpleNamespace(knows_any_response=True), SimpleNamespace(knows_any_response=False)


def of(module, reference, rate=1e6, n_devices=1):
    """Return the utilization of a module on a device of a known rate."""
    found = Utilization(module, reference, torch.float32, n_devices)
    found.__dict__["rate"] = rate  # in place of a measurement
    return found


def matrices(model):
    """Return the numbers of weights of the body's matrices and of the head of a tiny model that has no adapter."""
    head = model.get_output_embeddings().weight
    embeddings = [m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    body = [p for p in model.parameters() if p.dim() == 2 and not any(p is e for e in [*embeddings, head])]
    return sum(p.numel() for p in body), head.numel()


@pytest.mark.parametrize("family", ["GPT2", "Llama"])  # with tied embeddings, and with a head of its own
@pytest.mark.parametrize("reference, factor", [(LIVE, 8), (CACHED, 6), (None, 6)], ids=["live", "cached", "none"])
def test_a_trained_weight_takes_six_flops_per_token_and_two_more_in_a_live_reference(family, reference, factor):
    module = ResponseLogps.wrap(tiny(family))
    body, head = matrices(module.model)
    assert (of(module, reference).body, of(module, reference).head) == (factor * body, factor * head)
    tokens = sum(len(e.prompt) + sum(map(len, e.responses)) for e in EXAMPLES)
    responses = sum(sum(map(len, e.responses)) for e in EXAMPLES)
    flops = factor * (body * tokens + head * responses)
    metrics = of(module, reference, rate=1e6, n_devices=2)(EXAMPLES, 4.0)
    assert metrics == {
        "examples_per_second": len(EXAMPLES) / 4,
        "tokens_per_second": tokens / 4,
        "mfu": pytest.approx(flops / 4 / 2e6),
    }


def test_the_gradients_of_frozen_weights_are_not_counted(settings_of_lora):
    model = tiny("Llama")
    body, head = matrices(model)
    add_adapter(model, settings_of_lora)
    module = ResponseLogps.wrap(model)
    adapter = sum(p.numel() for p in module.trained_parameters())
    assert of(module, LIVE).head == 6 * head
    assert of(module, LIVE).body == 6 * body + 8 * adapter


@pytest.fixture
def settings_of_lora():
    """Return the settings of a LoRA run."""
    return validated("loss=dpo", *TINY, "lora=default", "lora.r=4")[0]


def test_a_mixture_of_experts_has_no_share_since_tokens_meet_a_part_of_its_weights():
    module = ResponseLogps.wrap(tiny("Mixtral"))
    assert of(module, LIVE)(EXAMPLES, 4.0).keys() == {"examples_per_second", "tokens_per_second"}


def test_the_rate_is_that_of_the_fastest_product(monkeypatch):
    monkeypatch.setitem(utilization.SIZE, "cpu", 100)
    times = iter((0.0, 0.05, 1.0, 1.02, 2.0, 2.04))  # products of 0.05, 0.02 and 0.04 seconds, after which 0.1 are over
    monkeypatch.setattr("dpo.reporting.utilization.time.perf_counter", lambda: next(times))
    found = Utilization(ResponseLogps.wrap(tiny("GPT2")), None, torch.float32)
    assert found.rate == pytest.approx(2 * 100**3 / 0.02)


def test_the_head_counts_only_for_trained_tokens():
    """One token less takes the head's FLOPs less."""
    module = ResponseLogps.wrap(tiny("Llama"))
    found, example = of(module, LIVE), respond([5, 6], [7, 8, 9])
    rates = [found([one], seconds=1.0)["mfu"] for one in (example, mask_responses(example, [1, 0, 1]))]
    assert rates[0] - rates[1] == pytest.approx(found.head / 1e6, rel=1e-9)
