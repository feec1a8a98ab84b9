"""Scorers: what judges samples. Each is a frozen object whose fields are the settings of config/scorer/NAME.yaml."""

import hashlib
import importlib
import json
import os
import shlex
import sys
from abc import abstractmethod
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from copy import deepcopy
from itertools import chain
from numbers import Real
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import Field

from dpo.settings.schema import Group, Positive, Text, whole
from dpo.system.console import log_message
from dpo.system.errors import UserError, actionable_errors, join_names, summarize_error
from dpo.system.files import sha256
from tools.endpoints import Endpoint, Url, url_problem
from tools.judges import GRADE_INSTRUCTION, INSTRUCTION, ChatJudge
from tools.rounds.commands import answer_lines, command_problem

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from tools.classifiers import SequenceClassifier


T = TypeVar("T")

NO_GRADE = 5.5  # the middle of 1 to 10, for replies without a grade
ENOUGH = 20  # replies after which a judge is refused if most of them hold no answer


class Request(NamedTuple):
    """What a scorer is asked: to score one response to a prompt, or to compare two."""

    prompt: Any  # a text or messages
    texts: tuple[str, ...]

    def describe(self) -> str:
        """How an error names it: the beginnings of its texts, in one line."""
        prompt = self.prompt if isinstance(self.prompt, str) else str(self.prompt[-1].get("content"))
        return f"the response {' or '.join(map(beginning, self.texts))} to the prompt {beginning(prompt)}"


def beginning(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


# Yields requests with their answers, in any order: a score, or for two texts 1 if the first is better, 0 if the second
# is, 0.5 for a tie. UserError that names the request if one fails, after the answers of all others that were under way.
# It is called once. Answers depend on the other requests of a batch by rounding at most, so a batch is asked whole.
Answers = Generator[tuple[Request, float], None, None]
Ask = Callable[[Sequence[Sequence[Request]]], Answers]


class Scorer(Group):
    on_devices: ClassVar[bool] = False  # whether it loads a model on the devices of the run, a process on each
    is_paid: ClassVar[bool] = False  # whether a dry run only counts its calls, and each answer is saved at once

    @property
    def is_pairwise(self) -> bool:
        """Whether a request has two texts."""
        return False

    @property
    @abstractmethod
    def setting(self) -> str:
        """How errors name it, as in "scorer.function=score:length"."""

    def problems(self) -> Iterator[str]:
        """Yield a line for each setting that is refused, as far as is known before anything loads."""
        yield from ()

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all that its answers depend on, as far as files tell; UserError if there is no such scorer."""

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """The batches that are asked together."""
        return [[request] for request in requests]

    @abstractmethod
    def opened(self, device: str) -> AbstractContextManager[Ask]:
        """Load what is needed, and free it in the end."""


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# A function


class FunctionScorer(Scorer):
    function: str = Field(pattern=r"^\w[\w.]*:\w+$", description="module:function, as in score:length")

    @property
    def setting(self) -> str:
        return f"scorer.function={self.function}"

    def fingerprint(self) -> str:
        """Depends on the module's file, but not on what it imports."""
        self.load()
        file = getattr(sys.modules[self.function.partition(":")[0]], "__file__", None)
        return digest("function", self.function, file and sha256(Path(file)))

    @contextmanager
    def opened(self, device: str) -> Iterator[Ask]:
        function = self.load()

        def ask(batches: Sequence[Sequence[Request]]) -> Answers:
            for (request,) in batches:
                yield request, self.call(function, request)

        yield ask

    def load(self) -> Callable[[Any, str], Any]:
        """Import the function; the current folder is searched for its module."""
        module_name, _, name = self.function.partition(":")
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            module = importlib.import_module(module_name)
        except Exception as error:  # whatever the user's module raises
            raise UserError(f"{self.setting}: cannot be imported ({explain(error)})") from None
        function = getattr(module, name, None)
        if not callable(function):
            raise UserError(f"{self.setting}: the module {module_name} has no function {name}")
        return function

    def call(self, function: Callable[[Any, str], Any], request: Request) -> float:
        try:
            value = function(deepcopy(request.prompt), request.texts[0])  # it may change messages
        except Exception as error:  # whatever the user's function raises
            raise UserError(f"{self.setting}: failed with {explain(error)}, for {request.describe()}") from None
        try:
            value = value.item() if hasattr(value, "item") else value  # numpy's and torch's numbers
            if isinstance(value, Real):
                return float(value)
        except (ValueError, RuntimeError, OverflowError):  # several numbers, or one beyond floats
            pass
        shown = f"{type(value).__name__} {beginning(str(value))}"
        raise UserError(f"{self.setting}: gives {shown} instead of a number, for {request.describe()}")


def explain(error: Exception) -> str:
    return f"{type(error).__name__}: {summarize_error(error)}"


# A command


class CommandScorer(Scorer):
    command: Text = Field(description="a command, as in 'python score.py'")
    timeout: Positive

    @property
    def setting(self) -> str:
        return f"scorer.command={self.command!r}"

    def problems(self) -> Iterator[str]:
        if problem := command_problem(self.command):
            yield f"{self.setting}: {problem}"

    def fingerprint(self) -> str:
        """Depends on the files that the command names."""
        files = [Path(part) for part in shlex.split(self.command)]
        return digest("command", self.command, [sha256(file) for file in files if file.is_file()])

    @contextmanager
    def opened(self, device: str) -> Iterator[Ask]:
        yield self.ask

    def ask(self, batches: Sequence[Sequence[Request]]) -> Answers:
        requests = list(chain.from_iterable(batches))
        lines = [json.dumps({"prompt": request.prompt, "response": request.texts[0]}) for request in requests]
        with closing(answer_lines(self.setting, self.command, lines, self.timeout)) as answers:
            for number, (answer, request) in enumerate(zip(answers, requests, strict=True), start=1):
                try:
                    score = float(answer)
                except ValueError:
                    cause = f"line {number} of its answers is {beginning(answer)}, not a number"
                    raise UserError(f"{self.setting}: {cause}, for {request.describe()}") from None
                yield request, score


# Models of transformers


class ModelScorer(Scorer):
    """A sequence classifier."""

    on_devices: ClassVar[bool] = True

    model: Text = Field(description="a local folder or a name on the Hub")
    batch_size: int = whole("texts", ge=1)

    @property
    def setting(self) -> str:
        return f"scorer.model={self.model}"

    @abstractmethod
    def check(self, config: "PreTrainedConfig") -> None:
        """UserError if the model has the wrong labels."""

    @abstractmethod
    def encode(self, classifier: "SequenceClassifier", request: Request) -> list[int]:
        """The ids of what is scored."""

    @abstractmethod
    def shorten(self, classifier: "SequenceClassifier", request: Request, ids: list[int]) -> list[int]:
        """The ids of a request that has more than the model takes; UserError if none could stand for it."""

    @abstractmethod
    def scores(self, logits: "Tensor", config: "PreTrainedConfig") -> "Tensor":
        """The score of each row of logits."""

    def fingerprint(self) -> str:
        from tools.classifiers import fingerprint_model, load_classifier_config

        config = load_classifier_config("scorer.model", self.model)
        self.check(config)
        settings = self.model_dump(exclude={"model", "batch_size"})
        return digest(type(self).__name__, settings, fingerprint_model(self.model, config))

    def batches(self, requests: Sequence[Request]) -> list[list[Request]]:
        """Batches of similar lengths, whatever the order of requests; the longest first, which may be too long."""
        by_content = sorted(requests, key=json.dumps)
        ordered = sorted(by_content, key=lambda request: len(json.dumps(request)), reverse=True)
        return [ordered[i : i + self.batch_size] for i in range(0, len(ordered), self.batch_size)]

    @contextmanager
    def opened(self, device: str) -> Iterator[Ask]:
        from tools.classifiers import load_classifier

        classifier = load_classifier("scorer.model", self.model, device)
        config = classifier.model.config
        self.check(config)

        def ask(batches: Sequence[Sequence[Request]]) -> Answers:
            n_shortened = 0
            for batch in batches:
                texts = []
                for request in batch:
                    ids = self.encode(classifier, request)
                    if len(ids) > classifier.max_length:
                        ids = self.shorten(classifier, request, ids)
                        n_shortened += 1
                    texts.append(ids)
                with actionable_errors(f"while scoring; lower scorer.batch_size={self.batch_size}"):
                    logits = classifier.logits(texts)
                yield from zip(batch, self.scores(logits, config).tolist(), strict=True)
            if n_shortened:
                n = sum(map(len, batches))
                limit = f"{classifier.max_length:,} tokens"
                log_message(f"{self.setting}: scored the first {limit} of {n_shortened:,} of {n:,} responses.")

        try:
            yield ask
        finally:
            classifier.close()


class RewardScorer(ModelScorer):
    def check(self, config: "PreTrainedConfig") -> None:
        from tools.classifiers import check_reward_model

        check_reward_model(self.setting, config)

    def encode(self, classifier: "SequenceClassifier", request: Request) -> list[int]:
        return classifier.encode_turns(request.prompt, request.texts[0])

    def shorten(self, classifier: "SequenceClassifier", request: Request, ids: list[int]) -> list[int]:
        cause = f"takes at most {classifier.max_length:,} tokens, and there are {len(ids):,} of {request.describe()}"
        raise UserError(f"{self.setting}: {cause}; lower max_length, or choose a model for longer texts")

    def scores(self, logits: "Tensor", config: "PreTrainedConfig") -> "Tensor":
        return logits[:, 0]


class ClassifierScorer(ModelScorer):
    """Classifies the response alone, as the controlled sentiment experiment of the DPO paper does."""

    label: Text = Field(description="a label of the model, as in POSITIVE")

    def check(self, config: "PreTrainedConfig") -> None:
        from tools.classifiers import label_indices

        labels = list(label_indices(config))
        if len(labels) == 1:
            raise UserError(f"{self.setting}: has one label, as reward models do; set scorer=reward")
        if self.label not in labels:
            raise UserError(f"scorer.label={self.label}: must be one of {join_names(labels, 40)}")

    def encode(self, classifier: "SequenceClassifier", request: Request) -> list[int]:
        return classifier.encode(request.texts[0])

    def shorten(self, classifier: "SequenceClassifier", request: Request, ids: list[int]) -> list[int]:
        return classifier.encode_truncated(request.texts[0])

    def scores(self, logits: "Tensor", config: "PreTrainedConfig") -> "Tensor":
        from tools.classifiers import label_indices

        index = label_indices(config)[self.label]
        if config.problem_type == "multi_label_classification":  # each label has a sigmoid of its own
            return logits[:, index]
        others = [i for i in range(logits.shape[1]) if i != index]
        return logits[:, index] - logits[:, others].logsumexp(1)


# A chat model


class JudgeScorer(Scorer):
    is_paid: ClassVar[bool] = True

    url: Url
    model: Text
    mode: Literal["pairwise", "grade"]
    at_once: int = whole("requests", ge=1)

    @property
    def is_pairwise(self) -> bool:
        return self.mode == "pairwise"

    @property
    def setting(self) -> str:
        return f"scorer.url={self.url}"

    def problems(self) -> Iterator[str]:
        if problem := url_problem(self.url):
            yield f"{self.setting}: {problem}"

    def fingerprint(self) -> str:
        """Depends on the model's name and the instruction; the same model may move to another url."""
        instruction = INSTRUCTION if self.is_pairwise else GRADE_INSTRUCTION
        return digest("judge", self.model, self.mode, instruction)

    @contextmanager
    def opened(self, device: str) -> Iterator[Ask]:
        yield self.ask

    def ask(self, batches: Sequence[Sequence[Request]]) -> Answers:
        endpoint = Endpoint(self.setting, self.url, os.environ.get("OPENAI_API_KEY"))
        judge = CountingJudge(ChatJudge(endpoint, self.model))
        call = judge.compare if self.is_pairwise else judge.grade
        try:
            yield from endpoint.call_concurrently(call, chain.from_iterable(batches), self.at_once)
        finally:
            if judge.n_unusable:
                fallback = "ties" if self.is_pairwise else f"grades of {NO_GRADE}"
                counts = f"{judge.n_unusable:,} of {judge.n_answers:,}"
                log_message(f"{self.setting}: {counts} replies hold no answer; they count as {fallback}.")


class CountingJudge:
    """Counts the replies without an answer, which are a tie, or a grade in the middle of the scale.

    UserError if these are more than half: then it is no judge.
    """

    def __init__(self, judge: ChatJudge):
        self.judge = judge
        self.n_answers = self.n_unusable = 0
        self.lock = Lock()

    def compare(self, request: Request) -> float:
        from dpo.reporting.comparison import SCORES

        a, b = request.texts
        question = {"prompt": request.prompt, "a": a, "b": b}
        return SCORES[self.answer(request, lambda: self.judge.compare(question)) or "tie"]

    def grade(self, request: Request) -> float:
        return self.answer(request, lambda: self.judge.grade(request.prompt, request.texts[0])) or NO_GRADE

    def answer(self, request: Request, ask: Callable[[], T | None]) -> T | None:
        try:
            answer = ask()
        except UserError as error:
            raise UserError(f"{error}, for {request.describe()}") from None
        with self.lock:
            self.n_answers += 1
            self.n_unusable += answer is None
            if self.n_answers >= ENOUGH and 2 * self.n_unusable > self.n_answers:
                counts = f"{self.n_unusable:,} of its first {self.n_answers:,} replies hold no answer"
                raise UserError(f"scorer.model={self.judge.model}: {counts}; choose another model or mode")
        return answer


SCORERS: dict[str, type[Scorer]] = {
    "function": FunctionScorer,
    "reward": RewardScorer,
    "classifier": ClassifierScorer,
    "command": CommandScorer,
    "judge": JudgeScorer,
}
