"""The model card of an export, README.md in the Hub's format; it has only the last part of local paths."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from dpo.data.sources import is_hub_name
from dpo.reporting.metric_table import HEADLINES, interval
from dpo.settings.constraints import START
from dpo.settings.run_config import read_run_config
from dpo.settings.schema import Settings
from dpo.system.errors import UserError
from dpo.training.objectives import Loss

TEMPLATE = Path(__file__).with_suffix(".md.jinja")
PLACEHOLDER = "PATH/OF/THIS/FOLDER"  # if the export is not uploaded to a repository
TRAINING = (
    *("lr", "scheduler", "min_lr_ratio", "warmup_steps", "optimizer", "optimizer_args", "weight_decay"),
    *("max_grad_norm", "batch_size", "n_epochs", "n_examples", "max_length", "max_prompt_length", "precision"),
    *("sync_reference", "sync_mix", "seed", "chat_template_args", "chat_template_time"),
)


@dataclass(frozen=True)
class Outcome:
    """The counters of a run, an evaluation, the fingerprints of what it was trained on, and which evaluation it is."""

    loss_name: str
    examples: int
    updates: int
    n_evaluated: int
    metrics: Mapping[str, float]
    fingerprints: Mapping[str, str]
    when: str = "after the last update"


def model_card(
    settings: Settings, loss: Loss, outcome: Outcome, dtype: torch.dtype | None = None, merged_only: bool = False
) -> str:
    """The card as Markdown with YAML front matter.

    dtype: of an exported or merged model's weights, if known. merged_only: the export holds a merged model, no adapter.
    """
    from huggingface_hub import ModelCard, ModelCardData

    lora = None if merged_only else settings.lora
    base = settings.model.name_or_path
    is_on_hub = not settings.model.from_scratch and not Path(base).exists() and public_name(base) == base
    data = ModelCardData(
        base_model=base if is_on_hub else None,
        datasets=[name.partition(":")[0] for name in settings.datasets if is_hub_name(name)] or None,
        library_name="transformers" if lora is None else "peft",
        pipeline_tag="text-generation",
        tags=[*(["preference-optimization"] if loss.n_responses == 2 else []), outcome.loss_name],
    )
    metrics = outcome.metrics
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=settings.exp_name,
        base=f"A model of the shape of {public_name(base)}" if settings.model.from_scratch else public_name(base),
        earlier=None if settings.model.archive is None else earlier_stage(Path(settings.model.archive)),
        reference=None if settings.reference == START else reference_name(settings.reference),
        outcome=outcome,
        data_sets=[public_name(name) for name in settings.datasets],
        is_adapter=lora is not None,
        is_merged=lora is not None and lora.export_merged,
        path=settings.push_to_hub or PLACEHOLDER,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        evaluation={
            name: (f"{metrics[name]:.4g}", interval_text(metrics, name)) for name in HEADLINES if name in metrics
        },
        diagnosis={
            name.removeprefix("diagnosis/"): f"{value:.4g}"
            for name, value in metrics.items()
            if name.startswith("diagnosis/") and name not in HEADLINES
        },
        hashes={what: digest for what, digest in outcome.fingerprints.items() if what != "the settings"},
        equation=inspect.cleandoc(type(loss).__doc__ or ""),
        settings=training_settings(settings, loss),
    )
    return f"{card}\n"


def earlier_stage(archive: Path) -> str:
    """Name the run that wrote model.archive, or the file if it is not in a run directory."""
    try:
        stored: Any = OmegaConf.to_container(read_run_config(archive.parent.parent), resolve=False)
        names = ", ".join(public_name(str(name)) for name in stored["datasets"])
        return f"the run {stored['exp_name']} (`loss={stored['loss']['name']}` on {names})"
    except (UserError, KeyError, TypeError):  # not in a run directory, or in one of the original implementation
        return f"the file {archive.name}"


def reference_name(reference: str) -> str:
    """Name the run whose weights `reference` names, or else the model or file."""
    path = Path(reference)
    if path.exists() and (path.parent.parent / "config.yaml").is_file():
        return earlier_stage(path)
    return f"the file {path.name}" if path.is_file() else public_name(reference)


def public_name(name: str) -> str:
    """A name on the Hub unchanged, or the last part of a path."""
    return name if is_hub_name(name) or "/" not in name else Path(name).name


def interval_text(metrics: Mapping[str, float], name: str) -> str:
    ends = interval(metrics, name)
    return "" if ends is None else f"{ends[0]:.4g} to {ends[1]:.4g}"


def training_settings(settings: Settings, loss: Loss) -> dict[str, Any]:
    """The training settings without paths, as {dotted key: value}."""
    values: dict[str, Any] = {f"loss.{key}": value for key, value in loss.model_dump().items()}
    values |= {key: getattr(settings, key) for key in TRAINING}
    values["model.policy_dtype"] = settings.model.policy_dtype
    if settings.lora is not None:
        values |= {f"lora.{key}": value for key, value in settings.lora.model_dump(exclude={"path"}).items()}
    return {key: value for key, value in values.items() if value is not None}
