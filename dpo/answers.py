"""The kinds of answers to a setting that does not exist: what to use in its place, or why there is nothing."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

BATCH_SIZE = 4  # the default of batch_size, for examples that convert updates; a test compares it with the YAML


class Answer(Protocol):
    """What to do instead of using a setting that does not exist."""

    def text(self, value: str | None) -> str:
        """Return the end of the sentence "KEY: there is no such setting; ...", given the value that was typed."""


@dataclass(frozen=True)
class Renamed:
    """The same setting under our name; form is how its value is written."""

    key: str
    note: str = ""
    form: str = "{}"

    def text(self, value: str | None) -> str:
        setting = self.key if value is None else f"{self.key}={self.form.format(value.strip('[]'))}"
        return f"use {setting}" + (f", {self.note}" if self.note else "")


@dataclass(frozen=True)
class Steps:
    """A number of updates where we count training examples."""

    key: str

    def text(self, value: str | None) -> str:
        steps = int(value) if value and re.fullmatch(r"[1-9][0-9]{0,11}", value) else 500
        numbers = f"{steps} steps at batch_size={BATCH_SIZE} are {self.key}={steps * BATCH_SIZE}"
        return f"use {self.key}, which counts training examples: {numbers}"


@dataclass(frozen=True)
class Switch:
    """A setting that is on or off, where each has its own answer."""

    on: str
    off: str

    def text(self, value: str | None) -> str:
        if value is None:
            return f"use {self.on} or {self.off}"
        off = ("false", "no", "none", "off", "null", "0", "disabled")
        return f"use {self.off if value.lower() in off else self.on}"


@dataclass(frozen=True)
class Choice:
    """A choice whose values have other names here; otherwise is the answer to a value that is not listed."""

    settings: Mapping[str, str]
    otherwise: str

    def text(self, value: str | None) -> str:
        setting = self.settings.get(str(value).lower().strip("[]\"'"))
        return f"use {setting}" if setting else self.otherwise


@dataclass(frozen=True)
class Note:
    """Something that has no counterpart: why, and what to do."""

    note: str

    def text(self, value: str | None) -> str:
        return self.note
