"""Messages and progress bars that no text and no closed terminal can break; work done ahead in a thread.

tqdm is imported where a bar is drawn: it is slow to import, and errors and signals are handled before that.
"""

import os
import queue
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")

# Control characters except newline and tab, line separators, changes of the writing direction, lone surrogates.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, indent: str = "") -> str:
    r"""Escape what a terminal would obey, as in \x1b, and begin every line but the first with indent.

    Newlines and tabs stay. With an indent, text from data cannot pass for a line of the program.
    """
    escaped = UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
    return escaped.replace("\n", f"\n{indent}")


def write_text(stream: TextIO | None, text: str) -> None:
    """Write and flush text, with unencodable characters escaped; ignore a stream that is closed or fails."""
    if stream is None:
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except OSError:
        with suppress(OSError, ValueError):
            drop_buffer(stream)
    except ValueError:  # closed
        pass


def drop_buffer(stream: TextIO) -> None:
    """Drop what a stream could not write; else Python tries again at its exit, fails, and exits with code 120."""
    descriptor = stream.fileno()
    original = os.dup(descriptor)
    discard(descriptor)
    stream.flush()
    os.dup2(original, descriptor)
    os.close(original)


def discard(descriptor: int) -> None:
    """Point a file descriptor to /dev/null."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def guard_streams() -> None:
    """Make stdin, stdout and stderr safe for all code of this process; call it first in a program.

    A closed one becomes /dev/null. Otherwise the next file that is opened would get its number, and messages would
    corrupt that file. What stdout cannot encode is escaped.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            discard(descriptor)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


class RankOutput:
    """Replaces stderr on one of several ranks: each line begins with the rank, and no progress bar is drawn."""

    def __init__(self, stream: TextIO, rank: str):
        self.stream, self.prefix = stream, f"[rank {rank}] "
        self.at_start = True

    def write(self, text: str) -> int:
        lines = text.splitlines(keepends=True)
        parts = [line if i == 0 and not self.at_start else self.prefix + line for i, line in enumerate(lines)]
        self.at_start = text.endswith("\n") if text else self.at_start
        self.stream.write("".join(parts))
        return len(text)

    def isatty(self) -> bool:
        return False  # several processes would draw over each other's bars

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def mark_rank(rank: str) -> None:
    """Silence every rank but the main one, 0, apart from errors, which begin with the rank."""
    if rank != "0":
        discard(1)
        sys.stderr = RankOutput(sys.stderr, rank)


def log_message(message: str) -> None:
    """Print a message to stdout, above the progress bar if one is drawn, with control characters escaped."""
    write_above_bar(f"{printable(message)}\n")


def write_above_bar(text: str) -> None:
    tqdm = sys.modules.get("tqdm")  # imported if there is a bar
    with tqdm.tqdm.external_write_mode(file=sys.stdout) if tqdm else nullcontext():
        write_text(sys.stdout, text)


def log_warning(warning: str) -> None:
    """Print a warning, in yellow on a terminal unless NO_COLOR is set."""
    line = printable(f"Warning: {warning}")
    if in_color():
        write_above_bar(f"\033[33m{line}\033[0m\n")
    else:
        write_above_bar(f"{line}\n")


def in_color() -> bool:
    """Whether stdout is a terminal that shows colors."""
    try:
        return sys.stdout is not None and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    except ValueError:  # closed
        return False


class BarOutput:
    """Replaces a text stream in a tqdm bar, which would raise where the stream fails."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream

    def write(self, text: str) -> None:
        write_text(self.stream, text)

    def flush(self) -> None:
        pass  # every write is flushed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __eq__(self, other: object) -> bool:  # so that tqdm clears the bar where a message is printed
        return self.stream is getattr(other, "stream", other)


def on_terminal() -> bool:
    """Whether progress bars can be drawn: stderr must be a terminal."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def progress_bar(title: str, unit: str = "it", total: int | None = None, initial: int = 0) -> "tqdm[NoReturn]":
    """Make a tqdm bar on stderr, which never fails, and shows nothing if stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(
        desc=title,
        unit=unit,
        total=total,
        initial=initial,
        file=BarOutput(sys.stderr),
        disable=not on_terminal(),
        dynamic_ncols=True,
        leave=False,
    )


def progress(items: Iterable[T], title: str, total: int | None = None, silent: bool = False) -> Iterator[T]:
    """Yield the items under a progress bar, or with a message every 10 seconds if stderr is not a terminal."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    bar = progress_bar(title, total=total) if not silent and on_terminal() else None
    start = last_message = time.monotonic()
    try:
        for done, item in enumerate(items):
            now = time.monotonic()
            if bar is None and not silent and now - last_message >= 10:
                last_message = now
                log_message(f"{title}: {done}/{total or '?'}, {done / (now - start):.1f} per second")
            yield item
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()


def prefetch(items: Iterable[T], ahead: int = 2) -> Iterator[T]:
    """Yield the items; a thread makes up to `ahead` of them in advance, and its exceptions are raised here."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stopped.is_set():
            try:
                return ready.put((kind, value), timeout=0.1)
            except queue.Full:
                pass

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:  # whatever it is, it belongs to the caller
            put("error", error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()
