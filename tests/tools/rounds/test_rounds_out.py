"""OUT, the folder of rounds: where it is, and with which settings it is reopened."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

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
