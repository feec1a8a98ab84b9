"""From texts to token ids: tokenization, truncation, special tokens."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from dpo.data.messages import UnusableRow
from dpo.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Truncation = Literal["keep_start", "keep_end"]  # which end of an over-long prompt is kept
PROMPT_START = 8  # characters that are tokenized to check that a prompt has a token
CHUNK = 10_000  # strings per tokenizer call in that check


@dataclass(frozen=True, slots=True)
class TextExample:
    """A prompt with one response or two (chosen, rejected) as text, and its row number in the data set.

    If the data set has them, scores are those of the two responses, chosen first, and label says whether the single
    response is desirable. Conversations are a subclass, with its own tokenization and shortening.
    """

    prompt: str
    responses: tuple[str, ...]
    truncation: Truncation
    row: int
    source: str
    scores: tuple[float, ...] = ()
    label: bool | None = None

    is_conversation: ClassVar[bool] = False
    shortened_by: ClassVar[str] = "prompt"  # counted if the prompt is shortened

    @property
    def where(self) -> str:
        """The source and row, for messages."""
        return f"{self.source}, row {self.row}"

    @property
    def original_prompt(self) -> Any:
        """The prompt as in the data set: a text, or a list of messages."""
        return self.prompt

    @property
    def content(self) -> tuple[object, ...]:
        """What its tokens depend on; fingerprints and caches of earlier versions contain hashes of its repr."""
        return (self.prompt, self.responses, self.truncation)

    def strings(self) -> list[str]:
        """The texts to tokenize: one for the prompt and one for each response."""
        return [self.prompt, *self.responses]

    def split_ids(self, ids: list[list[int]], rules: "Tokenization") -> tuple[list[int], list[list[int]]]:
        """The ids of the prompt and of each response, from the strings' ids; UnusableRow if the prompt has none."""
        prompt, *responses = ids
        if not prompt and not rules.add_bos:  # nothing would predict the first response token
            raise UnusableRow("the prompt has no tokens")
        bos = [rules.tokenizer.bos_token_id] if rules.add_bos else []
        return bos + prompt, [response + [rules.tokenizer.eos_token_id] for response in responses]

    def shorten(self, prompt: list[int], responses: list[list[int]], rules: "Tokenization") -> list[int]:
        """The prompt's ids, truncated to max_prompt_length; a BOS at the start is kept."""
        n_bos = int(rules.add_bos)
        room = rules.max_prompt_length - n_bos
        start = n_bos if self.truncation == "keep_start" else len(prompt) - room
        return prompt[:n_bos] + prompt[start : start + room]


@dataclass(frozen=True)
class TokenizedExample:
    """A text example as token ids: the prompt's, and each response's with the token that ends it.

    truncated names what was cut.
    """

    text: TextExample
    prompt: list[int]
    responses: tuple[list[int], ...]
    truncated: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(response) for response in self.responses)


@dataclass(frozen=True)
class Tokenization:
    """Tokenizes and truncates texts. Lengths are in tokens; vocab_size is the model's, if known."""

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    max_prompt_length: int
    add_bos: bool = False
    vocab_size: int | None = None

    def __call__(self, texts: Sequence[TextExample]) -> list[TokenizedExample]:
        """Tokenize texts in one call: prompt and responses separately, with an end token after each response.

        A conversation is tokenized as a whole. UserError that names the row if it cannot be trained on, or if a token
        has no embedding in the model.
        """
        examples = self.try_tokenize(texts)
        for text, example in zip(texts, examples, strict=True):
            if isinstance(example, UnusableRow):
                raise UserError(f"{text.where}: {example}")
            self.check_ids(example)
        return [example for example in examples if not isinstance(example, UnusableRow)]

    def try_tokenize(self, texts: Sequence[TextExample]) -> list[TokenizedExample | UnusableRow]:
        """Tokenize texts in one call: an example for each, or the reason why there is none."""
        ids = iter(self.ids([string for text in texts for string in text.strings()]))
        results: list[TokenizedExample | UnusableRow] = []
        for text in texts:
            ids_of_text = [next(ids) for _ in range(1 + len(text.responses))]
            try:
                results.append(self.truncate(text, *text.split_ids(ids_of_text, self)))
            except UnusableRow as error:
                results.append(error)
        return results

    def ids(self, strings: list[str]) -> list[list[int]]:
        """The ids of strings, without adding special tokens."""
        if not strings:  # tokenizers refuse an empty list
            return []
        ids: list[list[int]] = self.tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def fits(self, prompt: list[int], responses: Sequence[list[int]]) -> bool:
        """Whether the prompt with the longest response is no longer than max_length."""
        return len(prompt) + max(map(len, responses)) <= self.max_length

    def truncate(self, text: TextExample, prompt: list[int], responses: list[list[int]]) -> TokenizedExample:
        """Truncate an example that is longer than max_length: first the prompt, then, if necessary, all responses."""
        shorter, cut = prompt, responses
        if not self.fits(prompt, responses) and len(prompt) > self.max_prompt_length:
            shorter = text.shorten(prompt, responses, self)
        if not self.fits(shorter, responses):
            cut = [response[: self.max_length - self.max_prompt_length] for response in responses]
        truncated = {
            text.shortened_by: len(shorter) < len(prompt),
            "response": cut != responses,
            "sides made equal": len(set(map(tuple, cut))) < len(set(map(tuple, responses))),
        }
        return TokenizedExample(text, shorter, tuple(cut), tuple(what for what, is_cut in truncated.items() if is_cut))

    def check_ids(self, example: TokenizedExample) -> None:
        """Raise UserError if an example has a token beyond the model's vocabulary."""
        if self.vocab_size is None:
            return
        highest = max(max(ids) for ids in (example.prompt, *example.responses))
        if highest >= self.vocab_size:
            token = f"the token {self.tokenizer.convert_ids_to_tokens(highest)!r} with id {highest}"
            limit = f"the model has embeddings for ids below {self.vocab_size}"
            raise UserError(f"{example.text.where}: the text contains {token}, but {limit}")

    def empty_prompts(self, prompts: Iterable[str]) -> set[str]:
        """The prompts without tokens, which cannot be trained on; none if BOS is added.

        For speed, a prompt is tokenized whole only if its first characters have no token.
        """
        if self.add_bos:
            return set()
        by_start: dict[str, list[str]] = {}
        for prompt in prompts:
            by_start.setdefault(prompt[:PROMPT_START], []).append(prompt)
        doubtful = [prompt for start in self.without_tokens(list(by_start)) for prompt in by_start[start]]
        return set(self.without_tokens(doubtful))

    def without_tokens(self, strings: list[str]) -> Iterator[str]:
        """Yield the strings that have no tokens."""
        for start in range(0, len(strings), CHUNK):
            chunk = strings[start : start + CHUNK]
            yield from (string for string, ids in zip(chunk, self.ids(chunk), strict=True) if not ids)


def padding_id(tokenizer: "PreTrainedTokenizerBase", vocab_size: int | None = None) -> int:
    """The id at padded positions, which are always masked: pad, or eos if the model has no such id."""
    pad = tokenizer.pad_token_id
    fits = pad is not None and (vocab_size is None or pad < vocab_size)
    return pad if fits else tokenizer.eos_token_id


def special_token_problems(tokenizer: "PreTrainedTokenizerBase", vocab_size: int, add_bos: bool) -> list[str]:
    """One line for each special token that training needs but the tokenizer or the model lacks."""
    needed = [("eos", "model.tokenizer_name_or_path", "which must end each response")]
    if add_bos:
        needed.append(("bos", "model.add_bos=true", "set it to false"))
    problems = []
    for name, key, advice in needed:
        token, token_id = getattr(tokenizer, f"{name}_token"), getattr(tokenizer, f"{name}_token_id")
        if token_id is None:
            problems.append(f"{key}: the tokenizer has no {name} token, {advice}")
        elif token_id >= vocab_size:
            problem = (
                f"the tokenizer's {name} token {token} has id {token_id}, but the model has {vocab_size} embeddings"
            )
            problems.append(f"{key}: {problem}; choose the model's own tokenizer")
    return problems


def bos_notes(tokenizer: "PreTrainedTokenizerBase", add_bos: bool) -> list[str]:
    """A line if the tokenizer adds BOS and training does not, or the other way round."""
    bos = tokenizer.bos_token
    if tokenizer.bos_token_id is None:
        return []
    adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if adds_bos and not add_bos:
        return [
            f"The tokenizer puts {bos} before a text, also in the exported model; training does not, as in the "
            "original. To train with it, set model.add_bos=true."
        ]
    if add_bos and not adds_bos:
        return [
            f"Training puts {bos} before each prompt (model.add_bos=true); the tokenizer does not, so add it "
            "when you use the exported model."
        ]
    return []


def hash_texts(digest: "hashlib._Hash", groups: Iterable[Iterable[TextExample]]) -> None:
    """Update a hash with the content and the label of all examples."""
    for group in groups:
        contents = [text.content if text.label is None else (*text.content, text.label) for text in group]
        digest.update(repr(contents).encode())
