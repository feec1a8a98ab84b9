"""The load-balancing loss of a mixture's routers, over a whole batch: Switch Transformer, arXiv 2101.03961.

It is E * sum over the E experts of f_e P_e (equations 4 to 6), over the tokens of all layers together, as in
transformers: f_e is the number of tokens that choose expert e among their top k, per token, and P_e the mean of the
router's probabilities. f_e has no gradient. So once the f_e of a batch are known, its loss is a sum of one term per
microbatch, linear in that microbatch's probabilities.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from dpo.settings.schema import ModelSettings
from dpo.system.console import log_message
from dpo.system.errors import UserError, is_out_of_memory


@dataclass(frozen=True)
class RouterLoss:
    """The weight of the loss in a batch's loss, and the number of experts that a token chooses."""

    weight: float
    top_k: int

    def sums(self, logits: Sequence[Tensor], occurrences: Tensor) -> Tensor:
        """Sum over tokens and layers how often each expert is chosen, and its probability: (2, experts), in float32.

        logits are (tokens, experts) for each layer; occurrences (tokens,) is how often each token counts.
        """
        probabilities = [layer.float().softmax(-1) for layer in logits]
        chosen = torch.cat([layer.topk(self.top_k).indices.flatten() for layer in probabilities])
        counts = probabilities[0].new_zeros(probabilities[0].shape[1])
        counts.index_add_(0, chosen, occurrences.repeat_interleave(self.top_k).repeat(len(probabilities)))
        totals = torch.stack([(layer * occurrences[:, None]).sum(0) for layer in probabilities])
        return torch.stack((counts, totals.sum(0)))


def load_balancing_loss(microbatch: Tensor, batch: Tensor) -> Tensor:
    """The term of a microbatch in the loss of its batch, both as `RouterLoss.sums`; only the former has a gradient."""
    counts, probabilities = batch.detach()
    return len(counts) * (counts * microbatch[1]).sum() / probabilities.sum() ** 2


@contextmanager
def recorded_router_logits(base_model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the router's logits of each layer, (tokens, experts), while a model's base computes once.

    The base alone is asked for them: the whole model would also compute its own loss, which misreads a 4D mask.
    """
    logits: list[Tensor] = []

    def ask(module: nn.Module, arguments: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, options | {"output_router_logits": True}

    def keep(module: nn.Module, arguments: Any, outputs: Any) -> None:
        logits.extend(getattr(outputs, "router_logits", None) or ())

    handles = [base_model.register_forward_pre_hook(ask, with_kwargs=True), base_model.register_forward_hook(keep)]
    try:
        yield logits
    finally:
        for handle in handles:
            handle.remove()


def has_experts(module: nn.Module) -> bool:
    return any("experts" in name.split(".") for name, _ in module.named_modules())


def no_router_logits(config: PreTrainedConfig) -> dict[str, Any]:
    """The arguments with which a model returns no router logits, though its config may ask for them.

    The model would also compute its own loss, which misreads a 4D mask. And transformers would add hooks to it, which
    cannot be sent to other ranks.
    """
    nested = (config, getattr(config, "text_config", None))
    asks = any(getattr(each, "output_router_logits", False) for each in nested)
    return {"output_router_logits": False} if asks else {}


# Whether a model has this loss


def router_loss_weight(settings: ModelSettings, config: PreTrainedConfig) -> float:
    """The weight of the loss: model.router_loss_weight, else the config's own if it asks for the loss, else 0."""
    if settings.router_loss_weight is not None:
        return settings.router_loss_weight
    text = config.get_text_config()
    weights = [getattr(text, name, None) for name in ("router_aux_loss_coef", "aux_loss_coef")]
    return next(filter(None, weights), 0.0) if getattr(text, "output_router_logits", False) else 0.0


def router_problem(settings: ModelSettings, config: PreTrainedConfig, is_other: bool = False) -> str:
    """The line for a model that lacks the loss, or has another one."""
    kind, weight = config.get_text_config().model_type, router_loss_weight(settings, config)
    value = f"{weight:g}" if settings.router_loss_weight is not None else f"null, {weight:g} in the model's config"
    problem = f"transformers computes no load-balancing loss for {kind} models"
    if is_other:
        problem = f"the load-balancing loss of {kind} models is not that of Switch Transformer, the only one known here"
    return f"model.router_loss_weight={value}: {problem}; set it to 0 to train without such a loss"


def make_router_loss(model: PreTrainedModel, settings: ModelSettings) -> RouterLoss | None:
    """The loss, None if its weight is 0; UserError unless it equals the one that the model's own class computes.

    A forward pass over a few tokens shows that: some classes compute none, and others define it in another way.
    """
    weight = router_loss_weight(settings, model.config)
    if not weight:
        return None
    loss = RouterLoss(weight, getattr(model.config.get_text_config(), "num_experts_per_tok", 1))
    exists, is_equal = compare_losses(model, loss)
    if not is_equal:
        raise UserError(router_problem(settings, model.config, is_other=exists))
    source = "the model's config asks for it" if settings.router_loss_weight is None else "model.router_loss_weight"
    log_message(f"The load-balancing loss of the routers is added with weight {weight:g} ({source}).")
    return loss


@torch.no_grad()
def compare_losses(model: PreTrainedModel, loss: RouterLoss) -> tuple[bool, bool]:
    """Whether the model's class computes such a loss for a few tokens, and whether RouterLoss gives the same one."""
    vocab_size = model.get_input_embeddings().get_parameter("weight").shape[0]
    ids = torch.arange(64, device=model.device).view(4, 16) % vocab_size
    mask = torch.ones_like(ids)
    mask[1:, 12:] = 0
    exists = is_equal = False
    try:
        with recorded_router_logits(model.base_model) as logits:
            outputs = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False)
        own = outputs.aux_loss.item()
        exists = True
        sums = loss.sums(logits, mask.flatten().float())
        tolerance = 1e-5 if logits[0].dtype == torch.float32 else 0.05  # transformers computes softmax in 16 bits
        is_equal = abs(load_balancing_loss(sums, sums).item() - own) <= tolerance * own
    except Exception as error:  # models without this loss fail in many ways
        if is_out_of_memory(error):
            raise
    return exists, is_equal
