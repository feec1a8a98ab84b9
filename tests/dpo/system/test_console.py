"""Messages and progress bars that no text and no closed terminal can break; work done ahead in a thread."""

import io
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from dpo.system import console
from dpo.system.console import log_message, prefetch, printable, progress, progress_bar
from dpo.system.errors import UserError

PRELUDE = "import sys; from dpo.system.console import guard_streams, log_message, progress, progress_bar\n"


def run_code(code: str, redirection: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python code in a shell, which redirects its streams."""
    command = ["bash", "-c", f'"$0" -c "$1" {redirection}', sys.executable, PRELUDE + code]
    captured = {"capture_output": True, "text": True, "errors": "replace"}
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, **captured)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("guarded", [True, False])
def test_what_stdout_cannot_encode_is_escaped(encoding, guarded):
    code = f"{guarded} and guard_streams()\nlog_message('caf\\u00e9 \\u2615')\n{guarded} and print('\\u2615')"
    done = run_code(code, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "\\u2615" in done.stdout and done.stdout.startswith("caf")


@pytest.mark.parametrize("redirection", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full", "| true"])
@pytest.mark.parametrize("guarded", [True, False])
def test_a_stream_that_is_closed_or_full_stops_nothing(redirection, guarded, tmp_path):
    code = f"{guarded} and guard_streams()\nimport time; time.sleep(0.2)\n"
    code += "for i in progress(range(20), 'title'): log_message('message ' * (1 if i < 10 else 2000))\n"
    code += f"open({str(tmp_path / 'end')!r}, 'w').write('reached')"
    done = run_code(code, f"{redirection}; exit ${{PIPESTATUS[0]}}")
    assert (tmp_path / "end").read_text() == "reached"
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
    code = f"guard_streams()\nfile = open({str(tmp_path / 'file')!r}, 'w'); import os; os.write(2, b'x')\n"
    code += "sys.stdout.write('x'), sys.stderr.write('x'), print(file.fileno(), file=file)"
    assert run_code(code, "<&- >&- 2>&-").returncode == 0
    assert int((tmp_path / "file").read_text()) > 2


@pytest.mark.parametrize("text", ["\x1b[31mred", "back\rover", "\x9b1m", "\u202ereversed", "\ud800", "\x00", "\x7f"])
def test_control_characters_are_escaped(text, capsys):
    log_message(f"sample: {text}")
    shown = capsys.readouterr().out
    assert shown == f"sample: {printable(text)}\n"
    assert printable(text).isascii() and "\\" in printable(text)


def test_ordinary_text_stays_as_it_is(capsys):
    text = "tab\there, 中文、かな\u3000, עברית\u200f, 👩\u200d💻, \\x1b\nnext line"
    assert printable(text) == text
    assert printable("one\ntwo\nthree", indent="  ") == "one\n  two\n  three"


class Terminal(io.StringIO):
    """A terminal whose reader may be gone."""

    def __init__(self, error: Exception | None = None):
        super().__init__()
        self.error = error

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "I/O error"), ValueError("closed")])
def test_a_bar_on_a_terminal_that_is_gone_stops_nothing(error, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal(error))
    monkeypatch.setattr(sys, "stdout", Terminal(error))
    done = []
    for i in progress(range(3), "title"):
        log_message("message")
        done.append(i)
    bar = progress_bar("training", total=1)
    bar.update()
    bar.set_postfix(loss="0.5")
    bar.close()
    assert done == [0, 1, 2]


def test_a_bar_is_drawn_and_cleared_for_a_message(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    for _ in progress(range(3), "title"):
        log_message("message")
    written = terminal.getvalue()
    assert "title:   0%" in written and "\rmessage\n\r" in written


def test_without_a_terminal_progress_is_a_message_every_ten_seconds(monkeypatch, capsys):
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    assert list(progress(range(5), "title")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out.splitlines() == ["title: 1/5, 0.1 per second", "title: 3/5, 0.1 per second"]


def test_prefetch_yields_everything_in_order_and_runs_so_far_ahead():
    """One is taken, two wait, and the thread holds the next: no more, whatever the time."""
    made = []
    items = prefetch((made.append(i) or i for i in range(6)), ahead=2)
    assert next(items) == 0
    deadline = time.monotonic() + 60
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 4
    assert list(items) == [1, 2, 3, 4, 5]


def test_an_exception_while_prefetching_reaches_the_caller():
    def broken():
        yield 1
        raise UserError("row 7")

    items = prefetch(broken())
    assert next(items) == 1
    with pytest.raises(UserError, match="row 7"):
        next(items)
