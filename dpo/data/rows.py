"""Rows of preference data: the forms of a message and of a row, and what is the prompt and what the responses."""

import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from dpo.data.examples import InconsistentRow, UnusableRow
from dpo.data.preferences import checked_text
from dpo.system.errors import UserError

# The forms of a message

ROLES = ("system", "developer", "user", "assistant", "tool")
KEYS = {"from": "role", "value": "content"}  # ShareGPT's, and OpenAI's
CALL = "function_call"  # in ShareGPT's form a turn of the assistant, whose text is JSON: what it calls
OTHER_ROLES = {
    **{role: role for role in ROLES},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", CALL: "assistant"},
    **{"observation": "tool", "function_response": "tool"},
}
TEXT_PARTS = ("text", "input_text", "output_text")
WRITTEN_MESSAGES = re.compile(  # as JSON, or as Python prints them
    r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:"""
)

Message = dict[str, Any]


def as_messages(value: object, name: str, role: str) -> list[Message]:
    """Return a list of messages, or one message, or a text as the one turn of a role; UserError for another form."""
    if isinstance(value, str):
        check = checked_prompt if role == "user" else checked_text
        return [{"role": role, "content": check(value, name)}]
    if isinstance(value, Mapping):
        return [as_message(value, name)]
    if not isinstance(value, list) or not value:
        raise UserError(f"{name} must be a list of messages, not {'empty' if value == [] else type(value).__name__}")
    messages = [as_message(turn, f"{name}, turn {number}") for number, turn in enumerate(value, start=1)]
    if any(turn["role"] in ("system", "developer") for turn in messages[1:]):
        raise UserError(f"{name} has a system turn that is not its first turn")
    return messages


def checked_prompt(value: object, name: str) -> str:
    """Return a text; UserError if it is not one, or if it is a list of messages that was written as a text."""
    text = checked_text(value, name)
    if WRITTEN_MESSAGES.match(text):
        raise UserError(f"{name} holds messages as a text; write them as a list, in .jsonl or .parquet")
    return text


def as_message(turn: object, name: str) -> Message:
    """Return one message {"role", "content", ...} without its null fields, which tables add.

    UserError if it has another form, InconsistentRow if a part of its content is not text.
    """
    if not isinstance(turn, Mapping):
        raise UserError(f"{name} must be a message with role and content, not {type(turn).__name__}")
    message: Message = without_nulls(dict(turn))
    message = {key if KEYS.get(key, key) in message else KEYS[key]: value for key, value in message.items()}
    given = message.get("role")
    if given is None:
        keys = ", ".join(str(key)[:40] for key in list(message)[:8])
        raise UserError(f"{name} must be a message with role and content, not with {keys or 'nothing'}")
    if given not in ROLES:
        role = OTHER_ROLES.get(str(given).lower())
        if role is None:
            known = f"{', '.join(ROLES)}, or ShareGPT's human and gpt"
            raise UserError(f"{name} must have one of the roles {known}, not {str(given)[:40]!r}")
        message["role"] = role
        if str(given).lower() == CALL:
            message |= {"content": "", "tool_calls": as_calls(message.get("content"), name)}
    if message.get("content") is None and message.get("tool_calls"):
        message["content"] = ""
    if isinstance(message.get("content"), list):
        message["content"] = "".join(text_of(part, name) for part in message["content"])
    checked_text(message.get("content"), f"the content of {name}")
    checked_text(to_json(message), name)
    return message


def text_of(part: object, name: str) -> str:
    """Return the text of a part of a message's content; InconsistentRow if it is another part, as an image."""
    if not isinstance(part, Mapping):
        raise UserError(f"the content of {name} must be a text or a list of parts, not of {type(part).__name__}")
    kind = part.get("type", "text")
    if kind not in TEXT_PARTS:
        raise InconsistentRow("a turn holds a part that is not text", f"{name} has one of the type {str(kind)[:40]!r}")
    return checked_text(part.get("text"), f"the content of {name}")


def as_calls(content: object, name: str) -> list[Any]:
    """Return the calls of functions that a turn of ShareGPT's form holds as JSON; UserError if it holds none."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is a {CALL}, but not JSON ({error})") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise UserError(f'{name} is a {CALL}, which must be the JSON of {{"name", "arguments"}}, or of a list of them')
    return [{"type": "function", "function": call} for call in calls]


def as_tools(value: object, name: str) -> list[Any] | None:
    """Return the functions that a conversation may call, a list or its JSON; None if there are none."""
    if not value:
        return None
    try:
        tools = json.loads(value) if isinstance(value, str) else without_nulls(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not JSON ({error})") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{name} must be a list of functions")
    return tools or None


def without_nulls(value: Any) -> Any:
    """Return nested dicts and lists without the keys whose value is None."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps would make one per call


def answer_text(turn: Message) -> str:
    """Return a response's content, with anything else that it holds as JSON."""
    return str(turn["content"]) if turn.keys() <= {"role", "content"} else to_json(turn)


def to_json(value: object) -> str:
    """Return texts, nested lists and dicts as JSON."""
    return ENCODER.encode(value)


# The forms of a row

ASSISTANT = "\n\nAssistant:"
DIFFERS = "kept although the rejected dialogue's prompt differs"

LABELS = {"true": True, "1": True, "false": False, "0": False}
PAIR: tuple[str, ...] = ("chosen", "rejected")

# Names by which a column is found, by what it is used for; one without names is only used where it is given. Where a
# table has several of them, those of FIRST take the first.
COLUMN_NAMES = {
    "prompt": ("prompt", "question", "instruction", "input"),
    "input": (),
    "chosen": ("chosen", "response_j"),
    "rejected": ("rejected", "response_k"),
    "completion": ("completion", "response"),
    "label": ("label",),
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system",),
    "tools": ("tools",),
    "score_chosen": (),
    "score_rejected": (),
}
FIRST = ("completion", "messages")


class Row(NamedTuple):
    """A row as a prompt with its responses, (chosen, rejected) or (target,): all of them texts, or all messages.

    every_target: SFT trains on each distinct target of the prompt, not on the last one alone. tools are the functions
    that a conversation may call, scores those of the responses; label is whether the one response is desirable.
    """

    prompt: str | list[Message]
    responses: tuple[Any, ...]
    every_target: bool = True
    remark: str | None = None
    tools: list[Any] | None = None
    scores: tuple[float, ...] = ()
    label: bool | None = None
    used: frozenset[str] = frozenset()  # what columns were read

    def texts(self) -> tuple[str, tuple[str, ...]]:
        """Return the prompt and the responses as texts that identify it, messages as JSON."""
        if isinstance(self.prompt, str):
            return self.prompt, self.responses
        return to_json([self.prompt, self.tools]), tuple(map(answer_text, self.responses))


def find_columns(found: Collection[str], given: Mapping[str, str | None], where: str) -> dict[str, str]:
    """Return {what a column is used for: its name}; UserError if a given one is missing or several could be meant.

    Without any candidate a column keeps its usual name, which each row must then hold. A given label stands for rows of
    one response, so that chosen and rejected are not looked for.
    """
    columns, listed = {}, ", ".join(sorted(found)) or "none"
    for use, names in COLUMN_NAMES.items():
        name = given.get(use)
        if use in ("chosen", "rejected") and given.get("label") is not None:
            continue
        alike = {known: sorted(column for column in found if column.strip().lower() == known) for known in names}
        named = [column for known in names for column in ([known] if known in found else alike[known])]
        candidates = [column for column in named if column not in given.values()]
        if name is not None and name not in found:
            raise UserError(f"columns.{use}={name}: {where} has no such column; its columns: {listed}")
        if name is None and len(candidates) > 1 and use not in FIRST:
            problem = f"{where}: {' and '.join(candidates)} could each be the {use}; set columns.{use}=NAME"
            if [column.strip().lower() for column in candidates] == ["instruction", "input"]:
                problem += f", or columns.input={candidates[1]} to read it after the instruction"
            raise UserError(f"{problem}; its columns: {listed}")
        if name is not None or names:
            columns[use] = name or [*candidates, names[0]][0]
    return columns


def parse_row(row: object, columns: Mapping[str, str], sft: bool, chat: bool = False, labels: bool = False) -> Row:
    """Return a row's prompt and responses; UserError if it has no known form, UnusableRow if it cannot be trained on.

    SFT needs no rejected response: it takes the chosen one, or a completion, or the last turn of messages. With chat a
    prompt of text and its responses are a turn each; with labels a row may also be a completion, or messages, with a
    label.
    """
    if not isinstance(row, dict):
        raise UserError(f"is not an object with the fields chosen and rejected but {type(row).__name__}")
    fields = {use: row[name] for use, name in columns.items() if name in row}
    if fields.get("input") is None:  # as tables have it where there is none
        fields.pop("input", None)
    if "input" in fields:
        fields["prompt"] = with_input(fields, columns)
    found = [use for use in ("completion", "messages") if use in fields and "chosen" not in fields]
    single: tuple[str, ...] = tuple(found[:1])
    is_labelled = bool(single) and "label" in fields
    if is_labelled and not (sft or labels):
        raise UserError("has one response and a label, for loss=kto; this loss needs a chosen and a rejected response")
    if single and (sft or is_labelled):
        uses = single
    else:
        uses = ("chosen",) if sft and not fields.keys() >= set(PAIR) else PAIR
    if missing := [use for use in uses if use not in fields]:
        listed = ", ".join(repr(str(name))[1:-1] for name in list(row)[:20])
        if labels and single:
            raise UserError(f"{columns['label']} must be true or false, not missing; the row's columns: {listed}")
        name = columns.get(missing[0], missing[0])
        what, use = ("chosen, completion or messages", "completion") if sft else (name, missing[0])
        raise UserError(f"{what} must be a text, not missing; the row's columns: {listed}; set columns.{use}=NAME")
    kinds = {isinstance(fields[use], (list, Mapping)) for use in uses}
    if len(kinds) > 1:
        names = " and ".join(columns[use] for use in uses)
        raise UserError(f"{names} must both be texts or both be messages")
    before = fields.get("prompt", fields.get("messages"))
    if True in kinds or isinstance(before, (list, Mapping)) or (chat and "prompt" in fields):
        parsed = parse_conversation(fields, uses, columns)
    else:
        parsed = parse_texts(fields, uses, columns)
    parsed = parsed._replace(used=parsed.used | ({"input"} & fields.keys()))
    if is_labelled and sft:
        return desirable(parsed, fields["label"], columns["label"], is_given="chosen" not in columns)
    if is_labelled:
        label = parse_label(fields["label"], columns["label"])
        return parsed._replace(label=label, used=parsed.used | {"label"})
    return by_score(parsed, fields, columns)


def with_input(fields: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """Return a prompt with the input that follows it, if that is not empty, as LLaMA-Factory joins Alpaca's."""
    if not isinstance(fields.get("prompt"), str):
        raise UserError(f"columns.input={columns['input']}: follows a prompt of text, which this row does not have")
    texts = [checked_text(fields[use], columns[use]) for use in ("prompt", "input")]
    return "\n".join(text for text in texts if text)


def parse_texts(fields: Mapping[str, Any], uses: Sequence[str], columns: Mapping[str, str]) -> Row:
    """Return a row of texts: with a prompt, or dialogues as hh has them, which share all but the last answer."""
    if "prompt" in fields:
        responses = tuple(checked_text(fields[use], columns[use]) for use in uses)
        return Row(checked_prompt(fields["prompt"], columns["prompt"]), responses, used=frozenset(("prompt", *uses)))
    if uses == ("completion",):
        raise UserError(f"{columns['prompt']} must be a text, not missing")
    responses = tuple(checked_prompt(fields[use], columns[use]) for use in uses)
    chosen = responses[0]
    if ASSISTANT not in chosen:
        remedy = "a row that is not such a dialogue needs a prompt; set columns.prompt=NAME"
        raise UserError(f"the chosen dialogue has no {ASSISTANT!r}; {remedy}")
    start = chosen.rfind(ASSISTANT) + len(ASSISTANT)
    differs = any(response[:start] != chosen[:start] for response in responses)
    answers = tuple(response[start:] for response in responses)
    return Row(chosen[:start], answers, False, DIFFERS if differs else None, used=frozenset(uses))


def parse_conversation(fields: Mapping[str, Any], uses: Sequence[str], columns: Mapping[str, str]) -> Row:
    """Return a row of messages: a prompt with one answer each, or whole conversations that differ in the last turn.

    The prompt is the column of that name, or else messages, which then end before the answer.
    """
    responses = [as_messages(fields[use], columns[use], "assistant") for use in uses]
    whole = [use == "messages" or len(turns) > 1 for use, turns in zip(uses, responses, strict=True)]
    if len(set(whole)) > 1:
        names = " and ".join(columns[use] for use in uses)
        raise UserError(f"{names} must both be whole conversations, or both one answer")
    used = {*uses, *({"system", "tools"} & fields.keys())}
    if whole[0]:
        prompts = [turns[:-1] for turns in responses]
    elif before := [use for use in ("prompt", "messages") if use in fields][:1]:
        used |= {*before}
        prompts = [as_messages(fields[before[0]], columns[before[0]], "user")]
    else:
        raise UserError(f"{columns['prompt']} must be there where the responses are one answer each")
    prompt = prompts[0]
    if any(turns[-1]["role"] != "assistant" for turns in responses):
        raise UnusableRow("the last turn of a conversation is not the assistant's")
    if any(other != prompt for other in prompts):
        raise UnusableRow("the conversations differ in more than their last turn")
    if system := fields.get("system"):
        if prompt[:1] and prompt[0]["role"] in ("system", "developer"):
            raise UserError(f"{columns['system']} is given, but the conversation has a system turn of its own")
        prompt = [{"role": "system", "content": checked_text(system, columns["system"])}, *prompt]
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise UserError("the turn before a response must be the user's or a tool's")
    if any(not str(turn.get("content") or "").strip() and not turn.get("tool_calls") for turn in prompt):
        raise UnusableRow("a turn is empty")
    tools = as_tools(fields.get("tools"), columns["tools"])
    return Row(prompt, tuple(turns[-1] for turns in responses), tools=tools, used=frozenset(used))


def by_score(parsed: Row, fields: Mapping[str, Any], columns: Mapping[str, str]) -> Row:
    """Return a pair with the response of the higher score first, where both scores are given."""
    names = [columns[use] for use in ("score_chosen", "score_rejected") if use in columns]
    if len(names) < 2 or len(parsed.responses) < 2:
        return parsed
    scores = [
        number(fields.get(use), name) for use, name in zip(("score_chosen", "score_rejected"), names, strict=True)
    ]
    if scores[0] == scores[1]:
        raise UnusableRow("both scores are equal")
    order = (0, 1) if scores[0] > scores[1] else (1, 0)
    return parsed._replace(
        responses=tuple(parsed.responses[i] for i in order),
        scores=tuple(scores[i] for i in order),
        used=parsed.used | {"score_chosen", "score_rejected"},
    )


def desirable(parsed: Row, label: object, name: str, is_given: bool) -> Row:
    """Return a row for SFT; UnusableRow if its label is false.

    Only in a column that the user gave is a label of another kind refused; else it is not read.
    """
    found = parse_label(label, name) if is_given else LABELS.get(str(label).strip().lower())
    if found is False:
        raise UnusableRow("the response is labelled undesirable")
    return parsed if found is None else parsed._replace(used=parsed.used | {"label"})


def parse_label(value: object, name: str) -> bool:
    """Return whether a response is desirable, by true, false, 1, 0 or their text; UserError for anything else."""
    found = LABELS.get(str(value).strip().lower())
    if found is None:
        raise UserError(f"{name} must be true or false, not {str(value)[:40]!r}")
    return found


def number(value: object, name: str) -> float:
    """Return a column's number, which may be written as text; UserError if it is not a finite one."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)  # type: ignore[arg-type]  # which may fail
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"{name} must be a finite number, not {str(value)[:40]!r}")
    return found
