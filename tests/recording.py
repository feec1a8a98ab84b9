"""Stands for a CUDA graph: operations on tensors, recorded once and run again without the code around them."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# What waits for a GPU, and what copies numbers to it.
REFUSED = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.lift_fresh.default}


class Recording(TorchDispatchMode):
    """Records all operations inside; RuntimeError for those that a CUDA graph cannot hold."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in REFUSED:
            raise RuntimeError(f"{function} waits for the device")
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        """Run the operations again, on the same tensors."""
        for function, args, kwargs, result in self.operations:
            for kept, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    kept.copy_(new)


def record(step):
    """Record a step, and return what replays it."""
    with Recording() as recording:
        step()
    return recording.replay
