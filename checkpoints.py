"""Writing checkpoints, reading archives of weights, and the export for other tools."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from utils import UserError

# Buffers that older transformers versions stored and newer ones compute.
DROPPABLE = re.compile(r"(^|\.)(attn|attention|self_attn)\.(bias|masked_bias)$|rotary_emb\.inv_freq$")
RENAMED = {"embed_out.weight": "lm_head.weight"}  # GPT-NeoX's output head, until transformers 5


def save_checkpoint(run_dir: Path, step: int, states: dict[str, Any], metrics: dict[str, float]) -> Path:
    """Write RUN/step-N/NAME.pt for each state, as a dict of step_idx, state and metrics, and point LATEST at it."""
    final = run_dir / f"step-{step}"
    staging = run_dir / f".staging-step-{step}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for name, state in states.items():
        torch.save({"step_idx": step, "state": state, "metrics": metrics}, staging / f"{name}.pt")
    staging.rename(final)
    link = run_dir / ".staging-LATEST"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, run_dir / "LATEST")
    return final


def export_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Write the model and its tokenizer so that from_pretrained opens them."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_archive(path: str) -> dict[str, torch.Tensor]:
    """Read the weights of a policy.pt, also one that the original wrote; UserError if it is not one."""
    remedy = "model.archive must be a policy.pt of a run here or of the original"
    try:
        archive = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"model.archive={path}: there is no such file; {remedy}") from None
    except Exception as error:  # torch raises many kinds for a file that is damaged or holds more than weights
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"model.archive={path}: cannot be read ({reason}); {remedy}") from None
    state = archive.get("state") if isinstance(archive, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"model.archive={path}: holds no weights under 'state'; {remedy}")
    return state


def load_weights(model: Any, state: dict[str, torch.Tensor], path: str) -> None:
    """Copy an archive's weights into a model; UserError that names any missing, unexpected or mis-shaped tensor."""
    own = model.state_dict()
    state = {k if k in own else RENAMED.get(k, k): v for k, v in state.items()}
    state = {k: v for k, v in state.items() if k in own or not DROPPABLE.search(k)}
    stored = {own[k].data_ptr() for k in state if k in own}  # of tied weights, one name is enough
    wrong = [f"missing {k}" for k, v in own.items() if k not in state and v.data_ptr() not in stored]
    wrong += [f"unexpected {k}" for k in state if k not in own]
    wrong += [
        f"{k} has shape {tuple(v.shape)}, the model's is {tuple(own[k].shape)}"
        for k, v in state.items()
        if k in own and own[k].shape != v.shape
    ]
    if wrong:
        listed = "; ".join(wrong[:10]) + (f"; and {len(wrong) - 10} more" if len(wrong) > 10 else "")
        raise UserError(f"model.archive={path}: does not fit the model: {listed}")
    model.load_state_dict(state, strict=False)
