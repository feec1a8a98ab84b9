"""How fast each rank computes, and which one is much slower than the others."""

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

RATIO, UPDATES = 1.5, 5  # a straggler takes so many times as long as the others, in so many updates in a row


class LayerClock:
    """The seconds that the forward passes of layers take in training, and the tokens that they are for.

    Ranks that share parameters wait for each other in nearly all else. FSDP gathers a layer before these hooks; on a
    GPU the layer is timed by events in its queue.
    """

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.tokens = 0
        self.started: Any = None
        self.spans: list[tuple[Any, Any]] = []

    def watch(self, layers: Iterable[nn.Module]) -> None:
        """Time layers; call it before they are sharded, so that their last hook is FSDP's."""
        for layer in layers:
            layer.register_forward_pre_hook(self.start)
            layer.register_forward_hook(self.stop)

    def start(self, layer: nn.Module, inputs: Any) -> None:
        """Note when a layer begins; a recomputation that ends early is not counted."""
        self.started = self.now()

    def stop(self, layer: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        """Count a layer's time and its tokens, (batch, seq, d), if it is trained."""
        hidden = output if isinstance(output, Tensor) else output[0]
        if torch.is_grad_enabled():
            self.spans.append((self.started, self.now()))
            self.tokens += hidden.shape[:-1].numel()

    def now(self) -> Any:
        """Return the time of the host, or an event in the GPU's queue."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def take(self) -> tuple[float, int]:
        """Return the seconds and the tokens, summed over layers, since they were last taken."""
        if self.on_gpu:
            torch.cuda.synchronize()
            seconds = sum(start.elapsed_time(end) for start, end in self.spans) / 1000
        else:
            seconds = sum(end - start for start, end in self.spans)
        taken = (seconds, self.tokens)
        self.spans, self.tokens = [], 0
        return taken


class StragglerWatch:
    """Names each rank that is much slower than the others, once."""

    def __init__(self) -> None:
        self.slow_updates: Counter[int] = Counter()

    def look(self, taken: Sequence[tuple[float, int]]) -> list[str]:
        """Return a message for each straggler that an update's seconds and tokens of all ranks make known."""
        if len(taken) == 1 or not all(tokens for _, tokens in taken):
            return []
        pace, messages = [seconds / tokens for seconds, tokens in taken], []
        for rank, own in enumerate(pace):
            ratio = own / statistics.median(pace[:rank] + pace[rank + 1 :])
            n = self.slow_updates[rank]
            if n < UPDATES:  # else it has been named
                self.slow_updates[rank] = n + 1 if ratio >= RATIO else 0
            if n == UPDATES - 1 and ratio >= RATIO:
                messages.append(
                    f"Rank {rank} is slow: its layers take {ratio:.1f} times as long per token as those of the other "
                    f"ranks, and at least {RATIO} times in {UPDATES} updates in a row. All wait for it: look for other "
                    "work on its machine, heat, or a slower device."
                )
        return messages
