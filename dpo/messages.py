"""The messages of a conversation: OpenAI's form, which chat templates take, and ShareGPT's, which becomes it."""

import json
import re
from collections.abc import Mapping
from typing import Any

from dpo.errors import UserError
from dpo.examples import InconsistentRow
from dpo.preferences import checked_text

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
