"""Weights that another run, or the original implementation, saved: `model.archive`."""

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import torch

from dpo.system.errors import UserError, summarize_error

# Buffers that older versions of transformers stored and newer ones compute.
DROPPABLE = re.compile(r"(^|\.)(attn|attention|self_attn)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
RENAMED = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX's output head, until transformers 5
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}  # by their size in bytes


def load_archive(path: str, key: str = "model.archive") -> dict[str, Any]:
    """Read the state in a policy.pt of this project or of the original; UserError, with the key, if it is not one.

    The state is {name: tensor}, or for a LoRA run the state_dict of `dpo.runs.weights.AdapterWeights`.
    """
    mitigation = f"{key} must be a policy.pt of a run here or of the original"
    try:
        archive = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{key}={path}: there is no such file; {mitigation}") from None
    except Exception as error:  # torch raises many kinds of errors for a damaged file or one with more than weights
        reason = summarize_error(error)
        raise UserError(f"{key}={path}: cannot be read ({reason}); {mitigation}") from None
    state: Any = archive.get("state") if isinstance(archive, dict) else None
    weights = state["weights"] if is_adapter(state) else state
    if not isinstance(weights, dict) or not all(
        isinstance(name, str)
        and isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_meta
        for name, value in weights.items()
    ):
        raise UserError(f"{key}={path}: holds no weights under 'state'; {mitigation}")
    return state


def is_adapter(state: Any) -> bool:
    """Whether the state in a policy.pt comes from a LoRA run."""
    return isinstance(state, dict) and set(state) == {"adapter", "base", "weights"}


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor], setting: str) -> None:
    """Copy weights into a model; UserError that names the setting and each tensor that does not fit."""
    expected = model.state_dict()
    state = {k if k in expected else RENAMED.get(k, k): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if k in expected or not DROPPABLE.search(k)}
    check_fit(expected, state, setting)
    model.load_state_dict(state, strict=False)


def check_fit(expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], setting: str) -> None:
    """Raise UserError that names the setting if names, shapes or kinds of tensors differ from the expected ones."""
    stored = {expected[k].data_ptr() for k in state if k in expected}  # one name of tied weights is enough
    wrong = [f"missing {k}" for k, v in expected.items() if k not in state and v.data_ptr() not in stored]
    for k, v in state.items():
        if k not in expected:
            wrong.append(f"unexpected {k}")
        elif v.shape != expected[k].shape:
            wrong.append(f"{k} has shape {tuple(v.shape)}, the model's is {tuple(expected[k].shape)}")
        elif v.is_floating_point() != expected[k].is_floating_point():
            wrong.append(f"{k} is {v.dtype}, the model's is {expected[k].dtype}")
    if wrong:
        more = f"; and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise UserError(f"{setting}: does not fit the model: {'; '.join(wrong[:10])}{more}")


def weights_checksum(weights: Mapping[str, torch.Tensor]) -> str:
    """Compute a SHA-256 over each tensor's name, dtype, shape and sum of bits."""
    digest = hashlib.sha256()
    for name, value in weights.items():
        bits = value.detach().flatten().view(INTEGERS[value.element_size()])
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {bits.sum(dtype=torch.int64)}".encode())
    return digest.hexdigest()
