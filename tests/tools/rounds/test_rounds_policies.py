"""The folder of a policy that other programs load."""

from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, TINY, validated
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tools.candidates import Candidate, find_candidate
from tools.rounds.policies import Policy

TOKENIZER = AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2")
SHORT = ("n_examples=8", "n_eval_examples=8", "eval_batch_size=8", "do_first_eval=false", "lr=1e-2", "warmup_steps=0")
IDS = torch.tensor([TOKENIZER.encode("Human: Name a river.")])


@pytest.fixture
def make_policy(tmp_path):
    """Return a function that makes a policy of a run or, without one, the first policy of a command line."""

    def make(*overrides, run=None):
        if run is None:
            candidate = Candidate("first", *validated(*TINY, "loss=dpo", *overrides), None)
        else:
            candidate = find_candidate(run)
        return Policy(candidate, TOKENIZER, [7], tmp_path / "policies" / "0")

    return make


def assert_is_policy(folder: str, policy: Policy) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        ours = policy.load(torch.device("cpu")).eval()(IDS).logits
        torch.testing.assert_close(model(IDS).logits, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [(), ("lora=default",)], ids=["all weights", "a new adapter"])
def test_the_first_policy_is_the_model_itself(lora, make_policy):
    policy = make_policy(*lora)
    assert policy.folder() == str((GOLDENS / "tiny-gpt2").resolve())
    assert not policy.export.exists()


@pytest.mark.parametrize("lora", [(), ("lora=default", "lora.export_merged=true")], ids=["all weights", "adapter"])
def test_the_policy_of_a_round_is_its_export(lora, make_policy, make_trainer):
    trainer = make_trainer(*SHORT, "loss=dpo", *lora)
    trainer.train()
    policy = make_policy(run=trainer.run.path)
    folder = Path(policy.folder())
    hf = (trainer.run.path / "LATEST").resolve() / "hf"
    assert folder == (hf / "merged" if lora else hf) and not policy.export.exists()
    assert_is_policy(str(folder), policy)


def test_an_adapter_that_is_merged_nowhere_is_merged_into_an_export(make_policy, make_trainer):
    trainer = make_trainer(*SHORT, "loss=dpo", "lora=default")
    trainer.train()
    policy = make_policy(run=trainer.run.path)
    assert policy.folder() == str(policy.export)
    assert_is_policy(policy.folder(), policy)


def test_a_policy_of_an_archive_or_an_adapter_is_exported_once(make_policy, make_trainer):
    trainer = make_trainer(*SHORT, "loss=dpo")
    trainer.train()
    policy = make_policy(f"model.archive='{trainer.run.path / 'LATEST' / 'policy.pt'}'")
    assert policy.folder() == str(policy.export)
    assert_is_policy(policy.folder(), policy)
    assert 7 in GenerationConfig.from_pretrained(policy.folder()).eos_token_id
    assert AutoTokenizer.from_pretrained(policy.folder()).encode("a b") == TOKENIZER.encode("a b")
    written = (policy.export / "config.json").stat().st_mtime_ns
    assert (policy.folder(), (policy.export / "config.json").stat().st_mtime_ns) == (str(policy.export), written)


def test_a_first_policy_with_a_trained_adapter_has_it_merged(make_policy, make_trainer):
    trainer = make_trainer(*SHORT, "loss=dpo", "lora=default")
    trainer.train()
    policy = make_policy("lora=default", f"lora.path='{(trainer.run.path / 'LATEST' / 'hf')}'")
    assert policy.folder() == str(policy.export)
    assert_is_policy(policy.folder(), policy)


def test_another_tokenizer_than_the_models_makes_an_export(make_policy):
    policy = make_policy(f"model.tokenizer_name_or_path='{GOLDENS / 'tiny-gpt2'}'")
    assert policy.folder() == str(policy.export)
