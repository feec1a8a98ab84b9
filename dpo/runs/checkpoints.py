"""Writing, verifying and finding checkpoints.

A checkpoint is a folder step-N. It is written under another name, flushed to disk, and renamed when complete. Its files
never change. The manifest lists their SHA-256, in the format of `sha256sum --check MANIFEST`, and ends with the SHA-256
of these lines. metrics.json and hf/ may be added later; the manifest does not vouch for them then.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpo.settings.run_config import list_checkpoints
from dpo.system.console import log_message
from dpo.system.errors import RunError, UserError, is_out_of_memory, summarize_error
from dpo.system.files import MANIFEST, atomic_dir, atomic_write, free_name, fsync, link_or_copy, naming_file, sha256

PARTS = ("policy", "optimizer", "scheduler", "run")
SHARDED = ("scheduler", "run")  # parts of a checkpoint in addition to shards
INDEX = ".metadata"  # of the shards


# Writing


def save_checkpoint(
    run_dir: Path,
    step: int,
    states: dict[str, Any],
    metrics: dict[str, float],
    keep: int | None = None,
    keep_policies: bool = False,
    best: int | None = None,
    good: int | None = None,
) -> Path:
    """Write RUN/step-N/NAME.pt for each of PARTS, as a dict of step_idx, state and metrics, and point LATEST at it.

    If ranks have written tensors, states["shards"] is the folder with their files, which are moved into the checkpoint,
    and states["digests"] has their SHA-256. An evaluation's metrics are also written to metrics.json. A step that
    exists already, because a stopped run continued from it, is kept. All but the newest `keep` checkpoints are removed
    (None: none), except step `best`, at which BEST is pointed, and step `good`. keep_policies keeps the weights of
    evaluations. RunError if the checkpoint cannot be written; earlier ones are intact.
    """
    final = run_dir / f"step-{step}"

    def write(folder: Path) -> None:
        for name in [name for name in PARTS if name in states]:
            path = folder / f"{name}.pt"
            with naming_file(path):
                torch.save({"step_idx": step, "state": states[name], "metrics": metrics}, path)
        if metrics:
            write_metrics(folder, metrics)
        if "shards" in states:
            for path in states["shards"].iterdir():
                path.rename(folder / path.name)
            states["shards"].rmdir()

    if not final.exists():
        atomic_dir(final, write, states.get("digests"))
    elif metrics and not (final / "metrics.json").exists():  # a signal saved this step before its evaluation
        write_metrics(final, metrics)
    if "shards" in states:  # still there if the step existed
        shutil.rmtree(states["shards"], ignore_errors=True)
    point_latest(run_dir, final.name)
    point_best(run_dir, best)
    kept = {f"step-{best}", f"step-{good}"}
    for folder in list_checkpoints(run_dir)[keep:] if keep else []:
        if folder.name in kept:
            continue
        if keep_policies and (folder / "metrics.json").is_file() and (folder / "policy.pt").is_file():
            keep_policy(folder)
        remove_checkpoint(folder)
    return final


def read_metrics(folder: Path) -> dict[str, float]:
    """The metrics of a checkpoint's evaluation; {} if none wrote them, or for a link or content that no run writes."""
    path = folder / "metrics.json"
    try:
        content = {} if path.is_symlink() else json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {name: value for name, value in content.items() if isinstance(value, (int, float))}


def write_metrics(folder: Path, metrics: dict[str, float]) -> None:
    atomic_write(folder / "metrics.json", (json.dumps(metrics) + "\n").encode())


def point_latest(run_dir: Path, name: str) -> None:
    """Point LATEST at a checkpoint, atomically."""
    point(run_dir / "LATEST", name)


def point_best(run_dir: Path, step: int | None) -> None:
    """Point BEST at a checkpoint if it does not lead there yet; do nothing for None."""
    link, name = run_dir / "BEST", f"step-{step}"
    if step is not None and not (link.is_symlink() and os.readlink(link) == name):
        point(link, name)


def point(link: Path, name: str) -> None:
    """Make a link to a checkpoint beside it, or change it, atomically."""
    staging = link.with_name(f".staging-{link.name}")
    if link.is_dir() and not link.is_symlink():  # copied by a tool that follows links
        link.rename(free_name(link.with_name(f"{link.name}-copied")))
    staging.unlink(missing_ok=True)
    staging.symlink_to(name)
    os.replace(staging, link)
    fsync(link.parent)


def mend_best(run_dir: Path, step: int | None) -> bool:
    """Point BEST where a resumed run's checkpoint says, since a kill may have come between; False if that is gone."""
    if step is not None and (run_dir / f"step-{step}").is_dir():
        point_best(run_dir, step)
        return True
    if (run_dir / "BEST").is_symlink():
        (run_dir / "BEST").unlink()
    return step is None


def rewind(run_dir: Path, step: int | None) -> None:
    """Make step-N the newest checkpoint, by removing those after it; None removes all. RunError if step-N is gone."""
    if step is not None and not (run_dir / f"step-{step}").is_dir():
        raise RunError(
            f"{run_dir}: step-{step}, the last good checkpoint, is gone; nothing is removed", "no checkpoint"
        )
    later = [folder for folder in list_checkpoints(run_dir) if step is None or step_of(folder) > step]
    if step is None:
        (run_dir / "LATEST").unlink(missing_ok=True)
    else:
        point_latest(run_dir, f"step-{step}")
    for folder in later:
        remove_checkpoint(folder)
        log_message(f"Removed {folder}, which no evaluation has found good.")


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint; it is renamed first, so that a partly removed one is never read."""
    doomed = folder.with_name(f".doomed-{folder.name}")
    try:
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:  # not fatal; a resume removes the rest
        log_message(f"{folder}: cannot be removed ({error.strerror})")


def keep_policy(folder: Path) -> None:
    """Keep a checkpoint's weights and metrics as RUN/policies/step-N.pt and .json, by hard links if possible."""
    kept = folder.parent / "policies"
    kept.mkdir(exist_ok=True)
    for name, ending in (("metrics.json", "json"), ("policy.pt", "pt")):
        atomic_write(kept / f"{folder.name}.{ending}", partial(link_or_copy, folder / name))


# Finding and verifying


def find_corruption(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if it has all of PARTS and matches its manifest."""
    try:
        text = (folder / MANIFEST).read_bytes().decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    lines, _, digest_of_lines = text.rpartition("# ")
    if digest_of_lines != hashlib.sha256(lines.encode()).hexdigest() + "\n":
        return f"{MANIFEST} is damaged"
    digests = {name: digest for digest, _, name in (line.partition("  ") for line in lines.splitlines())}
    missing = {f"{name}.pt" for name in (SHARDED if INDEX in digests else PARTS)} - set(digests)
    if missing or any(Path(name).name != name for name in digests):
        return f"{MANIFEST} lists {', '.join(sorted(digests)) or 'nothing'}"
    for name, digest in digests.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            return f"{name} is missing"
        try:
            if sha256(path) != digest:
                return f"{name} is damaged"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def read_checkpoint(folder: Path) -> dict[str, Any] | str:
    """Read the state of each of PARTS, as plain values and tensors only; or return what is wrong with the checkpoint.

    Shards are not read: states["shards"] is their folder.
    """
    problem = find_corruption(folder)
    if problem:
        return problem
    try:
        in_shards = f"  {INDEX}\n" in (folder / MANIFEST).read_text(encoding="ascii")
        states: dict[str, Any] = {"shards": folder} if in_shards else {}
        for name in SHARDED if in_shards else PARTS:
            states[name] = torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True)["state"]
        return states
    except Exception as error:  # torch refuses a forged file in many ways
        if is_out_of_memory(error):
            raise
        return f"it cannot be read ({summarize_error(error)})"


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """Read the newest valid checkpoint: its folder and states, or None if the run never wrote one.

    Damaged checkpoints are logged and renamed, and the one before is used; RunError if all are damaged or gone.
    """
    damaged: list[Path] = []
    for folder in list_checkpoints(run_dir):
        states = read_checkpoint(folder)
        if not isinstance(states, str):
            point_latest(run_dir, folder.name)
            for other in damaged:  # the run writes these steps again
                other.rename(free_name(other.with_name(f"damaged-{other.name}")))
            return folder, states
        log_message(f"{folder} is not used: {states}.")
        damaged.append(folder)
    if damaged or (run_dir / "LATEST").is_symlink() or any(run_dir.glob("damaged-step-*")):
        raise RunError(f"{run_dir}: no valid checkpoint is left to resume from; start a new run", "no checkpoint")
    return None


def clear_leftovers(run_dir: Path) -> None:
    """Remove files and folders that a killed process left partly written or partly removed."""
    for pattern in (".staging-*", ".doomed-*", "step-*/.staging-*", "policies/.staging-*"):
        for path in run_dir.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


@contextmanager
def fitting(run_dir: Path) -> Iterator[None]:
    """Turn errors from loading states of an unexpected form into a RunError."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        message = f"{run_dir}: the checkpoint does not fit this run ({type(error).__name__}: {error})"
        raise RunError(message.splitlines()[0], "no checkpoint") from None
