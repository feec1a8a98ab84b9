"""LoRA: low-rank adapters of a frozen model, computed by peft; how they are added, saved, merged and switched off.

peft is imported where it is called: that takes seconds, and training all weights does without it.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from dpo.archives import check_fit, weights_checksum
from dpo.checkpoints import atomic_dir, write_manifest
from dpo.console import log_message
from dpo.errors import UserError, naming_file, summarize_error
from dpo.export import export_model, save_model, save_tokenizer
from dpo.settings import LoraSettings, ModelSettings, Settings

if TYPE_CHECKING:
    from peft import LoraConfig, LoraModel
    from peft.tuners.lora import LoraLayer

POLICY, REFERENCE = "default", "reference"  # what peft's layers call the adapter that trains, and its frozen copy
PREFIX = "base_model.model."  # of the names in peft's files
SMALL_LR = 1e-5  # below it, advice is given
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")  # peft's ways to begin that leave the model's weights alone


@dataclass(frozen=True)
class AdapterShape:
    """What decides how an adapter's matrices are used; targets are the full names of the adapted linear layers."""

    r: int
    alpha: int
    use_rslora: bool
    use_dora: bool
    targets: tuple[str, ...]

    def peft_config(
        self, model: PreTrainedModel, dropout: float = 0.0, init: Literal["gaussian"] | bool = True
    ) -> "LoraConfig":
        """Return peft's config of such an adapter of a model."""
        from peft import LoraConfig

        layer = model.get_submodule(self.targets[0])
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.r,
            lora_alpha=self.alpha,
            lora_dropout=dropout,
            target_modules=list(self.targets),
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init_lora_weights=init,
            fan_in_fan_out=isinstance(getattr(layer, "base_layer", layer), Conv1D),
        )


# Which layers are adapted


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the linear layers in a model's blocks; where no blocks are known, of all but its head."""
    blocks = [f"{name}." for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head and name.startswith(tuple(blocks) or "")
    ]


def find_targets(model: PreTrainedModel, targets: str | Sequence[str]) -> tuple[str, ...]:
    """Return the full names of the layers that lora.targets means; UserError if one of its names fits no layer."""
    layers = linear_layers(model)
    names = last_parts(layers) if targets == "auto" else targets
    unknown = [name for name in names if not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if unknown or not layers:
        found = ", ".join(last_parts(layers)) or "none"
        raise UserError(
            f"lora.targets: no linear layer of this model's blocks is called {', '.join(unknown)}; there are {found}"
        )
    return tuple(layer for layer in layers if f".{layer}".endswith(tuple(f".{name}" for name in names)))


def last_parts(layers: Sequence[str]) -> list[str]:
    """Return the last part of each layer's name, each once."""
    return list(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))


# Reading adapters


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter read from a file: its shape, and its weights under the names of peft's files without their prefix."""

    shape: AdapterShape
    weights: dict[str, Tensor]


def read_adapter(folder: str) -> StoredAdapter:
    """Read the adapter in a folder of peft's format; UserError unless it is LoRA of linear layers alone."""
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        weights = load_file(Path(folder) / "adapter_model.safetensors")
        weights = {name.removeprefix(PREFIX): value for name, value in weights.items()}
        layers = [name.rpartition(".lora_A.")[0] for name in weights if name.endswith(".lora_A.weight")]
        flags = {name: bool(config.get(name, False)) for name in ("use_rslora", "use_dora")}
        shape = AdapterShape(config["r"], config["lora_alpha"], **flags, targets=tuple(layers))
    except Exception as error:  # missing or foreign files, which raise many kinds of errors
        reason = summarize_error(error)
        remedy = "give the folder of a LoRA adapter in peft's format, as RUN/LATEST/hf"
        raise UserError(f"lora.path={folder}: cannot be read ({reason}); {remedy}") from None
    init = config.get("init_lora_weights", True)
    extras = [name for name in ("alpha_pattern", "rank_pattern", "modules_to_save") if config.get(name)]
    extras += [f"init_lora_weights={init}"] * (init not in KEEPS_BASE)
    if config.get("peft_type") != "LORA" or extras or not layers:
        raise UserError(f"lora.path={folder}: not a plain LoRA adapter ({', '.join(extras) or 'another kind'})")
    return StoredAdapter(shape, weights)


def check_shape(settings: LoraSettings, own: AdapterShape, stored: AdapterShape) -> None:
    """Raise UserError with the settings to add if those of a run are not those that an adapter was made with."""
    wrong = [
        f"lora.{name}={str(value).lower()}"
        for name, value in asdict(stored).items()
        if name != "targets" and value != getattr(own, name)
    ]
    if set(own.targets) != set(stored.targets):
        wrong.append(f"lora.targets=[{','.join(last_parts(stored.targets))}]")
    if wrong:
        raise UserError(f"lora.path={settings.path}: was made with other settings; add {' '.join(wrong)}")


def shape_of(settings: LoraSettings, targets: tuple[str, ...]) -> AdapterShape:
    """Return the shape of a new adapter."""
    return AdapterShape(settings.r, settings.alpha, settings.use_rslora, settings.use_dora, targets)


# The adapter of a run


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
    model.eval()
    configs = {} if stored is None else {REFERENCE: shape.peft_config(model)}
    configs[POLICY] = shape.peft_config(model, settings.dropout, True if settings.init == "kaiming" else "gaussian")
    inject(model, configs)
    for name in configs if stored is not None else ():
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
    return AdapterWeights(model, shape, base, base_name(run_settings.model), settings.export_merged)


def base_name(settings: ModelSettings) -> str | None:
    """Return what from_pretrained opens to get a run's frozen weights, or None if nothing that exists holds them."""
    if settings.archive is not None or settings.from_scratch:
        return None
    folder = Path(settings.name_or_path)
    return str(folder.resolve()) if folder.is_dir() else settings.name_or_path


def inject(model: PreTrainedModel, configs: dict[str, "LoraConfig"]) -> "LoraModel":
    """Put adapters into a model in place, in float32, the last of them in use; return what peft manages them with."""
    from peft import LoraModel

    first, *others = configs
    tuner = LoraModel(model, configs, first)
    for name in others:
        tuner.inject_adapter(model, name)
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
    found = {}
    for name, parameter in model.named_parameters():
        if match := re.fullmatch(
            rf"(.*\.lora_[AB])\.{adapter}(\.weight)|(.*\.lora_\w+_vector)\.{adapter}\.weight", name
        ):
            found["".join(filter(None, match.groups()))] = parameter
    return found


@torch.no_grad()
def copy_weights(own: Mapping[str, Parameter], stored: Mapping[str, Tensor], setting: str) -> None:
    """Copy stored weights into an adapter; UserError that names the setting and each tensor that does not fit."""
    check_fit(own, stored, setting)
    for name, parameter in own.items():
        parameter.copy_(stored[name])


class AdapterWeights:
    """The adapter of a model, which alone is trained: checkpoints hold it, and the export has it in peft's format."""

    def __init__(
        self, model: PreTrainedModel, shape: AdapterShape, base: str, base_name: str | None, export_merged: bool
    ):
        """Take an adapted model, the checksum of its frozen weights, and what from_pretrained opens to get them."""
        self.model, self.shape, self.base = model, shape, base
        self.base_name, self.export_merged = base_name, export_merged
        self.layers = adapted_layers(model)

    def identity(self) -> dict[str, str]:
        """Return checksums of the frozen weights, which a resumed run must find again."""
        found = {"the base model's weights": self.base}
        copy_of_path = adapter_parameters(self.model, REFERENCE)
        return found | ({"the adapter of lora.path": weights_checksum(copy_of_path)} if copy_of_path else {})

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
        if adapter_parameters(self.model, REFERENCE):
            return "the base model with a frozen copy of the adapter of lora.path"
        return "the base model, which is the policy with its adapter off"

    def state_dict(self) -> dict[str, Any]:
        """Return the adapter's shape and weights, and the checksum of the frozen weights that it belongs to."""
        weights = {name: parameter.detach() for name, parameter in adapter_parameters(self.model, POLICY).items()}
        return {"adapter": asdict(self.shape), "base": self.base, "weights": weights}

    def load_state_dict(self, state: dict[str, Any], setting: str) -> None:
        """Copy the weights of a checkpoint; UserError that names the setting and each tensor that does not fit."""
        copy_weights(adapter_parameters(self.model, POLICY), state["weights"], setting)

    def export(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write RUN/step-N/hf in peft's format, with the merged model in hf/merged if that is asked for.

        Frozen weights that from_pretrained finds nowhere else, as those of model.archive, go to RUN/base.
        """
        base_name = self.base_name
        if base_name is None:
            base_folder = folder.parent.parent / "base"
            base_name = str(base_folder)
            export_model(base_folder, self.model, tokenizer, self.base_weights())

        def write(staging: Path) -> None:
            config = self.shape.peft_config(self.model).to_dict() | {"base_model_name_or_path": base_name}
            config |= {"inference_mode": True, "target_modules": self.short_targets()}
            weights = {f"{PREFIX}{name}": value for name, value in self.state_dict()["weights"].items()}
            save_file(weights, staging / "adapter_model.safetensors", metadata={"format": "pt"})
            with naming_file(staging / "adapter_config.json"):
                (staging / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            save_tokenizer(staging, tokenizer)
            if self.export_merged:
                save_model(staging / "merged", self.model, tokenizer, self.merged_weights())
                write_manifest(staging / "merged")

        if not folder.exists():
            atomic_dir(folder, write)

    def short_targets(self) -> list[str]:
        """Return the last parts of the adapted layers' names, or whole names where other layers share a last part."""
        linear = (name for name, module in self.model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
        names = {name.removesuffix(".base_layer") for name in linear if ".lora_" not in name}
        parts = last_parts(self.shape.targets)
        alike = {name for name in names if name.rpartition(".")[2] in parts}
        return parts if alike == set(self.shape.targets) else list(self.shape.targets)

    def base_weights(self) -> dict[str, Tensor]:
        """Return the frozen weights under the names that they have without an adapter."""
        state = self.model.state_dict()
        return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}

    def merged_weights(self) -> dict[str, Tensor]:
        """Return the weights of the model that computes what base and adapter compute together."""
        merged = self.base_weights()
        for name, layer in self.layers.items():
            layer = copy.deepcopy(layer)  # one at a time; taking the adapter out of a weight again would round it
            layer.merge(adapter_names=[POLICY])
            merged[f"{name}.weight"] = layer.get_base_layer().weight.detach()
        return merged


def reference_weights(model: PreTrainedModel) -> dict[str, Any]:
    """Return all weights of a model but those of the adapter that trains."""
    return {
        name: value for name, value in model.state_dict().items() if not re.search(rf"\.lora_\w+\.{POLICY}\b", name)
    }


def merge_adapter(model: PreTrainedModel, state: dict[str, Any], setting: str) -> None:
    """Merge the adapter in a LoRA run's checkpoint into the model that it was trained on; UserError for another one."""
    if state["base"] != weights_checksum(model.state_dict()):
        raise UserError(
            f"{setting}: this adapter was trained on other weights; give the model.name_or_path and model.policy_dtype"
            " of its run, or model.name_or_path=RUN/base if that run has this folder"
        )
    shape = AdapterShape(**state["adapter"])
    tuner = inject(model, {POLICY: shape.peft_config(model)})
    copy_weights(adapter_parameters(model, POLICY), state["weights"], setting)
    tuner.merge_and_unload()
    model.requires_grad_(True)
