"""The files of config/ as text: every key with its default, its comment and its section."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

INTERNAL = ("defaults", "hydra")  # keys that only Hydra reads
REQUIRED = "???"  # OmegaConf's sign for a value without a default


@dataclass(frozen=True)
class Setting:
    """One key: its full name, its default as in YAML, its comment, and its section."""

    key: str
    default: str
    comment: str
    section: str


@dataclass(frozen=True)
class Option:
    """One file of a group, as config/loss/dpo.yaml; `complete` is False if it builds on another file."""

    name: str
    summary: str
    complete: bool
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Group:
    """A folder from which a run chooses one file, such as config/loss/.

    default  the file that is chosen if none is named, ??? if one must be named
    main     the file that explains the keys that others leave without a comment
    """

    name: str
    default: str
    options: tuple[Option, ...]
    main: Option


@dataclass(frozen=True)
class ConfigFiles:
    """The settings of config.yaml, and the groups in its defaults list."""

    settings: tuple[Setting, ...]
    groups: tuple[Group, ...]

    def keys(self) -> list[str]:
        """Every key that a run may have, without duplicates."""
        options = [option for group in self.groups for option in group.options]
        settings = [*self.settings, *(setting for option in options for setting in option.settings)]
        return list(dict.fromkeys(setting.key for setting in settings))

    def options(self) -> dict[str, list[str]]:
        """The names of each group's files."""
        return {group.name: [option.name for option in group.options] for group in self.groups}


def read_config_files(config_dir: Path, name: str = "config") -> ConfigFiles:
    """Read NAME.yaml, a file of settings that it builds on, and the groups in its defaults list.

    Raises OSError or yaml.YAMLError.
    """
    lines, root = _load(config_dir / f"{name}.yaml")
    settings = list(_settings(lines, root))
    groups: list[Group] = []
    for key, node in _pairs(root):
        for entry in node.value if key.value == "defaults" else ():
            if isinstance(entry, yaml.ScalarNode) and (config_dir / f"{entry.value}.yaml").is_file():
                base = read_config_files(config_dir, entry.value)
                own = {setting.key for setting in settings}
                settings += [setting for setting in base.settings if setting.key not in own]
                groups += base.groups
            for group, default in _pairs(entry):
                if (config_dir / group.value).is_dir():
                    groups.append(_read_group(config_dir / group.value, default.value))
    return ConfigFiles(tuple(settings), tuple(groups))


def _read_group(folder: Path, default: str) -> Group:
    """Read a group; a key without a comment gets the comment from the file with the most comments."""
    options = [_read_option(path) for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)]
    main = max(options, key=lambda option: sum(bool(setting.comment) for setting in option.settings))
    comments = {setting.key: setting.comment for setting in main.settings}

    def explain(setting: Setting) -> Setting:
        return replace(setting, comment=setting.comment or comments.get(setting.key, ""))

    explained = tuple(replace(option, settings=tuple(map(explain, option.settings))) for option in options)
    return Group(folder.name, default, explained, main)


def _read_option(path: Path) -> Option:
    """Read one file of a group. Keys begin with the group's name; the choice of the file sets `name`."""
    lines, root = _load(path)
    summary = lines[0].lstrip("# ") if lines and lines[0].startswith("#") else ""
    complete = all(key.value != "defaults" for key, _ in _pairs(root))
    return Option(path.stem, summary, complete, tuple(_settings(lines, root, f"{path.parent.name}.")))


def _load(path: Path) -> tuple[list[str], yaml.Node | None]:
    """A YAML file's lines and its syntax tree, which knows their numbers; None for an empty file."""
    text = path.read_text(encoding="utf-8")
    return text.splitlines(), yaml.compose(text, Loader=yaml.SafeLoader)


def _settings(lines: list[str], node: yaml.Node | None, prefix: str = "") -> Iterator[Setting]:
    """Yield the settings below a node, with dotted keys for nested mappings."""
    for key, value in _pairs(node):
        if key.value in INTERNAL:
            continue
        if _pairs(value):
            yield from _settings(lines, value, f"{prefix}{key.value}.")
            continue
        line = key.start_mark.line
        last = value if value.end_mark.line == line else key  # a list may be in the lines below its key
        comment = re.match(r"[\s:]*#(.*)", lines[line][last.end_mark.column :])
        sections = [above[1:].strip() for above in lines[1:line] if above.startswith("#")]
        section = sections[-1] if sections else ""
        yield Setting(prefix + key.value, _format_node(value), comment[1].strip() if comment else "", section)


def _pairs(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    """The keys and values of a mapping; none for another node."""
    return node.value if isinstance(node, yaml.MappingNode) else []


def _format_node(node: yaml.Node) -> str:
    """Write a value as a command line has it: a list in brackets, null for nothing."""
    if isinstance(node, yaml.SequenceNode):
        return "[" + ",".join(map(_format_node, node.value)) + "]"
    if isinstance(node, yaml.ScalarNode):
        return "null" if node.tag.endswith(":null") else node.value or "''"
    return "{}"


def format_value(value: object) -> str:
    """Write a value as a command line has it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
