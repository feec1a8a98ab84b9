"""Schedules of the learning rate: a linear warmup, then constant, or falling towards a last value."""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from dpo.settings.schema import Settings

WSD_DECAY = 0.2  # share of a run's updates in which scheduler=wsd falls


def constant(done: float) -> float:
    """Return 1 whatever the share of the run, 0 to 1, that is done."""
    return 1.0


def linear(done: float) -> float:
    """Return a straight line from 1 to 0."""
    return 1 - done


def cosine(done: float) -> float:
    """Return half a cosine from 1 to 0; arXiv 1608.03983, eq. 5, without restarts."""
    return (1 + math.cos(math.pi * done)) / 2


def wsd(done: float) -> float:
    """Return 1, then a straight line to 0 over the last WSD_DECAY: warmup, stable, decay; arXiv 2404.06395."""
    return min(1.0, (1 - done) / WSD_DECAY)


SHAPES: dict[str, Callable[[float], float]] = {"constant": constant, "linear": linear, "cosine": cosine, "wsd": wsd}


def lr_factor(update: int, n_updates: int, warmup: int, shape: Callable[[float], float], min_ratio: float) -> float:
    """Return what lr is multiplied by in an update, counted from 0.

    It rises linearly over the warmup, in updates, as the original's, and then falls to min_ratio, which an update after
    the last would have.
    """
    done = min(1.0, max(0, update - warmup) / max(1, n_updates - warmup))
    return min(1.0, (update + 1) / (warmup + 1)) * (min_ratio + (1 - min_ratio) * shape(done))


def make_scheduler(settings: Settings, optimizer: Optimizer, n_updates: int) -> LambdaLR:
    """Return the scheduler of a run of n_updates, which is stepped after each update."""
    shape, warmup, ratio = SHAPES[settings.scheduler], settings.warmup_steps, settings.min_lr_ratio
    return LambdaLR(optimizer, lambda update: lr_factor(update, n_updates, warmup, shape, ratio))
