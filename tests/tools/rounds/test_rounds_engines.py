"""The built-in engine: which tasks are drawn together, what becomes of a sample, and that its model is freed."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from conftest import TINY, validated
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

from dpo.model.decoding import Decoder
from dpo.system.errors import RunError
from tools.candidates import Candidate
from tools.rounds.engines import BuiltinEngine
from tools.rounds.policies import Policy
from tools.rounds.records import Prompt, Task

TEXTS = [
    "\n\nHuman: Why is the sky blue?\n\nAssistant:",
    "\n\nHuman: Hi.\n\nAssistant:",
    "\n\nHuman: Ho!\n\nAssistant:",
]
ENGINE = BuiltinEngine(batch_size=5)


@pytest.fixture(scope="module")
def policy() -> Policy:
    settings, loss = validated("loss=dpo", *TINY, "max_length=48", "max_prompt_length=24", "sample_top_k=20")
    tokenizer = AutoTokenizer.from_pretrained(settings.model.name_or_path)
    return Policy(Candidate("first", settings, loss, None), tokenizer, [7], Path("export"))


@pytest.fixture(scope="module")
def tasks(policy) -> list[Task]:
    prompts = [Prompt(i, text, text, policy.tokenizer(text).input_ids[-24:]) for i, text in enumerate(TEXTS)]
    return [Task.of(0, "round-1", prompt, index) for prompt in prompts for index in range(4)]


@pytest.fixture(scope="module")
def samples(policy, tasks):
    with ENGINE.opened(policy, "cpu") as draw:
        return list(draw(ENGINE.batches(tasks)))


def test_batches_hold_prompts_of_similar_length_whatever_the_order_of_the_tasks(tasks):
    lengths = {task.prompt.id: len(task.prompt.ids) for task in tasks}
    assert lengths[1] == lengths[2] < lengths[0]
    batches = ENGINE.batches(tasks)
    assert [len(batch) for batch in batches] == [5, 5, 2]
    order = [(task.prompt.id, task.index) for batch in batches for task in batch]
    assert order == [(prompt, index) for prompt in (1, 2, 0) for index in range(4)]
    assert ENGINE.batches(tasks[::-1]) == batches
    assert ENGINE.batches([]) == []


def test_every_task_gets_a_sample_of_its_own(tasks, samples, policy):
    assert {(sample.id, sample.prompt, sample.index) for sample in samples} == {
        (task.id, task.prompt.id, task.index) for task in tasks
    }
    assert len({tuple(sample.ids) for sample in samples}) == len(tasks)
    stops = {policy.tokenizer.eos_token_id, 7}
    prompts = {task.id: task.prompt for task in tasks}
    for sample in samples:
        assert sample.finished == (sample.ids[-1] in stops) and not stops & {*sample.ids[:-1]}
        assert sample.finished or len(prompts[sample.id].ids) + len(sample.ids) == 48
        assert sample.text == policy.tokenizer.decode(sample.ids, skip_special_tokens=True)
    assert {sample.finished for sample in samples} == {True, False}


def test_the_log_probability_of_a_sample_is_that_of_the_policy(tasks, samples, policy):
    model = policy.load(torch.device("cpu")).eval()
    prompts = {task.id: task.prompt for task in tasks}
    for sample in samples:
        ids = [*prompts[sample.id].ids, *sample.ids]
        logits = model(torch.tensor([ids])).logits[0, -len(sample.ids) - 1 : -1].detach()
        logp = logits.log_softmax(-1).gather(1, torch.tensor(sample.ids)[:, None]).sum()
        assert abs(sample.logp - float(logp)) < 1e-3


def test_a_batch_is_the_same_whichever_batches_were_drawn_before(tasks, samples, policy):
    batches = ENGINE.batches(tasks)
    with ENGINE.opened(policy, "cpu") as draw:
        assert list(draw(batches[1:])) == samples[5:]
        assert list(draw(batches[:1])) == samples[:5]


def test_samples_of_another_size_of_batch_differ_by_rounding_alone(tasks, samples, policy):
    engine = BuiltinEngine(batch_size=64)
    with engine.opened(policy, "cpu") as draw:
        together = list(draw(engine.batches(tasks)))
    assert [sample.ids for sample in together] == [sample.ids for sample in samples]


def test_the_model_is_freed_where_the_engine_is_closed_also_after_an_error(tasks, policy, monkeypatch):
    loaded = []
    load = Policy.load

    def remember(self, device):
        model = load(self, device)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(Policy, "load", remember)
    with pytest.raises(KeyError), ENGINE.opened(policy, "cpu") as draw:
        next(draw(ENGINE.batches(tasks)))
        assert loaded[0]() is not None
        raise KeyError
    gc.collect()
    assert loaded[0]() is None and callable(draw)


class Casts(TorchDispatchMode):
    """Counts the casts of parameters."""

    n = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_cast = function is torch.ops.aten._to_copy.default and isinstance(args[0], torch.nn.Parameter)
        self.n += is_cast and (kwargs or {}).get("dtype") == torch.bfloat16
        return function(*args, **(kwargs or {}))


def test_weights_are_cast_once_for_each_batch_those_below_an_adapter_too(tasks):
    settings, loss = validated(
        "loss=dpo", *TINY, "max_length=48", "max_prompt_length=24", "lora=default", "precision=bfloat16"
    )
    tokenizer = AutoTokenizer.from_pretrained(settings.model.name_or_path)
    policy = Policy(Candidate("first", settings, loss, None), tokenizer, [], Path("export"))
    with ENGINE.opened(policy, "cpu") as draw, Casts() as casts:
        samples = list(draw(ENGINE.batches(tasks)))
    n_parameters = len(list(policy.load(torch.device("cpu")).parameters()))
    assert sum(len(sample.ids) for sample in samples) > 100
    assert n_parameters < casts.n <= 3 * n_parameters


def test_where_memory_does_not_suffice_the_error_names_the_size_of_the_batch(tasks, policy, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Decoder, "decode", fail)
    with ENGINE.opened(policy, "cpu") as draw, pytest.raises(RunError) as caught:
        next(draw(ENGINE.batches(tasks)))
    assert "while drawing 5 samples at a time; lower engine.batch_size" in str(caught.value)


def test_the_built_in_engine_refuses_no_settings(policy):
    assert [*ENGINE.problems(policy.candidate.settings)] == []
