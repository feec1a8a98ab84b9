"""The policy's weights in checkpoints and the export: all weights, or a LoRA adapter."""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from dpo.model import lora
from dpo.model.archives import load_weights, weights_checksum
from dpo.model.reference_weights import ReferenceWeights
from dpo.runs.export import (
    drop_code,
    export_dtype,
    export_model,
    in_dtype,
    save_card,
    save_generation_config,
    save_model,
    save_tokenizer,
)
from dpo.settings.schema import LoraSettings, ModelSettings, Settings
from dpo.system.console import log_message
from dpo.system.files import atomic_dir, naming_file, write_manifest

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.lora import LoraLayer


class AllWeights:
    """Checkpoints and the export hold all weights of the model."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def tensors(self) -> dict[str, Tensor]:
        """The model's tensors in a checkpoint, by name; shards if the model is sharded."""
        return self.model.state_dict(keep_vars=True)

    def tensors_to_export(self) -> dict[str, Tensor]:
        """The model's tensors that `export` reads, under the names of its state_dict."""
        return self.model.state_dict(keep_vars=True)

    def state_dict(self, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """The policy's state in a checkpoint, with the whole `tensors` instead of a sharded model's."""
        return self.model.state_dict() if tensors is None else tensors

    def load_state_dict(self, state: dict[str, Any], setting: str) -> None:
        """Load a checkpoint's state; UserError that names the setting if it does not fit."""
        load_weights(self.model, state, setting)

    def export(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        card: str,
        weights: dict[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write RUN/step-N/hf, for from_pretrained, unless it exists; RunError if it cannot be written.

        card is the text of README.md. weights are whole tensors instead of a sharded model's tensors_to_export,
        which are replaced by converted ones. dtype: of the exported model; None leaves each tensor as it is.
        """
        export_model(folder, self.model, tokenizer, weights, card, dtype)


# LoRA

SMALL_LR = 1e-5  # a smaller lr prints a warning


@dataclass(frozen=True)
class FrozenAdapter:
    """An adapter beside the policy's, as the reference: its state as in a policy.pt, and the setting that names it."""

    state: dict[str, Any]
    setting: str
    config: "PeftConfig"


def add_adapter(
    model: PreTrainedModel, run_settings: Settings, reference: ReferenceWeights | None = None
) -> "AdapterWeights":
    """Freeze a model and add an adapter: a new one with the run's seed, or the one in lora.path with a frozen copy.

    A reference of its own takes the place of that copy (see find_frozen). UserError if the settings do not fit the
    model or the adapter of lora.path.
    """
    settings = run_settings.lora
    assert settings is not None
    torch.manual_seed(run_settings.seed)
    base = weights_checksum(model.state_dict())
    targets, parameters = lora.find_targets(model, settings.targets), lora.find_parameters(model, settings)
    shape = lora.AdapterShape(settings.r, settings.alpha, settings.use_rslora, settings.use_dora, targets, parameters)
    stored = read_path(model, settings, shape, base)
    if reference is None:
        state = None if stored is None else stored.state_dict()
        frozen = find_frozen(model, shape, state, f"lora.path={settings.path}")
    else:
        is_of_base = reference.is_adapter_of(base, run_settings.model)
        frozen = find_frozen(model, shape, reference.state if is_of_base else None, reference.setting)
    configs = {} if frozen is None else {lora.REFERENCE: frozen.config}
    init: Literal["gaussian"] | bool = True if settings.init == "kaiming" else "gaussian"
    configs[lora.POLICY] = shape.peft_config(model, settings.dropout, init)
    lora.inject(model, configs)
    model.eval()  # an adapter's dropout is off until training begins
    if stored is not None:
        lora.copy_weights(lora.adapter_parameters(model, lora.POLICY), stored.weights, f"lora.path={settings.path}")
    if frozen is not None:
        lora.copy_weights(lora.adapter_parameters(model, lora.REFERENCE), frozen.state["weights"], frozen.setting)
    model.requires_grad_(False)
    for parameter in lora.adapter_parameters(model, lora.POLICY).values():
        parameter.requires_grad_(True)
    uses_dora = settings.use_dora or (frozen is not None and frozen.state["adapter"]["use_dora"])
    for layer in lora.adapted_layers(model).values():
        # Autocast casts the inputs of matrix products, but DoRA and bfloat16 weights need float32 inputs for the
        # adapter.
        layer.cast_input_dtype_enabled = uses_dora or model.dtype != torch.float32
    log_adapter(model, shape, run_settings.lr)
    path = own = None
    if frozen is not None and reference is not None:
        own = lora.adapter_checksum(model, lora.REFERENCE)
    elif frozen is not None:
        path = weights_checksum(lora.adapter_parameters(model, lora.REFERENCE))
    dtype = export_dtype(run_settings, torch.float32)
    return AdapterWeights(model, shape, base, path, base_name(run_settings.model), settings.export_merged, dtype, own)


def read_path(
    model: PreTrainedModel, settings: LoraSettings, shape: lora.AdapterShape, base: str
) -> lora.StoredAdapter | None:
    """Read the adapter in lora.path, if it is set; UserError if its shape or its base is not the run's."""
    if settings.path is None:
        return None
    stored = lora.read_adapter(settings.path)
    full_names = lora.matching(lora.expert_tensors(model), stored.shape.parameters)
    lora.check_shape(settings, shape, replace(stored.shape, parameters=full_names))
    lora.check_base(stored.base, base, f"lora.path={settings.path}")
    return stored


def find_frozen(
    model: PreTrainedModel, shape: lora.AdapterShape, state: dict[str, Any] | None, setting: str
) -> FrozenAdapter | None:
    """The adapter of a state, to be added frozen; None if there is none, or if it must be a second model.

    peft does not support two adapters of different experts in one model.
    """
    if state is None:
        return None
    config = lora.stored_config(model, state, setting)
    has_other_experts = config.target_parameters and {*config.target_parameters} != {*shape.parameters}
    return None if shape.parameters and has_other_experts else FrozenAdapter(state, setting, config)


def log_adapter(model: PreTrainedModel, shape: lora.AdapterShape, lr: float) -> None:
    """Log what is adapted and what stays frozen, with advice on a low learning rate."""
    n = sum(parameter.numel() for parameter in lora.adapter_parameters(model, lora.POLICY).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    adapted = [*shape.targets, *shape.parameters]
    log_message(
        f"LoRA: r={shape.r}, alpha={shape.alpha}, {len(adapted)} layers ({', '.join(lora.last_parts(adapted))});"
        f" {n:,} of {total:,} parameters are trained."
    )
    experts = lora.expert_tensors(model)
    if experts and not shape.parameters:
        names = ",".join(lora.last_parts([*shape.targets, *experts]))
        frozen = " and ".join(lora.last_parts(experts))
        log_message(f"LoRA: the experts ({frozen}) stay frozen; lora.targets=[{names}] adapts them as well.")
    if lr < SMALL_LR:
        advice = "an adapter usually needs 10 to 100 times the learning rate of all weights; try lr=5e-5"
        log_message(f"LoRA: lr={lr:g} may be too low: {advice}.")


def base_name(settings: ModelSettings) -> str | None:
    """The name or path of a run's frozen weights for from_pretrained; None if they are not stored anywhere."""
    if settings.archive is not None or settings.from_scratch or settings.resize_embeddings:
        return None
    folder = Path(settings.name_or_path)
    return str(folder.resolve()) if folder.is_dir() else settings.name_or_path


@dataclass(frozen=True)
class AdapterWeights:
    """Checkpoints hold only the adapter of a frozen model; the export has it in peft's format."""

    model: PreTrainedModel
    shape: lora.AdapterShape
    base: str  # checksum of the frozen weights
    path: str | None  # checksum of the adapter in lora.path, if a frozen copy of it is the reference
    base_name: str | None  # name or path of the frozen weights for from_pretrained
    export_merged: bool
    export_dtype: torch.dtype = torch.float32  # of the adapter
    reference: str | None = None  # checksum of the adapter in `reference`, if that is the reference

    @cached_property
    def layers(self) -> dict[str, "LoraLayer"]:
        """peft's layers by the names of the linear layers that they wrap."""
        return lora.adapted_layers(self.model)

    def fingerprints(self) -> dict[str, str]:
        """Checksums of the frozen weights, which must not change in a resumed run."""
        checksums = {"the base model's weights": self.base}
        return checksums if self.path is None else checksums | {"the adapter of lora.path": self.path}

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Compute without the adapter, or with the frozen adapter of `reference` or lora.path."""
        lora.use_adapter(self.layers.values(), lora.REFERENCE)
        try:
            yield
        finally:
            lora.use_adapter(self.layers.values(), lora.POLICY)

    def describe_reference(self) -> str:
        if self.path is not None:
            return "the base model with a frozen copy of the adapter of lora.path"
        if self.reference is not None:
            return "the base model with the frozen adapter of `reference`"
        return "the base model, which is the policy with its adapter off"

    def tensors(self) -> dict[str, Tensor]:
        trained = lora.adapter_parameters(self.model, lora.POLICY)
        return {name: parameter.detach() for name, parameter in trained.items()}

    def tensors_to_export(self) -> dict[str, Tensor]:
        """The weights of the adapter, and those of the model if they are exported as well."""
        state = self.model.state_dict(keep_vars=True)
        if self.base_name is None or self.export_merged:
            return state
        return {name: value for name, value in state.items() if f".{lora.POLICY}." in name}

    def state_dict(self, tensors: dict[str, Tensor] | None = None) -> dict[str, Any]:
        """The adapter's shape and weights, and the checksum of its frozen weights."""
        weights = self.tensors() if tensors is None else tensors
        return {"adapter": asdict(self.shape), "base": self.base, "weights": weights}

    def load_state_dict(self, state: dict[str, Any], setting: str) -> None:
        lora.copy_weights(lora.adapter_parameters(self.model, lora.POLICY), state["weights"], setting)

    def export(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        card: str,
        weights: dict[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Write RUN/step-N/hf in peft's format, with the merged model in hf/merged if export_merged is set.

        dtype: of the merged model. Frozen weights that exist nowhere else for from_pretrained, such as those of
        model.archive, go to RUN/base as they are, since the adapter fits no others.
        """
        state = weights or self.model.state_dict()
        base_name = self.base_name
        if base_name is None:
            base_folder = folder.parent.parent / "base"
            base_name = str(base_folder)
            export_model(base_folder, self.model, tokenizer, base_weights(state))

        def write(staging: Path) -> None:
            config = self.shape.peft_config(self.model).to_dict() | {"base_model_name_or_path": base_name}
            config |= {"inference_mode": True, "target_modules": self.short_targets()}
            tensors = lora.adapter_tensors(state, lora.POLICY)
            adapter = {f"{lora.PREFIX}{n}": in_dtype(n, value, self.export_dtype) for n, value in tensors.items()}
            save_file(adapter, staging / "adapter_model.safetensors", metadata={"format": "pt", lora.BASE: self.base})
            with naming_file(staging / "adapter_config.json"):
                (staging / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            save_tokenizer(staging, tokenizer)
            save_generation_config(staging, self.model)
            drop_code(staging)
            save_card(staging, card)
            if self.export_merged:
                save_model(staging / "merged", self.model, tokenizer, self.merged_weights(state), dtype)
                write_manifest(staging / "merged", {})

        if not folder.exists():
            atomic_dir(folder, write)

    def short_targets(self) -> list[str]:
        """The last parts of the adapted layers' names, or full names if other layers share a last part."""
        linear = (name for name, module in self.model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D)))
        names = {name.removesuffix(".base_layer") for name in linear if ".lora_" not in name}
        last_parts = lora.last_parts(self.shape.targets)
        alike = {name for name in names if name.rpartition(".")[2] in last_parts}
        return last_parts if alike == set(self.shape.targets) else list(self.shape.targets)

    def merged_weights(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of the model with the adapter merged into it."""
        merged = base_weights(state)
        for name, adapted in self.layers.items():
            layer: Any = copy.deepcopy(adapted)  # a copy, since unmerging would round the weight
            whole = {key.removeprefix(f"{name}."): state[key].clone() for key in state if key.startswith(f"{name}.")}
            layer.load_state_dict(whole, assign=True)
            layer.merge(adapter_names=[lora.POLICY])
            weight = layer.get_base_layer().get_parameter(getattr(layer, "parameter_name", "weight"))
            merged[lora.weight_name(name, layer)] = weight.detach().cpu()
        return merged


def base_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The frozen weights of an adapted model, under their names without an adapter."""
    return {name.replace(".base_layer", ""): value for name, value in state.items() if ".lora_" not in name}


TrainedWeights = AllWeights | AdapterWeights
