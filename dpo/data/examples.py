"""From texts to token ids: tokenization, truncation, special tokens."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

from dpo.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Truncation = Literal["keep_start", "keep_end"]  # the end of an over-long prompt that is kept
EXCERPT = 8  # characters of a prompt that are tokenized to see that it has a token
CHUNK = 10_000  # strings per call of the tokenizer where only their having a token matters


class UnusableRow(UserError):
    """A row that cannot be trained on, with the reason by which such rows are counted, and details of this one."""

    def __init__(self, reason: str, details: str = ""):
        self.reason, self.text = reason, f"{reason} ({details})" if details else reason
        super().__init__(self.text)


class InconsistentRow(UnusableRow):
    """A conversation that its chat template does not render as a prompt that a response continues."""


class Rendered(Protocol):
    """A conversation as a chat template renders it: its texts hold every special token, an end of turn the last."""

    def tokenized(
        self, text: "TextExample", prompt: list[int], wholes: list[list[int]], rules: "Tokenization"
    ) -> "TokenizedExample":
        """Return the example of a prompt's ids and of those of prompt and response; UnusableRow if they misfit."""


class TextExample(NamedTuple):
    """A prompt with one response or two (chosen, rejected), as text; row is its number in the data set.

    truncation names the end of an over-long prompt that is kept; a rendered conversation loses whole turns instead.
    scores are those of the two responses where the data set has some, chosen first; label is of one response whether
    it is desirable, where the data set does.
    """

    prompt: str
    responses: tuple[str, ...]
    truncation: Truncation | Rendered
    row: int
    source: str
    scores: tuple[float, ...] = ()
    label: bool | None = None


@dataclass(frozen=True)
class TokenizedExample:
    """A text example as token ids: the prompt's, and each response's with eos; truncated names what was cut."""

    text: TextExample
    prompt: list[int]
    responses: tuple[list[int], ...]
    truncated: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(response) for response in self.responses)


@dataclass(frozen=True)
class Tokenization:
    """How texts become ids, and where they are cut. Lengths are in tokens; vocab_size is the model's, if known."""

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    max_prompt_length: int
    add_bos: bool = False
    vocab_size: int | None = None

    def __call__(self, texts: Sequence[TextExample]) -> list[TokenizedExample]:
        """Tokenize texts in one call: prompt and responses separately, eos after each response.

        A rendered conversation is tokenized as a whole, and holds its end of turn. UserError that names the row if a
        prompt has no token, if a conversation cannot be trained on, or if a token has no embedding in the model.
        """
        examples = []
        for example in self.attempt(texts):
            if isinstance(example, UnusableRow):
                raise example
            self.check_ids(example)
            examples.append(example)
        return examples

    def attempt(self, texts: Sequence[TextExample]) -> list[TokenizedExample | UnusableRow]:
        """Tokenize texts in one call, and return for each its example, or why there is none."""
        ids = iter(self.ids([string for text in texts for string in self.strings(text)]))
        results: list[TokenizedExample | UnusableRow] = []
        for text in texts:
            prompt, *responses = (next(ids) for _ in range(1 + len(text.responses)))
            try:
                if isinstance(text.truncation, str):
                    results.append(self.tokenize_text(text, prompt, responses))
                else:
                    results.append(text.truncation.tokenized(text, prompt, responses, self))
            except UnusableRow as error:
                error.args = (f"{text.source}, row {text.row}: {error.text}",)
                results.append(error)
        return results

    def strings(self, text: TextExample) -> Iterator[str]:
        """Yield what is tokenized of an example: its prompt, and its responses, after the prompt if it is rendered."""
        yield text.prompt
        before = "" if isinstance(text.truncation, str) else text.prompt
        yield from (before + response for response in text.responses)

    def ids(self, strings: list[str]) -> list[list[int]]:
        """Return the ids of some strings, without special tokens but those that the strings hold."""
        if not strings:  # which tokenizers do not take
            return []
        ids: list[list[int]] = self.tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def tokenize_text(self, text: TextExample, prompt: list[int], responses: list[list[int]]) -> TokenizedExample:
        """Return an example of text, whose responses get an eos."""
        if not prompt and not self.add_bos:  # nothing would predict the first response token
            raise UnusableRow("the tokenizer turns the prompt into no token at all")
        return self.truncate(text, prompt, tuple(ids + [self.tokenizer.eos_token_id] for ids in responses))

    def check_ids(self, example: TokenizedExample) -> None:
        """Raise UserError if an example holds a token beyond the model's vocabulary."""
        if self.vocab_size is None:
            return
        highest = max(max(ids) for ids in (example.prompt, *example.responses))
        if highest >= self.vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(highest)
            where = f"{example.text.source}, row {example.text.row}"
            words = f"the model has embeddings for ids below {self.vocab_size}"
            raise UserError(f"{where}: the text holds the token {token!r} with id {highest}, but {words}")

    def empty_prompts(self, prompts: Iterable[str]) -> set[str]:
        """Return the prompts without any token, which cannot be trained on; none if BOS is added.

        To be quick, a prompt is tokenized whole only if its first characters alone have no token.
        """
        if self.add_bos:
            return set()
        by_excerpt: dict[str, list[str]] = {}
        for prompt in prompts:
            by_excerpt.setdefault(prompt[:EXCERPT], []).append(prompt)
        doubtful = [prompt for excerpt in self.without_tokens(by_excerpt) for prompt in by_excerpt[excerpt]]
        return set(self.without_tokens(doubtful))

    def without_tokens(self, strings: Iterable[str]) -> list[str]:
        """Return the strings that the tokenizer turns into no token."""
        strings, empty = list(strings), []
        for start in range(0, len(strings), CHUNK):
            chunk = strings[start : start + CHUNK]
            ids = self.ids(chunk)
            empty += [string for string, tokens in zip(chunk, ids, strict=True) if not tokens]
        return empty

    def truncate(self, text: TextExample, prompt: list[int], responses: tuple[list[int], ...]) -> TokenizedExample:
        """Cut an example that is longer than max_length: first its prompt, then, if need be, all its responses."""
        bos = [self.tokenizer.bos_token_id] if self.add_bos else []
        whole, distinct = (bos + prompt, responses), len(set(map(tuple, responses)))
        longest = max(len(response) for response in responses)
        room = self.max_prompt_length - len(bos)
        if len(whole[0]) + longest > self.max_length and len(prompt) > room:
            prompt = prompt[:room] if text.truncation == "keep_start" else prompt[len(prompt) - room :]
        if len(bos + prompt) + longest > self.max_length:
            responses = tuple(response[: self.max_length - self.max_prompt_length] for response in responses)
        truncated = {
            "prompt": len(bos + prompt) < len(whole[0]),
            "response": responses != whole[1],
            "sides made equal": len(set(map(tuple, responses))) < distinct,
        }
        return TokenizedExample(
            text, bos + prompt, responses, tuple(what for what, is_cut in truncated.items() if is_cut)
        )


def padding_id(tokenizer: "PreTrainedTokenizerBase", vocab_size: int | None = None) -> int:
    """Return the id that fills padded positions, which are always masked: pad, or eos if the model has no such id."""
    pad = tokenizer.pad_token_id
    fits = pad is not None and (vocab_size is None or pad < vocab_size)
    return pad if fits else tokenizer.eos_token_id


def special_token_problems(tokenizer: "PreTrainedTokenizerBase", vocab_size: int, add_bos: bool) -> list[str]:
    """Return one line for each special token that training uses and the tokenizer or the model lacks."""
    problems = []
    used = {"eos": ("model.tokenizer_name_or_path", "which ends a response")}
    if add_bos:
        used["bos"] = ("model.add_bos=true", "set it to false")
    for name, (key, words) in used.items():
        token_id = getattr(tokenizer, f"{name}_token_id")
        if token_id is None:
            problems.append(f"{key}: the tokenizer has no {name} token, {words}")
        elif token_id >= vocab_size:
            token = f"{name} token {getattr(tokenizer, f'{name}_token')} has id {token_id}"
            remedy = "choose the model's own tokenizer"
            problems.append(f"{key}: the tokenizer's {token}, but the model has {vocab_size} embeddings; {remedy}")
    return problems


def bos_note(tokenizer: "PreTrainedTokenizerBase", add_bos: bool) -> str | None:
    """Return a line for the log if the tokenizer by itself adds BOS where training does not, or the other way round."""
    if tokenizer.bos_token_id is None:
        return None
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if adds_bos and not add_bos:
        habit = f"The tokenizer puts {tokenizer.bos_token} before a text, also in the exported model"
        return f"{habit}; training does not, as in the original. To train with it, set model.add_bos=true."
    if add_bos and not adds_bos:
        habit = f"Training puts {tokenizer.bos_token} before each prompt (model.add_bos=true)"
        return f"{habit}; the tokenizer does not by itself, so whoever uses the exported model must."
    return None


def hash_texts(digest: "hashlib._Hash", groups: Iterable[Iterable[TextExample]]) -> None:
    """Update a hash by prompt, responses, truncation and label of all examples."""
    for group in groups:
        content = [text[:3] if text.label is None else (*text[:3], text.label) for text in group]
        digest.update(repr(content).encode())
