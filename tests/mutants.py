"""Mutation testing: change the code in small ways, and see whether a test fails.

python tests/mutants.py --share 0.02           a random sample of the mutants of every module, drawn with --seed
python tests/mutants.py --only losses packing  all mutants of the modules whose name contains one of these
python tests/mutants.py                        all mutants

mutmut makes the mutants in the folder mutants/ and learns which tests reach which function; [tool.mutmut] in
pyproject.toml chooses modules and tests. The mutants run here, because mutmut collects the tests again for each of
them: tests are collected once, and each mutant meets those that reach it in a forked child, until one fails: first the
tests of its own module, then the others, in both the fastest first (by powers of 2, so that tests that share a fixture
stay together), and as many as take --seconds on the unchanged code. Prints a table, and each mutant that no test killed
with its change.
"""

import argparse
import gc
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tomllib
from collections import Counter, defaultdict
from itertools import accumulate, zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SPARE_SECONDS = 30  # for a mutant, beside five times what its tests take on the unchanged code
STATUSES = {0: "survived", 1: "killed", 5: "no tests"}  # another exit code: killed, it crashed or ran out of its time


def mutmut(*arguments: str) -> str:
    """Run mutmut and return what it prints."""
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def generate() -> list[str]:
    """Make all mutants, run the tests once on unchanged code, and return the mutants' names."""
    output = mutmut("run", "no such mutant")  # ends once everything is prepared
    if not (ROOT / "mutants" / "mutmut-stats.json").exists():
        sys.exit(output[-5000:])
    files = sorted((ROOT / "mutants").rglob("*.meta"))
    return [name for path in files for name in json.loads(path.read_text())["exit_code_by_key"]]


class Runner:
    """A plugin of pytest: in place of running the tests it has collected, runs them on each mutant."""

    def __init__(self, names: list[str], jobs: int, seconds: float):
        self.names, self.jobs, self.seconds = names, jobs, seconds
        stats = json.loads((ROOT / "mutants" / "mutmut-stats.json").read_text())
        self.reaching: dict[str, list[str]] = stats["tests_by_mangled_function_name"]
        self.durations: dict[str, float] = stats["duration_by_test"]  # without their fixtures
        self.place: dict[str, int] = {}
        self.statuses: dict[str, str] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Fork a child per mutant, several at a time, and keep how each ended.

        The tests run once before, so that children find imported what they import, and fixtures of the whole session.
        """
        items = {item.nodeid: item for item in session.items}
        self.place = {name: i for i, name in enumerate(items)}
        chosen = {test for name in self.names for test in self.tests(name)}
        self.durations = {}
        self.run_tests(session, [item for item in session.items if item.nodeid in chosen])
        if session.testsfailed:
            raise session.Failed("a test fails on the unchanged code")
        control = os.fork()
        if control == 0:
            self.be_mutant("", session, [items[test] for test in items if test in chosen])
        if os.waitstatus_to_exitcode(os.waitpid(control, 0)[1]) != 0:
            raise session.Failed("a test fails on the unchanged code in a forked child, where it runs once more")
        gc.freeze()  # else each child would copy the memory of all objects, to count them
        running: dict[int, str] = {}
        for name in [*self.names, *[""] * self.jobs]:
            if name:
                pid = os.fork()
                if pid == 0:
                    self.be_mutant(name, session, [items[test] for test in self.tests(name)])
                running[pid] = name
            if running and (not name or len(running) == self.jobs):
                pid, status = os.wait()
                ended = STATUSES.get(os.waitstatus_to_exitcode(status), "killed")
                self.statuses[running[pid]] = ended
                print(f"{len(self.statuses)} {running.pop(pid)}: {ended}", file=sys.__stderr__, flush=True)
        return True

    def tests(self, name: str) -> list[str]:
        """Return the tests that a mutant meets, in their order."""
        function = name.rpartition("__mutmut_")[0]
        own = f"/test_{function.split('.x')[0].rpartition('.')[2]}.py::"
        reaching = [test for test in self.reaching.get(function, []) if test in self.place and test in self.durations]
        order = sorted(
            reaching, key=lambda test: (own not in test, math.frexp(self.durations[test])[1], self.place[test])
        )
        sums = accumulate(map(self.durations.__getitem__, order), initial=0.0)  # of those before each
        return [test for test, before in zip(order, sums, strict=False) if before < self.seconds]

    def be_mutant(self, name: str, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Run tests on a mutant until one fails; never returns."""
        signal.alarm(SPARE_SECONDS + round(5 * sum(self.durations[item.nodeid] for item in items)))
        os.environ["MUTANT_UNDER_TEST"] = name
        code = 1
        try:
            self.run_tests(session, items)
            code = 1 if session.testsfailed else 0 if items else 5
        finally:
            os._exit(code)

    def run_tests(self, session: pytest.Session, items: list[pytest.Item]) -> None:
        """Run tests until one fails."""
        for item, following in zip_longest(items, items[1:]):
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if session.testsfailed:
                return

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep how long a test takes with its fixtures, and name one that fails on the unchanged code."""
        if report.failed and not os.environ["MUTANT_UNDER_TEST"]:
            print(f"{report.nodeid} fails on the unchanged code", file=sys.__stderr__)
        self.durations[report.nodeid] = self.durations.get(report.nodeid, 0.0) + report.duration


def run(names: list[str], jobs: int, seconds: float) -> dict[str, str]:
    """Run mutants, and return {name: status}."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    os.chdir(ROOT / "mutants")
    sys.path[:0] = [str(ROOT / "mutants")]
    runner = Runner(names, jobs, seconds)
    chosen = [*options["pytest_add_cli_args_test_selection"], *options["pytest_add_cli_args"]]
    os.environ["MUTANT_UNDER_TEST"] = ""
    pytest.main(
        ["--rootdir=.", "-q", "-p", "no:cacheprovider", "--capture=sys", "--no-summary", *chosen], plugins=[runner]
    )
    os.chdir(ROOT)
    return runner.statuses


def table(statuses: dict[str, str]) -> str:
    """Return a Markdown table with a row per module and their sum."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for name, status in statuses.items():
        for module in (name.rpartition(".")[0], "all"):
            counts[module][status] += 1
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
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of the modules")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--seconds", type=float, default=10.0, help="that a mutant's tests take, unless it is killed")
    options = parser.parse_args()
    names = [name for name in generate() if any(part in name.rpartition(".")[0] for part in options.only)]
    chosen = random.Random(options.seed).sample(names, max(1, round(options.share * len(names))))
    statuses = run(sorted(chosen), options.jobs, options.seconds)
    if len(statuses) < len(chosen):
        sys.exit(f"{len(chosen) - len(statuses)} of {len(chosen)} mutants did not run")
    print(table(statuses))
    for name in sorted(name for name, status in statuses.items() if status != "killed"):
        changes = [line for line in mutmut("show", name).splitlines() if re.match(r"[-+](?![-+])", line)]
        print("\n".join(["", f"{name}: {statuses[name]}", *changes]))


if __name__ == "__main__":
    main()
