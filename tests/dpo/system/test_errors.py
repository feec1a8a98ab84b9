"""How failures are reported: one line per problem, which no text can forge, and the file that cannot be written."""

import sys

import pytest

from dpo.system.errors import EXIT_CODES, RunError, Stopped, UserError, exit_on_error, raise_problems
from dpo.system.files import naming_file


def fail_with(error: BaseException) -> int:
    """Return the exit code with which an error ends a program."""

    def work() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        exit_on_error(work)
    return end.value.code


def test_each_problem_is_a_line(capsys):
    with pytest.raises(UserError) as refusal:
        raise_problems(["lr=0: must be above 0", "seed=-1: must be 0 or more"])
    assert str(refusal.value) == "lr=0: must be above 0\nseed=-1: must be 0 or more"
    assert fail_with(refusal.value) == EXIT_CODES["refused"]
    assert capsys.readouterr().err == "error: lr=0: must be above 0\nerror: seed=-1: must be 0 or more\n"
    raise_problems([])


@pytest.mark.parametrize("kind", [UserError, lambda text: RunError(text, "disk"), lambda text: OSError(28, text)])
def test_a_text_cannot_forge_an_error_or_reach_the_terminal(kind, capsys):
    assert fail_with(kind("row 1: a\nerror: forged \x1b[2J\rerror: and again")) in (2, 4)
    lines = capsys.readouterr().err.split("\n")
    assert [line.startswith("error:") for line in lines] == [True] + [False] * (len(lines) - 1)
    assert "\x1b" not in "".join(lines) and "\r" not in "".join(lines)


@pytest.mark.parametrize("stream", [None, "closed"])
def test_an_error_ends_the_program_with_its_code_where_stderr_is_closed(stream, tmp_path, monkeypatch):
    if stream is not None:
        stream = open(tmp_path / "stderr", "w")
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    assert fail_with(UserError("lr=0: must be above 0")) == 2
    assert fail_with(Stopped("SIGTERM")) == 143
    assert fail_with(KeyboardInterrupt()) == 130


def test_a_failed_write_names_its_file(tmp_path, capsys):
    with pytest.raises(OSError) as failure, naming_file(tmp_path / "metrics.jsonl"):
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")
    assert fail_with(failure.value) == EXIT_CODES["disk"]
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path / 'metrics.jsonl'}: cannot be read or written (No space left on device)")


def test_an_error_about_memory_is_not_one_about_a_file(tmp_path):
    for error in (RuntimeError("out of memory"), OSError(12, "Cannot allocate memory"), MemoryError()):
        with pytest.raises(type(error)) as failure, naming_file(tmp_path / "file"):
            raise error
        assert failure.value is error
        assert fail_with(error) == EXIT_CODES["memory"]
