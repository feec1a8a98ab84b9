"""Two models compared: whose weights, which prompts, what a judge is asked, and what its answers come to."""

import json
import re
import shlex
import sys

import pytest
import torch
from conftest import ROOT
from omegaconf import OmegaConf

from dpo.reporting.comparison import Comparison, ask_judge
from dpo.system.errors import UserError
from tools import judges
from tools.compare import compare, find_candidate, load_model, parse_arguments, prompts_of_file, same_prompts

SHORT = ("n_examples=8", "n_eval_examples=8", "eval_batch_size=8", "do_first_eval=false", "max_length=100", "lr=1e-2")
HEAD = "import sys, json\nrows = [json.loads(line) for line in sys.stdin]\n"


def judge_command(answer: str) -> str:
    """Return a command that answers with a Python expression of a row."""
    code = f"{HEAD}print(*({answer} for row in rows), sep='\\n')"
    return shlex.join([sys.executable, "-c", code])


LONGER = judge_command("'A' if len(row['a']) > len(row['b']) else 'B' if len(row['a']) < len(row['b']) else 'tie'")


@pytest.fixture
def trained(make_trainer):
    """Return a function that trains a tiny model by one update and returns its run directory."""

    def train(*overrides):
        trainer = make_trainer(*SHORT, "warmup_steps=0", *overrides)
        trainer.train()
        return trainer.run.path

    return train


# Whose weights


def weights(candidate):
    return load_model(candidate, torch.device("cpu")).state_dict()


@pytest.mark.parametrize("lora", [(), ("lora=default",)], ids=["all weights", "adapter"])
def test_the_policy_has_the_trained_weights_and_the_reference_those_of_the_start(lora, trained):
    run = trained("loss=dpo", *lora)
    policy, reference = find_candidate(run), find_candidate(run, as_reference=True)
    assert (policy.name, reference.name) == ("dpo_tiny-gpt2", "reference of dpo_tiny-gpt2")
    found, start = weights(policy), weights(reference)
    saved = torch.load(run / "LATEST" / "policy.pt")["state"]
    saved = saved["weights"] if lora else saved
    kept = re.compile(r"\.default\b")
    named = {kept.sub("", name).removesuffix(".weight"): value for name, value in found.items()}
    for name, value in saved.items():
        assert torch.equal(named[name.removesuffix(".weight")], value), name
    moved = [name for name in found if not torch.equal(found[name], start[name])]
    assert moved and all(("lora_" in name) == bool(lora) for name in moved)


def test_a_policy_needs_no_more_what_its_run_started_from(trained, tmp_path):
    first = trained("loss=sft")
    second = trained("loss=dpo", f"model.archive='{first / 'LATEST' / 'policy.pt'}'")
    first.rename(tmp_path / "moved")
    assert find_candidate(second).weights == second / "LATEST" / "policy.pt"
    with pytest.raises(UserError, match="model.archive=.*: no such file"):
        find_candidate(second, as_reference=True)


def test_a_checkpoint_of_a_run_can_be_named_and_a_run_without_one_is_refused(trained, tmp_path):
    run = trained("loss=dpo")
    for name in ("step-8", "LATEST"):
        assert find_candidate(run / name).weights == run / name / "policy.pt"
    with pytest.raises(UserError, match=r"step-9/policy.pt: there is no such file; give a run that has written"):
        find_candidate(run / "step-9")
    with pytest.raises(UserError, match="not a run directory"):
        find_candidate(tmp_path)


def test_no_tracker_of_the_run_is_needed(trained, monkeypatch):
    run = trained("loss=dpo")
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("- wandb\n", "- trackio\n"))
    monkeypatch.setattr("dpo.settings.constraints.is_installed", lambda library: library != "trackio")
    assert "- trackio\n" in (run / "config.yaml").read_text() and find_candidate(run).settings.trackers == []


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
