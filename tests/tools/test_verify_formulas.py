"""The losses that tools/verify writes out, against those that are trained."""

import math

import pytest
import torch
from conftest import make_loss
from omegaconf import OmegaConf
from tiny_models import respond, weigh

from dpo.system.installation import CONFIG
from dpo.training.objectives import Context
from tools.verify.formulas import FORMULAS, written_out
from tools.verify.plain_run import as_logps

LENGTHS = [(5, 3), (2, 7), (4, 4)]
WEIGHTS = [1.0, 2.0, 0.5]
OPTIONS = [
    *((name, {}) for name in FORMULAS),
    ("dpo", {"label_smoothing": 0.1, "beta": 0.5}),
    ("dpo", {"length_normalize": True, "nll_weight": 0.3}),
    ("dpo", {"ld_alpha": 0.4}),
    ("dpo", {"reference_free": True}),
    *(("dpo", {"divergence": kind, "divergence_alpha": 0.3}) for kind in ("forward_kl", "js", "alpha")),
    ("robust", {"label_smoothing": 0.2, "divergence": "js"}),
    ("ipo", {"average_log_prob": True, "nll_weight": 1.0}),
    ("cpo", {"nll_weight": 0.7, "average_nll": True}),
    ("rdpo", {"alpha": 0.2}),
    *(("sft", {"normalize": kind}) for kind in ("sum", "example", "tokens")),
]


def draw_tokens(seed, n_responses):
    """Draw log-probabilities of tokens, by example and response."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: -torch.rand(n, generator=generator, dtype=torch.float64)  # noqa: E731
    return [[draw(n) for n in lengths[:n_responses]] for lengths in LENGTHS]


@pytest.mark.parametrize("name, options", OPTIONS, ids=[f"{name} {options}" for name, options in OPTIONS])
def test_a_loss_that_is_written_out_is_the_one_that_is_trained(name, options):
    settings = OmegaConf.to_container(OmegaConf.load(CONFIG / "loss" / f"{name}.yaml")) | options
    loss = make_loss(name, **options)
    policy, reference = (draw_tokens(seed, loss.n_responses) for seed in (1, 2))
    reference = reference if loss.needs_reference else None
    examples = [
        weigh(respond([1], *(range(n) for n in lengths[: loss.n_responses])), weight)
        for lengths, weight in zip(LENGTHS, WEIGHTS, strict=True)
    ]
    context = Context(examples, loss.batch_sums(examples, lambda examples: pytest.fail("no second pass")))
    losses, _ = loss(as_logps(policy), None if reference is None else as_logps(reference), context)
    trained = sum(w * each.item() for w, each in zip(WEIGHTS, losses, strict=True)) / sum(WEIGHTS)
    assert written_out(settings)(policy, reference, WEIGHTS).item() == pytest.approx(trained, rel=1e-7)


def test_dpo_by_hand():
    """h = (-1 - 2) - (-3 - -1) = -1, beta 0.5: log(1 + e^0.5)."""
    one = lambda value: torch.tensor([float(value)])  # noqa: E731
    settings = {"name": "dpo", "beta": 0.5, "label_smoothing": 0}
    loss = written_out(settings)([[one(-3), one(0)]], [[one(-3), one(-1)]], [1.0])
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.5)))


@pytest.mark.parametrize("settings", [{"name": "kto"}, {"name": "bco"}, {"name": "dpo", "token_weights": "wpo"}])
def test_what_is_not_written_out_is_said_to_be_so(settings):
    assert written_out(settings) is None
