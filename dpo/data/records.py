"""From rows to records: parsed, rendered, tokenized, and judged on what is trained on.

A record is a prompt with its responses, as text and as token ids. Its choices are its examples: pairs of responses, or
single responses.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from dpo.data.chat import Conversation
from dpo.data.examples import (
    OTHER_TOKENIZER,
    Ids,
    Rendered,
    TextExample,
    Tokenization,
    TokenizedExample,
    Truncation,
    prefixes_of,
)
from dpo.data.formatting import RowFormatter
from dpo.data.messages import SYSTEM, InconsistentRow, UnusableRow, naming_row, to_json
from dpo.data.rows import DIFFERENT_PROMPTS, Row, is_empty
from dpo.system.errors import UserError

EQUAL, EMPTY = "both responses are equal", "a response is empty"
TOO_LONG = "the {} alone is longer than max_prompt_length"
SOME_PAIRS = "some of its pairs have an empty response or equal ones"
SOME_TIES = "some of its responses have equal scores"
OTHER_IDS = "columns.sampled_ids=none tokenizes the texts"
REMOVED = "the chat template leaves out {}"
# Flags of a record, by which selection.py keeps or drops it
EVERY_TARGET = 1  # SFT trains on each distinct target of its prompt
LACKS_TOKEN = 2  # its prompt has no tokens
HOLDS_EOS = 4  # its text contains eos
DESIRABLE = 8
UNDESIRABLE = 16


@dataclass(frozen=True)
class Record:
    """A row that can be trained on.

    choices has the indices of each example's responses, the chosen one first. hashes has 64-bit hashes: of the prompt,
    of the prompt with the first response, and of all that is trained on. Each warning completes "kept although ...".
    """

    row: Row
    rendered: Rendered
    ids: Ids
    choices: tuple[tuple[int, ...], ...]
    flags: int
    hashes: tuple[int, int, int]
    n_turns_left_out: int = 0
    warnings: tuple[str, ...] = ()


@dataclass
class Encoded:
    """The records of a chunk of rows, with their numbers, and what became of the other rows.

    details has an example of each reason for which rows were dropped. columns counts the rows with each column; roles
    has the roles of the columns that were read. is_chat: whether there are conversations. plain_text names the first
    row with a text prompt that might be a turn of a conversation.
    """

    records: list[tuple[int, Record]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    details: dict[str, str] = field(default_factory=dict)
    columns: Counter[str] = field(default_factory=Counter)
    roles: set[str] = field(default_factory=set)
    is_chat: bool = False
    plain_text: str | None = None

    def add(self, later: "Encoded") -> None:
        """Add the counts of later rows, without their records."""
        self.dropped += later.dropped
        self.details = {**later.details, **self.details}
        self.columns += later.columns
        self.roles |= later.roles
        self.is_chat |= later.is_chat
        self.plain_text = self.plain_text or later.plain_text


@dataclass
class Encoder:
    """Makes records of rows.

    keeps_unusable: keep rows with empty or equal texts, as the original does. drop_inconsistent: drop inconsistent
    rows instead of raising an error.
    """

    formatter: RowFormatter
    tokenize: Tokenization
    sft: bool
    truncation: Truncation = "keep_end"
    keeps_unusable: bool = False
    drop_inconsistent: bool = False

    def __call__(self, source: str, rows: Sequence[tuple[int, Any]], parse: Callable[[Any], Row]) -> Encoded:
        """Encode a chunk of raw rows; UserError that names the row if one must be refused."""
        encoded = Encoded()
        pending: list[tuple[int, Draft]] = []
        for number, raw in rows:
            with self.counting(encoded, source, number):
                row = parse(raw)
                draft = self.draft(row)
                encoded.roles |= row.columns_read
                encoded.is_chat |= draft.conversation is not None
                if encoded.plain_text is None and self.formatter.is_plain(row):
                    encoded.plain_text = f"{source}, row {number}"
                pending.append((number, draft))
            if isinstance(raw, dict):
                encoded.columns.update(map(str, raw))
        ids = iter(self.tokenize.ids([text for _, draft in pending for text in draft.strings]))
        for number, draft in pending:
            ids_of_draft = [next(ids) for _ in draft.strings]
            with self.counting(encoded, source, number):
                record = self.record(draft, ids_of_draft)
                self.check_vocabulary(record)
                encoded.records.append((number, record))
        return encoded

    def prompts(self, source: str, rows: Sequence[tuple[int, Row]]) -> list[TokenizedExample]:
        """Encode rows without responses as prompts; UserError that names the row if one is unusable."""
        encoded = self(source, rows, lambda row: row)
        if encoded.dropped:
            raise UserError(next(iter(encoded.details.values())))
        return [self.example(record, (), number, source) for number, record in encoded.records]

    def example(self, record: Record, choice: Sequence[int], number: int, source: str) -> TokenizedExample:
        """The truncated example of a record's responses with the indices in choice."""
        row, rendered = record.row, record.rendered
        text = TextExample(
            rendered.prompt,
            tuple(text_of(rendered.responses[i]) for i in choice),
            self.truncation,
            number,
            source,
            messages=None if isinstance(row.prompt, str) else row.prompt,
        )
        return self.tokenize.truncate(record.ids.choose(choice), text, n_turns_left_out=record.n_turns_left_out)

    def check_vocabulary(self, record: Record) -> None:
        """Raise UserError if an example, after truncation, has a token without an embedding in the model."""
        limit, ids = self.tokenize.vocab_size, record.ids
        highest = max(chain(ids.prompt, *ids.responses), default=0)
        if limit is not None and highest >= limit:
            advice = OTHER_TOKENIZER if record.row.ids is None else OTHER_IDS
            for choice in record.choices:
                self.tokenize.check_ids(self.example(record, choice, 0, ""), advice)

    @contextmanager
    def counting(self, encoded: Encoded, source: str, number: int) -> Iterator[None]:
        """Count a row that cannot be trained on, unless it must be refused."""
        with naming_row(source, number):
            try:
                yield
            except UnusableRow as error:
                if isinstance(error, InconsistentRow) and not self.drop_inconsistent:
                    raise UserError(f"{error}; on_inconsistent=drop skips such rows") from None
                encoded.dropped[error.reason] += 1
                encoded.details.setdefault(error.reason, f"{source}, row {number}: {error}")

    def draft(self, row: Row) -> "Draft":
        """Render the responses that are trained on; sampled ids need no template, which might not write them."""
        is_single = self.sft or row.label is not None
        choices = ((row.target,),) if is_single else row.pairs
        used = list(dict.fromkeys(chain.from_iterable(choices)))  # of a pair, the chosen one comes first
        row = replace(
            row,
            responses=tuple(row.responses[i] for i in used),
            scores=tuple(row.scores[i] for i in used) if row.scores else (),
            ids=row.ids and row.ids.choose(used),
        )
        conversation = self.formatter.conversation(row)
        if conversation is None:
            rendered = self.formatter.text(row)
            strings = [rendered.prompt, *map(text_of, rendered.responses)]
        elif row.ids is None:
            rendered = conversation.render()
            strings = [rendered.prompt, *prefixes_of(rendered)]
        else:
            rendered = self.tokenize.rendered(row.ids)
        if row.ids is not None:
            self.check_sampled(row, row.ids)
            strings = []
        indices = tuple(tuple(map(used.index, choice)) for choice in choices)
        return Draft(row, indices, conversation, rendered, strings)

    def check_sampled(self, row: Row, ids: Ids) -> None:
        """Raise UserError if the sampled ids of a response are not those of its text, as with another tokenizer."""
        decoded = zip(
            *(self.tokenize.texts(ids.responses, skip_special) for skip_special in (False, True)), strict=True
        )
        for response, texts in zip(row.responses, decoded, strict=True):
            is_text = isinstance(response, str)
            contents = [response] if is_text else [turn["content"] for turn in response if turn["role"] == "assistant"]
            for content in contents:
                if not any(without_space(content) in without_space(text) for text in texts):
                    problem = f"the sampled ids are those of {texts[0][:40]!r}, not of {content[:40]!r}"
                    raise UserError(f"{problem}; if another tokenizer made them, {OTHER_IDS}")

    def record(self, draft: "Draft", ids: list[list[int]]) -> Record:
        """Make a record of a rendered row and the ids of its strings; UnusableRow if it cannot be trained on."""
        row, rendered, n_left_out = draft.row, draft.rendered, 0
        if row.ids is not None:
            row_ids = row.ids
        elif draft.conversation is None:
            row_ids = self.tokenize.of_texts(ids[0], ids[1:])
        else:
            row_ids = self.tokenize.of_conversation(ids[0], rendered.responses, ids[1:])
            row_ids, n_left_out = self.shorten(draft, row_ids)
        choices, warnings = self.judge(draft, row_ids)
        flags = self.flags(draft, row_ids)
        return Record(
            row,
            rendered,
            row_ids,
            choices=() if flags & LACKS_TOKEN else choices,
            flags=flags,
            hashes=hashes_of_row(row, rendered),
            n_turns_left_out=n_left_out,
            warnings=warnings,
        )

    def flags(self, draft: "Draft", ids: Ids) -> int:
        """The flags of a record; only texts, not conversations, can lack tokens or contain eos."""
        is_text = draft.conversation is None
        eos = str(self.tokenize.tokenizer.eos_token)
        flags = {
            EVERY_TARGET: draft.row.every_target,
            LACKS_TOKEN: is_text and not ids.prompt,
            HOLDS_EOS: is_text and any(eos in text for text in draft.strings),
            DESIRABLE: draft.row.label is True,
            UNDESIRABLE: draft.row.label is False,
        }
        return sum(flag for flag, is_set in flags.items() if is_set)

    def judge(self, draft: "Draft", ids: Ids) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
        """The examples that can be trained on, as choices, and warnings; UnusableRow if no example is left."""
        row = draft.row
        empty = [self.is_empty(draft, i) for i in range(len(row.responses))]
        errors = {}
        for choice in draft.choices:
            if any(empty[i] for i in choice):
                errors[choice] = EMPTY
            elif len(choice) > 1 and ids.response(choice[0]) == ids.response(choice[1]):
                errors[choice] = EQUAL
        choices = tuple(choice for choice in draft.choices if choice not in errors)
        reasons = list(dict.fromkeys(errors.values()))
        if draft.conversation is None and not draft.rendered.prompt.strip():
            choices, reasons = (), ["the prompt is empty", *reasons]
        if self.keeps_unusable:
            choices = draft.choices
        elif reasons and not choices:
            raise UnusableRow(reasons[0])
        warnings = []
        if row.prompts_differ:
            warnings.append(DIFFERENT_PROMPTS)
        if row.ties > 0:
            warnings.append(SOME_TIES)
        warnings += map(REMOVED.format, draft.rendered.removed)
        if reasons:
            warnings += reasons if self.keeps_unusable else [SOME_PAIRS]
        return choices, tuple(warnings)

    def is_empty(self, draft: "Draft", index: int) -> bool:
        """Whether a response is empty: of its trained turns, as messages or as rendered, only ends of turns remain."""
        if draft.conversation is None:
            return not text_of(draft.rendered.responses[index]).strip()
        end_of_turn = self.formatter.template.end_of_turn
        trained = [segment.text for segment in draft.rendered.responses[index] if segment.trained]
        turns = [turn for turn in draft.row.responses[index] if turn["role"] == "assistant"]
        return all(map(is_empty, turns)) or not any(text.removesuffix(end_of_turn).strip() for text in trained)

    def shorten(self, draft: "Draft", ids: Ids) -> tuple[Ids, int]:
        """Leave out as many of a conversation's oldest turns as necessary; return the ids left, and how many turns.

        UnusableRow if what must stay is too long, InconsistentRow if the responses' ids would change.
        """
        rules = self.tokenize
        if rules.fits(ids.prompt, ids.responses) or len(ids.prompt) <= rules.max_prompt_length:
            return ids, 0
        assert draft.conversation is not None
        for n_left_out, shorter in enumerate(draft.conversation.shorter(), start=1):
            prompt = rules.with_bos(rules.ids([shorter.prompt])[0])
            if rules.fits(prompt, ids.responses) or len(prompt) <= rules.max_prompt_length:
                prefixes = rules.ids([shorter.prompt, *prefixes_of(shorter)])
                shorter_ids = rules.of_conversation(prefixes[0], shorter.responses, prefixes[1:])
                if (shorter_ids.responses, shorter_ids.masks) != (ids.responses, ids.masks):
                    raise InconsistentRow("leaving out the oldest turns changes the response's tokens")
                return shorter_ids, n_left_out
        raise UnusableRow(*self.longest_part(draft.row))

    def longest_part(self, row: Row) -> tuple[str, str]:
        """Name the longest part of a prompt that is too long even without its oldest turns: reason and details."""
        turns = row.prompt
        assert isinstance(turns, list)
        parts = {"last turn": to_json(turns[-1].get("content"))}
        if turns[0]["role"] in SYSTEM:
            parts["system turn"] = to_json(turns[0].get("content"))
        if row.tools:
            parts["list of tools"] = to_json(row.tools)
        lengths = dict(zip(parts, map(len, self.tokenize.ids(list(parts.values()))), strict=True))
        name = max(lengths, key=lambda part: lengths[part])
        counts = ", ".join(f"the {part} has {n:,} tokens" for part, n in lengths.items())
        limits = f"max_prompt_length={self.tokenize.max_prompt_length} and max_length={self.tokenize.max_length}"
        return TOO_LONG.format(name), f"{counts}; raise {limits}, or shorten the {name}"


@dataclass(frozen=True)
class Draft:
    """A rendered row: its examples as indices of responses, and the texts to tokenize, none if it has sampled ids."""

    row: Row
    choices: tuple[tuple[int, ...], ...]
    conversation: Conversation | None
    rendered: Rendered
    strings: list[str]


def without_space(text: str) -> str:
    """The text without white space and undecodable bytes, by which decoders and servers differ."""
    return "".join(text.replace("\ufffd", "").split())


def text_of(response: Sequence[Any]) -> str:
    return "".join(segment.text for segment in response)


def hashes_of_row(row: Row, rendered: Rendered) -> tuple[int, int, int]:
    """The hashes of a record. Fingerprints contain them, so those of pairs of texts stay as in earlier versions."""
    extras = []
    if row.label is not None:
        extras.append(str(row.label))
    extras += [f"{role} {number}" for role, number in row.numbers.items()]
    if len(row.pairs) > 1:
        extras.append(f"pairs {row.pairs}")
    responses = list(map(text_of, rendered.responses))
    if row.ids is not None:
        responses = [f"{row.ids.prompt} {ids}" for ids in row.ids.responses]
    hashes = hashes_of(rendered.prompt, *responses, *extras)
    return hashes[0], hashes[min(1, len(hashes) - 1)], hashes[-1]


def hashes_of(*texts: str) -> list[int]:
    """64-bit hashes of the prefixes of a list of texts, as JSON: of the first text, the first two, and so on.

    The chance of a collision is 1 in 10 million per million rows.
    """
    hashes, digest, separator = [], hashlib.blake2b(digest_size=8), "["
    for text in texts:
        digest.update(f"{separator}{to_json(text)}".encode())
        prefix = digest.copy()
        prefix.update(b"]")
        hashes.append(int.from_bytes(prefix.digest(), "big"))
        separator = ", "
    return hashes
