"""Model FLOPs utilization, and the peak memory."""

import time
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch

from dpo.data.examples import TokenizedExample
from dpo.distributed.ranks import Ranks
from dpo.model.logps import ResponseLogps
from dpo.model.routers import has_experts
from dpo.system.devices import peak_memory
from dpo.training.references import Reference

SIZE = {"cpu": 512, "mps": 2048, "cuda": 8192}  # rows and columns of the matrices that measure the rate
SECONDS = 0.1  # of measuring; a single product takes longer if a CPU emulates bfloat16


def memory_use(device: torch.device, ranks: Ranks) -> dict[str, float]:
    """Collect the ranks' peak memory, in GB: of the GPU, or of the process."""
    peaks = [n_bytes / 1e9 for n_bytes in ranks.gather(peak_memory(device))]
    return {"memory_gb/max": max(peaks), "memory_gb/mean": sum(peaks) / len(peaks)}


class Utilization:
    """Model FLOPs utilization, relative to a measured rate of matrix products: PaLM, arXiv 2204.02311, appendix B.

    Per weight and token an update needs 2 FLOPs in each forward pass, of policy and reference, 2 for the gradient of
    activations, and 2 for the gradient of a trained weight. The head counts only for trained tokens. Attention,
    recomputed activations and padding are not counted.
    """

    def __init__(self, policy: ResponseLogps, reference: Reference | None, dtype: torch.dtype, n_devices: int = 1):
        """Count the weights; dtype is the compute dtype."""
        head = {id(parameter) for parameter in policy.head.parameters()}
        embeddings = {
            id(parameter)
            for module in policy.modules()
            if isinstance(module, torch.nn.Embedding)
            for parameter in module.parameters()
        }
        self.n_passes = 1 + (reference is not None and reference.knows_any_response)
        self.head = self.flops(p for p in policy.parameters() if id(p) in head)
        self.body = self.flops(p for p in policy.parameters() if id(p) not in head | embeddings)
        self.device, self.dtype, self.n_devices = next(policy.parameters()).device, dtype, n_devices
        # A mixture of experts uses only some of its weights for a token; how many is not known here.
        self.is_dense = not has_experts(policy)

    def flops(self, parameters: Iterable[torch.nn.Parameter]) -> int:
        """The FLOPs per token for some parameters in an update."""
        matrices = [parameter for parameter in parameters if parameter.dim() >= 2]
        sizes = [p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in matrices]  # uint8 holds two 4-bit weights
        trained = sum(size for size, p in zip(sizes, matrices, strict=True) if p.requires_grad)
        return 2 * (sum(sizes) * (self.n_passes + 1) + trained)

    @cached_property
    def rate(self) -> float:
        """The best rate of a large matrix product on the device, in FLOPs per second."""
        n = SIZE[self.device.type]
        a = torch.ones(n, n, device=self.device, dtype=self.dtype)
        times: list[float] = []
        while sum(times) < SECONDS:
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - start)
        return 2 * n**3 / min(times)

    def __call__(self, examples: Sequence[TokenizedExample], seconds: float) -> dict[str, float]:
        """An update's throughput as metrics."""
        tokens = sum(map(len, examples))
        rates = {"examples_per_second": len(examples) / seconds, "tokens_per_second": tokens / seconds}
        if not self.is_dense:
            return rates
        trained = sum(len(response) for example in examples for response in example.trained_responses)
        flops = self.body * tokens + self.head * trained
        return rates | {"mfu": flops / seconds / (self.rate * self.n_devices)}
