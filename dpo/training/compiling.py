"""compile: which runs compile the layers with auto, and the trial before they do."""

import time

import torch
from transformers import PreTrainedModel

from dpo.model.loading import compile_layers, is_quantized, layers_to_compile
from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.packing import PackedBatch
from dpo.model.routers import has_experts
from dpo.settings.schema import Settings
from dpo.system.console import log_message
from dpo.system.devices import DeviceFacts, autocast
from dpo.system.errors import is_out_of_memory, summarize_error
from dpo.training.references import ROUNDED

# Compiling takes half a minute. SmolLM2-135M, of 107,000 tokens per second on an H200, gains three tenths of the time:
# half a minute of each 10 million tokens. A larger model gains it with fewer tokens.
MIN_TOKENS = 20_000_000


def compiling_pays(settings: Settings, facts: DeviceFacts, model: PreTrainedModel, n_tokens: int) -> bool:
    """Whether compile=auto compiles the layers: on a GPU, for a run of n_tokens that is long enough.

    Not where compile=true is refused, and not where it was never tried: with experts or quantized weights.
    """
    has_compiler = facts.kind == "cuda" and facts.triton and facts.capability >= (7, 0)  # what Triton supports
    is_refused = settings.trainer != "BasicTrainer" or settings.activation_checkpointing
    is_known = bool(layers_to_compile(model)) and not has_experts(model) and not is_quantized(model)
    return has_compiler and not is_refused and is_known and n_tokens >= MIN_TOKENS


def try_compiling(policy: ResponseLogps, batch: PackedBatch, dtype: torch.dtype) -> bool:
    """Compile a policy's layers for compile=auto if that works: forward and backward on a batch, and without gradients.

    Whatever fails in a compiler, or gives other log-probabilities, leaves the policy as it was, with a line in the log.
    The layers of a reference are the same, so they are not tried. No gradient is kept.
    """
    start, was_training = time.monotonic(), policy.training
    evaluate = torch.no_grad()(response_logps)
    try:
        with autocast(policy.model.dtype, dtype, batch.targets.device):
            expected = evaluate(policy.eval(), batch)
            compile_layers(policy.model)
            response_logps(policy.train(), batch).sums.sum().backward()
            found = evaluate(policy.eval(), batch)
        difference = ((found.sums - expected.sums).abs().sum() / found.lengths.sum()).item()
        if not difference <= ROUNDED:
            raise ValueError(f"log-probabilities change by {difference:.2g} nats per token")
    except Exception as error:  # Dynamo, Inductor, Triton and the driver each raise their own kinds
        if is_out_of_memory(error):
            raise
        compile_layers(policy.model, on=False)
        log_message(f"compile=auto: layers are not compiled, since that fails here ({summarize_error(error)}).")
        return False
    finally:
        policy.train(was_training)
        policy.zero_grad(set_to_none=True)
    log_message(f"compile=auto: layers are compiled, which took {time.monotonic() - start:.0f} seconds.")
    return True
