"""Trainers for several devices: the loop of BasicTrainer, with parameters that the processes share.

They override how a module is prepared, how its gradient is clipped and how its state is gathered, nothing else.
"""

from functools import partial
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from dpo.checkpoints import random_states, set_random_states
from dpo.distributed import ProcessGroup, Ranks
from dpo.logps import ResponseLogps
from dpo.parallel import (
    Split,
    clip_gradient,
    distinct,
    layers,
    no_weights,
    reshard,
    shard,
    weights_of_main,
    whole_tensors,
)
from dpo.settings import Settings
from dpo.shards import load_shards
from dpo.tensor_parallel import parallelize
from trainers import BasicTrainer

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class FSDPTrainer(BasicTrainer):
    """Trains a policy that is sharded over the devices of several processes, as torchrun starts them."""

    ranks: ProcessGroup

    @staticmethod
    def prepare(
        module: ResponseLogps, settings: Settings, ranks: Ranks, dtype: torch.dtype, split: Split = lambda modules: None
    ) -> ResponseLogps:
        """Shard the parameters, of which the main rank has the weights, or none has, as in a copy that `fill` fills."""
        assert isinstance(ranks, ProcessGroup)
        ranks.clock.watch(layers(module.model, settings.model.block_name))
        has_weights = ranks.on_main(lambda: not any(parameter.is_meta for parameter in module.parameters()))
        weights = weights_of_main(torch.device(ranks.device_type)) if has_weights else no_weights
        return shard(module, ranks.mesh, dtype, settings.model.block_name, weights, split)

    def clip_gradient(self) -> torch.Tensor:
        """Clip the gradient of all shards, and return the norm of the whole."""
        return clip_gradient(self.policy.trained_parameters(), self.settings.max_grad_norm)

    def tensors(self) -> dict[str, Any]:
        """Return the shards of policy and optimizer that this rank writes, and the other values of the optimizer."""
        tensors, values = self.sharded_state()
        states = {"shards": tensors, "values": values}
        if self.settings.keep_policies or self.updates == len(self.train_batches):
            states["policy"] = self.weights.state_dict(whole_tensors(self.weights.tensors(), self.ranks.is_main))
        return states

    def sharded_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors of policy and optimizer under distinct names, and the other values of the optimizer."""
        reshard(self.policy)
        state: dict[str, Any] = get_optimizer_state_dict(self.policy, self.optimizer, options=FLAT)
        tensors = {f"optimizer.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
        tensors |= {f"policy.{name}": value.detach() for name, value in distinct(self.weights.tensors()).items()}
        return tensors, {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}

    def state_dict(self, logs: list[int]) -> dict[str, Any]:
        """Return all that a resumed run needs, with the random states of all ranks."""
        states = super().state_dict(logs)
        states["run"] |= {"optimizer": states.pop("values"), "ranks": self.ranks.gather(random_states())}
        return states

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Go on from the states of a checkpoint, also of another number of ranks."""
        super().load_state_dict(states)
        stored = states["run"]["ranks"]
        set_random_states(stored[self.ranks.rank % len(stored)])

    def load_tensors(self, states: dict[str, Any]) -> None:
        """Read this rank's shards of policy and optimizer."""
        tensors, _ = self.sharded_state()
        load_shards(tensors, states["shards"])
        optimizer = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
        set_optimizer_state_dict(self.policy, self.optimizer, optimizer | states["run"]["optimizer"], options=FLAT)

    def full_weights(self) -> dict[str, torch.Tensor]:
        """Gather what is exported on the main rank's host."""
        return whole_tensors(self.weights.tensors_to_export(), self.ranks.is_main)


class TensorParallelTrainer(FSDPTrainer):
    """Trains a policy each of whose layers several ranks compute together, sharded over such groups of ranks."""

    @staticmethod
    def prepare(
        module: ResponseLogps, settings: Settings, ranks: Ranks, dtype: torch.dtype, split: Split | None = None
    ) -> ResponseLogps:
        """Split the layers over the ranks of a group, and shard the parameters over the groups."""
        assert isinstance(ranks, ProcessGroup)
        split = split or partial(parallelize, module.model, ranks.mesh["tensor"])
        return FSDPTrainer.prepare(module, settings, ranks, dtype, split)


TRAINERS: dict[str, type[BasicTrainer]] = {
    trainer.__name__: trainer for trainer in (BasicTrainer, FSDPTrainer, TensorParallelTrainer)
}
