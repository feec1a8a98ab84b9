"""pyproject.toml, the requirements files, and what the code imports agree; the Makefile, and the installed command."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

CODE = [*ROOT.glob("*.py"), *ROOT.glob("dpo/**/*.py"), *ROOT.glob("tools/**/*.py"), *ROOT.glob("benchmarks/*.py")]
TESTS = [*ROOT.glob("tests/**/*.py")]
OWN = {path.stem for path in [*CODE, *TESTS]} | {"dpo", "tools"}
TOOLS = {"pytest-xdist", "setuptools", "ruff", "mypy", "types-pyyaml", "types-tqdm", "mutmut"}  # run, not imported
THROUGH_OTHERS = {"tensorboard", "bitsandbytes"}  # which torch.utils.tensorboard and transformers import
COMPARED = {"trl"}  # which one benchmark measures beside this project
FIXED = {"pydantic-core", "huggingface-hub"}  # parts of pydantic and transformers, which fix their versions


def read_requirements(name: str) -> dict[str, Requirement]:
    """Return {distribution: requirement} of a requirements file, without those of the files that it names."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return by_name(line for line in lines if line and not line.startswith("-"))


def by_name(lines) -> dict[str, Requirement]:
    """Return {distribution: requirement}."""
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def project() -> dict:
    """Return the [project] table."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def imported(paths) -> set[str]:
    """Return the distributions whose modules some files import at any depth."""
    modules = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module.partition(".")[0])
    found = packages_distributions()
    third_party = modules - OWN - set(sys.stdlib_module_names)
    return {canonicalize_name(name) for module in third_party for name in found.get(module, [module])}


@pytest.mark.parametrize("file, extra", [("requirements.txt", None), ("requirements-dev.txt", "dev")])
def test_pyproject_lists_what_make_installs_in_ranges_that_hold_its_pins(file, extra):
    table = project()
    declared = by_name(table["dependencies"] if extra is None else table["optional-dependencies"][extra])
    installed = read_requirements(file)
    assert declared.keys() == installed.keys()
    for name, requirement in installed.items():
        pins = [clause.version for clause in requirement.specifier if clause.operator == "=="]
        if pins:
            assert all(declared[name].specifier.contains(pin) for pin in pins), name
        else:
            assert declared[name].specifier == requirement.specifier, name


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-dev.txt"])
def test_constraints_pin_one_version_in_the_range_of_each_requirement(file):
    pinned = read_requirements("constraints.txt")
    assert {pin.operator for requirement in pinned.values() for pin in requirement.specifier} == {"=="}
    for name, requirement in read_requirements(file).items():
        if name != "torch":  # pinned by its requirement; its build differs from machine to machine
            (pin,) = pinned[name].specifier
            assert requirement.specifier.contains(pin.version), name


def test_the_lowest_and_the_pinned_version_of_torch_are_among_those_that_were_tested():
    tested = re.findall(r"^\| (\d+\.\d+\.\d+) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
    lowest, highest = (
        ".".join(version.split(".")[:2]) for version in (min(tested, key=Version), max(tested, key=Version))
    )
    declared = by_name(project()["dependencies"])["torch"]
    assert [clause.version for clause in declared.specifier if clause.operator == ">="] == [lowest]
    assert {clause.version for clause in read_requirements("requirements.txt")["torch"].specifier} <= set(tested)
    assert f"torch {lowest} to {highest};" in (ROOT / "README.md").read_text(encoding="utf-8")


def extras() -> dict[str, Requirement]:
    """Return {distribution: requirement} of what only some settings need."""
    table = project()["optional-dependencies"]
    return by_name(line for name, lines in table.items() if name != "dev" for line in lines)


def test_every_library_that_the_code_imports_is_a_dependency_or_an_extra_and_no_other_one_is():
    found = imported(CODE) - FIXED - COMPARED | THROUGH_OTHERS
    assert found == by_name(project()["dependencies"]).keys() | extras().keys()


def test_the_libraries_of_extras_are_imported_in_functions_alone_and_peft_is_installed_for_the_tests():
    assert by_name(project()["optional-dependencies"]["dev"])["peft"].specifier == extras()["peft"].specifier
    for path in CODE:
        tops = {node.module or "" for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)}
        tops |= {
            a.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import) for a in node.names
        }
        assert not {name.partition(".")[0] for name in tops} & extras().keys(), path


def test_dev_holds_the_libraries_that_only_tests_import_and_the_tools():
    table = project()
    libraries = imported(TESTS) - FIXED - by_name(table["dependencies"]).keys()
    assert libraries | TOOLS == by_name(table["optional-dependencies"]["dev"]).keys()


def test_mutation_testing_copies_every_module_and_names_files_that_exist():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]
    roots = {path.name for path in ROOT.glob("*.py")}
    assert roots <= {*options["also_copy"], *options["source_paths"]}
    tests = [name.removeprefix("--deselect=") for name in options["pytest_add_cli_args"]]
    named = [*options["only_mutate"], *options["also_copy"], *options["pytest_add_cli_args_test_selection"], *tests]
    assert [name for name in named if not (ROOT / name).exists()] == []


def pip(*arguments: str | Path) -> None:
    """Run pip without a network."""
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--no-input", *arguments]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Build the wheel from a copy, since a build writes into its sources."""
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"
    sources.mkdir()
    for path in (ROOT / "pyproject.toml", ROOT / "README.md", *ROOT.glob("*.py")):
        shutil.copy(path, sources)
    for name in ("config", "docs", "dpo", "tools"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, sources)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_every_module_template_and_config_file_and_nothing_else(wheel):
    code = [*ROOT.glob("*.py"), *ROOT.glob("dpo/**/*.py"), *ROOT.glob("dpo/**/*.jinja"), *ROOT.glob("tools/**/*.py")]
    config = [path for path in ROOT.glob("config/**/*.*") if path.suffix not in (".py", ".pyc")]
    expected = {path.relative_to(ROOT).as_posix() for path in code}
    expected |= {f"dpo/share/{path.relative_to(ROOT).as_posix()}" for path in config}
    assert {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name} == expected


def test_the_installed_command_helps_refuses_and_trains_from_any_folder(wheel, tmp_path):
    """Training starts a further process, whose code is that of the wheel too."""
    site, folder = tmp_path / "site", tmp_path / "any folder"
    pip("install", "--no-index", "--no-deps", "--target", site, wheel)
    folder.mkdir()
    pairs = [{"prompt": f"\n\nHuman: {i}?\n\nAssistant:", "chosen": " Yes.", "rejected": " No."} for i in range(10)]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    environment = os.environ | {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def dpo_train(*arguments: str) -> subprocess.CompletedProcess:
        command = [site / "bin" / "dpo-train", *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)

    page = dpo_train("--help").stdout
    assert "dpo-train loss=sft model=gpt2" in page and "train.py" not in page
    assert "loss=hinge" in dpo_train("loss=help").stdout
    refused = dpo_train("loss=dpo", "zebra=1")
    assert (refused.returncode, refused.stderr) == (
        2, "error: zebra: there is no such setting; `dpo-train --help` lists all of them\n",
    )  # fmt: skip
    done = dpo_train(
        "loss=sft", "model=tiny", "datasets=[pairs.jsonl]", "max_length=64", "max_prompt_length=32", "batch_size=2",
        "n_examples=2", "n_eval_examples=1", "sample_during_eval=false", "wandb.enabled=false", "device=cpu",
        "trainer=FSDPTrainer", "n_processes=1", "local_run_dir=run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (folder / "run" / "LATEST" / "hf" / "tokenizer.json").is_file() and (
        folder / "run" / "report.html"
    ).is_file()
