"""Tiny random sequence classifiers, built offline."""

import torch
from conftest import tiny_config, tiny_tokenizer
from transformers import AutoModelForSequenceClassification


def write_classifier(folder, family="llama", num_labels=1, template=None, **own):
    """Write a random classifier of two layers with its tokenizer; own are keys of its config."""
    tokenizer = tiny_tokenizer(family)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = tiny_config(family, len(tokenizer))
    for key, value in {"num_labels": num_labels, "pad_token_id": None, **own}.items():
        setattr(config, key, value)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(folder)
    return model, tokenizer
