"""Preference data sets, their tokens, and the iterator that walks them in the original's order.

A data set is a map from a prompt to its responses, its pairs (chosen index, rejected index) and one sft_target.
To add one: write a function like get_shp that returns such a map, and name it in DATASETS.
"""

import gzip
import hashlib
import json
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils import UserError, first_line, progress

ASSISTANT = "\n\nAssistant:"


class PreferenceData(dict):
    """A map prompt -> {"responses": [...], "pairs": [(chosen, rejected), ...], "sft_target": ...}, with its counts.

    truncation says which end of an over-long prompt is kept. counts holds the number of rows read and kept, and of
    those dropped or remarkable, by reason. rows names, for each pair of a prompt, the row (from 1) it was read from.
    drop_unusable asks for rows that cannot be trained on to be left out; hh, shp and se keep what the original keeps.
    """

    def __init__(self, truncation: str, drop_unusable: bool = False):
        super().__init__()
        self.truncation = truncation
        self.drop_unusable = drop_unusable
        self.counts: Counter[str] = Counter()
        self.rows: dict[str, list[int]] = {}
        self.seen: set[tuple[str, str, str]] = set()

    def add(self, prompt: str, responses: Sequence[str], pairs: Iterable[tuple[int, int]], sft_target: str) -> None:
        """Append the last read row's responses to a prompt; pairs index them; its sft_target wins."""
        self.counts["kept"] += 1
        entry = self.setdefault(prompt, {"responses": [], "pairs": [], "sft_target": sft_target})
        first = len(entry["responses"])
        new_pairs = [(first + chosen, first + rejected) for chosen, rejected in pairs]
        entry["responses"].extend(responses)
        entry["pairs"].extend(new_pairs)
        entry["sft_target"] = sft_target
        self.rows.setdefault(prompt, []).extend([self.counts["read"]] * len(new_pairs))

    def add_pair(self, prompt: str, chosen: str, rejected: str) -> bool:
        """Add the last read row's pair, whose chosen response is the sft_target; count what is remarkable.

        Return whether the pair was kept.
        """
        if not self.accepts(prompt, chosen, rejected):
            return False
        self.add(prompt, [chosen, rejected], [(0, 1)], chosen)
        return True

    def accepts(self, prompt: str, chosen: str, rejected: str) -> bool:
        """Tell whether a pair can be trained on, or is kept nonetheless; count what is remarkable."""
        problems = {
            "the prompt is empty": not prompt.strip(),
            "a response is empty": not (chosen.strip() and rejected.strip()),
            "both responses are equal": chosen == rejected,
        }
        found = [problem for problem, there in problems.items() if there]
        if found and self.drop_unusable:
            self.counts[f"dropped: {found[0]}"] += 1
            return False
        self.counts.update(f"kept although {problem}" for problem in found)
        self.counts["kept although it repeats an earlier row"] += (prompt, chosen, rejected) in self.seen
        self.seen.add((prompt, chosen, rejected))
        return True


# The data sets


def load_hub_split(path: str, split: str, cache_dir: str | None) -> Any:
    """Load one split of a hub data set; UserError in one line if it cannot be fetched."""
    import datasets  # slow to import, and not needed for local files

    try:
        return datasets.load_dataset(path, split=split, cache_dir=cache_dir)
    except Exception as error:  # the hub client raises many kinds: no network, no such data set, no disk
        reason = first_line(error)
        advice = "pass a local folder, datasets=[PATH] with train.jsonl, or try `make demo`"
        raise UserError(f"data set {path}: cannot be fetched ({reason}); {advice}") from None


@contextmanager
def reading_row(data: PreferenceData, where: str) -> Iterator[None]:
    """Count a row as read; UserError that names it if it has not the form that the data set should have."""
    data.counts["read"] += 1
    try:
        yield
    except (UserError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, UserError) else f"has another form ({type(error).__name__}: {error})"
        raise UserError(f"{where}, row {data.counts['read']}: {reason}") from None


def text_in(row: Any, name: str) -> str:
    """Return a field of a row; UserError if it is no text that can be written as UTF-8."""
    text = row.get(name)
    if not isinstance(text, str):
        raise UserError(f"{name} must be a text, not {type(text).__name__ if name in row else 'missing'}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name} holds half of a surrogate pair, which is no text")
    return text


def get_hh(split: str, silent: bool = False, cache_dir: str | None = None) -> PreferenceData:
    """Load Anthropic's helpful-and-harmless dialogues, split train or test."""
    rows = load_hub_split("Anthropic/hh-rlhf", split, cache_dir)
    data = PreferenceData("keep_end")
    for row in progress(rows, f"hh {split}", silent=silent):
        with reading_row(data, f"hh {split}"):
            add_dialogues(data, text_in(row, "chosen"), text_in(row, "rejected"))
    return data


def add_dialogues(data: PreferenceData, chosen: str, rejected: str) -> None:
    """Add a pair of hh-style dialogues, which share all up to the last answer of the assistant.

    As in the original, both responses begin where the chosen dialogue's last answer does. UserError if there is none.
    """
    if ASSISTANT not in chosen:
        raise UserError(f"the chosen dialogue has no {ASSISTANT!r}")
    start = chosen.rfind(ASSISTANT) + len(ASSISTANT)
    kept = data.add_pair(chosen[:start], chosen[start:], rejected[start:])
    differs = kept and rejected[:start] != chosen[:start]
    data.counts["kept although the rejected dialogue's prompt differs"] += differs


def get_shp(split: str, silent: bool = False, cache_dir: str | None = None) -> PreferenceData:
    """Load the Stanford Human Preferences; a row counts if one score is at least twice the other."""
    rows = load_hub_split("stanfordnlp/SHP", split, cache_dir)
    data = PreferenceData("keep_start")
    scores: dict[str, list[float]] = {}
    for row in progress(rows, f"shp {split}", silent=silent):
        with reading_row(data, f"shp {split}"):
            add_shp_row(data, scores, row)
    for prompt, entry in data.items():
        entry["sft_target"] = best_response(entry["responses"], scores[prompt])
    return data


def add_shp_row(data: PreferenceData, scores: dict[str, list[float]], row: Any) -> None:
    """Add one row of SHP, and its scores under its prompt."""
    low, high = sorted((row["score_A"], row["score_B"]))
    if high < 2 * low or high == 0:
        data.counts["dropped: neither score is twice the other"] += 1
        return
    data.counts["kept although a score is 0"] += low == 0
    prompt = f"\n\nHuman: {text_in(row, 'history')}{ASSISTANT}"
    responses = [f" {text_in(row, 'human_ref_A')}", f" {text_in(row, 'human_ref_B')}"]
    pair = (0, 1) if row["labels"] == 1 else (1, 0)
    data.accepts(row["history"], *(responses[i] for i in pair))
    data.add(prompt, responses, [pair], responses[0])
    scores.setdefault(prompt, []).extend((row["score_A"], row["score_B"]))


def get_se(split: str, silent: bool = False, cache_dir: str | None = None) -> PreferenceData:
    """Load the StackExchange preferences: 1% of the questions, drawn with seed 42, are the test split."""
    rows = load_hub_split("HuggingFaceH4/stack-exchange-preferences", "train", cache_dir).shuffle(seed=42)
    n_test = int(len(rows) * 0.01)
    rows = rows.select(range(n_test) if split == "test" else range(n_test, len(rows)))
    data = PreferenceData("keep_start")
    for row in progress(rows, f"se {split}", silent=silent):
        with reading_row(data, f"se {split}"):
            add_se_row(data, row)
    return data


def add_se_row(data: PreferenceData, row: Any) -> None:
    """Add one question of StackExchange with all pairs of its answers."""
    question = strip_html(text_in(row, "question"))
    prompt = f"\n\nHuman: {question}{ASSISTANT}"
    responses = [f" {strip_html(text_in(answer, 'text'))}" for answer in row["answers"]]
    scores = [answer["pm_score"] for answer in row["answers"]]
    pairs = [(i, j) if scores[i] > scores[j] else (j, i) for i, j in combinations(range(len(scores)), 2)]
    data.counts["kept although it has one answer and so no pair"] += not pairs
    for chosen, rejected in pairs:
        data.accepts(question, responses[chosen], responses[rejected])
    if prompt in data:  # as in the original, the later question's answers take the place of the earlier one's
        data.counts["replaced by a later row with the same question"] += 1
        data[prompt].update(responses=[], pairs=[])
        data.rows[prompt] = []
    data.add(prompt, responses, pairs, best_response(responses, scores))


def best_response(responses: list[str], scores: list[float]) -> str:
    """Return the response with the highest score; of equal texts the first one's score counts, as in the original."""
    return max(responses, key=lambda response: scores[responses.index(response)])


def strip_html(html: str) -> str:
    """Keep the top-level paragraphs (their own text) and code blocks of an HTML text, joined by blank lines."""
    from bs4 import BeautifulSoup, NavigableString  # only se needs it

    parts = []
    for element in BeautifulSoup(html, "html.parser").find_all(["p", "pre", "code"], recursive=False):
        if element.name == "p":
            parts.append("".join(child for child in element.children if type(child) is NavigableString))
        else:
            blocks = [element] if element.name == "code" else element.find_all("code")
            parts.extend(f"<code>{block.get_text()}</code>" for block in blocks)
    return "\n\n".join(parts)


def get_demo(split: str, silent: bool = False, cache_dir: str | None = None) -> PreferenceData:
    """Make the short film reviews of `make demo`, which need no download."""
    from demo import make_rows  # only the demo needs it

    data = PreferenceData("keep_end", drop_unusable=True)
    for row in make_rows(split):
        data.counts["read"] += 1
        data.add(row["prompt"], [row["chosen"], row["rejected"]], [(0, 1)], row["sft_target"])
    return data


DATASETS: dict[str, Callable[..., PreferenceData]] = {"hh": get_hh, "shp": get_shp, "se": get_se, "demo": get_demo}


def get_dataset(name: str, split: str, silent: bool = False, cache_dir: str | None = None) -> PreferenceData:
    """Load a data set by its name in DATASETS or by the path of a folder; UserError if it is neither or unreadable."""
    if name in DATASETS:
        return DATASETS[name](split, silent=silent, cache_dir=cache_dir)
    if not Path(name).is_dir():
        known = ", ".join(DATASETS)
        raise UserError(f"datasets=[{name}]: neither a known data set ({known}) nor a folder with train.jsonl")
    return get_folder(Path(name), split, silent)


# Data sets of one's own: a folder with train.jsonl and perhaps test.jsonl

HELD_OUT = 0.1  # the share of the prompts that are the test split where there is no test file


def get_folder(folder: Path, split: str, silent: bool = False) -> PreferenceData:
    """Load one split of a folder; without a test file, a seeded tenth of the training prompts is held out as one."""
    data = PreferenceData("keep_end", drop_unusable=True)
    hold_out = find_jsonl(folder, "test") is None
    path = find_jsonl(folder, "train" if hold_out else split)
    if path is None:
        raise UserError(f"datasets=[{folder}]: there is no {split}.jsonl or {split}.jsonl.gz")
    for _, row in progress(read_jsonl(path), path.name, silent=silent):
        with reading_row(data, str(path)):
            add_row(data, row)
    return keep_held_out(data, split) if hold_out else data


def find_jsonl(folder: Path, split: str) -> Path | None:
    """Find SPLIT.jsonl or SPLIT.jsonl.gz; UserError if both are there."""
    there = [path for path in (folder / f"{split}.jsonl", folder / f"{split}.jsonl.gz") if path.is_file()]
    if len(there) > 1:
        raise UserError(f"datasets=[{folder}]: holds both {there[0].name} and {there[1].name}; remove one")
    return there[0] if there else None


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (row number from 1, value) for each line; UserError that names the row where one cannot be read."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                yield number, json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, row {number}: is not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:  # ValueError: JSONDecodeError, or a number of over 4,300 digits
        raise UserError(f"{path}, row {number}: is not JSON ({error})") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}, after row {number}: cannot be read ({error})") from None


def add_row(data: PreferenceData, row: Any) -> None:
    """Add {"prompt", "chosen", "rejected"} or a pair of hh-style dialogues; UserError if the row has another form."""
    if not isinstance(row, dict):
        raise UserError(f"is no object with the fields chosen and rejected but {type(row).__name__}")
    chosen, rejected = text_in(row, "chosen"), text_in(row, "rejected")
    if "prompt" in row:
        data.add_pair(text_in(row, "prompt"), chosen, rejected)
    else:
        add_dialogues(data, chosen, rejected)


def keep_held_out(data: PreferenceData, split: str) -> PreferenceData:
    """Keep the training or the test share of the prompts of a folder without a test file."""
    prompts = list(data)
    test = set(random.Random(0).sample(prompts, int(len(prompts) * HELD_OUT)))
    pairs_before = sum(len(entry["pairs"]) for entry in data.values())
    for prompt in prompts:
        if (prompt in test) != (split == "test"):
            del data[prompt], data.rows[prompt]
    pairs = sum(len(entry["pairs"]) for entry in data.values())
    data.counts[f"left to the other split: no test file, so {len(test)} prompts are held out"] = pairs_before - pairs
    data.counts["kept"] = pairs
    return data


# Tokens


class Item(NamedTuple):
    """A prompt with one response (SFT) or two (chosen, rejected), as text; row is its number in the data set."""

    prompt: str
    responses: tuple[str, ...]
    truncation: str
    row: int
    source: str


@dataclass(frozen=True)
class Example:
    """An item as token ids: the prompt's, and each response's with eos; cut tells what truncation did to it."""

    item: Item
    prompt: list[int]
    responses: tuple[list[int], ...]
    cut: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(response) for response in self.responses)


@dataclass(frozen=True)
class Tokenization:
    """The tokenizer's rules: how texts become ids, and where they are cut. Lengths are in tokens."""

    tokenizer: Any
    max_length: int
    max_prompt_length: int
    add_bos: bool = False

    def __call__(self, items: Sequence[Item]) -> list[Example]:
        """Tokenize a list of items in one call: prompt and responses apart, eos after each response."""
        texts = [text for item in items for text in (item.prompt, *item.responses)]
        ids = iter(self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        examples = []
        for item in items:
            prompt = next(ids)
            if not prompt and not self.add_bos:  # nothing would predict the first response token
                raise UserError(f"{item.source}, row {item.row}: the tokenizer turns the prompt into no token at all")
            responses = tuple(next(ids) + [self.tokenizer.eos_token_id] for _ in item.responses)
            examples.append(self.truncate(item, prompt, responses))
        return examples

    def truncate(self, item: Item, prompt: list[int], responses: tuple[list[int], ...]) -> Example:
        """Cut an example that is longer than max_length: first its prompt, then, if need be, all its responses."""
        bos = [self.tokenizer.bos_token_id] if self.add_bos else []
        whole, distinct = (bos + prompt, responses), len(set(map(tuple, responses)))
        longest = max(len(response) for response in responses)
        room = self.max_prompt_length - len(bos)
        if len(whole[0]) + longest > self.max_length and len(prompt) > room:
            prompt = prompt[:room] if item.truncation == "keep_start" else prompt[len(prompt) - room :]
        if len(bos + prompt) + longest > self.max_length:
            responses = tuple(response[: self.max_length - self.max_prompt_length] for response in responses)
        cut = {
            "prompt": len(bos + prompt) < len(whole[0]),
            "response": responses != whole[1],
            "sides made equal": len(set(map(tuple, responses))) < distinct,
        }
        return Example(item, bos + prompt, responses, tuple(what for what, there in cut.items() if there))


def tokenize_batch_element(
    prompt: str,
    chosen: str,
    rejected: str,
    truncation_mode: str,
    tokenizer: Any,
    max_length: int,
    max_prompt_length: int,
) -> dict[str, Any]:
    """Tokenize one pair into the original's fields: ids, attention masks and labels (-100 over the prompt)."""
    if truncation_mode not in ("keep_start", "keep_end"):
        raise ValueError(f"truncation_mode={truncation_mode}: must be keep_start or keep_end")
    item = Item(prompt, (chosen, rejected), truncation_mode, 0, "")
    example = Tokenization(tokenizer, max_length, max_prompt_length)([item])[0]
    fields = {"prompt": prompt, "chosen": prompt + chosen, "rejected": prompt + rejected}
    fields |= {"chosen_response_only": chosen, "rejected_response_only": rejected}
    for side, response in zip(("chosen", "rejected"), example.responses, strict=True):
        fields[f"{side}_input_ids"] = example.prompt + response
        fields[f"{side}_attention_mask"] = [1] * len(example.prompt + response)
        fields[f"{side}_labels"] = [-100] * len(example.prompt) + response
    fields["prompt_input_ids"], fields["prompt_attention_mask"] = example.prompt, [1] * len(example.prompt)
    return fields


# The iterator


def make_groups(data: PreferenceData, source: str, sft: bool, eos: str) -> list[list[Item]]:
    """Turn a data set into one list of items a prompt, the unit of the shuffle; count what holds an eos token."""
    groups = []
    for prompt, entry in data.items():
        pairs = [(entry["responses"][chosen], entry["responses"][rejected]) for chosen, rejected in entry["pairs"]]
        rows = data.rows[prompt]
        if sft:  # the target of a prompt came with its last row
            pairs, rows = [(entry["sft_target"],)], rows[-1:] or [0]
        items = [Item(prompt, texts, data.truncation, row, source) for texts, row in zip(pairs, rows, strict=True)]
        with_eos = [any(eos in text for text in (prompt, *item.responses)) for item in items]
        if any(with_eos):
            verb = "dropped:" if data.drop_unusable else "kept although"
            data.counts[f"{verb} the text holds {eos}"] += sum(with_eos)
            if data.drop_unusable:
                items = [item for item, found in zip(items, with_eos, strict=True) if not found]
                data.counts["kept"] -= 0 if sft else sum(with_eos)
        if items or not data.drop_unusable:  # a prompt without a pair takes part in the original's shuffle
            groups.append(items)
    return groups


@dataclass(frozen=True)
class Batch:
    """Tokenized examples, and the iterator's position after them."""

    examples: list[Example]
    position: dict[str, int]


START = {"epoch": 0, "batch": 0}


@dataclass
class BatchIterator:
    """Walks groups of items in the original's order, in batches; its position lets a run stop and go on anywhere.

    n_epochs and n_examples bound it, whichever ends first. What is left of an epoch after its last full batch is left
    out, unless keep_last, which also ends exactly at n_examples (for one epoch). The seeds of the epochs are drawn from
    NumPy's legacy generator, and each epoch shuffles the list of groups as the one before left it.
    """

    groups: list[list[Item]]
    tokenize: Tokenization
    batch_size: int
    seed: int = 0
    n_epochs: int | None = None
    n_examples: int | None = None
    keep_last: bool = False
    position: dict[str, int] = field(default_factory=START.copy)

    def fingerprint(self) -> str:
        """Return a SHA-256 of the items in their order and of the tokenizer's rules."""
        digest = hashlib.sha256(repr((self.settings()[:2], self.n_items)).encode())
        for group in self.groups:
            digest.update(repr([item[:3] for item in group]).encode("utf-8", "backslashreplace"))
        return digest.hexdigest()

    def settings(self) -> tuple[Any, ...]:
        """Return what, beside the items, decides which tokens lie in which batch."""
        rules = self.tokenize
        backend = getattr(rules.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend is not None else sorted(rules.tokenizer.get_vocab().items())
        lengths = (rules.max_length, rules.max_prompt_length, rules.add_bos)
        return (vocabulary, lengths, self.batch_size, self.seed, self.n_epochs, self.n_examples)

    @property
    def n_items(self) -> int:
        """Items an epoch."""
        return sum(len(group) for group in self.groups)

    @property
    def batches_per_epoch(self) -> int:
        """Batches an epoch."""
        return -(-self.n_items // self.batch_size) if self.keep_last else self.n_items // self.batch_size

    def __len__(self) -> int:
        """Batches from the very start to the end."""
        limits = []
        if self.n_epochs is not None:
            limits.append(self.n_epochs * self.batches_per_epoch)
        if self.n_examples is not None:
            limits.append(-(-self.n_examples // self.batch_size) if self.batches_per_epoch else 0)
        return min(limits)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches from the position on."""
        per_epoch = self.batches_per_epoch
        done = self.position["epoch"] * per_epoch + self.position["batch"]
        order, shuffled = list(self.groups), 0
        while done < len(self):
            epoch, start = divmod(done, per_epoch)
            while shuffled <= epoch:  # later shuffles act on the order that the earlier ones left
                random.Random(self.epoch_seed(shuffled)).shuffle(order)
                shuffled += 1
            items = [item for group in order for item in group]
            for index in range(start, min(per_epoch, len(self) - epoch * per_epoch)):
                done += 1
                self.position = dict(zip(("epoch", "batch"), divmod(done, per_epoch), strict=True))
                chosen = items[index * self.batch_size : (index + 1) * self.batch_size]
                if self.keep_last and self.n_examples is not None:
                    chosen = chosen[: self.n_examples - (done - 1) * self.batch_size]
                yield Batch(self.tokenize(chosen), self.position)

    def epoch_seed(self, epoch: int) -> int:
        """Return the seed of an epoch's shuffle."""
        return int(np.random.RandomState(self.seed).randint(0, 2**32, size=epoch + 1, dtype=np.int64)[epoch])
