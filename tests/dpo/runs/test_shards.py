"""Shards on disk: their index executes nothing. That they resume bit for bit is shown by test_resume_sharded.py."""

import io
import os
import pathlib
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.state_dict_saver import save

from dpo.distributed.ranks import ALONE
from dpo.runs import shards
from dpo.runs.shards import INDEX, IndexReader, IndexUnpickler, load_shards, save_shards


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """Be a group of one process."""
    init = f"file://{tmp_path_factory.mktemp('group') / 'init'}"
    dist.init_process_group("gloo", init_method=init, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path) -> Path:
    digests = save_shards({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}, tmp_path / "shards", ALONE)
    assert digests.keys() == {"__0_0.distcp"}
    return tmp_path / "shards"


def test_tensors_come_back_in_place(folder):
    tensors = {"a": torch.zeros(2, 3), "b": torch.tensor(0)}
    load_shards(tensors, folder)
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3)) and tensors["b"] == 7


def test_a_tensor_that_is_missing_or_has_another_shape_is_an_error(folder):
    for tensors in ({"c": torch.zeros(2)}, {"a": torch.zeros(3, 3)}):
        with pytest.raises(RuntimeError):
            load_shards(tensors, folder)


class Harmful:
    """What a stranger may have put into a pickle."""

    def __reduce__(self):
        return os.mkdir, ("/nowhere/executed",)


@pytest.mark.parametrize("content", [Harmful(), eval, torch.load, io.open])
def test_an_index_that_names_anything_else_is_refused(content, folder):
    with open(folder / INDEX, "wb") as file:
        pickle.dump(content, file)
    with pytest.raises(pickle.UnpicklingError, match="does not belong in an index"):
        IndexReader(folder).read_metadata()
    with pytest.raises(RuntimeError, match="does not belong in an index"):
        load_shards({"a": torch.zeros(2, 3)}, folder)


@pytest.mark.parametrize(
    "damage, reason", [(b"", "Ran out of input"), (b"cos\nmkdir\n.", "does not belong in an index")]
)
def test_why_an_index_cannot_be_read_is_said_also_where_torch_drops_the_reason(damage, reason, folder, monkeypatch):
    def as_in_torch_2_11(tensors, storage_reader):
        raise CheckpointException("load failed", {0: (AssertionError("metadata is None"), None)})

    monkeypatch.setattr(shards, "load", as_in_torch_2_11)
    (folder / INDEX).write_bytes(damage)
    with pytest.raises(RuntimeError, match=reason):
        load_shards({"a": torch.zeros(2, 3)}, folder)


def test_an_index_of_more_than_tensors_is_refused(tmp_path):
    """DCP would unpickle such an entry with everything that it holds."""
    save({"a": torch.zeros(2), "b": {1, 2}}, checkpoint_id=tmp_path)
    with pytest.raises(pickle.UnpicklingError, match="BytesStorageMetadata does not belong in an index"):
        IndexReader(tmp_path).read_metadata()


@pytest.mark.parametrize("entry", [torch.Size([2]), None])
def test_an_index_with_other_entries_is_refused(entry, folder):
    with open(folder / INDEX, "rb") as file:
        index = IndexUnpickler(file).load()
    index.state_dict_metadata["a"] = entry
    with open(folder / INDEX, "wb") as file:
        pickle.dump(index, file)
    with pytest.raises(pickle.UnpicklingError, match="it holds more than tensors"):
        IndexReader(folder).read_metadata()


class Attribute:
    """Stands for a member of an enum, as Python 3.11.2 pickles it."""

    def __init__(self, owner, name):
        self.place = (owner, name)

    def __reduce__(self):
        return getattr, self.place


def test_a_member_of_an_enum_is_read_as_every_python_writes_it_and_no_other_attribute():
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    for written in (member, Attribute(_MEM_FORMAT_ENCODING, member.name)):
        assert IndexUnpickler(io.BytesIO(pickle.dumps(written))).load() is member
    for owner, name in ((_MEM_FORMAT_ENCODING, "__init__"), (torch.Size, "numel")):
        with pytest.raises(pickle.UnpicklingError, match=f"the attribute {name} of .* does not belong in an index"):
            IndexUnpickler(io.BytesIO(pickle.dumps(Attribute(owner, name)))).load()


def test_an_index_that_python_3_13_wrote_is_read():
    assert IndexUnpickler(io.BytesIO()).find_class("pathlib._local", "PosixPath") is pathlib.PosixPath


def test_an_index_of_files_elsewhere_is_refused(folder):
    with open(folder / INDEX, "rb") as file:
        index = IndexUnpickler(file).load()
    for info in index.storage_data.values():
        info.relative_path = "../secret"
    with open(folder / INDEX, "wb") as file:
        pickle.dump(index, file)
    with pytest.raises(pickle.UnpicklingError, match="files outside of its folder"):
        IndexReader(folder).read_metadata()
