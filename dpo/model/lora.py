"""LoRA adapters of a frozen model, with peft: choosing layers, reading, switching and merging.

dpo/runs/weights.py adds an adapter to a run's policy and saves it. peft is imported inside functions: importing it
takes seconds, and training all weights does not need it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from dpo.model.archives import check_fit, weights_checksum
from dpo.settings.schema import LoraSettings
from dpo.system.errors import UserError, summarize_error
from dpo.system.installation import is_installed

if TYPE_CHECKING:
    from peft import LoraConfig, LoraModel, PeftConfig
    from peft.tuners.lora import LoraLayer

T = TypeVar("T", bound=Tensor)


PREFIX = "base_model.model."  # of tensor names in peft's files
BASE = "base_checksum"  # key in the metadata of files written here
# peft's initializations that leave the base model's weights as they are
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")


@dataclass(frozen=True)
class AdapterShape:
    """The settings that determine how an adapter computes.

    targets are the full names of the adapted linear layers, and parameters those of tensors that hold all experts.
    """

    r: int
    alpha: int
    use_rslora: bool
    use_dora: bool
    targets: tuple[str, ...]
    parameters: tuple[str, ...] = ()

    def peft_config(
        self, model: PreTrainedModel, dropout: float = 0.0, init: Literal["gaussian"] | bool = True
    ) -> "LoraConfig":
        from peft import LoraConfig

        layer = model.get_submodule(self.targets[0]) if self.targets else None
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=dropout,
            target_modules=list(self.targets),
            target_parameters=list(self.parameters) or None,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=init,
            fan_in_fan_out=isinstance(getattr(layer, "base_layer", layer), Conv1D),
        )


# Which layers are adapted


def block_modules(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """The modules of a language model's blocks by name, or all of its modules if the blocks are not known.

    The blocks of vision and audio models beside the language model are left out.
    """
    decoder = model.get_decoder()
    others = {
        part
        for module in decoder.modules()
        if isinstance(module, PreTrainedModel) and type(module.config) is not type(decoder.config)
        for part in module.modules()
    }
    language_model = set(decoder.modules()) - others
    modules = [(name, module) for name, module in model.named_modules() if module in language_model]
    blocks = [f"{name}." for name, module in modules if isinstance(module, GradientCheckpointingLayer)]
    return [(name, module) for name, module in modules if name.startswith(tuple(blocks) or "")]


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers in a language model's blocks; never of the head."""
    head = model.get_output_embeddings()
    modules = block_modules(model)
    return [name for name, each in modules if isinstance(each, (torch.nn.Linear, Conv1D)) and each is not head]


def expert_tensors(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that hold the matrices of all experts of a layer, (experts, ..., ...)."""
    return [
        f"{name}.{key}"
        for name, module in block_modules(model)
        if not type(module).__module__.startswith("torch.nn.")  # convolutions
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]


def find_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> tuple[str, ...]:
    """Full names of the linear layers in lora.targets; UserError if a name matches neither a layer nor experts."""
    layers, experts = linear_layers(model), expert_tensors(model)
    names = last_parts(layers) if targets == "auto" else targets
    unknown = [name for name in names if not matching([*layers, *experts], [name])]
    if unknown or not layers:
        existing = ", ".join(last_parts([*layers, *experts])) or "none"
        raise UserError(
            f"lora.targets: no linear layer of this model's blocks is called {', '.join(unknown)}; it has {existing}"
        )
    return matching(layers, names)


def find_parameters(model: PreTrainedModel, settings: LoraSettings) -> tuple[str, ...]:
    """Full names of the tensors of experts in lora.targets; UserError if other settings do not allow them."""
    parameters = () if settings.targets == "auto" else matching(expert_tensors(model), settings.targets)
    wrong = ["lora.dropout=0"] * (settings.dropout > 0) + ["lora.use_dora=false"] * settings.use_dora
    if parameters and wrong:
        names = ", ".join(last_parts(parameters))
        raise UserError(f"lora.targets: {names} hold all experts in one tensor, which needs {' '.join(wrong)}")
    return parameters


def matching(full_names: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    """The full names that end with one of the names."""
    return tuple(name for name in full_names if f".{name}".endswith(tuple(f".{end}" for end in names)))


def weight_name(name: str, layer: "LoraLayer") -> str:
    """The name, without an adapter, of the weight that one of peft's layers adapts; wrappers of experts are nested."""
    return f"{name.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"


def last_parts(layers: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))


# Reading adapters


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter read from a file. Its weights have peft's names, without the prefix; parameters may be ends of names.

    base is the checksum of the frozen weights that it was trained on, or None if another tool wrote the file.
    """

    shape: AdapterShape
    weights: dict[str, Tensor]
    base: str | None

    def state_dict(self) -> dict[str, Any]:
        """The same as in a LoRA run's policy.pt."""
        return {"adapter": asdict(self.shape), "base": self.base, "weights": self.weights}


def read_adapter(folder: str, key: str = "lora.path") -> StoredAdapter:
    """Read an adapter from a folder in peft's format; UserError unless it is plain LoRA of linear layers."""
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
            weights = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}
            base = (file.metadata() or {}).get(BASE)
        parameters = tuple(config.get("target_parameters") or ())
        owners = tuple(f".{parameter}".rpartition(".")[0] for parameter in parameters)
        layers = [name.rpartition(".lora_A.")[0] for name in weights if name.endswith(".lora_A.weight")]
        linear = tuple(name for name in layers if not f".{name.replace('.base_layer', '')}".endswith(owners))
        flags = {name: bool(config.get(name, False)) for name in ("use_rslora", "use_dora")}
        shape = AdapterShape(config["r"], config["lora_alpha"], **flags, targets=linear, parameters=parameters)
    except Exception as error:  # missing or foreign files raise many kinds of errors
        reason = summarize_error(error)
        mitigation = "give the folder of a LoRA adapter in peft's format, such as RUN/LATEST/hf"
        raise UserError(f"{key}={folder}: cannot be read ({reason}); {mitigation}") from None
    init = config.get("init_lora_weights", True)
    extras = [name for name in ("alpha_pattern", "rank_pattern", "modules_to_save") if config.get(name)]
    extras += [f"init_lora_weights={init}"] * (init not in KEEPS_BASE)
    if config.get("peft_type") != "LORA" or extras or not layers:
        raise UserError(f"{key}={folder}: not a plain LoRA adapter ({', '.join(extras) or 'another kind'})")
    return StoredAdapter(shape, weights, base)


def check_shape(settings: LoraSettings, shape: AdapterShape, stored: AdapterShape) -> None:
    """Raise UserError with the settings to add if a run's adapter has another shape than the stored one."""
    wrong = [
        f"lora.{name}={str(value).lower()}"
        for name, value in asdict(stored).items()
        if name not in ("targets", "parameters") and value != getattr(shape, name)
    ]
    adapted = [*stored.targets, *stored.parameters]
    if {*shape.targets, *shape.parameters} != {*adapted}:
        names = last_parts(adapted)
        if {*last_parts([*shape.targets, *shape.parameters])} == {*names}:
            raise UserError(f"lora.path={settings.path}: adapts layers that are not those of this language model")
        wrong.append(f"lora.targets=[{','.join(names)}]")
    if wrong:
        raise UserError(f"lora.path={settings.path}: was made with other settings; add {' '.join(wrong)}")


# Adapters in a model

POLICY = "default"  # peft's name for the trained adapter
REFERENCE = "reference"  # and for its frozen copy


def inject(model: PreTrainedModel, configs: dict[str, "PeftConfig"]) -> "LoraModel":
    """Add float32 adapters to a model in place and activate the last one; return peft's wrapper, which can merge it."""
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
    """Make layers use the adapter of this name, or none if they have no adapter of this name.

    peft's own switches also change requires_grad, which FSDP2 reads only at the first forward pass.
    """
    for layer in layers:
        layer._active_adapter = [name]


def adapted_layers(model: PreTrainedModel) -> dict[str, "LoraLayer"]:
    """peft's layers by the names of the linear layers that they wrap."""
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def adapter_parameters(model: PreTrainedModel, adapter: str) -> dict[str, Parameter]:
    """The parameters of one adapter under peft's names, without the prefix."""
    return adapter_tensors(dict(model.named_parameters()), adapter)


def adapter_tensors(state: Mapping[str, T], adapter: str) -> dict[str, T]:
    """The tensors of one adapter in a model's state_dict, with the names of adapter_parameters."""
    pattern = re.compile(rf"(.*\.lora_[AB])\.{adapter}(\.weight)|(.*\.lora_magnitude_vector)\.{adapter}\.weight")
    matches = ((pattern.fullmatch(name), tensor) for name, tensor in state.items())
    return {"".join(filter(None, match.groups())): tensor for match, tensor in matches if match}


@torch.no_grad()
def copy_weights(parameters: Mapping[str, Parameter], stored: Mapping[str, Tensor], setting: str) -> None:
    """Copy stored weights into an adapter; UserError, with the setting and each tensor that does not fit."""
    check_fit(parameters, stored, setting)
    for name, parameter in parameters.items():
        parameter.copy_(stored[name])


def reference_weights(model: PreTrainedModel) -> dict[str, Any]:
    trained = re.compile(rf"\.lora_\w+\.{POLICY}\b")
    state = model.state_dict()
    frozen = {name: value for name, value in state.items() if not trained.search(name)}
    has_adapter = len(frozen) < len(state)
    return frozen | adapter_scales(model, REFERENCE) if has_adapter else frozen


def adapter_scales(model: PreTrainedModel, adapter: str) -> dict[str, Tensor]:
    """The factor of an adapter's output in each layer that it adapts."""
    layers = {name: layer for name, layer in adapted_layers(model).items() if adapter in layer.scaling}
    return {f"{name}.scaling": torch.tensor(layer.scaling[adapter]) for name, layer in layers.items()}


def adapter_checksum(model: PreTrainedModel, adapter: str) -> str:
    """A checksum of everything that determines what an adapter adds to its base model."""
    return weights_checksum(adapter_parameters(model, adapter) | adapter_scales(model, adapter))


def check_base(stored: str | None, checksum: str, setting: str) -> None:
    """Raise UserError if an adapter is known to have been trained on other weights."""
    if stored not in (None, checksum):
        raise UserError(
            f"{setting}: this adapter was trained on other weights; set model.name_or_path and model.policy_dtype as in"
            " its run, or model.name_or_path=RUN/base if that folder exists"
        )


def stored_config(model: PreTrainedModel, state: dict[str, Any], setting: str) -> "LoraConfig":
    """peft's config of the adapter in a LoRA run's checkpoint; UserError if the model lacks its first layer."""
    try:
        shape = AdapterShape(**state["adapter"])
        return replace(shape, parameters=matching(expert_tensors(model), shape.parameters)).peft_config(model)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{setting}: its adapter cannot be read ({summarize_error(error)})") from None


def merge_adapter(model: PreTrainedModel, state: dict[str, Any], setting: str) -> None:
    """Merge the adapter in a LoRA run's checkpoint into its base model; UserError if this is a different model."""
    if not is_installed("peft"):
        raise UserError(f"{setting}: holds an adapter, which needs the library peft; pip install peft")
    check_base(state["base"], weights_checksum(model.state_dict()), setting)
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]  # by the model itself
    try:
        tuner = inject(model, {POLICY: stored_config(model, state, setting)})
    except ValueError as error:
        raise UserError(f"{setting}: its adapter cannot be read ({summarize_error(error)})") from None
    copy_weights(adapter_parameters(model, POLICY), state["weights"], setting)
    tuner.merge_and_unload()
    model.requires_grad_(True)
    for parameter in frozen:
        parameter.requires_grad_(False)
