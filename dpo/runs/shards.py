"""Sharded tensors on disk: every rank writes and reads its own part, by torch.distributed.checkpoint (DCP).

DCP keeps its index as a pickle, which could execute anything. It is read here by an unpickler that knows the classes of
an index and nothing else, and only tensors are stored, so that a stranger's checkpoint stays as harmless as any other.
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
    """Reads DCP's index; UnpicklingError for a name of anything that no index holds."""

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # as Python 3.13 names it
        if (module, name) == ("builtins", "getattr"):  # by which Python 3.11.2, Debian's, pickles a member of an enum
            return enum_member
        if name not in CLASSES.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in an index of tensors")
        return super().find_class(module, name)


def enum_member(kind: Any, name: str) -> Enum:
    """Return a member of an enum; UnpicklingError for an attribute of anything else."""
    if not (isinstance(kind, EnumType) and name in kind.__members__):
        raise pickle.UnpicklingError(f"the attribute {name} of {kind!r} does not belong in an index of tensors")
    return kind[name]


class IndexReader(FileSystemReader):
    """DCP's reader of a folder, with an index that is read without executing anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index of a checkpoint that holds tensors alone; UnpicklingError if it holds anything else."""
        with open(Path(self.path) / INDEX, "rb") as file:
            index = IndexUnpickler(file).load()
        entries = index.state_dict_metadata.values() if isinstance(index, Metadata) else [None]
        if not all(isinstance(entry, TensorStorageMetadata) for entry in entries):
            raise pickle.UnpicklingError("it holds more than tensors")
        if any(Path(info.relative_path).name != info.relative_path for info in index.storage_data.values()):
            raise pickle.UnpicklingError("it names files outside of its folder")
        return index


def save_shards(tensors: dict[str, Tensor], folder: Path, ranks: Ranks) -> dict[str, str]:
    """Write tensors into a new folder, each rank its own parts; return {file: SHA-256}.

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
    own = [path for path in folder.iterdir() if path.name.startswith(f"__{ranks.rank}_")]
    parts = ranks.gather({path.name: sha256(path) for path in own})
    return {name: digest for part in parts for name, digest in part.items()}


def load_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Read tensors in place, each rank its own parts, whatever the number of ranks that wrote them.

    RuntimeError if the folder lacks one of them or has it in another shape.
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
