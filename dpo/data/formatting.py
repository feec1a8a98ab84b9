"""From a row to the texts that the model sees, by prompt_format."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from dpo.data.chat import ChatTemplate, Conversation
from dpo.data.examples import Rendered, Segment
from dpo.data.rows import ASSISTANT, Row
from dpo.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptFormat = Literal["auto", "chat", "text", "hh"]
HH_NAMES = {"user": "\n\nHuman: ", "assistant": "\n\nAssistant: "}


@dataclass
class RowFormatter:
    """Renders rows by prompt_format. The chat template is inspected when a row first needs it."""

    prompt_format: PromptFormat
    tokenizer: "PreTrainedTokenizerBase"
    arguments: Mapping[str, Any] | None = None  # chat_template_args
    time: datetime = field(default_factory=datetime.now)  # the time that templates see

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate.of(self.tokenizer, self.arguments, self.time)

    def check_template(self) -> None:
        """Raise UserError if the template fails or an argument is unknown, before a row is blamed for it."""
        _ = self.template

    def identity(self, is_chat: bool = True) -> tuple[object, ...]:
        """What rendering depends on: the template, its arguments and its time only if there are conversations."""
        if not (is_chat and self.tokenizer.chat_template):
            return self.prompt_format, None
        return self.prompt_format, *self.template.identity

    @property
    def settings(self) -> tuple[object, ...]:
        """The identity before it is known whether there are conversations, even if the template fails."""
        try:
            return self.identity()
        except UserError:
            return self.prompt_format, self.tokenizer.chat_template

    def conversation(self, row: Row) -> Conversation | None:
        """The conversation of a row that the chat template renders; None for a row of texts."""
        if isinstance(row.prompt, str):
            if self.prompt_format == "chat":
                raise UserError("prompt_format=chat needs messages, or a prompt with responses, not dialogues as text")
            return None
        if self.prompt_format == "text":
            raise UserError("holds messages, which prompt_format=text does not support; use auto, chat or hh")
        if self.prompt_format == "hh":
            return None
        return self.template.conversation(row.prompt, row.responses, row.tools)

    def text(self, row: Row) -> Rendered:
        r"""The texts of a row as they are, or messages as hh's dialogues, \n\nHuman: ... \n\nAssistant: ..."""
        prompt, responses = row.prompt, row.responses
        if not isinstance(prompt, str):
            turns = [*prompt, *(turn for response in responses for turn in response)]
            if row.tools or any(turn["role"] not in HH_NAMES for turn in turns):
                raise UserError("prompt_format=hh supports only user and assistant turns, no system turns, no tools")
            if any(len(response) > 1 for response in responses):
                raise UserError("prompt_format=hh supports only responses of one turn; set train_on=last")
            prompt = "".join(HH_NAMES[turn["role"]] + turn["content"] for turn in prompt) + ASSISTANT
            responses = tuple(f" {turn['content']}" for (turn,) in responses)
        return Rendered(prompt, tuple((Segment(response, True),) for response in responses))

    def is_plain(self, row: Row) -> bool:
        """Whether a row's text prompt might be a turn of a conversation."""
        is_auto = self.prompt_format == "auto" and bool(self.tokenizer.chat_template)
        return is_auto and isinstance(row.prompt, str) and ASSISTANT not in row.prompt


def template_time(setting: str | None, start: datetime | None = None) -> datetime:
    """The time that chat templates see: chat_template_time if it is set, otherwise start; None: now."""
    if setting:
        return datetime.fromisoformat(setting)
    return start or datetime.now()


def plain_text_warning(where: str) -> str:
    """A warning about text prompts for a model with a chat template."""
    return (
        f"{where}: the model has a chat template, but a text prompt is used as it is; prompt_format=chat renders it "
        "with the chat template. To train on plain text, set prompt_format=text."
    )
