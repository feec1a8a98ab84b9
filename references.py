"""Where a preference loss gets the reference's log-probabilities: from a second model, or from a table made once."""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

from packing import Layout, compile_layers, find_head, sequence_logps
from utils import first_line, say


class LiveReference:
    """A frozen second model, computed in dtype."""

    def __init__(self, model: Any, dtype: torch.dtype, compiled: bool = False):
        self.model, self.head = model, find_head(model)
        if model.dtype == torch.float32 and dtype != torch.float32:
            store_linear_weights(model, dtype)
        if compiled:
            compile_layers(model)

    @torch.no_grad()
    def logps(self, layout: Layout) -> torch.Tensor:
        """Return the log-probabilities of the responses, (examples, n_responses)."""
        in_float32 = self.model.dtype == torch.float32  # autocast expects such parameters; others compute as they are
        with nullcontext() if in_float32 else torch.autocast(layout.targets.device.type, enabled=False):
            return sequence_logps(self.model, layout, self.head)


def store_linear_weights(model: Any, dtype: torch.dtype) -> None:
    """Store the weights of linear layers in the dtype to which autocast would cast them in each pass: same numbers.

    Weights that an embedding shares keep theirs, since autocast does not cast embeddings.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and id(module.weight) not in embeddings:
            module.to(dtype)


class ReferenceTable:
    """One number for each response of each item, computed before the first update, when the policy is the reference."""

    def __init__(self, items: Iterable[Any], n_responses: int):
        self.row = {item: row for row, item in enumerate(dict.fromkeys(items))}
        self.values = torch.full((len(self.row), n_responses), torch.nan)

    def logps(self, layout: Layout) -> torch.Tensor:
        """Return the log-probabilities of the responses, (examples, n_responses)."""
        rows = [self.row[example.item] for example in layout.examples]
        return self.values[rows].to(layout.targets.device, non_blocking=True)

    def missing(self, items: Iterable[Any]) -> list[Any]:
        """Return the items that have no numbers yet."""
        return [item for item in items if self.values[self.row[item]].isnan().any()]

    def fill(self, layout: Layout, logps: torch.Tensor) -> None:
        """Store the log-probabilities of a pass, (examples, n_responses)."""
        self.values[[self.row[example.item] for example in layout.examples]] = logps.float().cpu()

    def save(self, path: Path, key: str) -> None:
        """Write the table, whole or not at all, under the fingerprint of what its numbers depend on."""
        staging = path.with_name(f".staging-{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"values": self.values, "key": key, "sha256": self.checksum(self.values)}, staging)
            os.replace(staging, path)
        except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
            staging.unlink(missing_ok=True)
            say(f"{path}: cannot be written ({first_line(error)}), so it may be computed again.")

    def load(self, path: Path, key: str) -> bool:
        """Take over a table written under this key; False if there is none that is whole and fits."""
        try:
            stored = torch.load(path, weights_only=True)
            values = stored["values"]
            fits = stored["key"] == key and values.shape == self.values.shape
            fits = fits and stored["sha256"] == self.checksum(values)
        except Exception:  # missing, damaged or no table: torch raises many kinds, and each means to compute it anew
            return False
        self.values = values if fits else self.values
        return fits

    @staticmethod
    def checksum(values: torch.Tensor) -> str:
        """Return the SHA-256 of a table's numbers; torch reads a flipped bit as if nothing were."""
        return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def fingerprint(model: Any, items: Iterable[Any], settings: Any) -> str:
    """Return the SHA-256 of all that the reference's numbers depend on: weights, texts in their order, and settings."""
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    digest = hashlib.sha256(repr((settings, config, model.config._attn_implementation)).encode())
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    for item in items:
        digest.update(repr(tuple(item)).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()
