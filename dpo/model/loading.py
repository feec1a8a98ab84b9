"""Loading the tokenizer and the policy, copying the reference, and preparing a model for training."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo.model.archives import is_adapter, load_archive, load_weights
from dpo.model.lora import merge_adapter
from dpo.model.pretrained import auto_class, fetch, tensor_names, unexpected_tensors
from dpo.model.refusals import check_causal, check_deterministic, disable_randomness, quantization_method
from dpo.settings.constraints import is_template
from dpo.settings.schema import ModelSettings, Settings
from dpo.system.console import log_message
from dpo.system.errors import UserError

M = TypeVar("M", bound=torch.nn.Module)

# How often a layer is compiled. After torch's default of 8, training could run uncompiled without an error: kinds of
# layers, policy and reference, training and evaluation, and numbers of responses are compiled separately.
COMPILATIONS = 64


def load_model_config(
    settings: ModelSettings, chat_template: str | None = None
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Load the model's config, with all randomness off, and the tokenizer, possibly with another chat template."""
    name = settings.name_or_path
    tokenizer_name = settings.tokenizer_name_or_path or name
    load_config = partial(AutoConfig.from_pretrained, name, trust_remote_code=False)
    config = fetch("model.name_or_path", name, load_config)
    tokenizer = fetch("model.tokenizer_name_or_path", tokenizer_name, partial(load_tokenizer, tokenizer_name))
    disable_randomness(config)
    if chat_template is not None:
        is_text = is_template(chat_template)
        tokenizer.chat_template = chat_template if is_text else Path(chat_template).read_text(encoding="utf-8")
    return config, tokenizer


def has_tokenizer(folder: Path) -> bool:
    files = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "*.spm", "tekken*")
    return any(any(folder.glob(pattern)) for pattern in files)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    if Path(name).is_dir() and not has_tokenizer(Path(name)):
        raise UserError("holds no tokenizer; set model.tokenizer_name_or_path to a folder or Hub name that does")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return tokenizer


def load_policy(
    settings: Settings,
    config: PreTrainedConfig,
    device: torch.device,
    n_embeddings: int = 0,
    key: str = "model.name_or_path",
) -> PreTrainedModel:
    """Load the policy, with dropout off and at least n_embeddings embeddings.

    UserError, with the key of the setting that names the model, if a tensor of the model is missing or does not fit.
    """
    if settings.model.from_scratch:
        torch.manual_seed(settings.seed)
        dtype = getattr(torch, settings.model.policy_dtype)
        policy: PreTrainedModel = auto_class(config).from_config(config, dtype=dtype)
    else:
        policy = load_pretrained(settings, config, device, key)
    keep_weights_unpacked(policy)
    resize_embeddings(policy, n_embeddings)
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if settings.model.archive:
        load_state(policy, load_archive(settings.model.archive), f"model.archive={settings.model.archive}")
    if settings.activation_checkpointing and not policy.supports_gradient_checkpointing:
        raise UserError("activation_checkpointing=true: this kind of model does not support it; set it to false")
    check_deterministic(policy, key)
    check_causal(policy, key)
    return policy if is_quantized(policy) else policy.to(device)  # type: ignore[arg-type]  # a decorator hides its arguments


def load_state(model: PreTrainedModel, state: dict[str, Any], setting: str) -> None:
    """Load the state of a policy.pt: all weights, or an adapter, which is merged; UserError if it does not fit."""
    if is_adapter(state):
        merge_adapter(model, state, setting)
    else:
        load_weights(model, state, setting)


def load_pretrained(settings: Settings, config: PreTrainedConfig, device: torch.device, key: str) -> PreTrainedModel:
    name, dtype = settings.model.name_or_path, getattr(torch, settings.model.policy_dtype)
    load: Callable[[], tuple[PreTrainedModel, dict[str, Any]]] = partial(  # type: ignore[assignment]  # by its arguments
        auto_class(config).from_pretrained,
        name,
        config=config,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # lists them in the info, by name
        trust_remote_code=False,
        **quantization(settings, config, device),
    )
    stored = fetch(key, name, partial(tensor_names, name))
    model, info = fetch(key, name, load)
    info["unexpected_keys"] = unexpected_tensors(model, f"{key}={name}", stored, info["unexpected_keys"])
    wrong = [f"{kind.removesuffix('_keys')} {sorted(map(str, info[kind]))}" for kind in info if info[kind]]
    if wrong:
        raise UserError(f"{key}={name}: its weights do not fit its config: {'; '.join(wrong)}")
    set_quantized_products(model, torch.float32, outliers=False)
    if is_quantized(model):
        for parameter in model.parameters():  # transformers keeps the stored dtype of those that are not quantized
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    return model


# Quantized weights


def is_quantized(model: PreTrainedModel) -> bool:
    """Whether from_pretrained has quantized weights, or read quantized ones; it has placed them on their device."""
    return bool(getattr(model, "is_quantized", False))


def quantization(settings: Settings, config: PreTrainedConfig, device: torch.device) -> dict[str, Any]:
    """The arguments of from_pretrained for quantized weights: of a checkpoint, or quantized now for lora.quantize=nf4.

    NF4 with double quantization, arXiv 2305.14314.
    """
    if quantization_method(config) is not None:
        return {"device_map": {"": device}}
    if settings.lora is None or settings.lora.quantize is None:
        return {}
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4), "device_map": {"": device}}


def set_quantized_products(model: PreTrainedModel, dtype: torch.dtype, outliers: bool = True) -> None:
    """Choose how products of quantized weights are computed: those of 4-bit weights in a dtype.

    Those of 8-bit weights are computed in integers. With outliers, bitsandbytes computes features with large
    activations in 16 bits instead (LLM.int8, arXiv 2208.07339). Which features these are depends on all tokens of a
    forward pass, so checks that compare two passes leave them out.
    """
    if not is_quantized(model):
        return
    from bitsandbytes.nn.modules import Linear4bit, Linear8bitLt

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
        elif isinstance(module, Linear8bitLt):
            module.state.threshold = model.config.quantization_config.llm_int8_threshold if outliers else 0.0


def keep_weights_unpacked(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights for the bfloat16 instructions of a CPU.

    It packs a layer's weight in the first forward pass without gradients. That rounds the weight's scales to bfloat16,
    and the kernel for packed weights has no backward pass: no gradient reaches earlier layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain attribute


@torch.no_grad()
def resize_embeddings(model: PreTrainedModel, n: int) -> None:
    """Give a model at least n embeddings; new rows, of the output head as well, are the mean of the others."""
    n_old = model.get_input_embeddings().get_parameter("weight").shape[0]
    if n <= n_old:
        return
    model.resize_token_embeddings(n, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in () if module is None else module.parameters():
            parameter[n_old:] = parameter[:n_old].mean(0)
    log_message(f"model.resize_embeddings=true: ids {n_old:,} to {n - 1:,} get embeddings, the mean of the others.")


def copy_reference(policy: M, dtype: str | None, clone: Callable[[M], M] = copy.deepcopy) -> M:
    """Copy the policy before training, with frozen parameters in a dtype (None: the policy's)."""
    return freeze(clone(policy), dtype)


def freeze(reference: M, dtype: str | None) -> M:
    """Freeze a reference's parameters, in a dtype (None: as they are)."""
    reference.eval().requires_grad_(False)
    if dtype is not None:
        for parameter in reference.parameters():  # buffers such as rotary frequencies stay in float32
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return reference


def compile_layers(model: PreTrainedModel, on: bool = True) -> None:
    """Compile a model's layers at their first call, once for all layers and row lengths; or no longer do.

    Parameters keep their names. UserError if the model is not made of transformers' layers.
    """
    layers = layers_to_compile(model)
    if not layers:
        raise UserError("compile=true: this kind of model has no layers that can be compiled; set compile=false")
    torch._dynamo.config.recompile_limit = COMPILATIONS
    for layer in layers:
        if on:
            layer.compile(dynamic=True)
        else:
            layer._compiled_call_impl = None  # torch has no way to undo it


def layers_to_compile(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def recompute_activations(model: PreTrainedModel, on: bool = True) -> None:
    """Turn activation checkpointing on or off."""
    verb = "enable" if on else "disable"
    newer = getattr(model, f"activation_checkpointing_{verb}", None)  # its name in newer versions of transformers
    (newer or getattr(model, f"gradient_checkpointing_{verb}"))()
