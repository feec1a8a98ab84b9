"""Where runs live on disk, and what an import does."""

import getpass
import subprocess
import sys

from conftest import ROOT

import utils


def test_a_run_directory_lies_in_the_first_folder_that_exists(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    found = utils.local_run_dir("exp", [str(tmp_path / "missing"), str(there), str(tmp_path)])
    assert found.startswith(str(there / getpass.getuser() / "exp_"))
    assert utils.local_run_dir("exp", ["missing-a", "missing-b"]).startswith("missing-b")


def test_importing_a_module_imports_nothing_that_few_need_and_needs_no_streams(tmp_path):
    found = "{'wandb', 'datasets', 'bs4'} & set(sys.modules)"
    code = f"import sys, train, trainers; open(sys.argv[1], 'w').write(str({found}))"
    command = ["bash", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, "-c", code, str(tmp_path / "imported")]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert (tmp_path / "imported").read_text() == "set()"
