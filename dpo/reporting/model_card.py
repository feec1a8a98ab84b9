"""The model card of an export, README.md, as the Hub reads it; of a path on this machine it has the last part."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dpo.data.sources import is_hub_name
from dpo.reporting.statistics import Z
from dpo.settings.run_config import read_run_config
from dpo.settings.schema import Settings
from dpo.system.errors import UserError
from dpo.training.objectives import Loss

TEMPLATE = Path(__file__).with_suffix(".md.jinja")
UNPUBLISHED = "PATH/OF/THIS/FOLDER"  # stands for the repository of an export that is not uploaded
EVALUATION = ("loss/eval", "rewards_eval/accuracies", "rewards_eval/margins", "diagnosis/kl")
ACCURACY = ("diagnosis/accuracy_low", "diagnosis/accuracy_high")
TRAINING = (
    *("lr", "scheduler", "min_lr_ratio", "warmup_steps", "optimizer", "optimizer_args", "weight_decay"),
    *("max_grad_norm", "batch_size", "n_epochs", "n_examples", "max_length", "max_prompt_length", "precision"),
    *("sync_reference", "sync_mix", "seed"),
)


@dataclass(frozen=True)
class Outcome:
    """What a run came to: its counters, its last evaluation, and the fingerprints of what it was trained on."""

    loss_name: str
    examples: int
    updates: int
    n_evaluated: int
    metrics: Mapping[str, float]
    fingerprints: Mapping[str, str]


def model_card(settings: Settings, loss: Loss, outcome: Outcome) -> str:
    """Return the card as Markdown with a front matter in YAML."""
    from huggingface_hub import ModelCardData
    from jinja2 import Environment

    lora, model = settings.lora, settings.model.name_or_path
    own_weights = settings.model.from_scratch or Path(model).exists()
    data = ModelCardData(
        base_model=None if own_weights else model,
        datasets=[name.partition(":")[0] for name in settings.datasets if is_hub_name(name)] or None,
        library_name="transformers" if lora is None else "peft",
        pipeline_tag="text-generation",
        tags=[*(["preference-optimization"] if loss.n_responses == 2 else []), outcome.loss_name],
    )
    metrics = outcome.metrics
    evaluation = {name: (f"{metrics[name]:.4g}", interval(metrics, name)) for name in EVALUATION if name in metrics}
    left = {name: value for name, value in metrics.items() if name not in (*EVALUATION, *ACCURACY)}
    diagnosis = {name.partition("/")[2]: f"{v:.4g}" for name, v in left.items() if name.startswith("diagnosis/")}
    template = Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        front_matter=data.to_yaml().strip(),
        name=settings.exp_name,
        base=f"A model of the shape of {shown(model)}" if settings.model.from_scratch else shown(model),
        earlier=None if settings.model.archive is None else earlier_stage(Path(settings.model.archive)),
        loss_name=outcome.loss_name,
        datasets=[shown(name) for name in settings.datasets],
        examples=outcome.examples,
        updates=outcome.updates,
        is_adapter=lora is not None,
        is_merged=lora is not None and lora.export_merged,
        path=settings.push_to_hub or UNPUBLISHED,
        n_evaluated=outcome.n_evaluated,
        evaluation=evaluation,
        diagnosis=diagnosis,
        hashes={what: digest for what, digest in outcome.fingerprints.items() if what != "the settings"},
        equation=inspect.cleandoc(type(loss).__doc__ or ""),
        settings=training_settings(settings, loss),
    )


def earlier_stage(archive: Path) -> str:
    """Return in words whose weights model.archive holds: those of the run that it lies in, if it does."""
    try:
        stored: Any = OmegaConf.to_container(read_run_config(archive.parent.parent), resolve=False)
        names = ", ".join(shown(str(name)) for name in stored["datasets"])
        return f"the run {stored['exp_name']} (`loss={stored['loss']['name']}` on {names})"
    except (UserError, KeyError, TypeError):  # not in a run, or in one of the original implementation
        return f"the file {archive.name}"


def shown(name: str) -> str:
    """Return a name of the Hub as it is, and of a path on this machine its last part."""
    return name if is_hub_name(name) or "/" not in name else Path(name).name


def interval(metrics: Mapping[str, float], name: str) -> str:
    """Return the 95% interval of a metric in words, or nothing where none was recorded."""
    if name == "rewards_eval/accuracies" and ACCURACY[0] in metrics:
        return " to ".join(f"{metrics[end]:.4g}" for end in ACCURACY)
    if f"{name}_stderr" in metrics:
        spread = Z * metrics[f"{name}_stderr"]
        return f"{metrics[name] - spread:.4g} to {metrics[name] + spread:.4g}"
    return ""


def training_settings(settings: Settings, loss: Loss) -> dict[str, Any]:
    """Return the settings of the training under their dotted keys, without any path."""
    found: dict[str, Any] = {f"loss.{key}": value for key, value in loss.model_dump().items()}
    found |= {key: getattr(settings, key) for key in TRAINING} | {"model.policy_dtype": settings.model.policy_dtype}
    if settings.lora is not None:
        found |= {f"lora.{key}": value for key, value in settings.lora.model_dump(exclude={"path"}).items()}
    return {key: value for key, value in found.items() if value is not None}
