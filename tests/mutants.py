"""Mutation testing: change the code in small ways, and see whether a test fails.

python tests/mutants.py --share 0.02           a random sample of the mutants of every module, drawn with --seed
python tests/mutants.py --only losses          all mutants of the modules whose name contains losses
python tests/mutants.py                        all mutants, which takes a night

mutmut makes the mutants in the folder mutants/, in which it also keeps their results; [tool.mutmut] in pyproject.toml
chooses modules and tests. Prints a table, and each mutant that no test killed with its change.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KILLED = ("killed", "timeout", "segfault", "caught by type check")


def mutmut(*arguments: str) -> str:
    """Run mutmut and return what it prints."""
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def generate() -> list[str]:
    """Make all mutants, run the tests once on unchanged code, and return the mutants' names."""
    mutmut("run", "no such mutant")  # ends once everything is prepared
    files = sorted((ROOT / "mutants").rglob("*.meta"))
    return [name for path in files for name in json.loads(path.read_text())["exit_code_by_key"]]


def results() -> dict[str, str]:
    """Return {name: status} of all mutants that have run."""
    lines = re.findall(r"^\s*(\S+__mutmut_\d+): (.+)$", mutmut("results", "--all", "true"), re.MULTILINE)
    return {name: status for name, status in lines if status != "not checked"}


def table(statuses: dict[str, str]) -> str:
    """Return a Markdown table with a row per module and their sum."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, status in statuses.items():
        for module in (name.rpartition(".")[0], "all"):
            counts[module]["killed" if status in KILLED else status] += 1
    columns = ["killed", *sorted({status for row in counts.values() for status in row} - {"killed"})]
    lines = [f"| module | mutants | {' | '.join(columns)} | share killed |", "|---" * (len(columns) + 3) + "|"]
    for module, row in sorted(counts.items(), key=lambda item: (item[0] == "all", item[0])):
        numbers = " | ".join(str(row[column]) for column in columns)
        lines.append(f"| {module} | {row.total()} | {numbers} | {row['killed'] / row.total():.1%} |")
    return "\n".join(lines)


def main() -> None:
    """Run the chosen mutants and print what became of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="share of the mutants that run, 0 to 1")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", default="", help="part of the names of the modules")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    options = parser.parse_args()
    names = [name for name in generate() if options.only in name.rpartition(".")[0]]
    chosen = random.Random(options.seed).sample(names, max(1, round(options.share * len(names))))
    output = mutmut("run", "--max-children", str(options.jobs), *chosen)
    statuses = {name: status for name, status in results().items() if name in set(chosen)}
    if len(statuses) < len(chosen):
        sys.exit(f"{len(chosen) - len(statuses)} of {len(chosen)} mutants did not run:\n{output[-5000:]}")
    print(table(statuses))
    survivors = sorted(name for name, status in statuses.items() if status not in KILLED)
    for name in survivors:
        changes = [line for line in mutmut("show", name).splitlines() if re.match(r"[-+](?![-+])", line)]
        print("\n".join(["", f"{name}: {statuses[name]}", *changes]))


if __name__ == "__main__":
    main()
