"""Requests to servers with OpenAI's API, such as vLLM, SGLang, Ollama, or OpenAI's own."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from http.client import HTTPException
from itertools import islice
from threading import Event
from typing import Annotated, Any, TypeVar

from pydantic import Field

from dpo.system.errors import UserError, summarize_error

T = TypeVar("T")
R = TypeVar("R")
Url = Annotated[str, Field(pattern=r"^https?://[^/\s]\S*$", description="a URL, as in http://localhost:8000/v1")]

ATTEMPTS = 4  # per request
PAUSE = 2.0  # seconds before the second attempt, doubled for each further attempt
MAX_PAUSE = 120.0  # seconds, if a server asks for a longer pause


def url_problem(url: str) -> str | None:
    """Why a URL cannot be an Endpoint's; None if it can."""
    for end in ("/chat/completions", "/completions", "/chat", "/models"):
        if url.rstrip("/").endswith(end):
            return f"must be the part before {end}, as in http://localhost:8000/v1"
    return None


@dataclass(frozen=True)
class Endpoint:
    """A server; url is the part before /chat/completions, and label names it in errors, as in "--url URL"."""

    label: str
    url: str
    key: str | None = None
    timeout: float = 300.0  # seconds per attempt
    stopped: Event = field(default_factory=Event)  # no request is tried again once it is set

    def request(self, path: str, body: dict[str, Any] | None = None) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.Request(f"{self.url.rstrip('/')}/{path}", data, headers)

    def post(self, path: str, body: dict[str, Any], read: Callable[[Any], T]) -> T:
        """Send a request, and return what `read` makes of the JSON that answers it.

        UserError after ATTEMPTS failures, or at once if the server refuses the request, or does not answer within the
        timeout: it may still be working on it. A reply that `read` cannot read is a failure.
        """
        request = self.request(path, body)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as response:
                    return read(json.load(response))
            except urllib.error.HTTPError as error:
                reason, is_final = f"{error}{message_in(error)}", error.code < 500 and error.code != 429
                pause = requested_pause(error)
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
                is_final = isinstance(getattr(error, "reason", error), TimeoutError)  # URLError has the error in reason
                reason = f"no answer after {self.timeout:g} s" if is_final else summarize_error(error)
                pause = 0.0
            is_final = is_final or attempt == ATTEMPTS
            if is_final or self.stopped.wait(max(PAUSE * 2 ** (attempt - 1), pause)):
                raise UserError(f"{self.label}: {reason}")
        raise AssertionError("the loop returns or raises")

    def chat(self, model: str, messages: list[dict[str, str]]) -> str:
        """A chat model's reply at temperature 0."""
        body = {"model": model, "messages": messages, "temperature": 0}
        return self.post("chat/completions", body, lambda reply: str(reply["choices"][0]["message"]["content"] or ""))

    def answers(self) -> bool:
        """Whether the server answers a request for its models without a failure of its own."""
        try:
            urllib.request.urlopen(self.request("models"), timeout=5).close()
        except urllib.error.HTTPError as error:
            return error.code < 500
        except (OSError, HTTPException):
            return False
        return True

    def call_concurrently(
        self, call: Callable[[T], R], items: Iterable[T], at_once: int
    ) -> Generator[tuple[T, R], None, None]:
        """Yield each item with its result as soon as it is there, from `at_once` threads that send requests.

        After an error or Ctrl-C no further call begins, and no request is tried again; calls under way end, and are
        yielded before the error is raised. After a second Ctrl-C, or if the generator is closed, nobody waits for them.
        """
        remaining = iter(items)
        failure: BaseException | None = None
        pool = ThreadPoolExecutor(at_once)
        try:
            running = {pool.submit(call, item): item for item in islice(remaining, at_once)}
            while running:
                try:
                    ended = wait(running, return_when=FIRST_COMPLETED).done
                except KeyboardInterrupt as error:
                    if failure is not None:
                        raise
                    failure = error
                    self.stopped.set()
                    continue
                for future in ended:
                    item = running.pop(future)
                    if (error_of_call := future.exception()) is not None:
                        failure = failure or error_of_call
                        self.stopped.set()
                    else:
                        yield item, future.result()
                if failure is None:
                    running |= {pool.submit(call, item): item for item in islice(remaining, at_once - len(running))}
            if failure is not None:
                raise failure
        except BaseException:
            self.stopped.set()
            raise
        finally:
            pool.shutdown(wait=False)


def message_in(error: urllib.error.HTTPError) -> str:
    """The server's own message in parentheses; empty where it is in no known form."""
    try:
        body = json.load(error)
        body = body.get("error", body.get("detail", body))  # of OpenAI, and of FastAPI
        message = body if isinstance(body, str) else body["message"]
        return f" ({' '.join(str(message).split())[:300]})"
    except (OSError, HTTPException, ValueError, LookupError, TypeError, AttributeError):
        return ""


def requested_pause(error: urllib.error.HTTPError) -> float:
    """The seconds that a server asks to wait, at most MAX_PAUSE; 0 if it gives none, or a date."""
    try:
        return min(max(float(error.headers.get("Retry-After", "")), 0.0), MAX_PAUSE)
    except ValueError:
        return 0.0
