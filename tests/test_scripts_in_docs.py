"""The shell scripts of docs/distributed.md: their syntax, and when they start a run again."""

import os
import re
import subprocess

import pytest
from conftest import ROOT

TEXT = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
SCRIPTS = [
    re.sub("(?m)^    ", "", block) for block in re.findall(r"(?m)(?:^    .*\n)+", TEXT) if "#!/bin/bash" in block
]
SLURM = next(script for script in SCRIPTS if "scontrol requeue" in script)
LOOP = next(script for script in SCRIPTS if "for attempt" in script)


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_accepts_each_script(script):
    assert subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True).stderr == ""


def run(script, codes, tmp_path):
    """Run a script whose training ends with these codes, one after the other; return its code and what it called."""
    log, left = tmp_path / "log", tmp_path / "codes"
    left.write_text("".join(f"{code}\n" for code in codes))
    log.touch()
    take = f'code=$(head -n 1 {left}); sed -i 1d {left}; exit "$code"'
    for name, body in {"python": take, "srun": take, "scontrol": "exit 0"}.items():
        path = tmp_path / name
        path.write_text(f'#!/bin/bash\necho "{name} $@" >> {log}\n{body}\n')
        path.chmod(0o755)
    script = script.replace("source /shared/venv/bin/activate\n", "")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "42"}
    code = subprocess.run(["bash", "-c", script], env=environment, capture_output=True).returncode
    return code, log.read_text().splitlines()


@pytest.mark.parametrize("code, requeued", [(0, False), (143, True), (2, False), (9, False), (137, False)])
def test_the_slurm_job_requeues_itself_only_after_the_signal_before_its_time_limit(code, requeued, tmp_path):
    ended, calls = run(SLURM, [code], tmp_path)
    assert ended == code and "resume=auto" in calls[0] and "local_run_dir=" in calls[0]
    assert calls[1:] == ["scontrol requeue 42"] * requeued


@pytest.mark.parametrize(
    "codes, ended, starts",
    [([0], 0, 1), ([137, 7, 0], 0, 3), ([134, 2], 2, 2), ([143], 143, 1), ([9], 9, 1), ([137] * 9, 137, 5)],
)
def test_the_loop_starts_the_run_again_only_after_a_kill_or_a_crash(codes, ended, starts, tmp_path):
    code, calls = run(LOOP, codes, tmp_path)
    assert (code, len(calls)) == (ended, starts) and all("resume=auto" in call for call in calls)
