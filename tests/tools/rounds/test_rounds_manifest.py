"""Stages: run once, recorded with their files, refused by name if a file has changed."""

import json

import pytest

from dpo.system.errors import UserError
from tools.rounds import manifest
from tools.rounds.manifest import GONE, Manifest, hash_file


@pytest.fixture
def out(tmp_path):
    """A folder in which the stage double has made b.txt of a.txt."""
    (tmp_path / "a.txt").write_text("a")
    run_double(tmp_path)
    return tmp_path


def run_double(out, settings="s", calls=None, work=None) -> None:
    """Run the stage as a process does that has just started."""
    hash_file.cache_clear()

    def double():
        if calls is not None:
            calls.append("double")
        (out / "b.txt").write_text((out / "a.txt").read_text() * 2)
        return {"letters": 2}

    inputs = {"a.txt": hash_file(out / "a.txt")}
    Manifest(out, settings).run("double", inputs, work or double, lambda: [out / "b.txt"])


def test_a_stage_records_its_inputs_outputs_counts_versions_and_seconds(out):
    (stage,) = json.loads((out / "manifest.json").read_text())["stages"].values()
    assert stage["counts"] == {"letters": 2} and stage["done"] is True and stage["seconds"] >= 0
    assert stage["inputs"].keys() == {"a.txt"} and stage["outputs"].keys() == {"b.txt"}
    assert {"python", "torch", "transformers", "tokenizers"} == stage["versions"].keys()


def test_a_stage_that_is_done_is_not_repeated(out):
    calls: list[str] = []
    before = (out / "manifest.json").read_bytes()
    run_double(out, calls=calls)
    assert calls == [] and (out / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", ["a.txt", "b.txt"])
def test_a_file_that_has_changed_since_is_refused_by_name(out, name):
    (out / name).write_text("changed")
    with pytest.raises(UserError, match=rf"{name} has changed since double; restore it"):
        run_double(out)
    (out / name).unlink()
    with pytest.raises(UserError, match=rf"{name} is gone, or cannot be read, since double"):
        run_double(out)


def test_an_input_that_is_not_found_is_gone(out):
    with pytest.raises(UserError, match="a.txt is gone"):
        Manifest(out, "s").run("double", {}, dict, list)


def test_other_settings_are_refused(out):
    with pytest.raises(UserError, match="the settings have changed since double"):
        run_double(out, settings="t")


def test_a_stage_that_fails_is_not_recorded(out):
    def fail():
        raise UserError("no")

    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match="^no$"):
        run_double(out, work=fail)
    assert not (out / "manifest.json").exists()


def test_a_file_is_hashed_once_per_process(out, monkeypatch):
    calls: list[str] = []
    monkeypatch.setattr(manifest, "sha256", lambda path: calls.append(path.name) or "hash")
    hash_file.cache_clear()
    assert hash_file(out / "a.txt") == hash_file(out / "a.txt") == "hash" and calls == ["a.txt"]
    hash_file.cache_clear()
    monkeypatch.undo()
    assert hash_file(out / "none") == GONE
