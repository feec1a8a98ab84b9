"""Models that tools compare or diagnose: a run's policy or its reference, or a folder for from_pretrained.

find_candidate reads settings alone, and load_model loads the weights.
"""

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.system.errors import UserError, summarize_error
from dpo.system.installation import CONFIG, is_installed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from dpo.settings.schema import Settings
    from dpo.training.objectives import Loss

REFERENCE = "reference"
ADAPTER = "adapter_config.json"  # of an adapter's folder, in peft's format
CHECKPOINT = re.compile(r"LATEST|BEST|step-\d+")


@dataclass(frozen=True)
class Candidate:
    """A model, by the settings with which it is loaded, prompted and sampled.

    weights  the policy.pt of a run's policy; None: the weights that the settings name
    adapter  the folder of an adapter of these weights
    """

    name: str
    settings: "Settings"
    loss: "Loss"
    weights: Path | None = None
    adapter: Path | None = None


def find_candidate(path: Path, as_reference: bool = False, like: Candidate | None = None) -> Candidate:
    """The policy or the reference of RUN or RUN/step-N, or the model or adapter in a folder for from_pretrained.

    A folder has the settings of `like`, by default the defaults. UserError if there are no such weights.
    """
    if not is_model_folder(path):
        return find_run(path, as_reference)
    if as_reference:
        raise UserError(f"{path}: is a model's folder, which does not name a reference; give the reference's folder")
    settings, loss = default_settings(path) if like is None else (like.settings, like.loss)
    return in_folder(path, settings, loss)


def is_model_folder(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / ADAPTER).is_file()


def find_run(path: Path, as_reference: bool = False) -> Candidate:
    """The policy or the reference of RUN or RUN/step-N."""
    from omegaconf import OmegaConf

    from dpo.settings.run_config import read_run_config
    from dpo.settings.schema import REMOVED, default_values, flatten, validate
    from losses import LOSSES

    checkpoint = path if CHECKPOINT.fullmatch(path.name) else path / "LATEST"
    if not (checkpoint.parent / "config.yaml").is_file():
        known = f"it holds no config.yaml of a run, no config.json of a model and no {ADAPTER}"
        raise UserError(f"{path}: not a run directory: {known}")
    config = read_run_config(checkpoint.parent, setting="")
    weights = None if as_reference else checkpoint / "policy.pt"
    if weights is not None and not weights.is_file():
        raise UserError(f"{weights}: there is no such file; give a run that has written a checkpoint")
    if not as_reference:
        config.reference = "start"  # its weights are not needed, and may not be here
        config.model.reference_dtype = None
    if weights is not None and config.get("lora") is None:
        OmegaConf.update(config, "model.archive", str(weights))  # load these weights instead of the initial ones
    elif weights is not None and config.lora.get("path") and (checkpoint / "hf").is_dir():
        config.lora.path = str(checkpoint / "hf")  # the adapter that it began with may not be here
    config.trackers = []  # may not be installed here
    defaults = default_values(CONFIG, config.loss.name, resumed=True)
    settings, loss = validate({k: v for k, v in flatten(config).items() if k not in REMOVED}, defaults, LOSSES)
    name = f"{REFERENCE} of {settings.exp_name}" if as_reference else settings.exp_name
    return Candidate(name, settings, loss, weights)


def default_settings(folder: Path) -> "tuple[Settings, Loss]":
    """The default settings of DPO for the model in a folder."""
    from dpo.settings.schema import default_values, validate
    from losses import LOSSES

    own = {"model.name_or_path": str(folder), "exp_name": "model", "local_run_dir": ".", "trackers": []}
    return validate(own, default_values(CONFIG, "dpo", resumed=True), LOSSES)


def in_folder(folder: Path, settings: "Settings", loss: "Loss") -> Candidate:
    """The model or adapter in a folder, with these settings, but its own tokenizer and at most its own positions."""
    from dpo.model.loading import has_tokenizer, load_model_config
    from dpo.model.refusals import max_positions
    from dpo.settings.constraints import START

    is_adapter = not (folder / "config.json").is_file()
    own: dict[str, Any] = {"name_or_path": base_model(folder / ADAPTER) if is_adapter else str(folder)}
    if has_tokenizer(folder):
        own["tokenizer_name_or_path"] = str(folder)
    elif is_adapter:
        own["tokenizer_name_or_path"] = None  # the base model's
    else:
        own["tokenizer_name_or_path"] = settings.model.tokenizer_name_or_path or settings.model.name_or_path
    own |= {"archive": None, "from_scratch": False, "reference_dtype": None}
    model = settings.model.model_copy(update=own)
    changed: dict[str, Any] = {"model": model, "lora": None, "reference": START, "trackers": []}
    config, _ = load_model_config(model)
    positions = max_positions(config.get_text_config())
    if positions is not None and positions < settings.max_length:
        changed |= {"max_length": positions, "max_prompt_length": min(settings.max_prompt_length, positions // 2)}
    settings = settings.model_copy(update=changed)
    return Candidate(str(folder), settings, loss, adapter=folder if is_adapter else None)


def base_model(path: Path) -> str:
    """The base model in an adapter_config.json; UserError if it names none, or a folder that does not exist."""
    try:
        name = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({summarize_error(error)})") from None
    is_path = isinstance(name, str) and (name.startswith((".", "/", "~")) or name.count("/") > 1)
    if not name or (is_path and not Path(name).is_dir()):
        advice = "write the folder of its base model into base_model_name_or_path"
        raise UserError(f"{path}: {f'there is no folder {name}' if name else 'names no base model'}; {advice}")
    return str(name)


def load_model(candidate: Candidate, device: "torch.device") -> "PreTrainedModel":
    """Load a candidate, with its adapter if it has one."""
    from dpo.model.archives import load_archive
    from dpo.model.loading import load_model_config, load_policy
    from dpo.model.lora import REFERENCE as FROZEN
    from dpo.model.lora import adapted_layers, use_adapter
    from dpo.model.reference_weights import find_reference
    from dpo.model.refusals import count_embeddings
    from dpo.runs.weights import add_adapter

    settings = candidate.settings
    config, tokenizer = load_model_config(settings.model)
    n_embeddings = count_embeddings(settings.model, config, tokenizer)
    reference = find_reference(settings, config, tokenizer)
    model = load_policy(settings, config, device, n_embeddings)
    if candidate.adapter is not None:
        return merge_folder(model, candidate.adapter)
    # A new adapter changes nothing, so without weights this is the reference, or the frozen adapter is.
    adapter = None if settings.lora is None else add_adapter(model, settings, reference)
    if reference is not None and (adapter is None or adapter.reference is None):
        return reference.load(settings, config, n_embeddings).to(device)  # type: ignore[arg-type]  # as in load_policy
    if reference is not None:
        use_adapter(adapted_layers(model).values(), FROZEN)
    if adapter is not None and candidate.weights is not None:
        path = str(candidate.weights)
        adapter.load_state_dict(load_archive(path), path)
    return model


def merge_folder(model: "PreTrainedModel", folder: Path) -> "PreTrainedModel":
    """Merge an adapter of any kind that peft can merge; UserError if it is not one of this model.

    peft only warns of tensors that an adapter lacks, and computes with those of a new adapter.
    """
    if not is_installed("peft"):
        raise UserError(f"{folder}: holds an adapter, which needs the library peft; pip install peft")
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict

    try:
        with warnings.catch_warnings(action="ignore"):  # of peft's use of transformers
            stored = load_peft_weights(str(folder), device="cpu")
            adapted = get_peft_model(model, PeftConfig.from_pretrained(str(folder)))
            wrong = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - set(stored)
            loaded: Any = set_peft_model_state_dict(adapted, stored)
            wrong |= set(loaded.unexpected_keys)
            merged: PreTrainedModel = adapted.merge_and_unload()
    except Exception as error:  # missing or foreign files raise many kinds of errors
        raise UserError(f"{folder}: is no adapter of {model.name_or_path} ({summarize_error(error)})") from None
    if wrong:
        example = f"{len(wrong)} tensors are missing or unknown, such as {min(wrong)}"
        raise UserError(f"{folder}: its weights do not fit its {ADAPTER} and {model.name_or_path}: {example}")
    return merged.requires_grad_(False)
