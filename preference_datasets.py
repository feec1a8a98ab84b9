"""Preference data sets: where pairs of responses come from, and what is kept of them.

A data set is a map from a prompt to its responses, its pairs (chosen index, rejected index) and one sft_target.
To add one: write a function like get_shp that returns such a map, as PreferenceData or as a plain dict, and name it in
DATASETS.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from os.path import realpath
from typing import TYPE_CHECKING, Any, get_args

from dpo.data.chat import Rendering
from dpo.data.examples import TextExample, Tokenization, Truncation
from dpo.data.preferences import (
    Entry,
    PreferenceData,
    as_preference_data,
    make_groups,
    n_left_out,
    reading_row,
    text_in,
)
from dpo.data.row_index import Reading, TableData, choose_rows, index_rows, joined
from dpo.data.rows import ASSISTANT, DIFFERS
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
        advice = "pass a local folder, datasets=[PATH] with train.jsonl, or try datasets=[demo]"
        raise UserError(f"data set {path}: cannot be fetched ({reason}); {advice}") from None


def get_hh(split: str, silent: bool = False, cache_dir: str | None = None) -> PreferenceData:
    """Load Anthropic's helpful-and-harmless dialogues, split train or test."""
    rows = load_hub_split("Anthropic/hh-rlhf", split, cache_dir)
    data = PreferenceData("keep_end")
    for row in progress(rows, f"hh {split}", silent=silent):
        with reading_row(data.counts, f"hh {split}"):
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
    if kept and rejected[:start] != chosen[:start]:
        data.counts[DIFFERS] += 1


def get_shp(split: str, silent: bool = False, cache_dir: str | None = None) -> PreferenceData:
    """Load the Stanford Human Preferences; a row counts if one score is at least twice the other."""
    rows = load_hub_split("stanfordnlp/SHP", split, cache_dir)
    data = PreferenceData("keep_start")
    scores: dict[str, list[float]] = {}
    for row in progress(rows, f"shp {split}", silent=silent):
        with reading_row(data.counts, f"shp {split}"):
            add_shp_row(data, scores, row)
    for prompt, entry in data.items():
        entry["sft_target"] = best_response(entry["responses"], scores[prompt])
    return data


def add_shp_row(data: PreferenceData, scores: dict[str, list[float]], row: Mapping[str, Any]) -> None:
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
        with reading_row(data.counts, f"se {split}"):
            add_se_row(data, row)
    return data


def add_se_row(data: PreferenceData, row: Mapping[str, Any]) -> None:
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
        data.leave_out("left out: a later row has the same question", len(data.kept_rows[prompt]))
        data[prompt]["responses"], data[prompt]["pairs"] = [], []
        data.rows[prompt], data.kept_rows[prompt] = [], []
    data.add(prompt, responses, pairs, best_response(responses, scores))


def best_response(responses: list[str], scores: list[float]) -> str:
    """Return the response with the highest score; of equal texts the first one's score counts, as in the original."""
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
        data.counts["read"] += 1
        data.add(row["prompt"], [row["chosen"], row["rejected"]], [(0, 1)], row["sft_target"])
    return data


DATASETS: dict[str, Callable[..., Mapping[str, Entry]]] = {"hh": get_hh, "shp": get_shp, "se": get_se, "demo": get_demo}


def get_dataset(name: str, split: str, silent: bool = False, cache_dir: str | None = None) -> PreferenceData:
    """Load a data set by its name in DATASETS; UserError if there is none, or if it cannot be read."""
    if name not in DATASETS:
        raise UserError(f"datasets=[{name}]: not a known data set ({', '.join(DATASETS)})")
    return as_preference_data(DATASETS[name](split, silent=silent, cache_dir=cache_dir), name)


def distinct_datasets(names: Iterable[str]) -> list[str]:
    """Return the names without those that are another spelling of an earlier one: d/mix/, ./d/mix, a link to it."""
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
    settings: Settings, sft: bool, tokenize: Tokenization, rendering: Rendering, labels: bool = False
) -> tuple[Groups, Groups]:
    """Load the training and the test split of all data sets, each concatenated, and log the account of their rows.

    labels: rows of one response with a label are taken too; UserError where these and pairs come together.
    """
    parts: dict[str, list[Groups]] = {"train": [], "test": []}
    paired, labelled = [], []
    for name in distinct_datasets(settings.datasets):
        if name in DATASETS:
            check_named(name, settings)
            paired.append(name)
            loaded = {split: load_named(name, split, sft, tokenize) for split in parts}
        else:
            reading = Reading(
                name,
                columns=settings.columns.model_dump(),
                sft=sft,
                render=rendering,
                tokenize=tokenize,
                drop_inconsistent=settings.on_inconsistent == "drop",
                labels=labels,
            )
            splits = SplitNames(settings.split_train, settings.split_test, sft)
            tables = load_tables(open_source(name, splits, DATASETS), reading)
            paired += [name for table in tables.values() if table.counts["kept"] > table.n_labelled]
            labelled += [name for table in tables.values() if table.n_labelled]
            loaded = {split: tables[split] for split in parts}
        for split, groups in parts.items():
            groups.append(loaded[split])
    if note := rendering.note():
        log_message(note)
    if paired and labelled:
        kinds = f"{labelled[0]} has rows with a label, {paired[0]} has pairs of responses"
        raise UserError(f"datasets: {kinds}; one run trains on one kind, so leave the other out")
    return joined(parts["train"]), joined(parts["test"])


def check_named(name: str, settings: Settings) -> None:
    """Raise UserError if settings ask for what a data set of DATASETS, which reads itself, cannot do."""
    given = [f"columns.{use}" for use, column in settings.columns.model_dump().items() if column is not None]
    given += [f"split_{split}" for split in ("train", "test") if getattr(settings, f"split_{split}") is not None]
    given += ["prompt_format=chat"] if settings.prompt_format == "chat" else []
    if given:
        raise UserError(f"{', '.join(given)}: datasets=[{name}] reads its own columns, splits and texts; leave it out")


def load_named(name: str, split: str, sft: bool, tokenize: Tokenization) -> Groups:
    """Load one split of a data set of DATASETS, and log what was read, kept and dropped."""
    data = get_dataset(name, split)
    groups = make_groups(data, name, sft, tokenize.tokenizer.eos_token, tokenize.empty_prompts(data))
    log_account(name, split, data.counts, len(data), data.notes)
    return groups


def load_tables(source: Source, reading: Reading) -> dict[str, TableData]:
    """Read the rows of a data set's tables once, check and count them, and return the groups of both splits."""
    index = index_rows(source.train, reading)
    if source.test is None:
        train, test = (choose_rows(index, split) for split in ("train", "test"))
        notes: list[str] = []
    else:
        test_index = index_rows(source.test, reading)
        train, test, notes = choose_rows(index), choose_rows(test_index), test_index.notes
    log_account(reading.name, "train", train.counts, len(train), [*index.notes, *source.notes])
    log_account(reading.name, "test", test.counts, len(test), notes)
    return {"train": train, "test": test}


def log_account(name: str, split: str, counts: Mapping[str, int], n_prompts: int, notes: Iterable[str]) -> None:
    """Log how many rows of a data set were read, kept, and left out for each reason."""
    left_out = n_left_out(counts)
    reasons = [f"{n:,} {what}" for what, n in counts.items() if n and what not in ("read", "kept")]
    head = f"Data {name} {split}: {counts.get('read', 0):,} rows read, {counts.get('kept', 0):,} kept"
    log_message("; ".join([f"{head}, {left_out:,} not, {n_prompts:,} prompts", *reasons]))
    for note in notes:
        log_message(note)
