"""Where config/ lies and what the command is called, in a checkout or installed from a wheel."""

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]  # dpo/
SHARE = PACKAGE / "share"  # in a wheel: config/ and docs/losses.md, put there by pyproject.toml; not in a checkout
PROJECT = SHARE if SHARE.is_dir() else PACKAGE.parent
CONFIG = PROJECT / "config"
SCRIPT = "dpo-train"
COMMAND = SCRIPT if SHARE.is_dir() or Path(sys.argv[0]).stem == SCRIPT else "python train.py"
