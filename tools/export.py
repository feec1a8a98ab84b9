"""Writes any checkpoint of a run as a folder for from_pretrained, as the end of the run writes RUN/LATEST/hf.

python -m tools.export RUN OUT                          the newest checkpoint
python -m tools.export RUN/step-N OUT                   any other
python -m tools.export RUN/policies/step-N.pt OUT       weights that keep_policies=true kept
python -m tools.export RUN/step-N OUT --merged          of a LoRA run: the merged model instead of the adapter

The run's folder is only read, also while the run trains. No GPU is needed.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile, ZipFile

from dpo.system.console import guard_streams, log_message, on_terminal
from dpo.system.errors import UserError, exit_on_error, raise_problems, summarize_error
from dpo.system.installation import CONFIG, is_installed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from dpo.runs.weights import TrainedWeights
    from dpo.settings.schema import Settings
    from dpo.training.objectives import Loss

ANOTHER = "export another checkpoint of the run"
NOT_MERGED = "--merged: an adapter cannot be merged into"
ALONE = "leave it out, to export the adapter"


# Which checkpoint


@dataclass(frozen=True)
class Source:
    """The weights to export: policy.pt, or shards in the folder of a checkpoint."""

    run: Path  # the run directory
    step: int  # examples that the weights were trained on
    policy: Path | None  # policy.pt; None for shards
    checkpoint: Path  # of the same step; the newest of the run if of this step only the weights were kept
    metrics: Path  # of the step's evaluation, if there was one


def find_source(path: Path) -> Source:
    """Find a checkpoint and verify it; UserError if there is none or it is damaged."""
    from dpo.settings.run_config import list_checkpoints

    path = path.absolute()
    if path.name == "BEST" and path.is_symlink():
        path = path.parent / path.readlink()
    is_step = re.fullmatch(r"step-\d+", path.name) is not None
    is_kept = re.fullmatch(r"step-\d+\.pt", path.name) is not None
    run = path.parent.parent if is_kept else path.parent if is_step or path.name in ("LATEST", "BEST") else path
    if not (run / "config.yaml").is_file():
        raise UserError(f"{path}: is not of a run; give RUN, RUN/step-N or RUN/policies/step-N.pt")
    steps = list_checkpoints(run)
    if not steps:
        raise UserError(f"{run}: this run has written no checkpoint yet")
    if (is_step or is_kept) and not path.exists():
        kept = (f"policies/{policy.name}" for policy in sorted(run.glob("policies/step-*.pt")))
        existing = ", ".join([*(step.name for step in reversed(steps)), *kept])
        raise UserError(f"{path}: there is no such checkpoint; the run has {existing}")
    if is_kept:
        verify_archive(path)
        return Source(run, step_of(path), path, steps[0], path.with_suffix(".json"))
    checkpoint = path if is_step else steps[0]
    with unless_removed(checkpoint):
        verify_checkpoint(checkpoint)
    policy = checkpoint / "policy.pt"
    policy_or_none = policy if policy.is_file() else None
    return Source(run, step_of(checkpoint), policy_or_none, checkpoint, checkpoint / "metrics.json")


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-").removesuffix(".pt"))


def verify_checkpoint(folder: Path) -> None:
    """Raise UserError if a checkpoint does not match its manifest."""
    from dpo.runs.checkpoints import find_corruption

    if problem := find_corruption(folder):
        raise UserError(f"{folder}: is damaged: {problem}; {ANOTHER}")


@contextmanager
def unless_removed(checkpoint: Path) -> Iterator[None]:
    """Give the cause of errors from reading a checkpoint that its run has removed meanwhile."""
    try:
        yield
    except (UserError, OSError):
        if checkpoint.exists():
            raise
        problem = "the run has removed it, as keep_checkpoints says"
        raise UserError(f"{checkpoint}: {problem}; export a newer one") from None


def verify_archive(path: Path) -> None:
    """Raise UserError if a file that torch.save wrote does not match the checksums in it."""
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()
    except (OSError, BadZipFile) as error:
        raise UserError(f"{path}: is damaged ({summarize_error(error)}); {ANOTHER}") from None
    if damaged is not None:
        raise UserError(f"{path}: is damaged ({damaged}); {ANOTHER}")


def read_run_state(checkpoint: Path) -> dict[str, Any]:
    """The state in run.pt of a checkpoint, as plain values; UserError if it cannot be read."""
    import torch

    try:
        state = torch.load(checkpoint / "run.pt", map_location="cpu", weights_only=True)["state"]
        return dict(state)
    except Exception as error:  # torch refuses a forged file in many ways
        raise UserError(f"{checkpoint / 'run.pt'}: cannot be read ({summarize_error(error)}); {ANOTHER}") from None


# Settings


def read_settings(run: Path) -> "tuple[Settings, Loss, str]":
    """A run's settings, its loss and the loss's name; UserError if config.yaml has a value to be looked up."""
    from omegaconf import OmegaConf

    from dpo.settings.run_config import is_interpolated, read_run_config
    from dpo.settings.schema import REMOVED, default_values, flatten, flatten_plain, validate
    from losses import LOSSES
    from utils import register_resolvers

    register_resolvers()
    config = read_run_config(run, setting="")
    stored: Any = OmegaConf.to_container(config, resolve=False)
    looked_up = {key: value for key, value in flatten_plain(stored).items() if is_interpolated(value)}
    advice = "is not looked up; write its value into this file"
    raise_problems([f"{run / 'config.yaml'}: {key}: {value}: {advice}" for key, value in looked_up.items()])
    values = {key: value for key, value in flatten(config).items() if key not in REMOVED}
    name = str(values.get("loss.name"))
    settings, loss = validate(values, default_values(CONFIG, name, resumed=True), LOSSES, check_combinations=False)
    return settings, loss, name


def settings_to_load(settings: "Settings", source: Source, options: argparse.Namespace) -> "Settings":
    """The settings with which the model is loaded on the CPU, with those that the options replace.

    All weights come from the checkpoint. An adapter's frozen weights come from RUN/base if the run has written it.
    """
    archive, model = settings.model.archive, options.model
    base = source.run / "base"
    changes: dict[str, Any] = {} if model is None else {"name_or_path": model}
    if settings.lora is None:
        changes["archive"] = source.policy and str(source.policy)
    elif model is None and base.is_dir():
        changes |= {"name_or_path": str(base), "archive": None, "from_scratch": False, "resize_embeddings": False}
    elif archive is not None and not Path(archive).is_file():  # perhaps merged in `model`: its checksum says so
        changes["archive"] = None
    # The frozen copy of lora.path is not exported, and of quantized layers only the names are needed.
    lora = settings.lora and settings.lora.model_copy(update={"path": None, "quantize": None})
    changed_model = settings.model.model_copy(update=changes)
    export_dtype = options.dtype or settings.export_dtype
    changed = {"device": "cpu", "model": changed_model, "lora": lora, "export_dtype": export_dtype}
    return settings.model_copy(update=changed)


def check_options(options: argparse.Namespace, settings: "Settings", loaded_with: "Settings") -> None:
    """Raise UserError for options that do not fit the run's settings, or those with which the model is loaded."""
    from dpo.runs.weights import base_name

    lora = settings.lora
    if options.merged and lora is None:
        raise UserError("--merged: this run trained all weights and has no adapter to merge; leave it out")
    if lora is None:
        return
    if not is_installed("peft"):
        raise UserError(f"{options.checkpoint}: is of a LoRA run, which needs the library peft; pip install peft")
    if options.merged and lora.quantize is not None:
        raise UserError(f"{NOT_MERGED} the weights of lora.quantize={lora.quantize}; {ALONE}")
    base = base_name(loaded_with.model)
    if options.push is not None and not options.merged and (base is None or Path(base).is_dir()):
        raise UserError(f"--push {options.push}: only this machine has the adapter's base model; add --merged")


# Weights


def load_weights(
    settings: "Settings", source: Source, base: str | None
) -> "tuple[TrainedWeights, PreTrainedTokenizerBase]":
    """Load the model with the weights of a checkpoint, and its tokenizer.

    base is the checksum of an adapter's frozen weights; UserError if those that were loaded have another.
    """
    import torch

    from dpo.model.loading import load_model_config, load_policy
    from dpo.model.pretrained import skip_unreachable_hub
    from dpo.model.refusals import count_embeddings
    from dpo.runs.weights import AllWeights, add_adapter

    model, device = settings.model, torch.device("cpu")
    skip_unreachable_hub({model.name_or_path: True, model.tokenizer_name_or_path or model.name_or_path: True})
    advice = "give the path of the run's model with --model PATH"
    try:
        config, tokenizer = load_model_config(model, settings.chat_template)
        policy = load_policy(settings, config, device, count_embeddings(model, config, tokenizer))
    except UserError as error:
        cause = str(error).partition("; ")[0]
        raise UserError(f"{cause}; {advice}") from None
    if settings.lora is None:
        weights: TrainedWeights = AllWeights(policy)
    else:
        weights = add_adapter(policy, settings)
        if base not in (None, weights.base):
            problem = "holds other weights than those that the adapter was trained on"
            raise UserError(f"model.name_or_path={model.name_or_path}: {problem}; {advice}")
    load_state(weights, source)
    return weights, tokenizer


def load_state(weights: "TrainedWeights", source: Source) -> None:
    """Load the checkpoint's weights, unless the model has been loaded with them."""
    from dpo.distributed.sharding import distinct
    from dpo.model.archives import load_archive
    from dpo.runs.shards import load_shards
    from dpo.runs.weights import AdapterWeights

    if source.policy is None:
        tensors = {f"policy.{name}": value.detach() for name, value in distinct(weights.tensors()).items()}
        try:
            load_shards(tensors, source.checkpoint)
        except RuntimeError as error:
            raise UserError(f"{source.checkpoint}: does not fit the run's model ({error})") from None
    elif isinstance(weights, AdapterWeights):
        weights.load_state_dict(load_archive(str(source.policy)), str(source.policy))


# The export


def facts_of_data(state: dict[str, Any], settings: "Settings", loss: "Loss") -> tuple[list[int], int]:
    """The ids that end a turn in the run's conversations, and how many examples it evaluates.

    Checkpoints of earlier versions do not have them, so the run's data are read.
    """
    if "stops" in state:
        return state["stops"], state["n_evaluated"]
    from build import load_inputs

    inputs = load_inputs(settings, loss)
    return inputs.stops, min(inputs.eval_batches.n_items, settings.n_eval_examples)


def dtype_of_model(settings: "Settings", state: dict[str, Any]) -> "torch.dtype":
    """The dtype of an exported model by export_dtype; for auto the one in which the run computes."""
    import torch

    from dpo.runs.export import export_dtype
    from dpo.runs.run_dir import read_environment

    computed = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}
    return export_dtype(settings, computed.get(str(read_environment({"run": state}).get("dtype")), torch.float32))


def write(
    weights: "TrainedWeights",
    tokenizer: "PreTrainedTokenizerBase",
    card: str,
    out: Path,
    dtype: "torch.dtype",
    merged: bool,
) -> None:
    """Write the export; frozen weights of an adapter that no other folder holds are written to OUT/base as they are."""
    from dpo.runs.export import export_model
    from dpo.runs.weights import AdapterWeights, base_weights

    if out.is_dir():
        out.rmdir()  # it is empty
    out.parent.mkdir(parents=True, exist_ok=True)
    model = weights.model
    if isinstance(weights, AdapterWeights) and merged:
        export_model(out, model, tokenizer, weights.merged_weights(model.state_dict()), card, dtype)
    elif isinstance(weights, AdapterWeights) and weights.base_name is None:
        base = out / "base"
        replace(weights, base_name=str(base)).export(out, tokenizer, card, dtype=dtype)
        export_model(base, model, tokenizer, base_weights(model.state_dict()))
    else:
        weights.export(out, tokenizer, card, dtype=dtype)


def export(options: argparse.Namespace) -> None:
    """Write a checkpoint as a folder for from_pretrained, and upload it if asked to."""
    from dpo.model.refusals import quantization_method
    from dpo.model.sampling import add_stops
    from dpo.reporting.model_card import Outcome, model_card
    from dpo.runs.export import describe_export, upload
    from dpo.runs.run_dir import Checkpoint
    from dpo.runs.weights import AdapterWeights

    source = find_source(options.checkpoint)
    out = options.out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{options.out}: exists and is not empty; choose a new folder")
    if out.is_relative_to(source.run.resolve()):
        raise UserError(f"{options.out}: lies in the run directory, which only the run writes; choose another folder")
    settings, loss, loss_name = read_settings(source.run)
    loaded_with = settings_to_load(settings, source, options)
    check_options(options, settings, loaded_with)
    is_quantized = settings.lora is not None and settings.lora.quantize is not None
    with unless_removed(source.checkpoint):
        state = read_run_state(source.checkpoint)
        fingerprints = Checkpoint(source.checkpoint, {"run": state}).fingerprints()
        base = fingerprints.get("the base model's weights")
        weights, tokenizer = load_weights(loaded_with, source, None if is_quantized else base)
        metrics = json.loads(source.metrics.read_text(encoding="utf-8")) if source.metrics.is_file() else {}
    if options.merged and quantization_method(weights.model.config):
        raise UserError(f"{NOT_MERGED} weights that are quantized already; {ALONE}")
    if isinstance(weights, AdapterWeights) and base is not None:
        weights = replace(weights, base=base)  # that of quantized weights
    stops, n_evaluated = facts_of_data(state, loaded_with, loss)
    if stops:
        add_stops(weights.model.generation_config, stops)
    updates = source.step // settings.batch_size  # of which each has a full batch
    outcome = Outcome(loss_name, source.step, updates, n_evaluated, metrics, fingerprints)
    dtype = dtype_of_model(loaded_with, state)
    settings = settings.model_copy(update={"push_to_hub": options.push})
    card = model_card(settings, loss, outcome, dtype, merged_only=options.merged)
    write(weights, tokenizer, card, out, dtype, options.merged)
    log_message(f"{describe_export(out, weights.model.dtype, '--dtype float32')} Step {source.step:,} of {source.run}.")
    upload(out, options.push)


# The command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    forms = "RUN, RUN/LATEST, RUN/BEST, RUN/step-N or RUN/policies/step-N.pt"
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=forms)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder")
    parser.add_argument("--merged", action="store_true", help="write a LoRA run's merged model instead of the adapter")
    dtypes = ("float32", "bfloat16", "float16")
    parser.add_argument("--dtype", choices=dtypes, help="of the weights in OUT, instead of the run's export_dtype")
    parser.add_argument("--push", metavar="me/name", help="upload OUT to this repository on the Hub")
    parser.add_argument("--model", metavar="PATH", help="where model.name_or_path of the run is now")
    return parser.parse_args(arguments)


def main() -> None:
    guard_streams()
    options = parse_arguments()
    if not on_terminal():
        from transformers.utils import logging

        logging.disable_progress_bar()
    exit_on_error(lambda: export(options))


if __name__ == "__main__":
    main()
