"""The help of the command line, made from the files of config/ without importing anything slow."""

import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import get_terminal_size
from types import MappingProxyType

from dpo.settings.config_files import REQUIRED, ConfigFiles, Group, Option, Setting, read_config_files
from dpo.settings.hints import suggest, suggest_option
from dpo.system.console import write_text
from dpo.system.installation import COMMAND

FLAGS = ("--help", "-h")
CHOICES = ("loss=help", "model=help", "scorer=help", "engine=help")
COLUMN = 34  # where comments begin

INTRODUCTION = (
    "Trains a language model on preference pairs: supervised fine-tuning (SFT), then direct preference optimization "
    "(DPO) or a variant, on GPUs, Apple silicon or a CPU."
)
COMMANDS = (
    (f"{COMMAND} loss=sft model=gpt2", "SFT; prints its run directory, RUN"),
    (f"{COMMAND} loss=dpo model=gpt2 model.archive=RUN/LATEST/policy.pt", "DPO, starting from the SFT model"),
    (f"{COMMAND} resume=RUN", "continue a run that was stopped"),
)
USAGE = (
    "Settings are written KEY=VALUE, in any order. They are listed below with their defaults. A value with brackets or "
    "spaces needs quotes in most shells: 'datasets=[hh,shp]'."
)
MORE = (
    ("--help KEY", "help on a setting, group or option: --help lr, --help loss, --help model=gpt2"),
    ("loss=help", "the formulas of all losses"),
    (
        "loss=sft model=tiny datasets=[demo] max_length=128 max_prompt_length=64",
        "train a tiny model offline",
    ),
    ("-m loss.beta=0.1,0.5 lr=1e-6,1e-5", "sweep: one run per combination of values"),
    ("--cfg job", "print the settings of a command and stop"),
    ("-sc install=bash", f'complete keys in the shell: eval "$({COMMAND} -sc install=bash)"'),
    ("--hydra-help", "Hydra's flags"),
)
SYMBOLS = (
    "pi is the policy, ref the reference, y_w the chosen and y_l the rejected response. The log-ratio of a response is "
    "a = log(pi(y) / ref(y)), its reward r = beta a, and h = a_w - a_l. Log-probabilities are sums over the response's "
    "tokens; m is the mean log-probability per token."
)
Losses = Mapping[str, type]
NO_METRICS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True)
class Program:
    """A command line: the file in config/ with its settings, and what its help begins and ends with."""

    command: str
    config: str
    introduction: str
    commands: Sequence[tuple[str, str]]
    more: Sequence[tuple[str, str]]


TRAIN = Program(COMMAND, "config", INTRODUCTION, COMMANDS, MORE)


def print_help(
    arguments: Sequence[str],
    config_dir: Path,
    data_sets: Sequence[str],
    load_losses: Callable[[], Losses],
    program: Program = TRAIN,
    metrics: Mapping[str, str] = NO_METRICS,
) -> int | None:
    """Print the help that the arguments request and return the exit code; None if they request none.

    Without arguments the code is 2, so that a script that lost its arguments does not continue as if a run had
    succeeded. metrics explains those of a run, by name.
    """
    keys = find_help_keys(arguments)
    if keys is None:
        return None
    pages = [
        list_losses(load_losses()) if key == "loss=help" else help_for_key(config_dir, key, data_sets, program, metrics)
        for key in keys
    ]
    write_text(sys.stdout, "\n\n".join(pages or [help_page(config_dir, data_sets, program)]) + "\n")
    return 0 if arguments else 2


def find_help_keys(arguments: Sequence[str]) -> list[str] | None:
    """The keys to explain, empty for the whole page; None if no help is requested."""
    if not arguments:
        return []
    if choices := [argument for argument in arguments if argument in CHOICES]:
        return choices
    flags = [i for i, argument in enumerate(arguments) if argument in FLAGS or (i == 0 and argument == "help")]
    if not flags:
        return None
    return [argument for argument in arguments[flags[0] :] if argument[:1] != "-" and argument != "help"]


def help_page(config_dir: Path, data_sets: Sequence[str], program: Program = TRAIN) -> str:
    """The whole page, wrapped to the terminal; raises OSError or yaml.YAMLError."""
    files = read_config_files(config_dir, program.config)
    lines = [*_wrap(program.introduction), ""]
    for command, comment in program.commands:
        lines += [f"  {command}", f"      {comment}"]
    lines += ["", *_wrap(USAGE)]
    for group in files.groups:
        lines += ["", *_group_lines(group)]
    for section in dict.fromkeys(setting.section for setting in files.settings):
        lines += ["", section]
        for setting in files.settings:
            if setting.section == section:
                lines += _setting_lines(setting)
                lines += _row("", f"names: {', '.join(data_sets)}") if setting.key == "datasets" else []
    lines += ["", "More"]
    for flags, comment in program.more:
        lines += _row(flags, comment)
    return "\n".join(lines)


def help_for_key(
    config_dir: Path,
    key: str,
    data_sets: Sequence[str] = (),
    program: Program = TRAIN,
    metrics: Mapping[str, str] = NO_METRICS,
) -> str:
    """Help on a setting (with or without its group and =VALUE), on a group, on one file of it, as model=gpt2, or on a
    metric (its name, as in metrics.jsonl, or the last part of it).

    For anything else, what was probably meant. Raises OSError or yaml.YAMLError.
    """
    files = read_config_files(config_dir, program.config)
    name, _, value = key.removesuffix("=help").partition("=")
    for group in files.groups:
        if name in (group.name, f"{group.name}.name"):
            return "\n".join(_option_lines(group, value) if value else _group_lines(group))
    entries = _entries(files)
    exact = [entry for entry in entries if entry.key == name]
    members = [entry for entry in entries if entry.key.startswith(f"{name}.") or entry.key.endswith(f".{name}")]
    lines = []
    for setting in exact or members:
        default = "required, there is no default" if setting.default == REQUIRED else f"default: {setting.default}"
        lines += ["", f"{setting.key} ({entries[setting]})", *_wrap(setting.comment, "  "), f"  {default}"]
        if setting.key == "datasets":
            lines += _wrap(f"names: {', '.join(data_sets)}", "  ")
    lines = lines or list(_metric_lines(name, metrics))
    return "\n".join(lines[1:]) or suggest(name, value or None, files.keys())


def _metric_lines(name: str, metrics: Mapping[str, str]) -> Iterator[str]:
    """An empty line and the explanation of each metric with this name or last part; a split's name is its own."""
    plain = re.sub(r"(?:_(?:train|eval)(?=/)|/(?:train|eval)$|_stderr$)", "", name)
    for metric, meaning in metrics.items():
        if plain in (metric, metric.rpartition("/")[2]):
            yield from ("", f"{metric} (a metric, no setting)", *_wrap(meaning, "  "))


def list_losses(losses: Losses) -> str:
    """Every loss with the first paragraph of its docstring, which holds its formula."""
    lines = [f"Losses (loss=NAME; `{COMMAND} --help loss=NAME` lists the settings of one)", *_wrap(SYMBOLS, "  ")]
    for name, loss in losses.items():
        lines += _row(f"loss={name}", (loss.__doc__ or "").partition("\n\n")[0])
    return "\n".join(lines)


def _entries(files: ConfigFiles) -> dict[Setting, str]:
    """{setting: where it belongs}: its section, or those files of its group that have it alike."""
    entries = {setting: setting.section for setting in files.settings}
    for group in files.groups:
        for option in group.options:
            for setting in _without_name(option) if option.complete else ():
                entries[setting] = (
                    f"{entries[setting]} {option.name}" if setting in entries else f"{group.name}={option.name}"
                )
    return entries


def _without_name(option: Option) -> list[Setting]:
    """A file's settings without its name, which the choice of the file sets."""
    return [setting for setting in option.settings if not setting.key.endswith(".name")]


def _group_lines(group: Group) -> Iterator[str]:
    """A group's files, each with its summary and settings; what the main file explains is explained only there."""
    default = "required" if group.default == REQUIRED else f"default {group.default}"
    yield f"{group.name.capitalize()} ({group.name}=NAME, {default})"
    explained = {(setting.key, setting.comment) for setting in group.main.settings}
    for option in group.options:
        yield from _row(f"{group.name}={option.name}", option.summary)
        plain = []
        for setting in _without_name(option) if option.complete else ():
            if option.name == group.main.name or (setting.key, setting.comment) not in explained:
                yield from _setting_lines(setting, indent=4)
            else:
                plain.append(f"{setting.key.partition('.')[2]}={setting.default}")
        yield from _wrap(f"also (see {group.name}={group.main.name}): {' '.join(plain)}", "    ") if plain else ()


def _option_lines(group: Group, name: str) -> Iterator[str]:
    """One file of a group, with its settings."""
    options = {option.name: option for option in group.options}
    if name not in options:
        yield suggest_option(group.name, name, list(options))
        return
    yield f"{group.name}={name} ({options[name].summary})"
    for setting in _without_name(options[name]):
        yield from _setting_lines(setting)
    if not options[name].complete:
        yield f"The other settings have the defaults that --help {group.name} shows."


def _setting_lines(setting: Setting, indent: int = 2) -> list[str]:
    return _row(f"{setting.key}={setting.default.replace(REQUIRED, '... (required)')}", setting.comment, indent)


def _row(left: str, right: str, indent: int = 2) -> list[str]:
    """Two columns; the right one is wrapped, and begins on the next line if the left one is too long."""
    left = " " * indent + left
    wrapped = _wrap(right, " " * COLUMN)
    if len(left) + 2 <= COLUMN and wrapped:
        return [left.ljust(COLUMN) + wrapped[0][COLUMN:], *wrapped[1:]]
    return [left, *wrapped]


def _wrap(text: str, indent: str = "") -> list[str]:
    """The lines of a paragraph as wide as the terminal, from 80 to 120 columns; words are never broken."""
    width = min(max(get_terminal_size().columns, 80), 120)
    wrapper = textwrap.TextWrapper(
        width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return wrapper.wrap(text)
