"""The weights that `reference` names, if they are not those that the policy starts from."""

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo.model.archives import is_adapter, load_archive
from dpo.model.loading import load_policy, load_state
from dpo.model.lora import read_adapter
from dpo.model.pretrained import ADAPTER, fetch, source_file
from dpo.model.refusals import (
    count_embeddings,
    disable_randomness,
    kind_problem,
    max_positions,
    quantization_method,
    rope_problem,
)
from dpo.settings.constraints import START
from dpo.settings.schema import ModelSettings, Settings
from dpo.system.console import log_message
from dpo.system.errors import UserError, raise_problems

FORMS = "start, a policy.pt, an adapter's folder, or a model's folder or its name on the Hub"
DESCRIPTIVE = {"_name_or_path", "transformers_version", "architectures", "dtype", "use_cache"}  # keys of a config
HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class ReferenceWeights:
    """What `reference` names: a state for a model of the policy's architecture, or another model.

    state   as in a policy.pt: all weights, or an adapter; empty for another model
    config  of another model; None for a state
    """

    path: str
    state: dict[str, Any] = field(default_factory=dict)
    config: PreTrainedConfig | None = None

    @property
    def setting(self) -> str:
        return f"reference={self.path}"

    @property
    def is_adapter(self) -> bool:
        return is_adapter(self.state)

    def is_adapter_of(self, base: str, settings: ModelSettings) -> bool:
        """Whether this is an adapter of the policy's frozen weights, which have the checksum `base`.

        An adapter of unknown base is one of the weights of model.name_or_path.
        """
        if not self.is_adapter:
            return False
        stored = self.state["base"]
        return bool(stored == base if stored is not None else settings.archive is None)

    def fingerprint(self, checksum: str) -> str:
        """What identifies the reference: the checksum of its weights, and for another model also its config."""
        if self.config is None:
            return checksum
        values = {key: value for key, value in self.config.to_dict().items() if key not in DESCRIPTIVE}
        content = checksum + json.dumps(values, sort_keys=True, default=str)
        return hashlib.sha256(content.encode()).hexdigest()

    def load(self, settings: Settings, config: PreTrainedConfig, n_embeddings: int) -> PreTrainedModel:
        """Load a second model on the host; config and n_embeddings are the policy's.

        An adapter is merged into the weights of model.name_or_path. UserError if the weights do not fit.
        """
        own: dict[str, Any] = {"archive": None}
        if settings.model.reference_dtype == "float32" and not self.is_adapter:  # its weights are not to be rounded
            own["policy_dtype"] = "float32"
        if self.config is not None:
            own |= {"name_or_path": self.path, "from_scratch": False}
            config, n_embeddings = self.config, 0
        model_settings = settings.model.model_copy(update=own)
        settings = settings.model_copy(update={"model": model_settings, "activation_checkpointing": False})
        key = "model.name_or_path" if self.config is None else "reference"
        model = load_policy(settings, config, torch.device("cpu"), n_embeddings, key)
        if self.config is None:
            load_state(model, self.state, self.setting)
        return model


def find_reference(
    settings: Settings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase
) -> ReferenceWeights | None:
    """Find what `reference` names, before data and weights are read; None for start.

    config and tokenizer are the policy's. UserError if there are no such weights, or if they cannot be the reference.
    """
    if settings.reference == START:
        return None
    found = open_reference(settings.reference)
    method = quantization_method(config) or (settings.lora and settings.lora.quantize)
    problems = []
    if method and not found.is_adapter:
        problems.append(f"a second model beside quantized weights ({method}) is not supported; give an adapter of them")
    if found.config is not None:
        problems += config_problems(found.config, settings, tokens_needed(settings, config, tokenizer))
    raise_problems([f"{found.setting}: {problem}" for problem in problems])
    if found.config is not None and has_other_tokens(found.path, tokenizer):
        log_message(f"{found.setting}: its tokenizer differs from the policy's, which is used for both.")
    return found


def open_reference(name: str) -> ReferenceWeights:
    path = Path(name)
    if path.is_file():
        return ReferenceWeights(name, load_archive(name, "reference"))
    if not path.is_dir() and (path.suffix == ".pt" or not HUB_NAME.fullmatch(name)):
        raise UserError(f"reference={name}: there is no such file or folder; give {FORMS}")
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / ADAPTER).is_file():
            return ReferenceWeights(name, read_adapter(name, "reference").state_dict())
        if (path / "policy.pt").is_file():
            raise UserError(f"reference={name}: is a checkpoint of a run; set reference={path / 'policy.pt'}")
    elif source_file(name, ADAPTER) and not source_file(name, "config.json"):
        raise UserError(f"reference={name}: is an adapter; run hf download {name} --local-dir FOLDER, and give FOLDER")
    config = fetch("reference", name, partial(AutoConfig.from_pretrained, name, trust_remote_code=False))
    disable_randomness(config)
    return ReferenceWeights(name, config=config)


def config_problems(config: PreTrainedConfig, settings: Settings, n_tokens: int) -> list[str]:
    """What speaks against another model as the reference, by its config; n_tokens: the ids that it must know."""
    if problem := kind_problem(config):
        return [problem]
    problems = []
    if method := quantization_method(config):
        problems.append(f"its weights are quantized already ({method}); give the unquantized model")
    n_embeddings, positions = config.get_text_config().vocab_size, max_positions(config.get_text_config())
    if n_embeddings < n_tokens:
        advice = "give a model with the policy's vocabulary"
        problems.append(f"has {n_embeddings:,} token ids, and the policy's tokenizer gives {n_tokens:,}; {advice}")
    if positions and settings.max_length > positions:
        problems.append(f"has {positions} positions; lower max_length to {positions}")
    if problem := rope_problem(config, settings.max_length):
        problems.append(problem)
    return problems


def same_config(a: PreTrainedConfig, b: PreTrainedConfig) -> bool:
    """Whether models of two configs compute the same function with the same weights, as far as the configs tell."""
    values, others = a.to_dict(), b.to_dict()
    return all(values.get(key) == others.get(key) for key in (values.keys() | others.keys()) - DESCRIPTIVE)


def tokens_needed(settings: Settings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """How many token ids may occur: those that the tokenizer gives and the policy knows."""
    return min(max(tokenizer.get_vocab().values()) + 1, count_embeddings(settings.model, config, tokenizer))


def has_other_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a model's folder has a tokenizer with other tokens or other ids."""
    try:
        own = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception:  # transformers raises nearly anything; the folder needs no tokenizer
        return False
    return bool(own.get_vocab() != tokenizer.get_vocab())
