"""The help of the command line, made of the files of config/ without importing anything slow."""

import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from shutil import get_terminal_size

from dpo.settings.config_files import REQUIRED, ConfigFiles, Group, Option, Setting, read_config_files
from dpo.settings.suggestions import suggest, suggest_option
from dpo.system.installation import COMMAND

FLAGS = ("--help", "-h")
CHOICES = ("loss=help", "model=help")
COLUMN = 34  # where comments begin

INTRODUCTION = (
    "Trains a language model on preferences: supervised fine-tuning (SFT), then direct preference optimization (DPO) "
    "or a variant of it, on one or more GPUs, on Apple silicon or on a CPU."
)
COMMANDS = (
    (f"{COMMAND} loss=sft model=gpt2", "SFT; it prints its run directory, RUN"),
    (f"{COMMAND} loss=dpo model=gpt2 model.archive=RUN/LATEST/policy.pt", "DPO, which starts from there"),
    (f"{COMMAND} resume=RUN", "go on with a run that was stopped"),
)
USAGE = (
    "Settings are written KEY=VALUE, in any order. Below, each stands with its default. A value with brackets or "
    "spaces needs quotes in most shells: 'datasets=[hh,shp]'."
)
MORE = (
    ("--help KEY", "one setting or choice, as --help lr, --help loss, --help model=gpt2"),
    ("loss=help", "all losses: formula, whether it needs a reference, typical settings, paper"),
    ("loss=sft model=tiny datasets=[demo] max_length=128 max_prompt_length=64", "a tiny model, without a network"),
    ("-m loss.beta=0.1,0.5 lr=1e-6,1e-5", "a run for each combination of values"),
    ("--cfg job", "print the settings that a command comes to, and train nothing"),
    ("-sc install=bash", f'completion of keys in the shell: eval "$({COMMAND} -sc install=bash)"'),
    ("--hydra-help", "the other flags, which are those of Hydra"),
)


def print_help(arguments: Sequence[str], config_dir: Path, data_sets: Sequence[str]) -> int | None:
    """Print the help that a command line asks for, and return the exit code; None if it asks for none.

    The code is 2 if there are no arguments, so that a script that lost its own does not go on as if a run had ended.
    """
    keys = wants_help(arguments)
    if keys is None:
        return None
    texts = [help_for_key(config_dir, key, data_sets) for key in keys] or [help_page(config_dir, data_sets)]
    text = "\n\n".join(texts)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:  # its reader, such as head, has seen enough; nothing more may be written as Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0 if arguments else 2


def wants_help(arguments: Sequence[str]) -> list[str] | None:
    """Return the keys that help is asked for, none of them for the whole page, or None if no help is asked for."""
    if not arguments:
        return []
    if choices := [argument for argument in arguments if argument in CHOICES]:
        return choices
    flags = [i for i, argument in enumerate(arguments) if argument in FLAGS or (i == 0 and argument == "help")]
    if not flags:
        return None
    return [argument for argument in arguments[flags[0] :] if argument[:1] != "-" and argument != "help"]


def help_page(config_dir: Path, data_sets: Sequence[str]) -> str:
    """Return the whole page, wrapped to the terminal; raises OSError or yaml.YAMLError."""
    files, width = read_config_files(config_dir), _width()
    lines = [*_wrap(INTRODUCTION, width), ""]
    for command, comment in COMMANDS:
        lines += [f"  {command}", f"      {comment}"]
    lines += ["", *_wrap(USAGE, width)]
    for group in files.groups:
        lines += ["", *_group_lines(group, width)]
    for section in dict.fromkeys(setting.section for setting in files.settings):
        lines += ["", section]
        for setting in files.settings:
            if setting.section == section:
                lines += _setting_lines(setting, width)
                lines += _row("", f"names: {', '.join(data_sets)}", width) if setting.key == "datasets" else []
    lines += ["", "More"]
    for flags, comment in MORE:
        lines += _row(flags, comment, width)
    return "\n".join(lines)


def help_for_key(config_dir: Path, key: str, data_sets: Sequence[str] = ()) -> str:
    """Return help on a setting, with or without its group and =VALUE, on a group, or on one file of it as model=gpt2.

    For anything else, return what was probably meant; raises OSError or yaml.YAMLError.
    """
    if key == "loss=help":
        return "\n".join(_loss_lines(config_dir.parent / "docs" / "losses.md", _width()))
    files, width = read_config_files(config_dir), _width()
    name, _, value = key.removesuffix("=help").partition("=")
    for group in files.groups:
        if name in (group.name, f"{group.name}.name"):
            return "\n".join(_option_lines(group, value, width) if value else _group_lines(group, width))
    found = [entry for entry in _entries(files) if entry[0].key == name]
    parts = [
        entry for entry in _entries(files) if entry[0].key.startswith(f"{name}.") or entry[0].key.endswith(f".{name}")
    ]
    lines = []
    for setting, place in found or parts:
        default = "required, there is no default" if setting.default == REQUIRED else f"default: {setting.default}"
        lines += ["", f"{setting.key} ({place})", *_wrap(setting.comment, width, "  "), f"  {default}"]
        if setting.key == "datasets":
            lines += _wrap(f"names: {', '.join(data_sets)}", width, "  ")
    return "\n".join(lines[1:]) or suggest(name, value or None, files.keys())


def _entries(files: ConfigFiles) -> Iterator[tuple[Setting, str]]:
    """Yield every setting that is listed, and where it belongs: a section, or one or every file of a group."""
    yield from ((setting, setting.section) for setting in files.settings)
    for group in files.groups:
        bases = [option for option in group.options if option.base]
        for option in bases:
            place = f"{group.name}={option.name}" if len(bases) > 1 else f"every {group.name}"
            yield from ((setting, place) for setting in _listed(option))


def _listed(option: Option) -> list[Setting]:
    """Return a file's settings without its name, which the choice of the file sets."""
    return [setting for setting in option.settings if not setting.key.endswith(".name")]


def _group_lines(group: Group, width: int) -> Iterator[str]:
    """Yield a group's files, each with its summary and settings; what several of them share comes once, at the end."""
    default = "required" if group.default == REQUIRED else f"default {group.default}"
    yield f"{group.name.capitalize()} ({group.name}=NAME, {default})"
    bases = [option for option in group.options if option.base]
    counts = Counter(setting for option in bases for setting in _listed(option))
    shared = [setting for setting, n in counts.items() if n > 1 or len(bases) == 1]
    for option in group.options:
        yield from _row(f"{group.name}={option.name}", option.summary, width)
        if option.base and len(bases) > 1:
            for setting in _listed(option):
                yield from () if setting in shared else _setting_lines(setting, width, indent=4)
            others = [setting for setting in _listed(option) if setting in shared]
            short = " ".join(f"{setting.key.partition('.')[2]}={setting.default}" for setting in others)
            yield from _wrap(f"with {short}", width, "    ") if short else ()
    yield f"  settings of {'every' if len(bases) == 1 else 'more than one'} {group.name}:"
    for setting in shared:
        yield from _setting_lines(setting, width, indent=4)


def _option_lines(group: Group, name: str, width: int) -> Iterator[str]:
    """Yield one file of a group with the settings that stand in it."""
    for option in group.options:
        if option.name == name:
            yield f"{group.name}={name} ({option.summary})"
            comments = {
                setting.key: setting.comment for base in group.options if base.base for setting in base.settings
            }
            for setting in _listed(option):
                yield from _row(
                    f"{setting.key}={setting.default}", setting.comment or comments.get(setting.key, ""), width
                )
            if not option.base:
                yield f"The other settings have the defaults that --help {group.name} shows."
            return
    yield suggest_option(group.name, name, [option.name for option in group.options])


def _loss_lines(page: Path, width: int) -> Iterator[str]:
    """Yield the first table of a page on losses, with the paragraph above it, which explains the symbols."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", page.read_text(encoding="utf-8"))
    before, _, table = text.partition("\n| loss |")
    yield "Losses (loss=NAME; --help loss=NAME shows the settings of one)"
    yield from _wrap(before.strip().split("\n\n")[-1], width, "  ")
    for line in table.split("\n\n")[0].splitlines()[2:]:
        name, formula, reference, typical, paper = (cell.strip() for cell in line.strip("|").split("|"))
        notes = [f"reference: {reference}", typical, f"arXiv {paper}" if paper else ""]
        yield from _row(f"loss={name}", formula, width)
        yield from _wrap("; ".join(filter(None, notes)), width, " " * COLUMN)


def _setting_lines(setting: Setting, width: int, indent: int = 2) -> list[str]:
    """Return KEY=DEFAULT and the comment beside it."""
    if setting.default == REQUIRED:
        return _row(f"{setting.key}=... (required)", setting.comment, width, indent)
    return _row(f"{setting.key}={setting.default}", setting.comment, width, indent)


def _row(left: str, right: str, width: int, indent: int = 2) -> list[str]:
    """Return two columns; the right one is wrapped, and begins on the next line if the left one is too long."""
    left = " " * indent + left
    wrapped = _wrap(right, width, " " * COLUMN)
    if len(left) + 2 <= COLUMN and wrapped:
        return [left.ljust(COLUMN) + wrapped[0][COLUMN:], *wrapped[1:]]
    return [left, *wrapped]


def _wrap(text: str, width: int, indent: str = "") -> list[str]:
    """Return the lines of a paragraph; words are never broken."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _width() -> int:
    """Return the width of the terminal, at least 80 and at most 120 columns."""
    return min(max(get_terminal_size().columns, 80), 120)
