"""The scorers: their settings, their answers, and what is refused."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from fake_server import serve
from tiny_classifiers import write_classifier

from dpo.settings.schema import build
from dpo.system.errors import UserError
from tools.rounds import scorers
from tools.rounds.scorers import SCORERS, Request

PROMPT = "Name a river."
CHAT = [{"role": "user", "content": PROMPT}]


REQUIRED = {
    "function": {"function": "score:f"},
    "reward": {"model": "m"},
    "classifier": {"model": "m", "label": "good"},
    "command": {"command": "sh"},
    "judge": {"url": "http://localhost:80/v1", "model": "m"},
}


def build_scorer(name, **values):
    """Build a scorer of the values in its file, those that it requires and some of one's own."""
    values = read_file(name) | REQUIRED[name] | values
    return build(SCORERS[name], {f"scorer.{key}": value for key, value in values.items()}, "scorer.", [])


def read_file(name):
    values = yaml.safe_load((ROOT / "config" / "scorer" / f"{name}.yaml").read_text())
    assert values.pop("name") == name
    return values


def make(name, **values):
    scorer, problems = build_scorer(name, **values)
    assert not problems
    return scorer


def ask(scorer, *texts, prompt=PROMPT):
    """The answers about texts, each a text or a pair, in their order."""
    requests = [Request(prompt, (text,) if isinstance(text, str) else text) for text in texts]
    with scorer.opened("cpu") as answer:
        answers = {request.texts: value for request, value in answer(scorer.batches(requests))}
    return [answers[request.texts] for request in requests]


# Settings


@pytest.mark.parametrize("name", SCORERS)
def test_every_key_of_a_scorers_file_is_a_field_of_its_class_and_has_a_comment(name):
    values = read_file(name)
    assert values.keys() == SCORERS[name].model_fields.keys()
    assert {key for key, value in values.items() if value == "???"} == REQUIRED[name].keys()
    assert not build_scorer(name)[1]
    text = (ROOT / "config" / "scorer" / f"{name}.yaml").read_text()
    assert all(re.search(rf"^{key}: .+ # \w", text, re.MULTILINE) for key in values)


def test_the_scorers_are_those_that_have_a_file():
    assert {path.stem for path in (ROOT / "config" / "scorer").glob("*.yaml")} == SCORERS.keys()


@pytest.mark.parametrize(
    "name, key, value, line",
    [
        ("function", "function", "score", "scorer.function=score: must be module:function, as in score:length"),
        ("reward", "model", " ", "scorer.model= : must be a local folder or a name on the Hub"),
        ("reward", "batch_size", 0, "scorer.batch_size=0: must be a whole number of texts, 1 or more"),
        ("command", "timeout", 0, "scorer.timeout=0: must be a number above 0"),
        ("judge", "url", "localhost", "scorer.url=localhost: must be a URL, as in http://localhost:8000/v1"),
        ("judge", "mode", "both", "scorer.mode=both: must be one of pairwise, grade"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(name, key, value, line):
    _, problems = build_scorer(name, **{key: value})
    assert list(problems.values()) == [line]


@pytest.mark.parametrize(
    "scorer, line",
    [
        (
            make("command", command="no-such-program x"),
            r"scorer.command='no-such-program x': there is no program no-such",
        ),
        (
            make("judge", url="http://h/v1/chat/completions/", model="m"),
            "scorer.url=.*: must be the part before /chat/comp",
        ),
    ],
)
def test_what_would_fail_later_is_refused_before_anything_loads(scorer, line):
    (problem,) = scorer.problems()
    assert re.match(line, problem)


def test_scorers_that_can_be_used_have_no_problems():
    assert not [*make("judge", url="http://h:80/v1", model="m").problems(), *make("command", command="sh").problems()]


def test_a_request_is_described_in_one_line_by_the_beginnings_of_its_texts():
    line = Request([{"role": "user", "content": "a\nb" + "c" * 100}], ("x" * 60, "y" * 61)).describe()
    texts = "x" * 60, "y" * 57 + "...", "a\nb" + "c" * 54 + "..."
    assert line == "the response {!r} or {!r} to the prompt {!r}".format(*texts)
    assert "\n" not in line


# A function


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Return a function that writes a module in the current folder and makes a scorer of its function f."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    names = []

    def write(code, function="f"):
        names.append(f"score_{len(names)}_of_{tmp_path.name}")
        Path(f"{names[-1]}.py").write_text(code)
        return make("function", function=f"{names[-1]}:{function}")

    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "value", ["3", "3.0", "numpy.float32(3)", "numpy.int64(3)", "torch.tensor(3.0)", "torch.ones(1) * 3"]
)
def test_a_function_may_return_any_kind_of_number(value, module):
    (answer,) = ask(module(f"import numpy, torch\ndef f(prompt, response): return {value}"), "x")
    assert answer == 3.0 and type(answer) is float


def test_a_function_gets_prompt_and_response(module):
    assert ask(module("def f(prompt, response): return len(prompt) > len(response)"), "x", "y" * 20) == [1.0, 0.0]


@pytest.mark.parametrize("value", ["'3'", "None", "torch.ones(2)", "[1]", "1j", "10 ** 400"])
def test_what_is_no_number_is_refused_and_names_the_request(value, module):
    with pytest.raises(
        UserError, match="scorer.function=.* instead of a number, for the response 'x' to the prompt 'Name"
    ):
        ask(module(f"import torch\ndef f(prompt, response): return {value}"), "x")


def test_a_function_that_raises_is_named_with_its_error_and_the_request(module):
    code = "def f(prompt, response): return {'a': 1}[response]"
    with pytest.raises(
        UserError, match="failed with KeyError: 'b', for the response 'b' to the prompt 'Name a river.'$"
    ):
        ask(module(code), "a", "b")


def test_a_function_that_changes_messages_changes_only_its_own(module):
    scorer, chat = module("def f(prompt, response): prompt.append(1); return len(prompt)"), list(CHAT)
    assert ask(scorer, "a", "b", prompt=chat) == [2.0, 2.0] and chat == CHAT


@pytest.mark.parametrize(
    "code, function, cause",
    [
        ("import no_such_thing", "f", "cannot be imported (ModuleNotFoundError: No module named 'no_such_thing')"),
        ("f = = 1", "f", "cannot be imported (SyntaxError: invalid syntax"),
        ("g = 1", "f", "has no function f"),
        ("f = 1", "f", "has no function f"),
    ],
)
def test_a_function_that_is_not_there_is_refused_before_anything_is_sampled(code, function, cause, module):
    with pytest.raises(UserError, match=re.escape(cause)) as caught:
        module(code, function).fingerprint()
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="No module named 'no_such_module'"):
        make("function", function="no_such_module:f").fingerprint()


def test_a_functions_fingerprint_depends_on_its_file_and_its_name(module):
    scorer = module("def f(p, r): return 1\ndef g(p, r): return 2")
    file = Path(f"{scorer.function[:-2]}.py")
    first = scorer.fingerprint()
    assert make("function", function=scorer.function).fingerprint() == first
    assert make("function", function=scorer.function[:-1] + "g").fingerprint() != first
    file.write_text(file.read_text() + "# changed\n")
    assert scorer.fingerprint() != first


# Models of transformers


def test_a_reward_models_scores_are_those_of_one_text_at_a_time(tmp_path):
    model, tokenizer = write_classifier(tmp_path)
    texts = [" The Danube.", " Why?", " It is the Rhine, of which one hears so much.", " No."]
    with torch.no_grad():
        expected = [model(torch.tensor([tokenizer(PROMPT + text)["input_ids"]])).logits.item() for text in texts]
    assert len({round(score, 2) for score in expected}) == 4
    for batch_size in (1, 3):
        scorer = make("reward", model=str(tmp_path), batch_size=batch_size)
        assert ask(scorer, *texts) == pytest.approx(expected, abs=1e-5)


def test_batches_have_texts_of_similar_length_and_begin_with_the_longest(tmp_path):
    requests = [Request(PROMPT, ("x" * n,)) for n in (3, 1, 4, 9, 5)]
    batches = make("reward", model="m", batch_size=2).batches(requests)
    assert [[len(request.texts[0]) for request in batch] for batch in batches] == [[9, 5], [4, 3], [1]]


def test_a_reward_model_refuses_a_text_that_is_too_long_for_it(tmp_path):
    write_classifier(tmp_path, max_position_embeddings=16)
    with pytest.raises(
        UserError, match="takes at most 16 tokens, and there are [0-9]+ of the response ' x x.* lower max_len"
    ):
        ask(make("reward", model=str(tmp_path)), " x" * 40, " x")


def test_a_reward_model_with_several_labels_or_without_files_is_refused_before_its_weights_are_read(tmp_path):
    with pytest.raises(UserError, match="^scorer.model=.*nothing: there is no such folder"):
        make("reward", model=str(tmp_path / "nothing")).fingerprint()
    write_classifier(tmp_path, num_labels=2)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        UserError, match=f"^scorer.model={tmp_path}: gives 2 scores per text; a reward model gives one$"
    ):
        make("reward", model=str(tmp_path)).fingerprint()


LABELS = {"id2label": {0: "bad", 1: "good", 2: "neither"}, "label2id": {"bad": 0, "good": 1, "neither": 2}}


@pytest.mark.parametrize("problem_type", [None, "multi_label_classification"])
def test_a_classifiers_score_is_the_log_odds_of_its_label_for_the_response_alone(problem_type, tmp_path):
    model, tokenizer = write_classifier(tmp_path, num_labels=3, problem_type=problem_type, **LABELS)
    texts = ["The Danube.", "Why?"]
    expected = []
    for text in texts:
        logits = model(torch.tensor([tokenizer(text)["input_ids"]])).logits[0]
        share = logits.sigmoid()[1] if problem_type else logits.softmax(0)[1]
        expected.append(torch.logit(share).item())
    scorer = make("classifier", model=str(tmp_path), label="good")
    assert ask(scorer, *texts) == pytest.approx(expected, abs=1e-4)
    assert ask(scorer, *texts, prompt="Another prompt.") == ask(scorer, *texts)


def test_a_classifier_reads_the_beginning_of_a_long_response_and_counts_it(tmp_path, capsys):
    write_classifier(tmp_path, num_labels=3, max_position_embeddings=16, **LABELS)
    scorer = make("classifier", model=str(tmp_path), label="good")
    first, second, _ = ask(scorer, "x " * 40 + "a", "x " * 40 + "b", "y")
    assert first == pytest.approx(second, abs=1e-5)
    assert f"scorer.model={tmp_path}: scored the first 16 tokens of 2 of 3 responses." in capsys.readouterr().out


def test_a_label_that_a_classifier_does_not_have_is_refused_with_those_that_it_has(tmp_path):
    write_classifier(tmp_path, num_labels=3, **LABELS)
    with pytest.raises(UserError, match="^scorer.label=GOOD: must be one of bad, good, neither$"):
        make("classifier", model=str(tmp_path), label="GOOD").fingerprint()
    prints = {make("classifier", model=str(tmp_path), label=label).fingerprint() for label in ("bad", "good")}
    assert len(prints) == 2
    write_classifier(tmp_path / "one", num_labels=1)
    with pytest.raises(UserError, match="has one label, as reward models do; set scorer=reward$"):
        make("classifier", model=str(tmp_path / "one"), label="LABEL_0").fingerprint()


# A command


@pytest.fixture
def program(tmp_path):
    """Return a function that writes a Python program and makes a scorer of it."""

    def write(code, **settings):
        (tmp_path / "program.py").write_text(code)
        return make("command", command=shlex.join([sys.executable, str(tmp_path / "program.py")]), **settings)

    return write


LENGTHS = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    assert row.keys() == {"prompt", "response"}
    print(len(str(row["prompt"])) + len(row["response"]), flush=True)
"""


def test_a_command_reads_prompts_and_responses_and_writes_numbers(program):
    texts = ["a", "b\nc\u2028d", "\ud800"]
    assert ask(program(LENGTHS), *texts) == [len(PROMPT) + len(text) for text in texts]
    assert ask(program(LENGTHS), "a", prompt=CHAT) == [len(str(CHAT)) + 1]


@pytest.mark.parametrize("line", ["", "good", "0,5", "1 2"])
def test_a_line_that_is_no_number_is_refused_by_its_number_and_request(line, program):
    with pytest.raises(UserError, match=f"line 2 of its answers is {line!r}, not a number, for the response 'b' to"):
        ask(program(f"print(0.5)\nprint({line!r})\nprint(1)"), "a", "b", "c")


def test_a_commands_fingerprint_depends_on_the_files_that_it_names(program):
    first = program("print(1)").fingerprint()
    assert program("print(1)").fingerprint() == first
    assert program("print(2)").fingerprint() != first
    assert make("command", command="sh -c true").fingerprint() != make("command", command="sh -c false").fingerprint()


# A chat model


def judge(server, mode="pairwise", **settings):
    return make("judge", url=server.url, model="big", mode=mode, **settings)


def said(body):
    """The text of a request's first message."""
    return body["messages"][0]["content"]


def test_a_judge_compares_two_responses(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def reply(body):
        first, second = (f"<Answer {name}>\nlong" in said(body) for name in "AB")
        return "A" if first else "B" if second else "tie"

    with serve(reply) as server:
        pairs = [("long", "short"), ("short", "long"), ("short", "shorter")]
        assert ask(judge(server), *pairs) == [1.0, 0.0, 0.5]
    assert len(server.asked) == 3 and all(PROMPT in said(body) for body in server.asked)
    assert server.keys == {"Bearer secret"}


@pytest.mark.parametrize(
    "reply, grade",
    [
        ("7", 7),
        ("It is fine.\n**8/10**", 8),
        ("Of 5 facts, 3 are right: 6.5.", 6.5),
        ("[[10]]", 10),
        ("9 out of 10.", 9),
    ],
)
def test_a_judge_grades_a_response_by_the_last_number_of_its_reply(reply, grade):
    with serve(lambda body: reply) as server:
        assert ask(judge(server, "grade"), "The Danube.") == [grade]
    assert len(server.asked) == 1 and "The Danube." in said(server.asked[0]) and PROMPT in said(server.asked[0])


def test_a_judge_without_a_grade_is_reminded_once(capsys):
    with serve(lambda body: "Good!" if len(body["messages"]) == 1 else "7") as server:
        assert ask(judge(server, "grade"), "x") == [7.0]
    roles = [message["role"] for message in server.asked[1]["messages"]]
    assert roles == ["user", "assistant", "user"] and server.asked[1]["messages"][1]["content"] == "Good!"


@pytest.mark.parametrize("mode, fallback, calls", [("pairwise", 0.5, 1), ("grade", 5.5, 2)])
def test_a_reply_without_an_answer_counts_as_the_middle_and_is_counted(mode, fallback, calls, capsys):
    request = ("x", "y") if mode == "pairwise" else "x"
    with serve(lambda body: "11 people cannot know") as server:
        assert ask(judge(server, mode), request) == [fallback]
    assert len(server.asked) == calls
    printed = capsys.readouterr()
    assert "1 of 1 replies hold no answer; they count as " in printed.out and "cannot know" in printed.err


def test_a_judge_most_of_whose_replies_hold_no_answer_is_refused(monkeypatch):
    monkeypatch.setattr(scorers, "ENOUGH", 4)
    with serve(lambda body: "Hm.") as server:
        with pytest.raises(UserError, match="^scorer.model=big: 4 of its first 4 replies hold no answer; choose"):
            ask(judge(server, at_once=1), *[(str(n), "x") for n in range(10)])
    assert len(server.asked) == 4


def test_a_failed_request_is_named_with_the_servers_message():
    with serve(lambda body: (400, {}, {"error": {"message": "too long"}})) as server:
        cause = r"HTTP Error 400: Bad Request \(too long\), for the response 'x' or 'y' to the prompt 'Name a river.'"
        with pytest.raises(UserError, match=f"^scorer.url={server.url}: {cause}$"):
            ask(judge(server), ("x", "y"))


def test_a_judges_fingerprint_depends_on_model_and_mode_but_not_on_where_the_server_runs():
    def fingerprint(url="http://h/v1", model="m", mode="grade"):
        return make("judge", url=url, model=model, mode=mode).fingerprint()

    assert fingerprint(url="http://other:1/v1") == fingerprint()
    assert len({fingerprint(), fingerprint(model="n"), fingerprint(mode="pairwise")}) == 3
