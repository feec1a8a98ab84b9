"""Loading the tokenizer and the policy, and preparing a model for training."""

import pytest
import torch
import transformers
from conftest import GOLDENS, TINY, validated
from tiny_models import tiny

from dpo.model.loading import compile_layers, load_model_config, resize_embeddings
from dpo.system.errors import UserError


def test_a_model_without_known_layers_is_not_compiled():
    with pytest.raises(UserError, match="compile=true"):
        compile_layers(torch.nn.Linear(2, 2))


def test_a_chat_template_of_the_run_is_exported_and_its_file_must_exist(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }}é", encoding="utf-8")
    for value in (str(file), file.read_text(encoding="utf-8")):
        settings = validated("loss=dpo", *TINY)[0].model
        tokenizer = load_model_config(settings, value)[1]
        assert tokenizer.chat_template == "{{ messages[0].content }}é"
    tokenizer.save_pretrained(tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    with pytest.raises(UserError, match="chat_template=no.jinja: no such file; give the path of a Jinja template"):
        validated("loss=dpo", *TINY, "chat_template=no.jinja")


def test_new_embeddings_are_the_mean_of_the_others_and_only_tokens_that_the_model_lacks_get_them():
    model = tiny("Llama")
    old = [each.weight.detach().clone() for each in (model.get_input_embeddings(), model.get_output_embeddings())]
    resize_embeddings(model, len(old[0]))
    assert model.config.vocab_size == len(old[0])
    resize_embeddings(model, len(old[0]) + 3)
    for weights, module in zip(old, (model.get_input_embeddings(), model.get_output_embeddings()), strict=True):
        expected = torch.cat([weights, weights.mean(0).expand(3, -1)])
        torch.testing.assert_close(module.weight.detach(), expected, rtol=0, atol=0)
    assert model.config.vocab_size == len(old[0]) + 3


def test_tokens_that_the_model_lacks_are_trained_on_and_exported_with_resized_embeddings(make_trainer, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2")
    n = len(tokenizer)
    tokenizer.add_tokens([" the"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    overrides = ("loss=dpo", f"model.tokenizer_name_or_path='{tmp_path / 'tokenizer'}'", "n_examples=8")
    with pytest.raises(UserError, match=f"id {n}, but the model has .*; choose .* set model.resize_embeddings=true"):
        make_trainer(*overrides)
    trainer = make_trainer(*overrides, "model.resize_embeddings=true")
    trainer.train()
    opened = transformers.AutoModelForCausalLM.from_pretrained(trainer.run.path / "LATEST" / "hf")
    assert opened.config.vocab_size == n + 1
    assert torch.equal(opened.get_input_embeddings().weight, trainer.policy.model.get_input_embeddings().weight)
