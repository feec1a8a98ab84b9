"""Export of a model and its tokenizer for from_pretrained in transformers 4 and 5, and upload to the Hub."""

import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo.model.pretrained import PROCESSOR_FILES, source_file
from dpo.runs.transformers_4 import add_config_keys, use_tokenizer_keys
from dpo.settings.schema import Settings
from dpo.system.console import log_message
from dpo.system.errors import RunError, summarize_error
from dpo.system.files import atomic_dir, naming_file


def export_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None = None,
    card: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model and its tokenizer into a new folder; RunError if they cannot be written. See `save_model`."""

    def write(staging: Path) -> None:
        save_model(staging, model, tokenizer, weights, dtype)
        if card is not None:
            save_card(staging, card)

    if not folder.exists():
        atomic_dir(folder, write)


def save_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Save a model, with `weights` in place of its own if given, and its tokenizer.

    dtype: of the parameters in the file; None leaves each as it is. Those in weights are replaced by converted ones.
    """
    save_generation_config(folder, model)
    state = model.state_dict() if weights is None else weights
    is_tied = has_tied_embeddings(model, state)
    if dtype is not None:
        convert(state, model, dtype)
    model.save_pretrained(folder, state_dict=state)

    def change(written: dict[str, Any]) -> None:
        if not add_config_keys(model.config, written):
            log_message(
                "The exported config.json cannot tell transformers 4 all settings of this model's rotary embeddings:"
                " open it in transformers 5."
            )
        set_tied(model.config, written, is_tied)
        if dtype is not None:
            set_dtype(written, str(dtype).removeprefix("torch."))

    rewrite(folder / "config.json", change)
    save_tokenizer(folder, tokenizer)
    copy_processor(folder, model)
    drop_code(folder)


def has_tied_embeddings(model: PreTrainedModel, state: dict[str, Tensor]) -> bool | None:
    """Whether the output embeddings in a state are the input embeddings; None if the model has only one of the two."""
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    ends = (names.get(module) for module in (model.get_input_embeddings(), model.get_output_embeddings()))
    weights = [state[name] for name in ends if name in state]
    return weights[0].data_ptr() == weights[1].data_ptr() if len(weights) == 2 else None


def set_tied(config: PreTrainedConfig, written: dict[str, Any], is_tied: bool | None) -> None:
    """Write whether embeddings are tied, if known, into the config and the text model's: either may be read."""
    if is_tied is None:
        return
    written["tie_word_embeddings"] = is_tied
    text_config = config.get_text_config()
    for key, value in vars(config).items():
        if value is text_config:
            written[key]["tie_word_embeddings"] = is_tied


def convert(state: dict[str, Tensor], model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert the parameters in a state, one after the other; tied ones stay tied.

    Buffers stay as they are, and so do parameters that transformers keeps in float32 when it loads 16 bits.
    """
    buffers = {name for name, _ in model.named_buffers()}
    in_float32 = {*(model._keep_in_fp32_modules_strict or ())}  # transformers has no public name for them
    if dtype == torch.float16:
        in_float32 |= {*(model._keep_in_fp32_modules or ())}
    converted: dict[int, Tensor] = {}  # by the address of the weights, so that tied ones stay tied
    for name, value in state.items():
        is_kept = name in buffers or any(f".{part}." in f".{name}." for part in in_float32)
        if value.is_floating_point() and value.dtype != dtype and not is_kept:
            address = value.data_ptr()
            if address not in converted:
                converted[address] = in_dtype(name, value, dtype)
            state[name] = converted[address]


def export_dtype(settings: Settings, auto: torch.dtype) -> torch.dtype:
    """The dtype that export_dtype names; `auto` for auto."""
    dtype: torch.dtype = auto if settings.export_dtype == "auto" else getattr(torch, settings.export_dtype)
    return dtype


def in_dtype(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor on the host in a dtype; RunError if its range does not hold the values."""
    converted = value.detach().to("cpu", dtype).contiguous()
    if dtype == torch.float16 and converted.isinf().any() and not value.isinf().any():
        problem = f"{name} has values beyond {torch.finfo(dtype).max:,.0f}"
        advice = "resume the run with export_dtype=bfloat16, or python -m tools.export RUN OUT --dtype bfloat16"
        raise RunError(f"export_dtype=float16: {problem}; {advice}", "disk")
    return converted


def describe_export(folder: Path, trained: torch.dtype, exact: str = "export_dtype=float32") -> str:
    """One line with the size of an export's weights by dtype, and whether it rounds parameters trained in a dtype.

    exact: the setting that rounds none.
    """
    sizes: Counter[str] = Counter()  # bytes
    for path in folder.rglob("*.safetensors"):
        for dtype, n_bytes in stored_sizes(path):
            sizes[dtype] += n_bytes
    line = f"Exported {folder}: {', '.join(f'{size / 1e6:,.1f} MB in {dtype}' for dtype, size in sizes.most_common())}."
    rounded = [dtype for dtype in sizes if dtype in ("bfloat16", "float16") and trained == torch.float32]
    if rounded:
        line += f" Its float32 parameters were rounded to {rounded[0]}: {exact} keeps them."
    return line


def stored_sizes(path: Path) -> Iterator[tuple[str, int]]:
    """Yield dtype and bytes of each tensor in a safetensors file, from its header alone."""
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    header.pop("__metadata__", None)
    for tensor in header.values():
        start, end = tensor["data_offsets"]
        yield names.get(tensor["dtype"], tensor["dtype"]), end - start


def set_dtype(written: dict[str, Any], dtype: str) -> None:
    """Write the dtype of the file into a config and those nested in it."""
    if "dtype" in written:
        written["dtype"] = dtype
    for value in written.values():
        if isinstance(value, dict):
            set_dtype(value, dtype)


def copy_processor(folder: Path, model: PreTrainedModel) -> None:
    """Copy the files that prepare images, video and audio from a composite model's own folder or repository."""
    if model.config.get_text_config() is model.config:
        return
    found = [path for name in PROCESSOR_FILES if (path := source_file(str(model.name_or_path), name))]
    if not found:
        log_message(f"{model.name_or_path}: no processor files found; add them to the export to open images or audio.")
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
    rewrite(folder / "tokenizer_config.json", use_tokenizer_keys)


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
    """Change a JSON file; infinite numbers are written as transformers 4 does, which does not read version 5's form."""
    content = json.loads(path.read_text(encoding="utf-8"), object_hook=decode_float)
    change(content)
    with naming_file(path):
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def decode_float(content: dict[str, Any]) -> Any:
    return float(content["__float__"]) if content.keys() == {"__float__"} else content


def drop_code(folder: Path) -> None:
    """Drop the names of files with code from the configs of an export, which holds no such files."""

    def drop(content: dict[str, Any]) -> None:
        for key in ("auto_map", "custom_pipelines"):
            content.pop(key, None)
        for value in content.values():
            if isinstance(value, dict):
                drop(value)

    for path in folder.glob("*config.json"):
        rewrite(path, drop)
