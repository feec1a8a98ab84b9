"""Loading the tokenizer and the policy, copying the reference, and preparing a model for training."""

import copy
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from dpo.data.examples import special_token_problems
from dpo.model.archives import DROPPABLE, is_adapter, load_archive, load_weights
from dpo.model.lora import find_targets, merge_adapter
from dpo.settings.constraints import is_template
from dpo.settings.schema import ModelSettings, Settings
from dpo.system.console import log_message
from dpo.system.errors import UserError, is_out_of_memory, summarize_error
from dpo.system.network import is_reachable

T = TypeVar("T")
M = TypeVar("M", bound=torch.nn.Module)


def skip_unreachable_hub(names: Mapping[str, bool]) -> None:
    """Use only the hub's cache, without minutes of retries, if the hub is needed but cannot be reached.

    names maps each model or data set to whether it may come from the hub.
    """
    from huggingface_hub import constants

    needed = [name for name, remote in names.items() if remote and not os.path.isdir(name)]
    if needed and not constants.HF_HUB_OFFLINE and not is_reachable(constants.ENDPOINT):
        log_message("The hub cannot be reached: using only files on this machine.")
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later


def fetch(what: str, name: str, load: Callable[[], T]) -> T:
    """Call load; if it fails, UserError that names what could not be loaded."""
    try:
        return load()
    except Exception as error:  # a corrupt or foreign folder makes transformers raise nearly anything
        if is_out_of_memory(error):
            raise
        advice = "give the path of a local folder, or try model=tiny, which needs no download"
        raise UserError(f"{what}={name}: cannot be loaded ({summarize_error(error)}); {advice}") from None


def load_model_config(
    settings: ModelSettings, chat_template: str | None = None
) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Load the model's config, with all randomness off, and the tokenizer, possibly with another chat template."""
    name = settings.name_or_path
    tokenizer_name = settings.tokenizer_name_or_path or name
    load_config = partial(AutoConfig.from_pretrained, name, trust_remote_code=False)
    load_tokenizer = partial(AutoTokenizer.from_pretrained, tokenizer_name, trust_remote_code=False)
    config = fetch("model.name_or_path", name, load_config)
    tokenizer = fetch("model.tokenizer_name_or_path", tokenizer_name, load_tokenizer)
    disable_randomness(config)
    if chat_template is not None:
        is_text = is_template(chat_template)
        tokenizer.chat_template = chat_template if is_text else Path(chat_template).read_text(encoding="utf-8")
    return config, tokenizer


def model_problems(
    settings: Settings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> list[str]:
    """Check that settings, model, tokenizer and device fit together; one line per problem."""
    problems = []
    if settings.lora is not None and settings.lora.quantize and device.type == "mps":
        problems.append(f"lora.quantize={settings.lora.quantize}: has no kernels for MPS; set device=cpu")
    text_config = config.get_text_config()
    positions = max_positions(text_config)
    if positions and settings.max_length > positions:
        name = settings.model.name_or_path
        problems.append(f"max_length={settings.max_length}: {name} has {positions} positions; lower it to {positions}")
    if problem := rope_problem(config, settings.max_length):
        problems.append(problem)
    if settings.lora is not None and (problem := target_problem(config, settings.lora.targets)):
        problems.append(problem)
    return problems + special_token_problems(tokenizer, text_config.vocab_size, settings.model.add_bos)


def target_problem(config: PreTrainedConfig, targets: str | list[str]) -> str | None:
    """Check, without weights, that a model of this config has the layers in lora.targets."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    try:
        find_targets(model, targets)
    except UserError as error:
        return str(error)
    return None


def max_positions(config: PreTrainedConfig) -> int | None:
    """The number of positions of a model, or None if there is no limit."""
    values = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((value for value in values if isinstance(value, int)), None)


def load_policy(settings: Settings, config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """Load the policy with dropout off; UserError if a tensor of the model is missing or does not fit."""
    if settings.model.from_scratch:
        torch.manual_seed(settings.seed)
        dtype = getattr(torch, settings.model.policy_dtype)
        policy: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        policy = load_pretrained(settings, config, device)
    keep_weights_unpacked(policy)
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if settings.model.archive:
        state = load_archive(settings.model.archive)
        setting = f"model.archive={settings.model.archive}"
        if is_adapter(state):
            merge_adapter(policy, state, setting)
        else:
            load_weights(policy, state, setting)
    if settings.activation_checkpointing and not policy.supports_gradient_checkpointing:
        raise UserError("activation_checkpointing=true: this kind of model does not support it; set it to false")
    check_deterministic(policy)
    check_causal(policy)
    is_placed = settings.lora is not None and settings.lora.quantize is not None
    return policy if is_placed else policy.to(device)  # type: ignore[arg-type]  # a decorator hides its arguments


def load_pretrained(settings: Settings, config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    name = settings.model.name_or_path
    load: Callable[[], tuple[PreTrainedModel, dict[str, Any]]] = partial(  # type: ignore[assignment]  # by its arguments
        AutoModelForCausalLM.from_pretrained,
        name,
        config=config,
        dtype=getattr(torch, settings.model.policy_dtype),
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # lists them in the info, by name
        trust_remote_code=False,
        **quantization(settings, device),
    )
    model, info = fetch("model.name_or_path", name, load)
    info["unexpected_keys"] = unexpected_tensors(model, name, info["unexpected_keys"])
    wrong = [f"{kind.removesuffix('_keys')} {sorted(map(str, info[kind]))}" for kind in info if info[kind]]
    if wrong:
        raise UserError(f"model.name_or_path={name}: its weights do not fit its config: {'; '.join(wrong)}")
    return model


def quantization(settings: Settings, device: torch.device) -> dict[str, Any]:
    """The arguments that make from_pretrained quantize weights while loading, for lora.quantize=nf4.

    NF4 with double quantization, arXiv 2305.14314. Products are in float32 until `set_quantized_dtype` is called.
    """
    if settings.lora is None or settings.lora.quantize is None:
        return {}
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **nf4), "device_map": {"": device}}


def set_quantized_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype = dtype  # type: ignore[assignment]  # a plain attribute


def keep_weights_unpacked(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from packing 4-bit weights for the bfloat16 instructions of a CPU.

    It packs a layer's weight in the first forward pass without gradients. That rounds the weight's scales to bfloat16,
    and the kernel for packed weights has no backward pass: no gradient reaches earlier layers.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain attribute


def unexpected_tensors(model: PreTrainedModel, name: str, unexpected: Iterable[str]) -> list[str]:
    """Unexpected tensors of a checkpoint in modules that the model has; those of other modules are logged and ignored.

    Other modules are heads that this architecture does not load, such as `mtp` for multi-token prediction.
    """
    modules = {key.partition(".")[0] for key in model.state_dict()}
    unexpected = [key for key in unexpected if not DROPPABLE.search(key)]
    ignored = Counter(key.partition(".")[0] for key in unexpected if key.partition(".")[0] not in modules)
    if ignored:
        counts = ", ".join(f"{module} ({n:,})" for module, n in ignored.items())
        log_message(f"model.name_or_path={name}: ignored tensors of modules that this model lacks: {counts}")
    return [key for key in unexpected if key.partition(".")[0] in modules]


def copy_reference(policy: M, dtype: str | None, clone: Callable[[M], M] = copy.deepcopy) -> M:
    """Copy the policy before training, with frozen parameters in a dtype (None: the policy's)."""
    reference = clone(policy).eval().requires_grad_(False)
    if dtype is not None:
        for parameter in reference.parameters():  # buffers such as rotary frequencies stay in float32
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return reference


def compile_layers(model: PreTrainedModel) -> None:
    """Compile a model's layers at their first call, once for all layers and row lengths.

    Parameters keep their names. UserError if the model is not made of transformers' layers.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError("compile=true: this kind of model has no layers that can be compiled; set compile=false")
    for layer in layers:
        layer.compile(dynamic=True)


def recompute_activations(model: PreTrainedModel, on: bool = True) -> None:
    """Turn activation checkpointing on or off."""
    verb = "enable" if on else "disable"
    newer = getattr(model, f"activation_checkpointing_{verb}", None)  # its name in newer versions of transformers
    (newer or getattr(model, f"gradient_checkpointing_{verb}"))()


# Randomness: policy and reference must compute the same function, or the first margin would not be 0

RANDOM = re.compile("drop|jitter|noise")
SUSPICIOUS = re.compile("drop|jitter|noise|random|stochastic|sampl|gumbel")


def disable_randomness(config: PreTrainedConfig) -> None:
    """Set every rate of dropout, jitter or noise to 0 in a model's config and its nested configs."""
    for nested in configs(config):
        for key, value in vars(nested).items():
            if isinstance(value, float) and RANDOM.search(key):
                setattr(nested, key, 0.0)


def configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from configs(value)


@torch.no_grad()
def is_random(model: PreTrainedModel) -> bool:
    """Whether two forward passes in training mode differ with different seeds.

    Call it while the model is on the CPU, where nothing else makes the passes differ.
    """
    ids = torch.arange(8, device=model.device)[None] % model.get_input_embeddings().get_parameter("weight").shape[0]
    was_training = model.training
    model.train()
    outputs = []
    with torch.random.fork_rng():
        for seed in range(2):
            torch.manual_seed(seed)
            outputs.append(model(input_ids=ids, use_cache=False).logits)
    model.train(was_training)
    return not torch.equal(*outputs)


def check_deterministic(model: PreTrainedModel) -> None:
    """Raise UserError, with the config's suspicious settings, if the outputs are random in training mode."""
    if is_random(model):
        keys = [key for nested in configs(model.config) for key in vars(nested) if SUSPICIOUS.search(key)]
        raise UserError(
            "model.name_or_path: this model's outputs are random in training, so policy and reference would differ"
            f" before the first update; possible causes in its config: {', '.join(keys) or 'none found'}"
        )


# Causality: the log-probability of a token must not depend on later tokens

# A later token moves earlier logits of causal models by at most 2e-7 of what it moves its own, since the number of
# tokens of an expert rounds their products, and those of BERT and its relatives by 9e-4 or more (measured on tiny
# models of 121 families in float32). 16 bits round more.
NOT_CAUSAL = 3e-4
NOT_CAUSAL_IN_16_BITS = 0.05


@torch.no_grad()
def is_causal(model: PreTrainedModel) -> bool:
    """Whether logits stay the same where only a later token changes; the median over 7 positions counts."""
    ids = torch.arange(8, device=model.device)[None] % model.get_input_embeddings().get_parameter("weight").shape[0]
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    was_training = model.training
    model.eval()
    logits = [model(input_ids=each, use_cache=False).logits for each in (ids, changed)]
    model.train(was_training)
    moved = (logits[0].float() - logits[1].float()).abs().amax(-1)[0]  # (seq,)
    tolerance = NOT_CAUSAL if logits[0].dtype == torch.float32 else NOT_CAUSAL_IN_16_BITS
    return bool(moved[:-1].median() <= tolerance * moved[-1])


def check_causal(model: PreTrainedModel) -> None:
    """Raise UserError if log-probabilities of earlier tokens depend on later ones."""
    if not is_causal(model):
        kind = model.config.get_text_config().model_type
        raise UserError(
            f"model.name_or_path: this {kind} model is not causal: a later token changes the log-probabilities of"
            " earlier ones, which are then meaningless; choose a decoder, such as GPT-2 or Llama"
        )


# Rotary frequencies that depend on the length


def rope_problem(config: PreTrainedConfig, max_length: int) -> str | None:
    """Check that rotary frequencies do not depend on the longest example of a microbatch, up to max_length tokens.

    Otherwise the log-probability of a response would depend on other examples.
    """
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    limits = [max_length]
    for rope in [value for value in parameters.values() if isinstance(value, dict)] or [parameters]:  # per layer type
        kind = rope.get("rope_type", "default")
        if kind == "longrope":
            limits.append(rope["original_max_position_embeddings"])
        elif "dynamic" in kind:
            limits.append(text.max_position_embeddings)
    limit = min(limits)
    if limit == max_length:
        return None
    return (
        f"max_length={max_length}: this model changes its rotary frequencies for all tokens of a microbatch in which"
        f" one example is longer than {limit} tokens, so log-probabilities would depend on the other examples;"
        f" set max_length to {limit} or less"
    )
