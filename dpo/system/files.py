"""Files and folders that are written whole or not at all; errors that name the file."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dpo.system.errors import RunError, is_out_of_memory, summarize_error

MANIFEST = "MANIFEST"


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Turn a failed write into an OSError that names the file, which torch and file.flush do not do.

    An out-of-memory error is raised as it is.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or summarize_error(error), str(path)) from error
        disk = os.statvfs(path.parent)  # torch's message does not name a full disk
        free = disk.f_bavail * disk.f_frsize / 1e9
        raise OSError(errno.EIO, f"{summarize_error(error)}; {free:.1f} GB free", str(path)) from error


def atomic_write(path: Path, content: Callable[[Path], None] | bytes) -> None:
    """Write one file, whole and on disk or not at all: bytes, or what a function writes to a path.

    OSError that names the file if the write fails; an out-of-memory error is raised as it is.
    """
    staging = path.with_name(f".staging-{path.name}.{os.getpid()}")  # two processes may write one file of a cache
    staging.unlink(missing_ok=True)
    try:
        with naming_file(path):
            if isinstance(content, bytes):
                staging.write_bytes(content)
            else:
                content(staging)
            fsync(staging)
            os.replace(staging, path)
            fsync(path.parent)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def atomic_dir(final: Path, write: Callable[[Path], None], digests: Mapping[str, str] | None = None) -> None:
    """Let `write` fill a folder that then becomes `final`, whole and on disk or not at all.

    RunError that names the file if a write fails.
    """
    staging = final.with_name(f".staging-{final.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        write(staging)
        write_manifest(staging, digests or {})
        staging.rename(final)
        fsync(final.parent)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a failed write as RuntimeError
        shutil.rmtree(staging, ignore_errors=True)
        if is_out_of_memory(error):
            raise
        path, reason = final, summarize_error(error)
        if isinstance(error, OSError) and Path(error.filename or "").parent == staging:
            path, reason = final / Path(error.filename).name, error.strerror or reason
        raise RunError(f"{path}: cannot be written ({reason}); earlier checkpoints are intact", "disk") from None


def write_manifest(folder: Path, digests: Mapping[str, str]) -> None:
    """List the SHA-256 of every file in a folder, and flush all of it to disk, with permissions by the umask.

    digests has those that are already known, by file name.
    """
    manifest = folder / MANIFEST
    with naming_file(manifest):
        manifest.write_text(manifest_of(folder, digests), encoding="utf-8")
    files = [path for path in folder.iterdir() if path.is_file()]
    for path in files:
        path.chmod(manifest.stat().st_mode)  # safetensors makes files that only their owner may read
    for path in (*files, folder):
        with naming_file(path):
            fsync(path)


def manifest_of(folder: Path, digests: Mapping[str, str]) -> str:
    """The manifest that a folder should have; digests are known SHA-256, by file name."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    lines = "".join(f"{digests.get(path.name) or sha256(path)}  {path.name}\n" for path in files)
    return f"{lines}# {hashlib.sha256(lines.encode()).hexdigest()}\n"


def link_or_copy(source: Path, path: Path) -> None:
    """Make path a hard link to a file, or a copy where the file system has no hard links."""
    try:
        os.link(source, path)
    except OSError:
        shutil.copyfile(source, path)


def fsync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_name(path: Path) -> Path:
    """Add a number to a path if it exists already."""
    names = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    return next(name for name in names if not name.exists())
