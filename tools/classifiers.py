"""Sequence classifiers of transformers: reward models, which have one label, and text classifiers."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpo.model.pretrained import fetch
from dpo.model.refusals import max_positions
from dpo.system.devices import pick_device
from dpo.system.errors import UserError, join_names, summarize_error
from dpo.system.files import sha256

# Files of a model's folder that may change what it computes.
SUFFIXES = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin", ".spm", ".tiktoken")


@dataclass(frozen=True)
class SequenceClassifier:
    """A model with its tokenizer; label names it in errors, as in "scorer.model=NAME".

    pad_id is None if the model has no padding token. Its score then belongs to a text's last token, whatever it is.
    """

    label: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    pad_id: int | None

    @property
    def max_length(self) -> int:
        """How many tokens a text may have."""
        positions = max_positions(self.model.config.get_text_config())
        return min(positions or self.tokenizer.model_max_length, self.tokenizer.model_max_length)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, with the special tokens that the tokenizer adds."""
        ids: list[int] = self.tokenizer(text, verbose=False)["input_ids"]
        return ids

    def encode_truncated(self, text: str) -> list[int]:
        """The ids of a text whose end is left out if it is too long; special tokens after it are kept."""
        ids: list[int] = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        return ids

    def encode_turns(self, prompt: Any, response: str) -> list[int]:
        """The ids of a conversation in the model's chat template; without one, of the prompt's text and the response.

        prompt is a text or messages. UserError if the template, or a model without one, cannot write them.
        """
        if not self.tokenizer.chat_template:
            if not isinstance(prompt, str):
                raise UserError(f"{self.label}: has no chat template for prompts that are messages")
            return self.encode(prompt + response)
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        turns = [*turns, {"role": "assistant", "content": response}]
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        except TemplateError as error:
            raise UserError(f"{self.label}: its chat template refuses a prompt: {summarize_error(error)}") from None
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @torch.no_grad()
    def logits(self, texts: Sequence[list[int]]) -> Tensor:
        """The logits (texts, labels) of token ids, in float32 on the CPU."""
        config = self.model.config.get_text_config()
        pad_id = self.pad_id
        if pad_id is None:  # an id that no text has, or the model would take its last occurrences for padding
            used = set().union(*texts)
            config.pad_token_id = pad_id = next(i for i in range(len(used) + 1) if i not in used)
        lengths = torch.tensor([len(ids) for ids in texts])
        width = int(lengths.max())
        ids = torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in texts])
        mask = (torch.arange(width) < lengths[:, None]).long()
        device = self.model.device
        return self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu()

    def close(self) -> None:
        """Free the weights' memory."""
        self.model.to("meta")  # type: ignore[arg-type]  # a decorator hides its arguments
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_classifier(key: str, name: str, device: str) -> SequenceClassifier:
    """Load a folder or a name on the Hub, in its stored dtype; UserError if it is no classifier. key is the setting."""
    tokenizer = fetch(key, name, partial(AutoTokenizer.from_pretrained, name, trust_remote_code=False))
    load = partial(
        AutoModelForSequenceClassification.from_pretrained, name, output_loading_info=True, trust_remote_code=False
    )
    model, info = fetch(key, name, load)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{key}={name}: is no classifier: its files have no {join_names(missing)}")
    config = model.config.get_text_config()
    pad_id = config.pad_token_id
    has_pad = pad_id is not None and 0 <= pad_id < config.vocab_size
    return SequenceClassifier(
        f"{key}={name}", model.eval().to(pick_device(device)), tokenizer, pad_id if has_pad else None
    )


def load_classifier_config(key: str, name: str) -> PreTrainedConfig:
    config: PreTrainedConfig = fetch(key, name, partial(AutoConfig.from_pretrained, name, trust_remote_code=False))
    return config


def label_indices(config: PreTrainedConfig) -> dict[str, int]:
    return {str(label): int(index) for index, label in (config.id2label or {}).items()}


def check_reward_model(label: str, config: PreTrainedConfig) -> None:
    """UserError if a model gives several scores."""
    if config.num_labels != 1:
        raise UserError(f"{label}: gives {config.num_labels} scores per text; a reward model gives one")


def fingerprint_model(name: str, config: PreTrainedConfig) -> str:
    """The hash of a folder's files; for a name on the Hub, the name and its commit."""
    if not os.path.isdir(name):
        return f"{name}@{getattr(config, '_commit_hash', None)}"
    files = sorted(path for path in Path(name).iterdir() if path.suffix in SUFFIXES)
    return hashlib.sha256(json.dumps([(path.name, sha256(path)) for path in files]).encode()).hexdigest()
