"""Commands that answer lines: streaming, and every way to fail."""

import os
import shlex
import sys
from contextlib import closing

import pytest

from dpo.system.errors import UserError
from tools.rounds import commands
from tools.rounds.commands import MiscountError, answer_lines, command_problem

ECHO = "for line in sys.stdin: print(line.strip(), flush=True)"


@pytest.fixture
def command(tmp_path):
    """Return a function that writes a Python program and gives the command that runs it."""

    def write(code: str) -> str:
        (tmp_path / "program.py").write_text(f"import os, sys, time\n{code}\n")
        return shlex.join([sys.executable, str(tmp_path / "program.py")])

    return write


def ask(command, lines, timeout=60.0):
    return list(answer_lines("it", command, lines, timeout))


def test_a_command_answers_while_it_runs_or_at_its_end(command):
    lines = [f"{n} {'x' * 1000}" for n in range(1000)]  # more than a pipe holds
    assert ask(command(ECHO), lines) == lines
    assert ask(command("lines = sys.stdin.read().splitlines(); print(*lines, sep='\\n')"), lines) == lines


def test_an_answer_is_there_before_the_command_reads_on(command):
    code = "for line in sys.stdin:\n    print(line.strip(), flush=True)\n    if line == 'b\\n': time.sleep(1000)"
    with closing(answer_lines("it", command(code), ["a", "b", "c"], 60)) as answers:
        assert [next(answers), next(answers)] == ["a", "b"]


def test_a_command_that_fails_is_named_with_its_exit_code(command):
    code = "sys.stdin.readline(); print(1, flush=True); sys.exit(3)"
    answers = answer_lines("it", command(code), ["a", "b" * 10**6, "c"], 60)  # more than it reads
    assert next(answers) == "1"
    with pytest.raises(UserError, match="^it: failed with exit code 3 after 1 of 3 answers; ") as caught:
        next(answers)
    assert not isinstance(caught.value, MiscountError)  # its answers are right


@pytest.mark.parametrize(
    "code, message",
    [
        ("sys.stdin.readline(); print(1)", "ended after 1 of 3 answers"),
        ("print(1, flush=True); os.close(1); time.sleep(1000)", "closed its output after 1 of 3 answers"),
        ("print(1, 2, 3, 4, sep='\\n')", "wrote more than 3 lines for 3"),
    ],
)
def test_too_few_or_too_many_lines_are_refused(code, message, command, monkeypatch):
    monkeypatch.setattr(commands, "GRACE", 60.0 if "time" not in code else 0.1)
    with pytest.raises(MiscountError, match=f"^it: {message}; it must write one line for each that it reads$"):
        ask(command(code), ["a", "b", "c"])


def test_a_command_that_hangs_is_ended(tmp_path):
    script = f"echo $$ > {tmp_path}/pid; echo 1; sleep 1000"
    answers = answer_lines("it", shlex.join(["sh", "-c", script]), ["a", "b"], 2)
    assert next(answers) == "1"
    with pytest.raises(UserError, match="^it: gave no answer for 2 seconds, after 1 of 2; "):
        next(answers)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_command_that_does_not_end_after_its_last_answer_is_ended(command, monkeypatch):
    monkeypatch.setattr(commands, "GRACE", 0.1)
    assert ask(command(f"{ECHO}\ntime.sleep(1000)"), ["a", "b"]) == ["a", "b"]


@pytest.mark.parametrize(
    "command, problem",
    [
        ("no-such-program --x", "there is no program no-such-program; install it or give its path"),
        ("x 'y", "cannot be split into words (No closing quotation)"),
    ],
)
def test_a_command_that_cannot_be_started_is_refused(command, problem):
    assert command_problem(command) == problem


def test_a_command_that_exists_has_no_problem():
    assert command_problem(f"{sys.executable} -c pass") is None
