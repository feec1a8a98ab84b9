"""Weights that another run, or the original implementation, saved: `model.archive`."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch

from dpo.system.errors import UserError, summarize_error

# Buffers that older transformers versions stored and newer ones compute.
DROPPABLE = re.compile(r"(^|\.)(attn|attention|self_attn)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
RENAMED = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX's output head, until transformers 5
WHOLE_NUMBERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}  # by their size in bytes


def load_archive(path: str) -> dict[str, Any]:
    """Read the state in a policy.pt, also one that the original wrote; UserError if it is not one.

    It is {name: tensor}, or of a LoRA run what `dpo.runs.weights.AdapterWeights` saved.
    """
    remedy = "model.archive must be a policy.pt of a run here or of the original"
    try:
        archive = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"model.archive={path}: there is no such file; {remedy}") from None
    except Exception as error:  # torch raises many kinds for a file that is damaged or holds more than weights
        reason = summarize_error(error)
        raise UserError(f"model.archive={path}: cannot be read ({reason}); {remedy}") from None
    state: Any = archive.get("state") if isinstance(archive, dict) else None
    weights = state["weights"] if is_adapter(state) else state
    if not isinstance(weights, dict) or not all(
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        for name, value in weights.items()
    ):
        raise UserError(f"model.archive={path}: holds no weights under 'state'; {remedy}")
    return state


def is_adapter(state: Any) -> bool:
    """Return whether the state in a policy.pt is that of a LoRA run."""
    return isinstance(state, dict) and set(state) == {"adapter", "base", "weights"}


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], setting: str) -> None:
    """Copy weights into a model; UserError that names the setting and any missing, unexpected or mis-shaped tensor."""
    own = model.state_dict()
    state = {k if k in own else RENAMED.get(k, k): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if k in own or not DROPPABLE.search(k)}
    check_fit(own, state, setting)
    model.load_state_dict(state, strict=False)


def check_fit(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], setting: str) -> None:
    """Raise UserError that names the setting if stored tensors are not those of a model's own state."""
    stored = {own[k].data_ptr() for k in state if k in own}  # of tied weights, one name is enough
    wrong = [f"missing {k}" for k, v in own.items() if k not in state and v.data_ptr() not in stored]
    wrong += [f"unexpected {k}" for k in state if k not in own]
    wrong += [
        f"{k} has shape {tuple(v.shape)}, the model's is {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and own[k].shape != v.shape
    ]
    wrong += [
        f"{k} is {v.dtype}, the model's is {own[k].dtype}"
        for k, v in state.items()
        if k in own and own[k].is_floating_point() != v.is_floating_point()
    ]
    if wrong:
        listed = "; ".join(wrong[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise UserError(f"{setting}: does not fit the model: {listed}")


def weights_checksum(weights: Mapping[str, torch.Tensor]) -> str:
    """Return a SHA-256 of each tensor's name, shape and sum of bits, which other weights would hardly share."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        bits = value.detach().flatten().view(WHOLE_NUMBERS[value.element_size()])
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {bits.sum(dtype=torch.int64)}".encode())
    return digest.hexdigest()
