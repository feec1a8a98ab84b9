"""Decoding: the distribution that the settings name, and samples that do not depend on those of their batch."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import TINY, tiny_tokenizer, validated
from recording import record
from tiny_models import EXACT, MIXTURES, NOT_EXACT, composite, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig

from dpo.model.cuda_graphs import Recorder
from dpo.model.decoding import (
    PRECISION,
    CachedRows,
    Decoder,
    StaticRows,
    WholeRows,
    choose_rows,
    draw,
    kinds_of_rows,
)
from dpo.system.errors import RunError

DECODER = Decoder(max_length=24, temperature=1.0, top_k=0, top_p=1.0, dtype=torch.float32, stops=(96,))
# Of different lengths, so that most are padded, and in no order; one is continued twice.
PROMPTS = [(5, 17, 40), tuple(range(60, 70)), (5, 17, 40), tuple(range(30, 51)), (7,)]
SEEDS = [1, 2, 3, 4, 5]
UNUSUAL = ["Qwen3_5", "Gemma3"]  # a composite model's language model, the first with linear attention as well


def build(name: str):
    return composite(name) if name in UNUSUAL else tiny(name)


@torch.no_grad()
def logp_of(model, prompt, ids) -> float:
    """log pi(ids | prompt) by a forward pass of the whole text, alone and without cache."""
    logits = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum())


@pytest.fixture(scope="module")
def model():
    return tiny("GPT2")


# The distribution


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, int]:
    """The statistic, and its degrees of freedom; tokens of which fewer than 5 are expected are counted as one."""
    expected = probabilities.double() * counts.sum()
    rare = expected < 5
    assert counts[expected == 0].sum() == 0
    counts = torch.cat((counts[~rare], counts[rare].sum()[None]))
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    terms = ((counts - expected) ** 2 / expected)[expected > 0]
    return float(terms.sum()), len(terms) - 1


@pytest.mark.parametrize(
    "cut",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 3.0},
        {"top_k": 4},
        {"top_p": 0.6},
        {"temperature": 2.0, "top_k": 12, "top_p": 0.8},
    ],
    ids=str,
)
def test_tokens_have_the_distribution_that_generate_draws_from(cut, model):
    """10,000 first tokens against generate's scores. The statistic has mean n and variance 2 n for n degrees."""
    options = {"max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True, "pad_token_id": 0}
    config = GenerationConfig(do_sample=True, **options, **{"top_k": 0, **cut})
    expected = model.generate(torch.tensor(PROMPTS[:1]), generation_config=config).scores[0][0].softmax(0)
    decoder = replace(DECODER, max_length=4, **cut)
    drawn = decoder.decode(model, PROMPTS[:1] * 10_000, range(10_000))
    counts = torch.tensor([one.ids[0] for one in drawn]).bincount(minlength=97)
    statistic, n = chi_square(counts, expected)
    assert n >= 2 and abs(statistic - n) < 4 * (2 * n) ** 0.5
    plain = model(torch.tensor(PROMPTS[:1])).logits[0, -1].detach().softmax(0)
    assert not cut or chi_square(counts, plain)[0] > 1000


def test_each_token_is_drawn_from_the_random_number_of_its_step(model):
    """The steps of a sample are independent: second tokens after the most frequent first one, as above."""
    drawn = replace(DECODER, max_length=5).decode(model, PROMPTS[:1] * 10_000, range(10_000))
    pairs = torch.tensor([one.ids for one in drawn if len(one.ids) == 2])
    first = int(pairs[:, 0].bincount().argmax())
    counts = pairs[pairs[:, 0] == first, 1].bincount(minlength=97)
    expected = model(torch.tensor([[*PROMPTS[0], first]])).logits[0, -1].softmax(0).detach()
    statistic, n = chi_square(counts, expected)
    assert n >= 2 and counts.sum() > 500 and abs(statistic - n) < 4 * (2 * n) ** 0.5


@pytest.mark.parametrize("random", [0, 1, 2**PRECISION - 1])
def test_no_token_of_probability_0_is_drawn(random):
    scores = torch.full((1, 50_000), -torch.inf)
    scores[0, 100:200] = 0.0
    scores[0, 40_000] = -3.0
    expected = {0: 100, 1: 100, 2**PRECISION - 1: 40_000}
    assert draw(scores, torch.tensor([random])).item() == expected[random]


# What a sample depends on


def test_a_sample_depends_on_its_prompt_and_seed_alone(model):
    together = DECODER.decode(model, PROMPTS, SEEDS)
    assert len({tuple(one.ids) for one in together}) == len(PROMPTS)
    for order in ([4, 3, 2, 1, 0], [2], [0, 4], [1, 1]):
        again = DECODER.decode(model, [PROMPTS[i] for i in order], [SEEDS[i] for i in order])
        assert [one.ids for one in again] == [together[i].ids for i in order]
    others = DECODER.decode(model, PROMPTS, [seed + 10 for seed in SEEDS])
    assert all(one.ids != other.ids for one, other in zip(together, others, strict=True))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert DECODER.decode(model, PROMPTS, SEEDS) == together
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", [*EXACT, *NOT_EXACT, *MIXTURES, *UNUSUAL])
def test_no_padding_and_no_cache_changes_the_logits_of_a_sample(name):
    """The log-probability of each sample of a batch is that of a forward pass of its text alone."""
    model = build(name)
    kind = choose_rows(model, DECODER.max_length)
    assert kind is CachedRows
    for one, prompt in zip(DECODER.decode(model, PROMPTS, SEEDS, kind), PROMPTS, strict=True):
        assert abs(one.logp - logp_of(model, prompt, one.ids)) < 1e-3


def test_a_model_whose_cache_changes_logits_is_computed_without_it(capsys):
    model = tiny("GPT2")
    forward = model.forward

    def broken(*args, past_key_values=None, **kwargs):
        output = forward(*args, past_key_values=past_key_values, **kwargs)
        if past_key_values is not None:
            output.logits = output.logits + 0.01 * torch.arange(97)
        return output

    expected = DECODER.decode(model, PROMPTS, SEEDS)
    assert choose_rows(model, DECODER.max_length) is CachedRows
    model.forward = broken
    assert choose_rows(model, DECODER.max_length) is WholeRows
    assert "changes log-probabilities by" in capsys.readouterr().out
    assert [one.ids for one in DECODER.decode(model, PROMPTS, SEEDS, WholeRows)] == [one.ids for one in expected]
    model.prepare_inputs_for_generation = None
    assert choose_rows(model, DECODER.max_length) is WholeRows
    assert "key-value cache fails (TypeError: " in capsys.readouterr().out


# A cache whose steps are recorded, as on a GPU

NOT_RECORDED = ["Falcon", "JetMoe"]  # copies numbers from the host; reads the number of each expert's tokens
NOT_STATIC = ["Mpt", "Mamba"]


@pytest.mark.parametrize("name", ["GPT2", "Mistral", "Gemma3", *NOT_RECORDED, *NOT_STATIC])
def test_samples_of_recorded_steps_are_those_of_computed_ones(name, capsys):
    """Also with a sliding window of 16 tokens, and masks for each kind of layer."""
    model, recorder = build(name), Recorder(record)
    decoder = replace(DECODER, max_length=36)
    static = partial(StaticRows, recorder=recorder)
    kind = choose_rows(model, decoder.max_length, kinds={"static cache": static, "cache": CachedRows})
    drawn, expected = decoder.decode(model, PROMPTS, SEEDS, kind), decoder.decode(model, PROMPTS, SEEDS)
    assert [one.ids for one in drawn] == [one.ids for one in expected]
    assert all(abs(one.logp - other.logp) < 1e-3 for one, other in zip(drawn, expected, strict=True))
    assert kind is (CachedRows if name in NOT_STATIC else static)
    messages = capsys.readouterr().out
    assert ("static cache fails" in messages) == (name in NOT_STATIC)
    assert name in NOT_STATIC or ("uses no CUDA graphs" in messages) == (name in NOT_RECORDED) == (not recorder.works)


def test_recorded_steps_under_autocast_keep_keys_and_values_as_attention_reads_them():
    """Rotary embeddings make keys float32, values are not. Attention over a longer buffer rounds differently."""
    model, recorder = tiny("Llama"), Recorder(record)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = []
        for rows in [kind(model, PROMPTS) for kind in (CachedRows, partial(StaticRows, recorder=recorder))]:
            for token in (5, 6, 7):
                rows.append(torch.full((5,), token))
            logits.append(rows.logits.float().log_softmax(-1))
    layer = rows.cache["past_key_values"].layers[0]
    assert recorder.works and {layer.keys.dtype, layer.values.dtype} == {torch.bfloat16}
    assert (logits[0].exp() * (logits[0] - logits[1]).abs()).sum(-1).max() < 0.02


class Layouts(StaticRows):
    """Remembers the rows and slots of each layout, and the number of its steps."""

    seen: list[list[int]]

    def append(self, tokens):
        new = not self.is_ready
        super().append(tokens)
        if new or list(self.mask.shape) != self.seen[-1][:2]:
            self.seen.append([*self.mask.shape, 0])
        self.seen[-1][2] += 1


def test_rows_leave_once_half_of_them_have_ended_and_slots_are_added_when_they_are_full(model, monkeypatch):
    """Samples of 116 tokens, four of five rows shorter: looks after 16, 32 and 48 tokens."""
    monkeypatch.setattr(Layouts, "seen", [], raising=False)
    prompts = [[20] * n for n in (12, 90, 100, 80, 85)]
    decoder = replace(DECODER, max_length=128, stops=())
    drawn = decoder.decode(model, prompts, SEEDS, partial(Layouts, recorder=Recorder(record)))
    assert [len(one.ids) for one in drawn] == [116, 38, 28, 48, 43]
    assert Layouts.seen == [[5, 320, 47], [1, 320, 68]]
    assert [one.ids for one in drawn] == [one.ids for one in decoder.decode(model, prompts, SEEDS)]


def test_slots_are_added_before_they_are_full(model, monkeypatch):
    """From 3 slots, one more than half of them and 128, rounded up: 192."""
    monkeypatch.setattr(Layouts, "seen", [], raising=False)
    rows = Layouts(tiny("Llama", max_position_embeddings=512), [PROMPTS[0]] * 2, Recorder(record))
    for _ in range(190):
        rows.append(torch.tensor([5, -1]))
    assert Layouts.seen == [[2, 192, 188], [2, 448, 2]]
    assert rows.mask.sum(1).tolist() == [193, 3]
    expected = rows.model(torch.tensor([[*PROMPTS[0], *[5] * 190]])).logits[0, -1]
    assert torch.allclose(rows.logits[0], expected, atol=1e-4)


def test_the_device_is_waited_for_after_every_16_tokens_of_recorded_steps(model):
    """Three times for a sample of 45 tokens, of which the last look ends it."""

    class Looks(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.n += function is torch.ops.aten.nonzero.default
            return function(*args, **(kwargs or {}))

    decoder = replace(DECODER, max_length=48, stops=())
    for kind, n in ((StaticRows, 3), (CachedRows, 45)):
        with Looks() as looks:
            decoder.decode(model, PROMPTS[:1], SEEDS[:1], kind)
        assert looks.n == n


def test_steps_are_recorded_on_a_gpu_alone():
    first, second = kinds_of_rows(torch.device("cuda")).values()
    assert (first.func, type(first.keywords["recorder"]), second) == (StaticRows, Recorder, CachedRows)
    assert [*kinds_of_rows(torch.device("cpu")).values()] == [CachedRows]


# Where a sample ends


def test_prompt_and_sample_together_have_max_length_tokens_beside_prompts_of_other_lengths(model):
    decoder = replace(DECODER, max_length=10, stops=())
    lengths = {3: 7, 8: 2, 9: 1, 10: 1, 12: 1}  # a prompt that leaves no room gets one token
    drawn = decoder.decode(model, [range(20, 20 + n) for n in lengths], SEEDS)
    assert [len(one.ids) for one in drawn] == list(lengths.values())
    assert not any(one.finished for one in drawn)


def test_a_sample_ends_with_its_first_stop_and_the_others_go_on(model):
    whole = replace(DECODER, stops=()).decode(model, PROMPTS, SEEDS)
    stops = [whole[0].ids[4], whole[1].ids[-1]]
    ended = replace(DECODER, stops=stops).decode(model, PROMPTS, SEEDS)
    for one, before, prompt in zip(ended, whole, PROMPTS, strict=True):
        n = next((i + 1 for i, token in enumerate(before.ids) if token in stops), len(before.ids))
        assert (one.ids, one.finished) == (before.ids[:n], before.ids[n - 1] in stops)
        assert abs(one.logp - logp_of(model, prompt, one.ids)) < 1e-3
    assert 0 < ended[0].logp - whole[0].logp and ended[1].finished  # also where the last token is a stop
    assert not all(one.finished for one in ended)


@pytest.mark.parametrize("cut", [{"temperature": 0.4}, {"top_k": 3}, {"top_p": 0.5}], ids=str)
def test_the_log_probability_is_that_of_temperature_1_whatever_is_drawn_from(cut, model):
    (one,) = replace(DECODER, **cut).decode(model, PROMPTS[:1], [3])
    assert abs(one.logp - logp_of(model, PROMPTS[0], one.ids)) < 1e-3


def test_a_policy_without_finite_logits_ends_the_run(model):
    broken = tiny("GPT2")
    broken.transformer.ln_f.bias.data[0] = torch.nan
    with pytest.raises(RunError, match="logits are not finite"):
        DECODER.decode(broken, PROMPTS, SEEDS)


def test_a_runs_settings_describe_its_decoder():
    drawing = ("sample_temperature=0.5", "sample_top_k=7", "sample_top_p=0.9")
    settings, _ = validated("loss=dpo", *TINY, "max_length=20", "max_prompt_length=10", *drawing)
    tokenizer = tiny_tokenizer("gpt2")
    expected = Decoder(20, 0.5, 7, 0.9, torch.bfloat16, (tokenizer.eos_token_id, 5))
    assert Decoder.of(settings, tokenizer, [5], torch.bfloat16) == expected


def test_weights_in_float32_are_computed_in_the_dtype_of_the_decoder(model):
    rounded = replace(DECODER, dtype=torch.bfloat16).decode(model, PROMPTS, SEEDS)
    exact = DECODER.decode(model, PROMPTS, SEEDS)
    assert [one.logp for one in rounded] != [one.logp for one in exact]
    for one, prompt in zip(rounded, PROMPTS, strict=True):
        assert abs(one.logp - logp_of(model, prompt, one.ids)) < 0.2 * len(one.ids)
