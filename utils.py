"""Where runs live on disk, and the resolvers for these names in config/."""

import getpass
import os
import re
from collections.abc import Callable, Iterable
from datetime import datetime

from omegaconf import OmegaConf

from dpo.system.installation import PROJECT


def slug(name: str) -> str:
    """Turn the last part of a hub name or path into a valid file name."""
    return re.sub(r"[^\w.-]+", "_", str(name).rstrip("/").rsplit("/", 1)[-1])


def local_run_dir(exp_name: str, local_dirs: Iterable[str]) -> str:
    """DIR/USER/EXP_TIMESTAMP, which is not created."""
    return os.path.join(local_dir(local_dirs), f"{exp_name}_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}")


def local_dir(local_dirs: Iterable[str]) -> str:
    """DIR/USER, where DIR is the first of local_dirs that exists, else the last; it is not created."""
    local_dirs = list(local_dirs)
    base = next((folder for folder in local_dirs if os.path.isdir(folder)), local_dirs[-1])
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a user id that has no name
        user = str(os.getuid())
    return os.path.join(base, user)


def register_resolvers() -> None:
    """Register the resolvers of interpolations in config/, such as ${slug:...}."""
    resolvers: dict[str, Callable[..., str]] = {
        "slug": slug,
        "local_run_dir": local_run_dir,
        "project_dir": lambda path: str(PROJECT / path),
    }
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, use_cache=name == "local_run_dir", replace=True)
