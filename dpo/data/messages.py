"""Parses messages, in all their forms, into those that chat templates expect."""

import json
import re
from collections.abc import Mapping
from typing import Any

from dpo.system.errors import UserError


class UnusableRow(UserError):
    """A row that cannot be trained on: the reason, by which such rows are counted, and details."""

    def __init__(self, reason: str, details: str = ""):
        self.reason = reason
        super().__init__(f"{reason} ({details})" if details else reason)


class InconsistentRow(UnusableRow):
    """A conversation that the chat template does not render as a prompt followed by the response."""


def checked_text(text: object, name: str) -> str:
    """The text; UserError if it is not a string that can be encoded as UTF-8."""
    if not isinstance(text, str):
        raise UserError(f"{name} must be a text, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name} contains half of a surrogate pair, which is not valid text") from None
    return text


# The forms of a message

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_KEYS = {"from": "role", "value": "content"}
FUNCTION_CALL = "function_call"  # ShareGPT's role for an assistant's turn with calls as JSON
SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    FUNCTION_CALL: "assistant",
    "observation": "tool",
    "function_response": "tool",
}
TEXT_PARTS = ("text", "input_text", "output_text")
WRITTEN_MESSAGES = re.compile(  # as JSON, or as Python prints them
    r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:"""
)

Message = dict[str, Any]


def as_messages(value: object, name: str, role: str) -> list[Message]:
    """Make messages from a list of them, one message, or a text (one turn of a role); UserError for other forms."""
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
    """The text; UserError if it is not a string, or if it is a list of messages written as text."""
    text = checked_text(value, name)
    if WRITTEN_MESSAGES.match(text):
        raise UserError(f"{name} holds messages as a text; write them as a list, in .jsonl or .parquet")
    return text


def as_message(turn: object, name: str) -> Message:
    """A message {"role", "content", ...} without the null fields that tables add.

    UserError for another form, InconsistentRow if a part of the content is not text.
    """
    if not isinstance(turn, Mapping):
        raise UserError(f"{name} must be a message with role and content, not {type(turn).__name__}")
    message: Message = without_nulls(dict(turn))
    for other, key in SHAREGPT_KEYS.items():
        if key not in message:
            message = {key if old == other else old: value for old, value in message.items()}
    role = message.get("role")
    if role is None:
        keys = ", ".join(str(key)[:40] for key in list(message)[:8])
        raise UserError(f"{name} must be a message with role and content, not with {keys or 'nothing'}")
    if role not in ROLES:
        lower = str(role).lower()
        message["role"] = lower if lower in ROLES else SHAREGPT_ROLES.get(lower)
        if message["role"] is None:
            known = f"{', '.join(ROLES)}, or ShareGPT's human and gpt"
            raise UserError(f"{name} must have one of the roles {known}, not {str(role)[:40]!r}")
        if lower == FUNCTION_CALL:
            message |= {"content": "", "tool_calls": as_calls(message.get("content"), name)}
    if message.get("content") is None and message.get("tool_calls"):
        message["content"] = ""
    if isinstance(message.get("content"), list):
        message["content"] = "".join(text_of(part, name) for part in message["content"])
    checked_text(message.get("content"), f"the content of {name}")
    checked_text(to_json(message), name)
    return message


def text_of(part: object, name: str) -> str:
    """The text of a content part; InconsistentRow if the part has another type, such as an image."""
    if not isinstance(part, Mapping):
        raise UserError(f"the content of {name} must be a text or a list of parts, not of {type(part).__name__}")
    kind = part.get("type", "text")
    if kind not in TEXT_PARTS:
        raise InconsistentRow(
            "a turn contains a part that is not text", f"{name} has one of the type {str(kind)[:40]!r}"
        )
    return checked_text(part.get("text"), f"the content of {name}")


def as_calls(content: object, name: str) -> list[Any]:
    """The function calls in a ShareGPT turn, given as JSON; UserError if there are none."""
    calls = from_json(content, f"{name} is a {FUNCTION_CALL}, but")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        form = 'which must be the JSON of {"name", "arguments"}, or of a list of them'
        raise UserError(f"{name} is a {FUNCTION_CALL}, {form}")
    return [{"type": "function", "function": call} for call in calls]


def as_tools(value: object, name: str) -> list[Any] | None:
    """The tools of a conversation, given as a list or its JSON; None if there are none."""
    if not value:
        return None
    tools = from_json(value, f"{name} is") if isinstance(value, str) else without_nulls(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"{name} must be a list of functions")
    return tools or None


def from_json(value: object, problem: str) -> Any:
    """Parse a JSON text; other values are returned unchanged. UserError that begins with the problem if it fails."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{problem} not JSON ({error})") from None


def without_nulls(value: Any) -> Any:
    """Nested dicts and lists without keys whose value is None."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps would make one per call


def to_json(value: object) -> str:
    return ENCODER.encode(value)


def answer_text(turn: Message) -> str:
    """A response's content, or the whole turn as JSON if it has other keys."""
    return str(turn["content"]) if turn.keys() <= {"role", "content"} else to_json(turn)
