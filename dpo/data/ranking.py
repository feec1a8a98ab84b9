"""Which of a row's responses is better, by scores, ranks or a preference, and the pairs made of them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from string import ascii_lowercase
from typing import Any, Literal

from dpo.data.columns import COLUMNS, LISTS, ORDERS, PAIR, PAIR_SCORES, PREFERENCES, Fields, as_list, number
from dpo.data.messages import UnusableRow
from dpo.system.errors import UserError

TIES = ("", "tie", "tie (bothbad)", "both", "bothbad", "both_bad", "neither", "equal")
PairChoice = Literal["best_worst", "all", "best_rest"]


@dataclass(frozen=True)
class Ranking:
    """Pairs (chosen, rejected) of responses, and the best response, all as indices.

    scores has the score of each response, or is empty. ties counts the pairs left out because their scores are equal.
    """

    pairs: tuple[tuple[int, int], ...] = ()
    best: int = 0
    scores: tuple[float, ...] = ()
    ties: int = 0
    roles: tuple[str, ...] = ()  # roles of the columns that were read


def rank(fields: Fields, roles: Sequence[str], items: Sequence[Any], choice: PairChoice) -> Ranking:
    """Rank a row's responses, given with their roles; UnusableRow if no response is better than another."""
    role, values = rate(fields, roles, items)
    pairs = pairs_of(values, choice)
    different = tuple((i, j) for i, j in pairs if values[i] != values[j])
    if not different and role in PREFERENCES:
        raise UnusableRow("no response is better")
    if not different:
        raise UnusableRow("both scores are equal" if len(values) == 2 else "all scores are equal")
    scores = tuple(values) if role in ("scores", *PAIR_SCORES) else ()
    columns_read = PAIR_SCORES if role in PAIR_SCORES else (role,)
    return Ranking(different, values.index(max(values)), scores, len(pairs) - len(different), columns_read)


def pairs_of(values: Sequence[float], choice: PairChoice) -> list[tuple[int, int]]:
    """The pairs (better, worse) of responses with these values, as indices; the values of a pair may be equal."""
    best, worst = values.index(max(values)), values.index(min(values))
    if choice == "best_worst":
        return [(best, worst)]
    if choice == "best_rest":
        return [(best, index) for index in range(len(values)) if index != best]
    return [(i, j) if values[i] >= values[j] else (j, i) for i, j in combinations(range(len(values)), 2)]


def rate(fields: Fields, roles: Sequence[str], items: Sequence[Any]) -> tuple[str, list[float]]:
    """The role of the column that says which response is better, and a value of each response, higher is better."""
    role = next((role for role in ORDERS if role in fields.columns), "")
    name, is_pair = fields.name(role), tuple(roles) == PAIR
    if is_pair and not role:
        return "chosen", [1.0, 0.0]
    if role == "preferred":
        columns = [fields.name(role) for role in PAIR] if is_pair else []
        preferred = preferred_index(fields[role], name, columns, len(items))
        return role, [float(index == preferred) for index in range(len(items))]
    if role == "preference_strength" and len(items) == 2:
        strength = number(fields[role], name)
        return role, [-strength, strength]
    if role == PAIR_SCORES[0] and is_pair:
        return role, [number(fields[role], fields.name(role)) for role in PAIR_SCORES]
    if role and role not in LISTS:
        raise UserError(f"columns.{role}={name}: compares two responses, not {len(items)}")
    if role in fields.values:
        values = as_list(fields[role], name)
    else:
        role, name = key_of(fields, items)
        values = [item[name] for item in items]
    if len(values) != len(items):
        raise UserError(f"{name} has {len(values)} values for {len(items)} responses")
    sign = -1 if role == "ranks" else 1
    return role, [sign * number(value, name) for value in values]


def key_of(fields: Fields, items: Sequence[Any]) -> tuple[str, str]:
    """The role and the key of the score or rank that each response, an object, holds."""
    known = [(role, key) for role in LISTS for key in COLUMNS[role].keys]
    for role in LISTS:
        if role in fields.columns:
            known = [(role, fields.columns[role])]
    matches = [(role, key) for role, key in known if all(has_key(item, key) for item in items)]
    if len(matches) != 1:
        keys = " and ".join(key for _, key in matches)
        problem = f"{keys} could each say it" if keys else "no column and no key of the responses says it"
        advice = "set columns.scores, columns.ranks or columns.preferred"
        raise UserError(f"which of the {len(items)} responses is better? {problem}; {advice}")
    return matches[0]


def has_key(item: object, key: str) -> bool:
    return isinstance(item, Mapping) and key in item


def preferred_index(value: object, name: str, columns: Sequence[str], n: int) -> int | None:
    """The index of the better response, None for a tie; UserError if a value is not understood.

    The value is the name of a column, or the letter or number at its end. Where the names end with neither, it is a
    letter from A or an index from 0. Of two responses, true is the first one.
    """
    text = "" if value is None else str(value).strip().lower()
    if text in TIES:
        return None
    if text in ("true", "false") and n == 2:
        return int(text == "false")
    names = [column.strip().lower() for column in columns]
    marks = [mark(column) for column in names]
    if is_number := re.fullmatch(r"\d+(\.0+)?", text):
        text = text.partition(".")[0]
    elif text not in names:
        match = re.fullmatch(r"(?:(?:model|response|answer|assistant|option)[ _]?)?(\d+|[a-z])", text)
        text = match[1] if match else text
    if len({*marks} - {""}) == n:
        labels = marks
    elif is_number:
        labels = list(map(str, range(n)))
    else:
        labels = list(ascii_lowercase[:n])
    for known in (names, labels):
        if text in known:
            return known.index(text)
    choices = " or ".join(columns) or f"an index from 0 to {n - 1}"
    advice = "set columns.preference_strength for a number with a sign, columns.score_chosen for two scores"
    raise UserError(f"{name} must say which response is better, {choices}, not {str(value)[:40]!r}; {advice}")


def mark(name: str) -> str:
    """The number or the single letter at the end of a column's name, as in response_1; or nothing."""
    match = re.search(r"\d+$|(?<![a-z0-9])[a-z]$", name)
    return match[0] if match else ""
