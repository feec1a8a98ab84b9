"""Judges for tools/compare.py: each reads JSON lines {"prompt", "a", "b"} and writes A, B or tie for each.

python -m tools.judges demo                               for the demo: warm beats cold, and cold beats broken
python -m tools.judges openai --url URL --model NAME      a chat model behind an OpenAI-compatible endpoint
python -m tools.judges reward --model NAME                a reward model of transformers, with one score per text

A prompt is a text or a list of messages. An endpoint that needs a key gets OPENAI_API_KEY.
"""

import argparse
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from http.client import HTTPException
from typing import Any

from dpo.system.console import guard_streams
from dpo.system.errors import UserError, exit_on_error, summarize_error

Question = dict[str, Any]
INSTRUCTION = (
    "Two answers to the same prompt follow. Decide which of them helps the user more and is more correct; do not prefer"
    " an answer for its length or its place. End your reply with one word: A, B or tie."
)
ATTEMPTS = 4  # per request
PAUSE = 2.0  # seconds before the second attempt, doubled for each further attempt
AT_ONCE = 8  # requests


def larger(a: float, b: float) -> str:
    return "tie" if a == b else "A" if a > b else "B"


# The demo


def demo_judge(question: Question) -> str:
    from dpo.data.film_reviews import judge

    rank = ("broken", "cold", "warm")
    return larger(rank.index(judge(question["a"])), rank.index(judge(question["b"])))


# A chat model


@dataclass(frozen=True)
class ChatJudge:
    """Asks a chat model; url is the part before /chat/completions."""

    url: str
    model: str
    key: str | None = None
    pause: float = PAUSE

    def __call__(self, question: Question) -> str:
        """The last word of the model's reply; a reply without an answer is printed and counts as a tie."""
        prompt = question["prompt"]
        if not isinstance(prompt, str):
            prompt = "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
        parts = {"Prompt": prompt, "Answer A": question["a"], "Answer B": question["b"]}
        text = "\n\n".join(f"<{name}>\n{part}\n</{name}>" for name, part in parts.items())
        reply = self.request([{"role": "user", "content": f"{INSTRUCTION}\n\n{text}"}])
        words = re.findall(r"[A-Za-z]+", reply)
        if words and (words[-1] in ("A", "B") or words[-1].lower() == "tie"):
            return words[-1]
        print(f"judge: the reply ends with no answer, which counts as a tie: {reply[-80:]!r}", file=sys.stderr)
        return "tie"

    def request(self, messages: list[dict[str, str]]) -> str:
        """The model's reply; UserError after ATTEMPTS failures, or at once if the server refuses the request."""
        body = json.dumps({"model": self.model, "messages": messages, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with urllib.request.urlopen(request, timeout=300) as response:
                    return str(json.load(response)["choices"][0]["message"]["content"] or "")
            except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:  # HTTPError is an OSError
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429
                if refused or attempt == ATTEMPTS:
                    raise UserError(f"--url {self.url}: {summarize_error(error)}") from None
            time.sleep(self.pause * 2 ** (attempt - 1))
        raise AssertionError("the loop returns or raises")


# A reward model


def reward_judge(name: str, device: str) -> Callable[[Question], str]:
    """A judge that prefers the higher score of a reward model; UserError if the model gives several scores."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from dpo.system.devices import pick_device

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name).eval().to(pick_device(device))
    if model.config.num_labels != 1:
        raise UserError(f"--model {name}: gives {model.config.num_labels} scores per text; a reward model gives one")

    @cache  # tools/compare.py asks about each text twice
    def score(prompt: str, answer: str) -> float:
        """Score an answer; prompt is JSON."""
        turns = json.loads(prompt)
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
            text = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
            inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        elif isinstance(turns, str):
            inputs = tokenizer(turns + answer, return_tensors="pt")
        else:
            raise UserError(f"--model {name}: has no chat template for prompts that are messages")
        with torch.no_grad():
            return float(model(**inputs.to(model.device)).logits[0, 0])

    def judge(question: Question) -> str:
        prompt = json.dumps(question["prompt"])
        return larger(score(prompt, question["a"]), score(prompt, question["b"]))

    return judge


# The command line


def make_judge(options: argparse.Namespace) -> tuple[Callable[[Question], str], int]:
    """The judge, and its number of concurrent questions."""
    if options.kind == "openai":
        return ChatJudge(options.url, options.model, os.environ.get("OPENAI_API_KEY")), AT_ONCE
    return (demo_judge if options.kind == "demo" else reward_judge(options.model, options.device)), 1


def answer_all(judge: Callable[[Question], str], lines: Iterable[str], at_once: int) -> Iterable[str]:
    """Yield the answers to JSON lines in their order."""
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(judge, map(json.loads, lines))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.judges", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("demo")
    openai = kinds.add_parser("openai")
    openai.add_argument("--url", required=True, help="as in http://localhost:8000/v1")
    openai.add_argument("--model", required=True, help="the name that the endpoint knows")
    reward = kinds.add_parser("reward")
    reward.add_argument("--model", required=True, help="a local folder or a name on the hub")
    reward.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser.parse_args(arguments)


def main() -> None:
    guard_streams()
    judge, at_once = make_judge(parse_arguments())
    for answer in answer_all(judge, sys.stdin, at_once):
        print(answer, flush=True)


if __name__ == "__main__":
    exit_on_error(main)
