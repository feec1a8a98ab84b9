"""Parses messages, in all their forms, into those that chat templates expect."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dpo.system.errors import UserError


class UnusableRow(UserError):
    """A row that cannot be trained on: the reason, by which such rows are counted, and details."""

    def __init__(self, reason: str, details: str = ""):
        self.reason = reason
        super().__init__(f"{reason} ({details})" if details else reason)


class InconsistentRow(UnusableRow):
    """A row in a form that cannot be used, or a conversation that the chat template does not render in full."""


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

SYSTEM = ("system", "developer")
ROLES = (*SYSTEM, "user", "assistant", "tool")
OTHER_KEYS = {"from": "role", "value": "content"}
CALLS_AS_JSON = ("function_call", "tool_call")  # roles of an assistant's turn whose content is the JSON of its calls
OTHER_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
THOUGHT = re.compile(r"(\s*(?:<think>)?)(.*?)(</think>\s*)(.*)", re.DOTALL)  # opening, thought, closing, answer
A_THOUGHT = "a thought"
TURN_TEXTS = {role: f"a turn of the {role}" for role in ROLES} | {"tool": "what a tool returned"}
TEXT_PARTS = ("text", "input_text", "output_text")
WRITTEN_MESSAGES = re.compile(  # a list of messages or one message, as JSON or as Python prints it
    r"""\s*(array\()?\[?\s*\{\s*['"](role|content|from|value|name|id)['"]\s*:"""
)
WRITTEN_ROLE = re.compile(rf"""['"](role|from)['"]\s*:\s*['"]({"|".join((*ROLES, "human", "gpt"))})['"]""")

Message = dict[str, Any]


def as_messages(value: object, name: str, role: str) -> list[Message]:
    """Make messages of a list of messages, one message, or a text, which is one turn of a role; null is an empty text.

    InconsistentRow if the value has another form.
    """
    if value is None:
        value = ""
    if isinstance(value, str):
        return [{"role": role, "content": checked_text(value, name)}]
    if isinstance(value, Mapping):
        return [as_message(value, name)]
    if not isinstance(value, list) or not value:
        raise other_form(f"{name} must be a list of messages, not {'empty' if value == [] else type(value).__name__}")
    messages = [as_message(turn, f"{name}, turn {number}") for number, turn in enumerate(value, start=1)]
    system_roles = [turn["role"] for turn in messages if turn["role"] in SYSTEM]
    if len(system_roles) > n_system(messages) or len(set(system_roles)) < len(system_roles):
        raise other_form(f"{name} has a system turn that is not its first turn")
    return messages


def n_system(messages: Sequence[Message]) -> int:
    """The number of system and developer turns at the start."""
    return next((number for number, turn in enumerate(messages) if turn["role"] not in SYSTEM), len(messages))


def other_form(details: str) -> InconsistentRow:
    return InconsistentRow("a message has a form that cannot be used", details)


def read_written(value: object, name: str) -> Any:
    """Parse messages that are written as a JSON text; other values are returned unchanged.

    InconsistentRow if they are written in another way, such as Python lists in the CSV files of pandas.
    """
    if not isinstance(value, str) or not WRITTEN_MESSAGES.match(value) or not WRITTEN_ROLE.search(value):
        return value
    try:
        messages = json.loads(value)
    except (ValueError, RecursionError):
        advice = f"{name}; write them as a list, in .jsonl or .parquet, or as JSON"
        raise InconsistentRow("messages are written as a text that is not JSON", advice) from None
    turns = messages if isinstance(messages, list) else [messages]
    return messages if all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in turns) else value


def as_message(turn: object, name: str) -> Message:
    """A message {"role", "content", ...} in the form that chat templates expect.

    Keys with null are removed, a null content becomes empty, and the arguments of calls become objects.
    InconsistentRow if the turn has another form, or if a part of its content is not text.
    """
    if not isinstance(turn, Mapping):
        raise other_form(f"{name} must be a message with role and content, not {type(turn).__name__}")
    message: Message = {str(key): value for key, value in turn.items() if value is not None or key == "content"}
    for other, key in OTHER_KEYS.items():
        if message.get(key) is None:
            message = {key if old == other else old: value for old, value in message.items() if old != key}
    set_role(message, name)
    if "function_call" in message:  # OpenAI's earlier form of a single call
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    if message.get("tool_calls"):
        message["tool_calls"] = as_calls(message["tool_calls"], name)
    else:
        message.pop("tool_calls", None)
    if message.get("content") is None and ("content" in turn or "value" in turn or "tool_calls" in message):
        message["content"] = ""
    if isinstance(message.get("content"), list):
        message["content"] = "".join(text_of(part, name) for part in message["content"])
    if not isinstance(message.get("content"), str):
        kind = type(message.get("content")).__name__
        raise other_form(f"the content of {name} must be a text, not {kind}")
    checked_text(message["content"], f"the content of {name}")
    checked_text(to_json(message), name)
    return message


def set_role(message: Message, name: str) -> None:
    """Replace the role by one of ROLES, and a content that is the JSON of calls by tool_calls; or InconsistentRow."""
    role = message.get("role")
    if role is None:
        keys = ", ".join(key[:40] for key in list(message)[:8])
        raise other_form(f"{name} must be a message with role and content, not with {keys or 'nothing'}")
    if role in ROLES:
        return
    lower = str(role).lower()
    if lower not in ROLES and lower not in OTHER_ROLES:
        known = f"{', '.join(ROLES)}, or ShareGPT's human and gpt"
        raise other_form(f"{name} must have one of the roles {known}, not {str(role)[:40]!r}")
    message["role"] = OTHER_ROLES.get(lower, lower)
    if lower in CALLS_AS_JSON:
        calls = calls_of_json(message.get("content"), f"{name} is a {lower}")
        message.update(content="", tool_calls=calls)


def text_of(part: object, name: str) -> str:
    """The text of a content part; InconsistentRow if the part has another type, such as an image."""
    if not isinstance(part, Mapping):
        raise other_form(f"the content of {name} must be a text or a list of parts, not of {type(part).__name__}")
    kind = part.get("type", "text")
    if kind not in TEXT_PARTS:
        raise InconsistentRow(
            "a turn contains a part that is not text", f"{name} has one of the type {str(kind)[:40]!r}"
        )
    if not isinstance(part.get("text"), str):
        raise other_form(f"the content of {name} must be a text, not {type(part.get('text')).__name__}")
    return checked_text(part["text"], f"the content of {name}")


def calls_of_json(content: object, problem: str) -> list[Any]:
    """Parse the content of a turn that is the JSON of calls: {"name", "arguments"}, or a list of them."""
    calls = from_json(content, f"{problem}, but")
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise other_form(f'{problem}, which must be the JSON of {{"name", "arguments"}}, or of a list of them')
    return [{"type": "function", "function": call} for call in calls]


def as_calls(calls: object, name: str) -> list[Any]:
    """The calls of a turn, given as a list or its JSON, with their arguments as objects."""
    calls = from_json(calls, f"the calls of {name} are")
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise other_form(f"the calls of {name} must be a list of objects")
    return [with_objects(call, "arguments") for call in calls]


def with_objects(item: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A call or a tool without null fields, which tables add, and with the JSON of an object under a key parsed.

    The key may stand in the item or in its function. Any other text stays.
    """
    known = {name: value for name, value in item.items() if value is not None or name == key}
    if isinstance(known.get("function"), Mapping):
        known["function"] = with_objects(known["function"], key)
    if isinstance(text := known.get(key), str):
        try:
            value = json.loads(text or "{}")  # some servers write no arguments as an empty text
        except (ValueError, RecursionError):
            value = text
        known[key] = value if isinstance(value, dict) else text
    return known


def as_tools(value: object, name: str) -> list[Any] | None:
    """The tools of a conversation, given as a list or its JSON; None if there are none."""
    if not value:
        return None
    tools = from_json(value, f"{name} is")
    if isinstance(tools, list):
        tools = [from_json(tool, f"{name} holds a tool that is") for tool in tools]
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise other_form(f"{name} must be a list of functions")
    return [with_objects(tool, "parameters") for tool in tools] or None


def from_json(value: object, problem: str) -> Any:
    """Parse a JSON text; other values are returned unchanged. InconsistentRow that begins with problem if it fails."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise other_form(f"{problem} not JSON ({error})") from None


ENCODER = json.JSONEncoder(ensure_ascii=False)  # json.dumps would make an encoder for each call


def to_json(value: object) -> str:
    return ENCODER.encode(value)


# The texts of a message


def map_texts(message: Message, change: Callable[[str, Any], Any]) -> Message:
    """The message with change(what it is, text) in place of each text that a model should see.

    These are the content, a thought (under a key, or as <think>...</think> before the content), and of calls the names
    and the values in the arguments, which may be of any JSON type but object and list.
    """
    changed = dict(message)
    role, content = message["role"], message["content"]
    thoughts = {key: text for key in THOUGHT_KEYS if isinstance(text := message.get(key), str) and text.strip()}
    for text in dict.fromkeys(thoughts.values()):  # one thought, if several keys hold it
        new = change(A_THOUGHT, text)
        changed |= {key: new for key, value in thoughts.items() if value == text}
    thought = THOUGHT.fullmatch(content) if role == "assistant" and "</think>" in content else None
    if thought:
        opening, text, closing, content = thought.groups()
        new = change(A_THOUGHT, text) if text.strip() else text
        rest = change(TURN_TEXTS[role], content) if content else ""
        changed["content"] = f"{opening}{new}{closing}{rest}"
    elif content.strip():
        changed["content"] = change(TURN_TEXTS[role], content)
    if "tool_calls" in message:
        changed["tool_calls"] = [map_call(call, change) for call in message["tool_calls"]]
    return changed


def map_call(call: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": map_call(call["function"], change)}
    changed = dict(call)
    if isinstance(name := call.get("name"), str) and name:
        changed["name"] = change("a call of a tool", name)
    if "arguments" in call:
        changed["arguments"] = map_leaves(call["arguments"], change)
    return changed


def map_leaves(value: Any, change: Callable[[str, Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: map_leaves(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [map_leaves(item, change) for item in value]
    return value if value == "" else change("an argument of a call", value)


def map_tools(tools: list[Any] | None, change: Callable[[str, Any], Any]) -> list[Any] | None:
    """The tools with change("the tools", text) in place of each name and description of a function."""
    return None if tools is None else [map_tool(tool, change) for tool in tools]


def map_tool(tool: Mapping[str, Any], change: Callable[[str, Any], Any]) -> dict[str, Any]:
    if isinstance(tool.get("function"), Mapping):
        return {**tool, "function": map_tool(tool["function"], change)}
    texts = {key: text for key in ("name", "description") if isinstance(text := tool.get(key), str) and text.strip()}
    return {**tool, **{key: change("the tools", text) for key, text in texts.items()}}


def without_thought(message: Message, keep_space: bool) -> Message:
    """The message without its thought; keep_space: with the white space that followed the thought."""
    rest = {key: value for key, value in message.items() if key not in THOUGHT_KEYS}
    if "</think>" in rest["content"] and (thought := THOUGHT.fullmatch(rest["content"])):
        rest["content"] = f"{thought[3].removeprefix('</think>') if keep_space else ''}{thought[4]}"
    return rest


def comparable(message: Message) -> list[object]:
    """What messages are compared by: role, name and texts, without ids, scores and other keys."""
    texts: list[object] = [message["role"], message.get("name")]
    map_texts(message, lambda what, text: texts.append((what, text)))
    return texts


@contextmanager
def naming_row(where: str, number: int) -> Iterator[None]:
    """Turn errors about the form of a row into a UserError that names the row."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, UserError) else f"has a wrong form ({type(error).__name__}: {error})"
        raise UserError(f"{where}, row {number}: {reason}") from None
