"""Renders conversations with the tokenizer's chat template, and checks the result token by token."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from os.path import commonprefix
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dpo.data.examples import TextExample, Tokenization
from dpo.data.messages import InconsistentRow, Message, UnusableRow, to_json
from dpo.data.rows import ASSISTANT, Row
from dpo.system.errors import UserError, summarize_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptFormat = Literal["auto", "chat", "text", "hh"]
CONTEXT = 30  # characters shown before and after a difference
PROBE: list[Message] = [{"role": "user", "content": "probe question"}, {"role": "assistant", "content": "probe answer"}]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template and its end-of-turn token.

    If the template writes no special token after an answer, end_of_turn is eos and is added to each answer.
    """

    tokenizer: "PreTrainedTokenizerBase"
    end_of_turn: str
    writes_end: bool  # whether the template writes end_of_turn
    special: re.Pattern[str]  # matches any special token; turns must not contain one

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase") -> "ChatTemplate":
        """Detect how the template ends a turn; UserError if there is no template or it fails."""
        if not tokenizer.chat_template:
            mitigation = "choose an instruct model, set model.tokenizer_name_or_path to one, or set prompt_format=hh"
            raise UserError(f"model.tokenizer_name_or_path: the tokenizer has no chat template; {mitigation}")
        tokens = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokens |= {token for token in (tokenizer.bos_token, tokenizer.eos_token) if token}
        special = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
        template = cls(tokenizer, str(tokenizer.eos_token), False, special)
        answer = str(PROBE[-1]["content"])
        try:
            before, _, after = template.render(PROBE, None, False).rpartition(answer)
        except InconsistentRow as error:
            raise UserError(f"model.tokenizer_name_or_path: the chat template fails ({error})") from None
        if not before:
            raise UserError("model.tokenizer_name_or_path: the chat template does not write the assistant's turn")
        end = special.search(after)
        return replace(template, end_of_turn=end[0], writes_end=True) if end else template

    def stops(self) -> list[int]:
        """The stop tokens of generation: end-of-turn and eos."""
        end_of_turn = int(self.tokenizer.convert_tokens_to_ids(self.end_of_turn))  # type: ignore[arg-type]  # one token
        return list(dict.fromkeys((end_of_turn, self.tokenizer.eos_token_id)))

    def render(self, messages: Sequence[Message], tools: list[Any] | None, generate: bool) -> str:
        """Render a conversation as text, with generate up to the start of the assistant's turn; or InconsistentRow."""
        try:
            text: str = self.tokenizer.apply_chat_template(  # type: ignore[assignment]  # a text, if not tokenized
                list(messages), tools=tools, tokenize=False, add_generation_prompt=generate
            )
        except Exception as error:  # templates refuse rows by an exception, and raise nearly anything for missing keys
            raise InconsistentRow("the chat template refuses it", summarize_error(error)) from None
        return text

    def example(self, row: Row, number: int, source: str) -> TextExample:
        """Render a row of messages; UnusableRow or InconsistentRow if it cannot be trained on."""
        assert isinstance(row.prompt, list)
        if any(map(self.special.search, texts_in([row.prompt, list(row.responses)]))):
            raise UnusableRow("a turn contains a special token")
        conversation = Conversation(to_json(row.prompt), tuple(map(to_json, row.responses)), to_json(row.tools), self)
        prompt, answers = conversation.render(row.prompt)
        return ConversationExample(prompt, answers, "keep_end", number, source, conversation=conversation)

    def answer(self, prompt: str, whole: str, response: Message) -> str:
        """The trained part of a rendered conversation: the text after the prompt, up to the end of the turn."""
        if not whole.startswith(prompt):
            at = len(commonprefix([prompt, whole]))
            near = [text[max(0, at - CONTEXT) : at + CONTEXT] for text in (prompt, whole)]
            details = f"at character {at} the prompt has {near[0]!r}, the conversation {near[1]!r}"
            raise InconsistentRow("the rendered conversation does not begin with the rendered prompt", details)
        answer = whole[len(prompt) :]
        content = str(response.get("content") or "").strip()
        if content not in answer:
            raise InconsistentRow("the chat template changes the response", f"{content[:60]!r} became {answer[:60]!r}")
        check_calls(response, answer)
        if not self.writes_end:
            return answer.rstrip() + self.end_of_turn
        if answer.count(self.end_of_turn) != 1:
            raise InconsistentRow(f"the response has no end of turn {self.end_of_turn}, or several", repr(answer[-60:]))
        return answer[: answer.index(self.end_of_turn) + len(self.end_of_turn)]


@dataclass(frozen=True)
class Conversation:
    """An example's messages as JSON, which are rendered again without the oldest turns if it is too long."""

    prompt: str
    responses: tuple[str, ...]
    tools: str
    template: ChatTemplate = field(repr=False, compare=False)

    def render(self, messages: Sequence[Message]) -> tuple[str, tuple[str, ...]]:
        """Render messages as the prompt, and the trained part of each response."""
        tools = json.loads(self.tools)
        prompt, answers = self.template.render(messages, tools, True), []
        for turn in map(json.loads, self.responses):
            whole = self.template.render([*messages, turn], tools, False)
            answers.append(self.template.answer(prompt, whole, turn))
        for turn in messages:
            content = str(turn.get("content") or "").strip()
            if turn["role"] in ("system", "user") and content not in prompt:
                raise InconsistentRow(f"the chat template leaves out or changes a turn of the {turn['role']}")
            if turn["role"] == "tool" and content not in prompt and to_json(content)[1:-1] not in prompt:
                raise InconsistentRow("the chat template leaves out or changes what a tool returned")
            check_calls(turn, prompt)
        if missing := [name for name in function_names(tools) if name not in prompt]:
            raise InconsistentRow("the chat template leaves out the tools", f"{missing[0]!r} is not in the prompt")
        return prompt, tuple(answers)

    def shorter(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield prompt and answers without the oldest turns, up to the next turn of the user each time."""
        messages = json.loads(self.prompt)
        n_kept = int(messages[0]["role"] in ("system", "developer"))
        for start in range(n_kept + 1, len(messages)):
            if messages[start]["role"] == "user":
                yield self.render([*messages[:n_kept], *messages[start:]])


@dataclass(frozen=True, slots=True)
class ConversationExample(TextExample):
    """A rendered conversation with all special tokens; the last one ends the response's turn.

    Prompt and response are tokenized as one text; an over-long prompt loses whole turns.
    """

    conversation: Conversation = field(kw_only=True)

    is_conversation: ClassVar[bool] = True
    shortened_by: ClassVar[str] = "oldest turns"

    @property
    def original_prompt(self) -> Any:
        """The messages before the response."""
        return json.loads(self.conversation.prompt)

    @property
    def content(self) -> tuple[object, ...]:
        """What its tokens depend on; caches of earlier versions contain hashes of its repr."""
        return (self.prompt, self.responses, self.conversation)

    def strings(self) -> list[str]:
        """The texts to tokenize: the prompt, and the prompt with each response."""
        return [self.prompt, *(self.prompt + response for response in self.responses)]

    def split_ids(self, ids: list[list[int]], rules: Tokenization) -> tuple[list[int], list[list[int]]]:
        """The ids of the prompt and of each response; InconsistentRow unless all begin with the prompt's."""
        prompt, *wholes = ids
        for whole in wholes:
            if whole[: len(prompt)] != prompt:
                at = next(i for i, (a, b) in enumerate(zip(prompt, [*whole, -1], strict=False)) if a != b)
                near = [rules.tokenizer.decode(some[max(0, at - 4) : at + 4]) for some in (prompt, whole)]
                details = f"at token {at} the prompt has {near[0]!r}, the conversation {near[1]!r}"
                raise InconsistentRow("the conversation's tokens do not begin with the prompt's tokens", details)
        return with_bos(prompt, rules), [whole[len(prompt) :] for whole in wholes]

    def shorten(self, prompt: list[int], responses: list[list[int]], rules: Tokenization) -> list[int]:
        """The prompt's ids without as many of the oldest turns as necessary.

        UnusableRow if the last turn alone is too long, InconsistentRow if the responses' ids would change.
        """
        for text, answers in self.conversation.shorter():
            prompt = with_bos(rules.ids([text])[0], rules)
            if rules.fits(prompt, responses) or len(prompt) <= rules.max_prompt_length:
                shorter = replace(self, prompt=text, responses=answers)
                if shorter.split_ids(rules.ids(shorter.strings()), rules)[1] != responses:
                    raise InconsistentRow("leaving out the oldest turns changes the response's tokens")
                return prompt
        raise UnusableRow("the last turn alone is longer than max_prompt_length")


def with_bos(prompt: list[int], rules: Tokenization) -> list[int]:
    """The prompt with a BOS, if model.add_bos requests one and the template wrote none."""
    bos = rules.tokenizer.bos_token_id
    return [bos, *prompt] if rules.add_bos and prompt[:1] != [bos] else prompt


def check_calls(turn: Message, text: str) -> None:
    """Raise InconsistentRow if a rendered text lacks the names of functions that a turn calls."""
    if missing := [name for name in function_names(turn.get("tool_calls")) if name not in text]:
        raise InconsistentRow("the chat template leaves out a call of a tool", f"{missing[0]!r} is called")


def function_names(functions: object) -> list[str]:
    """The names in a list of functions or calls, directly or under "function"."""
    items = functions if isinstance(functions, list) else []
    inner = [item.get("function", item) for item in items if isinstance(item, dict)]
    return [item["name"] for item in inner if isinstance(item, dict) and isinstance(item.get("name"), str)]


def texts_in(value: object) -> Iterator[str]:
    """Yield the texts in nested messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


def hh_example(row: Row, number: int, source: str) -> TextExample:
    r"""Write messages as hh's dialogues, \n\nHuman: ... \n\nAssistant: ...; UserError for other turns."""
    names = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}
    turns = [*row.prompt, *row.responses]
    if row.tools or any(not isinstance(turn, dict) or turn["role"] not in names for turn in turns):
        raise UserError("prompt_format=hh supports only user and assistant turns, no system turn and no tools")
    prompt = "".join(names[turn["role"]] + turn["content"] for turn in row.prompt if isinstance(turn, dict))
    answers = tuple(f" {turn['content']}" for turn in row.responses)
    return TextExample(f"{prompt}\n\nAssistant:", answers, "keep_end", number, source)


@dataclass
class RowFormatter:
    """Makes examples from rows by prompt_format; the chat template is inspected when a row first needs it."""

    prompt_format: PromptFormat
    tokenizer: "PreTrainedTokenizerBase"
    template: ChatTemplate | None = None
    plain_text: TextExample | None = None  # the first text prompt, if the tokenizer has a chat template

    def warning(self) -> str | None:
        """A warning about text prompts for a model with a chat template; None without any."""
        if self.plain_text is None:
            return None
        problem = "a text prompt is used as it is; prompt_format=chat renders it with the chat template."
        return f"{self.plain_text.where}: {problem}"

    def __call__(self, row: Row, number: int, source: str) -> TextExample:
        """Make an example from a row; UserError if the format does not support it, UnusableRow if it is unusable."""
        if isinstance(row.prompt, str):
            if self.prompt_format == "chat":
                raise UserError(
                    "prompt_format=chat needs messages, or a prompt and its responses, not dialogues as text"
                )
            text = TextExample(row.prompt, row.responses, "keep_end", number, source)
            if self.prompt_format == "auto" and self.plain_text is None and self.tokenizer.chat_template:
                self.plain_text = None if ASSISTANT in row.prompt else text
            return text
        if self.prompt_format == "text":
            raise UserError("holds messages, which prompt_format=text does not support; use auto, chat or hh")
        if self.prompt_format == "hh":
            return hh_example(row, number, source)
        if self.template is None:
            self.template = ChatTemplate.of(self.tokenizer)
        return self.template.example(row, number, source)
