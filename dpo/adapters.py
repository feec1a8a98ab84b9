"""LoRA: low-rank adapters of a frozen model, computed by peft; how they are added, saved, merged and switched off.

peft is imported where it is called: that takes seconds, and training all weights does without it.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from dpo.adapter_shapes import (
    BASE,
    PREFIX,
    AdapterShape,
    check_shape,
    find_targets,
    last_parts,
    read_adapter,
    shape_of,
)
from dpo.archives import check_fit, weights_checksum
from dpo.checkpoints import atomic_dir, write_manifest
from dpo.combinations import is_installed
from dpo.console import log_message
from dpo.errors import UserError, naming_file, summarize_error
from dpo.export import export_model, save_card, save_generation_config, save_model, save_tokenizer
from dpo.settings import ModelSettings, Settings

if TYPE_CHECKING:
    from peft import LoraModel, PeftConfig
    from peft.tuners.lora import LoraLayer

T = TypeVar("T", bound=Tensor)
POLICY, REFERENCE = "default", "reference"  # what peft's layers call the adapter that trains, and its frozen copy
SMALL_LR = 1e-5  # below it, advice is given


def add_adapter(model: PreTrainedModel, run_settings: Settings) -> "AdapterWeights":
    """Freeze a model and add an adapter: a new one from the run's seed, or that of lora.path with a frozen copy of it.

    UserError if the settings do not fit the model or the adapter of lora.path.
    """
    settings = run_settings.lora
    assert settings is not None
    torch.manual_seed(run_settings.seed)
    base, shape = weights_checksum(model.state_dict()), shape_of(settings, find_targets(model, settings.targets))
    stored = None if settings.path is None else read_adapter(settings.path)
    if stored is not None:
        check_shape(settings, shape, stored.shape)
        check_base(stored.base, base, f"lora.path={settings.path}")
    configs: dict[str, PeftConfig] = {} if stored is None else {REFERENCE: shape.peft_config(model)}
    configs[POLICY] = shape.peft_config(model, settings.dropout, True if settings.init == "kaiming" else "gaussian")
    inject(model, configs)
    model.eval()  # until training begins, an adapter's dropout is off
    if stored is not None:
        for name in configs:
            copy_weights(adapter_parameters(model, name), stored.weights, f"lora.path={settings.path}")
    trained = adapter_parameters(model, POLICY)
    model.requires_grad_(False)
    for parameter in trained.values():
        parameter.requires_grad_(True)
    for layer in adapted_layers(model).values():
        # Autocast casts what each product takes, while DoRA and bfloat16 weights need inputs in the adapter's float32.
        layer.cast_input_dtype_enabled = settings.use_dora or model.dtype != torch.float32
    n, total = (sum(parameter.numel() for parameter in group) for group in (trained.values(), model.parameters()))
    what = f"r={shape.r}, alpha={shape.alpha}, {len(shape.targets)} layers ({', '.join(last_parts(shape.targets))})"
    log_message(f"LoRA: {what}; {n:,} of {total:,} parameters are trained.")
    if run_settings.lr < SMALL_LR:
        advice = "an adapter usually needs 10 to 100 times the learning rate of all weights; try lr=5e-5"
        log_message(f"LoRA: lr={run_settings.lr:g} may be too low: {advice}.")
    copied = None if stored is None else weights_checksum(adapter_parameters(model, REFERENCE))
    return AdapterWeights(model, shape, base, copied, base_name(run_settings.model), settings.export_merged)


def base_name(settings: ModelSettings) -> str | None:
    """Return what from_pretrained opens to get a run's frozen weights, or None if nothing that exists holds them."""
    if settings.archive is not None or settings.from_scratch:
        return None
    folder = Path(settings.name_or_path)
    return str(folder.resolve()) if folder.is_dir() else settings.name_or_path


def inject(model: PreTrainedModel, configs: dict[str, "PeftConfig"]) -> "LoraModel":
    """Put adapters into a model in place, in float32, the last of them in use; return what peft manages them with."""
    from peft import LoraModel

    first, *others = configs
    tuner = LoraModel(model, configs, first)
    for name in others:
        tuner.inject_adapter(model, name)
    for name in configs:
        for parameter in adapter_parameters(model, name).values():
            parameter.data = parameter.data.float()  # peft gives them the dtype of the frozen weights
    use_adapter(adapted_layers(model).values(), [*configs][-1])
    return tuner


def use_adapter(layers: Iterable["LoraLayer"], name: str) -> None:
    """Let layers compute with the adapter of a name; without any if they have none of that name.

    peft's own switches also set requires_grad of parameters, which FSDP2 reads once, at its first forward pass.
    """
    for layer in layers:
        layer._active_adapter = [name]


def adapted_layers(model: PreTrainedModel) -> dict[str, "LoraLayer"]:
    """Return peft's layers by the names of the linear layers that they wrap."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_parameters(model: PreTrainedModel, adapter: str) -> dict[str, Parameter]:
    """Return the parameters of one adapter under the names of peft's files, without their prefix."""
    return adapter_tensors(dict(model.named_parameters()), adapter)


def adapter_tensors(state: Mapping[str, T], adapter: str) -> dict[str, T]:
    """Return, of the tensors of a model's state_dict, those of one adapter, as adapter_parameters names them."""
    kept = re.compile(rf"(.*\.lora_[AB])\.{adapter}(\.weight)|(.*\.lora_magnitude_vector)\.{adapter}\.weight")
    found = ((kept.fullmatch(name), tensor) for name, tensor in state.items())
    return {"".join(filter(None, match.groups())): tensor for match, tensor in found if match}


@torch.no_grad()
def copy_weights(own: Mapping[str, Parameter], stored: Mapping[str, Tensor], setting: str) -> None:
    """Copy stored weights into an adapter; UserError that names the setting and each tensor that does not fit."""
    check_fit(own, stored, setting)
    for name, parameter in own.items():
        parameter.copy_(stored[name])


@dataclass(frozen=True)
class AdapterWeights:
    """The adapter of a model, which alone is trained: checkpoints hold it, and the export has it in peft's format."""

    model: PreTrainedModel
    shape: AdapterShape
    base: str  # checksum of the frozen weights
    path: str | None  # checksum of the adapter of lora.path
    base_name: str | None  # what from_pretrained opens to get the frozen weights
    export_merged: bool

    @cached_property
    def layers(self) -> dict[str, "LoraLayer"]:
        """Return peft's layers by the names of the linear layers that they wrap."""
        return adapted_layers(self.model)

    def identity(self) -> dict[str, str]:
        """Return checksums of the frozen weights, which a resumed run must find again."""
        found = {"the base model's weights": self.base}
        return found if self.path is None else found | {"the adapter of lora.path": self.path}

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Compute without the adapter, or with the frozen copy of what lora.path had."""
        use_adapter(self.layers.values(), REFERENCE)
        try:
            yield
        finally:
            use_adapter(self.layers.values(), POLICY)

    def describe_reference(self) -> str:
        """Return in words what the reference is."""
        if self.path is not None:
            return "the base model with a frozen copy of the adapter of lora.path"
        return "the base model, which is the policy with its adapter off"

    def tensors(self) -> dict[str, Tensor]:
        """Return the weights of the adapter that trains."""
        return {name: parameter.detach() for name, parameter in adapter_parameters(self.model, POLICY).items()}

    def tensors_to_export(self) -> dict[str, Tensor]:
        """Return the weights of the adapter, with those of the model where these are exported too."""
        state = self.model.state_dict(keep_vars=True)
        if self.base_name is None or self.export_merged:
            return state
        return {name: value for name, value in state.items() if f".{POLICY}." in name}

    def state_dict(self, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """Return the adapter's shape and weights, and the checksum of the frozen weights that it belongs to."""
        weights = self.tensors() if tensors is None else tensors
        return {"adapter": asdict(self.shape), "base": self.base, "weights": weights}

    def load_state_dict(self, state: dict[str, Any], setting: str) -> None:
        """Copy the weights of a checkpoint; UserError that names the setting and each tensor that does not fit."""
        copy_weights(adapter_parameters(self.model, POLICY), state["weights"], setting)

    def export(
        self, folder: Path, tokenizer: PreTrainedTokenizerBase, card: str, weights: dict[str, Tensor] | None = None
    ) -> None:
        """Write RUN/step-N/hf in peft's format, with the merged model in hf/merged if that is asked for.

        Frozen weights that from_pretrained finds nowhere else, as those of model.archive, go to RUN/base.
        """
        state, base_name = weights or self.model.state_dict(), self.base_name
        if base_name is None:
            base_folder = folder.parent.parent / "base"
            base_name = str(base_folder)
            export_model(base_folder, self.model, tokenizer, base_weights(state))

        def write(staging: Path) -> None:
            config = self.shape.peft_config(self.model).to_dict() | {"base_model_name_or_path": base_name}
            config |= {"inference_mode": True, "target_modules": self.short_targets()}
            own = {f"{PREFIX}{name}": value.contiguous() for name, value in adapter_tensors(state, POLICY).items()}
            save_file(own, staging / "adapter_model.safetensors", metadata={"format": "pt", BASE: self.base})
            with naming_file(staging / "adapter_config.json"):
                (staging / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            save_tokenizer(staging, tokenizer)
            save_generation_config(staging, self.model)
            save_card(staging, card)
            if self.export_merged:
                save_model(staging / "merged", self.model, tokenizer, self.merged_weights(state))
                write_manifest(staging / "merged", {})

        if not folder.exists():
            atomic_dir(folder, write)

    def short_targets(self) -> list[str]:
        """Return the last parts of the adapted layers' names, or whole names where other layers share a last part."""
        linear = (name for name, module in self.model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
        names = {name.removesuffix(".base_layer") for name in linear if ".lora_" not in name}
        parts = last_parts(self.shape.targets)
        alike = {name for name in names if name.rpartition(".")[2] in parts}
        return parts if alike == set(self.shape.targets) else list(self.shape.targets)

    def merged_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of the model that computes what base and adapter compute together, given both."""
        merged = base_weights(state)
        for name, adapted in self.layers.items():
            layer: Any = copy.deepcopy(adapted)  # taking the adapter out of a weight again would round it
            own = {key.removeprefix(f"{name}."): state[key].clone() for key in state if key.startswith(f"{name}.")}
            layer.load_state_dict(own, assign=True)  # whole ones, where the model has shards
            layer.merge(adapter_names=[POLICY])
            merged[f"{name}.weight"] = layer.get_base_layer().get_parameter("weight").detach().cpu()
        return merged


def base_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return, of an adapted model's weights, the frozen ones under the names that they have without an adapter."""
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def reference_weights(model: PreTrainedModel) -> dict[str, Any]:
    """Return all weights of a model but those of the adapter that trains."""
    trained = re.compile(rf"\.lora_\w+\.{POLICY}\b")
    return {name: value for name, value in model.state_dict().items() if not trained.search(name)}


def check_base(stored: str | None, own: str, setting: str) -> None:
    """Raise UserError if an adapter is known to belong to other weights than those of the model."""
    if stored not in (None, own):
        remedy = "or model.name_or_path=RUN/base if that run has this folder"
        raise UserError(
            f"{setting}: this adapter was trained on other weights; give the model.name_or_path and model.policy_dtype"
            f" of its run, {remedy}"
        )


def merge_adapter(model: PreTrainedModel, state: dict[str, Any], setting: str) -> None:
    """Merge the adapter in a LoRA run's checkpoint into the model that it was trained on; UserError for another one."""
    if not is_installed("peft"):
        raise UserError(f"{setting}: holds an adapter, which needs the library peft; pip install peft")
    check_base(state["base"], weights_checksum(model.state_dict()), setting)
    try:
        shape = AdapterShape(**state["adapter"])
        tuner = inject(model, {POLICY: shape.peft_config(model)})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{setting}: its adapter cannot be read ({summarize_error(error)})") from None
    copy_weights(adapter_parameters(model, POLICY), state["weights"], setting)
    tuner.merge_and_unload()
    model.requires_grad_(True)
