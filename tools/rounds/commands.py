"""Commands that read lines and write lines, while both sides run."""

import queue
import shlex
import shutil
import subprocess
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

from dpo.system.errors import UserError
from tools.rounds.supervisor import supervised

Lines = queue.SimpleQueue[bytes | None]  # None at the end

REMEDY = "it must write one line for each that it reads"
GRACE = 5.0  # seconds that a command has to end after its last answer


class MiscountError(UserError):
    """A command gave more or fewer lines than it read, so that none of them can be told apart."""


def command_problem(command: str) -> str | None:
    """Why a command cannot be started; None if it can, as far as is known without starting it."""
    try:
        program = shlex.split(command)[0]
    except ValueError as error:  # quotes that are not closed
        return f"cannot be split into words ({error})"
    return None if shutil.which(program) else f"there is no program {program}; install it or give its path"


@contextmanager
def conversation(
    words: Sequence[str], lines: Sequence[str], stderr: IO[bytes] | None = None
) -> Iterator[tuple["subprocess.Popen[bytes]", Lines]]:
    """Start a command and write lines to its stdin; yields its process, and the lines that it writes to its stdout.

    The command and the processes that it started are ended in any case.
    """
    pipe = subprocess.PIPE
    with supervised(words, stdin=pipe, stdout=pipe, stderr=stderr) as process:
        assert process.stdin is not None and process.stdout is not None
        written: Lines = queue.SimpleQueue()
        threading.Thread(target=write_lines, args=(process.stdin, lines), daemon=True).start()
        threading.Thread(target=read_lines, args=(process.stdout, written), daemon=True).start()
        yield process, written


def write_lines(stdin: IO[bytes], lines: Sequence[str]) -> None:
    with suppress(BrokenPipeError), stdin:  # the command may end before it has read all
        for line in lines:
            stdin.write(f"{line}\n".encode())


def read_lines(stdout: IO[bytes], written: Lines) -> None:
    with stdout:
        for line in stdout:
            written.put(line)
    written.put(None)


def answer_lines(label: str, command: str, lines: Sequence[str], timeout: float) -> Generator[str, None, None]:
    """Start a command, write lines to its stdin, and yield the line that it writes for each as soon as it is there.

    UserError, beginning with label, if it fails, or writes nothing for `timeout` seconds; MiscountError if the numbers
    of lines differ.
    """
    with conversation(shlex.split(command), lines) as (process, answers):
        for n_answered in range(len(lines)):
            try:
                answer = answers.get(timeout=timeout)
            except queue.Empty:
                progress = f"gave no answer for {timeout:g} seconds, after {n_answered:,} of {len(lines):,}"
                raise UserError(f"{label}: {progress}; it must flush each line, or needs a longer timeout") from None
            if answer is None:
                raise end_error(label, process, n_answered, len(lines))
            yield answer.decode(errors="replace").strip()
        with suppress(queue.Empty):
            if answers.get(timeout=GRACE) is not None:
                raise MiscountError(f"{label}: wrote more than {len(lines):,} lines for {len(lines):,}; {REMEDY}")


def end_error(label: str, process: "subprocess.Popen[bytes]", n_answered: int, n_lines: int) -> UserError:
    """The error of a command that closed its stdout before its last answer."""
    progress = f"after {n_answered:,} of {n_lines:,} answers"
    try:
        code = process.wait(GRACE)
    except subprocess.TimeoutExpired:
        return MiscountError(f"{label}: closed its output {progress}; {REMEDY}")
    if code:
        return UserError(f"{label}: failed with exit code {code} {progress}; the cause is in its messages above")
    return MiscountError(f"{label}: ended {progress}; {REMEDY}")
