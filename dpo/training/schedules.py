"""Learning rate schedules: a linear warmup, then a constant rate or a decay."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dpo.settings.schema import Settings

WSD_DECAY = 0.2  # share of a run's updates in which scheduler=wsd decays

SHAPES: dict[str, Callable[[float], float]] = {  # by the share of the run, 0 to 1, that is done
    "constant": lambda done: 1.0,
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,  # arXiv 1608.03983, eq. 5, without restarts
    "wsd": lambda done: min(1.0, (1 - done) / WSD_DECAY),  # warmup, stable, decay: arXiv 2404.06395
}


def lr_factor(update: int, n_updates: int, warmup: int, shape: Callable[[float], float], min_ratio: float) -> float:
    """The factor of lr in an update, counted from 0.

    It rises linearly over warmup updates, as in the original, then falls towards min_ratio, which it would reach one
    update after the last.
    """
    done = min(1.0, max(0, update - warmup) / max(1, n_updates - warmup))
    return min(1.0, (update + 1) / (warmup + 1)) * (min_ratio + (1 - min_ratio) * shape(done))


def make_scheduler(settings: Settings, optimizer: Optimizer, n_updates: int) -> LambdaLR:
    shape = SHAPES[settings.scheduler]
    warmup, ratio = settings.warmup_steps, settings.min_lr_ratio
    return LambdaLR(optimizer, lambda update: lr_factor(update, n_updates, warmup, shape, ratio))
