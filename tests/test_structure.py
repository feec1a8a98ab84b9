"""The house: which module may import which, and how long files, classes and functions may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

CODE = sorted(path for folder in (".", "dpo", "benchmarks") for path in (ROOT / folder).glob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in CODE}  # train, dpo.logps
LIMITS = {"file": 350, "class": 250, "function": 60}


def parse(path: Path) -> ast.Module:
    """Return a file's syntax tree without what only type checkers see."""
    tree = ast.parse(path.read_text())
    return WithoutTypeChecking().visit(tree)


class WithoutTypeChecking(ast.NodeTransformer):
    """Removes the blocks `if TYPE_CHECKING:`."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        is_typing = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        return None if is_typing else self.generic_visit(node)


def imported(path: Path) -> set[str]:
    """Return the modules of this project that a file imports, at its top or in a function."""
    names: set[str] = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES.keys()


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle of imports, or an empty list."""
    finished: set[str] = set()

    def search(path: list[str]) -> list[str]:
        for name in sorted(graph[path[-1]]):
            if name in path:
                return [*path[path.index(name) :], name]
            if name not in finished and (circle := search([*path, name])):
                return circle
        finished.add(path[-1])
        return []

    return next((circle for name in graph if name not in finished and (circle := search([name]))), [])


def sizes() -> dict[str, list[tuple[int, str]]]:
    """Return the numbers of lines of files, classes and functions, each list from the smallest to the largest."""
    found: dict[str, list[tuple[int, str]]] = {kind: [] for kind in LIMITS}
    for path in CODE:
        found["file"].append((len(path.read_text().splitlines()), path.name))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                found[kind].append((node.end_lineno - node.lineno + 1, f"{path.name}: {node.name}"))
    return {kind: sorted(lengths) for kind, lengths in found.items()}


def test_the_engine_never_imports_from_the_root():
    engine = {name: path for name, path in MODULES.items() if name.startswith("dpo.")}
    upwards = {name: imported(path) - engine.keys() for name, path in engine.items()}
    assert len(engine) > 20
    assert {name: found for name, found in upwards.items() if found} == {}


def test_no_imports_form_a_circle():
    graph = {name: imported(path) - {name} for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > 50  # the graph was read
    assert find_circle(graph) == []


def test_a_circle_would_be_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("kind", LIMITS)
def test_files_classes_and_functions_stay_small(kind, report):
    lengths = sizes()[kind]
    report(f"the longest {kind}: {lengths[-1][0]} lines, {lengths[-1][1]}")
    assert [found for found in lengths if found[0] > LIMITS[kind]] == []


def test_no_rank_is_compared_outside_of_the_modules_that_distribute():
    pattern = re.compile(r"\brank\s*(==|!=)\s*0|\bget_rank\(")
    allowed = {"distributed.py", "rendezvous.py", "metrics.py", "checkpoints.py"}
    assert [path.name for path in CODE if path.name not in allowed and pattern.search(path.read_text())] == []


def test_settings_losses_and_the_command_line_are_imported_without_torch():
    """What answers help and typing errors at once; losses and settings are what typing errors are checked against."""
    slow = {"torch", "transformers", "numpy", "datasets", "wandb", "tqdm"}
    code = f"import sys, train, losses, dpo.settings; print(*({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
