"""What can be diagnosed: a run, the folder of a model, or the folder of an adapter."""

import json
import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.system.errors import UserError, join_names, summarize_error
from tools.candidates import ADAPTER, CHECKPOINT, base_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from dpo.settings.schema import Settings
    from tools.candidates import Candidate

MIN_RATES = 10  # learning rates that tell their mean; the only one of a short run may be the last, near 0
BOUNDED = ("Adam", "AdamW", "AdamW8bit")  # optimizers whose steps are hardly above lr; RMSprop's first is ten times lr
DERIVED = re.compile(
    r"(?:model\.name_or_path|model\.tokenizer_name_or_path|model\.archive|lora\.path|resume)=([^:]*): "
)


@contextmanager
def naming(key: str, name: str) -> Iterator[None]:
    """Make errors name the argument that was given, instead of the setting of a run that loading derives from it."""
    try:
        yield
    except UserError as error:
        raise UserError(*(with_argument(key, name, str(line)) for line in error.args)) from None


def with_argument(key: str, name: str, line: str) -> str:
    """A line of an error with the argument, and with the path in it if that is another one."""
    found = DERIVED.match(line)
    if found is None:
        return line
    path = "" if found[1] == name else f"{found[1]}: "
    return f"{key}={name}: {path}{line[found.end() :]}"


@dataclass(frozen=True)
class Checkpoint(ABC):
    """A trained model; key is the argument that names it, "policy" or "reference"."""

    key: str
    name: str

    @property
    @abstractmethod
    def model_name(self) -> str:
        """The folder or name on the Hub of a model with the same config and vocabulary."""

    @property
    def tokenizer_name(self) -> str:
        """The folder or name on the Hub of its tokenizer."""
        return self.model_name

    @abstractmethod
    def candidate(self, settings: "Settings") -> "Candidate":
        """What tools.compare loads, given the settings of the diagnosis."""

    def load(self, settings: "Settings", device: "torch.device") -> tuple["PreTrainedModel", dict[str, float]]:
        """The model, with an adapter merged into it, and figures of how it loaded."""
        from tools.candidates import load_model

        with naming(self.key, self.name):
            candidate = self.candidate(settings)
            model = load_model(candidate, device)
            if candidate.settings.lora is not None:
                merge_adapter(model)
        return model, {}

    def reference(self) -> "Checkpoint | None":
        """What it was trained from, if that is known."""
        return None

    def training(self) -> dict[str, float]:
        """Figures of its training, as far as files tell."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The settings of its training, {dotted key: value}, if it is a run."""
        return {}


@dataclass(frozen=True)
class Model(Checkpoint):
    """A folder, or a name on the Hub, that from_pretrained opens."""

    @property
    def model_name(self) -> str:
        return self.name

    def candidate(self, settings: "Settings") -> "Candidate":
        from tools.candidates import Candidate

        own = {"name_or_path": self.model_name, "archive": None, "from_scratch": False}
        model = settings.model.model_copy(update=own)
        return Candidate(self.name, settings.model_copy(update={"model": model}), None, None)  # type: ignore[arg-type]

    def training(self) -> dict[str, float]:
        return trainer_state(Path(self.name))


@dataclass(frozen=True)
class Adapter(Checkpoint):
    """A folder in peft's format, or its name on the Hub. base is the model that it adapts."""

    base: str

    @property
    def model_name(self) -> str:
        return self.base

    @property
    def tokenizer_name(self) -> str:
        from dpo.model.pretrained import source_file

        return self.name if source_file(self.name, "tokenizer_config.json") else self.base

    def candidate(self, settings: "Settings") -> "Candidate":
        return Model(self.key, self.base).candidate(settings)

    def load(self, settings: "Settings", device: "torch.device") -> tuple["PreTrainedModel", dict[str, float]]:
        """The base model with the adapter merged into it, and which share of the adapter fits and is not zero."""
        from peft import PeftModel, get_peft_model_state_dict
        from peft.utils import load_peft_weights

        model, _ = super().load(settings, device)
        with naming(self.key, self.name):
            try:
                stored = load_peft_weights(self.name, device="cpu")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # about missing keys, which the figures count
                    adapted = PeftModel.from_pretrained(model, self.name)
                own = {name for name in stored if "lora_" in name} or stored.keys()  # embeddings may lie beside them
                fitting = get_peft_model_state_dict(adapted).keys() & own
                outer = [w for name, w in adapted.named_parameters() if re.search(r"lora_(embedding_)?B\.", name)]
                active = sum(bool(weight.any()) for weight in outer)
                merged = adapted.merge_and_unload()
            except Exception as error:  # peft raises nearly anything for a foreign file
                problem = f"cannot be merged into its base model {self.base} ({summarize_error(error)})"
                raise UserError(f"{self.key}={self.name}: {problem}; correct its adapter_config.json") from None
        figures = {"adapter/fitting": len(fitting) / max(1, len(own)), "adapter/active": active / max(1, len(outer))}
        return merged.requires_grad_(True), figures

    def reference(self) -> Checkpoint:
        return Model("reference", self.base)

    def training(self) -> dict[str, float]:
        return trainer_state(Path(self.name))


@dataclass(frozen=True)
class Run(Checkpoint):
    """A checkpoint of a run of this project, RUN/step-N; at_start: the run's reference instead."""

    path: Path
    at_start: bool = False

    @property
    def model_name(self) -> str:
        return str(self.settings()["model.name_or_path"])

    @property
    def tokenizer_name(self) -> str:
        return str(self.settings()["model.tokenizer_name_or_path"] or self.model_name)

    def candidate(self, settings: "Settings") -> "Candidate":
        from tools.candidates import find_candidate

        return find_candidate(self.path, self.at_start)

    def reference(self) -> Checkpoint | None:
        return replace(self, key="reference", at_start=True)

    def settings(self) -> dict[str, Any]:
        from dpo.settings.run_config import read_run_config
        from dpo.settings.schema import REMOVED, flatten

        with naming(self.key, self.name):
            config = read_run_config(self.path.parent)
        return {key: value for key, value in flatten(config).items() if key not in REMOVED}

    def training(self) -> dict[str, float]:
        """The updates before this checkpoint, their learning rates, and the first and last of the recorded metrics."""
        from dpo.reporting.page import RunFiles

        examples = int(self.path.resolve().name.removeprefix("step-"))
        records = [record for record in RunFiles(self.path.parent).metrics if record["examples"] <= examples]
        updates = [record for record in records if "loss/train" in record]
        figures = {"examples": float(examples), "updates": float(len(updates))}
        if updates and self.settings()["optimizer"] in BOUNDED:
            figures["lr_sum"] = sum(record["lr"] for record in updates)
        if updates:
            figures |= mean_of_last("train_accuracy", [record.get("rewards_train/accuracies") for record in updates])
        first = [
            record["loss/eval"] for record in records if record["updates"] == 0 and record.get("loss/eval") is not None
        ]
        return figures | ({"first_loss": first[0]} if first else {})


def find(key: str, name: str) -> Checkpoint:
    """What an argument names; UserError, with its key, if there is nothing that can be loaded."""
    path = Path(name)
    if path.name == "policy.pt":
        path = path.parent
    if (path / "config.yaml").is_file():
        path = path / "LATEST"
    if CHECKPOINT.fullmatch(path.name) and (path.parent / "config.yaml").is_file():
        if not (path / "policy.pt").is_file():
            raise UserError(f"{key}={name}: there is no {path / 'policy.pt'}; give a run that has written a checkpoint")
        return Run(key, name, path)
    if path.is_file():
        raise UserError(f"{key}={name}: is a file; give a run, the folder of a model or that of an adapter")
    if path.is_dir():
        return find_in_folder(key, name, path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"{key}={name}: there is no such folder")
    from dpo.model.pretrained import source_file

    if file := source_file(name, ADAPTER):
        return adapter(key, name, file)
    return Model(key, name)


def find_in_folder(key: str, name: str, path: Path) -> Checkpoint:
    if (path / ADAPTER).is_file():
        return adapter(key, name, path / ADAPTER)
    if (path / "config.json").is_file():
        return Model(key, name)
    inside = sorted(
        file.parent.name for file in path.glob("*/*config.json") if file.name.startswith(("config", "adap"))
    )
    if inside:
        raise UserError(f"{key}={name}: holds no model itself; give one of its folders: {join_names(inside)}")
    raise UserError(f"{key}={name}: holds neither config.json, adapter_config.json nor a run's config.yaml")


def adapter(key: str, name: str, file: Path) -> Adapter:
    """The adapter whose adapter_config.json is a file; UserError if that names no base model."""
    try:
        return Adapter(key, name, base_model(file))
    except UserError as error:
        raise UserError(f"{key}={name}: {error}") from None


def merge_adapter(model: "PreTrainedModel") -> None:
    """Merge the adapter of a run that is in use, so that the model has the layers and names of any other.

    Quantized weights keep the adapter beside them, since merging would round them.
    """
    from dpo.model.loading import is_quantized
    from dpo.model.lora import adapted_layers

    if is_quantized(model):
        return
    for name, layer in adapted_layers(model).items():
        layer.merge()
        if not name.endswith("base_layer"):  # wrappers of experts are nested
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())


def trainer_state(folder: Path) -> dict[str, float]:
    """Figures from the trainer_state.json that the trainers of transformers and TRL write, {} without one."""
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        log: list[Mapping[str, Any]] = [entry for entry in state["log_history"] if "learning_rate" in entry]
        figures = {"updates": float(state["global_step"])}
    except (OSError, ValueError, KeyError, TypeError):  # absent, or of another program
        return {}
    if len(log) >= MIN_RATES:
        figures["lr_sum"] = sum(float(entry["learning_rate"]) for entry in log) / len(log) * figures["updates"]
    return figures | mean_of_last("train_accuracy", [entry.get("rewards/accuracies") for entry in log])


def mean_of_last(name: str, values: list[float | None]) -> dict[str, float]:
    """The mean of the last tenth of some values; {} if they are missing."""
    last = [value for value in values[-max(1, len(values) // 10) :] if value is not None]
    return {name: sum(last) / len(last)} if last else {}
