"""Renders conversations with the tokenizer's chat template, and finds the text that is trained on."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

from dpo.data.examples import Rendered, Segment
from dpo.data.messages import (
    A_THOUGHT,
    THOUGHT,
    THOUGHT_KEYS,
    TURN_TEXTS,
    InconsistentRow,
    Message,
    UnusableRow,
    n_system,
    to_json,
    without_thought,
)
from dpo.data.places import TOOLS, PlaceFinder, Places, Text, is_written, texts_of
from dpo.system.errors import UserError, summarize_error

if TYPE_CHECKING:
    from jinja2 import Template, nodes
    from transformers import PreTrainedTokenizerBase

CLOCK = "strftime_now"  # the function by which templates read the clock
RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}
TEMPLATE_KEYS = "model.tokenizer_name_or_path, chat_template"  # in errors
CONTEXT = 30  # characters shown before and after a difference
PROBE: list[Message] = [{"role": "user", "content": "probe question"}, {"role": "assistant", "content": "probe answer"}]
PROBE_CALL = {"type": "function", "function": {"name": "probe_tool", "arguments": {"key": "value"}}}
OPENED = re.compile(r"<think>\s*$")  # at the end of a generation prompt
EARLIER_THOUGHT = "a thought of an earlier turn"
ANSWER = TURN_TEXTS["assistant"]
OUTER_SPACE = "white space at the start or the end of a response"


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template and its end-of-turn token.

    If the template writes no special token after an answer, end_of_turn is eos and is added to each answer.
    """

    tokenizer: "PreTrainedTokenizerBase"
    special: re.Pattern[str]  # matches any special token; turns must not contain one
    arguments: Mapping[str, Any]  # of apply_chat_template
    time: datetime  # the time that the template sees
    clock_formats: tuple[str, ...]  # how it writes the time; empty if it does not read the clock
    end_of_turn: str = ""
    writes_end: bool = False  # whether the template writes end_of_turn
    arguments_as_text: bool = False  # whether the template accepts the arguments of a call only as a JSON text

    @classmethod
    def of(
        cls,
        tokenizer: "PreTrainedTokenizerBase",
        arguments: Mapping[str, Any] | None = None,
        time: datetime | None = None,
    ) -> "ChatTemplate":
        """Detect how the template ends a turn; UserError if there is no template, it fails or lacks an argument.

        arguments are chat_template_args. time is what a template that reads the clock sees; None: now.
        """
        if not tokenizer.chat_template:
            mitigation = "choose an instruct model, set model.tokenizer_name_or_path to one, or set prompt_format=hh"
            raise UserError(f"model.tokenizer_name_or_path: the tokenizer has no chat template; {mitigation}")
        tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens |= {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
        tokens -= {"<think>", "</think>"}  # turns may contain them
        special = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
        names = names_read(tokenizer)
        for name in arguments or ():
            if name not in names:
                known = ", ".join(names) or "none"
                raise UserError(f"chat_template_args.{name}: the chat template does not read it; it reads {known}")
        template = cls(
            tokenizer,
            special,
            arguments or {},
            time or datetime.now(),
            clock_formats(tokenizer),
            str(tokenizer.eos_token),
        )
        answer = str(PROBE[-1]["content"])
        try:
            before, _, after = template.render(PROBE, None, False).rpartition(answer)
        except InconsistentRow as error:
            raise UserError(f"{TEMPLATE_KEYS}: the chat template fails ({error})") from None
        if not before:
            raise UserError(f"{TEMPLATE_KEYS}: the chat template does not write the assistant's turn")
        call = [PROBE[0], {"role": "assistant", "content": "", "tool_calls": [PROBE_CALL]}]
        as_text = replace(template, arguments_as_text=True)
        if not template.accepts(call) and as_text.accepts(call):
            template = as_text
        end = special.search(after)
        return replace(template, end_of_turn=end[0], writes_end=True) if end else template

    def accepts(self, messages: Sequence[Message]) -> bool:
        """Whether the template renders a conversation without an error."""
        try:
            self.render(messages, None, False)
        except InconsistentRow:
            return False
        return True

    @cached_property
    def places(self) -> PlaceFinder:
        end_of_turn = self.end_of_turn if self.writes_end else None
        return PlaceFinder(self.render, self.special, end_of_turn, "</think>" in str(self.tokenizer.chat_template))

    @property
    def identity(self) -> tuple[object, ...]:
        """What rendered texts depend on besides the messages."""
        times = [self.time.strftime(form) for form in self.clock_formats]
        return self.tokenizer.chat_template, *([dict(self.arguments), times] if self.arguments or times else [])

    def stops(self) -> list[int]:
        """The ids that stop generation: end-of-turn and eos."""
        end_of_turn = int(self.tokenizer.convert_tokens_to_ids(self.end_of_turn))  # type: ignore[arg-type]  # one token
        return list(dict.fromkeys((end_of_turn, self.tokenizer.eos_token_id)))

    def render(self, messages: Sequence[Message], tools: list[Any] | None, generate: bool) -> str:
        """Render a conversation as text; generate adds the start of the assistant's turn. Or InconsistentRow."""
        if self.arguments_as_text:
            messages = [with_arguments_as_text(message) for message in messages]
        try:
            if self.clock_formats:
                compiled(self.tokenizer.get_chat_template(None, tools)).globals[CLOCK] = self.time.strftime
            text: str = self.tokenizer.apply_chat_template(  # type: ignore[assignment]  # a text, if not tokenized
                list(messages), tools=tools, tokenize=False, add_generation_prompt=generate, **self.arguments
            )
        except Exception as error:  # templates refuse rows by exceptions, and missing keys raise nearly any
            raise InconsistentRow("the chat template refuses it", summarize_error(error)) from None
        return text

    def conversation(
        self, prompt: list[Message], responses: Sequence[list[Message]], tools: list[Any] | None
    ) -> "Conversation":
        """A prompt with responses, which can be rendered; each response begins and ends with the assistant's turn."""
        return Conversation(prompt, tuple(responses), tools, self)

    def response(self, messages: list[Message], n_prompt: int, tools: list[Any] | None, prompt: str) -> Rendered:
        """Render a conversation of n_prompt turns, rendered as prompt, and one response.

        The result's prompt lacks the thoughts that the template removes when this response follows.
        """
        whole, last = self.render(messages, tools, False), len(messages) - 1
        texts = texts_of(messages, tools)
        places = self.places_in(whole, messages, tools)
        missing = {index for index, by_design in places.missing.items() if not by_design}
        removed = {texts[index].turn for index, by_design in places.missing.items() if by_design}
        for keep_space in (True, False) if removed else ():
            without = [without_thought(turn, keep_space) if i in removed else turn for i, turn in enumerate(messages)]
            if self.render(without, tools, False) == whole:
                messages, prompt = without, self.render(without[:n_prompt], tools, True)
                break
        starts = {n_prompt: prompt}
        for turn in range(n_prompt + 1, len(messages)):
            if messages[turn]["role"] == "assistant":
                starts[turn] = self.render(messages[:turn], tools, True)
        if OPENED.search(starts[last]) and not whole.startswith(starts[last]):
            whole = self.continue_thought(starts[last], whole, messages[last])
            missing -= {index for index in missing if texts[index].turn == last and texts[index].what == A_THOUGHT}
        if missing:
            raise left_out(texts[min(missing)])
        segments = tuple(self.split(whole, starts, places))
        turns = dict(zip(starts, (segment.text for segment in segments if segment.trained), strict=True))
        for turn, what, value in texts:
            text = prompt if turn < n_prompt else turns.get(turn, whole)
            if not is_written(value, text) and not (turn in removed and what == A_THOUGHT):
                details = f"{at_turn(turn)}{excerpt(value)} is not in {excerpt(text)}"
                raise InconsistentRow(f"the chat template changes {what}", details)
        answers = [(text.value, turns[text.turn]) for text in texts if text.turn in turns and text.what == ANSWER]
        is_trimmed = any(value not in rendered and value.strip() in rendered for value, rendered in answers)
        found = {EARLIER_THOUGHT: removed, OUTER_SPACE: is_trimmed}
        return Rendered(prompt, (segments,), tuple(what for what, is_found in found.items() if is_found))

    def places_in(self, whole: str, messages: list[Message], tools: list[Any] | None) -> Places:
        """The places of a conversation rendered as whole; UnusableRow if a turn's text contains a special token."""
        special = tuple(self.special.findall(whole))
        foreign = [text for text in texts_in([messages, tools]) if self.special.search(text)]
        places = self.places(messages, tools)
        if foreign and (special != places.special or any(is_written(text, whole) for text in foreign)):
            raise UnusableRow("a turn contains a special token")
        if special != places.special:
            places = self.places.find(messages, tools)  # other keys, such as names, matter as well
        return places if special == places.special else Places()

    def continue_thought(self, start: str, whole: str, turn: Message) -> str:
        """Insert the last turn's thought into whole, in which the template wrote only the answer.

        start is the generation prompt, which ends with the opening of a thought.
        """
        header = OPENED.sub("", start)
        thought = next((f"{text.strip()}\n</think>\n\n" for key in THOUGHT_KEYS if (text := turn.get(key))), "")
        if match := THOUGHT.fullmatch(turn["content"]):
            thought = match[2].lstrip() + match[3]
        if not thought or not whole.startswith(header):
            problem = "the generation prompt opens a thought, which the response does not continue"
            advice = "write it as thought</think>answer, or with reasoning_content"
            raise InconsistentRow(problem, f"{advice}, or {self.without_opened_thought}")
        return start + thought + whole[len(header) :].lstrip()

    def split(self, whole: str, starts: Mapping[int, str], places: Places) -> Iterator[Segment]:
        """Divide a rendered conversation into segments; starts is the text before each turn of the response."""
        tokens, end, last = list(self.special.finditer(whole)), 0, max(starts)
        for turn, before in starts.items():
            if not whole.startswith(before):
                if OPENED.search(before):
                    problem = "the generation prompt opens a thought, which only the last turn of a response continues"
                    raise InconsistentRow(problem, f"set train_on=last, or {self.without_opened_thought}")
                details = difference(before, whole, "the prompt has {}, the conversation {}")
                raise InconsistentRow("the rendered conversation does not begin with the rendered prompt", details)
            if end:
                yield Segment(whole[end : len(before)], False)
            if not self.writes_end:
                if turn != last:
                    raise InconsistentRow(
                        "the chat template writes no end of turn, so a response can have only one turn"
                    )
                yield Segment(whole[len(before) :].rstrip() + self.end_of_turn, True)
                return
            end = self.find_end(turn, len(before), whole, tokens, places, is_last=turn == last)
            yield Segment(whole[len(before) : end], True)

    def find_end(
        self, turn: int, start: int, whole: str, tokens: list[re.Match[str]], places: Places, is_last: bool
    ) -> int:
        """The position after the end-of-turn token of the turn that begins at start; InconsistentRow if unknown."""
        if turn in places.ends:
            end = tokens[places.ends[turn]].end()
        else:
            ends = [token.end() for token in tokens if token.start() >= start and token[0] == self.end_of_turn]
            end = ends[0] if is_last and len(ends) == 1 and places.special is None else 0
        if end <= start:
            details = excerpt(whole[start:])
            raise InconsistentRow(f"a turn of the response has no end of turn {self.end_of_turn}, or several", details)
        return end

    @cached_property
    def without_opened_thought(self) -> str:
        """Advice on how to make the generation prompt open no thought."""
        for name in names_read(self.tokenizer):
            without = replace(self, arguments={**self.arguments, name: False})
            if "think" in name and not OPENED.search(without.render(PROBE[:1], None, True)):
                return f"set chat_template_args={{{name}: false}}"
        return "use chat_template=FILE, another template, whose generation prompt opens none"


@dataclass(frozen=True)
class Conversation:
    """A prompt with responses as messages; if it is too long, it can be rendered without its oldest turns."""

    prompt: list[Message]
    responses: tuple[list[Message], ...]
    tools: list[Any] | None
    template: ChatTemplate = field(repr=False, compare=False)

    def render(self) -> Rendered:
        """Render prompt and responses; UnusableRow or InconsistentRow if they cannot be trained on."""
        return self.render_after(self.prompt)

    def shorter(self) -> Iterator[Rendered]:
        """Yield ever shorter conversations; each begins, after the system turns, with the next turn of the user."""
        n_kept = n_system(self.prompt)
        for start in range(n_kept + 1, len(self.prompt)):
            if self.prompt[start]["role"] == "user":
                yield self.render_after([*self.prompt[:n_kept], *self.prompt[start:]])

    def render_after(self, prompt: list[Message]) -> Rendered:
        """Render the responses after the turns of a prompt."""
        text = self.template.render(prompt, self.tools, True)
        rendered = [
            self.template.response([*prompt, *turns], len(prompt), self.tools, text) for turns in self.responses
        ]
        prompts = list(dict.fromkeys(one.prompt for one in rendered)) or [text]
        if len(prompts) > 1:
            details = difference(prompts[0], prompts[1], "one has {}, another one {}")
            raise InconsistentRow("the prompt is rendered differently before each response", details)
        removed = dict.fromkeys(what for one in rendered for what in one.removed)
        return Rendered(prompts[0], tuple(segments for one in rendered for segments in one.responses), tuple(removed))


def compiled(text: str) -> "Template":
    """A chat template as transformers compiles and caches it, with the functions that it adds."""
    from transformers.utils import chat_template_utils

    template: Template = chat_template_utils._compile_jinja_template(text)
    return template


def syntax_trees(tokenizer: "PreTrainedTokenizerBase") -> list["nodes.Template"]:
    """The parsed templates of a tokenizer, which may have one for tools; UserError if one cannot be parsed."""
    templates: Any = tokenizer.chat_template
    texts = templates.values() if isinstance(templates, dict) else [templates]
    try:
        return [compiled(text).environment.parse(text) for text in texts]
    except Exception as error:  # any error of Jinja's parser
        problem = f"the chat template fails ({summarize_error(error)})"
        raise UserError(f"{TEMPLATE_KEYS}: {problem}") from None


def names_read(tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The variables that a tokenizer's chat template reads, other than those that every template can read."""
    from jinja2.meta import find_undeclared_variables

    names = {name for tree in syntax_trees(tokenizer) for name in find_undeclared_variables(tree)}
    return sorted(names - RESERVED - set(tokenizer.special_tokens_map))


def clock_formats(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    """The formats in which a tokenizer's chat template writes the time; empty if it does not read the clock."""
    from jinja2 import nodes

    trees = syntax_trees(tokenizer)
    reads = any(name.name == CLOCK for tree in trees for name in tree.find_all(nodes.Name))
    calls = [call for tree in trees for call in tree.find_all(nodes.Call) if getattr(call.node, "name", "") == CLOCK]
    formats = [call.args[0].value for call in calls if call.args and isinstance(call.args[0], nodes.Const)]
    if reads and (not calls or len(formats) < len(calls)):  # some format is unknown
        return ("%Y-%m-%dT%H:%M:%S.%f",)
    return tuple(sorted(set(formats)))


def left_out(text: Text) -> InconsistentRow:
    remedy = "use chat_template=FILE with a place for it, or remove it from the data"
    return InconsistentRow(
        f"the chat template leaves out {text.what}", f"{at_turn(text.turn)}{excerpt(text.value)}; {remedy}"
    )


def at_turn(turn: int) -> str:
    return "" if turn == TOOLS else f"turn {turn + 1}: "


def excerpt(value: object) -> str:
    text = value.strip() if isinstance(value, str) else value
    return repr(text if len(str(text)) <= 2 * CONTEXT else f"{str(text)[: 2 * CONTEXT]}...")


def difference(a: str, b: str, sentence: str) -> str:
    """Say where two texts first differ; sentence has a place, {}, for the context in each text."""
    at = len(commonprefix([a, b]))
    contexts = [repr(text[max(0, at - CONTEXT) : at + CONTEXT]) for text in (a, b)]
    return f"at character {at} {sentence.format(*contexts)}"


def with_arguments_as_text(message: Message) -> Message:
    """The message with the arguments of its calls as JSON texts."""
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [call_with_text(call) for call in message["tool_calls"]]}


def call_with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    changed = dict(call)
    if isinstance(call.get("function"), Mapping):
        changed["function"] = call_with_text(call["function"])
    if "arguments" in call and not isinstance(call["arguments"], str):
        changed["arguments"] = to_json(call["arguments"])
    return changed


def texts_in(value: object) -> Iterator[str]:
    """Yield the texts in nested messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)
