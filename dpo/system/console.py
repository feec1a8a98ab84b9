"""Messages and progress on the console, which no text and no closed terminal can break; work done ahead in a thread.

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

# Control characters but for newline and tab, line separators, changes of the writing direction, halves of characters.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, indent: str = "") -> str:
    r"""Escape what a terminal would obey, as in \x1b, and begin every line but the first with indent.

    Newlines and tabs stay. With an indent, text from data cannot look like a line of the program's own.
    """
    escaped = UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
    return escaped.replace("\n", f"\n{indent}")


def write_text(stream: TextIO | None, text: str) -> None:
    """Write and flush text, unencodable characters escaped; a stream that is closed or fails is ignored."""
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
    """Drop what a stream could not write: Python would try it again as it exits, fail, and exit with code 120."""
    descriptor = stream.fileno()
    kept = os.dup(descriptor)
    discard(descriptor)
    stream.flush()
    os.dup2(kept, descriptor)
    os.close(kept)


def discard(descriptor: int) -> None:
    """Make /dev/null of a file descriptor."""
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def guard_streams() -> None:
    """Make stdin, stdout and stderr safe for all code of this process; call it first in a program.

    A closed one becomes /dev/null, else its number would go to the next file that is opened, which messages would then
    corrupt. What stdout cannot encode is escaped.
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
    """Stands for stderr on one of several ranks: each line begins with the rank, and no bar is drawn there."""

    def __init__(self, stream: TextIO, rank: str):
        self.stream, self.prefix = stream, f"[rank {rank}] "
        self.at_start = True

    def write(self, text: str) -> int:
        """Write text, with the rank before each of its lines."""
        lines = text.splitlines(keepends=True)
        parts = [line if i == 0 and not self.at_start else self.prefix + line for i, line in enumerate(lines)]
        self.at_start = text.endswith("\n") if text else self.at_start
        self.stream.write("".join(parts))
        return len(text)

    def isatty(self) -> bool:
        """Return False: several processes would draw over each other's bars."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def mark_rank(rank: str) -> None:
    """Let any rank but the main one, 0, print nothing but errors, and these with its number."""
    if rank != "0":
        discard(1)
        sys.stderr = RankOutput(sys.stderr, rank)


def log_message(message: str) -> None:
    """Print a message to stdout, above a progress bar if one is drawn, with control characters escaped."""
    tqdm = sys.modules.get("tqdm")  # imported if there is a bar
    with tqdm.tqdm.external_write_mode(file=sys.stdout) if tqdm else nullcontext():
        write_text(sys.stdout, f"{printable(message)}\n")


class BarOutput:
    """Stands for a text stream in a tqdm bar, which would raise where the stream fails."""

    def __init__(self, stream: TextIO | None):
        self.stream = stream

    def write(self, text: str) -> None:
        """Write text; never fails."""
        write_text(self.stream, text)

    def flush(self) -> None:
        """Do nothing: every write is flushed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def __eq__(self, other: object) -> bool:  # so that tqdm clears the bar where a message is printed
        return self.stream is getattr(other, "stream", other)


def on_terminal() -> bool:
    """Return whether progress bars can be drawn, which needs stderr to be a terminal."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


def progress_bar(title: str, unit: str = "it", total: int | None = None, initial: int = 0) -> "tqdm[NoReturn]":
    """Return a tqdm bar on stderr, which shows nothing where that is not a terminal and never fails."""
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
    """Yield the items under a progress bar, or, where stderr is not a terminal, with a message every 10 seconds."""
    total = len(items) if total is None and isinstance(items, Sized) else total
    bar = progress_bar(title, total=total) if not silent and on_terminal() else None
    start = shown = time.monotonic()
    try:
        for done, item in enumerate(items):
            now = time.monotonic()
            if bar is None and not silent and now - shown >= 10:
                shown = now
                log_message(f"{title}: {done}/{total or '?'}, {done / (now - start):.1f} per second")
            yield item
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()


def prefetch(items: Iterable[T], ahead: int = 2) -> Iterator[T]:
    """Yield the items, of which a thread makes up to `ahead` while the caller works; its exceptions are raised here."""
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
