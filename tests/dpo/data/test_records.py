"""Records of sampled token ids: what is trained on is what an engine sampled, whatever its texts would become."""

import json

import pytest
from conftest import TINY, inputs_of, read_data
from transformers import AutoTokenizer

from dpo.system.errors import UserError

MODEL = TINY[0].split("=", 1)[1].strip("'")
TOKENIZER = AutoTokenizer.from_pretrained(MODEL)
EOS, NEWLINE = TOKENIZER.eos_token_id, TOKENIZER("\n")["input_ids"]
TRIMMING = "{%- for m in messages %}{{ m.role + ': ' + m.content | trim + '<|endoftext|>\n' }}{% endfor -%}"
TRIMMING += "{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif -%}"
SCORES = ("columns.score_chosen=score_chosen", "columns.score_rejected=score_rejected")


def canonical(text):
    return TOKENIZER(text)["input_ids"]


def letters(text):
    """The ids of each character, which no tokenizer makes of a text with frequent words."""
    ids = [token for letter in text for token in canonical(letter)]
    assert ids != canonical(text) and TOKENIZER.decode(ids) == text
    return ids


def sampled(number, is_chat, **fields):
    """Make a pair as an engine samples it: ids of single letters, and after the end of a turn a newline."""
    chosen, rejected = f" The answer is {number}. ", " Nobody knows the answer."
    end = [EOS, *NEWLINE] if is_chat else [EOS]
    ids = {"chosen": [*letters(chosen), *end], "rejected": [*letters(rejected), *end]}
    prompt, row = f"\n\nHuman: What is {number}?\n\nAssistant:", {"chosen": chosen, "rejected": rejected}
    if is_chat:
        row = {side: [{"role": "assistant", "content": text}] for side, text in row.items()}
        row["prompt"] = [{"role": "user", "content": f"What is {number}?"}]
        prompt = f"user: What is {number}?<|endoftext|>\nassistant:"
    ids["prompt"] = [*canonical(prompt[:-1]), *canonical(prompt[-1])]
    return {"prompt": prompt, **row, "sampled_ids": ids, "score_chosen": number + 1, "score_rejected": 0.5} | fields


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def settings_of(tmp_path):
    """Return a function that writes sampled rows, and an ordinary file to mix, and makes the settings to read them."""
    (tmp_path / "template").write_text(TRIMMING)

    def make(rows, is_mixed, loss):
        files = [write(tmp_path / "pairs.jsonl", rows)]
        if is_mixed:
            texts = {
                "prompt": "Say yes.",
                "chosen": " Yes.",
                "rejected": " No.",
                "score_chosen": 2,
                "score_rejected": 1,
            }
            files.append(write(tmp_path / "other.jsonl", [texts]))
        scores = SCORES if loss == "odpo" else ()
        names = ",".join(f"'{path}'" for path in files)
        places = (f"chat_template='{tmp_path / 'template'}'", f"local_dirs=['{tmp_path}']")
        return (*TINY, *places, f"datasets=[{names}]", f"loss={loss}", "batch_size=1", *scores)

    return make


@pytest.mark.parametrize("loss", ["dpo", "odpo", "sft"])
@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("is_chat", [False, True])
def test_a_batch_has_exactly_the_ids_that_were_sampled(is_chat, is_mixed, loss, settings_of):
    rows = [sampled(number, is_chat) for number in range(12)]
    inputs = inputs_of(*settings_of(rows, is_mixed, loss))
    sides = ("chosen",) if loss == "sft" else ("chosen", "rejected")
    found = {True: [], False: []}
    for batch in inputs.train_batches:
        (example,) = batch.examples
        found["other" in example.text.source].append(example)
    assert len(found[False]) == 11 and len(found[True]) == is_mixed
    for example in found[False]:
        row = rows[example.text.row - 1]
        ids = row["sampled_ids"]
        assert (example.prompt, example.responses) == (ids["prompt"], tuple(ids[side] for side in sides))
        assert example.trained_responses == example.responses and example.truncated == ()
        assert example.text.scores == ((row["score_chosen"], 0.5) if loss == "odpo" else ())
        assert example.text.original_prompt == row["prompt"]
    for example in found[True]:
        assert (example.prompt, example.responses[0]) == (canonical("Say yes."), [*canonical(" Yes."), EOS])
    assert inputs.stops == ([EOS] if is_chat else [])


@pytest.mark.parametrize("is_chat", [False, True])
def test_the_model_computes_the_ids_that_were_sampled(is_chat, settings_of, make_trainer):
    rows = [sampled(number, is_chat) for number in range(10)]
    trainer = make_trainer(*settings_of(rows, False, "dpo")[len(TINY) :], "n_examples=3")
    inputs = []
    trainer.policy.register_forward_pre_hook(lambda module, args: inputs.append(args[0].inputs["input_ids"].tolist()))
    for batch in trainer.train_batches:
        trainer.train_step(batch)
        ids = rows[batch.examples[0].text.row - 1]["sampled_ids"]
        assert inputs.pop() == [[*ids["prompt"], *ids["chosen"], *ids["rejected"]]]


def read(tmp_path, *rows, **options):
    """Read rows of texts and of chats, of which none is held out."""
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", rows)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TRIMMING
    return read_data(tmp_path, tokenizer=tokenizer, **options)["train"]


def with_ids(row, **ids):
    return row | {"sampled_ids": row["sampled_ids"] | ids}


def without_ids(row):
    return {key: value for key, value in row.items() if key != "sampled_ids"}


@pytest.mark.parametrize("is_chat", [False, True])
def test_rows_that_differ_in_sampled_ids_alone_are_told_apart_by_caches_and_fingerprints(is_chat, tmp_path):
    row = sampled(1, is_chat)
    chosen, prompt = row["sampled_ids"]["chosen"], row["sampled_ids"]["prompt"]
    merged = [*canonical(" The answer is 1. "), *chosen[len(letters(" The answer is 1. ")) :]]
    variants = [without_ids(row), row, with_ids(row, chosen=merged), with_ids(row, prompt=[*prompt, *NEWLINE])]
    for options in ({}, {"sft": True}):
        splits = [read(tmp_path, variant, cache=tmp_path / "cache", **options).split for variant in variants]
        assert len({split.selection.digest for split in splits}) == 4
        assert [split[0].responses[0] for split in splits[1:]] == [chosen, merged, chosen]
        again = read(tmp_path, variants[1], cache=tmp_path / "cache", **options).split
        assert again.selection.digest == splits[1].selection.digest and again[0].responses[0] == chosen


def test_a_row_repeats_another_only_if_its_ids_do(tmp_path):
    """SFT drops a repeated target; equal texts of other ids are no repetition, and no equal pair."""
    row = sampled(1, False, rejected=" The answer is 1. ")
    chosen = row["sampled_ids"]["chosen"]
    row = with_ids(row, rejected=[*canonical(" The answer is 1. "), EOS])
    other = with_ids(row, chosen=row["sampled_ids"]["rejected"], rejected=chosen)
    data = read(tmp_path, row, other, other, sft=True)
    assert [example.responses[0] for example in data.split] == [chosen, other["sampled_ids"]["chosen"]]
    assert len(read(tmp_path, row).split) == 1
    equal = read(tmp_path, row, with_ids(row, rejected=chosen))
    assert len(equal.split) == 1 and equal.counts["dropped: both responses are equal"] == 1


def test_the_better_response_of_two_scores_has_its_own_ids(tmp_path):
    row = sampled(1, False, score_chosen=0, score_rejected=3)
    (example,) = read(tmp_path, row, score_chosen="score_chosen", score_rejected="score_rejected").split
    ids = row["sampled_ids"]
    assert (example.responses, example.text.scores) == ((ids["rejected"], ids["chosen"]), (3, 0))
    assert example.text.responses == (row["rejected"], row["chosen"])


def test_single_responses_have_the_ids_of_a_completion(tmp_path):
    row = sampled(1, True)
    ids = {"prompt": row["sampled_ids"]["prompt"], "completion": row["sampled_ids"]["chosen"]}
    completion = {"prompt": row["prompt"], "completion": row["chosen"], "label": False, "sampled_ids": ids}
    conversation = {"messages": [*row["prompt"], *row["chosen"]], "label": True, "sampled_ids": ids}
    for data in (read(tmp_path, completion, conversation, labels=True), read(tmp_path, conversation, sft=True)):
        assert {(tuple(each.prompt), tuple(each.responses[0])) for each in data.split} == {
            (tuple(ids["prompt"]), tuple(ids["completion"]))
        }


def test_what_no_text_could_be_is_kept_with_its_ids(tmp_path):
    """Texts with eos, dialogues as answers, messages as JSON, and turns that the template would refuse or change."""
    texts = ["Yes<|endoftext|>no.", "\n\nHuman: And?\n\nAssistant: So.", '[{"role": "user", "content": "Hi."}]']
    for is_chat in (False, True):
        for text in texts:
            row, ids = sampled(1, is_chat), letters(text)
            other = f"{text} Or not."
            for side, answer in (("chosen", text), ("rejected", other)):
                row[side] = [{"role": "assistant", "content": answer}] if is_chat else answer
            row = with_ids(row, chosen=[*ids, EOS], rejected=[*letters(other), EOS])
            (example,) = read(tmp_path, row).split
            assert example.responses[0] == [*ids, EOS]


@pytest.mark.parametrize("is_chat", [False, True])
def test_an_empty_sample_is_dropped(is_chat, tmp_path):
    row = with_ids(sampled(1, is_chat), rejected=[*NEWLINE, EOS])
    row["rejected"] = [{"role": "assistant", "content": "\n"}] if is_chat else "\n"
    assert read(tmp_path, row).counts["dropped: a response is empty"] == 1


@pytest.mark.parametrize("is_chat", [False, True])
def test_sampled_ids_are_truncated_by_the_limits_of_texts(is_chat, tmp_path):
    row = sampled(1, is_chat)
    ids = row["sampled_ids"]
    (example,) = read(tmp_path, row, max_length=24, max_prompt_length=10).split
    assert example.prompt == ids["prompt"][-10:] and example.truncated == ("prompt", "response")
    assert example.responses == (ids["chosen"][:14], ids["rejected"][:14])


def test_a_bos_is_neither_added_to_sampled_ids_nor_lost_by_truncation(tmp_path):
    row = sampled(1, False)
    prompt = row["sampled_ids"]["prompt"]
    (example,) = read(tmp_path, row, add_bos=True).split
    assert example.prompt == prompt
    bos = TOKENIZER.bos_token_id
    for ids, expected in ((prompt, prompt[-10:]), ([bos, *prompt], [bos, *prompt[-9:]])):
        limits = {"max_length": 24, "max_prompt_length": 10}
        (example,) = read(tmp_path, with_ids(row, prompt=ids), add_bos=True, **limits).split
        assert example.prompt == expected


MALFORMED = [
    ([1, 2], "sampled_ids must be an object with the token ids of prompt, chosen, rejected, not list"),
    ("[1, 2]", "sampled_ids must be an object with the token ids of prompt, chosen, rejected, not str"),
    ({"rejected": None}, "sampled_ids, rejected must be a list of token ids, at least one, not missing"),
    ({"chosen": []}, "sampled_ids, chosen must be a list of token ids, at least one, not []"),
    ({"chosen": [3, -1]}, "sampled_ids, chosen must be a list of token ids, at least one, not [3, -1]"),
    ({"prompt": [1.0]}, "sampled_ids, prompt must be a list of token ids, at least one, not [1.0]"),
    ({"prompt": [True]}, "sampled_ids, prompt must be a list of token ids, at least one, not [True]"),
    ({"prompt": [2**31]}, "sampled_ids, prompt must be a list of token ids, at least one, not [2147483648]"),
    ({"prompt": "1 2"}, "sampled_ids, prompt must be a list of token ids, at least one, not '1 2'"),
    (
        {"chosen": letters(" Never mind it")},
        "the sampled ids are those of ' Never mind it', not of ' The answer is 1. '",
    ),
]


@pytest.mark.parametrize("ids, problem", MALFORMED, ids=[problem[-30:] for _, problem in MALFORMED])
def test_malformed_ids_are_refused_with_the_row_and_the_remedy(ids, problem, tmp_path):
    row = sampled(1, False)
    wrong = with_ids(row, **ids) if isinstance(ids, dict) else row | {"sampled_ids": ids}
    with pytest.raises(UserError) as caught:
        read(tmp_path, row, wrong, on_inconsistent="drop")
    assert str(caught.value).startswith(f"{tmp_path}/train.jsonl, row 2: {problem}; ")
    assert str(caught.value).endswith("columns.sampled_ids=none tokenizes the texts")
    (_, plain) = read(tmp_path, row, wrong, sampled_ids="none").split
    assert plain.responses[0] == [*canonical(" The answer is 1. "), EOS]


def test_ids_of_a_list_of_responses_are_refused(tmp_path):
    row = {"prompt": "Hi.", "responses": ["a", "b"], "scores": [1, 2], "sampled_ids": {"prompt": [1]}}
    with pytest.raises(UserError, match="row 1: sampled_ids holds the ids of chosen and rejected, not of responses; "):
        read(tmp_path, row)


def test_ids_that_the_model_lacks_are_refused(tmp_path):
    highest = max(sampled(1, False)["sampled_ids"]["prompt"])
    with pytest.raises(UserError, match=f"row 1: .* id {highest}, .*; columns.sampled_ids=none tokenizes the texts"):
        read(tmp_path, sampled(1, False), vocab_size=highest)


def test_a_null_in_place_of_ids_tokenizes_the_texts(tmp_path):
    row = sampled(1, False)
    plain = read(tmp_path, without_ids(row)).split
    null = read(tmp_path, row | {"sampled_ids": None}).split
    assert null.selection.digest == plain.selection.digest and null[0].responses == plain[0].responses
