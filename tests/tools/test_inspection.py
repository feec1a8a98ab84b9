"""inspect=N: what a run would train on, printed before any weights load."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import TINY, compose

import train
from dpo.data.batches import Batch, BatchIterator
from dpo.data.examples import TextExample, Tokenization, TokenizedExample
from dpo.system.signals import Signals
from tools.inspection import (
    TokenPrinter,
    doubt_lines,
    example_lines,
    histogram,
    legend,
    length_lines,
    lost_tokens,
)

LEGEND = "Tokens: prompt, context, [trained], {end of turn}, ~cut~"


@pytest.fixture
def inspect(tmp_path, capsys, monkeypatch):
    """Return a function that prints the inspection of pairs, with a test split."""

    def no_weights(*_):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("build.load_models", no_weights)

    def run(rows, test_rows, *overrides, names=("prompt", "chosen", "rejected")):
        for split, table in (("train", rows), ("test", test_rows)):
            lines = [json.dumps(dict(zip(names, row, strict=True))) for row in table]
            (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
        settings = [
            *TINY,
            "loss=dpo",
            f"datasets=['{tmp_path}']",
            "batch_size=2",
            f"local_run_dir='{tmp_path / 'run'}'",
        ]
        train.run(compose(*settings, "max_length=20", "max_prompt_length=10", *overrides), Signals(), ())
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().out

    return run


def test_examples_are_shown_token_by_token_and_nothing_is_trained(inspect):
    out = inspect([("Hi.", " Yes.", " No.")] * 2, [("Hi.", " Yes.", " No.")], "inspect=1")
    lines = out.splitlines()
    assert LEGEND in lines
    (head,) = [line for line in lines if re.search(r", row \d: 3 tokens of prompt, \d, \d to train on$", line)]
    shown = lines[lines.index(head) + 1 : lines.index(head) + 4]
    assert shown[0] == "prompt: Hi."
    assert re.fullmatch(r"chosen: (\[[^]]+\])+\{<\|endoftext\|>\}", shown[1])
    assert re.sub(r"[][{}]", "", shown[1]) == "chosen:  Yes.<|endoftext|>"
    assert len([line for line in lines if line.startswith("chosen: ")]) == 1


def test_ids_and_positions_are_shown_on_request(inspect):
    out = inspect([("Hi.", " Y", " N")] * 2, [("Hi.", " Y", " N")], "inspect=1", "inspect_ids=true")
    rows = re.findall(r"^ +(\d+) +(\d+) (prompt|trained|end of turn) +'(.*)'$", out, re.MULTILINE)
    positions = [int(position) for position, *_ in rows]
    n_prompt = sum(kind == "prompt" for _, _, kind, _ in rows)
    n_chosen = positions[n_prompt:].index(n_prompt, 1)
    assert positions == [*range(n_prompt + n_chosen), *range(n_prompt, n_prompt + len(rows) - n_prompt - n_chosen)]
    assert "".join(text for _, _, kind, text in rows if kind == "prompt") == "Hi."


def test_what_is_cut_is_shown(inspect):
    out = inspect([("abcdefghijklmnop", " Y", "xyz" * 9)] * 2, [("a", " Y", " N")], "inspect=1")
    assert "cut: prompt, response" in out
    assert re.search(r"^prompt: ~[a-i]+~[a-p]+p$", out, re.MULTILINE)
    assert re.search(r"^rejected: (\[[xyz]+\])+~[xyz]+<\|endoftext\|>~$", out, re.MULTILINE)


def test_doubtful_pairs_lengths_and_the_cost_of_layouts_are_counted(inspect):
    """Rows 1 and 2 are equal, row 3 says the opposite; of two test rows one is trained on, and both prompts are."""
    rows = [("a", " long one", " b"), ("a", " long one", " b"), ("a", " b", " long one"), ("c", " d", " e")]
    out = inspect(rows, [("c", " d", " e"), ("a", " new", " e")], "inspect=1")
    assert "The chosen response is longer in 50.0% of the pairs, equally long in 25.0%." in out
    assert "Of 4 training examples 1 repeat an earlier one." in out
    assert "1 contradict an earlier one: the same pair in the opposite order." in out
    assert "Of 2 test examples 1 are also training examples, 2 share a prompt with one." in out
    packed, padded = (int(n) for n in re.search(r"computed: (\d+) packed .*, (\d+) padded", out).groups())
    assert packed < padded


def test_sft_has_one_response(inspect):
    out = inspect(
        [("Hi.", " Yes.", " No."), ("Ho.", " Yes.", " No.")], [("Hi.", " Yes.", " No.")], "loss=sft", "inspect=1"
    )
    assert "target: " in out and "rejected" not in out.split("Lengths in tokens")[1]


def test_rows_with_a_label_are_shown_by_it(tmp_path, inspect):
    """Row 2 is row 1 again, row 3 has the other label; of two test rows one is row 3, the other has its label only."""
    rows = [("a", " one", True), ("a", " one", True), ("a", " one", False), ("c", " d e f", False)]
    names = ("prompt", "completion", "label")
    out = inspect(rows, [("a", " one", False), ("c", " d e f", True)], "loss=kto", "inspect=4", names=names)
    shown = sorted(line.split(": ")[0] for line in out.split("Lengths")[0].splitlines() if "{<|endoftext|>}" in line)
    assert shown == ["desirable", "desirable", "undesirable", "undesirable"]
    assert "  desirable: shortest" in out and "  undesirable: shortest" in out and "response is longer" not in out
    assert "Of 4 training examples 1 repeat an earlier one." in out
    assert "1 contradict an earlier one: the same response, the other label." in out
    assert "Of 2 test examples 1 are also training examples, 2 share a prompt with one." in out


# Several turns, weights


class Letters:
    """A tokenizer of one token per character."""

    def decode(self, ids):
        return "".join(map(chr, ids))

    def __call__(self, text):
        return [ord(character) for character in text]


def shown(example, whole=None):
    """Return the lines of an example, of which `whole` is what it is without limits."""
    printer = TokenPrinter(Letters(), in_color=False, with_ids=False)
    examples = SimpleNamespace(with_rules=lambda rules: {-1: whole} if rules.max_length >= 2**31 else None)
    batches = SimpleNamespace(tokenize=Tokenization(Letters(), 20, 10), examples=examples)
    return list(example_lines(example, batches, printer))


class Batches(list):
    """An iterator over batches of one example."""

    batch_size = 1

    def from_start(self):
        return iter(self)


def letters(*responses, truncated=(), **fields):
    """Return a conversation of characters: capitals are context, and . ends a turn of the assistant."""
    text = TextExample("p", responses, "keep_end", 3, "mine", **fields)
    ids = tuple(map(Letters(), responses))
    masks = tuple([not character.isupper() for character in response] for response in responses)
    return TokenizedExample(text, Letters()("p"), ids, truncated, masks)


def test_context_is_not_in_brackets_and_each_turn_has_its_end():
    head, prompt, chosen, rejected = shown(letters("ab.TOOLc.", "d."))
    assert head == "\nmine, row 3: 1 tokens of prompt, 5, 2 to train on; 4, 0 of context"
    assert (prompt, chosen, rejected) == ("prompt: p", "chosen: [a][b]{.}TOOL[c]{.}", "rejected: [d]{.}")


def test_what_is_cut_of_several_turns_is_trained_nowhere():
    whole = letters("ab.TOOLc.", truncated=("response",))
    kept = replace(whole, responses=(whole.responses[0][:5],), loss_masks=(whole.loss_masks[0][:5],))
    *_, target = shown(kept, whole)
    assert target == "target: [a][b]{.}TO~OLc.~"


def test_weight_scores_and_warnings_are_shown_where_an_example_has_them():
    warnings = ("the chat template leaves out a thought of an earlier turn", "it is odd")
    head, *_ = shown(letters("a.", "b.", scores=(4.0, 2.5), numbers={"weight": 0.5}, warnings=warnings))
    expected = f"scores: 4, 2.5; weight: 0.5; {warnings[0]}; it is odd"
    assert head.endswith(f"; 0, 0 of context; {expected}")


def test_the_time_that_a_template_sees_is_shown_if_one_is_set():
    printer, time = TokenPrinter(Letters(), False, False), "2026-01-31 12:00:00"
    lines = list(legend(SimpleNamespace(chat_template_time=time), printer))
    assert lines[1:] == [f"The time that the chat template sees: {time}"]
    assert len(list(legend(SimpleNamespace(chat_template_time=None), printer))) == 1


def test_lengths_of_responses_are_those_of_their_trained_tokens():
    lines = list(length_lines(Batches([Batch([letters("ab.TOOLc.", "d.")], {})]), 100))
    assert "  chosen: shortest 5, median 5, longest 5" in lines
    assert "Tokens computed: 12 packed" in lines[-1]


def test_a_target_that_comes_again_contradicts_nothing():
    text = TextExample("a", (" b",), "keep_end", 1, "")
    batches = BatchIterator([SimpleNamespace(text=text)] * 2, None, 1)
    lines = list(doubt_lines(batches, batches))
    assert lines[0].startswith("Of 2 training examples 1 repeat") and lines[1].startswith("0 contradict an earlier one")


def test_a_histogram_has_a_line_per_bin_that_is_not_empty():
    """Of 1, 20, 20 and 5000 the bins from 0, 16 and 4096 hold 1, 2 and 1; the longest bar has 40 characters."""
    head, *lines = histogram("prompt", [1, 20, 5000, 20])
    assert head == "  prompt: shortest 1, median 20, longest 5,000"
    assert [(line.split(":")[0].split()[-1], line.count("#")) for line in lines] == [
        ("0", 20),
        ("16", 40),
        ("4,096", 20),
    ]


@pytest.mark.parametrize(
    "whole, kept, lost",
    [([1, 2, 3, 4], [3, 4], [1, 2]), ([1, 2, 3, 4], [1, 2], [3, 4]), ([9, 1, 2, 3], [9, 3], [1, 2])],
)
def test_what_a_shorter_prompt_lacks_is_found_at_its_start_end_or_after_the_system_turn(whole, kept, lost):
    assert lost_tokens(whole, kept) == lost
