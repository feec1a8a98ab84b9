"""The rows of the table: what is promised, what was measured, and whether it is within its bound."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpo.system.errors import is_out_of_memory, summarize_error

PASS, FAIL, NOT_RUN = "pass", "FAIL", "not run"
COLUMNS = {"promise": 46, "measured": 18, "bound": 8, "result": 8}  # and their widths; the detail follows


class NotRun(Exception):
    """A check cannot be made with these settings or on this machine; the message says why."""


@dataclass(frozen=True)
class Row:
    """A promise, the figure measured, and its bound; None where nothing was measured. detail completes the figure."""

    promise: str
    status: str
    value: float | None = None
    bound: float | None = None
    unit: str = ""
    detail: str = ""

    @property
    def figure(self) -> str:
        return "" if self.value is None else f"{number(self.value)} {self.unit}".strip()


def measured(promise: str, value: float, bound: float, unit: str = "", detail: str = "") -> Row:
    """A row that passes if the value is at most the bound; NaN fails."""
    return Row(promise, PASS if value <= bound else FAIL, value, bound, unit, detail)


def number(value: float) -> str:
    if value == int(value) if math.isfinite(value) else False:
        return f"{int(value):,}"
    return f"{value:.2g}" if abs(value) < 1000 else f"{value:,.0f}"


def line(row: Row) -> str:
    """A row as a line of the table."""
    bound = "" if row.bound is None else f"<= {number(row.bound)}"
    return in_columns(row.promise, row.figure, bound, row.status) + row.detail


def heading() -> str:
    return in_columns(*COLUMNS).rstrip()


def in_columns(*cells: str) -> str:
    return "".join(f"{cell:<{width}}  " for cell, width in zip(cells, COLUMNS.values(), strict=True))


def count(rows: Sequence[Row], status: str) -> int:
    return sum(row.status == status for row in rows)


def summary(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """One line to copy into an issue."""
    failed = ", ".join(f"{row.promise} {row.figure}".strip() for row in rows if row.status == FAIL)
    counts = f"{count(rows, PASS)} pass, {count(rows, FAIL)} fail, {count(rows, NOT_RUN)} not run"
    facts = ", ".join(f"{name} {value}" for name, value in about.items())
    return f"verify: {counts}{f': {failed}' if failed else ''}; {facts}"


def as_json(rows: Sequence[Row], about: dict[str, Any]) -> str:
    """The same as JSON; a figure that is not finite becomes null."""
    records = [asdict(row) for row in rows]
    for record in records:
        for key in ("value", "bound"):
            if record[key] is not None and not math.isfinite(record[key]):
                record[key] = None
    return json.dumps({"about": about, "rows": records}, indent=2) + "\n"


def complete(promises: Sequence[str], rows: Iterator[Row]) -> Iterator[Row]:
    """Yield a row for each promise, also where they end with an error: it fails those that are missing."""
    missing = dict.fromkeys(promises)
    try:
        for row in rows:
            del missing[row.promise]
            yield row
        assert not missing, f"no row for {', '.join(missing)}"
    except NotRun as error:
        yield from (Row(promise, NOT_RUN, detail=" ".join(str(error).split())) for promise in missing)
    except Exception as error:
        status = NOT_RUN if is_out_of_memory(error) else FAIL
        detail = f"{type(error).__name__}: {summarize_error(error)}"
        yield from (Row(promise, status, detail=detail) for promise in missing)
