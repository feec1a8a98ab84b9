"""OUT, the folder of rounds: where it is, and with which settings it is reopened."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dpo.system.errors import UserError
from tools.rounds.out import create, reopen


@pytest.mark.parametrize("name", ["out", "link/out"])
def test_rounds_know_the_whole_path_of_their_folder_however_it_is_named(tmp_path, monkeypatch, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    values = OmegaConf.create({"local_run_dir": name, "rounds": 3, "prompts": []})
    with create(Path(name), values):
        assert values.local_run_dir == str(Path(tmp_path / name).resolve())
    with reopen(Path(name)) as values:
        assert values.local_run_dir == str(Path(tmp_path / name).resolve())


def test_what_a_killed_process_left_behind_is_removed_and_does_not_stop_the_same_command(tmp_path):
    values = OmegaConf.create({"local_run_dir": str(tmp_path), "rounds": 3})
    (tmp_path / ".staging-config.yaml.123").write_text("rou")
    (tmp_path / "round-1" / "run").mkdir(parents=True)
    with pytest.raises(UserError, match="is not empty"), create(tmp_path, values):
        pass
    (tmp_path / "round-1").rename(tmp_path.parent / f"{tmp_path.name}-round-1")
    with create(tmp_path, values):
        pass
    (tmp_path.parent / f"{tmp_path.name}-round-1").rename(tmp_path / "round-1")
    for name in (".staging-samples.jsonl.5", "run/.staging-step-8"):
        (tmp_path / "round-1" / name).write_text("{")
    (tmp_path / ".staging-best").mkdir()
    with reopen(tmp_path):
        left = sorted(path.name for path in tmp_path.rglob(".staging-*"))
    assert left == [".staging-step-8"]  # of the training run, which removes it itself
