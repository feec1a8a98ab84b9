"""What a run warns of before it starts: a long warmup, few evaluation examples, rows that are in both splits."""

import json

import pytest
from conftest import TINY, inputs_of


def rows(first, n, **values):
    return [{"prompt": f"prompt {i}", "chosen": f" {i}", "rejected": " no"} | values for i in range(first, first + n)]


@pytest.fixture
def warnings_of(tmp_path, capsys):
    """Return a function that gives the warnings of a run on train and test rows; each is printed once."""

    def load(train, test, *overrides):
        for split, lines in (("train", train), ("test", test)):
            (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        warnings = inputs_of(*TINY, f"datasets=['{tmp_path}']", "warmup_steps=0", *overrides).warnings
        printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: ")]
        assert printed == [f"Warning: {warning}" for warning in warnings]
        return warnings

    return load


def test_fewer_than_50_evaluation_pairs_are_too_few(warnings_of):
    dpo = ("loss=dpo", "n_eval_examples=100")
    assert warnings_of(rows(0, 8), rows(100, 50), *dpo) == []
    (warning,) = warnings_of(rows(0, 8), rows(100, 49), *dpo)
    assert warning.startswith("49 evaluation examples are too few") and warning.endswith("; hold out more.")
    assert warnings_of(rows(0, 8), rows(100, 1), *dpo)[0].startswith("1 evaluation example is too few")
    (warning,) = warnings_of(rows(0, 8), rows(100, 60), "loss=dpo", "n_eval_examples=20")
    assert warning.startswith("20 evaluation examples") and warning.endswith("; set n_eval_examples=50 or more.")
    assert warnings_of(rows(0, 8), rows(100, 2), "loss=sft") == []  # a loss is no share of pairs


def test_rows_in_both_splits_are_counted_from_one_percent_on(warnings_of):
    shared = rows(0, 1)
    assert warnings_of(rows(0, 8), shared + rows(100, 100), "loss=dpo", "n_eval_examples=256") == []  # 1 of 101
    (warning,) = warnings_of(rows(0, 8), shared + rows(100, 99), "loss=dpo", "n_eval_examples=256")
    assert warning.startswith("1 of 100 evaluation rows are also trained on")
    two = warnings_of(rows(0, 8), rows(0, 2), "loss=dpo")
    assert two[0].startswith("2 evaluation examples are") and two[1].startswith("2 of 2 evaluation rows")


def test_sft_compares_prompts_and_targets_and_pairs_compare_both_responses(warnings_of):
    """The test rows have other rejected responses: another pair, the same target."""
    other = rows(0, 60, rejected=" never")
    assert warnings_of(rows(0, 60), other, "loss=dpo", "n_eval_examples=60") == []
    (warning,) = warnings_of(rows(0, 60), other, "loss=sft")
    assert warning.startswith("60 of 60 evaluation rows are also trained on")
    assert warnings_of(rows(0, 60), rows(0, 60, chosen=" maybe"), "loss=sft") == []
