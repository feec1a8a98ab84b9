"""The help page: complete, readable in 80 columns, made without slow imports; and what asks for it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dpo.settings.config_files import Setting, read_config_files
from dpo.settings.help import find_help_keys, help_for_key, help_page, print_help
from losses import LOSSES

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / "config"
DATA_SETS = ("hh", "shp", "my_own")
PRINT = (CONFIG, DATA_SETS, lambda: LOSSES)  # the other arguments of print_help
FILES = [CONFIG / "config.yaml", CONFIG / "model" / "blank_model.yaml", CONFIG / "lora" / "default.yaml"]
FILES += sorted((CONFIG / "loss").glob("*.yaml"))


@pytest.fixture(autouse=True)
def terminal_of_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def flatten(values: dict, prefix: str = "") -> dict:
    """Return {dotted key: value}."""
    flat = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def values_in(path: Path) -> dict:
    """Return a config file's keys and values as OmegaConf reads them."""
    values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    prefix = "" if path.parent == CONFIG else f"{path.parent.name}."
    return flatten({key: value for key, value in values.items() if key not in ("defaults", "hydra", "name")}, prefix)


def one_line(text: str) -> str:
    """Return a text with single spaces for all white space."""
    return " ".join(text.split())


# The page


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_key_stands_on_the_page_with_its_default_and_comment(path):
    page = one_line(help_page(CONFIG, DATA_SETS))
    for key, value in values_in(path).items():
        if value == "???":
            assert f" {key}=... (required) " in page
            continue
        shown = [match for match in re.finditer(rf"(?<= ){re.escape(key)}=(\S+) ", page)]
        values = [
            OmegaConf.to_container(OmegaConf.create(f"value: {match[1]}"))["value"]
            for match in shown
            if match[1][0] != "$"
        ]
        short = f" {key.rpartition('.')[2]}={value} "
        assert value in values or f" {key}={value} " in page or short in page, key
        line = re.search(rf"^ *{key.rpartition('.')[2]}:.*?# (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert line is None or any(page[match.end() :].startswith(one_line(line[1])) for match in shown), key


def test_keys_stand_below_the_section_comments_of_the_yaml():
    lines = help_page(CONFIG, DATA_SETS).splitlines()
    sections = re.findall(r"^# (.*)$", (CONFIG / "config.yaml").read_text(encoding="utf-8"), re.MULTILINE)[1:]
    places = [lines.index(section) for section in sections]
    assert places == sorted(places) and len(places) >= 4
    assert places[0] < next(i for i, line in enumerate(lines) if line.startswith("  seed=")) < places[1]


def test_every_model_loss_and_data_set_is_listed_with_its_description():
    page = one_line(help_page(CONFIG, DATA_SETS))
    for path in [*(CONFIG / "model").glob("*.yaml"), *(CONFIG / "loss").glob("*.yaml")]:
        summary = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert f" {path.parent.name}={path.stem} {summary}" in page
    assert "Model (model=NAME, default blank_model)" in page and "Loss (loss=NAME, required)" in page
    assert "names: hh, shp, my_own" in page


def test_the_keys_that_all_models_share_come_once():
    page = help_page(CONFIG, DATA_SETS)
    assert page.count("model.policy_dtype=") == 1 and page.count("model.name_or_path=") == 1


@pytest.mark.parametrize("columns, width", [("20", 80), ("80", 80), ("100", 100), ("300", 120)])
def test_the_page_is_as_wide_as_the_terminal_from_80_to_120_columns(monkeypatch, columns, width):
    monkeypatch.setenv("COLUMNS", columns)
    widths = [len(line) for line in help_page(CONFIG, DATA_SETS).splitlines()]
    assert width - 6 < max(widths) <= width


def test_help_and_hints_import_nothing_slow():
    code = "import sys, dpo.settings.help; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "dpo.settings.help" in loaded.split()
    assert not {"torch", "transformers", "numpy", "hydra", "omegaconf", "pydantic"} & set(loaded.split())


# One key


@pytest.mark.parametrize("key", ["lr", "lr=1e-5"])
def test_help_on_a_setting_shows_its_section_comment_and_default(key):
    assert help_for_key(CONFIG, key) == "lr (Training)\n  learning rate after the warmup\n  default: 5e-7"


METRICS = {"diagnosis/kl": "nats (docs/report.md)", "rewards/margins": "a margin (docs/metrics.md)", "lr": "its lr"}


@pytest.mark.parametrize("key", ["kl", "diagnosis/kl", "kl_stderr", "diagnosis/kl_stderr"])
def test_help_on_a_metric_says_that_it_is_one_and_where_it_is_explained(key):
    expected = "diagnosis/kl (a metric, no setting)\n  nats (docs/report.md)"
    assert help_for_key(CONFIG, key, metrics=METRICS) == expected


def test_help_knows_a_metric_by_the_name_of_its_split_and_a_setting_comes_first():
    for key in ("rewards/margins", "rewards_eval/margins", "rewards_train/margins", "margins"):
        assert help_for_key(CONFIG, key, metrics=METRICS).startswith("rewards/margins (a metric, no setting)\n")
    assert help_for_key(CONFIG, "lr", metrics=METRICS).startswith("lr (Training)\n")
    assert "there is no such setting" in help_for_key(CONFIG, "margin", metrics=METRICS)


def test_the_command_line_explains_the_metrics_of_a_run():
    done = subprocess.run([sys.executable, "train.py", "--help", "displaced"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("diagnosis/displaced (a metric, no setting)\n")


@pytest.mark.parametrize("key", ["loss.beta", "beta"])
def test_help_on_a_setting_of_several_losses_shows_each(key):
    text = help_for_key(CONFIG, key)
    assert "loss.beta (loss=ipo)\n" in text and "sft" not in text
    assert re.search(r"loss.beta \(loss=.*\bdpo\b.*\)\n", text)


def test_help_on_a_group_explains_what_several_files_share_only_at_one_of_them():
    text = help_for_key(CONFIG, "loss")
    assert text.count("loss.ld_alpha=1 ") == 1 == text.count("true: train without a reference")
    hinge = one_line(re.search(r"  loss=hinge .*?(?=\n  loss=)", text, re.DOTALL)[0])
    assert "loss.beta=0.1 scale of h" in hinge and "also (see loss=dpo): reference_free=false " in hinge


def test_help_on_one_loss_explains_what_it_shares_with_others():
    assert "true: train without a reference" in help_for_key(CONFIG, "loss=hinge")


@pytest.mark.parametrize("key", ["archive", "model.archive"])
def test_help_on_a_setting_of_all_models_shows_it_once(key):
    assert help_for_key(CONFIG, key).startswith("model.archive (model=blank_model)\n")
    assert help_for_key(CONFIG, key).count("default: null") == 1


def test_help_on_a_setting_without_default_says_that_it_is_required():
    assert "required, there is no default" in help_for_key(CONFIG, "model.name_or_path")


def test_help_on_datasets_lists_them():
    assert "default: [hh]" in help_for_key(CONFIG, "datasets", DATA_SETS)
    assert "names: hh, shp, my_own" in help_for_key(CONFIG, "datasets", DATA_SETS)


@pytest.mark.parametrize(
    "group, shown", [("model", "  model=gpt2 "), ("loss", "  loss=sft "), ("loss.name", "  loss=sft ")]
)
def test_help_on_a_group_lists_its_files(group, shown):
    text = help_for_key(CONFIG, group)
    assert shown in text and text in help_page(CONFIG, DATA_SETS)


def test_help_on_one_file_of_a_group_shows_what_stands_in_it():
    text = help_for_key(CONFIG, "model=tiny")
    assert text.startswith("model=tiny (A GPT-2 of ") and "  model.from_scratch=true " in text
    assert "random weights (set by seed)" in text  # the comment of blank_model.yaml
    assert "loss.label_smoothing=0 " in help_for_key(CONFIG, "loss=dpo")
    assert "loss.label_smoothing" not in help_for_key(CONFIG, "loss=ipo")


def test_loss_help_lists_every_loss_with_its_formula_and_model_help_the_models(capsys):
    class New(LOSSES["dpo"]):
        """A new loss: -h.

        It has no file yet.
        """

    assert print_help(["loss=help"], CONFIG, DATA_SETS, lambda: {**LOSSES, "new": New}) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^  loss=(\w+) ", text, re.MULTILINE) == [*LOSSES, "new"]
    assert "Identity preference optimization: (h - 1 / (2 beta))^2; arXiv 2310.12036" in one_line(text)
    assert text.endswith("A new loss: -h.\n")
    assert "pi is the policy, ref the reference" in text and max(map(len, text.splitlines())) <= 80
    assert help_for_key(CONFIG, "model=help") == help_for_key(CONFIG, "model")


def test_help_on_a_group_of_settings_shows_them_all():
    text = help_for_key(CONFIG, "wandb")
    assert all(f"{key} (Logging)\n" in text for key in ("wandb.enabled", "wandb.entity", "wandb.project"))


def test_help_on_what_does_not_exist_says_what_was_probably_meant():
    assert help_for_key(CONFIG, "learning_rate").endswith("; use lr")
    assert help_for_key(CONFIG, "bacth_size").endswith("; did you mean batch_size?")
    assert "choose one of" in help_for_key(CONFIG, "model=gpt5")
    assert help_for_key(CONFIG, "zebra").endswith("`python train.py --help` lists all of them")


# Who asks for help


@pytest.mark.parametrize(
    "arguments, keys",
    [
        ([], []),
        (["--help"], []),
        (["-h"], []),
        (["help"], []),
        (["--help", "lr"], ["lr"]),
        (["-h", "model=gpt2"], ["model=gpt2"]),
        (["help", "lr", "loss"], ["lr", "loss"]),
        (["loss=dpo", "lr=1e-5", "--help"], []),
        (["loss=dpo", "-m", "--help", "beta"], ["beta"]),
        (["--help", "-m"], []),
        (["loss=help"], ["loss=help"]),
        (["model=gpt2", "loss=help", "lr=1"], ["loss=help"]),
    ],
)
def test_help_is_asked_for(arguments, keys):
    assert find_help_keys(arguments) == keys


@pytest.mark.parametrize(
    "arguments",
    [
        ["loss=dpo"],
        ["loss=dpo", "--cfg", "job"],
        ["-m", "loss=dpo,ipo"],
        ["--hydra-help"],
        ["-sc", "install=bash"],
        ["--shell-completion", "query=bash"],
        ["--info", "all"],
        ["exp_name=help"],
        ["loss=dpo", "help"],
    ],
)
def test_everything_else_is_left_to_hydra(arguments, capsys):
    assert find_help_keys(arguments) is None
    assert print_help(arguments, *PRINT) is None
    assert capsys.readouterr().out == ""


def test_the_exit_code_is_0_for_help_and_2_where_arguments_are_missing(capsys):
    assert print_help(["--help"], *PRINT) == 0
    page = capsys.readouterr().out
    assert print_help([], *PRINT) == 2
    assert capsys.readouterr().out == page == help_page(CONFIG, DATA_SETS) + "\n"
    assert print_help(["--help", "lr", "seed"], *PRINT) == 0
    assert re.findall(r"^\w+", capsys.readouterr().out, re.MULTILINE) == ["lr", "seed"]


def run_print_help(config_dir: Path, environment: dict[str, str], stdout: int) -> subprocess.CompletedProcess:
    """Print the page in a process of its own."""
    imports = "import sys, pathlib; from dpo.settings.help import print_help"
    code = f"{imports}; sys.exit(print_help(['-h'], pathlib.Path(sys.argv[1]), ['hh'], dict))"
    command = [sys.executable, "-c", code, str(config_dir)]
    return subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, env=os.environ | environment)


def test_a_reader_that_closed_its_pipe_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = run_print_help(CONFIG, {}, writer)
    os.close(writer)
    assert done.returncode == 0 and done.stderr == b""


def test_a_character_that_a_terminal_lacks_is_escaped(tmp_path):
    (tmp_path / "config.yaml").write_text("# Settings\n\n# Section\nlr: 1 # größer\n", encoding="utf-8")
    done = run_print_help(tmp_path, {"PYTHONIOENCODING": "ascii"}, subprocess.PIPE)
    assert done.returncode == 0 and done.stderr == b"" and rb"gr\xf6\xdfer" in done.stdout


# The files


def test_the_files_are_read_as_they_are_written(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "# All settings\ndefaults:\n  - part: one # a group\n  - _self_\n\n# First\na: 1e-4 # half # of it\n"
        "b: 'x # y' # text\nc: # list\n  - p\n  - 'q r'\n"
        "# Second\nd:\n  # no section\n  e: null\n  f:\n    g: [1, 2] # deep\n"
        "h: ''\nhydra:\n  run: x\n",
        encoding="utf-8",
    )
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "one.yaml").write_text("# The one\nkey: ??? # needed\n", encoding="utf-8")
    (tmp_path / "part" / "two.yaml").write_text("defaults: [one]\nkey: 3\n", encoding="utf-8")
    (tmp_path / "part" / "none.yaml").write_text("", encoding="utf-8")
    files = read_config_files(tmp_path)
    assert files.settings == (
        Setting("a", "1e-4", "half # of it", "First"),
        Setting("b", "x # y", "text", "First"),
        Setting("c", "[p,q r]", "list", "First"),
        Setting("d.e", "null", "", "Second"),
        Setting("d.f.g", "[1,2]", "deep", "Second"),
        Setting("h", "''", "", "Second"),
    )
    assert files.keys() == ["a", "b", "c", "d.e", "d.f.g", "h", "part.key"]
    assert files.options() == {"part": ["none", "one", "two"]}
    (part,) = files.groups
    assert part.default == "one" and [option.complete for option in part.options] == [True, True, False]
    assert [option.summary for option in part.options] == ["", "The one", ""]
    assert part.options[1].settings == (Setting("part.key", "???", "needed", ""),)
