"""Prompts: the forms in which they are read, truncation, duplicates, and which are held out."""

import json
from pathlib import Path

import pytest
from conftest import GOLDENS, TINY, validated

from dpo.system.errors import UserError
from tools.rounds.prompts import PromptReader, prompts_of_round, read_prompts, split_prompts
from tools.rounds.records import Prompt
from tools.rounds.settings import RoundsSettings
from tools.rounds.store import write_rows

HI, YES = "\n\nHuman: Hi.\n\nAssistant:", " Yes."


def reader(*overrides: str) -> PromptReader:
    return PromptReader(validated("loss=dpo", *TINY, *overrides)[0])


def written(tmp_path: Path, *rows: object) -> str:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


FORMS = {  # what a row may be, and the prompt in it
    "a prompt": ({"prompt": HI}, HI),
    "an instruction with an input": ({"instruction": "Say", "input": "it"}, "Say\nit"),
    "a prompt beside a pair": ({"prompt": HI, "chosen": YES, "rejected": " No."}, HI),
    "two dialogues": ({"chosen": HI + YES, "rejected": HI + " No."}, HI),
    "a prompt beside a completion": ({"prompt": HI, "completion": YES}, HI),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_prompt_is_read_from(form, tmp_path):
    row, text = FORMS[form]
    overrides = ["columns.input=input", "columns.prompt=instruction"] if "input" in row else []
    (prompt,) = reader(*overrides).read([written(tmp_path, row)], "train")
    assert (prompt.prompt, prompt.text) == (text, text)
    assert prompt.ids == reader().tokenizer(text)["input_ids"]


def test_named_data_sets_and_folders_give_their_training_split_and_their_test_split():
    demo = reader("max_prompt_length=64", "max_length=128")
    assert len(demo.read(["demo"], "train")) == 2000 and len(demo.read(["demo"], "test")) == 200
    goldens = reader()
    assert goldens.read([str(GOLDENS / "data")], "train") != goldens.read([str(GOLDENS / "data")], "test")


def test_repeated_prompts_are_left_out_and_long_ones_truncated_and_both_are_counted(tmp_path, capsys):
    long = "\n\nHuman: " + "why " * 60 + "\n\nAssistant:"
    prompts = reader("max_prompt_length=24").read(
        [written(tmp_path, *({"prompt": p} for p in (HI, long, HI)))], "train"
    )
    assert [prompt.id for prompt in prompts] == [0, 1]
    assert prompts[1].ids == reader().tokenizer(long)["input_ids"][-24:]
    assert "2 distinct of 3; 1 are truncated to max_prompt_length=24" in capsys.readouterr().out


def test_a_prompt_of_exactly_max_prompt_length_is_not_truncated(tmp_path):
    n = len(reader().tokenizer(HI)["input_ids"])
    (prompt,) = reader(f"max_prompt_length={n}").read([written(tmp_path, {"prompt": HI})], "train")
    assert len(prompt.ids) == n


@pytest.mark.parametrize(
    "row, problem", [({"text": HI}, "set columns.prompt=NAME"), ({"prompt": ""}, "the prompt is empty"), (3, "object")]
)
def test_a_row_without_a_prompt_is_refused_by_its_number(row, problem, tmp_path):
    with pytest.raises(UserError, match=rf"row 2: .*{problem}"):
        reader().read([written(tmp_path, {"prompt": HI}, row)], "train")


def test_a_file_without_rows_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no prompt"):
        reader().read([written(tmp_path)], "train")


# Held-out prompts


def settings(train: str, **others: object) -> RoundsSettings:
    values = {"prompts": [train], "eval_prompts": None, "n_eval_prompts": 200} | others
    return RoundsSettings.model_construct(**values)


def numbered(tmp_path: Path, name: str, numbers: range) -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps({"prompt": f"Count to {n}:"}) + "\n" for n in numbers))
    return str(path)


def test_a_tenth_of_the_prompts_is_held_out_and_drawn_with_the_seed(tmp_path):
    train = numbered(tmp_path, "a.jsonl", range(40))
    kept, held_out = split_prompts(reader(), settings(train), seed=0)
    assert (len(kept), len(held_out)) == (36, 4)
    assert sorted(prompt.id for prompt in (*kept, *held_out)) == list(range(40))
    assert not {prompt.text for prompt in kept} & {prompt.text for prompt in held_out}
    assert split_prompts(reader(), settings(train), seed=0) == (kept, held_out)
    assert split_prompts(reader(), settings(train), seed=1)[1] != held_out
    assert len(split_prompts(reader(), settings(train, n_eval_prompts=2), seed=0)[1]) == 2


def test_held_out_prompts_that_are_given_are_never_trained_on(tmp_path):
    train, other = numbered(tmp_path, "a.jsonl", range(10)), numbered(tmp_path, "b.jsonl", range(8, 14))
    kept, held_out = split_prompts(reader(), settings(train, eval_prompts=[other]), seed=0)
    assert [prompt.text for prompt in kept] == [f"Count to {n}:" for n in range(8)]
    assert [prompt.text for prompt in held_out] == [f"Count to {n}:" for n in range(8, 14)]


def test_prompts_that_are_all_held_out_are_refused(tmp_path):
    train = numbered(tmp_path, "a.jsonl", range(3))
    with pytest.raises(UserError, match="all prompts are held out"):
        split_prompts(reader(), settings(train, eval_prompts=[train]), seed=0)
    with pytest.raises(UserError, match="set eval_prompts"):
        split_prompts(reader(), settings(numbered(tmp_path, "c.jsonl", range(1))), seed=0)


PROMPTS = [Prompt(id, str(id), str(id), [id]) for id in range(10)]


def test_rounds_take_the_next_prompts_of_an_order_until_all_had_their_turn():
    ids = [[prompt.id for prompt in prompts_of_round(PROMPTS, k, 4, seed=0)] for k in (1, 2, 3)]
    assert all(row == sorted(row) and len(row) == 4 for row in ids)
    assert sorted({*ids[0], *ids[1], *ids[2]}) == list(range(10))
    assert len({*ids[0], *ids[1]}) == 8
    assert ids != [[prompt.id for prompt in prompts_of_round(PROMPTS, k, 4, seed=1)] for k in (1, 2, 3)]


@pytest.mark.parametrize("n", [None, 10, 11])
def test_every_round_takes_all_prompts_if_no_fewer_are_asked_for(n):
    assert prompts_of_round(PROMPTS, 2, n, seed=0) == PROMPTS


def test_prompts_are_read_as_they_were_written(tmp_path):
    write_rows(tmp_path / "p.jsonl", [prompt.__dict__ for prompt in PROMPTS])
    assert read_prompts(tmp_path / "p.jsonl") == PROMPTS
