"""Preference data sets: how they are loaded, and which of their rows are kept.

A data set is a map from a prompt to its responses, its pairs (chosen index, rejected index) and one sft_target.
To add one: write a function like get_shp that returns such a map, as PreferenceData or as a plain dict, and name it in
DATASETS. PreferenceData counts its rows automatically.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from os.path import realpath
from typing import TYPE_CHECKING, Any, get_args

from dpo.data.chat import RowFormatter
from dpo.data.examples import TextExample, Tokenization, Truncation
from dpo.data.messages import checked_text
from dpo.data.preferences import Entry, PreferenceData, as_preference_data, make_groups, naming_row
from dpo.data.row_index import Reading, TableData, choose_rows, concatenate, index_rows
from dpo.data.rows import ASSISTANT, DIFFERENT_PROMPTS, split_dialogues
from dpo.data.sources import Source, SplitNames, open_source
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
    if data.add_pair(prompt, chosen, rejected) and prompts_differ:
        data.counts.warn(DIFFERENT_PROMPTS)


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
    data.accepts(row["history"], responses[chosen], responses[rejected])
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
    for chosen, rejected in pairs:
        data.accepts(question, responses[chosen], responses[rejected])
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


Groups = Sequence[Sequence[TextExample]]


def load_data(
    settings: Settings, sft: bool, tokenize: Tokenization, formatter: RowFormatter, labels: bool = False
) -> tuple[Groups, Groups]:
    """Load the training and the test split of all data sets, each concatenated, and log the statistics of their rows.

    labels: also accept rows of one response with a label; UserError if they are mixed with pairs.
    """
    train: list[Groups] = []
    test: list[Groups] = []
    paired, labelled = [], []
    for name in distinct_datasets(settings.datasets):
        if name in DATASETS:
            check_named(name, settings)
            paired.append(name)
            train.append(load_named(name, "train", sft, tokenize))
            test.append(load_named(name, "test", sft, tokenize))
            continue
        reading = Reading(
            name,
            columns=settings.columns.model_dump(),
            sft=sft,
            formatter=formatter,
            tokenize=tokenize,
            drop_inconsistent=settings.on_inconsistent == "drop",
            labels=labels,
        )
        source = open_source(name, SplitNames(settings.split_train, settings.split_test, sft), DATASETS)
        tables = load_tables(source, reading)
        paired += [name for table in tables.values() if table.counts["kept"] > table.n_labelled]
        labelled += [name for table in tables.values() if table.n_labelled]
        train.append(tables["train"])
        test.append(tables["test"])
    if warning := formatter.warning():
        log_message(warning)
    if paired and labelled:
        kinds = f"{labelled[0]} has rows with a label, {paired[0]} has pairs of responses"
        raise UserError(f"datasets: {kinds}; a run trains on one kind, so leave the other out")
    return concatenate(train), concatenate(test)


def check_named(name: str, settings: Settings) -> None:
    """Raise UserError if settings ask for what a data set of DATASETS, which reads itself, cannot do."""
    given = [f"columns.{role}" for role, column in settings.columns.model_dump().items() if column is not None]
    given += [key for key in ("split_train", "split_test") if getattr(settings, key) is not None]
    given += ["prompt_format=chat"] if settings.prompt_format == "chat" else []
    if given:
        raise UserError(f"{', '.join(given)}: datasets=[{name}] reads its own columns, splits and texts; leave it out")


def load_named(name: str, split: str, sft: bool, tokenize: Tokenization) -> Groups:
    """Load one split of a data set of DATASETS, and log what was read, kept and dropped."""
    data = get_dataset(name, split)
    groups = make_groups(data, name, sft, tokenize.tokenizer.eos_token, tokenize.empty_prompts(data))
    log_message(f"Data {name} {split}: {data.counts.summary(len(data))}")
    return groups


def load_tables(source: Source, reading: Reading) -> dict[str, TableData]:
    """Read, check and count the rows of a data set's tables once, and choose those of each split."""
    index = index_rows(source.train, reading)
    test_index = index if source.test is None else index_rows(source.test, reading)
    held_out = ("train", "test") if source.test is None else (None, None)
    data = {"train": choose_rows(index, held_out[0]), "test": choose_rows(test_index, held_out[1])}
    notes = {"train": [*index.notes, *source.notes], "test": [] if test_index is index else test_index.notes}
    for split, table in data.items():
        log_message(f"Data {reading.name} {split}: {table.counts.summary(len(table))}")
        for note in notes[split]:
            log_message(note)
    return data
