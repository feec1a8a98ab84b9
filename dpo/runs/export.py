"""Export of a model and its tokenizer for from_pretrained in transformers 4 and 5, and upload to the Hub."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo.model.pretrained import PROCESSOR_FILES, source_file
from dpo.system.console import log_message
from dpo.system.errors import summarize_error
from dpo.system.files import atomic_dir, naming_file


def export_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None = None,
    card: str | None = None,
) -> None:
    """Write a model and its tokenizer into a new folder; RunError if they cannot be written."""

    def write(staging: Path) -> None:
        save_model(staging, model, tokenizer, weights)
        if card is not None:
            save_card(staging, card)

    if not folder.exists():
        atomic_dir(folder, write)


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: dict[str, Tensor] | None = None
) -> None:
    """Save a model, with `weights` in place of its own if given, and its tokenizer."""
    save_generation_config(folder, model)
    model.save_pretrained(folder, state_dict=weights)
    rewrite(folder / "config.json", add_rope_of_transformers_4)
    save_tokenizer(folder, tokenizer)
    copy_processor(folder, model)


def copy_processor(folder: Path, model: PreTrainedModel) -> None:
    """Copy the files that prepare images, video and audio from a composite model's own folder or repository."""
    found = [path for name in PROCESSOR_FILES if (path := source_file(str(model.name_or_path), name))]
    if not found and model.config.get_text_config() is not model.config:
        log_message(f"{model.name_or_path}: no processor files found; copy them to {folder} to open images or audio.")
    for path in found:
        with naming_file(folder / path.name):
            shutil.copyfile(path, folder / path.name)


def save_generation_config(folder: Path, model: PreTrainedModel) -> None:
    """Save a model's generation settings, or only its stop tokens if transformers refuses the others."""
    try:
        model.generation_config.save_pretrained(folder)
    except ValueError:  # for some settings that came with the model
        stops = model.generation_config.eos_token_id
        model.generation_config = GenerationConfig.from_model_config(model.config)
        model.generation_config.eos_token_id = stops
        model.generation_config.save_pretrained(folder)


def save_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(folder)
    rewrite(folder / "tokenizer_config.json", use_tokenizer_keys_of_transformers_4)


def save_card(folder: Path, card: str) -> None:
    with naming_file(folder / "README.md"):
        (folder / "README.md").write_text(card, encoding="utf-8")


def upload(folder: Path, repository: str | None) -> None:
    """Upload an export to a repository on the Hub, which is created as private if new; do nothing for None.

    A failure is only printed, since the export is on disk.
    """
    if repository is None:
        return
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # of any kind: no network, no token, no such user
        log_message(
            f"push_to_hub={repository}: not uploaded ({summarize_error(error)}). To upload it: "
            f"hf upload {repository} {shlex.quote(str(folder))}"
        )
    else:
        log_message(f"Uploaded {folder} to {repository} on the Hub.")


def upload_later(folder: Path, repository: str | None) -> None:
    """Upload the export of a run that ended before, with the repository's name in its card; do nothing for None."""
    card = folder / "README.md"
    if repository is not None and card.is_file():
        text = card.read_text(encoding="utf-8")
        save_card(folder, re.sub(r'(from_pretrained\(")[^"]*', lambda match: match[1] + repository, text))
    upload(folder, repository)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    with naming_file(path):
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def use_tokenizer_keys_of_transformers_4(config: dict[str, Any]) -> None:
    """Use transformers 4's names for class and special tokens, which version 5 also reads; drop keys of version 5."""
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    for name in ("backend", "is_local", "local_files_only"):
        config.pop(name, None)


def add_rope_of_transformers_4(config: dict[str, Any]) -> None:
    """Also write the settings of rotary embeddings under the keys of transformers 4, which ignores rope_parameters.

    Otherwise it would silently use its defaults.
    """
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    if "rope_theta" not in rope:  # no rotary embeddings, or a kind unknown to transformers 4
        return
    in_neox = config["model_type"] == "gpt_neox"
    config["rotary_emb_base" if in_neox else "rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        config["rotary_pct" if in_neox else "partial_rotary_factor"] = rope["partial_rotary_factor"]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if local := config["rope_parameters"].get("sliding_attention"):
        config["rope_local_base_freq"] = local["rope_theta"]
