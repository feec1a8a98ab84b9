"""docs/data.md: each row of its tables, with a small input and what is made of it, as the command line does."""

import bz2
import gzip
import json
import lzma
import os
import re
import shlex
import shutil
from contextlib import suppress
from functools import cache

import datasets
import pyarrow
import pytest
from chat_families import CHATML, END, FAMILIES, QWEN3, R1
from conftest import ROOT, inputs_of, tiny_config, validated
from tokenizers.normalizers import Replace
from transformers import AutoTokenizer

import preference_datasets
from dpo.data.columns import COLUMNS, find_columns
from dpo.settings.schema import UNORDERED_PAIRS
from dpo.system.errors import UserError
from preference_datasets import PreferenceData
from tools.inspection import inspect_inputs

PAGE = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SECTIONS = {section.partition("\n")[0]: section for section in PAGE.split("\n## ")[1:]}
FORMS, COLUMN_ROWS = SECTIONS["Usual forms"], SECTIONS["Columns"]


def rows_of(text):
    """Return the rows of a page's tables by their first cells, without the heads."""
    tables = re.findall(r"^\|--.*\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [re.split(r" *\| *", line)[1:-1] for table in tables for line in table.splitlines()]
    assert len(rows) == len({first for first, *_ in rows}) > 0
    return {first: rest for first, *rest in rows}


HI, WHY = {"role": "user", "content": "Hi."}, {"role": "user", "content": "Why?"}
YES, NO, SO = ({"role": "assistant", "content": text} for text in ("Yes.", "No.", "So."))
ANSWERS = {"chosen": "Yes.", "rejected": "No."}
TEXTS = {"prompt": "Hi.", **ANSWERS}
CHAT = {"prompt": [HI], "chosen": [YES], "rejected": [NO]}
LABELLED = {"prompt": "Hi.", "completion": "Yes.", "label": True}
DIALOGUE = "\n\nHuman: Hi.\n\nAssistant:"
DIALOGUES = {"chosen": f"{DIALOGUE} Yes.", "rejected": f"{DIALOGUE} No."}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"at": 7}}}]}
FOUND = {"role": "tool", "content": "A clock."}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
TOOLS = [{"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {}}}]


def chatml(*turns):
    """Return a prompt of messages as ChatML writes it."""
    texts = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns]
    return "".join(texts) + "<|im_start|>assistant\n"


AS_TEXTS = ("Hi.", f"Yes.{END}", f"No.{END}")
AS_CHAT = (chatml(HI), "Yes.<|im_end|>", "No.<|im_end|>")


class Reader:
    """Reads data as the command line does; `out` is what was printed."""

    def __init__(self, folder, models, capsys, monkeypatch):
        self.folder, self.models, self.capsys, self.monkeypatch, self.out = folder, models, capsys, monkeypatch, ""

    def write(self, name, *content):
        """Write a file: JSON lines, a text or bytes."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = [json.dumps(part) + "\n" if isinstance(part, dict) else part for part in content]
        path.write_bytes(b"".join(part.encode() if isinstance(part, str) else part for part in parts))
        return str(path)

    def __call__(self, *settings, rows=(), template=CHATML, model=None):
        """Return each training example as its prompt and what of each response is trained on."""
        if rows:
            self.write("data/train.jsonl", *rows)
            self.write("data/test.jsonl", rows[0])
        own = {"loss": "dpo", "datasets": f"['{self.folder}/data']", "device": "cpu", "max_length": 160}
        own |= {"model.name_or_path": f"'{model or self.models(template)}'", "local_dirs": f"['{self.folder}/runs']"}
        own |= {"max_prompt_length": 96, "batch_size": 2 if "loss=kto" in settings else 1}
        own |= dict(setting.split("=", 1) for setting in settings)
        try:
            self.inputs = inputs_of(*(f"{key}={value}" for key, value in own.items()))
        finally:
            self.out = self.capsys.readouterr().out
        examples, decode = self.inputs.train_batches.examples, self.inputs.tokenizer.decode
        self.examples = [examples[index] for index in range(len(examples))]
        return [tuple(map(decode, (each.prompt, *each.trained_responses))) for each in self.examples]

    def refuses(self, *settings, rows, **options):
        """Return the error that rows are refused with."""
        with pytest.raises(UserError) as caught:
            self(*settings, rows=rows, **options)
        return str(caught.value)

    def drops(self, row, reason, *settings, **options):
        """Check that a row is dropped and counted, and a usual one is kept."""
        good = CHAT if any(isinstance(value, list) for value in row.values()) else TEXTS
        assert len(self(*settings, rows=[good, row], **options)) == 1
        assert f"1 dropped (1 because {reason})" in self.out

    def drops_inconsistent(self, row, reason, *settings, **options):
        """Check that a row stops the run, or is dropped where the user says so."""
        error = self.refuses(*settings, rows=[row], **options)
        assert reason in error and error.endswith("; on_inconsistent=drop skips such rows")
        counted = re.search(r"row 1: (.*?)( \(|;)", error)[1]
        self.drops(row, counted, "on_inconsistent=drop", *settings, **options)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function that writes the tokenizer and the config of a tiny model with a chat template, once."""

    @cache
    def write(template, vocab_size=512):
        family = next((each for each in FAMILIES.values() if each.template == template), FAMILIES["ChatML"])
        folder, tokenizer = tmp_path_factory.mktemp("model"), family.tokenizer()
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        tiny_config("gpt2", vocab_size).save_pretrained(folder)
        return folder

    return write


@pytest.fixture
def read(tmp_path, models, capsys, monkeypatch):
    return Reader(tmp_path, models, capsys, monkeypatch)


TESTS = {}


def row(first_cell):
    """Register the test of a row of the page."""

    def register(test):
        assert first_cell not in TESTS
        TESTS[first_cell] = test
        return test

    return register


# The usual forms: their rows, and what is made of them with the settings that the page says

CONVERSATIONS = {"chosen": [HI, YES, WHY, SO], "rejected": [HI, NO, WHY, NO]}
TWO_TURNS = "Yes.<|im_end|>So.<|im_end|>", "No.<|im_end|>No.<|im_end|>"
ULTRAFEEDBACK = {"prompt": "Hi.", "prompt_id": "f8", "chosen": [HI, YES], "rejected": [HI, NO], "messages": [HI, YES]}
ULTRAFEEDBACK |= {"score_chosen": 8.5, "score_rejected": 4.0}


def judged(text, score):
    """Make a response as openbmb/UltraFeedback has it."""
    more = {"annotations": {"helpfulness": {"Rating": "4", "Rationale": "Good."}}, "critique": "Good."}
    more |= {"custom_system_prompt": "Help.", "principle": "helpfulness", "fine-grained_score": score / 2}
    return {"model": "gpt-4", "response": text, "overall_score": score, **more}


def sharegpt(*texts):
    return [{"from": ("human", "gpt")[at % 2], "value": text} for at, text in enumerate(texts)]


FORM_ROWS = {
    "texts": ([TEXTS], [AS_TEXTS]),
    "texts as turns of a chat": ([TEXTS], [AS_CHAT]),
    "dialogues, as hh": ([DIALOGUES], [(DIALOGUE, f" Yes.{END}", f" No.{END}")]),
    "messages": ([{"prompt": [HI], **ANSWERS}, CHAT | {"chosen": YES}], [AS_CHAT] * 2),
    "whole conversations": ([CONVERSATIONS], [(chatml(HI), *TWO_TURNS)]),
    "pairs that differ in the last turn only": (
        [{"chosen": [HI, YES, WHY, SO], "rejected": [HI, YES, WHY, NO]}, CONVERSATIONS],
        [(chatml(HI, YES, WHY), "So.<|im_end|>", "No.<|im_end|>")],
    ),
    "SFT on conversations": ([{"messages": [HI, YES, WHY, SO]}], [(chatml(HI, YES, WHY), "So.<|im_end|>")]),
    "SFT on every turn": ([{"messages": [HI, YES, WHY, SO]}], [(chatml(HI), "Yes.<|im_end|>So.<|im_end|>")]),
    "SFT on completions": ([{"prompt": "Hi.", "completion": "Yes."}], [("Hi.", f"Yes.{END}")]),
    "single responses with a label": (
        [LABELLED, LABELLED | {"completion": "No.", "label": False}, {"messages": [HI, YES], "label": True}],
        [("Hi.", f"Yes.{END}"), ("Hi.", f"No.{END}"), (chatml(HI), "Yes.<|im_end|>")],
    ),
    "a preference": ([{"prompt": "Hi.", "response_a": "No.", "response_b": "Yes.", "winner": "b"}], [AS_TEXTS]),
    "two responses with scores": (
        [{"prompt": "Hi.", "one": "No.", "two": "Yes.", "score_1": 1, "score_2": 4}], [AS_TEXTS]),
    "several responses with scores": (
        [{"prompt": "Hi.", "responses": ["So.", "No.", "Yes."], "scores": [2, 1, 4]}], [AS_TEXTS]),
    "several responses with ranks": (
        [{"prompt": "Hi.", "responses": ["So.", "No.", "Yes."], "ranks": [2, 3, 1]}],
        [("Hi.", f"So.{END}", f"No.{END}"), ("Hi.", f"Yes.{END}", f"So.{END}"), AS_TEXTS],
    ),
    "UltraFeedback, [all responses](https://huggingface.co/datasets/openbmb/UltraFeedback)": (
        [{"source": "evol_instruct", "instruction": "Hi.", "models": ["a", "b", "c"],
          "completions": [judged("No.", 2.0), judged("Yes.", 8.5), judged("No.", 2.0)],
          "correct_answers": ["None"], "incorrect_answers": ["None"]}], [AS_CHAT] * 2),
    "OpenAI's preference format": (
        [{"input": {"messages": [HI], "tools": [], "parallel_tool_calls": True}, "preferred_output": [YES],
          "non_preferred_output": [NO]}], [AS_CHAT]),
    "PKU-SafeRLHF": (
        [{"prompt": "Hi.", "response_0": "No.", "response_1": "Yes.", "prompt_source": "a", "is_response_0_safe": True,
          "is_response_1_safe": False, "better_response_id": 1, "safer_response_id": 0}], [AS_CHAT]),
    "HelpSteer2, preferences": (
        [{"split": "train", "prompt": "Hi.", "response_1": "No.", "response_2": "Yes.", "preference_strength": 2,
          "preference_statement": "Response 2 is better.", "preference_elaboration": "Yes.",
          "three_most_similar_preferences": [{"strength": 2}], "all_preferences_unprocessed": []}], [AS_CHAT]),
    "HelpSteer3": (
        [{"domain": "general", "language": "english", "context": [HI], "response1": "Yes.", "response2": "No.",
          "overall_preference": -1, "individual_preference": [{"score": -1}]}], [AS_CHAT]),
    "Chatbot Arena": (
        [{"question_id": "f1", "model_a": "a", "model_b": "b", "winner": "model_b", "judge": "arena_user_1",
          "conversation_a": [HI, NO], "conversation_b": [HI, YES], "turn": 1, "language": "English"}], [AS_CHAT]),
    "Nectar": (
        [{"prompt": f"{DIALOGUE} ", "turns": 1, "num_responses": 3, "source": ["a"], "good_natured": True,
          "answers": [{"answer": text, "model": "a", "rank": rank} for text, rank in
                      (("Yes.", 1.0), ("So.", 2.0), ("No.", 3.0))]}],
        [(f"{DIALOGUE} ", f"Yes.{END}", f"No.{END}")]),
    "Orca": (
        [{"system": "Be brief.", "question": "Hi.", **ANSWERS}],
        [(chatml({"role": "system", "content": "Be brief."}, HI), *AS_CHAT[1:])]),
    "ShareGPT": (
        [{"id": "a", "conversations": sharegpt("Hi.", "No.", "Why?", "Yes.")}],
        [(chatml(HI, NO, WHY), "Yes.<|im_end|>")]),
    "LLaMA-Factory, ShareGPT's form": (
        [{"conversations": sharegpt("Hi."), "chosen": {"from": "gpt", "value": "Yes."},
          "rejected": {"from": "gpt", "value": "No."}}], [AS_CHAT]),
    "LLaMA-Factory, Alpaca's form": (
        [{"instruction": "Hi.", "input": "", **ANSWERS}, {"instruction": "Add.", "input": "1, 2", **ANSWERS}],
        [AS_TEXTS, ("Add.\n1, 2", *AS_TEXTS[1:])]),
    "LLaMA-Factory, KTO": (
        [{"messages": [HI, YES], "kto_tag": True}, {"messages": [HI, NO], "kto_tag": False}],
        [(chatml(HI), "Yes.<|im_end|>"), (chatml(HI), "No.<|im_end|>")]),
    "Alpaca": ([{"instruction": "Add.", "input": "1, 2", "output": "3"}], [("Add.\n1, 2", f"3{END}")]),
}  # fmt: skip


def settings_of(first_cell):
    return shlex.split(rows_of(FORMS)[first_cell][-1].strip("` "))


@pytest.mark.parametrize("first_cell", FORM_ROWS)
def test_a_usual_form_is_read_with_the_settings_beside_it(first_cell, read):
    rows, expected = FORM_ROWS[first_cell]
    settings = settings_of(first_cell)
    assert read(*settings, rows=rows) == expected
    for setting in settings:
        if not setting.startswith("loss="):
            with suppress(UserError):
                assert read(*(each for each in settings if each != setting), rows=rows) != expected  # it is needed


@row("ms-swift")
def ms_swift(read):
    messages = {"messages": [HI, NO, WHY, YES]}
    for rejected in ({"rejected_response": "No."}, {"rejected_messages": [HI, NO, WHY, NO]}):
        assert read(rows=[messages | rejected]) == [(chatml(HI, NO, WHY), *AS_CHAT[1:])]


@row("responses of several turns")
def several_turns(read):
    rows = [{"prompt": [HI], "tools": TOOLS, "chosen": [CALL, FOUND, YES], "rejected": [NO]}]
    ((prompt, chosen, rejected),) = read("max_length=250", "max_prompt_length=200", rows=rows, template=QWEN3)
    assert "Looks." in prompt and "Hi." in prompt and rejected == "<think>\n\n</think>\n\nNo.<|im_end|>"
    assert re.findall("look|A clock|Yes|<.im_end.>", chosen) == ["look", "<|im_end|>", "Yes", "<|im_end|>"]


IDS = dict(
    zip(("prompt", "chosen", "rejected"), FAMILIES["ChatML"].tokenizer()(list(AS_TEXTS))["input_ids"], strict=True)
)


@row("responses as an engine sampled them")
def sampled_responses(read):
    letters = [token for letter in "Yes." for token in read_ids(letter)]
    assert letters != read_ids("Yes.")
    for row, turns in ((TEXTS, ()), (CHAT, ("<|im_end|>", "\n"))):
        ids = IDS | {"chosen": [*letters, *(token for text in turns for token in read_ids(text))]}
        assert read(rows=[row | {"sampled_ids": ids}]) == [("Hi.", "".join(["Yes.", *turns]), f"No.{END}")]
        assert read.examples[0].responses[0] == ids["chosen"]
    ids = {"prompt": IDS["prompt"], "completion": letters}
    assert read("loss=kto", rows=[LABELLED | {"sampled_ids": ids}] * 2) == [("Hi.", "Yes.")] * 2
    assert read("loss=sft", rows=[{"prompt": "Hi.", "completion": "Yes.", "sampled_ids": ids}]) == [("Hi.", "Yes.")]


def read_ids(text):
    return FAMILIES["ChatML"].tokenizer()(text)["input_ids"]


@row("weights")
def weights(read):
    read("columns.weight=NAME", rows=[TEXTS | {"NAME": 0.5}, TEXTS | {"NAME": "2"}])
    assert [each.text.weight for each in read.examples] == [0.5, 2]


@row("several data sets")
def several_data_sets(read):
    many = PreferenceData("keep_end")
    for number in range(8):
        many.add_pair(f"Say {number}.", "Yes.", "No.")
    read.monkeypatch.setitem(preference_datasets.DATASETS, "hh", lambda split, **_: many)
    read.write("pairs.jsonl", *(TEXTS | {"prompt": f"Tell {number}."} for number in range(10)))
    names, shares = settings_of("several data sets")
    prompts = [
        prompt for prompt, *_ in read(names.replace("pairs", f"'{read.folder}/pairs").replace("]", "']"), shares)
    ]
    assert [sum(prompt.startswith(word) for prompt in prompts) for word in ("Say", "Tell")] == [8, 4]
    assert "an epoch takes 4 of 9 examples (its share is 0.5)" in read.out


@row("CSV with other names")
def csv_with_other_names(read):
    for split in ("train", "test"):
        read.write(f"data/{split}.csv", "ask,good,bad\nHi.,Yes.,No.\n")
    assert read(*settings_of("CSV with other names")) == [AS_TEXTS]


@row("[UltraFeedback](https://huggingface.co/datasets/HuggingFaceH4/ultrafeedback_binarized), binarized")
def ultrafeedback(read):
    table = datasets.Dataset.from_list([ULTRAFEEDBACK])
    unused = datasets.Dataset.from_list([ULTRAFEEDBACK | {"chosen": [HI, SO]}])
    tables = datasets.DatasetDict(
        train_prefs=table, test_prefs=table, train_sft=unused, test_sft=unused, train_gen=unused, test_gen=unused
    )
    read.monkeypatch.setattr(datasets, "load_dataset", lambda name, config: tables)
    (settings,) = (cells[-1] for first, cells in rows_of(FORMS).items() if "binarized), " in first)
    assert read(settings.strip("` ")) == [AS_CHAT]
    assert read("loss=sft", settings.strip("` ")) == [(chatml(HI), "So.<|im_end|>")]


# Files, folders and splits

SAY = [TEXTS | {"prompt": f"Say {number}."} for number in range(10)]


def prompts(examples):
    return [prompt for prompt, *_ in examples]


def read_file(read, name, content):
    """Read a file as training and as test split."""
    shutil.rmtree(read.folder / "data", ignore_errors=True)
    for split in ("train", "test"):
        read.write(f"data/{split}{name}", content)
    return read()


@row("`pairs.jsonl` (.ndjson, .jsonlines, .json)")
def json_files(read):
    line = json.dumps(TEXTS)
    for name, content in (
        (".jsonl", f"\n\ufeff{line}\r\n\n"),
        (".ndjson", line),
        (".jsonlines", line),
        (".json", f"[{line}]"),
    ):
        assert read_file(read, name, content) == [AS_TEXTS]
    with pytest.raises(UserError, match="row 1: is not JSON .the key 'prompt' occurs twice in an object"):
        read_file(read, ".jsonl", line.replace('"chosen"', '"prompt"'))


@row("`pairs.csv`")
def csv_files(read):
    expected = [("12", f'a, b\n"c"{END}', f"None{END}")]
    for separator in ",;\t":
        content = f'prompt{separator}chosen{separator}rejected\n12{separator}"a, b\n""c"""{separator}None\n'
        assert read_file(read, ".csv", content) == expected
    with pytest.raises(UserError, match="row 1, line 2: its number of cells is 2, but the header's is 3"):
        read_file(read, ".csv", "prompt,chosen,rejected\nHi.,Yes.\n")
    with pytest.raises(UserError, match="line 2: is not UTF-8"):
        read_file(read, ".csv", b"prompt,chosen,rejected\nHi.,\xe9,No.\n")


@row("`pairs.tsv`")
def tsv_files(read):
    head = "prompt\tchosen\trejected\n"
    assert read_file(read, ".tsv", f'{head}Hi.\t"Yes.\tNo.\n') == [("Hi.", f'"Yes.{END}', f"No.{END}")]
    assert read_file(read, ".tsv", f'{head}Hi.\t"Yes.\nSo."\tNo.\n') == [("Hi.", f"Yes.\nSo.{END}", f"No.{END}")]
    with pytest.raises(UserError, match="a quotation mark that begins a cell may end in a later row, or may be a part"):
        read_file(read, ".tsv", f'{head}a\tb\t"It is\nc\td\tso."\n')


@row("`pairs.parquet`, `pairs.arrow`")
def arrow_files(read):
    call = {"function": {"name": "look", "arguments": {"at": 7}}}
    other = {"function": {"name": "look", "arguments": {"of": 8}}}
    rows = [{"prompt": [HI], "chosen": [CALL | {"tool_calls": [each]}], "rejected": [NO]} for each in (call, other)]
    for split in ("train", "test"):
        (read.folder / "data").mkdir(exist_ok=True)
        datasets.Dataset.from_list(rows).to_parquet(read.folder / "data" / f"{split}.parquet")
    found = read(template=QWEN3)
    assert ['"arguments": {"at": 7}}' in found[0][1], '"arguments": {"of": 8}}' in found[1][1]] == [True, True]
    call["function"]["arguments"]["of"] = None
    read.write("data/a.jsonl", *rows)
    assert '{"at": 7, "of": null}' in read("split_train=a", template=QWEN3)[0][1]


@row("`pairs.jsonl.gz` (.bz2, .xz, .zst)")
def compressed_files(read):
    content = json.dumps(TEXTS).encode()
    compressed = {"gz": gzip.compress(content), "bz2": bz2.compress(content), "xz": lzma.compress(content)}
    compressed |= {"zst": pyarrow.compress(content, codec="zstd", asbytes=True)}
    for suffix, written in compressed.items():
        assert read_file(read, f".jsonl.{suffix}", written) == [AS_TEXTS]


@row("`'pairs/*.jsonl'`")
def globs(read):
    read.write("pairs/b.jsonl", *SAY[5:])
    read.write("pairs/a.jsonl", *SAY[:5])
    found = read(f"datasets=['{read.folder}/pairs/*.jsonl']")
    assert prompts(found) == [each["prompt"] for each in SAY if each["prompt"] in prompts(found)] and len(found) == 9


@row("`folder/`")
def folders(read):
    for number, layout in enumerate(("{}.jsonl", "data/{}-00000-of-00001.jsonl", "{}/a.csv")):
        for split, text in (("train", "Hi."), ("test", "Bye.")):
            content = f"prompt,chosen,rejected\n{text},Yes.,No.\n" if "csv" in layout else TEXTS | {"prompt": text}
            read.write(f"{number}/{layout.format(split)}", content)
        assert read(f"datasets=['{read.folder}/{number}']") == [AS_TEXTS]
        assert read.inputs.eval_batches.examples[0].text.prompt == "Bye."


@row("`copy/` of a hub data set")
def copies(read):
    read.write("copy/NAME/train/0000.jsonl", TEXTS)
    read.write("copy/NAME/test-00000-of-00001.jsonl", TEXTS)
    assert read(f"datasets=['{read.folder}/copy']") == [AS_TEXTS]
    read.write("copy/some.jsonl", TEXTS | {"prompt": "Bye."})
    files = "[{split: train, path: some.jsonl}, {split: test, path: some.jsonl}]"
    read.write("copy/README.md", f"---\nconfigs:\n- config_name: default\n  data_files: {files}\n---\n")
    assert prompts(read(f"datasets=['{read.folder}/copy']")) == ["Bye."]


@row("`copy:NAME`, `me/set:NAME`")
def configurations(read):
    for name, split in (("one", "train"), ("one", "test"), ("two", "train"), ("two", "test")):
        read.write(f"copy/{name}/{split}.jsonl", TEXTS | {"prompt": name})
    assert prompts(read(f"datasets=['{read.folder}/copy:two']")) == ["two"]
    with pytest.raises(UserError, match="has 2 configurations; give datasets="):
        read(f"datasets=['{read.folder}/copy']")
    calls = []
    table = datasets.Dataset.from_list([TEXTS])
    read.monkeypatch.setattr(
        datasets, "load_dataset", lambda *names: calls.append(names) or {"train": table, "test": table}
    )
    assert read("datasets=['me/set:NAME']") == [AS_TEXTS] and set(calls) == {("me/set", "NAME")}


@row("`saved/`")
def saved(read):
    table = datasets.Dataset.from_list([TEXTS])
    datasets.DatasetDict(train=table, test=table).save_to_disk(read.folder / "saved")
    assert read(f"datasets=['{read.folder}/saved']") == [AS_TEXTS]


@row("`hh`, `shp`, `se`, `demo`")
def named(read):
    read.monkeypatch.setattr(preference_datasets, "load_hub_split", lambda path, split, cache_dir: [DIALOGUES])
    assert read("datasets=[hh]") == [(DIALOGUE, f" Yes.{END}", f" No.{END}")]
    for setting in ("columns.prompt=x", "split_train=x", "split_test=x", "train_on=last", "prompt_format=chat"):
        with pytest.raises(UserError, match=r"datasets=\[hh\] reads its own columns, splits and texts; leave it out"):
            read("datasets=[hh]", setting)


@row("one file under two paths")
def two_paths(read):
    path = read.write("data/a.jsonl", *SAY)
    assert (
        len(read(f"datasets=['{path}','{path}']"))
        == len(read(f"datasets=['{path}','{read.folder}/./data/a.jsonl']"))
        == 9
    )


@row("a file that is no data")
def no_data(read):
    stand_ins = {
        "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n": "a pointer of Git LFS; run git lfs pull",
        "../.git/annex/objects/ab/cd\n": "a pointer of git-annex; run git annex get",
        "<!DOCTYPE html><html></html>": "a web page; download the file itself",
    }
    for content, words in stand_ins.items():
        with pytest.raises(UserError, match=f"is not the data but {words}"):
            read(f"datasets=['{read.write('a.jsonl', content)}']")
    (read.folder / "b.jsonl").symlink_to("gone.jsonl")
    read.write("c/train-00001-of-00002.jsonl", TEXTS)
    for name, words in (("*.jsonl", "is a link to gone.jsonl, which is not there"), ("c", "train has 1 of 2 shards")):
        with pytest.raises(UserError, match=words):
            read.write("a.jsonl", TEXTS)
            read(f"datasets=['{read.folder}/{name}']")


@row("no `split_train` and `split_test`")
def usual_splits(read):
    for train, test, loss in (
        *[(f"train{end}", f"{name}{end}", "dpo") for end in ("", "_prefs", "_sft") for name in ("test", "validation")],
        *[("train", name, "dpo") for name in ("valid", "val", "dev", "eval", "evaluation")],
    ):
        folder = f"{train}-{test}-{loss}"
        read.write(f"{folder}/{train}.jsonl", TEXTS)
        read.write(f"{folder}/{test}.jsonl", TEXTS | {"prompt": "Bye."})
        assert prompts(read(f"datasets=['{read.folder}/{folder}']")) == ["Hi."]
        assert [each.text.prompt for each in read.inputs.eval_batches.examples] == ["Bye."]
    for kind in ("sft", "prefs"):
        for split in ("train", "test"):
            read.write(f"data/{split}_{kind}.jsonl", TEXTS | {"prompt": kind})
    assert (prompts(read()), prompts(read("loss=sft"))) == (["prefs"], ["sft"])
    assert prompts(read("split_train=train_sft")) == ["sft"]


@row("no test split")
def held_out(read):
    path = read.write("pairs.jsonl", *SAY, *SAY)
    found = [read(f"datasets=['{path}']", f"seed={seed}") for seed in (0, 1)]
    tests = {each.text.prompt for each in read.inputs.eval_batches.examples}
    assert found[0] == found[1] and len(found[0]) == 18
    assert len(tests) == 1 and not tests & {*prompts(found[0])}


# Columns

TWO = {"prompt": "Hi.", "response_1": "No.", "response_2": "Yes."}
SEVERAL = {"prompt": "Hi.", "responses": ["No.", "Yes."]}
VALUES = {  # of each role, with the rest of a row, other settings, and what is made of it
    "prompt": ("Hi.", ANSWERS, [], AS_TEXTS),
    "input": ("You.", TEXTS, [], ("Hi.\nYou.", *AS_TEXTS[1:])),
    "chosen": ("Yes.", {"prompt": "Hi.", "rejected": "No."}, [], AS_TEXTS),
    "rejected": ("No.", {"prompt": "Hi.", "chosen": "Yes."}, [], AS_TEXTS),
    "completion": ("Yes.", {"prompt": "Hi.", "label": 1}, ["loss=kto"], AS_TEXTS[:2]),
    "label": ("true", {"prompt": "Hi.", "completion": "Yes."}, ["loss=kto"], AS_TEXTS[:2]),
    "messages": ([HI, YES], {}, ["loss=sft"], AS_CHAT[:2]),
    "system": ("Be brief.", CHAT, [], (chatml({"role": "system", "content": "Be brief."}, HI), *AS_CHAT[1:])),
    "tools": (json.dumps(TOOLS), CHAT, [], None),
    "responses": (["No.", "Yes."], {"prompt": "Hi.", "scores": "[1, 2]"}, [], AS_TEXTS),
    "scores": ([1, 2.5], SEVERAL, [], AS_TEXTS),
    "ranks": ([2, 1], SEVERAL, [], AS_TEXTS),
    "preferred": ("2", TWO, [], AS_TEXTS),
    "preference_strength": (1, TWO, [], AS_TEXTS),
    "score_chosen": (1, TEXTS | {"other": 2}, ["columns.score_rejected=other"], ("Hi.", *AS_TEXTS[:0:-1])),
    "score_rejected": (1, TEXTS | {"other": 2}, ["columns.score_chosen=other"], AS_TEXTS),
    "weight": (2, TEXTS, [], AS_TEXTS),
    "sampled_ids": ({side: read_ids(text) for side, text in TEXTS.items()}, TEXTS, [], ("Hi.", "Yes.", "No.")),
}


def test_the_page_names_the_columns_and_the_keys_of_every_role():
    named = {}
    for first_cell, (names,) in rows_of(COLUMN_ROWS).items():
        named |= dict.fromkeys(re.findall(r"`(\w+)`", re.match(r"(`\w+`(, )?)+", first_cell)[0]), names)
    assert named == {role: ", ".join(column.names) for role, column in COLUMNS.items()}
    for column in COLUMNS.values():
        *keys, last = column.keys or ("", "")
        assert " or ".join(filter(None, (", ".join(keys), last))) in " ".join(rows_of(COLUMN_ROWS))
    (pairs,) = re.findall(r"two responses may be ([^.]*)\.", " ".join(COLUMN_ROWS.split()))
    assert tuple(tuple(pair.split(" and ")) for pair in re.split(", or |, ", pairs)) == UNORDERED_PAIRS


@pytest.mark.parametrize("role", VALUES)
def test_the_column_of_a_role_is_found_by_its_names_or_set(role, read):
    value, others, settings, expected = VALUES[role]
    names = COLUMNS[role].names
    for name in names:
        assert find_columns([name, *others], {}, "data")[role] == name
    for name in (*names[:1], *(name.upper() for name in names[-1:]), "other name"):
        given = [f"columns.{role}='{name}'"] if name == "other name" else []
        (found, *_) = read(
            *settings, *given, rows=[others | {name: value}] * 2, template=QWEN3 if not expected else CHATML
        )
        assert found == expected or (role == "tools" and "Looks." in found[0])
        assert f"{role} is the column {name}" in read.out or name == role


def test_a_preference_names_a_column_its_mark_an_index_or_the_first_response(read):
    letters = {"prompt": "Hi.", "response_a": "No.", "response_b": "Yes."}
    for value in ("response_b", "B", "model_b", False):
        assert read(rows=[letters | {"winner": value}]) == [AS_TEXTS]
    for value in (1, "b"):
        assert read(rows=[SEVERAL | {"preferred": value}]) == [AS_TEXTS]
    assert "because no response is better" in read.refuses(rows=[letters | {"winner": "tie"}])


def test_the_sign_of_a_strength_says_which_response_is_better(read):
    for strength, expected in ((-1, [("Hi.", *AS_TEXTS[:0:-1])]), ("0.5", [AS_TEXTS])):
        assert read(rows=[TWO | {"preference_strength": strength}]) == expected


def test_responses_are_texts_messages_conversations_or_objects(read):
    scores = {"scores": [1, 2]}
    for responses in ([NO, YES], [[HI, NO], [HI, YES]], [[NO], [YES]]):
        assert read(rows=[{"prompt": [HI], "responses": responses, **scores}]) == [AS_CHAT]
    for key in COLUMNS["responses"].keys:
        assert read(rows=[{"prompt": "Hi.", "responses": [{key: "No."}, {key: "Yes."}], **scores}]) == [AS_TEXTS]


def test_responses_may_hold_their_scores(read):
    for key in COLUMNS["scores"].keys:
        assert read(rows=[{"prompt": "Hi.", "answers": [{"text": "No.", key: 1}, {"text": "Yes.", key: 2}]}]) == [
            AS_TEXTS
        ]


def test_responses_may_hold_their_ranks(read):
    assert read(rows=[{"prompt": "Hi.", "answers": [{"text": "No.", "rank": 2}, {"text": "Yes.", "rank": 1}]}]) == [
        AS_TEXTS
    ]


def test_a_label_is_true_false_1_or_0(read):
    values = [True, False, 1, 0, "true", "0"]
    read("loss=kto", rows=[{"prompt": "Hi.", "completion": "Yes.", "label": value} for value in values])
    assert [each.text.label for each in read.examples] == [True, False] * 3


def test_tools_are_a_list_or_its_json(read):
    found = [read(rows=[CHAT | {"tools": value}], template=QWEN3) for value in (TOOLS, json.dumps(TOOLS))]
    assert found[0] == found[1] and "Looks." in found[0][0][0]


def test_a_weight_is_above_0(read):
    error = read.refuses("columns.weight=w", rows=[TEXTS | {"w": -1}])
    assert error.endswith("row 1: w must be a number above 0, not -1")


# Messages


@row("roles")
def roles(read):
    first = [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}]
    calls = [HI, {"role": "assistant", "content": "c"}, {"role": "tool", "content": "d"}]
    assert read(rows=[CHAT | {"prompt": [*first, *calls]}]) == [(chatml(*first, *calls), *AS_CHAT[1:])]
    read.drops_inconsistent(
        CHAT | {"prompt": [HI, YES, first[0], HI]}, "prompt has a system turn that is not its first"
    )


@row("ShareGPT's")
def sharegpt_roles(read):
    call = {"from": "function_call", "value": '{"name": "look", "arguments": {"at": 7}}'}
    turns = [*sharegpt("Hi."), call, {"from": "observation", "value": "A clock."}]
    same = read(rows=[CHAT | {"prompt": [HI, CALL, FOUND]}], template=QWEN3)
    assert read(rows=[{"conversations": turns, **ANSWERS}], template=QWEN3) == same and '{"at": 7}' in same[0][0]


@row("parts")
def parts(read):
    text = [{"type": "text", "text": "H"}, {"type": "text", "text": "i."}]
    assert read(rows=[CHAT | {"prompt": [{"role": "user", "content": text}]}]) == [AS_CHAT]
    image = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
    read.drops_inconsistent(CHAT | {"prompt": [image]}, "a turn contains a part that is not text")


@row("calls")
def calls(read):
    function = CALL["tool_calls"][0]["function"]
    written = CALL | {"tool_calls": [{"function": function | {"arguments": json.dumps(function["arguments"])}}]}
    found = [read(rows=[CHAT | {"chosen": [call]}], template=QWEN3) for call in (CALL, written)]
    assert found[0] == found[1] and '"arguments": {"at": 7}' in found[0][0][1]
    assert read(rows=[CHAT | {"chosen": [YES | {"tool_calls": []}]}]) == [AS_CHAT]


@row("thoughts")
def thoughts(read):
    for key in THOUGHTS:
        template = QWEN3.replace("m.reasoning_content", f"m.{key}")
        found = read(rows=[CHAT | {"chosen": [YES | {key: "Well."}]}], template=template)
        assert found[0][1] == "<think>\nWell.\n</think>\n\nYes.<|im_end|>"
    assert (
        read(rows=[CHAT | {"chosen": [YES | {"content": "<think>\nWell.\n</think>\n\nYes."}]}], template=QWEN3) == found
    )


@row("nulls")
def nulls(read):
    nothing = {"role": "assistant", "content": None, "tool_calls": CALL["tool_calls"], "name": None}
    found = [read(rows=[CHAT | {"chosen": [call]}], template=QWEN3) for call in (CALL, nothing)]
    assert found[0] == found[1]


@row("JSON in a text")
def json_in_a_text(read):
    assert read(rows=[CHAT | {"prompt": json.dumps([HI])}]) == [AS_CHAT]
    read.drops_inconsistent(CHAT | {"prompt": str([HI])}, "messages are written as a text that is not JSON")


# What the model sees


@row("plain texts")
def plain_texts(read):
    spaced = TEXTS | {"prompt": " Hi. ", "chosen": "Yes. "}
    assert read(rows=[spaced]) == [(" Hi. ", f"Yes. {END}", f"No.{END}")]
    assert "a text prompt is used as it is; prompt_format=chat renders it with the chat template." in read.out


@row("conversations")
def conversations(read):
    assert read(rows=[CHAT]) == [AS_CHAT]
    assert read("prompt_format=hh", rows=[CHAT]) == [(DIALOGUE, f" Yes.{END}", f" No.{END}")]
    assert "prompt_format=text does not support; use auto" in read.refuses("prompt_format=text", rows=[CHAT])
    read(rows=[CHAT])
    (example,) = read.examples
    assert example.prompt + example.responses[0] == read.inputs.tokenizer(AS_CHAT[0] + AS_CHAT[1])["input_ids"]


@row("what is trained on")
def what_is_trained_on(read):
    ((_, chosen, _),) = read(rows=[CHAT | {"chosen": [CALL, FOUND, YES]}], template=QWEN3)
    assert chosen.count("<|im_end|>") == 2 and "look" in chosen and "Yes." in chosen and "A clock." not in chosen
    (example,) = read.examples
    assert "A clock." in example.text.responses[0]


@row("the beginning of a response")
def beginnings(read):
    share = {"chosen": [HI, YES, WHY, SO], "rejected": [HI, YES, WHY, NO]}
    assert read(rows=[share]) == [(chatml(HI, YES, WHY), "So.<|im_end|>", "No.<|im_end|>")]
    assert read(rows=[CONVERSATIONS]) == [(chatml(HI), *TWO_TURNS)]
    longer = {"chosen": [HI, CALL, FOUND, YES], "rejected": [HI, CALL, FOUND, NO]}
    ((prompt, *responses),) = read(rows=[longer], template=QWEN3)
    assert "A clock." in prompt and ["Yes." in responses[0], "No." in responses[1]] == [True, True]
    single = {"prompt": [HI], "completion": [YES, WHY, SO]}
    assert read("loss=sft", rows=[single]) == [(chatml(HI), "Yes.<|im_end|>So.<|im_end|>")]


@row("`chat_template=FILE`")
def other_templates(read):
    path = read.write("other.jinja", CHATML.replace("\n' + m.content", "\n\n' + m.content"))
    ((prompt, *_),) = read(f"chat_template='{path}'", rows=[CHAT])
    assert prompt == AS_CHAT[0].replace("user\n", "user\n\n")
    assert read.inputs.tokenizer.chat_template == (read.folder / "other.jinja").read_text()


@row("`chat_template_args='{enable_thinking: false}'`")
def template_arguments(read):
    setting = "chat_template_args={enable_thinking: false}"
    ((prompt, *_),) = read(setting, rows=[CHAT], template=QWEN3)
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert "the chat template does not read it" in read.refuses(setting, rows=[CHAT])


@row("`chat_template_time=2026-01-31`")
def template_times(read):
    clock = "{{- strftime_now('%Y-%m-%d') -}}" + CHATML
    assert read("chat_template_time=2026-01-31", rows=[CHAT], template=clock)[0][0].startswith("2026-01-31<|im_start|>")
    assert not read(rows=[CHAT], template=clock)[0][0].startswith("2026-01-31")
    assert read.inputs.template_time is not None


@row("a text that the template leaves out")
def left_out(read):
    for row, what in (
        *((CHAT | {"chosen": [YES | {key: "Well."}]}, "a thought") for key in THOUGHTS),
        (CHAT | {"chosen": [CALL]}, "a call of a tool"),
        (CHAT | {"tools": TOOLS}, "the tools"),
    ):
        read.drops_inconsistent(row, f"the chat template leaves out {what}")
    users = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
    system = {"role": "system", "content": "Be brief."}
    error = read.refuses(rows=[CHAT | {"prompt": [system, HI]}], template=users)
    assert "leaves out a turn of the system (turn 1: 'Be brief.';" in error
    names = CHATML.replace("m.content", "m.content ~ m.tool_calls[0].function.name if m.tool_calls else m.content")
    assert "leaves out an argument of a call (turn 2: 7;" in read.refuses(
        rows=[CHAT | {"chosen": [CALL]}], template=names
    )


@row("white space around a response")
def space_around_responses(read):
    texts = {"chosen": "\n\nYes.", "rejected": "\nNo.\n"}
    turns = {side: [{"role": "assistant", "content": text}] for side, text in texts.items()}
    as_texts, as_turns = ([f"{text}{end}" for text in texts.values()] for end in (END, "<|im_end|>"))
    assert read(rows=[{"prompt": "Hi.", **texts}]) == [("Hi.", *as_texts)]
    dialogues = {side: f"{DIALOGUE}{text}" for side, text in texts.items()}
    assert read(rows=[{"prompt": DIALOGUE, **texts}]) == read(rows=[dialogues]) == [(DIALOGUE, *as_texts)]
    for settings, row in (((), {"prompt": [HI], **turns}), (("prompt_format=chat",), {"prompt": "Hi.", **texts})):
        assert read(*settings, rows=[row]) == [(chatml(HI), *as_turns)]
        assert "white space" not in read.out
    trimming = CHATML.replace("m.content", "m.content | trim")
    assert read(rows=[{"prompt": [HI], **turns}], template=trimming) == [AS_CHAT]
    assert "1 kept although the chat template leaves out white space at the start or the end of a response" in read.out


@row("thoughts of earlier turns")
def earlier_thoughts(read):
    earlier = [HI, YES | {"content": "<think>\nWell.\n</think>\n\nYes."}, WHY]
    ((prompt, *_),) = read(rows=[CHAT | {"prompt": earlier}], template=QWEN3)
    assert "Yes." in prompt and "Well." not in prompt
    assert "1 kept although the chat template leaves out a thought of an earlier turn" in read.out


@row("a prompt that opens a thought")
def opened_thoughts(read):
    answer, rejected = "Well.</think>Yes.", [NO | {"content": "So.</think>No."}]
    for turn in ({"content": answer}, {"content": "Yes.", "reasoning_content": "Well."}):
        row = CHAT | {"chosen": [{"role": "assistant", **turn}], "rejected": rejected}
        ((prompt, chosen, _),) = read(rows=[row], template=R1)
        assert prompt.endswith("<think>\n") and re.fullmatch(r"Well\.\n?</think>\s*Yes\.<.end.>", chosen)
    error = read.refuses(rows=[CHAT], template=R1)
    assert "the generation prompt opens a thought, which the response does not continue" in error


@row("no end of turn in the template")
def no_end(read):
    plain = "{%- for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor -%}"
    plain += "{%- if add_generation_prompt %}{{ 'assistant: ' }}{% endif -%}"
    assert read(rows=[CHAT], template=plain) == [("user: Hi.\nassistant: ", f"Yes.{END}", f"No.{END}")]


@row("sampled token ids")
def sampled_token_ids(read):
    llama, space = FAMILIES["Llama-3"], read_ids("Yes. ")
    texts = {"prompt": "Hi.", "chosen": "Yes. ", "rejected": "No."}
    ids = {side: llama.tokenizer()(text)["input_ids"] for side, text in texts.items()}
    row = CHAT | {"chosen": [YES | {"content": "Yes. "}], "sampled_ids": ids}
    assert read("model.add_bos=true", rows=[row], template=llama.template) == [tuple(texts.values())]
    long = IDS | {"prompt": [*IDS["prompt"], *read_ids("word " * 200)], "chosen": space * 80}
    read(rows=[TEXTS | {"chosen": "Yes. " * 80, "sampled_ids": long}])
    assert (
        read.examples[0].prompt == long["prompt"][-96:] and read.examples[0].responses[0] == long["chosen"][: 160 - 96]
    )
    read.drops(TEXTS | {"chosen": " ", "sampled_ids": IDS | {"chosen": read_ids(" ")}}, "a response is empty")
    same_texts = TEXTS | {"rejected": "Yes.", "sampled_ids": IDS | {"rejected": read_ids("Yes.")}}
    assert len(read(rows=[same_texts])) == 1
    equal = same_texts | {"sampled_ids": IDS | {"rejected": IDS["chosen"]}}
    read.drops(equal, "both responses are equal")


@row("BOS")
def bos(read):
    for rows in ([CHAT], [TEXTS]):
        for setting in ("false", "true"):
            ((prompt, *_),) = read(f"model.add_bos={setting}", rows=rows, template=FAMILIES["Llama-3"].template)
            n = int(rows == [CHAT] or setting == "true")
            assert prompt.count("<|begin_of_text|>") == n and prompt.startswith("<|begin_of_text|>" * n)


@row("generation")
def generation(read):
    read(rows=[CHAT])
    tokenizer = read.inputs.tokenizer
    assert [tokenizer.decode([token]) for token in read.inputs.stops] == ["<|im_end|>", END]


@row("a long conversation")
def long_conversations(read):
    system = {"role": "system", "content": "Be brief."}
    turns = [HI | {"content": f"{number} " * 40} for number in range(3)]
    row = CHAT | {"prompt": [system, turns[0], YES, turns[1], YES, HI]}
    ((prompt, *_),) = read(rows=[row], template=CHATML)
    assert prompt == chatml(system, turns[1], YES, HI)
    assert read.examples[0].truncated == ("oldest turns",)


@row("a long text")
def long_texts(read):
    long = {"prompt": "first" + " word" * 200 + " last", "chosen": " yes" * 200, "rejected": " no"}
    ((prompt, chosen, _),) = read(rows=[long])
    assert prompt.endswith(" last") and "first" not in prompt and END not in chosen
    assert (len(read.examples[0].prompt), len(read.examples[0].responses[0])) == (96, 160 - 96)
    entry = {"responses": [" yes" * 200, " no"], "pairs": [(0, 1)], "sft_target": " yes"}
    read.monkeypatch.setitem(preference_datasets.DATASETS, "shp", lambda split, **_: {long["prompt"]: entry})
    ((prompt, *_),) = read("datasets=[shp]")
    assert prompt.startswith("first") and "last" not in prompt


@row("SFT")
def sft(read):
    rows = [{"prompt": "Hi.", "completion": text} for text in ("Yes.", "No.", "Yes.")]
    assert [texts[1:] for texts in read("loss=sft", rows=rows)] == [(f"Yes.{END}",), (f"No.{END}",)]
    dialogues = [DIALOGUES, DIALOGUES | {"chosen": f"{DIALOGUE} So."}]
    assert read("loss=sft", rows=dialogues) == [(DIALOGUE, f" So.{END}")]


# Rows that are not trained on


@row("not JSON, not UTF-8, another number of cells; a missing column; a value of another type")
def wrong_rows(read):
    files = {"a.jsonl": "{", "b.csv": "prompt,chosen,rejected\nHi.\n"}
    for name, content in files.items():
        with pytest.raises(UserError, match=f"{name[0]}.*, row 1"):
            read(f"datasets=['{read.write(name, content)}']")
    for row in ({"prompt": "Hi.", "chosen": "Yes."}, TEXTS | {"chosen": 5}, SEVERAL | {"scores": [1, "x"]}):
        assert re.search("train.jsonl, row 1: ", read.refuses(rows=[row]))
        assert re.search("train.jsonl, row 1: ", read.refuses("on_inconsistent=drop", rows=[row]))


@row("a null response, an empty prompt, turn or response")
def empty_rows(read):
    read.drops(TEXTS | {"chosen": None}, "a response is empty")
    read.drops(TEXTS | {"chosen": " "}, "a response is empty")
    read.drops(TEXTS | {"prompt": ""}, "the prompt is empty")
    read.drops(CHAT | {"prompt": [HI | {"content": " "}]}, "a turn is empty")


@row("equal responses, also if only the chat template makes them equal")
def equal_responses(read):
    read.drops(TEXTS | {"chosen": "No."}, "both responses are equal")
    trim = CHATML.replace("m.content", "m.content | trim")
    read.drops(CHAT | {"chosen": [NO | {"content": "No. "}]}, "both responses are equal", template=trim)


@row("no response is better, or its weight is 0")
def not_better(read):
    with pytest.raises(UserError, match="because no response is better"):
        read(rows=[TWO | {"preference_strength": 0}])
    with pytest.raises(UserError, match="because its weight is 0"):
        read("columns.weight=w", rows=[TEXTS | {"w": 0}])
    ties = {"prompt": "Hi.", "responses": ["Yes.", "No.", "So."], "scores": [2, 1, 1]}
    assert len(read("pairs=all", rows=[ties])) == 2
    assert "1 kept although some of its responses have equal scores" in read.out


@row("eos in a text, a special token in a turn")
def special_tokens(read):
    read.drops(TEXTS | {"chosen": f"Yes.{END}"}, f"the text contains {END}")
    read.drops(CHAT | {"chosen": [YES | {"content": "Yes.<|im_end|>"}]}, "a turn contains a special token")


@row("an unknown role, a later system turn, a null or empty label, score or weight")
def inconsistent_forms(read):
    read.drops_inconsistent(CHAT | {"prompt": [HI | {"role": "bot"}]}, "a message has a form that cannot be used")
    later = [HI, YES, {"role": "system", "content": "Be brief."}, WHY]
    read.drops_inconsistent(CHAT | {"prompt": later}, "a message has a form that cannot be used")
    for row, setting in (
        (LABELLED | {"label": None}, "loss=kto"),
        (LABELLED | {"label": ""}, "loss=kto"),
        (SEVERAL | {"scores": None}, "pairs=all"),
        (TEXTS | {"w": ""}, "columns.weight=w"),
    ):
        assert re.search("(null|empty); on_inconsistent=drop skips such rows$", read.refuses(setting, rows=[row]))
        with pytest.raises(UserError, match="there is no example to train on: 1 of 1 rows are dropped because "):
            read(setting, "on_inconsistent=drop", rows=[row])


@row("what the chat template refuses, changes or leaves out")
def refused_by_the_template(read):
    upper = CHATML.replace("m.content", "m.content | replace('Bad', 'Good')")
    refuse = "{%- for m in messages if m.content == 'Bad.' %}{{ raise_exception('a bad turn') }}{% endfor -%}" + CHATML
    bad = CHAT | {"chosen": [YES | {"content": "Bad."}]}
    read.drops_inconsistent(bad, "the chat template refuses it", template=refuse)
    read.drops_inconsistent(bad, "the chat template changes a turn of the assistant", template=upper)
    read.drops_inconsistent(CHAT | {"tools": TOOLS}, "the chat template leaves out the tools")


@row("a conversation that ends with the user, or responses that first differ in a turn of the user")
def ends_with_the_user(read):
    read.drops(
        {"chosen": [HI, YES, WHY], "rejected": [HI, NO]}, "the last turn of a conversation is not the assistant's"
    )
    other = {"chosen": [HI, YES], "rejected": [WHY, NO]}
    read.drops(other, "the conversations first differ in a turn of the user")


@row("a part that alone is longer than max_prompt_length, in an example longer than max_length")
def long_parts(read):
    long = "word " * 200
    for prompt, name in (
        ([HI | {"content": long}], "last turn"),
        ([{"role": "system", "content": long}, HI], "system turn"),
    ):
        read.drops(CHAT | {"prompt": prompt}, f"the {name} alone is longer than max_prompt_length")
        assert f"the {name} has " in read.refuses(rows=[CHAT | {"prompt": prompt}])


@row("sampled token ids of another form, or of other texts than the row's, as another model's are")
def unusable_ids(read):
    for ids in (IDS | {"chosen": "3"}, {"prompt": [1]}, IDS | {"chosen": read_ids("Maybe.")}):
        row = TEXTS | {"sampled_ids": ids}
        error = read.refuses("on_inconsistent=drop", rows=[row])
        assert "train.jsonl, row 1: " in error and error.endswith("columns.sampled_ids=none tokenizes the texts")
        assert read("columns.sampled_ids=none", rows=[row]) == [AS_TEXTS]


@row("a prompt without tokens")
def no_tokens(read):
    model = shutil.copytree(read.models(CHATML), read.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model, bos_token=END)
    tokenizer.backend_tokenizer.normalizer = Replace("z", "")
    tokenizer.save_pretrained(model)
    read.drops(TEXTS | {"prompt": "zz"}, "the prompt has no tokens", model=model)
    assert len(read("model.add_bos=true", rows=[TEXTS | {"prompt": "zz"}], model=model)) == 1


@row("a token without an embedding in the model")
def no_embedding(read):
    error = read.refuses(rows=[CHAT], model=read.models(CHATML, 380))
    assert "row 1: the text contains the token " in error and "the model has embeddings for ids below 380" in error


@row("single responses for a loss of pairs, or both in one run")
def kinds(read):
    assert "has one response and a label, for loss=kto" in read.refuses(rows=[LABELLED])
    assert "a run trains on one kind" in read.refuses("loss=kto", rows=[LABELLED, TEXTS])


@row("SFT: a false label, or an earlier row with the same prompt and response")
def dropped_by_sft(read):
    rows = [LABELLED, LABELLED, LABELLED | {"completion": "No.", "label": False}]
    assert read("loss=sft", rows=rows) == [AS_TEXTS[:2]]
    assert (
        "1 because the response is labelled undesirable, 1 because an earlier row has the same prompt and" in read.out
    )


@row("shp: neither score is twice the other; se: a later row has the same question")
def dropped_by_the_original(read):
    scored = {"history": "Hi.", "human_ref_A": "Yes.", "human_ref_B": "No.", "score_A": 4, "score_B": 1, "labels": 1}
    rows = datasets.Dataset.from_list([scored, scored | {"score_B": 3}])
    read.monkeypatch.setattr(preference_datasets, "load_hub_split", lambda path, split, cache_dir: rows)
    assert read("datasets=[shp]") == [(DIALOGUE, f" Yes.{END}", f" No.{END}")]
    assert "1 dropped (1 because neither score is twice the other)" in read.out
    answers = [{"text": "<p>Yes.</p>", "pm_score": 3}, {"text": "<p>No.</p>", "pm_score": 1}]
    rows = datasets.Dataset.from_list([{"question": f"<p>{at // 2}</p>", "answers": answers} for at in range(200)])
    assert len(read("datasets=[se]")) < 198 and "because a later row has the same question)" in read.out


@row("after the last full batch of an epoch")
def last_batch(read):
    assert len(read("batch_size=2", rows=[TEXTS, TEXTS, TEXTS])) == 3
    assert "Each epoch skips the last 1 of 3 examples, too few for a batch." in read.out


@row("a repeated row; a rejected dialogue with another prompt")
def kept_and_counted(read):
    assert len(read(rows=[TEXTS, TEXTS])) == 2 and "1 kept although it repeats an earlier row" in read.out
    other = DIALOGUES | {"rejected": "\n\nHuman: You.\n\nAssistant: No."}
    assert len(read(rows=[other])) == 1 and "1 kept although the rejected dialogue's prompt differs" in read.out


# Inspecting, and the cache


@row("`inspect=5`")
def inspecting(read):
    read("inspect=5", "inspect_ids=true", rows=[TEXTS, TEXTS, {"prompt": "Hi.", "chosen": "No.", "rejected": "Yes."}])
    settings, loss = validated(f"model.name_or_path='{read.folder}/model'", "loss=dpo", "inspect=5", "inspect_ids=true")
    inspect_inputs(settings, loss, read.inputs)
    out = read.capsys.readouterr().out
    for line in ("prompt: Hi.", "Lengths in tokens", "Of 3 training examples 1 repeat an earlier one.",
                 "1 contradict an earlier one", "Of 1 test examples 1 are also training examples"):  # fmt: skip
        assert line in out
    assert re.search(r"^ +0 +\d+ prompt +'H'$", out, re.MULTILINE)


@row("`LOCAL_DIR/USER/data_cache/`")
def the_cache(read):
    def tables():
        return sorted(path for path in read.folder.glob("runs/*/data_cache/*"))

    assert read("dry_run=true", rows=[TEXTS]) == [AS_TEXTS] and tables() == []
    assert read(rows=[TEXTS]) == [AS_TEXTS] and len(tables()) == 2
    read.monkeypatch.setattr("dpo.data.records.Encoder.__call__", None)  # which would read a row
    assert read(rows=[TEXTS]) == [AS_TEXTS] and len(tables()) == 2
    read.monkeypatch.undo()
    for path in tables():
        os.utime(path, (0, 0))
    assert read(rows=[CHAT]) == [AS_CHAT] and len(tables()) == 2
    shutil.rmtree(tables()[0].parent)
    assert read(rows=[CHAT]) == [AS_CHAT]


# All of them

PARTS = [section for title, section in SECTIONS.items() if title != "Columns"]


@pytest.mark.parametrize("first_cell", TESTS)
def test_a_row_of_the_page_says_what_happens(first_cell, read):
    TESTS[first_cell](read)


def test_every_row_of_the_page_has_a_test_and_every_test_a_row():
    assert sorted([*FORM_ROWS, *TESTS]) == sorted(first_cell for part in PARTS for first_cell in rows_of(part))
