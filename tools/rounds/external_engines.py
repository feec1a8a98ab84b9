"""Engines that are other programs: a server with OpenAI's API, or any command that reads and writes JSON lines."""

import json
import math
import os
import queue
import shlex
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from dpo.settings.schema import Positive, Settings, Text, whole
from dpo.system.console import log_message
from dpo.system.errors import UserError
from tools.endpoints import Endpoint, Url, url_problem
from tools.rounds.commands import command_problem, conversation
from tools.rounds.engines import Draw, Engine, Logps
from tools.rounds.records import Record, Sample, Task
from tools.rounds.supervisor import EXIT_TIME, supervised

if TYPE_CHECKING:
    from tools.rounds.policies import Policy

MODEL = "{model}"  # in a command: the folder of the policy
N_COMPARED = 8  # samples of which the log-probabilities are compared
POLL = 0.2  # seconds between two looks at a server that starts
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what is decoded of bytes that are no character
TAIL = 4  # last lines of a program's log in an error
REST = "python -m tools.rounds resume=OUT asks for the rest"


class ExternalEngine(Engine):
    command: Text
    max_gap: Positive

    def problems(self, settings: Settings) -> Iterator[str]:
        if settings.lora is not None and settings.lora.quantize is not None:
            yield f"lora.quantize={settings.lora.quantize}: other programs load whole weights; set engine=builtin"
        if problem := command_problem(self.command):
            yield f"engine.command={self.command}: {problem}"
        elif MODEL not in self.command:
            yield f"engine.command={self.command}: lacks {MODEL}, for which the folder of each round's policy is put in"

    def batches(self, tasks: Sequence[Task]) -> list[list[Task]]:
        return [[task] for task in tasks]

    def check(self, samples: Sequence[Sample], logps: Logps) -> None:
        compare_logps(samples, logps, self.max_gap)


# Commands


def command_words(command: str, folder: str) -> list[str]:
    return [word.replace(MODEL, folder) for word in shlex.split(command)]


@contextmanager
def new_log(policy: "Policy") -> Iterator[IO[bytes]]:
    """Open the file of what the engine of a policy writes."""
    path = policy.export.with_name(f"{policy.export.name}-engine.log")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as log:
        yield log


def last_lines(log: Path) -> str:
    """The last lines of a log as one line, with its path."""
    lines = log.read_bytes()[-4000:].decode(errors="replace").split("\n")
    lines = [line.strip() for line in lines if line.strip()][-TAIL:]
    return f"{' / '.join(lines) or 'it wrote nothing'} ({log})"


# Samples


@dataclass
class Reader:
    """Makes samples of what an engine gives, and counts those of which the text is not what its token ids say.

    stops are the stop tokens; the first one is taken if an engine does not say which token ended a response.
    """

    policy: "Policy"
    stops: list[int] = field(init=False)
    n_changed: int = 0

    def __post_init__(self) -> None:
        self.stops = list(dict.fromkeys((*self.policy.stops, self.policy.tokenizer.eos_token_id)))

    @property
    def settings(self) -> Settings:
        return self.policy.candidate.settings

    def max_tokens(self, task: Task) -> int:
        return max(1, self.settings.max_length - len(task.prompt.ids))

    def sample(self, task: Task, ids: Any, text: Any, finished: bool, stop: Any = None) -> Sample:
        """The sample of a task, from token ids or, without them, a text; ValueError says what is wrong with it.

        stop is the token that ended the response, if the engine says so. A text that its token ids do not give again
        counts as unfinished, so that nothing is trained on it.
        """
        tokenizer, most, is_changed = self.policy.tokenizer, self.max_tokens(task), False
        if ids is not None:
            ids, text = self.checked(ids, most), None
        elif isinstance(text, str):
            ids = tokenizer.encode(text, add_special_tokens=False)
            decoded = tokenizer.decode(ids, skip_special_tokens=True)
            is_changed = decoded != text or REPLACEMENT in text or len(ids) + finished > most
            self.n_changed += is_changed
            ids = ids[:most]
        else:
            raise ValueError("it has neither token ids nor a text")
        end = next((i for i, token in enumerate(ids) if token in self.stops), None)
        if end is not None:
            ids = ids[: end + 1]
        elif finished and not is_changed:
            ids = [*ids, stop if stop in self.stops else self.stops[0]]
        finished = not is_changed and bool(ids) and ids[-1] in self.stops
        text = tokenizer.decode(ids, skip_special_tokens=True) if text is None else text
        return Sample(task.id, task.prompt.id, task.index, text, ids, finished)

    def checked(self, ids: Any, most: int) -> list[int]:
        """Token ids as an engine gives them; ValueError if they cannot be a response to the prompt."""
        size = len(self.policy.tokenizer)
        if not isinstance(ids, list) or not ids:
            raise ValueError("its ids are not a list of token ids")
        if wrong := [token for token in ids if type(token) is not int or not 0 <= token < size]:
            raise ValueError(f"{wrong[0]!r} is not among the tokenizer's {size:,} token ids")
        if len(ids) > most:
            raise ValueError(f"it has {len(ids)} tokens, and at most {most} were asked for")
        return ids

    def log_changed(self) -> None:
        if self.n_changed:
            log_message(
                f"{self.n_changed:,} samples count as unfinished: the engine gives no token ids, and the tokenizer does"
                " not give their texts again; an engine that returns token ids keeps them."
            )


# A server


class ServerEngine(ExternalEngine):
    """Asks a server with OpenAI's API for completions. A command starts it, since each policy needs one of its own."""

    url: Url
    model: Text | None
    start_timeout: Positive
    timeout: Positive
    at_once: int = whole("requests", ge=1)
    prompt: Literal["ids", "text"]

    def problems(self, settings: Settings) -> Iterator[str]:
        yield from super().problems(settings)
        if problem := url_problem(self.url):
            yield f"engine.url={self.url}: {problem}"

    @contextmanager
    def opened(self, policy: "Policy", device: str) -> Iterator[Draw]:
        folder, key = policy.folder(), os.environ.get("OPENAI_API_KEY")
        endpoint = Endpoint(f"engine.url={self.url}", self.url, key, self.timeout)
        with self.started(command_words(self.command, folder), policy, endpoint) as server:
            client = Client(self, endpoint, server, self.model or folder, Reader(policy))
            try:
                yield lambda batches: client.draw(chain.from_iterable(batches))
            finally:
                endpoint.stopped.set()

    @contextmanager
    def started(self, words: Sequence[str], policy: "Policy", endpoint: Endpoint) -> Iterator["Server"]:
        """Start the server and wait until it answers; UserError with the end of its log if it does not."""
        if endpoint.answers():
            cause = "a server answers there before engine.command has started one"
            raise UserError(f"{endpoint.label}: {cause}; end it")
        with new_log(policy) as log, supervised(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log) as process:
            server = Server(process, Path(log.name))
            start = time.monotonic()
            while not endpoint.answers():
                if process.poll() is not None:
                    raise UserError(f"engine.command: before it answered, the server {server.describe_end()}")
                if time.monotonic() - start > self.start_timeout:
                    cause = f"no answer at {self.url}; set a higher limit, or see {last_lines(server.log)}"
                    raise UserError(f"engine.start_timeout={self.start_timeout:g}: {cause}")
                time.sleep(POLL)
            log_message(f"The server answers at {self.url} after {time.monotonic() - start:.0f} s (log: {log.name}).")
            yield server


@dataclass(frozen=True)
class Server:
    """A server that was started, and the file of what it writes."""

    process: "subprocess.Popen[bytes]"
    log: Path

    def describe_end(self) -> str:
        return f"ended with exit code {self.process.returncode}: {last_lines(self.log)}"


@dataclass(frozen=True)
class Client:
    """Sends the requests of a server engine, several at a time."""

    engine: ServerEngine
    endpoint: Endpoint
    server: Server
    model: str
    reader: Reader
    reading: threading.Lock = field(default_factory=threading.Lock)  # a tokenizer is not for several threads

    def draw(self, tasks: Iterable[Task]) -> Iterator[Sample]:
        """Yield samples as they arrive; UserError after those that were under way when a request failed."""
        try:
            for _, sample in self.endpoint.call_concurrently(self.draw_one, tasks, self.engine.at_once):
                yield sample
        except UserError as error:
            failure = str(error)
            if not self.endpoint.answers():
                with suppress(subprocess.TimeoutExpired):
                    self.server.process.wait(EXIT_TIME)
                    failure = f"{failure}; the server {self.server.describe_end()}"
            raise UserError(f"{failure}; {REST}") from None
        finally:
            self.reader.log_changed()

    def draw_one(self, task: Task) -> Sample:
        try:
            reply = self.endpoint.post("completions", self.body(task), lambda reply: reply)
        except UserError as error:
            raise UserError(f"{error}, for sample {task.id}") from None
        try:
            with self.reading:
                return self.read(task, reply)
        except ValueError as error:
            raise UserError(f"{self.endpoint.label}: {error}, for sample {task.id}") from None

    def body(self, task: Task) -> Record:
        """A request. What is not in OpenAI's API, vLLM and SGLang know, and Ollama ignores.

        They are named in vllm/entrypoints/openai/completion/protocol.py and sglang/srt/entrypoints/openai/protocol.py.
        Both take what a request does not set from the model's generation_config.json, so all that changes the
        distribution is set.
        """
        settings = self.reader.settings
        return {
            "model": self.model,
            "prompt": task.prompt.ids if self.engine.prompt == "ids" else task.prompt.text,
            "max_tokens": self.reader.max_tokens(task),
            "seed": task.seed,
            "temperature": settings.sample_temperature,
            "top_p": settings.sample_top_p,
            "logprobs": 1,
            "top_k": settings.sample_top_k or -1,  # SGLang refuses 0
            "min_p": 0,
            "repetition_penalty": 1,
            "stop_token_ids": self.reader.stops,
            "add_special_tokens": False,  # the text of a prompt has them already
            "return_token_ids": True,  # choices[0].token_ids and prompt_token_ids
        }

    def read(self, task: Task, reply: Any) -> Sample:
        """The sample in a reply; ValueError says what is wrong with it."""
        try:
            choice = reply["choices"][0]
            text, reason, ids = choice["text"], choice["finish_reason"], choice.get("token_ids")
            n_prompt = (reply.get("usage") or {}).get("prompt_tokens")
            logps = (choice.get("logprobs") or {}).get("token_logprobs") or []
        except (LookupError, TypeError, AttributeError):
            raise ValueError(f"the reply is no completion: {json.dumps(reply)[:100]}") from None
        self.check_prompt(task, choice.get("prompt_token_ids"), n_prompt)
        if reason not in ("stop", "length"):
            raise ValueError(f"its finish_reason is {reason!r}, not stop or length")
        stop = choice.get("stop_reason", choice.get("matched_stop"))  # vLLM's name, and SGLang's
        sample = self.reader.sample(task, ids, text, reason == "stop", stop)
        if not logps or len(logps) != len(sample.ids) or None in logps:
            return sample
        return replace(sample, logp=sum(map(finite, logps)))

    def check_prompt(self, task: Task, ids: list[int] | None, n: int | None) -> None:
        """Raise ValueError if the server has read other tokens than the prompt's, as far as it says so."""
        ours = task.prompt.ids
        if (ids or ours) != ours or (n or len(ours)) != len(ours):
            theirs = f"{len(ids) if ids else n} other tokens than our {len(ours)}"
            cause = "it adds BOS or a chat template, has another tokenizer or cuts the prompt"
            raise ValueError(f"the server reads the prompt as {theirs}: {cause}")


# A command


class CommandEngine(ExternalEngine):
    """Writes tasks to a command's stdin as JSON lines, and reads samples from its stdout in any order."""

    timeout: Positive

    @contextmanager
    def opened(self, policy: "Policy", device: str) -> Iterator[Draw]:
        words, reader = command_words(self.command, policy.folder()), Reader(policy)
        with new_log(policy) as log:
            yield lambda batches: self.draw(words, log, list(chain.from_iterable(batches)), reader)

    def draw(self, words: Sequence[str], log: IO[bytes], tasks: Sequence[Task], reader: Reader) -> Iterator[Sample]:
        """Yield the samples of tasks as the command gives them; UserError if it fails or some are missing."""
        waiting = {task.id: task for task in tasks}
        known = set(waiting)
        records = [json.dumps(task_record(task, reader)) for task in tasks]
        with conversation(words, records, stderr=log) as (process, lines):
            number = 0
            try:
                while waiting and (line := lines.get(timeout=self.timeout)) is not None:
                    number += 1
                    sample = read_line(line, number, waiting, known, reader)
                    del waiting[sample.id]
                    yield sample
                code = process.wait(self.timeout) if waiting else 0
            except (queue.Empty, subprocess.TimeoutExpired):
                count = f"{len(tasks) - len(waiting)} of {len(tasks)} samples came before"
                raise UserError(f"engine.timeout={self.timeout:g}: no sample for so long; {count}; {REST}") from None
        reader.log_changed()
        if waiting:
            count = f"gave {len(tasks) - len(waiting)} of {len(tasks)} samples"
            end = f"{count} and ended with exit code {code}: {last_lines(Path(log.name))}" if code else count
            raise UserError(f"engine.command: {end}; {REST}")


def task_record(task: Task, reader: Reader) -> Record:
    settings, prompt = reader.settings, task.prompt
    record = {"id": task.id, "prompt": prompt.text, "prompt_ids": prompt.ids}
    if not isinstance(prompt.prompt, str):
        record["messages"] = prompt.prompt
    return record | {
        "seed": task.seed,
        "max_tokens": reader.max_tokens(task),
        "temperature": settings.sample_temperature,
        "top_k": settings.sample_top_k,
        "top_p": settings.sample_top_p,
        "stop_ids": reader.stops,
    }


def read_line(line: bytes, number: int, waiting: dict[str, Task], known: set[str], reader: Reader) -> Sample:
    """The sample in a line of a command; UserError that names the line if it is none, or not of a task that waits."""
    place = f"engine.command: line {number} of its output"
    try:
        row = json.loads(line)
        name, finished, logp = row["id"], row["finished"], row.get("logp")
        ids, text = row.get("ids"), row.get("text")
        if not (isinstance(name, str) and isinstance(finished, bool)):
            raise TypeError
    except (ValueError, LookupError, TypeError, AttributeError):
        form = '{"id", "ids" or "text", "finished"}'
        shown = line[:60].decode(errors="replace").strip()
        raise UserError(f"{place} is {shown!r}, not {form}; messages belong on stderr") from None
    if name not in waiting:
        raise UserError(
            f"{place} is a second sample {name}" if name in known else f"{place} has an unknown id {name!r}"
        )
    try:
        sample = reader.sample(waiting[name], ids, text, finished)
        return replace(sample, logp=finite(logp)) if logp is not None and sample.ids == ids else sample
    except ValueError as error:
        raise UserError(f"{place}, sample {name}: {error}") from None


def finite(logp: Any) -> float:
    """A log-probability; ValueError if it is none."""
    if isinstance(logp, bool) or not isinstance(logp, (int, float)) or not math.isfinite(logp):
        raise ValueError(f"its log-probability is {logp!r}")
    return float(logp)


# The check


def compare_logps(samples: Sequence[Sample], logps: Logps, max_gap: float) -> None:
    """Compare an engine's log-probabilities of a few samples with ours and print the gap; UserError above max_gap."""
    given = [sample for sample in samples if sample.logp is not None]
    if not given:
        log_message("The engine gives no log-probabilities, so its model was not compared with the policy.")
        return
    chosen = given[:: math.ceil(len(given) / N_COMPARED)]  # from all over the file
    gaps = [
        (sample.logp - ours) / len(sample.ids)
        for sample, ours in zip(chosen, logps(chosen), strict=True)
        if sample.logp is not None
    ]
    gap, mean = sum(map(abs, gaps)) / len(gaps), sum(gaps) / len(gaps)
    found = f"the engine's log-probability of a token is {mean:+.4f} from ours, {gap:.4f} without sign, in nats"
    log_message(f"{len(gaps)} samples compared: {found}.")
    if not gap <= max_gap:
        causes = (
            "it may serve another model, read another prompt (template, BOS), divide by the temperature or quantize"
        )
        advice = f"serve {MODEL}, send engine.prompt=ids, return raw log-probabilities, or raise engine.max_gap"
        raise UserError(f"engine.max_gap={max_gap:g}: {found}; {causes}; {advice}")
