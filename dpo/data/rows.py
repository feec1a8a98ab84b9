"""Parses rows of preference data, in all their forms, into a prompt and responses."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from dpo.data.messages import (
    Message,
    UnusableRow,
    answer_text,
    as_messages,
    as_tools,
    checked_prompt,
    checked_text,
    to_json,
)
from dpo.settings.schema import Column, ColumnSettings
from dpo.system.errors import UserError

# The forms of a row

ASSISTANT = "\n\nAssistant:"
DIFFERENT_PROMPTS = "the rejected dialogue's prompt differs"

LABELS = {"true": True, "1": True, "false": False, "0": False}
PAIR = ("chosen", "rejected")
SCORES = ("score_chosen", "score_rejected")
COLUMNS: dict[str, Column] = {role: info.metadata[-1] for role, info in ColumnSettings.model_fields.items()}
NUMBERS = [role for role, column in COLUMNS.items() if column.is_number]


@dataclass
class Row:
    """A prompt with its responses, (chosen, rejected) or (target,); all are texts, or all are messages.

    every_target: SFT trains on each distinct target of the prompt, not only the last one. prompts_differ: the two
    dialogues have different prompts. tools are the functions that a conversation may call. extras are further fields of
    the example by name, such as its label or scores.
    """

    prompt: str | list[Message]
    responses: tuple[Any, ...]
    every_target: bool = True
    prompts_differ: bool = False
    tools: list[Any] | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)
    columns_read: frozenset[str] = frozenset()  # their roles

    @cached_property
    def texts(self) -> tuple[str, tuple[str, ...]]:
        """The prompt and the responses as texts that identify the row; messages as JSON."""
        if isinstance(self.prompt, str):
            return self.prompt, self.responses
        return to_json([self.prompt, self.tools]), tuple(map(answer_text, self.responses))

    def with_extras(self, roles: Collection[str], extras: Mapping[str, Any]) -> "Row":
        """The row with further fields of the example, read from columns of the given roles."""
        return replace(self, extras={**self.extras, **extras}, columns_read=self.columns_read | set(roles))


def find_columns(names: Collection[str], given: Mapping[str, str | None], where: str) -> dict[str, str]:
    """Find a table's columns by role, as {role: name}; given are those that the user set.

    UserError if a given column is missing or several match. Without a match a column keeps its usual name, which each
    row must then have. With a given label, rows have one response, so chosen and rejected are not searched.
    """
    columns: dict[str, str] = {}
    existing = f"its columns: {', '.join(sorted(names)) or 'none'}"
    for role, column in COLUMNS.items():
        if role in PAIR and given.get("label") is not None:
            continue
        name = given.get(role)
        if name is not None:
            if name not in names:
                raise UserError(f"columns.{role}={name}: {where} has no such column; {existing}")
            columns[role] = name
            continue
        candidates = [name for known in column.names for name in spellings(known, names) if name not in given.values()]
        if len(candidates) > 1 and not column.takes_first:
            problem = f"{where}: {' and '.join(candidates)} could each be the {role}; set columns.{role}=NAME"
            if [name.strip().lower() for name in candidates] == ["instruction", "input"]:
                problem += f", or columns.input={candidates[1]} to read it after the instruction"
            raise UserError(f"{problem}; {existing}")
        if column.names:
            columns[role] = candidates[0] if candidates else column.names[0]
    return columns


def spellings(known: str, names: Collection[str]) -> list[str]:
    """The columns with a known name: an exact match, otherwise those that differ in case or outer spaces."""
    return [known] if known in names else sorted(name for name in names if name.strip().lower() == known)


def parse_row(row: object, columns: Mapping[str, str], sft: bool, chat: bool = False, labels: bool = False) -> Row:
    """Find a row's prompt and responses; UserError if it has no known form, UnusableRow if it cannot be trained on.

    SFT needs no rejected response: it uses the chosen one, a completion, or the last turn of messages. With chat, a
    text prompt and its responses become one turn each. With labels, a row may also be a completion, or messages, with a
    label.
    """
    if not isinstance(row, dict):
        raise UserError(f"must be an object with the fields chosen and rejected, not {type(row).__name__}")
    fields = {role: row[name] for role, name in columns.items() if name in row}
    if fields.get("input") is None:  # tables have null if there is none
        fields.pop("input", None)
    if "input" in fields:
        fields["prompt"] = with_input(fields, columns)
    single = [role for role in ("completion", "messages") if role in fields and "chosen" not in fields][:1]
    is_labelled = bool(single) and "label" in fields
    if is_labelled and not (sft or labels):
        raise UserError("has one response and a label, for loss=kto; this loss needs a chosen and a rejected response")
    roles: Sequence[str] = PAIR
    if single and (sft or is_labelled):
        roles = single
    elif sft and not fields.keys() >= set(PAIR):
        roles = ("chosen",)
    if missing := [role for role in roles if role not in fields]:
        existing = "the row's columns: " + ", ".join(repr(str(name))[1:-1] for name in list(row)[:20])
        if labels and single:
            raise UserError(f"{columns['label']} must be true or false, not missing; {existing}")
        role, name = missing[0], columns.get(missing[0], missing[0])
        if sft:
            role, name = "completion", "chosen, completion or messages"
        raise UserError(f"{name} must be a text, not missing; {existing}; set columns.{role}=NAME")
    are_messages = {isinstance(fields[role], (list, Mapping)) for role in roles}
    if len(are_messages) > 1:
        names = " and ".join(columns[role] for role in roles)
        raise UserError(f"{names} must both be texts or both be messages")
    prompt = fields.get("prompt", fields.get("messages"))
    if True in are_messages or isinstance(prompt, (list, Mapping)) or (chat and "prompt" in fields):
        parsed = parse_conversation(fields, roles, columns)
    else:
        parsed = parse_texts(fields, roles, columns)
    if "input" in fields:
        parsed = parsed.with_extras(["input"], {})
    for role in NUMBERS:
        if role in fields:
            parsed = parsed.with_extras([role], {role: number(fields[role], columns[role])})
    if is_labelled and sft:
        return desirable(parsed, fields["label"], columns["label"], is_given="chosen" not in columns)
    if is_labelled:
        return parsed.with_extras(["label"], {"label": parse_label(fields["label"], columns["label"])})
    return by_score(parsed, fields, columns)


def with_input(fields: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """The prompt followed by the input, if not empty, as LLaMA-Factory joins Alpaca's."""
    if not isinstance(fields.get("prompt"), str):
        raise UserError(f"columns.input={columns['input']}: needs a text prompt, which this row does not have")
    texts = [checked_text(fields[role], columns[role]) for role in ("prompt", "input")]
    return "\n".join(text for text in texts if text)


def parse_texts(fields: Mapping[str, Any], roles: Sequence[str], columns: Mapping[str, str]) -> Row:
    """A row of texts: with a prompt, or hh-style dialogues that share all but the last answer."""
    if "prompt" in fields:
        responses = tuple(checked_text(fields[role], columns[role]) for role in roles)
        prompt = checked_prompt(fields["prompt"], columns["prompt"])
        return Row(prompt, responses, columns_read=frozenset(("prompt", *roles)))
    if "completion" in roles:
        raise UserError(f"{columns['prompt']} must be a text, not missing")
    dialogues = [checked_prompt(fields[role], columns[role]) for role in roles]
    advice = "; a row that is not such a dialogue needs a prompt; set columns.prompt=NAME"
    prompt, answers, prompts_differ = split_dialogues(dialogues, advice)
    return Row(prompt, answers, every_target=False, prompts_differ=prompts_differ, columns_read=frozenset(roles))


def split_dialogues(dialogues: Sequence[str], advice: str = "") -> tuple[str, tuple[str, ...], bool]:
    """The prompt of hh-style dialogues, their last answers, and whether their prompts differ.

    As in the original, all answers begin at the position of the first dialogue's. UserError if it has none.
    """
    if ASSISTANT not in dialogues[0]:
        raise UserError(f"the chosen dialogue has no {ASSISTANT!r}{advice}")
    start = dialogues[0].rfind(ASSISTANT) + len(ASSISTANT)
    prompt = dialogues[0][:start]
    prompts_differ = not all(dialogue.startswith(prompt) for dialogue in dialogues)
    return prompt, tuple(dialogue[start:] for dialogue in dialogues), prompts_differ


def parse_conversation(fields: Mapping[str, Any], roles: Sequence[str], columns: Mapping[str, str]) -> Row:
    """A row of messages: a prompt with single answers, or whole conversations that differ in the last turn.

    The prompt is the column prompt, or else messages, which then end before the answer.
    """
    responses = [as_messages(fields[role], columns[role], "assistant") for role in roles]
    are_whole = {role == "messages" or len(turns) > 1 for role, turns in zip(roles, responses, strict=True)}
    if len(are_whole) > 1:
        names = " and ".join(columns[role] for role in roles)
        raise UserError(f"{names} must both be whole conversations, or both be single answers")
    columns_read = {*roles, *({"system", "tools"} & fields.keys())}
    if True in are_whole:
        prompts = [turns[:-1] for turns in responses]
    elif prompt_roles := [role for role in ("prompt", "messages") if role in fields]:
        role = prompt_roles[0]
        columns_read.add(role)
        prompts = [as_messages(fields[role], columns[role], "user")]
    else:
        raise UserError(f"{columns['prompt']} is missing; responses that are single answers need a prompt")
    prompt = prompts[0]
    if any(turns[-1]["role"] != "assistant" for turns in responses):
        raise UnusableRow("the last turn of a conversation is not the assistant's")
    if any(other != prompt for other in prompts):
        raise UnusableRow("the conversations differ in more than their last turn")
    if system := fields.get("system"):
        if prompt[:1] and prompt[0]["role"] in ("system", "developer"):
            raise UserError(f"{columns['system']} is given, but the conversation already has a system turn")
        prompt = [{"role": "system", "content": checked_text(system, columns["system"])}, *prompt]
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise UserError("the turn before a response must be the user's or a tool's")
    if any(not str(turn.get("content") or "").strip() and not turn.get("tool_calls") for turn in prompt):
        raise UnusableRow("a turn is empty")
    answers = tuple(turns[-1] for turns in responses)
    tools = as_tools(fields.get("tools"), columns["tools"])
    return Row(prompt, answers, tools=tools, columns_read=frozenset(columns_read))


def by_score(parsed: Row, fields: Mapping[str, Any], columns: Mapping[str, str]) -> Row:
    """The pair with the higher-scored response first, if both scores are given."""
    if len(parsed.responses) < 2 or not columns.keys() >= set(SCORES):
        return parsed
    first, second = (number(fields.get(role), columns[role]) for role in SCORES)
    if first == second:
        raise UnusableRow("both scores are equal")
    if first < second:
        parsed = replace(parsed, responses=parsed.responses[::-1])
    return parsed.with_extras(SCORES, {"scores": (max(first, second), min(first, second))})


def desirable(parsed: Row, label: object, name: str, is_given: bool) -> Row:
    """The row as it is for SFT; UnusableRow if its label is false.

    Other values of a label are refused if the user set the column (is_given), otherwise ignored.
    """
    is_desirable = parse_label(label, name) if is_given else LABELS.get(str(label).strip().lower())
    if is_desirable is False:
        raise UnusableRow("the response is labelled undesirable")
    return parsed if is_desirable is None else parsed.with_extras(["label"], {})


def parse_label(value: object, name: str) -> bool:
    """Whether a response is desirable: true, false, 1, 0 or their text; UserError for anything else."""
    is_desirable = LABELS.get(str(value).strip().lower())
    if is_desirable is None:
        raise UserError(f"{name} must be true or false, not {str(value)[:40]!r}")
    return is_desirable


def number(value: object, name: str) -> float:
    """A column's number, possibly written as text; UserError if it is not finite."""
    try:
        parsed = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # which may fail
    except (TypeError, ValueError):
        parsed = math.nan
    if not math.isfinite(parsed):
        raise UserError(f"{name} must be a finite number, not {str(value)[:40]!r}")
    return parsed
