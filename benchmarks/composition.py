"""Settings from overrides, as train.py composes them, for benchmarks that build a trainer in their own process."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from dpo.settings.schema import Settings, default_values, flatten, validate  # noqa: E402
from dpo.training.objectives import Loss  # noqa: E402
from losses import LOSSES  # noqa: E402
from utils import register_resolvers  # noqa: E402


def compose(overrides: list[str]) -> tuple[DictConfig, Settings, Loss]:
    """The config, the validated settings and the loss of a command line; UserError if they are refused."""
    register_resolvers()
    with hydra.initialize_config_dir(str(ROOT / "config"), version_base=None):
        config = hydra.compose("config", overrides=overrides)
    return config, *validate(flatten(config), default_values(ROOT / "config", config.loss.name), LOSSES)
