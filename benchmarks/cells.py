"""Named measurements, each in a process of its own, which several calls of a program share through a file."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from composition import ROOT  # which adds the project's root to the path

from dpo.system.files import atomic_write
from tools.rounds.supervisor import supervised

Figures = dict[str, Any]  # numbers and texts by the heading of their column; under TEXT what is printed below the table
TEXT = "text"
MEASURED = "measured "  # begins the line with a cell's figures
MAX_LOG = 20_000  # characters of a cell's output that the log keeps


class Place(NamedTuple):
    """A cell's own folder, and the time in seconds since the epoch at which its process was started."""

    folder: Path
    started: float


@dataclass(frozen=True)
class Cell:
    """A measurement, a row of a table. seconds: what it takes, at a guess; it is stopped after twice as many."""

    table: str
    task: str
    way: str
    measure: Callable[[Place], Figures]
    seconds: int

    @property
    def name(self) -> str:
        return f"{self.task}: {self.way}"


class Row(NamedTuple):
    """What is known of a cell: how long it took, and its figures, or its error."""

    name: str
    seconds: float
    figures: Figures
    error: str = ""


def read_rows(folder: Path) -> dict[str, Row]:
    path = folder / "cells.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row.name: row for row in (Row(**json.loads(line)) for line in lines)}


def measure_missing(cells: Sequence[Cell], folder: Path, deadline: float, command: Sequence[str]) -> None:
    """Measure the cells that have no row and fit into the time that is left; write each row as soon as it is known.

    The command with a cell's name and the time calls measure_here. deadline is a time of time.monotonic().
    """
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        rows, left, limit = read_rows(folder), deadline - time.monotonic(), 2.0 * cell.seconds
        if cell.name in rows or left < cell.seconds:
            continue
        print(f"{cell.name} ...", file=sys.stderr, flush=True)
        row, output = run_alone(cell.name, [*command, cell.name, str(time.time())], min(limit, left))
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            log.write(f"\n=== {cell.name}\n{output[-MAX_LOG:]}")
        if row is None and limit <= left:
            row = Row(cell.name, limit, {}, f"stopped after {limit:.0f} s: {last_line(output)}")
        if row is not None:
            lines = [json.dumps(each._asdict()) + "\n" for each in (rows | {cell.name: row}).values()]
            atomic_write(folder / "cells.jsonl", "".join(lines).encode())


def run_alone(name: str, command: Sequence[str], limit: float) -> tuple[Row | None, str]:
    """Run a cell's command; return its row, None if it did not end within limit seconds, and what it printed.

    Nothing that it starts outlives this process: it would hold the GPU. All cells share compiled Python files, which
    not every machine keeps beside the sources. An error is the last line that a process prints, so nothing is buffered.
    Nothing is downloaded, and no library waits for a network that is not there.
    """
    variables = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    variables["PYTHONPYCACHEPREFIX"] = f"{tempfile.gettempdir()}/benchmark_bytecode"
    start, code = time.monotonic(), None
    with tempfile.TemporaryFile() as printed:
        streams = {"stdout": printed, "stderr": subprocess.STDOUT}
        with supervised(command, grace=0.0, env=os.environ | variables, **streams) as process:
            with suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        printed.seek(0)
        output = printed.read().decode(errors="replace")
    seconds = round(time.monotonic() - start, 1)
    if code is None:
        return None, output
    if code:
        return Row(name, seconds, {}, f"exit code {code}: {last_line(output)}"), output
    return Row(name, seconds, json.loads(output.rpartition(MEASURED)[2])), output


def measure_here(cells: Sequence[Cell], name: str, started: float, facts: Callable[[], Figures]) -> None:
    """Measure a cell in this process, and print its figures with facts about the machine."""
    (cell,) = (cell for cell in cells if cell.name == name)
    with tempfile.TemporaryDirectory() as folder:
        figures = cell.measure(Place(Path(folder), started))
    print(f"\n{MEASURED}{json.dumps(figures | facts())}", flush=True)


def run_program(place: Place, *arguments: str, verdict: int = 0, **environment: str) -> str:
    """Run a program of this project in the cell's folder, and return what it prints.

    RuntimeError if it fails; verdict is an exit code that is a result too.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    script = [str(ROOT / part) if part.endswith(".py") else part for part in arguments]
    done = subprocess.run([sys.executable, *script], cwd=place.folder, env=variables, stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    if done.returncode not in (0, verdict):
        raise RuntimeError(f"exit code {done.returncode}: {last_line(done.stdout)}")
    return done.stdout


def last_line(output: str) -> str:
    return next((line for line in reversed(output.splitlines()) if line.strip()), "no output")[:300]


def show_table(cells: Sequence[Cell], rows: Mapping[str, Row]) -> Iterator[str]:
    """The lines of a table in Markdown, grouped by task, and of the texts that belong to it."""
    tasks = dict.fromkeys(cell.task for cell in cells)
    grouped = [cell for task in tasks for cell in cells if cell.task == task]
    known = [(cell, rows[cell.name]) for cell in grouped if cell.name in rows]
    headings = list(dict.fromkeys(key for _, row in known for key in row.figures if key != TEXT)) or ["result"]
    if known:
        yield from ("", f"| {' | '.join(['what', 'way', *headings])} |", "|---" * (2 + len(headings)) + "|")
    for cell, row in known:
        values = [row.figures.get(heading, "") for heading in headings]
        shown = [value if isinstance(value, str) else f"{value:.4g}" for value in values]
        if row.error:
            shown = [f"failed: {row.error}".replace("|", "/"), *shown[1:]]
        yield f"| {' | '.join([cell.task, cell.way, *shown])} |"
    for cell, row in known:
        if row.figures.get(TEXT):
            yield from ("", f"{cell.name}:", "", row.figures[TEXT])


def show_missing(cells: Sequence[Cell], rows: Mapping[str, Row]) -> Iterator[str]:
    """Lines that name the cells without a row."""
    missing = [cell for cell in cells if cell.name not in rows]
    if missing:
        yield from ("", f"Missing, about {sum(cell.seconds for cell in missing) / 60:.0f} minutes:")
        yield from (f"- {cell.name}" for cell in missing)
