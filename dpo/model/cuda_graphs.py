"""CUDA graphs: the work of a step, recorded once and replayed without the host."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dpo.system.console import log_message
from dpo.system.errors import is_out_of_memory, summarize_error

Step = Callable[[], None]

TOLERANCE = 0.01  # nats per token in any dtype: a graph runs the same kernels, and one that is out of date others


def record_cuda_graph(step: Step) -> Step:
    """Record a step as a CUDA graph; RuntimeError if it waits for the device or copies from the host.

    Such a step is found by computing it first: before torch 2.12, a recording that fails leaves the allocator broken.
    """
    graph = torch.cuda.CUDAGraph()
    recording = torch.cuda.graph(graph, capture_error_mode="thread_local")
    stream, mode = recording.capture_stream, torch.cuda.get_sync_debug_mode()
    assert stream is not None
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # this mode of torch is a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.stream(torch.cuda.current_stream()), recording:  # one that fails leaves its stream the current one
        step()
    return graph.replay


class Recorder:
    """Records steps, and compares them with what they record. After one that fails, it records no more.

    record makes a step that does the same work on the same tensors.
    """

    def __init__(self, record: Callable[[Step], Step] = record_cuda_graph):
        self.record = record
        self.works = True

    def __call__(self, step: Step, changed: Sequence[Tensor], logits: Tensor) -> Step | None:
        """The recorded step; None if it cannot be recorded.

        logits, (rows, vocabulary), are its result; changed are the tensors that it changes and the next one reads. Both
        have their values again afterwards, but what else a step writes has not.
        """
        if not self.works:
            return None
        kept = [tensor.clone() for tensor in (*changed, logits)]

        def restore() -> None:
            for tensor, value in zip((*changed, logits), kept, strict=True):
                tensor.copy_(value)

        def two_steps(step: Step) -> Tensor:  # what a step reads from the host stays as it was in the first one
            found = []
            for _ in range(2):
                step()
                found.append(logits.float().log_softmax(-1))
            restore()
            return torch.cat(found)

        try:
            expected = two_steps(step)
            recorded = self.record(step)
            restore()
            worst = (expected.exp() * (two_steps(recorded) - expected).abs()).sum(-1).max().item()
            if worst <= TOLERANCE:
                return recorded
            problem = f"log-probabilities change by {worst:.2g} nats per token"
        except Exception as error:  # models fail in many ways
            if is_out_of_memory(error):
                raise
            problem = f"{type(error).__name__}: {summarize_error(error)}"
        self.works = False
        restore()
        log_message(f"Sampling uses no CUDA graphs for this model ({problem}), which is slower.")
        return None
