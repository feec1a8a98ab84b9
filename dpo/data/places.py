"""Finds where a chat template writes the texts of a conversation, and which texts it leaves out.

The conversation is rendered again with a mark in place of each text. Conversations of the same shape, which differ only
in their texts, share the result.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from os.path import commonprefix
from typing import Any, NamedTuple

from dpo.data.messages import A_THOUGHT, InconsistentRow, Message, map_texts, map_tools, to_json, without_thought

MAX_SHAPES = 10_000  # shapes that are remembered
TOOLS = -1  # Text.turn of the texts of tools


class Text(NamedTuple):
    """A text of a conversation: the index of its turn, what it is, and its value, a text or another JSON value."""

    turn: int
    what: str
    value: Any


@dataclass(frozen=True)
class Places:
    """What a template does with the texts of a conversation.

    missing: by index of each text that the template leaves out, whether it does so by design. special: the special
    tokens that it writes, in order; None if nothing is known. ends: by index of the assistant's turn, the index in
    special of the token that ends it, if there is one.
    """

    missing: Mapping[int, bool] = field(default_factory=dict)
    special: tuple[str, ...] | None = None
    ends: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PlaceFinder:
    """Finds the places of conversations for one template.

    render(messages, tools, add_generation_prompt) raises InconsistentRow if the template refuses them. end_of_turn is
    None if the template writes no special token after an answer. drops_thoughts: the template reads <think>...</think>,
    so it leaves out earlier thoughts by design, even if it never writes any.
    """

    render: Callable[[Sequence[Message], list[Any] | None, bool], str]
    special: re.Pattern[str]
    end_of_turn: str | None
    drops_thoughts: bool
    known: dict[str, Places] = field(default_factory=dict, compare=False)

    def __call__(self, messages: Sequence[Message], tools: list[Any] | None) -> Places:
        """Find the places of a conversation, once for each shape."""
        shape = shape_of(messages, tools)
        places = self.known.get(shape)
        if places is None:
            if len(self.known) >= MAX_SHAPES:
                self.known.clear()
            places = self.known[shape] = self.find(messages, tools)
        return places

    def find(self, messages: Sequence[Message], tools: list[Any] | None) -> Places:
        """Find the places of this conversation; nothing is known if the template refuses marks as its texts."""
        marks: list[Text] = []

        def add_mark(turn: int, what: str, value: Any) -> str:
            marks.append(Text(turn, what, f"mark{len(marks):05}x"))
            return str(marks[-1].value)

        marked = [map_texts(message, partial(add_mark, turn)) for turn, message in enumerate(messages)]
        marked_tools = map_tools(tools, partial(add_mark, TOOLS))
        try:
            text = self.render(marked, marked_tools, False)
        except InconsistentRow:
            return Places()
        missing = {
            index: self.is_removed(mark, marked, marked_tools)
            for index, mark in enumerate(marks)
            if mark.value not in text
        }
        removed = {marks[index].turn for index, by_design in missing.items() if by_design}
        marked = [without_thought(turn, False) if i in removed else turn for i, turn in enumerate(marked)]
        tokens = list(self.special.finditer(text))
        ends = {}
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" or self.end_of_turn is None:
                continue
            ends_of_texts = [
                start + len(mark.value) for mark in marks if mark.turn == turn and (start := text.find(mark.value)) >= 0
            ]
            if ends_of_texts:
                start = max(ends_of_texts)
            else:  # an empty turn
                start = len(self.render(marked[:turn], marked_tools, True))
            end = self.find_end(start, turn, marks, text, tokens, marked, marked_tools)
            if end is not None:
                ends[turn] = end
        return Places(missing, tuple(token[0] for token in tokens), ends)

    def is_removed(self, mark: Text, messages: list[Message], tools: list[Any] | None) -> bool:
        """Whether a missing text is a thought that the template leaves out by design because other turns follow."""
        if mark.what != A_THOUGHT or mark.turn == len(messages) - 1:
            return False
        try:
            return self.drops_thoughts or mark.value in self.render(messages[: mark.turn + 1], tools, False)
        except InconsistentRow:
            return False

    def find_end(
        self,
        start: int,
        turn: int,
        marks: list[Text],
        text: str,
        tokens: list[re.Match[str]],
        messages: list[Message],
        tools: list[Any] | None,
    ) -> int | None:
        """The index of the special token that ends a turn, or None if it is unknown. start is where its texts end.

        It is the first end_of_turn before the next turn's texts. If there is none, the conversation is rendered without
        the next turn: then it is the last special token before the point where the two renderings differ, or at it.
        """
        later = [at for mark in marks if mark.turn > turn and (at := text.find(mark.value)) >= start]
        stop = min(later, default=len(text))
        between = [index for index, token in enumerate(tokens) if start <= token.start() < stop]
        is_last = turn == len(messages) - 1
        next_is_empty = not is_last and not any(mark.turn == turn + 1 for mark in marks)
        for index in between[:1] if next_is_empty else between:
            if tokens[index][0] == self.end_of_turn:
                return index
        try:
            without_next = self.render(messages[: turn + 1], tools, False)
        except InconsistentRow:
            return None
        shared = len(text.rstrip()) if is_last else len(commonprefix([without_next, text]))
        candidates = [index for index in between if tokens[index].start() < shared]
        if not candidates or text[tokens[candidates[-1]].end() : shared].strip():
            return None
        is_certain = tokens[candidates[-1]].end() <= shared or candidates[-1] != between[-1]
        return candidates[-1] if is_certain else None


def shape_of(messages: Sequence[Message], tools: list[Any] | None) -> str:
    """A key of a conversation's shape: conversations with the same key have their texts at the same places."""
    blank = map_tools(tools, no_text)
    return to_json([*map(outline, messages), [sorted(functions([tool])[0]) for tool in blank or ()]])


def outline(message: Message) -> object:
    """The shape of a message: its role, the structure of its texts, and the names of its keys."""
    if len(message) == 2 and "</think>" not in message["content"]:
        content = message["content"]
        return [message["role"], "x" if content.strip() else content]
    blank = map_texts(message, no_text)
    calls = [[call.get("name"), call.get("arguments")] for call in functions(blank.get("tool_calls", ()))]
    return [message["role"], blank["content"], calls, *sorted(message)]


def no_text(what: str, value: object) -> str:
    return "x"


def functions(items: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The functions of calls or tools, which stand under "function" or directly."""
    return [item["function"] if isinstance(item.get("function"), Mapping) else item for item in items]


def texts_of(messages: Sequence[Message], tools: list[Any] | None) -> list[Text]:
    """The texts of a conversation, in the order of Places.missing."""
    texts: list[Text] = []

    def add(turn: int, what: str, value: Any) -> None:
        texts.append(Text(turn, what, value))

    for turn, message in enumerate(messages):
        map_texts(message, partial(add, turn))
    map_tools(tools, partial(add, TOOLS))
    return texts


def is_written(value: object, text: str) -> bool:
    """Whether a rendered text contains a value in one of the forms that templates write."""
    return any(form in text for form in forms(value))


def forms(value: object) -> Iterator[str]:
    """Yield the ways to write a value: trimmed, as JSON, as Python prints it, and escaped for HTML."""
    if not isinstance(value, str):
        yield str(value)
        yield json.dumps(value)
        return
    value = value.strip()
    yield value
    for escaped in (to_json(value), json.dumps(value), repr(value)):
        yield escaped[1:-1]
    yield to_json(to_json(value)[1:-1])[1:-1]
    yield (
        value.replace("&", "&amp;")
        .replace("<", "&lt;")
        .replace(">", "&gt;")
        .replace('"', "&#34;")
        .replace("'", "&#39;")
    )
