"""The order of the packages: which module may import which."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

ORDER = ("system", "settings", "data", "model", "distributed", "runs", "training", "reporting")  # from bottom to top
TOP = ("tools.rounds", "benchmarks")  # stand above all else
CODE = sorted(path for glob in ("*.py", "dpo/**/*.py", "tools/**/*.py", "benchmarks/*.py") for path in ROOT.glob(glob))


def module_name(path: Path) -> str:
    """Return the name by which a file is imported: train, dpo.model.logps, and dpo.model for its __init__.py."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in CODE}


def imported(path: Path) -> set[str]:
    """Return the modules of this project that a file imports: at its top, in a function, or for type checkers alone."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names & MODULES.keys()


GRAPH = {name: imported(path) - {name} for name, path in MODULES.items()}


def level(module: str) -> int:
    """Return the place of a module's package in ORDER; what is not in the engine stands above all of it."""
    folder, *rest = module.split(".")
    if folder == "dpo" and rest:
        return ORDER.index(rest[0])
    return len(ORDER) + module.startswith(TOP)


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Return the imports of what stands above the module that imports it."""
    return sorted(
        f"{name} imports {other}" for name, others in graph.items() for other in others if level(other) > level(name)
    )


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


def test_a_package_imports_only_packages_below_it_the_engine_neither_root_nor_tools_and_nothing_the_rounds():
    assert sum(len(others) for name, others in GRAPH.items() if name.startswith("dpo.")) > 100  # the graph was read
    assert upward(GRAPH) == []


def test_an_import_upward_would_be_found_wherever_it_stands(tmp_path):
    graph = {
        "dpo.data.rows": {"dpo.model.logps", "dpo.system.errors", "dpo.data.chat", "trainers", "tools.report"},
        "tools.report": {"tools.rounds.report", "tools.compare", "train"},
        "tools.rounds.report": {"tools.rounds.store", "tools.report", "dpo.data.rows"},
    }
    assert upward(graph) == [
        *(f"dpo.data.rows imports {name}" for name in ("dpo.model.logps", "tools.report", "trainers")),
        "tools.report imports tools.rounds.report",
    ]
    lines = ["if TYPE_CHECKING:", "    import trainers", "def f():", "    from dpo.model import logps", ""]
    (tmp_path / "rows.py").write_text("\n".join(lines))
    assert imported(tmp_path / "rows.py") == {"trainers", "dpo.model", "dpo.model.logps"}


def test_every_package_has_its_place_in_the_order_and_an_init_with_a_docstring_alone():
    packages = {path.parent for path in CODE if path.name == "__init__.py"}
    assert packages == {
        *(ROOT / name for name in ("dpo", "tools", "tools/diagnose", "tools/rounds", "tools/verify")),
        *(ROOT / "dpo" / name for name in ORDER),
    }
    assert {path.parent for path in CODE if path.relative_to(ROOT).parts[0] in ("dpo", "tools")} <= packages
    for package in packages:
        (docstring,) = ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body
        assert isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant), package


def test_no_imports_form_a_circle():
    assert find_circle(GRAPH) == []


def test_a_circle_would_be_found():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_tests_lie_in_the_folder_of_the_package_that_they_test():
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").glob("**/test_*.py")}
    assert folders == {Path(), Path("tools"), Path("tools/rounds"), *(Path("dpo", name) for name in ORDER)}
    names = [path.name for path in (ROOT / "tests").glob("**/test_*.py")]
    assert len(names) == len(set(names))  # pytest imports a file by its name


def test_no_rank_is_compared_outside_of_the_modules_that_distribute():
    pattern = re.compile(r"\brank\s*(==|!=)\s*0|\bget_rank\(")
    allowed = {"process_group.py", "rendezvous.py", "metrics.py", "checkpoints.py"}
    assert [path.name for path in CODE if path.name not in allowed and pattern.search(path.read_text())] == []


def test_settings_losses_and_the_command_line_are_imported_without_torch():
    """What answers help and typing errors at once; losses and settings are what typing errors are checked against."""
    slow = {"torch", "transformers", "numpy", "datasets", "wandb", "tqdm"}
    settings = ", ".join(name for name in MODULES if name.startswith("dpo.settings"))
    code = f"import sys, train, losses, {settings}; print(*({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
