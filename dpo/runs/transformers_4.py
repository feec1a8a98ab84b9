"""Rewrites the config files of an export so that transformers 4 reads them as transformers 5 does.

transformers 4 is not installed, so no list of families says which keys it needs. Instead the config class of
transformers 5 is asked: it still reads the old keys of its family, for checkpoints that have them.
"""

import copy
import dataclasses
from typing import Any

from transformers import PreTrainedConfig

# Layer types of hybrid models that have a layers_block_type, by their new names
OLD_LAYER_TYPES = {"linear_attention": "mamba", "full_attention": "attention"}
OUTSIDE_OF_SCALING = ("rope_theta", "partial_rotary_factor")  # keys of rope_parameters that rope_scaling does not have


def use_tokenizer_keys(written: dict[str, Any]) -> None:
    """Use transformers 4's names for class and special tokens, which version 5 also reads; drop keys of version 5."""
    if written.get("tokenizer_class") == "TokenizersBackend":
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(written.get("extra_special_tokens"), list):
        written["additional_special_tokens"] = written.pop("extra_special_tokens")
    for name in ("backend", "is_local", "local_files_only"):
        written.pop(name, None)


def add_config_keys(config: PreTrainedConfig, written: dict[str, Any]) -> bool:
    """Add to a written config, and to those nested in it, what transformers 4 calls otherwise.

    Keys that would change what transformers 5 reads are left out. False if rotary embeddings are among them:
    transformers 4, which ignores rope_parameters, then computes others.
    """
    nested = [
        add_config_keys(value, written[key])
        for key, value in vars(config).items()
        if isinstance(value, PreTrainedConfig) and isinstance(written.get(key), dict)
    ]
    keys = OldKeys(config, written)
    keys.add_renamed()
    keys.add_layer_types()
    return keys.add_rope() and all(nested)


class OldKeys:
    """What transformers 4 calls otherwise in one config, without those nested in it."""

    def __init__(self, config: PreTrainedConfig, written: dict[str, Any]):
        self.kind = type(config)
        self.values = config.to_dict()
        self.written = written
        self.expected = self.read(self.values)
        self.added: dict[str, Any] = {}

    def add_renamed(self) -> None:
        """Add the names that the config's constructor has for values with another name, as num_experts in Qwen3-MoE."""
        arguments = {field.name for field in dataclasses.fields(self.kind)}
        for alias, name in self.kind.attribute_map.items():
            if alias in arguments and name in self.values:
                self.add(alias, self.values[name])

    def add_layer_types(self) -> None:
        """Use the old names of layer types in a hybrid model; transformers 5 translates them."""
        names = self.kind.attribute_map
        if "layers_block_type" in {*names, *names.values()}:
            for key in ("layer_types", "layers_block_type"):
                if isinstance(self.written.get(key), list):
                    self.add(key, [OLD_LAYER_TYPES.get(kind, kind) for kind in self.written[key]])

    def add_rope(self) -> bool:
        """Add the old keys of rotary embeddings; False if they cannot hold all settings."""
        rope = self.values.get("rope_parameters")
        if not rope:
            return True
        old = old_rope_keys(rope)
        others = {key: value for key, value in self.values.items() if key not in (*old, "rope_parameters")}
        for key, value in old.items():
            changed = {name: each for name, each in old.items() if name != key}
            if not isinstance(value, dict):
                changed[key] = value / 2
            if self.rope(others | old) != self.rope(others | changed):  # this family has this key
                self.add(key, value)
        return self.rope(others | self.added) == self.expected.get("rope_parameters")

    def rope(self, values: dict[str, Any]) -> Any:
        return self.read(values).get("rope_parameters")

    def add(self, key: str, value: Any) -> None:
        """Add a key, unless transformers 5 would then read anything else differently."""
        read = self.read(self.values | self.added | {key: value})
        if self.expected and all(read.get(name) == expected for name, expected in self.expected.items()):
            self.added[key] = self.written[key] = value

    def read(self, values: dict[str, Any]) -> dict[str, Any]:
        """What transformers 5 reads from the values of a config file; nothing if it refuses them."""
        try:
            return self.kind(**copy.deepcopy(values)).to_dict()
        except Exception:  # of any kind: each class checks its values itself
            return {}


def old_rope_keys(rope: dict[str, Any]) -> dict[str, Any]:
    """The settings of rotary embeddings under all names that they had, of which a family reads some.

    rope may hold settings for each type of layer. transformers 4 has scaling for those with full attention only.
    """
    full = rope.get("full_attention", rope) or {}
    local = rope.get("sliding_attention") or {}
    values = {
        **dict.fromkeys(("rope_theta", "rotary_emb_base", "global_rope_theta"), full.get("rope_theta")),
        **dict.fromkeys(("rope_local_base_freq", "local_rope_theta"), local.get("rope_theta")),
        **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), full.get("partial_rotary_factor")),
    }
    if full.get("rope_type", "default") != "default":
        values["rope_scaling"] = {key: value for key, value in full.items() if key not in OUTSIDE_OF_SCALING}
    return {key: value for key, value in values.items() if value is not None}
