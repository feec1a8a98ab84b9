"""Sequence classifiers: token ids, padding, and models that are none."""

import pytest
import torch
from conftest import tiny_tokenizer
from tiny_classifiers import write_classifier

from dpo.system.errors import UserError
from tools.classifiers import fingerprint_model, load_classifier, load_classifier_config

TEXTS = ["Good.", "A film that I did not like at all, to say the least.", "Well, well", "!"]
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("pad", [None, "eos", -1])
def test_a_score_does_not_depend_on_the_other_texts_of_its_batch(family, pad, tmp_path):
    eos = tiny_tokenizer(family).eos_token_id
    model, tokenizer = write_classifier(tmp_path, family, 2, pad_token_id=eos if pad == "eos" else pad)
    classifier = load_classifier("model", str(tmp_path), "cpu")
    texts = [tokenizer(text)["input_ids"] for text in TEXTS] + [[*tokenizer("The end")["input_ids"], eos]]
    if pad == -1:
        model.config.pad_token_id = None
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([ids])).logits for ids in texts])
    assert (alone[:-1].diff(dim=0).abs() > 1e-2).any(1).all()
    torch.testing.assert_close(classifier.logits(texts), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(classifier.logits(texts[1:]), alone[1:], rtol=1e-5, atol=1e-5)


def test_a_conversation_is_written_with_the_chat_template_and_its_special_tokens_only_once(tmp_path):
    _, tokenizer = write_classifier(tmp_path, template="{{ bos_token }}" + TEMPLATE)
    classifier = load_classifier("model", str(tmp_path), "cpu")
    expected = tokenizer("<s>user: Hi</s>assistant: Go.</s>", add_special_tokens=False)["input_ids"]
    assert classifier.encode_turns("Hi", "Go.") == expected
    assert classifier.encode_turns([{"role": "user", "content": "Hi"}], "Go.") == expected
    assert expected.count(tokenizer.bos_token_id) == 1


def test_a_template_that_refuses_a_prompt_is_named(tmp_path):
    write_classifier(tmp_path, template="{{ raise_exception('No system role.') }}")
    classifier = load_classifier("model", str(tmp_path), "cpu")
    with pytest.raises(UserError, match=f"^model={tmp_path}: its chat template refuses a prompt: No system role.$"):
        classifier.encode_turns("Hi", "Go.")


def test_a_text_that_is_too_long_loses_its_end(tmp_path):
    write_classifier(tmp_path, max_position_embeddings=16)
    classifier = load_classifier("model", str(tmp_path), "cpu")
    ids = classifier.encode("a b c d e f g h i j k l m n o p q r s t u v w x y z")
    assert classifier.max_length == 16 < len(ids)
    assert classifier.encode_truncated("a b c d e f g h i j k l m n o p q r s t u v w x y z") == ids[:16]


def test_a_language_model_is_no_classifier(write_tiny_folder):
    folder = write_tiny_folder("llama")
    with pytest.raises(UserError, match=f"^model={folder}: is no classifier: its files have no score.weight$"):
        load_classifier("model", str(folder), "cpu")


def test_the_fingerprint_of_a_folder_depends_on_weights_config_and_tokenizer_but_not_on_other_files(tmp_path):
    write_classifier(tmp_path)

    def fingerprint():
        return fingerprint_model(str(tmp_path), load_classifier_config("model", str(tmp_path)))

    first = fingerprint()
    (tmp_path / "README.md").write_text("a card")
    assert fingerprint() == first
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + " " if (tmp_path / name).exists() else "{}")
        first, before = fingerprint(), first
        assert first != before
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert fingerprint() != first


def test_closing_frees_the_weights(tmp_path):
    write_classifier(tmp_path)
    classifier = load_classifier("model", str(tmp_path), "cpu")
    classifier.close()
    assert all(parameter.is_meta for parameter in classifier.model.parameters())
