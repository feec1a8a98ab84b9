"""The files of config/ as their authors wrote them: every key with its default as text, its comment and its section."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

INTERNAL = ("defaults", "hydra")  # keys that Hydra itself reads
REQUIRED = "???"  # OmegaConf's sign for a value that has no default


@dataclass(frozen=True)
class Setting:
    """One key: its full name, its default as YAML writes it, its comment, and the section comment above it."""

    key: str
    default: str
    comment: str
    section: str


@dataclass(frozen=True)
class Option:
    """One file of a group, as config/loss/dpo.yaml; base is True if it does not build on another file."""

    name: str
    summary: str
    base: bool
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Group:
    """A folder of files of which a run chooses one, as config/loss/, and its default choice (??? if it has none)."""

    name: str
    default: str
    options: tuple[Option, ...]


@dataclass(frozen=True)
class ConfigFiles:
    """Everything that config/ holds: the settings of config.yaml, and the groups that its defaults list names."""

    settings: tuple[Setting, ...]
    groups: tuple[Group, ...]

    def keys(self) -> list[str]:
        """Return every key that some run may hold, each once."""
        options = (option for group in self.groups for option in group.options)
        settings = [*self.settings, *(setting for option in options for setting in option.settings)]
        return list(dict.fromkeys(setting.key for setting in settings))

    def options(self) -> dict[str, list[str]]:
        """Return the names of each group's files."""
        return {group.name: [option.name for option in group.options] for group in self.groups}


def read_config_files(config_dir: Path) -> ConfigFiles:
    """Read config.yaml and the groups of its defaults list; raises OSError or yaml.YAMLError."""
    lines, root = _load(config_dir / "config.yaml")
    chosen = [
        pair for key, node in _pairs(root) if key.value == "defaults" for entry in node.value for pair in _pairs(entry)
    ]
    groups = [
        Group(
            name.value,
            default.value,
            tuple(_read_option(path) for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)),
        )
        for name, default in chosen
        if (folder := config_dir / name.value).is_dir()
    ]
    return ConfigFiles(tuple(_settings(lines, root)), tuple(groups))


def _read_option(path: Path) -> Option:
    """Read one file of a group, whose keys begin with the group's name."""
    lines, root = _load(path)
    summary = lines[0].lstrip("# ") if lines and lines[0].startswith("#") else ""
    base = all(key.value != "defaults" for key, _ in _pairs(root))
    return Option(path.stem, summary, base, tuple(_settings(lines, root, f"{path.parent.name}.")))


def _load(path: Path) -> tuple[list[str], yaml.Node | None]:
    """Return a YAML file's lines and its syntax tree, whose nodes know where they stand; None for an empty file."""
    text = path.read_text(encoding="utf-8")
    return text.splitlines(), yaml.compose(text, Loader=yaml.SafeLoader)


def _settings(lines: list[str], node: yaml.Node | None, prefix: str = "") -> Iterator[Setting]:
    """Yield the settings below a node, those of nested mappings with dotted keys."""
    for key, value in _pairs(node):
        if key.value in INTERNAL:
            continue
        if _pairs(value):
            yield from _settings(lines, value, f"{prefix}{key.value}.")
            continue
        line = key.start_mark.line
        last = value if value.end_mark.line == line else key  # a list may stand in the lines below its key
        comment = re.match(r"[\s:]*#(.*)", lines[line][last.end_mark.column :])
        sections = [above[1:].strip() for above in lines[1:line] if above.startswith("#")]
        section = sections[-1] if sections else ""
        yield Setting(prefix + key.value, _written(value), comment[1].strip() if comment else "", section)


def _pairs(node: yaml.Node | None) -> list[tuple[yaml.Node, yaml.Node]]:
    """Return the keys and values of a mapping, and nothing for any other node."""
    return node.value if isinstance(node, yaml.MappingNode) else []


def _written(node: yaml.Node) -> str:
    """Return a value as a command line has it: a list in brackets, null for nothing."""
    if isinstance(node, yaml.SequenceNode):
        return "[" + ",".join(map(_written, node.value)) + "]"
    if isinstance(node, yaml.ScalarNode):
        return "null" if node.tag.endswith(":null") else node.value or "''"
    return "{}"


def written(value: object) -> str:
    """Return a value as a command line has it."""
    return "null" if value is None else str(value)
