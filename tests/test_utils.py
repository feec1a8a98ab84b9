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


def test_importing_a_module_does_nothing_else():
    heavy = {"wandb", "datasets", "bs4"}
    code = "import sys, train, trainers; print(sorted({'wandb', 'datasets', 'bs4'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", heavy
