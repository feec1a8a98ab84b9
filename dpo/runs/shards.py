"""Sharded tensors on disk: each rank writes and reads its shards, with torch.distributed.checkpoint (DCP).

DCP stores its index as a pickle, which could execute code. The unpickler here accepts only the classes of an index, and
only tensors are stored, so that an untrusted checkpoint is harmless.
"""

import pickle
import shutil
import warnings
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
        module = "pathlib" if module == "pathlib._local" else module  # its name in Python 3.13
        if (module, name) == ("builtins", "getattr"):  # how Debian's Python 3.11.2 pickles a member of an enum
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
    """DCP's reader, but reads the index without executing code."""

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

    RunError that names the rank and the reason if they cannot be written.
    """

    def make() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()

    ranks.run_on_main(make)
    try:
        save(tensors, storage_writer=FileSystemWriter(folder, thread_count=1), process_group=ranks.group)
    except CheckpointException as error:
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        message = f"{folder.parent}: rank {rank} cannot write its shards of a checkpoint ({summarize_error(cause)})"
        raise RunError(f"{message}; earlier checkpoints are intact", "disk") from None
    digests: dict[str, str] = {}
    for of_rank in ranks.gather({path.name: sha256(path) for path in folder.glob(f"__{ranks.rank}_*")}):
        digests |= of_rank
    return digests


def load_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Read tensors in place, each rank its shards, whatever the number of ranks that wrote them; also without ranks.

    RuntimeError if the folder lacks a tensor or has it in another shape.
    """
    reader = IndexReader(folder)
    try:
        reader.read_metadata()  # torch 2.11 does not report why it cannot be read
    except Exception as error:  # a damaged pickle raises nearly anything
        raise RuntimeError(summarize_error(error)) from None
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # in a process alone
            load(tensors, storage_reader=reader)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise RuntimeError(summarize_error(cause)) from None
