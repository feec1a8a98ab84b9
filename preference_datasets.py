"""Preference data sets: how they are loaded, and which of their rows are kept.

A data set is a map from a prompt to its responses, its pairs (chosen index, rejected index) and one sft_target.
To add one: write a function like get_shp that returns such a map, as PreferenceData or as a plain dict, and name it in
DATASETS. PreferenceData counts its rows automatically.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dpo.data.examples import TextExample, Tokenization, Truncation
from dpo.data.formatting import plain_text_warning
from dpo.data.loader import Loaded, Loader, NamedRows, RawData, TableRows
from dpo.data.messages import checked_text, naming_row
from dpo.data.mixture import Mixture, take_share
from dpo.data.preferences import Entry, PreferenceData, as_preference_data
from dpo.data.records import Encoder
from dpo.data.rows import ASSISTANT, DIFFERENT_PROMPTS, RowOptions, split_dialogues
from dpo.data.sources import SplitNames, open_source
from dpo.data.statistics import DROPPED
from dpo.settings.schema import Settings
from dpo.system.console import log_message, progress
from dpo.system.errors import UserError, summarize_error

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# The data sets


def load_hub_split(path: str, split: str, cache_dir: str | None) -> "Dataset":
    """Load one split of a hub data set; UserError in one line if it cannot be fetched."""
    import datasets  # slow to import, and not needed for local files

    try:
        return datasets.load_dataset(path, split=split, cache_dir=cache_dir)
    except Exception as error:  # the hub client raises many kinds: no network, no such data set, no disk
        reason = summarize_error(error)
        advice = "give a local folder with train.jsonl, datasets=[PATH], or try datasets=[demo]"
        raise UserError(f"data set {path}: cannot be fetched ({reason}); {advice}") from None


def add_rows(
    data: PreferenceData, rows: "Dataset", name: str, silent: bool, add: Callable[[PreferenceData, Any], None]
) -> PreferenceData:
    """Add all rows of a split to data; UserError that names the row if one has another form."""
    for number, row in enumerate(progress(rows, name, silent=silent), start=1):
        with naming_row(name, number):
            add(data, row)
    return data


def get_hh(split: str, silent: bool = False, cache_dir: str | None = None) -> PreferenceData:
    """Load Anthropic's helpful-and-harmless dialogues, split train or test."""
    rows = load_hub_split("Anthropic/hh-rlhf", split, cache_dir)
    return add_rows(PreferenceData("keep_end"), rows, f"hh {split}", silent, add_dialogues)


def add_dialogues(data: PreferenceData, row: Mapping[str, Any]) -> None:
    """Add a pair of hh-style dialogues, which share all up to the last answer of the assistant."""
    dialogues = [checked_text(row[side], side) for side in ("chosen", "rejected")]
    prompt, (chosen, rejected), prompts_differ = split_dialogues(dialogues)
    data.add_pair(prompt, chosen, rejected)
    data.counts.warn(DIFFERENT_PROMPTS, prompts_differ)


def get_shp(split: str, silent: bool = False, cache_dir: str | None = None) -> PreferenceData:
    """Load the Stanford Human Preferences; a row is kept if one score is at least twice the other."""
    rows = load_hub_split("stanfordnlp/SHP", split, cache_dir)
    scores: dict[str, list[float]] = {}
    data = PreferenceData("keep_start")
    add_rows(data, rows, f"shp {split}", silent, lambda data, row: add_shp_row(data, scores, row))
    for prompt, entry in data.items():
        entry["sft_target"] = best_response(entry["responses"], scores[prompt])
    return data


def add_shp_row(data: PreferenceData, scores: dict[str, list[float]], row: Mapping[str, Any]) -> None:
    """Add one row of SHP, and its scores under its prompt."""
    low, high = sorted((row["score_A"], row["score_B"]))
    if high < 2 * low or high == 0:
        data.counts.drop("neither score is twice the other")
        return
    if low == 0:
        data.counts.warn("a score is 0")
    prompt = f"\n\nHuman: {checked_text(row['history'], 'history')}{ASSISTANT}"
    responses = [f" {checked_text(row[name], name)}" for name in ("human_ref_A", "human_ref_B")]
    chosen, rejected = (0, 1) if row["labels"] == 1 else (1, 0)
    data.counts.warn("the prompt is empty", not row["history"].strip())
    data.add(prompt, responses, [(chosen, rejected)], responses[0])
    scores.setdefault(prompt, []).extend((row["score_A"], row["score_B"]))


def get_se(split: str, silent: bool = False, cache_dir: str | None = None) -> PreferenceData:
    """Load the StackExchange preferences: 1% of the questions, drawn with seed 42, are the test split."""
    rows = load_hub_split("HuggingFaceH4/stack-exchange-preferences", "train", cache_dir).shuffle(seed=42)
    n_test = int(len(rows) * 0.01)
    rows = rows.select(range(n_test) if split == "test" else range(n_test, len(rows)))
    return add_rows(PreferenceData("keep_start"), rows, f"se {split}", silent, add_se_row)


def add_se_row(data: PreferenceData, row: Mapping[str, Any]) -> None:
    """Add one question of StackExchange with all pairs of its answers."""
    question = strip_html(checked_text(row["question"], "question"))
    prompt = f"\n\nHuman: {question}{ASSISTANT}"
    responses = [f" {strip_html(checked_text(answer['text'], 'text'))}" for answer in row["answers"]]
    scores = [answer["pm_score"] for answer in row["answers"]]
    pairs = [(i, j) if scores[i] > scores[j] else (j, i) for i, j in combinations(range(len(scores)), 2)]
    if not pairs:
        data.counts.warn("it has one answer and so no pair")
    data.counts.warn("the prompt is empty", not question.strip())
    if prompt in data:  # as in the original, the later answers replace the earlier ones
        data.drop_prompt(prompt, "a later row has the same question")
    data.add(prompt, responses, pairs, best_response(responses, scores))


def best_response(responses: list[str], scores: list[float]) -> str:
    """The response with the highest score; equal texts have the first one's score, as in the original."""
    return max(responses, key=lambda response: scores[responses.index(response)])


def strip_html(html: str) -> str:
    """Keep the top-level paragraphs (their own text) and code blocks of an HTML text, joined by blank lines."""
    from bs4 import BeautifulSoup  # only se needs it
    from bs4.element import NavigableString

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
    from dpo.data.film_reviews import make_rows  # only the demo needs it

    data = PreferenceData("keep_end", drop_unusable=True)
    for row in make_rows(split):
        data.add(row["prompt"], [row["chosen"], row["rejected"]], [(0, 1)], row["sft_target"])
    return data


DATASETS: dict[str, Callable[..., Mapping[str, Entry]]] = {"hh": get_hh, "shp": get_shp, "se": get_se, "demo": get_demo}


def get_dataset(name: str, split: str, silent: bool = False, cache_dir: str | None = None) -> PreferenceData:
    """Load a data set by its name in DATASETS; UserError if there is none, or if it cannot be read."""
    if name not in DATASETS:
        raise UserError(f"datasets=[{name}]: not a known data set ({', '.join(DATASETS)})")
    return as_preference_data(DATASETS[name](split, silent=silent, cache_dir=cache_dir), name)


def distinct_datasets(names: Iterable[str]) -> list[str]:
    """The names without those that are another spelling of an earlier one: d/mix/, ./d/mix, a link to it."""
    distinct: dict[str, str] = {}
    for name in names:
        distinct.setdefault(name if name in DATASETS else realpath(name), name)
    return list(distinct.values())


# Tokens


def tokenize_batch_element(
    prompt: str,
    chosen: str,
    rejected: str,
    truncation_mode: Truncation,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    max_prompt_length: int,
) -> dict[str, str | list[int]]:
    """Tokenize one pair into the original's fields: ids, attention masks and labels (-100 over the prompt)."""
    if truncation_mode not in get_args(Truncation):
        raise ValueError(f"truncation_mode={truncation_mode}: must be keep_start or keep_end")
    text = TextExample(prompt, (chosen, rejected), truncation_mode, 0, "")
    example = Tokenization(tokenizer, max_length, max_prompt_length)([text])[0]
    fields: dict[str, str | list[int]] = {"prompt": prompt, "chosen": prompt + chosen, "rejected": prompt + rejected}
    fields |= {"chosen_response_only": chosen, "rejected_response_only": rejected}
    for side, response in zip(("chosen", "rejected"), example.responses, strict=True):
        fields[f"{side}_input_ids"] = example.prompt + response
        fields[f"{side}_attention_mask"] = [1] * len(example.prompt + response)
        fields[f"{side}_labels"] = [-100] * len(example.prompt) + response
    fields["prompt_input_ids"], fields["prompt_attention_mask"] = example.prompt, [1] * len(example.prompt)
    return fields


# From settings to examples


@dataclass(frozen=True)
class LoadedData:
    """The examples of both splits of all data sets.

    is_chat: whether there are conversations. lost says of each split that has no example why.
    """

    train: Mixture
    test: Mixture
    is_chat: bool
    lost: Mapping[str, str]
    warnings: list[str]

    def score_problems(self) -> list[str]:
        """A line on the first example without scores; only files and hub data sets can have scores."""
        for mixture in (self.train, self.test):
            for index, scores in enumerate(mixture.scores()):
                if not scores:
                    return [f"datasets: {mixture[index].text.where} has no scores, which this loss needs"]
        return []


def load_data(settings: Settings, encoder: Encoder, cache: Path | None, labels: bool = False) -> LoadedData:
    """Load both splits of all data sets from their tables in a cache folder, and log the statistics of their rows.

    labels: also accept rows of one response with a label; UserError if they are mixed with pairs.
    """
    names = distinct_datasets(settings.datasets)
    loader = Loader(encoder, cache)
    splits: list[Loaded] = []
    for name in names:
        splits += load_named(name, settings, loader) if name in DATASETS else load_files(name, settings, loader, labels)
    check_kinds(splits)
    train, test = splits[::2], splits[1::2]
    shares = settings.shares or [1.0] * len(names)
    if len(shares) != len(names):
        raise UserError(f"shares={shares}: must have one number for each of the {len(names)} data sets")
    parts = []
    for loaded, name, share in zip(train, names, shares, strict=True):
        part = loaded.split
        if share != 1:
            n_prompts = len(part.sizes)
            part = take_share(part, share, settings.seed)
            if n_prompts and not len(part):
                raise UserError(f"shares: {share:g} of the {n_prompts:,} prompts of {name} is none; raise it")
            n = f"{len(part):,} of {len(loaded.split):,} examples"
            log_message(f"Data {name}: an epoch takes {n} (its share is {share:g})")
        parts.append(part)
    mixture = Mixture(parts).numbered_from(0)
    test_mixture = Mixture([each.split for each in test]).numbered_from(len(mixture))
    lost = {} if len(mixture) else {"train": why_lost(train)}
    lost |= {} if len(test_mixture) else {"test": why_lost(test)}
    plain_texts = [split.plain_text for split in splits if split.plain_text is not None]
    warnings = [plain_text_warning(where) for where in plain_texts[:1]]
    return LoadedData(mixture, test_mixture, any(each.is_chat for each in splits), lost, warnings)


def load_named(name: str, settings: Settings, loader: Loader) -> list[Loaded]:
    """Load both splits of a data set in DATASETS; UserError if settings are given that its function does not read."""
    unread = [f"columns.{role}" for role, column in settings.columns.model_dump().items() if column is not None]
    unread += [key for key in ("split_train", "split_test") if getattr(settings, key) is not None]
    if settings.prompt_format == "chat":
        unread.append("prompt_format=chat")
    if settings.train_on != "response":
        unread.append(f"train_on={settings.train_on}")
    if settings.pairs != "best_worst":
        unread.append(f"pairs={settings.pairs}")
    if unread:
        raise UserError(f"{', '.join(unread)}: datasets=[{name}] reads its own columns, splits and texts; leave it out")
    loaded = []
    for split in ("train", "test"):
        data = get_dataset(name, split)
        encoder = replace(loader.encoder, truncation=data.truncation, keeps_unusable=not data.drop_unusable)
        rows = NamedRows(name, list(data.numbered_rows(encoder.sft)))
        loaded += replace(loader, encoder=encoder)(RawData(name, [rows], [split], data.counts))
    return loaded


def load_files(name: str, settings: Settings, loader: Loader, labels: bool) -> list[Loaded]:
    """Load both splits of a folder, file or hub data set; without a test split, some prompts are held out."""
    sft = loader.encoder.sft
    source = open_source(name, SplitNames(settings.split_train, settings.split_test, sft), DATASETS)
    is_chat = settings.prompt_format == "chat"
    options = RowOptions(sft, labels, is_chat, settings.train_on, settings.pairs)
    columns = settings.columns.model_dump()
    train = [TableRows(table, columns, options) for table in source.train]
    loaded = loader(RawData(name, train, ["train"] if source.test is not None else ["train", "test"]))
    for note in source.notes:
        log_message(note)
    if source.test is not None:
        test = [TableRows(table, columns, options) for table in source.test]
        loaded += loader(RawData(name, test, ["test"]))
    return loaded


def check_kinds(splits: Sequence[Loaded]) -> None:
    """Raise UserError if some data are pairs and others are single responses with a label."""
    labelled = [split.name for split in splits if split.n_labelled]
    paired = [split.name for split in splits if split.counts["kept"] > split.n_labelled]
    if paired and labelled:
        kinds = f"{labelled[0]} has rows with a label, {paired[0]} has pairs of responses"
        raise UserError(f"datasets: {kinds}; a run trains on one kind, so leave the other out")


def why_lost(splits: Sequence[Loaded]) -> str:
    """The most frequent reason for which rows were dropped, with an example."""
    counts = Counter[str]()
    details: dict[str, str] = {}
    for split in splits:
        counts += Counter({what: n for what, n in split.counts.items() if what.startswith(DROPPED)})
        details |= split.details
    if not counts:
        return "it has no row"
    what, n = counts.most_common(1)[0]
    reason = what.removeprefix(DROPPED)
    example = f" ({details[reason].removesuffix(f': {reason}')})" if reason in details else ""
    return f"{n:,} of {sum(split.counts.read for split in splits):,} rows are dropped because {reason}{example}"
