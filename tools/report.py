"""Runs as one HTML page, and the evaluation pairs that are likely mislabelled.

python -m tools.report RUN                write RUN/report.html, which a run also does by itself at each evaluation
python -m tools.report RUN1 RUN2 …        write report.html here, with the runs laid over each other
python -m tools.report RUN --suspects     list the pairs whose reward margin stayed negative, the worst first
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from dpo.reporting.page import run_files, suspects, write_report
from dpo.system.console import log_message
from dpo.system.errors import UserError, exit_on_error

if TYPE_CHECKING:
    pass


def main() -> None:
    """Write a report, or list suspects."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("--suspects", action="store_true", help="list likely wrong labels as tab-separated lines")
    options = parser.parse_args()
    runs = [run_files(path) for path in options.runs]
    if options.suspects:
        for run in runs:
            if not run.pairs:
                raise UserError(f"{run.path}: holds no pairs.jsonl with evaluated pairs")
            for pair in suspects(run.pairs):
                print(f"{pair.source}\t{pair.place}\t{pair.margin:.4g}")
        return
    path = runs[0].path / "report.html" if len(runs) == 1 else Path("report.html")
    write_report(path, runs)
    log_message(f"Wrote {path}")


if __name__ == "__main__":
    exit_on_error(main)
