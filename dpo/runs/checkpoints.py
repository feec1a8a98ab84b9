"""Writing, verifying and finding checkpoints.

A checkpoint is a folder step-N. It is written under another name, flushed to disk, and renamed when it is complete. Its
files never change. Its manifest lists the SHA-256 of each, as `sha256sum --check MANIFEST` reads it, and ends with the
SHA-256 of these lines. metrics.json and hf/ may be added later; no resume reads them.
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
SHARDED = ("scheduler", "run")  # the parts that a checkpoint with shards has besides them
INDEX = ".metadata"  # of the shards


# Writing


def save_checkpoint(
    run_dir: Path,
    step: int,
    states: dict[str, Any],
    metrics: dict[str, float],
    keep: int | None = None,
    keep_policies: bool = False,
) -> Path:
    """Write RUN/step-N/NAME.pt for each of PARTS, as a dict of step_idx, state and metrics, and point LATEST at it.

    If ranks have written tensors, states["shards"] is the folder with their files, which are moved from there, and
    states["digests"] has the SHA-256 of each. An evaluation's metrics are in metrics.json too. An existing step, from
    which a stopped run continued, is the same and stays.
    All but the newest `keep` checkpoints are removed (None: no checkpoint is). keep_policies keeps the weights of
    evaluations. RunError if the disk does not take the checkpoint; earlier ones are intact.
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
    elif metrics and not (final / "metrics.json").exists():  # a signal asked for this one before its evaluation
        write_metrics(final, metrics)
    if "shards" in states:  # still there if the step was
        shutil.rmtree(states["shards"], ignore_errors=True)
    point_latest(run_dir, final.name)
    for folder in list_checkpoints(run_dir)[keep:] if keep else []:
        if keep_policies and (folder / "metrics.json").is_file() and (folder / "policy.pt").is_file():
            keep_policy(folder)
        remove_checkpoint(folder)
    return final


def write_metrics(folder: Path, metrics: dict[str, float]) -> None:
    atomic_write(folder / "metrics.json", (json.dumps(metrics) + "\n").encode())


def point_latest(run_dir: Path, name: str) -> None:
    """Point LATEST at a checkpoint, atomically."""
    link = run_dir / ".staging-LATEST"
    latest = run_dir / "LATEST"
    if latest.is_dir() and not latest.is_symlink():  # the run was copied by a tool that follows links
        latest.rename(free_name(run_dir / "LATEST-copied"))
    link.unlink(missing_ok=True)
    link.symlink_to(name)
    os.replace(link, latest)
    fsync(run_dir)


def remove_checkpoint(folder: Path) -> None:
    """Remove a checkpoint. It is renamed first, so that a half-removed one is never read."""
    doomed = folder.with_name(f".doomed-{folder.name}")
    try:
        folder.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:  # no reason to stop training; a resume removes what is left
        log_message(f"{folder}: cannot be removed ({error.strerror})")


def keep_policy(folder: Path) -> None:
    """Keep a checkpoint's weights and metrics as RUN/policies/step-N.pt and .json, by hard links if possible."""
    kept = folder.parent / "policies"
    kept.mkdir(exist_ok=True)
    for name, ending in (("metrics.json", "json"), ("policy.pt", "pt")):
        atomic_write(kept / f"{folder.name}.{ending}", partial(link_or_copy, folder / name))


# Finding and verifying


def find_corruption(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None if it holds what its manifest lists, with all of PARTS."""
    try:
        text = (folder / MANIFEST).read_bytes().decode("ascii")
    except (OSError, UnicodeDecodeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    lines, _, digest_of_lines = text.rpartition("# ")
    if digest_of_lines != hashlib.sha256(lines.encode()).hexdigest() + "\n":
        return f"{MANIFEST} is damaged"
    listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines.splitlines())}
    missing = {f"{name}.pt" for name in (SHARDED if INDEX in listed else PARTS)} - set(listed)
    if missing or any(Path(name).name != name for name in listed):
        return f"{MANIFEST} lists {', '.join(sorted(listed)) or 'nothing'}"
    for name, digest in listed.items():
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
    """Read the state of each of PARTS, only plain values and tensors; or return what is wrong with the checkpoint.

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
    except Exception as error:  # a forged file, which torch refuses in many ways
        if is_out_of_memory(error):
            raise
        return f"it cannot be read ({summarize_error(error)})"


def newest_checkpoint(run_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """Read the newest valid checkpoint: its folder and states, or None if the run never wrote one.

    A damaged one is logged and renamed, and the one before it used; RunError if all are damaged or gone.
    """
    damaged: list[Path] = []
    for folder in list_checkpoints(run_dir):
        states = read_checkpoint(folder)
        if not isinstance(states, str):
            point_latest(run_dir, folder.name)
            for other in damaged:  # so that the run can write these steps again
                other.rename(free_name(other.with_name(f"damaged-{other.name}")))
            return folder, states
        log_message(f"{folder} is not used: {states}.")
        damaged.append(folder)
    if damaged or (run_dir / "LATEST").is_symlink() or any(run_dir.glob("damaged-step-*")):
        raise RunError(f"{run_dir}: no valid checkpoint is left to resume from; start a new run", "no checkpoint")
    return None


def clear_leftovers(run_dir: Path) -> None:
    """Remove files and folders that a killed process left half-written or half-removed."""
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
