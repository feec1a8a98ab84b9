"""What the stages of a round pass on: prompts, tasks and samples, each a row of a JSON lines file."""

import hashlib
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A prompt: as the user gave it (a text or messages), as the model sees it, and as token ids."""

    id: int
    prompt: Any
    text: str
    ids: list[int]


@dataclass(frozen=True)
class Task:
    """A sample to draw. The id names round, prompt and index; the seed depends on these and the run's seed alone."""

    id: str
    prompt: Prompt
    index: int
    seed: int

    @classmethod
    def of(cls, seed: int, name: str, prompt: Prompt, index: int) -> "Task":
        """The index-th sample of a prompt in the round or judgement with this name."""
        identity = f"{name}/{prompt.id}/{index}"
        digest = hashlib.blake2b(f"{seed} {identity}".encode(), digest_size=4).digest()
        return cls(identity, prompt, index, int.from_bytes(digest, "big"))


@dataclass(frozen=True)
class Sample:
    """A sample: its text without special tokens, and the ids of the response with the stop token, if it finished.

    logp is log pi(response | prompt) at temperature 1 by the engine that drew it, if the engine gives it.
    """

    id: str
    prompt: int  # the prompt's id
    index: int
    text: str
    ids: list[int]
    finished: bool
    logp: float | None = None
