"""Writes a report of runs as an HTML page, or lists evaluation pairs with likely wrong labels.

RUN is a run directory, or the exported model in it: RUN/LATEST/hf.

python -m tools.report RUN                write RUN/report.html, as the run itself does at each evaluation
python -m tools.report RUN1 RUN2 …        write report.html here, with the curves of all runs in the same charts
python -m tools.report RUN --suspects     list the pairs whose reward margin stayed negative, the lowest first
"""

import argparse
from pathlib import Path

from dpo.reporting.page import run_files, suspects, write_report
from dpo.system.console import log_message
from dpo.system.errors import UserError, exit_on_error
from tools.candidates import is_model_folder


def find_run(path: Path) -> Path:
    """RUN, for RUN/LATEST/hf too; UserError if path is another model's folder."""
    if not is_model_folder(path):
        return path
    folder = path.absolute()
    run = folder.parents[1]
    if folder.name == "hf" and (run / "config.yaml").is_file():
        return run
    advice = f"python -m tools.diagnose policy={path} reference=FOLDER datasets=[pairs.jsonl] evaluates it"
    raise UserError(f"{path}: is a model's folder, which has no curves; {advice}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tools.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or RUN/LATEST/hf")
    parser.add_argument("--suspects", action="store_true", help="list likely wrong labels as tab-separated lines")
    options = parser.parse_args()
    runs = [run_files(find_run(path)) for path in options.runs]
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
