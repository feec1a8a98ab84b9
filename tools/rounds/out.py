"""OUT, the folder of the rounds: created, locked, and reopened."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, ListConfig, OmegaConf

from dpo.runs.run_dir import lock_run_dir
from dpo.settings.run_config import read_run_config
from dpo.system.errors import UserError
from dpo.system.files import atomic_write
from preference_datasets import DATASETS

CONFIG, MANIFEST = "config.yaml", "manifest.json"
BEGUN = {CONFIG, "prompts.jsonl", "held_out.jsonl", "stops.jsonl"}  # files of rounds of which no stage is done
RESUME = "python -m tools.rounds resume="
PATHS = (
    "prompts eval_prompts datasets reference model.name_or_path model.tokenizer_name_or_path model.archive lora.path "
    "scorer.model chat_template"
).split()


@contextmanager
def create(out: Path, values: DictConfig) -> Iterator[None]:
    """Create and lock OUT, and write its config; UserError if it holds anything else.

    Rounds of which no stage is done yet are begun anew.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in out.iterdir() if path.name != ".lock" and not is_leftover(path)}
    except OSError as error:
        raise UserError(f"local_run_dir={out}: cannot be created ({error.strerror}); choose another") from None
    if MANIFEST in names:
        advice = f"continue them with `{RESUME}{out}`, or choose another local_run_dir"
        raise UserError(f"local_run_dir={out}: holds other rounds; {advice}")
    if names - BEGUN:
        raise UserError(f"local_run_dir={out}: is not empty; choose another")
    with lock_run_dir(out):
        remove_leftovers(out)
        values.local_run_dir = str(out.resolve())  # outputs are named relative to it
        write_config(values)
        yield


@contextmanager
def reopen(out: Path) -> Iterator[DictConfig]:
    """Lock OUT, and read its config; UserError if it holds no rounds."""
    values = read_run_config(out)
    if "rounds" not in values:
        raise UserError(f"resume={out}: is a training run; continue it with `python train.py resume={out}`")
    with lock_run_dir(out):
        remove_leftovers(out)
        values.local_run_dir = str(out.resolve())
        yield values


def is_leftover(path: Path) -> bool:
    """Whether a killed process may have left a file or folder behind that it had not written whole."""
    return path.name.startswith(".staging-")


def remove_leftovers(out: Path) -> None:
    """Remove what killed processes left behind; training runs remove their own."""
    for path in [path for path in out.rglob("*") if is_leftover(path) and "run" not in path.relative_to(out).parts]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_config(values: DictConfig) -> None:
    """Write the config of rounds, with paths that hold in any folder."""
    for key in PATHS:
        value = OmegaConf.select(values, key)
        if isinstance(value, ListConfig):
            OmegaConf.update(values, key, [absolute(name) for name in value])
        elif value is not None:
            OmegaConf.update(values, key, absolute(value))
    text = OmegaConf.to_yaml(values, resolve=True)
    atomic_write(Path(values.local_run_dir) / CONFIG, text.encode())


def absolute(name: str) -> str:
    """The absolute path of a file or folder; anything else, such as the name of a data set, as it is."""
    is_path = name not in DATASETS and Path(name).exists()
    return str(Path(name).absolute()) if is_path else name
