"""python tests/open_export.py FOLDER ...: opens exports in the installed transformers, which may be another version.

Prints one JSON object: for each folder the log-probabilities of IDS, or why it does not open.
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM

IDS = [(7 * i + i * i // 5) % 128 for i in range(1, 40)]


@torch.no_grad()
def logps(model: torch.nn.Module) -> list[float]:
    """Return the log-probability of each of IDS but the first, in float32."""
    ids = torch.tensor([IDS])
    logits = model.float().eval()(input_ids=ids, use_cache=False).logits
    return logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0].tolist()


def open_export(folder: str) -> list[float] | str:
    """Return the log-probabilities of an export, or why it does not open."""
    try:
        return logps(AutoModelForCausalLM.from_pretrained(folder, low_cpu_mem_usage=False))
    except Exception as error:  # of any kind: keys and classes of another version
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


if __name__ == "__main__":
    print(json.dumps({folder: open_export(folder) for folder in sys.argv[1:]}))
