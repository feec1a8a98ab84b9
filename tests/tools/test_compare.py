"""Two models compared: whose weights, which prompts, what a judge is asked, and what its answers come to."""

import json
import re
import shlex
import sys

import pytest
from conftest import GOLDENS, ROOT
from omegaconf import OmegaConf

from dpo.reporting.comparison import Comparison, ask_judge
from dpo.system.errors import UserError
from tools import judges
from tools.candidates import find_candidate
from tools.compare import compare, parse_arguments, prompts_of_file, same_prompts

HEAD = "import sys, json\nrows = [json.loads(line) for line in sys.stdin]\n"


def judge_command(answer: str) -> str:
    """Return a command that answers with a Python expression of a row."""
    code = f"{HEAD}print(*({answer} for row in rows), sep='\\n')"
    return shlex.join([sys.executable, "-c", code])


LONGER = judge_command("'A' if len(row['a']) > len(row['b']) else 'B' if len(row['a']) < len(row['b']) else 'tie'")


# Prompts


def test_two_runs_on_the_same_pairs_have_the_same_prompts_each_in_its_own_tokens(trained):
    runs = [trained("loss=sft"), trained("loss=dpo", "max_prompt_length=40", "max_length=60")]
    candidates = [find_candidate(run) for run in runs]
    one, other = same_prompts(*candidates, None, None)
    assert one.for_judge() == other.for_judge() and len(set(one.for_judge())) == len(one.examples) > 4
    assert max(len(example.prompt) for example in other.examples) < max(len(example.prompt) for example in one.examples)
    assert [len(found.examples) for found in same_prompts(*candidates, None, 3)] == [3, 3]


def test_runs_on_other_pairs_need_a_file_of_prompts(trained, tmp_path):
    for split in ("train", "test"):
        row = {"prompt": "\n\nHuman: Hi.\n\nAssistant:", "chosen": " a", "rejected": " b"}
        (tmp_path / f"{split}.jsonl").write_text(f"{json.dumps(row)}\n" * 8)
    runs = [trained("loss=dpo"), trained("loss=dpo", f"datasets=['{tmp_path}']")]
    candidates = [find_candidate(run) for run in runs]
    with pytest.raises(UserError, match="the two runs evaluate on different prompts; give --prompts FILE"):
        same_prompts(*candidates, None, None)
    one, other = same_prompts(*candidates, tmp_path / "test.jsonl", None)
    assert one.for_judge() == other.for_judge() == [row["prompt"]] * 8


def test_a_file_holds_texts_or_messages_which_the_chat_template_renders(trained, tmp_path):
    candidate = find_candidate(trained("loss=dpo"))
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Name a river."}\n\n{"prompt": "Name a lake.", "chosen": " x"}\n')
    found = prompts_of_file(path, candidate, None)
    decoded = [found.tokenizer.decode(example.prompt) for example in found.examples]
    assert decoded == found.for_judge() == ["Name a river.", "Name a lake."] and found.stops == []
    assert prompts_of_file(path, candidate, 1).for_judge() == ["Name a river."]


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"text": "Hi"}', 'row 1: is not {"prompt": text or messages}'),
        ('"Hi"', 'row 1: is not {"prompt": text or messages}'),
        (
            '{"prompt": 3}',
            "row 1: a message has a form that cannot be used (prompt must be a list of messages, not int)",
        ),
        ('{"prompt": [{"role": "user", "content": "Hi"}]}', "the tokenizer has no chat template"),
        ("", "holds no prompt"),
    ],
)
def test_a_row_that_is_no_prompt_is_refused_by_its_number(line, reason, trained, tmp_path):
    candidate = find_candidate(trained("loss=dpo"))
    (tmp_path / "prompts.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match=re.escape(reason)):
        prompts_of_file(tmp_path / "prompts.jsonl", candidate, None)


def test_prompts_that_are_truncated_are_counted(trained, tmp_path, capsys):
    candidate = find_candidate(trained("loss=dpo"))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hi"}\n' + json.dumps({"prompt": "a b c " * 100}) + "\n")
    found = prompts_of_file(tmp_path / "prompts.jsonl", candidate, None)
    assert "1 of 2 prompts are truncated for dpo_tiny-gpt2." in capsys.readouterr().out
    assert len(found.examples[1].prompt) == candidate.settings.max_prompt_length


# The judge


def test_a_judge_sees_each_prompt_in_both_orders():
    """It prefers the text that is "x": with A's text first in the answers, with B's first in the swapped ones."""
    command = judge_command("'A' if row['a'] == 'x' else 'B' if row['b'] == 'x' else 'tie'")
    found = Comparison.judged(command, ["p", "q", "r"], ["x", "y", "y"], ["y", "x", "y"])
    assert (found.answers, found.swapped) == (["A", "B", "tie"], ["B", "A", "tie"])
    assert found.rows()[1] == {"prompt": "q", "a": "y", "b": "x", "answer_ab": "B", "answer_ba": "A"}
    assert found.summary()[0] == "3 prompts: A better on 1, B on 1, equal on 1"
    assert found.summary()[-1].endswith(
        "first 2 times, the second 2 times; its answer depends on the order for 0 prompts"
    )


def test_a_judge_that_prefers_what_is_shown_first_finds_two_models_equal_and_is_noticed():
    found = Comparison.judged(judge_command("'A'"), ["p", "q"], ["x", "x"], ["y", "yy"])
    summary = found.summary()
    assert summary[0] == "2 prompts: A better on 0, B on 0, equal on 2"
    assert summary[1].startswith("Win rate of A: 50.0%, 95% interval ")
    assert summary[-1].endswith("first 4 times, the second 0 times; its answer depends on the order for 2 prompts")


def test_texts_of_any_kind_reach_the_judge_as_they_are():
    odd = 'line\nbreak \u2028 "quoted" \U0001f600'
    command = judge_command("'A' if row['a'] == " + ascii(odd) + " and row['prompt'][0]['role'] == 'user' else 'tie'")
    assert ask_judge(command, [{"prompt": [{"role": "user", "content": "Hi"}], "a": odd, "b": ""}]) == ["A"]


@pytest.mark.parametrize(
    "command, reason",
    [
        ("no-such-command-anywhere", "cannot be started"),
        ("", "cannot be started"),
        (judge_command("sys.exit(3)"), "failed with exit code 3"),
        (judge_command("'A\\nB'"), "gave 2 answers to 1 questions"),
        (judge_command("'C'"), "line 1 of its answers is 'C', not A, B or tie"),
    ],
)
def test_a_judge_that_fails_or_answers_something_else_is_refused(command, reason):
    with pytest.raises(UserError, match=reason):
        ask_judge(command, [{"prompt": "", "a": "", "b": ""}])


def test_answers_may_be_in_small_letters_among_blank_lines():
    assert ask_judge(judge_command("' b \\n'"), [{"prompt": "", "a": "", "b": ""}]) == ["B"]


# The whole


def test_two_runs_are_compared_and_the_reference_is_the_model_that_a_run_started_from(trained, tmp_path):
    """DPO starts from SFT's weights, so SFT's policy and DPO's reference write the same texts for the same prompts."""
    first = trained("loss=sft")
    second = trained("loss=dpo", f"model.archive='{first / 'LATEST' / 'policy.pt'}'")
    found = [compare(parse_arguments([str(second), b, "--judge", LONGER])) for b in (str(first), "reference")]
    assert found[0] == found[1] and found[0].a != found[0].b
    scores = [(len(a) > len(b)) - (len(a) < len(b)) for a, b in zip(found[0].a, found[0].b, strict=True)]
    assert {1: "A", -1: "B", 0: "tie"}[scores[0]] == found[0].answers[0]
    n = len(scores)
    expected = f"{n} prompts: A better on {scores.count(1)}, B on {scores.count(-1)}, equal on {scores.count(0)}"
    assert found[0].summary()[0] == expected


def test_both_models_are_sampled_as_the_first_runs_settings_say(trained):
    """A run and a copy of it with another temperature: their texts differ only if each is sampled its own way."""
    run = trained("loss=dpo")
    other = run.with_name("other")
    other.mkdir()
    (other / "LATEST").symlink_to(run / "LATEST")
    config = OmegaConf.load(run / "config.yaml")
    config.sample_temperature = 0.01
    OmegaConf.save(config, other / "config.yaml")
    found = compare(parse_arguments([str(run), str(other), "--judge", LONGER]))
    assert found.a == found.b
    cold = compare(parse_arguments([str(other), str(run), "--judge", LONGER]))
    assert cold.a == cold.b != found.a


def test_a_models_folder_is_compared_with_a_run_on_its_prompts_and_with_its_settings(trained, tmp_path):
    """The export of a run is its policy: sampled with the run's settings, not the defaults, it writes the same."""
    run = trained("loss=dpo", "sample_temperature=0.5")
    folder = tmp_path / "copied"
    (run / "LATEST" / "hf").rename(folder)
    for names in ([str(folder), str(run)], [str(run), str(folder)]):
        found = compare(parse_arguments([*names, "--judge", LONGER, "--n", "4"]))
        assert found.a == found.b and len(found.a) == 4 and len("".join(found.a)) > 0


def test_two_models_folders_need_a_file_of_prompts(trained, tmp_path):
    folder = trained("loss=dpo") / "LATEST" / "hf"
    arguments = [str(folder), str(GOLDENS / "tiny-gpt2"), "--judge", LONGER]
    with pytest.raises(UserError, match="neither is a run, so nothing says what to ask; give --prompts FILE"):
        compare(parse_arguments(arguments))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Name a river."}\n{"prompt": "Name a lake."}\n')
    found = compare(parse_arguments([*arguments, "--prompts", str(tmp_path / "prompts.jsonl")]))
    assert found.prompts == ["Name a river.", "Name a lake."] and found.a != found.b


def test_a_folder_that_is_neither_a_run_nor_a_model_is_named_as_it_was_given(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path / 'no'}: not a run directory: it holds no config.yaml"):
        compare(parse_arguments([str(tmp_path / "no"), "reference", "--judge", LONGER]))


# The pages


def test_every_command_of_the_page_parses(capsys):
    text = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")
    commands = re.findall(r"^ +python -m tools\.compare (.+)$", text, re.MULTILINE)
    for command in commands:
        options = parse_arguments(shlex.split(command))
        assert options.judge
    own = re.findall(r"python -m tools\.judges ([^\"`\n]+)", text)
    for command in own:
        judges.parse_arguments(shlex.split(command))
    assert len(commands) >= 4 and {command.split()[0] for command in own} == {"demo", "openai", "reward"}
