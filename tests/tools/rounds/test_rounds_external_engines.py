"""Engines that are other programs: what they are asked, what becomes of their answers, and how they fail."""

import json
import math
import shlex
import socket
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace

import fake_server
import pytest
import torch
from conftest import GOLDENS, ROOT, TINY, validated
from fake_server import serve
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo.settings.schema import build
from dpo.system.errors import UserError
from tools import endpoints
from tools.candidates import Candidate
from tools.endpoints import Endpoint
from tools.rounds.external_engines import CommandEngine, ServerEngine, compare_logps
from tools.rounds.policies import Policy, sums_of_samples
from tools.rounds.records import Prompt, Sample, Task

TOKENIZER = AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2")
EOS = TOKENIZER.eos_token_id
PROMPT_IDS = TOKENIZER.encode("Human: Name a river.")
TEXT = " The Danube."
IDS = TOKENIZER.encode(TEXT)
ENGINES = {"server": ServerEngine, "command": CommandEngine}


def make(name, **settings):
    """Make an engine with the defaults of its YAML file, but for the given settings; UserError for wrong values."""
    defaults = OmegaConf.to_container(OmegaConf.load(ROOT / "config" / "engine" / f"{name}.yaml"))
    values = {key: value for key, value in defaults.items() if key != "name" and value != "???"} | settings
    engine, problems = build(ENGINES[name], {f"engine.{key}": value for key, value in values.items()}, "engine.", ())
    if problems:
        raise UserError(*problems.values())
    return engine


def make_settings(*overrides):
    return validated(*TINY, "loss=dpo", *overrides)


@pytest.fixture
def policy(tmp_path):
    settings, loss = make_settings("sample_temperature=0.7", "sample_top_p=0.9")
    return Policy(Candidate("first", settings, loss, None), TOKENIZER, [], tmp_path / "policies" / "0")


def make_tasks(n):
    prompt = Prompt(3, [{"role": "user", "content": "Name a river."}], "Human: Name a river.", PROMPT_IDS)
    return [Task.of(0, "round-1", prompt, index) for index in range(n)]


def draw(engine, policy, n=1):
    """Return the samples of n tasks by their index, and the error after them."""
    samples, error = [], None
    try:
        with engine.opened(policy, "cpu") as drawing:
            samples.extend(drawing(engine.batches(make_tasks(n))))
    except UserError as failure:
        error = str(failure)
        assert "\n" not in error
    return {sample.index: sample for sample in samples}, error


def drawn_before_failure(engine, policy, n):
    """The samples that arrive before an engine fails, and the error."""
    samples = {}
    with pytest.raises(UserError) as failure, engine.opened(policy, "cpu") as drawing:
        for sample in drawing(engine.batches(make_tasks(n))):
            samples[sample.index] = sample
    assert "\n" not in str(failure.value)
    return samples, str(failure.value)


# A server


def completion(text=TEXT, reason="stop", **others):
    return {"choices": [{"text": text, "finish_reason": reason, **others}]}


def engine_of(server, **settings):
    """Make an engine of a server in a thread, which answers after its command, that does nothing, was started."""
    server.starts = 1
    settings = {"url": server.url, "command": "sh -c 'exec sleep 3600' {model}"} | settings
    return make("server", **settings)


@pytest.fixture
def server():
    """Serve completions in a thread."""
    with serve(lambda body: completion()) as http:
        yield http


def test_a_request_has_the_limits_and_the_distribution_of_the_run(server, policy, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    samples, error = draw(engine_of(server), policy)
    assert error is None and list(samples) == [0]
    (body,) = server.asked
    assert (server.paths, server.keys) == ({"/v1/completions"}, {"Bearer secret"})
    (task,) = make_tasks(1)
    assert body == {
        "model": str((GOLDENS / "tiny-gpt2").resolve()),
        "prompt": PROMPT_IDS,
        "max_tokens": 160 - len(PROMPT_IDS),
        "seed": task.seed,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0,
        "repetition_penalty": 1,
        "logprobs": 1,
        "stop_token_ids": [EOS],
        "add_special_tokens": False,
        "return_token_ids": True,
    }


def test_a_server_that_takes_no_ids_gets_the_text_and_a_model_of_its_own_name(server, policy):
    draw(engine_of(server, prompt="text", model="big"), policy)
    (body,) = server.asked
    assert server.keys == {None}
    assert (body["prompt"], body["model"]) == ("Human: Name a river.", "big")


def test_ids_are_kept_as_they_are_and_the_stop_token_is_added_if_they_lack_it(server, policy):
    ids = [*IDS[:-1], *TOKENIZER.encode("."), IDS[0]]  # not what its own text would be tokenized to
    replies = {
        0: completion("x", token_ids=[*ids, EOS], logprobs={"token_logprobs": [-0.5] * (len(ids) + 1)}),
        1: completion("x", token_ids=ids, logprobs={"token_logprobs": [-0.5] * len(ids)}),
        2: completion("x", "length", token_ids=ids),
        3: completion("x", token_ids=ids, stop_reason=7),
    }
    by_seed = {task.seed: replies[task.index] for task in make_tasks(4)}
    server.reply = lambda body: by_seed[body["seed"]]
    samples, error = draw(engine_of(server), replace(policy, stops=[5, 7]), 4)
    assert error is None
    text = TOKENIZER.decode(ids)
    assert samples[0] == Sample("round-1/3/0", 3, 0, text, [*ids, EOS], True, -0.5 * (len(ids) + 1))
    assert samples[1] == Sample("round-1/3/1", 3, 1, TOKENIZER.decode([*ids, 5]), [*ids, 5], True, None)
    assert samples[2] == Sample("round-1/3/2", 3, 2, text, ids, False, None)
    assert samples[3].ids == [*ids, 7]
    server.reply = lambda body: completion("x", "length", token_ids=[*ids, EOS, *ids])  # it did not stop
    samples, _ = draw(engine_of(server), policy)
    assert samples[0] == Sample("round-1/3/0", 3, 0, text, [*ids, EOS], True, None)


def test_a_text_is_tokenized_once_and_ended(server, policy):
    n = len(IDS) + 1
    server.reply = lambda body: completion(logprobs={"token_logprobs": [-1.0] * n})
    samples, _ = draw(engine_of(server), policy)
    assert samples[0] == Sample("round-1/3/0", 3, 0, TEXT, [*IDS, EOS], True, -n)
    server.reply = lambda body: completion(reason="length", logprobs={"token_logprobs": [-1.0] * (n + 1)})
    samples, _ = draw(engine_of(server), policy)
    assert samples[0] == Sample("round-1/3/0", 3, 0, TEXT, IDS, False, None)


@pytest.mark.parametrize(
    "text",
    [
        f"a river{TOKENIZER.eos_token} or two",  # sampled as other tokens than eos
        "a river \N{REPLACEMENT CHARACTER}",  # sampled as bytes that are no character
        "a river " * 80,  # more tokens than were asked for, so that they were others
    ],
)
def test_a_text_that_its_tokens_do_not_give_again_counts_as_unfinished(text, server, policy, capsys):
    server.reply = lambda body: completion(text)
    samples, error = draw(engine_of(server), policy)
    assert error is None and (samples[0].text, samples[0].finished) == (text, False)
    assert 0 < len(samples[0].ids) <= 160 - len(PROMPT_IDS)
    assert "1 samples count as unfinished" in capsys.readouterr().out


def test_a_busy_server_is_asked_again(server, policy, monkeypatch):
    monkeypatch.setattr(endpoints, "PAUSE", 0)
    replies = [(500, {}, {}), (429, {}, {}), completion()]
    server.reply = lambda body: replies.pop(0)
    samples, error = draw(engine_of(server), policy)
    assert error is None and samples[0].text == TEXT and len(server.asked) == 3


def test_samples_that_arrived_before_a_failure_are_kept(server, policy):
    failing = make_tasks(6)[4].seed
    refusal = (400, {}, {"error": "too long"})
    server.reply = lambda body: refusal if body["seed"] == failing else completion()
    samples, error = drawn_before_failure(engine_of(server, at_once=1), policy, 6)
    assert list(samples) == [0, 1, 2, 3]
    cause = "HTTP Error 400: Bad Request (too long), for sample round-1/3/4"
    assert error.startswith(f"engine.url={server.url}: {cause}; ")
    assert "resume=OUT" in error


def test_a_server_that_hangs_is_given_up(server, policy):
    server.reply = lambda body: None
    _, error = draw(engine_of(server, timeout=0.3), policy)
    assert "no answer after 0.3 s" in error and len(server.asked) == 1


@pytest.mark.parametrize(
    "reply, cause",
    [
        ({"error": "x"}, 'the reply is no completion: {"error": "x"}'),
        ({"choices": []}, "the reply is no completion"),
        (["x"], "the reply is no completion"),
        (completion(reason="abort"), "its finish_reason is 'abort'"),
        (completion(None), "it has neither token ids nor a text"),
        (completion(token_ids=[]), "its ids are not a list of token ids"),
        (completion(token_ids=[1, 10**6]), "1000000 is not among the tokenizer's"),
        (completion(token_ids=[1, True]), "True is not among the tokenizer's"),
        (completion(token_ids=[1] * 160), "it has 160 tokens, and at most"),
        (completion(token_ids=[1, EOS], logprobs={"token_logprobs": [-1, math.inf]}), "its log-probability is inf"),
        (completion(token_ids=[1, EOS], logprobs={"token_logprobs": [-1, "x"]}), "its log-probability is 'x'"),
        (
            completion(prompt_token_ids=[EOS, *PROMPT_IDS]),
            f"reads the prompt as {len(PROMPT_IDS) + 1} other tokens",
        ),
        (completion() | {"usage": {"prompt_tokens": 99}}, "reads the prompt as 99 other tokens"),
    ],
)
def test_a_reply_that_cannot_be_a_sample_is_refused(reply, cause, server, policy):
    server.reply = lambda body: reply
    samples, error = draw(engine_of(server), policy)
    assert samples == {} and cause in error and ", for sample round-1/3/0; " in error


def test_a_prompt_that_is_read_as_it_was_sent_is_no_problem(server, policy):
    server.reply = lambda body: completion(prompt_token_ids=PROMPT_IDS) | {"usage": {"prompt_tokens": len(PROMPT_IDS)}}
    assert draw(engine_of(server), policy)[1] is None


def test_an_interrupted_run_sends_no_further_requests(server, policy):
    replies, going_on = [completion()], threading.Event()
    server.reply = lambda body: replies.pop() if replies else going_on.wait(60) and (500, {}, {})
    engine = engine_of(server, at_once=2)
    with pytest.raises(KeyboardInterrupt), engine.opened(policy, "cpu") as drawing:
        for _ in drawing(engine.batches(make_tasks(20))):
            raise KeyboardInterrupt
    going_on.set()
    for thread in threading.enumerate():
        if thread.name.startswith("ThreadPoolExecutor"):
            thread.join(30)
    assert len(server.asked) <= 4


# A server that is started


@pytest.fixture
def started():
    """Return a function that makes the engine of a fake server, which is a command."""

    def engine(*failure, **settings):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [sys.executable, fake_server.__file__, str(port), json.dumps(completion())]
        words += [*(failure or [""]), "{model}"]
        return make("server", url=f"http://127.0.0.1:{port}/v1", command=shlex.join(words), **settings)

    return engine


def log_of(policy):
    return policy.export.parent / "0-engine.log"


def test_a_server_is_started_for_the_policy_and_ended(started, policy, capsys):
    engine = started()
    samples, error = draw(engine, policy, 3)
    assert error is None and [samples[index].text for index in range(3)] == [TEXT] * 3
    assert log_of(policy).read_text() == f"loading ['{(GOLDENS / 'tiny-gpt2').resolve()}']\n"
    assert f"The server answers at {engine.url}" in capsys.readouterr().out
    assert not Endpoint("it", engine.url).answers()


def test_another_server_at_the_url_is_refused(started, policy):
    engine = started()
    port = int(engine.url.split(":")[-1].removesuffix("/v1"))
    with serve(lambda body: completion(), port=port) as other:
        assert "a server answers there before engine.command has started one" in draw(engine, policy)[1]
    assert other.asked == []


def test_a_server_that_dies_while_it_loads_is_reported_with_its_log(started, policy):
    _, error = draw(started("dies at once"), policy)
    assert "ended with exit code 1" in error and f"no memory / is left ({log_of(policy)})" in error


def test_a_server_that_never_answers_is_ended(started, policy):
    engine = started("never answers", start_timeout=0.3)
    _, error = draw(engine, policy)
    assert "engine.start_timeout=0.3: no answer at" in error and str(log_of(policy)) in error


def test_a_server_that_dies_later_leaves_its_samples(started, policy, monkeypatch):
    monkeypatch.setattr(endpoints, "PAUSE", 0)
    samples, error = drawn_before_failure(started("dies later", at_once=1), policy, 5)
    assert list(samples) == [0, 1]
    assert "for sample round-1/3/2; " in error and "the server ended with exit code 9" in error


def test_an_interrupted_run_ends_its_server(started, policy):
    engine = started()
    with pytest.raises(KeyboardInterrupt), engine.opened(policy, "cpu") as drawing:
        for _ in drawing(engine.batches(make_tasks(50))):
            raise KeyboardInterrupt
    assert not Endpoint("it", engine.url).answers()


# A command

HEAD = """
import json, os, signal, sys, time
tasks = [json.loads(line) for line in sys.stdin]
def give(task, **row):
    print(json.dumps({"id": task["id"], "finished": True} | row), flush=True)
"""


@pytest.fixture
def command(tmp_path):
    """Return a function that makes the engine of a Python program, which has tasks and give."""

    def engine(code, **settings):
        path = tmp_path / "my engine.py"
        path.write_text(HEAD + code)
        return make("command", command=shlex.join([sys.executable, str(path), "{model}"]), **settings)

    return engine


def test_a_command_reads_tasks_and_gives_samples_in_any_order(command, policy, tmp_path):
    code = (
        f"json.dump([sys.argv[1:], tasks], open({str(tmp_path / 'asked')!r}, 'w'))\n"
        f"for task in tasks[::-1]: give(task, ids={[*IDS, EOS]}, logp=-2)"
    )
    samples, error = draw(command(code), policy, 2)
    assert error is None and list(samples) == [1, 0]
    assert samples[0] == Sample("round-1/3/0", 3, 0, TEXT, [*IDS, EOS], True, -2.0)
    arguments, asked = json.loads((tmp_path / "asked").read_text())
    assert arguments == [str((GOLDENS / "tiny-gpt2").resolve())]
    assert asked[1] == {
        "id": "round-1/3/1",
        "prompt": "Human: Name a river.",
        "prompt_ids": PROMPT_IDS,
        "messages": [{"role": "user", "content": "Name a river."}],
        "seed": make_tasks(2)[1].seed,
        "max_tokens": 160 - len(PROMPT_IDS),
        "temperature": 0.7,
        "top_k": 0,
        "top_p": 0.9,
        "stop_ids": [EOS],
    }


def test_a_log_probability_of_other_tokens_than_the_samples_is_left_out(command, policy):
    code = f"give(tasks[0], ids={IDS}, logp=-2); give(tasks[1], text={TEXT!r}, logp=-2)"
    samples, error = draw(command(code), policy, 2)
    assert error is None
    assert [(samples[i].ids, samples[i].logp) for i in range(2)] == [([*IDS, EOS], None)] * 2


GOOD = f"give(tasks[0], text={TEXT!r})\n"


@pytest.mark.parametrize(
    "code, causes",
    [
        ("", ["engine.command: gave 1 of 3 samples; python -m tools.rounds resume=OUT"]),
        ("print('no memory', file=sys.stderr); sys.exit(5)", ["gave 1 of 3 samples and", "exit code 5: no memory ("]),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            ["ended with exit code 137: it wrote nothing"],
        ),
        ("give(tasks[0], text='x')", ["line 2 of its output is a second sample round-1/3/0"]),
        ("give({'id': 'round-9/0/0'}, text='x')", ["line 2 of its output has an unknown id 'round-9/0/0'"]),
        ("print('Loading weights')", ["line 2 of its output is 'Loading weights', not {", "messages belong on stderr"]),
        ("print('[1]')", ["line 2 of its output is '[1]', not {"]),
        ("give(tasks[1], text='x', finished=1)", ["line 2 of its output is '{", "not {"]),
        ("give(tasks[1])", ["line 2 of its output, sample round-1/3/1: it has neither token ids nor a text"]),
        ("give(tasks[1], ids=[1, 99999])", ["sample round-1/3/1: 99999 is not among the tokenizer's"]),
        ("give(tasks[1], ids=[1, 0], logp=float('nan'))", ["sample round-1/3/1: its log-probability is nan"]),
        ("sys.stdout.buffer.write(b'\\xff\\n')", ["line 2 of its output is"]),
    ],
)
def test_a_command_that_fails_leaves_its_samples_and_is_reported_in_a_line(code, causes, command, policy):
    samples, error = drawn_before_failure(command(GOOD + code, timeout=60), policy, 3)
    assert list(samples) == [0] and samples[0].text == TEXT
    for cause in causes:
        assert cause in error


@pytest.mark.parametrize("code", ["time.sleep(3600)", "sys.stdout.close(); os.close(1); time.sleep(3600)"])
def test_a_command_that_hangs_is_ended(code, command, policy):
    error = draw(command(code, timeout=0.3), policy, 3)[1]
    assert "engine.timeout=0.3: no sample for so long; 0 of 3 samples came before" in error


def test_a_command_that_reads_nothing_blocks_nobody(tmp_path, policy):
    tasks = 20_000  # more than a pipe holds
    engine = make("command", command=shlex.join([sys.executable, "-c", "import sys; sys.exit(3)", "{model}"]))
    assert f"gave 0 of {tasks} samples and ended with exit code 3" in draw(engine, policy, tasks)[1]


def test_a_command_that_fails_after_its_last_sample_has_done_its_work(command, policy):
    assert draw(command(GOOD + "sys.exit(5)"), policy, 1)[1] is None


# The settings


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"url": "localhost:8000/v1"}, "engine.url=localhost:8000/v1: must be a URL, as in http://localhost:8000/v1"),
        ({"url": "http:///v1"}, "engine.url=http:///v1: must be a URL"),
        ({"url": "http://h/v1", "prompt": "messages"}, "engine.prompt=messages: must be one of ids, text"),
        ({"url": "http://h/v1", "at_once": 0}, "engine.at_once=0: must be a whole number of requests, 1 or more"),
        ({"url": "http://h/v1", "max_gap": 0}, "engine.max_gap=0: must be a number above 0"),
    ],
)
def test_wrong_values_are_refused(settings, problem):
    with pytest.raises(UserError) as failure:
        make("server", **settings)
    assert problem in str(failure.value)


@pytest.mark.parametrize(
    "name, settings, problems",
    [
        ("server", {"url": "http://h/v1/", "command": "sh {model}"}, []),
        (
            "server",
            {"url": "http://h/v1/completions", "command": "sh {model}"},
            ["must be the part before /completions"],
        ),
        ("command", {"command": "sh my.sh"}, ["lacks {model}"]),
        ("command", {"command": "no-such-engine {model}"}, ["there is no program no-such-engine"]),
        ("command", {"command": "sh '{model}"}, ["cannot be split into words (No closing quotation)"]),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_starts(name, settings, problems):
    found = list(make(name, **settings).problems(make_settings()[0]))
    assert len(found) == len(problems)
    for line, problem in zip(found, problems, strict=True):
        assert problem in line and "\n" not in line


def test_quantized_weights_are_for_the_builtin_engine():
    settings, _ = make_settings("lora=default")
    settings = settings.model_copy(update={"lora": settings.lora.model_copy(update={"quantize": "nf4"})})
    (line,) = make("command", command="sh {model}").problems(settings)
    assert line.startswith("lora.quantize=nf4: ")


# The check


def make_samples(n, logp=-10.0, length=5):
    return [Sample(f"round-1/{i}/0", i, 0, "", [1] * length, True, logp) for i in range(n)]


def test_the_gap_of_a_few_samples_is_printed(capsys):
    asked = []

    def ours(samples):
        asked.extend(sample.prompt for sample in samples)
        return [-10.1, -9.9] * (len(samples) // 2)

    compare_logps([*make_samples(3, None), *make_samples(80)], ours, 0.05)
    assert asked == [0, 10, 20, 30, 40, 50, 60, 70]
    found = "the engine's log-probability of a token is +0.0000 from ours, 0.0200 without sign, in nats."
    assert capsys.readouterr().out == f"8 samples compared: {found}\n"


@pytest.mark.parametrize("gap", [0.3, -0.3, math.nan])
def test_a_gap_above_the_bound_stops_the_run(gap):
    with pytest.raises(UserError, match=r"engine\.max_gap=0\.05: .*it may serve another model") as failure:
        make("command", command="sh {model}").check(make_samples(2), lambda samples: [-10.0 - gap] * len(samples))
    assert "\n" not in str(failure.value)


def test_an_engine_without_log_probabilities_is_not_compared(capsys):
    compare_logps(make_samples(3, None), lambda samples: pytest.fail("the model is not loaded"), 0.05)
    assert "was not compared" in capsys.readouterr().out


@pytest.mark.parametrize("served", [1.0, 1.3], ids=["the policy", "another model"])
def test_another_model_behind_a_server_is_found_by_its_log_probabilities(served, server, policy):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "tiny-gpt2").eval()
    model.get_output_embeddings().weight.data *= served
    response = [*IDS, EOS]

    def reply(body):
        with torch.no_grad():
            logits = model(torch.tensor([body["prompt"] + response])).logits[0, len(PROMPT_IDS) - 1 : -1]
        logps = logits.log_softmax(-1)[range(len(response)), response].tolist()
        return completion(token_ids=response, logprobs={"token_logprobs": logps})

    server.reply = reply
    engine, tasks = engine_of(server, at_once=1), make_tasks(2)
    samples, error = draw(engine, policy, 2)
    assert error is None
    prompts, device = [tasks[0].prompt], torch.device("cpu")
    with nullcontext() if served == 1 else pytest.raises(UserError, match="it may serve another model"):
        engine.check([*samples.values()], lambda few: sums_of_samples(policy, few, prompts, device))
