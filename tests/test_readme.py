"""The README's commands, paths and promises, and the commands that the original's users type."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, compose, compose_files, make_loss, validated
from faults import command_line, run_code
from omegaconf import OmegaConf

import preference_datasets
from dpo.system.errors import UserError
from losses import LOSSES
from tools.rounds.__main__ import written_out
from tools.rounds.settings import validate_config
from train import compose as compose_rounds
from utils import register_resolvers

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CODE = PAGES[ROOT / "docs" / "code.md"]
SOURCES = [*ROOT.glob("*.py"), *ROOT.glob("dpo/**/*.py"), *ROOT.glob("tools/**/*.py")]
BLOCKS = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
COMMAND = re.compile(r"^(?: {4})?python train\.py (.+)$|`python train\.py ([^`]+)`", re.MULTILINE)
COMMANDS = sorted({a or b for text in PAGES.values() for a, b in COMMAND.findall(text)})
ORIGINAL = [
    "model=pythia69 datasets=[hh] loss=sft exp_name=NAME gradient_accumulation_steps=2 batch_size=64 "
    "eval_batch_size=32 trainer=FSDPTrainer sample_during_eval=false",
    "model=blank_model model.name_or_path=PATH model.block_name=LlamaDecoderLayer datasets=[hh,shp] loss=sft "
    "exp_name=NAME gradient_accumulation_steps=2 batch_size=64 eval_batch_size=32 trainer=FSDPTrainer "
    "sample_during_eval=false",
    "model=pythia69 datasets=[hh] loss=dpo loss.beta=0.1 model.archive=RUN/step-XXXX/policy.pt exp_name=NAME "
    "gradient_accumulation_steps=2 batch_size=32 eval_batch_size=32 trainer=FSDPTrainer sample_during_eval=false",
    "model=pythia28 datasets=[hh] loss=dpo loss.beta=0.1 model.fsdp_policy_mp=bfloat16 trainer=FSDPTrainer "
    "model.archive=RUN/LATEST/policy.pt sample_during_eval=false",
    "model=gpt2 loss=dpo loss.label_smoothing=0.1",
    "model=gpt2 loss=ipo loss.beta=0.1",
    "model=gpt2 loss=dpo loss.reference_free=true",
    "model=gpt2 loss=dpo activation_checkpointing=true",
]


def problems_of(command: str) -> list[str]:
    """Compose a command line and return what its settings are refused for, but for files that only its reader has."""
    try:
        validated(*shlex.split(command))
    except UserError as error:
        return [line for line in str(error).splitlines() if "no such file" not in line]
    return []


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 10 and len(BLOCKS) >= 3


# Of the others, see test_resume.py, test_help.py and the tests of sweeps in test_train.py.
@pytest.mark.parametrize("command", [c for c in COMMANDS if not re.search("resume=|=help|--help|^-m ", c)])
def test_every_command_of_the_pages_composes_and_validates(command):
    assert problems_of(command) == []


ROUNDS = re.compile(r"^(?: {4})?python -m tools\.rounds (.+)$", re.MULTILINE)


@pytest.mark.parametrize("command", sorted({c for text in PAGES.values() for c in ROUNDS.findall(text)}))
def test_every_command_of_rounds_composes_and_validates(command):
    if command.startswith("resume="):
        pytest.skip("test_rounds_loop.py resumes")
    register_resolvers()
    arguments = [part for argument in shlex.split(command) for part in written_out(argument)]
    try:
        validate_config(compose_rounds("rounds", arguments, ()))
    except UserError as error:
        assert [line for line in str(error).splitlines() if "no such file" not in line] == []


def test_each_run_of_the_pages_sweeps_composes_and_validates():
    sweeps = [command.removeprefix("-m ") for command in COMMANDS if command.startswith("-m ")]
    assert len(sweeps) == 3
    for command in sweeps:
        (values,) = re.findall(r"=([\d.]+(?:,[\d.]+)+)", command)
        for value in values.split(","):
            assert problems_of(command.replace(values, value)) == []


def test_the_readmes_answers_to_names_of_other_trainers_are_what_is_printed():
    block = re.search(r"```\n\$ python (train\.py .*?)\n(error: .*?)```", README, re.DOTALL)
    command = [sys.executable, *shlex.split(block[1])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, block[2])


def test_the_table_of_losses_has_all_of_them_with_what_they_need_and_their_options():
    text = PAGES[ROOT / "docs" / "losses.md"]
    rows = {cells[1].strip(" `"): cells for cells in (line.split("|") for line in text.splitlines()) if len(cells) == 7}
    assert {name for name in rows if name.isidentifier() and name != "loss"} == set(LOSSES)
    for name, loss in LOSSES.items():
        assert (rows[name][3].strip() == "yes") == make_loss(name).needs_reference, name
        assert all(paper in rows[name][5] for paper in re.findall(r"arXiv ([\d.]+\d)", loss.__doc__)), name
    assert f"[all {len(LOSSES)}, with their formulas]" in README
    options = {"nll_weight", "token_weights", "length_normalize", "ld_alpha", "divergence"}
    taken = {option for loss in LOSSES.values() for option in loss.model_fields} & options
    assert taken == options == {option for option in options if f"| `loss.{option}=" in text}


@pytest.mark.parametrize("command", ORIGINAL)
def test_every_command_of_the_original_composes_and_validates(command):
    assert problems_of(command) == []
    overrides = shlex.split(command)
    whole = compose_files(("wandb.enabled=false", *overrides))
    assert OmegaConf.to_container(compose(*overrides)) == OmegaConf.to_container(whole)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_worked_example_runs_as_it_stands_whatever_precision_auto_is(precision, tmp_path):
    (example,) = (block for block in BLOCKS if "my_pairs/train.jsonl" in block)
    lines = example.splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("python ")]
    shell = "\n".join(line for line in lines if not line.startswith("python "))
    subprocess.run(["bash", "-e", "-c", shell], cwd=tmp_path, check=True)
    assert [words[1] for words in commands] == ["train.py", "train.py", "-c"]
    for words in commands[:2]:
        done = command_line(tmp_path, (*words[2:], f"precision={precision}"), lambda: os.chdir(tmp_path))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    done = run_code(commands[2][2], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    answer = done.stdout.splitlines()[-1]
    assert "generated_text" in answer and re.search(r"Assistant: The Baltic\.'", answer), answer
    assert (tmp_path / "runs" / "dpo" / "LATEST" / "hf" / "model.safetensors").exists()


def listed_files() -> set[str]:
    """Return the paths that docs/code.md lists: those of a folder are indented below its line."""
    folder, found = "", set()
    for line in re.search(r"## Every file\n.*?```\n(.*?)```", CODE, re.DOTALL)[1].splitlines():
        if line.strip():
            name = line.split()[0]
            folder = folder if line.startswith(" ") else name if name.endswith("/") else ""
            found.add(name if name.endswith("/") else folder + name)
    return found


def test_every_path_in_the_pages_exists_and_every_file_is_listed():
    listed = listed_files()
    assert [name for name in listed if not (ROOT / name).exists()] == []
    for page, text in (*PAGES.items(), (ROOT / "CONTRIBUTING.md", CONTRIBUTING)):
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (page.parent / link).exists(), (page.name, link)
    files = [path.relative_to(ROOT).as_posix() for path in SOURCES if path.name != "__init__.py"]
    assert {name for name in listed if name.endswith(".py")} == set(files)


def test_every_file_and_name_that_the_code_page_says_to_touch_exists():
    tasks = " ".join(CODE.partition("## Where do I")[2].split())
    paths = re.findall(r"(?<![\w./])[\w/]+\.(?:py|md|yaml)\b", tasks)
    assert len(paths) > 20
    assert [path for path in paths if "NAME" not in path and not (ROOT / path).exists()] == []
    for name, path in re.findall(r"`(\w+)` of ([\w/]+\.py)", tasks):
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), (name, path)


def test_the_diagram_of_the_code_names_functions_that_exist_in_at_most_ten_steps():
    diagram = re.search(r"```\n(main .*?)```", CODE, re.DOTALL)[1]
    steps = [line.split()[0].split(".")[-1] for line in diagram.splitlines()]
    source = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    assert len(steps) <= 10
    for name in steps:
        assert f"def {name}(" in source, name


def test_the_data_set_of_contributing_can_be_added(monkeypatch):
    source = re.search(r"```python\n(def get_mine.*?)```", CONTRIBUTING, re.DOTALL)[1]
    rows = [{"question": "\n\nHuman: Hi.\n\nAssistant:", "better": " Hello.", "worse": " Go."}]
    monkeypatch.setattr(preference_datasets, "load_hub_split", lambda path, split, cache_dir: rows)
    exec(source, vars(preference_datasets))
    try:
        data = preference_datasets.get_mine("train")
    finally:
        del preference_datasets.get_mine
    entry = {"responses": [" Hello.", " Go."], "pairs": [(0, 1)], "sft_target": " Hello."}
    assert data == {"\n\nHuman: Hi.\n\nAssistant:": entry}
