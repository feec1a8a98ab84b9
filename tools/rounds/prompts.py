"""The prompts of the rounds: read from data sets, tokenized once, and split into those trained on and held-out ones."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo.data.columns import PAIR, Fields, find_columns
from dpo.data.examples import Tokenization, TokenizedExample
from dpo.data.formats import Table
from dpo.data.formatting import RowFormatter, plain_text_warning, template_time
from dpo.data.loader import names_in
from dpo.data.messages import as_messages, as_tools, checked_text, naming_row
from dpo.data.records import Encoder
from dpo.data.rows import SINGLE, Row, RowOptions, parse_row, with_system
from dpo.data.sources import SplitNames, open_source
from dpo.model.loading import load_model_config
from dpo.model.refusals import count_embeddings, model_problems
from dpo.settings.schema import Settings
from dpo.system.console import log_message
from dpo.system.devices import pick_device
from dpo.system.errors import UserError, raise_problems
from preference_datasets import DATASETS, get_dataset
from tools.rounds.records import Prompt
from tools.rounds.settings import RoundsSettings
from tools.rounds.store import read_rows

KEYS = {"train": "prompts", "test": "eval_prompts"}  # the setting that names the prompts of a split
FEW = 50  # held-out prompts
HELD_OUT = 10  # one of so many prompts is held out if no others are given


class PromptReader:
    """Reads prompts and tokenizes them for one model; longer ones are truncated to max_prompt_length."""

    def __init__(self, settings: Settings):
        config, self.tokenizer = load_model_config(settings.model, settings.chat_template)
        raise_problems(model_problems(settings, config, self.tokenizer, pick_device(settings.device)))
        self.settings = settings
        # An example of one token beside the prompt is too long exactly if the prompt is.
        tokenize = Tokenization(
            self.tokenizer,
            settings.max_prompt_length + 1,
            settings.max_prompt_length,
            settings.model.add_bos,
            count_embeddings(settings.model, config, self.tokenizer),
        )
        time = template_time(settings.chat_template_time)
        self.formatter = RowFormatter(settings.prompt_format, self.tokenizer, settings.chat_template_args, time)
        self.encoder = Encoder(self.formatter, tokenize, sft=False)
        self.is_chat = False

    @property
    def stops(self) -> list[int]:
        """Stop tokens in addition to eos: those that end a turn of a conversation."""
        return self.formatter.template.stops() if self.is_chat else []

    def read(self, names: Sequence[str], split: str) -> list[Prompt]:
        """The distinct prompts of a split of data sets, in their order; repeated and truncated ones are counted."""
        examples: list[TokenizedExample] = []
        for name in names:
            rows = list(self.named_rows(name, split) if name in DATASETS else self.file_rows(name, split))
            if not rows:
                raise UserError(f"{KEYS[split]}=[{name}]: holds no prompt")
            self.is_chat |= any(self.formatter.conversation(row) is not None for _, row in rows)
            if plain := next((number for number, row in rows if self.formatter.is_plain(row)), None):
                log_message(plain_text_warning(f"{name}, row {plain}"))
            examples += self.encoder.prompts(name, rows)
        distinct = {tuple(example.prompt): example for example in reversed(examples)}
        kept = [example for example in examples if distinct.get(tuple(example.prompt)) is example]
        n_truncated = sum(bool(example.truncated) for example in kept)
        log_message(
            f"Prompts {', '.join(names)}: {len(kept):,} distinct of {len(examples):,}; {n_truncated:,} are truncated "
            f"to max_prompt_length={self.settings.max_prompt_length}."
        )
        return [
            Prompt(id, example.text.original_prompt, self.text_of(example), example.prompt)
            for id, example in enumerate(kept)
        ]

    def text_of(self, example: TokenizedExample) -> str:
        """A prompt as the model sees it, with a BOS and without what was cut."""
        text, ids = example.text.prompt, example.prompt
        return text if self.encoder.tokenize.ids([text]) == [ids] else str(self.tokenizer.decode(ids))

    def named_rows(self, name: str, split: str) -> Iterator[tuple[int, Row]]:
        for number, prompt in enumerate(get_dataset(name, split), start=1):
            yield number, Row(prompt, ())

    def file_rows(self, name: str, split: str) -> Iterator[tuple[int, Row]]:
        settings = self.settings
        try:
            source = open_source(name, SplitNames(settings.split_train, settings.split_test, sft=True), DATASETS)
        except UserError as error:
            raise UserError(*(str(line).replace("datasets=[", f"{KEYS[split]}=[") for line in error.args)) from None
        for table in source.train if split == "train" or source.test is None else source.test:
            yield from self.table_rows(table)

    def table_rows(self, table: Table) -> Iterator[tuple[int, Row]]:
        columns = find_columns(names_in(table), self.settings.columns.model_dump(), table.name)
        options = RowOptions(sft=True, chat=self.settings.prompt_format == "chat", train_on=self.settings.train_on)
        for number, raw in table:
            with naming_row(table.name, number):
                yield number, self.row(raw, columns, options)

    def row(self, raw: Any, columns: dict[str, str], options: RowOptions) -> Row:
        """The prompt of a row: its column prompt, or what comes before the response of a pair or a conversation."""
        if isinstance(raw, dict):
            fields = Fields.of(raw, columns)
            has_responses = any(role in fields for role in (*PAIR, *SINGLE, "responses"))
            if "prompt" not in fields and not has_responses:
                raise UserError(
                    f"has no prompt; set columns.prompt=NAME; the row's columns: {', '.join(map(str, raw))}"
                )
            if "prompt" in fields and not has_responses:
                prompt, name = fields["prompt"], fields.name("prompt")
                if isinstance(prompt, str) and not options.chat:
                    return Row(checked_text(prompt, name), ())
                tools = as_tools(fields["tools"], fields.name("tools"))
                return Row(with_system(as_messages(prompt, name, "user"), fields), (), tools=tools)
        parsed = parse_row(raw, columns, options)
        return replace(parsed, responses=(), pairs=(), scores=())


def split_prompts(reader: PromptReader, settings: RoundsSettings, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Read the prompts to train on and the held-out ones: n_eval_prompts of eval_prompts, or of a tenth of all."""
    train = reader.read(settings.prompts, "train")
    rng = random.Random(f"{seed} held out")
    if settings.eval_prompts is None:
        if len(train) < 2:
            raise UserError("prompts: one prompt cannot be both trained on and held out; set eval_prompts")
        n = min(settings.n_eval_prompts, -(-len(train) // HELD_OUT))
        chosen = set(rng.sample(range(len(train)), n))
        held_out = [prompt for prompt in train if prompt.id in chosen]
    else:
        held_out = reader.read(settings.eval_prompts, "test")
        held_out = sorted(rng.sample(held_out, min(settings.n_eval_prompts, len(held_out))), key=lambda one: one.id)
    known = {tuple(prompt.ids) for prompt in held_out}
    kept = [prompt for prompt in train if tuple(prompt.ids) not in known]
    if not kept:
        raise UserError("prompts, eval_prompts: all prompts are held out; give others to train on")
    log_message(f"{len(held_out):,} prompts are held out, {len(kept):,} are trained on.")
    if len(held_out) < FEW:
        log_message(
            f"Warning: by {len(held_out):,} held-out prompts a round can be judged only roughly, and may be stopped by "
            f"chance; give {FEW} or more."
        )
    both = [replace(prompt, id=id) for id, prompt in enumerate([*kept, *held_out])]
    return both[: len(kept)], both[len(kept) :]


def prompts_of_round(prompts: Sequence[Prompt], k: int, n: int | None, seed: int) -> list[Prompt]:
    """The prompts of round k: all, or the next n in an order drawn with the seed, which begins again at its end."""
    if n is None or n >= len(prompts):
        return list(prompts)
    order = random.Random(f"{seed} order").sample(range(len(prompts)), len(prompts))
    indices = [order[i % len(prompts)] for i in range((k - 1) * n, k * n)]
    return [prompts[i] for i in sorted(indices)]


def read_prompts(path: Path) -> list[Prompt]:
    return [Prompt(**row) for row in read_rows(path)]
