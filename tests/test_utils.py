"""Where runs live on disk, and what an import does."""

import getpass
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import utils


@pytest.mark.parametrize("error", [None, KeyError, OSError])  # of Python 3.11 and 3.13, for a user without a name
def test_a_run_directory_lies_in_the_first_folder_that_exists_under_the_users_name_or_number(
    error, tmp_path, monkeypatch
):
    def getuser():
        if error is not None:
            raise error("no such user")
        return "me"

    monkeypatch.setattr(getpass, "getuser", getuser)
    there = tmp_path / "there"
    there.mkdir()
    found = utils.local_run_dir("exp", [str(tmp_path / "missing"), str(there), str(tmp_path)])
    assert found.startswith(str(there / ("me" if error is None else str(os.getuid())) / "exp_"))
    assert utils.local_run_dir("exp", ["missing-a", "missing-b"]).startswith("missing-b")


def test_importing_a_module_imports_nothing_that_few_need_and_needs_no_streams(tmp_path):
    found = "{'wandb', 'datasets', 'bs4'} & set(sys.modules)"
    code = f"import sys, train, trainers; open(sys.argv[1], 'w').write(str({found}))"
    command = ["bash", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, "-c", code, str(tmp_path / "imported")]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert (tmp_path / "imported").read_text() == "set()"
