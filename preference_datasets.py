"""Preference data sets: where pairs of responses come from, and what is kept of them.

A data set is a map from a prompt to its responses, its pairs (chosen index, rejected index) and one sft_target.
To add one: write a function like get_shp that returns such a map, as PreferenceData or as a plain dict, and name it in
DATASETS.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import combinations
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from dpo.console import log_message, progress
from dpo.errors import UserError, summarize_error
from dpo.examples import TextExample, Tokenization, Truncation
from dpo.jsonl import SUFFIXES, find_jsonl, note_ignored_columns, note_ignored_files, read_jsonl
from dpo.preferences import Entry, PreferenceData, as_preference_data, make_groups, reading_row, score_in, text_in

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "\n\nAssistant:"


# The data sets


def load_hub_split(path: str, split: str, cache_dir: str | None) -> "Dataset":
    """Load one split of a hub data set; UserError in one line if it cannot be fetched."""
    import datasets  # slow to import, and not needed for local files

    try:
        return datasets.load_dataset(path, split=split, cache_dir=cache_dir)
    except Exception as error:  # the hub client raises many kinds: no network, no such data set, no disk
        reason = summarize_error(error)
        advice = "pass a local folder, datasets=[PATH] with train.jsonl, or try `make demo`"
        raise UserError(f"data set {path}: cannot be fetched ({reason}); {advice}") from None


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
    if kept and rejected[:start] != chosen[:start]:
        data.remark(chosen[:start], "kept although the rejected dialogue's prompt differs")


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
        with reading_row(data, f"se {split}"):
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
    from demo import make_rows  # only the demo needs it

    data = PreferenceData("keep_end", drop_unusable=True)
    for row in make_rows(split):
        data.counts["read"] += 1
        data.add(row["prompt"], [row["chosen"], row["rejected"]], [(0, 1)], row["sft_target"])
    return data


DATASETS: dict[str, Callable[..., Mapping[str, Entry]]] = {"hh": get_hh, "shp": get_shp, "se": get_se, "demo": get_demo}


def get_dataset(name: str, split: str, silent: bool = False, cache_dir: str | None = None) -> PreferenceData:
    """Load a data set by its name in DATASETS or by the path of a folder or file; UserError if it cannot be read."""
    if name in DATASETS:
        return as_preference_data(DATASETS[name](split, silent=silent, cache_dir=cache_dir), name)
    path = Path(name)
    if path.is_dir():
        return get_folder(path, split, silent)
    if path.is_file() and path.name.endswith(SUFFIXES):
        return get_file(path, split, silent, hold_out=True)
    known = ", ".join(DATASETS)
    form = "a folder with train.jsonl, or a file of JSON lines (.jsonl, .jsonl.gz)"
    raise UserError(f"datasets=[{name}]: neither a known data set ({known}) nor {form}")


def distinct_datasets(names: Iterable[str]) -> list[str]:
    """Return the names without those that are another spelling of an earlier one: d/mix/, ./d/mix, a link to it."""
    distinct: dict[str, str] = {}
    for name in names:
        distinct.setdefault(name if name in DATASETS else realpath(name), name)
    return list(distinct.values())


# Data sets of one's own: a folder with train.jsonl and perhaps test.jsonl, or a single file

HELD_OUT = 0.1  # the share of the prompts that are the test split where there is no test file
COLUMNS = ("prompt", "chosen", "rejected")
SCORES = ("score_chosen", "score_rejected")  # columns that loss=odpo reads


def get_folder(folder: Path, split: str, silent: bool = False) -> PreferenceData:
    """Load one split of a folder; without a test file, a seeded tenth of the training prompts is held out as one."""
    files = [find_jsonl(folder, name) for name in ("train", "test")]
    hold_out = files[1] is None
    path = find_jsonl(folder, "train" if hold_out else split)
    if path is None:
        raise UserError(f"datasets=[{folder}]: there is no {split}.jsonl or {split}.jsonl.gz")
    data = get_file(path, split, silent, hold_out)
    if split == "train":
        data.notes += note_ignored_files(folder, [file.name for file in files if file])
    return data


def get_file(path: Path, split: str, silent: bool, hold_out: bool) -> PreferenceData:
    """Load a file of JSON lines as one split, or, with hold_out, the split's share of its prompts."""
    data = PreferenceData("keep_end", drop_unusable=True)
    columns: Counter[str] = Counter()
    for line, row in progress(read_jsonl(path), path.name, silent=silent):
        with reading_row(data, str(path), line):
            add_row(data, row)
            columns.update(row.keys())
    if hold_out:
        keep_held_out(data, split)
    if split == "train" or not hold_out:  # a file that holds both splits is read twice and reported once
        read = (*COLUMNS, *(name for name in SCORES if name in columns))
        data.notes += note_ignored_columns(path, columns, read)
    return data


def add_row(data: PreferenceData, row: object) -> None:
    """Add {"prompt", "chosen", "rejected"} or a pair of hh-style dialogues; UserError if the row has another form."""
    if not isinstance(row, dict):
        raise UserError(f"is not an object with the fields chosen and rejected but {type(row).__name__}")
    chosen, rejected = text_in(row, "chosen"), text_in(row, "rejected")
    if "prompt" in row:
        prompt = text_in(row, "prompt")
        if any(name in row for name in SCORES):
            data.scores[prompt, chosen, rejected] = (score_in(row, SCORES[0]), score_in(row, SCORES[1]))
        data.add_pair(prompt, chosen, rejected, every_target=True)
    else:
        add_dialogues(data, chosen, rejected)


def keep_held_out(data: PreferenceData, split: str) -> None:
    """Keep the training or the test share of the prompts of a file that holds both splits."""
    prompts = list(data)
    test = set(random.Random(0).sample(prompts, int(len(prompts) * HELD_OUT)))
    reason = f"left out: no test file, so {len(test):,} of {len(prompts):,} prompts are held out as the test split"
    for prompt in prompts:
        if (prompt in test) != (split == "test"):
            data.remove(prompt, reason)


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


def load_groups(names: Iterable[str], split: str, sft: bool, tokenize: Tokenization) -> list[list[TextExample]]:
    """Load one split of some data sets, concatenated, and log what was read, kept and dropped of each."""
    groups = []
    for name in distinct_datasets(names):
        data = get_dataset(name, split)
        groups += make_groups(data, name, sft, tokenize.tokenizer.eos_token, tokenize.empty_prompts(data))
        counts = [f"{n:,} {what}" for what, n in data.counts.items() if n and what not in ("read", "kept")]
        head = f"Data {name} {split}: {data.counts['read']:,} rows read, {data.counts['kept']:,} kept"
        log_message("; ".join([f"{head}, {data.n_left_out:,} not, {len(data):,} prompts", *counts]))
        for note in data.notes:
            log_message(note)
    return groups
