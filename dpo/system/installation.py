"""Where config/ lies, what the command is called (in a checkout or a wheel), and which libraries are installed."""

import sys
from importlib.util import find_spec
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]  # dpo/
SHARE = PACKAGE / "share"  # holds config/ in a wheel, put there by pyproject.toml; missing in a checkout
PROJECT = SHARE if SHARE.is_dir() else PACKAGE.parent
CONFIG = PROJECT / "config"
SCRIPT = "dpo-train"
COMMAND = SCRIPT if SHARE.is_dir() or Path(sys.argv[0]).stem == SCRIPT else "python train.py"


def is_installed(library: str) -> bool:
    """Whether a library can be imported; it is not imported for that."""
    return find_spec(library) is not None
