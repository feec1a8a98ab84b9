"""Which models are refused, and why: by their config, before data and weights are read, or by their outputs."""

import re
from collections.abc import Iterator

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpo.data.examples import special_token_problems
from dpo.model.lora import find_parameters, find_targets
from dpo.model.pretrained import auto_class
from dpo.model.routers import no_router_logits, router_problem
from dpo.settings.schema import LoraSettings, ModelSettings, Settings
from dpo.system.errors import UserError
from dpo.system.installation import is_installed


def model_problems(
    settings: Settings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> list[str]:
    """Check that settings, model, tokenizer and device fit together; one line per problem."""
    name = settings.model.name_or_path
    if problem := kind_problem(config):
        return [f"model.name_or_path={name}: {problem}"]
    problems = [f"model.name_or_path={name}: {problem}" for problem in quantization_problems(settings, config, device)]
    if settings.lora is not None and settings.lora.quantize and device.type == "mps":
        problems.append(f"lora.quantize={settings.lora.quantize}: has no kernels for MPS; set device=cpu")
    positions = max_positions(config.get_text_config())
    if positions and settings.max_length > positions:
        problems.append(f"max_length={settings.max_length}: {name} has {positions} positions; lower it to {positions}")
    if problem := rope_problem(config, settings.max_length):
        problems.append(problem)
    if settings.model.router_loss_weight and not hasattr(config.get_text_config(), "output_router_logits"):
        problems.append(router_problem(settings.model, config))
    if settings.lora is not None and (problem := target_problem(config, settings.lora, settings.compile is True)):
        problems.append(problem)
    n_embeddings = count_embeddings(settings.model, config, tokenizer)
    return problems + special_token_problems(tokenizer, n_embeddings, settings.model.add_bos)


def kind_problem(config: PreTrainedConfig) -> str | None:
    """Say why models of this config's kind cannot be trained; None if they can."""
    kind = config.model_type
    if config.is_encoder_decoder:
        return f"{kind} models have an encoder and a decoder; choose a model that is a decoder alone, such as Llama"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return (
            f"transformers {transformers.__version__} has no causal language model for the type {kind}; choose a"
            " model that AutoModelForCausalLM opens, such as Llama"
        )
    return None


def quantization_method(config: PreTrainedConfig) -> str | None:
    """How the weights of a checkpoint are quantized, by its config, such as bitsandbytes; None if they are not."""
    for each in configs(config):
        stored = getattr(each, "quantization_config", None) or getattr(each, "compression_config", None)
        if stored:
            values = stored if isinstance(stored, dict) else stored.to_dict()
            return str(values.get("quant_method", "bitsandbytes"))  # which early versions of bitsandbytes left out
    return None


def quantization_problems(settings: Settings, config: PreTrainedConfig, device: torch.device) -> Iterator[str]:
    """Yield what speaks against training a checkpoint that is quantized already; nothing for any other."""
    method = quantization_method(config)
    if method is None:
        return
    quantized = f"its weights are quantized already ({method})"
    if method != "bitsandbytes" or settings.lora is None:
        what = "they cannot be trained" if method != "bitsandbytes" else "only an adapter can be trained on them"
        advice = "choose the unquantized model, which lora=default lora.quantize=nf4 stores in 4 bits"
        also = "" if method != "bitsandbytes" else ", or set lora=default"
        yield f"{quantized}, so {what}; {advice}{also}"
        return
    if not is_installed("bitsandbytes"):
        yield f"{quantized}; pip install bitsandbytes"
    refused = {
        "lora.quantize=nf4": settings.lora.quantize,
        "lora.export_merged=true": settings.lora.export_merged,
        "lora.use_dora=true": settings.lora.use_dora,
        "model.archive": settings.model.archive,
        "model.from_scratch=true": settings.model.from_scratch,
        "model.resize_embeddings=true": settings.model.resize_embeddings,
        f"trainer={settings.trainer}": settings.trainer != "BasicTrainer",
        f"device={device.type}": device.type == "mps",
    }
    for setting, is_set in refused.items():
        if is_set:
            yield f"{quantized}, which {setting} does not support; leave it out, or choose the unquantized model"


def count_embeddings(settings: ModelSettings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of the policy's embeddings: the model's, and with resize_embeddings at least one for each token."""
    n: int = config.get_text_config().vocab_size
    return max(n, max(tokenizer.get_vocab().values()) + 1) if settings.resize_embeddings else n


def target_problem(config: PreTrainedConfig, settings: LoraSettings, compiled: bool) -> str | None:
    """Check, without weights, that a model of this config has the layers in lora.targets."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    try:
        find_targets(model, settings.targets)
        if find_parameters(model, settings) and compiled:  # peft replaces the tensors in every forward pass
            return "compile=true: layers whose experts are adapted cannot be compiled; set compile=false"
    except UserError as error:
        return str(error)
    return None


def max_positions(config: PreTrainedConfig) -> int | None:
    """The number of positions of a model, or None if there is no limit."""
    values = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((value for value in values if isinstance(value, int)), None)


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
            outputs.append(model(input_ids=ids, use_cache=False, **no_router_logits(model.config)).logits)
    model.train(was_training)
    return not torch.equal(*outputs)


def check_deterministic(model: PreTrainedModel, key: str = "model.name_or_path") -> None:
    """Raise UserError, with the config's suspicious settings, if the outputs are random in training mode."""
    if is_random(model):
        keys = [key for nested in configs(model.config) for key in vars(nested) if SUSPICIOUS.search(key)]
        raise UserError(
            f"{key}: this model's outputs are random in training, so policy and reference would differ"
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
    options = no_router_logits(model.config)
    logits = [model(input_ids=each, use_cache=False, **options).logits for each in (ids, changed)]
    model.train(was_training)
    moved = (logits[0].float() - logits[1].float()).abs().amax(-1)[0]  # (seq,)
    tolerance = NOT_CAUSAL if logits[0].dtype == torch.float32 else NOT_CAUSAL_IN_16_BITS
    return bool(moved[:-1].median() <= tolerance * moved[-1])


def check_causal(model: PreTrainedModel, key: str = "model.name_or_path") -> None:
    """Raise UserError if log-probabilities of earlier tokens depend on later ones."""
    if not is_causal(model):
        kind = model.config.get_text_config().model_type
        raise UserError(
            f"{key}: this {kind} model is not causal: a later token changes the log-probabilities of"
            " earlier ones, which are then meaningless; choose a decoder, such as GPT-2 or Llama"
        )
