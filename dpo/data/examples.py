"""From texts to token ids: tokenization, special tokens, truncation."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, repeat, zip_longest
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dpo.data.messages import InconsistentRow, naming_row
from dpo.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


OTHER_TOKENIZER = "choose the model's own tokenizer, or set model.resize_embeddings=true"
NO_TOKEN = "the prompt has no tokens"  # so nothing would predict the first token of a response
LEFT_OUT_TURNS = "oldest turns"  # a value in TokenizedExample.truncated
Truncation = Literal["keep_start", "keep_end"]  # which end of an over-long prompt is kept


class Segment(NamedTuple):
    """A part of a response: the assistant's turns are trained on, turns of users and tools are context."""

    text: str
    trained: bool


Response = tuple[Segment, ...]


@dataclass(frozen=True)
class Rendered:
    """A conversation as its chat template writes it, special tokens included; responses end with the end of a turn."""

    prompt: str
    responses: tuple[Response, ...]
    removed: tuple[str, ...] = ()  # what the template removes by design


@dataclass(frozen=True, slots=True)
class TextExample:
    """The texts of an example, and the row that they come from.

    responses are the chosen and the rejected response, or a single one, with all their turns. scores, if the data set
    has them, are in the same order. label, if the data set has it, says whether the single response is desirable.
    """

    prompt: str
    responses: tuple[str, ...]
    truncation: Truncation
    row: int
    source: str
    scores: tuple[float, ...] = ()
    label: bool | None = None
    numbers: Mapping[str, float] = field(default_factory=dict, hash=False)  # of the row, by role, such as weight
    warnings: tuple[str, ...] = ()  # each completes "kept although ..."
    messages: Any = None  # the prompt as in the data set, if it is a conversation

    @property
    def weight(self) -> float:
        """A factor of the example's loss."""
        return self.numbers.get("weight", 1.0)

    @property
    def where(self) -> str:
        """The source and row, for messages."""
        return f"{self.source}, row {self.row}"

    @property
    def original_prompt(self) -> Any:
        """The prompt as in the data set: a text, or a list of messages."""
        return self.prompt if self.messages is None else self.messages


@dataclass(frozen=True)
class TokenizedExample:
    """An example as token ids: the prompt's, and each response's with the token that ends it.

    truncated names what was cut. loss_masks says which tokens of each response are trained on; () means all. index is
    the example's number in the data of the run, training data first.
    """

    text: TextExample
    prompt: list[int]
    responses: tuple[list[int], ...]
    truncated: tuple[str, ...] = ()
    loss_masks: tuple[list[bool], ...] = ()
    index: int = -1

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(response) for response in self.responses)

    def trained(self, k: int, values: Sequence[int]) -> Sequence[int]:
        """Select the trained tokens of response k from values, which has one value per token."""
        return list(compress(values, self.loss_masks[k])) if self.loss_masks else values

    @property
    def trained_responses(self) -> tuple[Sequence[int], ...]:
        """The trained tokens of each response."""
        return tuple(self.trained(k, response) for k, response in enumerate(self.responses))


class Ids(NamedTuple):
    """A prompt and its responses as token ids before truncation, and each response's loss mask; () means all."""

    prompt: list[int]
    responses: tuple[list[int], ...]
    masks: tuple[list[bool], ...] = ()

    def choose(self, indices: Sequence[int]) -> "Ids":
        """The prompt with the responses with these indices."""
        masks = tuple(self.masks[i] for i in indices) if self.masks else ()
        return Ids(self.prompt, tuple(self.responses[i] for i in indices), masks)

    def response(self, index: int) -> tuple[list[int], list[bool]]:
        """A response's ids and loss mask."""
        return self.responses[index], self.masks[index] if self.masks else []


@dataclass(frozen=True)
class Tokenization:
    """Tokenizes and truncates texts. Lengths are in tokens; vocab_size is the model's, if known."""

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    max_prompt_length: int
    add_bos: bool = False
    vocab_size: int | None = None

    def __call__(self, texts: Sequence[TextExample]) -> list[TokenizedExample]:
        """Tokenize texts, prompt and responses separately; UserError that names the row if one has no tokens."""
        ids = iter(self.ids([string for text in texts for string in (text.prompt, *text.responses)]))
        examples = []
        for text in texts:
            ids_of_text = self.of_texts(next(ids), [next(ids) for _ in text.responses])
            if not ids_of_text.prompt:
                raise UserError(f"{text.where}: {NO_TOKEN}")
            examples.append(self.truncate(ids_of_text, text))
            with naming_row(text.source, text.row):
                self.check_ids(examples[-1])
        return examples

    def settings(self) -> tuple[object, object]:
        """The vocabulary and the length limits, which determine an example's tokens."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else sorted(self.tokenizer.get_vocab().items())
        return vocabulary, (self.max_length, self.max_prompt_length, self.add_bos)

    def identity(self) -> tuple[object, ...]:
        """What determines an example's tokens, and whether the vocabulary has them all."""
        tokenizer = self.tokenizer
        special = (tokenizer.special_tokens_map, getattr(tokenizer, "split_special_tokens", False))
        return *self.settings(), type(tokenizer).__name__, special, self.vocab_size

    def ids(self, strings: Sequence[str]) -> list[list[int]]:
        """The ids of strings, without adding special tokens."""
        if not strings:  # tokenizers refuse an empty list
            return []
        ids: list[list[int]] = self.tokenizer(list(strings), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def texts(self, ids: Sequence[list[int]], skip_special_tokens: bool = False) -> list[str]:
        """The texts of lists of ids."""
        options = {"skip_special_tokens": skip_special_tokens, "clean_up_tokenization_spaces": False}
        return list(self.tokenizer.batch_decode(list(ids), **options))

    def rendered(self, ids: Ids) -> Rendered:
        """A conversation as its ids say that it was rendered."""
        prompt, *responses = self.texts([ids.prompt, *ids.responses])
        return Rendered(prompt, tuple((Segment(text, True),) for text in responses))

    def with_bos(self, prompt: list[int]) -> list[int]:
        """The prompt with a BOS, if model.add_bos requests one and the text or the template wrote none."""
        bos = self.tokenizer.bos_token_id
        return [bos, *prompt] if self.add_bos and prompt[:1] != [bos] else prompt

    def of_texts(self, prompt: list[int], responses: Sequence[list[int]]) -> Ids:
        """Add BOS and eos to the ids of texts."""
        return Ids(self.with_bos(prompt), tuple([*response, self.tokenizer.eos_token_id] for response in responses))

    def of_conversation(self, prompt: list[int], responses: Sequence[Response], prefixes: Sequence[list[int]]) -> Ids:
        """Split the ids of a rendered conversation's prefixes, as in `prefixes_of`, into prompt and responses.

        InconsistentRow unless the ids of each prefix are a prefix of the conversation's ids.
        """
        remaining = iter(prefixes)
        ids, masks = [], []
        for response in responses:
            ends = [next(remaining) for _ in response]
            conversation = ends[-1]
            self.check_prefix(prompt, conversation)
            mask: list[bool] = []
            for prefix, segment in zip(ends, response, strict=True):
                self.check_prefix(prefix, conversation)
                mask += repeat(segment.trained, len(prefix) - len(prompt) - len(mask))
            ids.append(conversation[len(prompt) :])
            masks.append(mask)
        if all(map(all, masks)):
            masks = []
        return Ids(self.with_bos(prompt), tuple(ids), tuple(masks))

    def check_prefix(self, prefix: list[int], conversation: list[int]) -> None:
        """Raise InconsistentRow unless a conversation's ids begin with a prefix."""
        if conversation[: len(prefix)] == prefix:
            return
        at = next(i for i, (a, b) in enumerate(zip_longest(prefix, conversation)) if a != b)
        near_prefix, near = (self.tokenizer.decode(ids[max(0, at - 4) : at + 4]) for ids in (prefix, conversation))
        details = f"at token {at} the prompt has {near_prefix!r}, the conversation {near!r}"
        raise InconsistentRow("the conversation's tokens do not begin with the prompt's tokens", details)

    def fits(self, prompt: Sequence[int], responses: Sequence[Sequence[int]]) -> bool:
        """Whether the prompt with the longest response is no longer than max_length."""
        return len(prompt) + max(map(len, responses), default=1) <= self.max_length

    def truncate(self, ids: Ids, text: TextExample, index: int = -1, n_turns_left_out: int = 0) -> TokenizedExample:
        """Truncate an example that is longer than max_length: first the prompt, then, if necessary, all responses.

        n_turns_left_out is the number of turns that a conversation's prompt has already lost.
        """
        prompt, responses, masks = ids
        if not self.fits(prompt, responses) and len(prompt) > self.max_prompt_length:
            n_bos = int(self.add_bos and prompt[0] == self.tokenizer.bos_token_id)  # sampled ids may have none
            room = self.max_prompt_length - n_bos
            start = n_bos if text.truncation == "keep_start" else len(prompt) - room
            prompt = prompt[:n_bos] + prompt[start : start + room]
        cut = responses
        if not self.fits(prompt, responses):
            end = self.max_length - self.max_prompt_length
            masks = tuple(without_context_at_end(mask[:end]) for mask in masks)
            ends = map(len, masks) if masks else repeat(end)
            cut = tuple(response[:end] for response, end in zip(responses, ends, strict=False))
        cuts = {
            LEFT_OUT_TURNS: n_turns_left_out > 0,
            "prompt": len(prompt) < len(ids.prompt),
            "response": cut != responses,
            "sides made equal": len(set(map(tuple, cut))) < len(set(map(tuple, responses))),
        }
        return TokenizedExample(text, prompt, cut, tuple(name for name, is_cut in cuts.items() if is_cut), masks, index)

    def check_ids(self, example: TokenizedExample, advice: str = OTHER_TOKENIZER) -> None:
        """Raise UserError if an example has a token without an embedding in the model."""
        if self.vocab_size is None:
            return
        highest = max(max(ids) for ids in (example.prompt, *example.responses))
        if highest >= self.vocab_size:
            token = f"the token {self.tokenizer.convert_ids_to_tokens(highest)!r} with id {highest}"
            limit = f"the model has embeddings for ids below {self.vocab_size}"
            raise UserError(f"the text contains {token}, but {limit}; {advice}")


def without_context_at_end(mask: list[bool]) -> list[bool]:
    """The loss mask up to its last trained token."""
    while not mask[-1]:
        mask = mask[:-1]
    return mask


def prefixes_of(rendered: Rendered) -> Iterator[str]:
    """Yield the text of the prompt with each response up to the end of each of its segments."""
    for response in rendered.responses:
        text = rendered.prompt
        for segment in response:
            text += segment.text
            yield text


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
            limit = f"the model has {vocab_size} embeddings, which model.resize_embeddings=true would add to"
            problem = f"the tokenizer's {name} token {token} has id {token_id}, but {limit}"
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
