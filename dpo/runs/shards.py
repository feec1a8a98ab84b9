"""Sharded tensors on disk: every rank writes and reads its own part, by torch.distributed.checkpoint (DCP).

DCP stores its index as a pickle, which could execute anything. Here an unpickler reads it that accepts only the classes
of an index, and only tensors are stored, so that a stranger's checkpoint stays harmless.
"""

import pickle
import shutil
from enum import Enum, EnumType
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from dpo.distributed.ranks import Ranks
from dpo.runs.checkpoints import INDEX
from dpo.system.errors import RunError, summarize_error
from dpo.system.files import sha256

CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
        *("TensorProperties", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "bool"),
    "pathlib": ("PosixPath",),
}


class IndexUnpickler(pickle.Unpickler):
    """Reads DCP's index; UnpicklingError for a class that does not belong in an index."""

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # as Python 3.13 names it
        if (module, name) == ("builtins", "getattr"):  # as Python 3.11.2, Debian's, pickles a member of an enum
            return enum_member
        if name not in CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in an index of tensors")
        return super().find_class(module, name)


def enum_member(kind: Any, name: str) -> Enum:
    """getattr for members of an enum; UnpicklingError for anything else."""
    if not (isinstance(kind, EnumType) and name in kind.__members__):
        raise pickle.UnpicklingError(f"the attribute {name} of {kind!r} does not belong in an index of tensors")
    return kind[name]


class IndexReader(FileSystemReader):
    """DCP's reader of a folder, which reads the index without executing anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the index of a checkpoint; UnpicklingError if it holds anything but tensors."""
        with open(Path(self.path) / INDEX, "rb") as file:
            index = IndexUnpickler(file).load()
        entries = index.state_dict_metadata.values() if isinstance(index, Metadata) else [None]
        if not all(isinstance(entry, TensorStorageMetadata) for entry in entries):
            raise pickle.UnpicklingError("it holds more than tensors")
        if any(Path(info.relative_path).name != info.relative_path for info in index.storage_data.values()):
            raise pickle.UnpicklingError("it names files outside of its folder")
        return index


def save_shards(tensors: dict[str, Tensor], folder: Path, ranks: Ranks) -> dict[str, str]:
    """Write tensors into a new folder, each rank its shards; return {file: SHA-256}.

    RunError that names the rank and the reason if a disk does not take them.
    """

    def make() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    ranks.run_on_main(make)
    try:
        save(tensors, storage_writer=FileSystemWriter(folder, thread_count=1), process_group=ranks.group)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        message = f"{folder.parent}: rank {rank} cannot write its part of a checkpoint ({summarize_error(cause)})"
        raise RunError(f"{message}; earlier checkpoints are intact", "disk") from None
    digests: dict[str, str] = {}
    for of_rank in ranks.gather({path.name: sha256(path) for path in folder.glob(f"__{ranks.rank}_*")}):
        digests |= of_rank
    return digests


def load_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Read tensors in place, each rank its shards, whatever the number of ranks that wrote them.

    RuntimeError if the folder lacks a tensor or has it in another shape.
    """
    reader = IndexReader(folder)
    try:
        reader.read_metadata()  # torch 2.11 would not say why it cannot be read
    except Exception as error:  # a damaged pickle raises nearly anything
        raise RuntimeError(summarize_error(error)) from None
    try:
        load(tensors, storage_reader=reader)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise RuntimeError(summarize_error(cause)) from None
