"""Finds a table's columns by role, and reads their values in a row."""

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dpo.data.messages import InconsistentRow, checked_text, read_written
from dpo.settings.schema import REJECTED_BESIDE_MESSAGES, UNORDERED_PAIRS, Column, ColumnSettings
from dpo.system.errors import UserError

NO_COLUMN = "none"  # columns.ROLE=none: the role has no column
PAIR = ("chosen", "rejected")
PAIR_SCORES = ("score_chosen", "score_rejected")
LISTS = ("scores", "ranks")  # a value of each response
SAMPLED = (*PAIR, "completion")  # responses whose token ids may be given
PREFERENCES = ("preferred", "preference_strength")
ORDERS = (*LISTS, *PREFERENCES, "score_chosen")  # each says which response is better
COLUMNS: dict[str, Column] = {role: info.metadata[-1] for role, info in ColumnSettings.model_fields.items()}


def find_columns(names: Collection[str], given: Mapping[str, str | None], where: str) -> dict[str, str]:
    """Find a table's columns by role, as {role: name}; given are those that the user set.

    UserError if a given column is missing, if several match a role, or if a column that is not used may say which
    response is better. A role without a match keeps its first usual name. With a given label, rows have one response,
    so chosen and rejected are not searched.
    """
    search = Search(names, given, where)
    columns: dict[str, str] = {}
    for role, column in COLUMNS.items():
        name = given.get(role)
        if name == NO_COLUMN or (role in PAIR and search.is_given("label")):
            continue
        if name is not None:
            if name not in names and role not in LISTS:  # scores and ranks may also be keys of the responses
                raise search.error(f"columns.{role}={name}: {where} has no such column")
            columns[role] = name
        elif column.names and role not in ("responses", *ORDERS):
            columns[role] = search.one_of(role, search.candidates(role)) or column.names[0]
    if columns.get("rejected") in REJECTED_BESIDE_MESSAGES and columns.get("messages") in names:
        if columns.get("chosen") not in names:
            columns["chosen"] = columns["messages"]
    in_order = columns.get("chosen") in names and columns.get("rejected") in names
    if not any(columns.get(role) in names for role in ("chosen", "completion", "messages", "responses")):
        columns |= search.responses()
    return columns | search.order(columns, in_order)


@dataclass(frozen=True)
class Search:
    """The search for a table's columns: their names, and those that the user set by role."""

    names: Collection[str]
    given: Mapping[str, str | None]
    where: str

    def is_given(self, role: str) -> bool:
        return self.given.get(role) not in (None, NO_COLUMN)

    def error(self, problem: str) -> UserError:
        return UserError(f"{problem}; its columns: {', '.join(sorted(self.names)) or 'none'}")

    def spellings(self, known: str) -> list[str]:
        """The columns with a known name: an exact match, otherwise those that differ in case or outer spaces."""
        if known in self.names:
            return [known]
        return sorted(name for name in self.names if name.strip().lower() == known)

    def candidates(self, role: str) -> list[str]:
        """The columns with a usual name of a role; none if the role is given, and none that is given for another."""
        if self.given.get(role) is not None:
            return []
        matches = [name for known in COLUMNS[role].names for name in self.spellings(known)]
        return [name for name in matches if name not in self.given.values()]

    def one_of(self, role: str, candidates: list[str]) -> str | None:
        """The only candidate, or the first one; UserError if the user must choose."""
        if len(candidates) > 1 and not COLUMNS[role].takes_first:
            problem = f"{self.where}: {' and '.join(candidates)} could each be the {role}; set columns.{role}=NAME"
            if [name.strip().lower() for name in candidates] == ["instruction", "input"]:
                problem += f", or columns.input={candidates[1]} to read it after the instruction"
            raise self.error(problem)
        return candidates[0] if candidates else None

    def responses(self) -> dict[str, str]:
        """The columns of two responses whose names give no order, or the column of a list of responses; or {}."""
        pairs = []
        for first_name, second_name in UNORDERED_PAIRS:
            first, second = self.spellings(first_name), self.spellings(second_name)
            if first and second:
                pairs.append((first[0], second[0]))
        lists = self.candidates("responses")
        if len(pairs) + len(lists) > 1:
            choices = ", or ".join([*map(" and ".join, pairs), *lists])
            setting = "columns.chosen=NAME columns.rejected=NAME, or columns.responses=NAME"
            raise self.error(f"{self.where}: the responses could be {choices}; set {setting}")
        if pairs and not any(self.given.get(role) for role in (*PAIR, "label", "responses")):
            return dict(zip(PAIR, pairs[0], strict=True))
        return {"responses": lists[0]} if lists else {}

    def order(self, columns: Mapping[str, str], in_order: bool) -> dict[str, str]:
        """The column that says which response is better; in_order: the names of the responses already say it."""
        is_list = "responses" in columns
        is_pair = not is_list and all(columns.get(role) in self.names for role in PAIR)
        if self.is_order_given(is_list or is_pair) or not (is_list or is_pair):
            return {}
        roles = ORDERS if is_list else PREFERENCES
        candidates = {name: role for role in roles for name in self.candidates(role)}
        if len(candidates) == 1 and (is_list or not in_order):
            return {role: name for name, role in candidates.items()}
        if is_pair and columns.get("completion") not in self.names:  # otherwise the label is the completion's
            candidates |= dict.fromkeys(self.candidates("label"), "label")
        if candidates:
            uses = [f"columns.{'preferred' if role == 'label' else role}={name}" for name, role in candidates.items()]
            ignoring = " ".join(f"columns.{role}={NO_COLUMN}" for role in dict.fromkeys(candidates.values()))
            problem = f"{self.where}: {' and '.join(candidates)} may say which response is better"
            raise self.error(f"{problem}; set {' or '.join(uses)} to use it, or {ignoring} to ignore it")
        if is_pair and not in_order:
            setting = " ".join(f"columns.{role}={columns[role]}" for role in PAIR)
            problem = f"{self.where}: no column says which of {' and '.join(columns[role] for role in PAIR)} is better"
            raise self.error(f"{problem}; set columns.preferred=NAME, or {setting} if the first one is")
        return {}

    def is_order_given(self, has_responses: bool) -> bool:
        """Whether the user set the column that says which response is better; UserError if it cannot be used."""
        given = [role for role in ORDERS if self.is_given(role)]
        if len(given) > 1:
            settings = " and ".join(f"columns.{role}={self.given[role]}" for role in given)
            raise UserError(f"{settings}: each says which response is better; set one of them to null")
        for role in given:
            if role not in PAIR_SCORES and not has_responses:
                raise self.error(f"columns.{role}={self.given[role]}: {self.where} has no two responses")
        return bool(given)


@dataclass(frozen=True)
class Fields:
    """The values of a row by role; None for a null, and no value for a column that the row lacks."""

    values: Mapping[str, Any]
    columns: Mapping[str, str]

    @classmethod
    def of(cls, row: Mapping[str, Any], columns: Mapping[str, str]) -> "Fields":
        """Read a row's columns by role; messages may be a JSON text, and the prompt an object {"messages", "tools"}.

        A sampled response is a text whatever it looks like.
        """
        values = {role: row[name] for role, name in columns.items() if name in row}
        as_they_are = SAMPLED if values.get("sampled_ids") is not None else ()
        for role, name in columns.items():
            if role in values and role not in as_they_are:
                values[role] = read_written(values[role], name)
        values |= {role: None for role, value in values.items() if value == []}
        prompt = values.get("prompt")
        if isinstance(prompt, Mapping) and "messages" in prompt:
            values |= {"prompt": prompt["messages"], "tools": values.get("tools") or prompt.get("tools")}
        fields = cls(values, columns)
        if "input" in fields:
            if not isinstance(values.get("prompt"), str):
                raise UserError(
                    f"columns.input={columns['input']}: this row has no text prompt to append it to; leave it out"
                )
            texts = [checked_text(values[role], columns[role]) for role in ("prompt", "input")]
            values["prompt"] = "\n".join(text for text in texts if text)  # as LLaMA-Factory joins Alpaca's
        return fields

    def __contains__(self, role: str) -> bool:
        """Whether the row has a value, other than null."""
        return self.values.get(role) is not None

    def __getitem__(self, role: str) -> Any:
        return self.values.get(role)

    def name(self, role: str) -> str:
        return self.columns.get(role, role)

    @property
    def is_beside_messages(self) -> bool:
        """Whether `messages` is the chosen conversation, as in ms-swift."""
        return "chosen" in self.columns and self.columns["chosen"] == self.columns.get("messages")


def as_list(value: object, name: str) -> list[Any]:
    """A list, or its JSON; UserError for anything else, InconsistentRow for null."""
    try:
        items = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        items = value
    if items is None:
        raise InconsistentRow(f"{name} must be a list, not null")
    if not isinstance(items, list):
        raise UserError(f"{name} must be a list or its JSON, not {str(value)[:40]!r}")
    return items


def number(value: object, name: str) -> float:
    """A column's number, possibly as text; UserError if it is not finite, InconsistentRow if it is null or empty."""
    if value is None or value == "":  # CSV writes null as an empty cell
        raise InconsistentRow(f"{name} must be a number, not {'null' if value is None else 'empty'}")
    try:
        parsed = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # fails for other types
    except (TypeError, ValueError):
        parsed = math.nan
    if not math.isfinite(parsed):
        raise UserError(f"{name} must be a finite number, not {str(value)[:40]!r}")
    return parsed
