"""The files of a pretrained model: loading them, what they hold, and a remedy for each cause of failure."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar
from zipfile import is_zipfile

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import safe_open
from transformers import (
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from dpo.data.formats import refuse_pointers
from dpo.model.archives import DROPPABLE
from dpo.system.console import log_message
from dpo.system.errors import UserError, is_out_of_memory, join_names, summarize_error
from dpo.system.network import is_reachable

T = TypeVar("T")

ADAPTER = "adapter_config.json"  # of an adapter's folder, in peft's format
# What a composite model needs beside its tokenizer to prepare images, video or audio.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


def skip_unreachable_hub(names: Mapping[str, bool]) -> None:
    """Use only the hub's cache, without minutes of retries, if the hub is needed but cannot be reached.

    names maps each model or data set to whether it may come from the hub.
    """
    from huggingface_hub import constants

    needed = [name for name, remote in names.items() if remote and not os.path.isdir(name)]
    if needed and not constants.HF_HUB_OFFLINE and not is_reachable(constants.ENDPOINT):
        log_message("The hub cannot be reached: using only files on this machine.")
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later


def fetch(key: str, name: str, load: Callable[[], T]) -> T:
    """Call load; if it fails, UserError with the setting's key, what could not be loaded, the cause and its remedy."""
    try:
        if os.path.isfile(name):
            raise UserError("is a file; give the model's folder, and a policy.pt as model.archive")
        return load()
    except UserError as error:
        reason = str(error)
    except Exception as error:  # a corrupt or foreign folder makes transformers raise nearly anything
        if is_out_of_memory(error):
            raise
        reason = explain_path(Path(name), error) if os.path.exists(name) else explain_name(name, error)
    raise UserError(f"{key}={name}: {reason}")


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM] | type[AutoModelForMultimodalLM]:
    """The class of transformers that opens a checkpoint as a whole.

    AutoModelForCausalLM opens only the language model of some checkpoints that hold a vision or audio model as well.
    """
    whole: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    is_whole = whole is not None and whole.__name__ in (config.architectures or ())
    return AutoModelForMultimodalLM if is_whole else AutoModelForCausalLM


# Why a model or tokenizer cannot be loaded


def explain_path(path: Path, error: Exception) -> str:
    """The cause and the remedy for a folder on this machine that does not load."""
    if (path / "config.json").is_file():
        return explain_pointers(path) or explain_files(error)
    if (path / ADAPTER).is_file():
        return explain_adapter(path / ADAPTER, str(path))
    if (path / "policy.pt").is_file():
        return f"is a checkpoint of a run; set model.archive={path / 'policy.pt'}, and the model of that run"
    if (path / "config.yaml").is_file():
        return f"is a run directory; a run that has ended holds its model in {path / 'LATEST' / 'hf'}"
    return "holds no config.json; give a folder that from_pretrained opens, such as RUN/LATEST/hf"


def explain_pointers(folder: Path) -> str | None:
    """The cause and the remedy if a file is only a pointer of Git LFS; None if there is no such file."""
    try:
        for suffix in ("json", "safetensors", "bin", "model"):
            for path in sorted(folder.glob(f"*.{suffix}")):
                refuse_pointers(path)
    except UserError as error:
        return str(error)
    return None


def explain_files(error: Exception) -> str:
    """The cause and the remedy for files that were found but do not load."""
    reason = summarize_error(error)
    if "custom code" in reason or "trust_remote_code" in reason:
        advice = "code from a model's files is never run; choose a model that transformers implements itself"
        return f"needs Python code that comes with its files; {advice}"
    if unknown := re.search(r"model type [`'\"]?([\w.-]+)[`'\"]? but Transformers does not recognize", str(error)):
        advice = "install a newer version, or choose another model"
        return f"transformers {transformers.__version__} does not know models of type {unknown[1]}; {advice}"
    return f"cannot be loaded ({reason}); its files may be incomplete or damaged: copy or download them again"


def explain_name(name: str, error: Exception) -> str:
    """The cause and the remedy for a name that is no path on this machine: a name on the Hub, or a mistyped path."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        return "there is no such folder"
    causes = list(chain_of(error))
    if any(isinstance(each, HFValidationError) for each in causes):
        return "there is no such folder, and no model on the Hub can have this name"
    if any(isinstance(each, GatedRepoError) for each in causes):
        page = f"https://huggingface.co/{name}"
        return f"asks for a licence agreement; accept it on {page}, then run hf auth login, or set HF_TOKEN"
    if any(isinstance(each, RepositoryNotFoundError) for each in causes):
        return "no folder and no model on the Hub has this name; for a private model, run hf auth login or set HF_TOKEN"
    if any(isinstance(each, LocalEntryNotFoundError) for each in causes) or "connect" in str(error):
        reason = "there is no such folder, the Hub's cache has no such model, and the Hub cannot be reached"
        advice = f"run hf download {name} where there is a network, or try model=tiny, which needs no download"
        return f"cannot be loaded ({reason}); {advice}"
    if (adapter := source_file(name, ADAPTER)) and not source_file(name, "config.json"):
        return f"{explain_adapter(adapter, 'FOLDER')} after hf download {name} --local-dir FOLDER"
    return explain_files(error)


def explain_adapter(path: Path, name: str) -> str:
    """What to set for an adapter's folder that was given as a model."""
    base = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path") or "its base model"
    return f"is a LoRA adapter, not a model; set model.name_or_path={base} lora=default lora.path={name}"


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that led to it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# The files


def source_file(name: str, file: str) -> Path | None:
    """A file of a model's folder or of its repository on the Hub; None if there is no such file."""
    if os.path.isdir(name):
        path = Path(name) / file
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(name, file))
    except Exception:  # of the network, of the name, or because the repository has no such file
        return None


def tensor_names(name: str) -> set[str]:
    """The names of all tensors in the files from which transformers loads a model.

    UserError if a file is missing or only a pointer.
    """
    for whole, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if path := source_file(name, whole):
            refuse_pointers(path)
            return names_in(path)
        if path := source_file(name, index):
            files: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            found = {file: source_file(name, file) for file in sorted(set(files.values()))}
            if absent := [file for file, shard in found.items() if shard is None]:
                raise UserError(f"{index} names files that are not there: {join_names(absent)}; copy or download them")
            for shard in filter(None, found.values()):
                refuse_pointers(shard)
            return set(files)
    raise UserError(f"holds no weights ({SAFE_WEIGHTS_NAME} or {WEIGHTS_NAME}); copy or download them")


def names_in(path: Path) -> set[str]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as tensors:
            return set(tensors.keys())
    return set(torch.load(path, map_location="meta", weights_only=True, mmap=is_zipfile(path)))


def unexpected_tensors(
    model: PreTrainedModel, setting: str, stored: Iterable[str], unexpected: Iterable[str]
) -> list[str]:
    """Unexpected tensors of a checkpoint in modules that the model has; all others that are not loaded are logged.

    Those belong to parts that the model's class leaves out, such as `mtp` for multi-token prediction. transformers
    does not report the ones that match the class's own patterns, so they are looked up in what is stored.
    """
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    hidden = {key for key in stored if any(re.search(pattern, key) for pattern in patterns)}
    parts = set(model.state_dict())
    parts |= {part for key in parts for part in accumulate(key.split("."), "{}.{}".format)}
    absent = {key for key in {*unexpected, *hidden} if key not in parts and not DROPPABLE.search(key)}
    wrong = sorted(key for key in absent - hidden if key.partition(".")[0] in parts)
    log_unloaded(setting, Counter(first_absent(key, parts) for key in absent.difference(wrong)))
    return wrong


def first_absent(key: str, parts: set[str]) -> str:
    """The outermost module in a tensor's name that is not among a model's parts."""
    return next(part for part in accumulate(key.split("."), "{}.{}".format) if part not in parts)


def log_unloaded(setting: str, counts: Mapping[str, int]) -> None:
    if counts:
        modules = join_names([f"{module} ({n:,})" for module, n in sorted(counts.items())])
        log_message(
            f"{setting}: ignored tensors of modules that this model lacks: {modules}; an export will not hold them"
        )
