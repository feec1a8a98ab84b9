"""Figures beyond those of a run's evaluation: positions, distances, weights, and other forms of the same data."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dpo.data.examples import Tokenization, TokenizedExample
from dpo.data.formatting import RowFormatter, template_time
from dpo.data.messages import Message, UnusableRow
from dpo.data.records import Encoder
from dpo.data.rows import ASSISTANT, HUMAN, Row
from dpo.model.logps import Logps
from dpo.settings.schema import Settings
from dpo.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROUNDINGS = (torch.bfloat16, torch.float16)  # in which a model may have been stored


@dataclass
class Tokens:
    """The log-probabilities of the trained tokens of responses, one array per response, chosen and rejected in turn."""

    examples: list[TokenizedExample] = field(default_factory=list)
    policy: list[np.ndarray] = field(default_factory=list)
    reference: list[np.ndarray] = field(default_factory=list)

    def add(self, examples: Sequence[TokenizedExample], policy: Logps, reference: Logps) -> None:
        self.examples += examples
        self.policy += split(policy)
        self.reference += split(reference)

    def first(self) -> float:
        """The reference's mean over the first token of each response."""
        return float(np.mean([response[0] for response in self.reference]))

    def per_token(self) -> float:
        """The reference's mean over all tokens but the last of each response, which depends on the format."""
        contents = [response[:-1] for response in self.reference if len(response) > 1]
        return float(np.concatenate(contents).mean()) if contents else float("nan")


def split(logps: Logps) -> list[np.ndarray]:
    assert logps.tokens is not None
    parts = logps.tokens.double().cpu() if logps.tokens.device.type != "mps" else logps.tokens.cpu().double()
    return [part.numpy() for part in parts.split(logps.lengths.flatten().tolist())]


def position_figures(tokens: Tokens) -> dict[str, float]:
    """The mean log-probability of the data per token, of both models, and of the reference by position.

    A position that no response has is left out, such as the end if all responses are truncated.
    """
    places: dict[str, list[np.ndarray]] = {"first": [], "early": [], "middle": [], "end": []}
    responses = zip(tokens.reference, repeat_each(tokens.examples), strict=True)
    for values, example in responses:
        has_end = "response" not in example.truncated and len(values) > 1
        body = values[:-1] if has_end else values
        places["first"].append(body[:1])
        places["early"].append(body[1:4])
        places["middle"].append(body[4:])
        places["end"].append(values[-1:] if has_end else values[:0])
    figures = {"policy_per_token": float(np.concatenate(tokens.policy).mean())}
    figures["reference_per_token"] = float(np.concatenate(tokens.reference).mean())
    joined = {name: np.concatenate(parts) for name, parts in places.items()}
    return figures | {f"position/{name}": float(values.mean()) for name, values in joined.items() if len(values)}


def repeat_each(examples: Sequence[TokenizedExample]) -> list[TokenizedExample]:
    """Each example as often as it has responses."""
    return [example for example in examples for _ in example.responses]


def distance_figures(tokens: Tokens) -> dict[str, float]:
    """How far the two models differ on a token of the data, in nats: 0 for equal models."""
    distances = np.abs(np.concatenate(tokens.policy) - np.concatenate(tokens.reference))
    return {"start_distance": float(distances.mean())}


# Weights


@torch.no_grad()
def weight_figures(policy: "PreTrainedModel", reference: "PreTrainedModel") -> dict[str, float]:
    """How far the weights differ; {} for models of other shapes.

    weights_changed   share of the weights that differ, after rounding as the policy was stored
    weights_distance  L2 norm of the difference divided by that of the reference's weights
    weights_step      root mean square of the difference of all weights that differ; not of a policy stored in 16
                      bits, whose weights differ by what rounding leaves, however short the steps were
    """
    others = dict(reference.named_parameters())
    pairs = [(weight, others.get(name)) for name, weight in policy.named_parameters()]
    if any(other is None or other.shape != weight.shape or not weight.is_floating_point() for weight, other in pairs):
        return {}
    changed = total = 0
    squares = norm = 0.0
    is_rounded = True
    for weight, other in pairs:
        assert other is not None
        whole = other.to(weight.device).float()
        mine, theirs = same_rounding(weight.float(), whole)
        is_rounded &= theirs is not whole
        difference = mine - theirs
        changed += int(difference.count_nonzero())
        total += difference.numel()
        squares += (
            float(difference.double().square().sum())
            if difference.device.type != "mps"
            else float(difference.square().sum())
        )
        norm += float(theirs.square().sum())
    figures = {"weights_changed": changed / total, "weights_distance": (squares / norm) ** 0.5 if norm else 0.0}
    return figures | ({"weights_step": (squares / changed) ** 0.5} if changed and not is_rounded else {})


def same_rounding(policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both weights with the rounding of the policy's, which an export may have stored in 16 bits."""
    for dtype in ROUNDINGS:
        if torch.equal(policy.to(dtype).float(), policy):
            return policy, reference.to(dtype).float()
    return policy, reference


# The same data in another form

TokenLogps = Callable[[Sequence[TokenizedExample]], Tokens]


def bos_gap(
    examples: Sequence[TokenizedExample],
    tokenizer: "PreTrainedTokenizerBase",
    token_logps: TokenLogps,
    max_length: int,
) -> dict[str, float]:
    """What the BOS before a prompt does: position/bos of them, and how much likelier a token is with one more or less.

    A prompt without BOS gets one; of a prompt with several, one is removed, and the only one too. Examples of
    max_length tokens, after which a model may have no position, are only counted.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return {}
    figures = {"position/bos": float(np.mean([leading(example.prompt, bos) for example in examples]))}
    kept = [each for each in examples if len(each.prompt) + max(map(len, each.responses)) < max_length]
    if not kept:
        return figures
    toggled = [replace(each, prompt=toggle(each.prompt, bos)) for each in kept]
    return figures | {"position/gap_bos": token_logps(toggled).per_token() - token_logps(kept).per_token()}


def toggle(prompt: list[int], bos: int) -> list[int]:
    return prompt[1:] if prompt[0] == bos and len(prompt) > 1 else [bos, *prompt]


def leading(ids: Sequence[int], token: int) -> int:
    """How often a token is repeated at the start."""
    return next((i for i, other in enumerate(ids) if other != token), len(ids))


@dataclass(frozen=True)
class Formats:
    """Renders the pairs of an evaluation by another prompt_format than the one they have."""

    tokenizer: "PreTrainedTokenizerBase"
    tokenize: Tokenization
    settings: Settings

    def gaps(self, examples: Sequence[TokenizedExample], token_logps: TokenLogps) -> dict[str, float]:
        """By format, how much likelier a token of the responses is for the reference than as the data are rendered.

        The same for the first token alone, which depends most on how the prompt ends.
        """
        turns = [as_turns(example, self.tokenizer) for example in examples]
        kept = [(example, row) for example, row in zip(examples, turns, strict=True) if row is not None]
        if not kept:
            return {}
        now = token_logps([example for example, _ in kept])
        figures = {}
        for name, rendered in self.rendered([row for _, row in kept]):
            if [(one.prompt, one.responses) for one in rendered] != [(one.prompt, one.responses) for one, _ in kept]:
                then = token_logps(rendered)
                figures[f"format/{name}"] = then.per_token() - now.per_token()
                figures[f"format/{name}_first"] = then.first() - now.first()
        return figures

    def rendered(self, rows: Sequence[Row]) -> Iterator[tuple[str, list[TokenizedExample]]]:
        """Yield the rows in each format, unless the format cannot render them."""
        for name in ("chat", "hh", "text") if self.tokenizer.chat_template else ("hh", "text"):
            time = template_time(self.settings.chat_template_time)
            is_hh = name == "hh"
            formatter = RowFormatter("hh" if is_hh else "auto", self.tokenizer, self.settings.chat_template_args, time)
            encoder = Encoder(formatter, self.tokenize, sft=False)
            in_form = [as_text(row) for row in rows] if name == "text" else list(rows)
            try:
                encoded = encoder("", list(enumerate(in_form)), lambda row: row)
            except (UserError, UnusableRow):  # such as a system turn, which a template or hh refuses
                continue
            if len(encoded.records) == len(rows):
                yield name, [encoder.example(record, (0, 1), number, "") for number, record in encoded.records]


def as_turns(example: TokenizedExample, tokenizer: Any) -> Row | None:
    """A pair as messages: as in the data, or hh's turns, or one turn; None for responses of several turns."""
    if example.loss_masks or len(example.responses) != 2 or example.truncated:
        return None
    if example.text.messages is not None:
        contents = tokenizer.batch_decode([list(ids) for ids in example.responses], skip_special_tokens=True)
        return pair(list(example.text.messages), contents)
    prompt = example.text.prompt
    if not prompt.rstrip().endswith(ASSISTANT.strip()):
        return pair([{"role": "user", "content": prompt.strip()}], example.text.responses)
    turns: list[Message] = []
    for exchange in prompt.rstrip().removesuffix(ASSISTANT.strip()).split(HUMAN)[1:]:
        question, *answer = exchange.split(ASSISTANT)
        turns.append({"role": "user", "content": question.strip()})
        turns += [{"role": "assistant", "content": text.strip()} for text in answer[:1]]
    return pair(turns, example.text.responses) if turns and turns[-1]["role"] == "user" else None


def pair(prompt: list[Message], responses: Sequence[str]) -> Row:
    answers = tuple([{"role": "assistant", "content": text.strip()}] for text in responses)
    return Row(prompt, answers, pairs=((0, 1),))


def as_text(row: Row) -> Row:
    """The contents alone, as a base model continues them."""
    assert not isinstance(row.prompt, str)
    prompt = "".join(f"{turn['content']}\n" for turn in row.prompt)
    return replace(row, prompt=prompt, responses=tuple(turns[0]["content"] for turns in row.responses))
