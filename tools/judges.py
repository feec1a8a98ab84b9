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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

from dpo.system.console import guard_streams
from dpo.system.errors import exit_on_error
from tools.endpoints import Endpoint

Question = dict[str, Any]
INSTRUCTION = (
    "Two answers to the same prompt follow. Decide which of them helps the user more and is more correct; do not prefer"
    " an answer for its length or its place. End your reply with one word: A, B or tie."
)
GRADE_INSTRUCTION = (
    "An answer to a prompt follows. Grade how much it helps the user and how correct it is, from 1, useless, to 10,"
    " excellent; do not grade an answer higher for its length. End your reply with the grade, a number from 1 to 10."
)
REMINDER = "End your reply with the grade: a number from 1 to 10, and nothing after it."
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
    """Asks a chat model."""

    endpoint: Endpoint
    model: str

    def __call__(self, question: Question) -> str:
        return self.compare(question) or "tie"

    def compare(self, question: Question) -> str | None:
        """The last word of the model's reply: A, B or tie; None, and a line on stderr, if it is no answer."""
        parts = {"Prompt": as_text(question["prompt"]), "Answer A": question["a"], "Answer B": question["b"]}
        reply = self.endpoint.chat(self.model, [user_turn(INSTRUCTION, parts)])
        words = re.findall(r"[A-Za-z]+", reply)
        if words and (words[-1] in ("A", "B") or words[-1].lower() == "tie"):
            return words[-1] if words[-1] in ("A", "B") else "tie"
        print(f"judge: the reply ends with no answer, which counts as a tie: {reply[-80:]!r}", file=sys.stderr)
        return None

    def grade(self, prompt: Any, response: str) -> float | None:
        """The last number from 1 to 10 of the model's reply; None, and a line on stderr, if it has none twice."""
        turns = [user_turn(GRADE_INSTRUCTION, {"Prompt": as_text(prompt), "Answer": response})]
        for _ in range(2):
            reply = self.endpoint.chat(self.model, turns)
            if (grade := last_grade(reply)) is not None:
                return grade
            turns += [{"role": "assistant", "content": reply}, {"role": "user", "content": REMINDER}]
        print(f"judge: the reply ends with no grade, even when asked again: {reply[-80:]!r}", file=sys.stderr)
        return None


def as_text(prompt: Any) -> str:
    """A prompt of messages as a text with their roles."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def user_turn(instruction: str, parts: dict[str, str]) -> dict[str, str]:
    text = "\n\n".join(f"<{name}>\n{part}\n</{name}>" for name, part in parts.items())
    return {"role": "user", "content": f"{instruction}\n\n{text}"}


def last_grade(reply: str) -> float | None:
    """The last number of a reply, if it is one from 1 to 10; "8/10" and "8 out of 10" are 8."""
    numbers = re.findall(r"(-?\d+(?:\.\d+)?)(?:\**\s*(?:/|out of)\s*\**10\b)?", reply)
    return float(numbers[-1]) if numbers and 1 <= float(numbers[-1]) <= 10 else None


# A reward model


def reward_judge(name: str, device: str) -> Callable[[Question], str]:
    """A judge that prefers the higher score of a reward model; UserError if the model gives several scores."""
    from tools.classifiers import check_reward_model, load_classifier, load_classifier_config

    check_reward_model(f"--model={name}", load_classifier_config("--model", name))
    classifier = load_classifier("--model", name, device)

    @cache  # tools/compare.py asks about each text twice
    def score(prompt: str, answer: str) -> float:
        """Score an answer; prompt is JSON."""
        return classifier.logits([classifier.encode_turns(json.loads(prompt), answer)]).item()

    def judge(question: Question) -> str:
        prompt = json.dumps(question["prompt"])
        return larger(score(prompt, question["a"]), score(prompt, question["b"]))

    return judge


# The command line


def make_judge(options: argparse.Namespace) -> tuple[Callable[[Question], str], int]:
    """The judge, and its number of concurrent questions."""
    if options.kind == "openai":
        endpoint = Endpoint(f"--url {options.url}", options.url, os.environ.get("OPENAI_API_KEY"))
        return ChatJudge(endpoint, options.model), AT_ONCE
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
