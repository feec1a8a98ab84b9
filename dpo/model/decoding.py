"""Decoding: many samples of a batch of prompts, each drawn with random numbers of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from inspect import signature
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from dpo.model.attention import torch_attention
from dpo.model.cuda_graphs import Recorder, Step
from dpo.model.layout_check import TOLERANCE, float32_parameters
from dpo.model.routers import no_router_logits
from dpo.settings.schema import Settings
from dpo.system.console import log_message
from dpo.system.devices import autocast
from dpo.system.errors import RunError, is_out_of_memory, summarize_error

PRECISION = 31  # bits of a random number and of a probability; the product of two fits into 64 bits
CACHE_NAMES = ("past_key_values", "cache_params")  # of a model's output, and of the argument that takes it back


class Rows(Protocol):
    """Texts that grow by a token at a time. logits, (rows, vocabulary), are those of the next token of each."""

    logits: Tensor

    @property
    def check_every(self) -> int:
        """The tokens after which is looked for rows that have ended. Each look waits for the device."""

    @property
    def ended_share(self) -> float:
        """Rows that have ended are dropped if they are more than this share."""

    def select(self, rows: Tensor) -> None:
        """Keep the rows with these indices, in this order; a row that is named several times is repeated."""

    def append(self, tokens: Tensor) -> None:
        """Append a token to each row, and compute the next logits.

        With check_every above 1, a negative token is none: its row has ended.
        """


MakeRows = Callable[[PreTrainedModel, Sequence[Sequence[int]]], Rows]  # of a model and prompts


def last_logits(model: PreTrainedModel) -> dict[str, Any]:
    """The arguments with which a model computes no more logits than those of the last position, if it can."""
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    return only_last | no_router_logits(model.config)


class CachedRows:
    """Rows with a key-value cache. Prompts are padded on the left, by any token: it is masked by position."""

    check_every, ended_share = 1, 0.0

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]):
        self.model = model
        self.takes_positions = "position_ids" in signature(model.forward).parameters
        self.cache: dict[str, Any] = {}
        width = max(map(len, prompts))
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        ids = torch.tensor([[0] * (width - len(p)) + [*p] for p in prompts], device=model.device)
        self.logits = self.forward(ids)

    def forward(self, ids: Tensor) -> Tensor:
        options = {"attention_mask": self.mask, "use_cache": True, **last_logits(self.model), **self.cache}
        if self.takes_positions:
            options["position_ids"] = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        # Some families take no mask beside a cache, or other arguments; generate asks this method for them too.
        prepare: Any = self.model.prepare_inputs_for_generation
        inputs = prepare(ids, is_first_iteration=not self.cache, **options)
        output = self.model(**inputs, return_dict=True)
        self.cache = {name: output[name] for name in CACHE_NAMES if name in output}
        return output.logits[:, -1]

    def select(self, rows: Tensor) -> None:
        self.logits, self.mask = self.logits[rows], self.mask[rows]
        for cache in self.cache.values():
            cache.reorder_cache(rows)  # made for beam search, so that every kind of cache has it

    def append(self, tokens: Tensor) -> None:
        self.mask = torch.cat((self.mask, torch.ones_like(self.mask[:, :1])), dim=1)
        self.logits = self.forward(tokens[:, None])


class StaticRows(CachedRows):
    """Rows whose keys and values lie in buffers with room for further tokens, so that a GPU can replay a step.

    A step is the same work for every token, on the same tensors. It is recorded anew after rows have left or slots were
    added, so rows leave only when half of them have ended. recorder=None: nothing is recorded. A graph is freed only
    after tensors were moved, which waits for the device: one that still runs needs its memory.
    """

    check_every, ended_share = 16, 0.5
    tokens: Tensor
    slot: Tensor  # of the next token

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], recorder: Recorder | None = None):
        super().__init__(model, prompts)
        self.recorder = recorder
        self.recorded: Step | None = None
        self.is_ready = False  # whether the tensors of the step are those of the last one
        self.n_slots = self.mask.shape[1]  # that are used

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.is_ready, self.recorded = False, None

    def append(self, tokens: Tensor) -> None:
        if self.n_slots + 2 > self.mask.shape[1]:  # recording computes two steps
            self.add_slots()
        if not self.is_ready:
            self.tokens, self.slot = tokens[:, None].clone(), torch.tensor([self.n_slots], device=tokens.device)
            lengths = [layer.cumulative_length for layer in self.cache["past_key_values"].layers]
            changed = [self.mask, self.slot, *lengths]
            self.recorded = None if self.recorder is None else self.recorder(self.step, changed, self.logits)
            self.is_ready = True
        self.tokens.copy_(tokens[:, None])
        (self.recorded or self.step)()
        self.n_slots += 1

    def step(self) -> None:
        self.mask.index_copy_(1, self.slot, (self.tokens >= 0).to(self.mask.dtype))
        self.logits.copy_(self.forward(self.tokens.clamp(min=0)))
        self.slot.add_(1)

    def add_slots(self) -> None:
        """Move keys and values to larger buffers. Kernels are faster on multiples of 64 slots."""
        length = -(-(self.n_slots * 3 // 2 + 128) // 64) * 64
        self.mask = F.pad(self.mask, (0, length - self.mask.shape[1]))
        layers = self.cache["past_key_values"].layers
        for i, layer in enumerate(layers):  # one by one, so that little memory is taken twice
            layers[i] = SlotLayer(layer, self.n_slots, length)
        self.cache = {"past_key_values": Cache(layers=layers)}
        self.is_ready, self.recorded = False, None


class SlotLayer(StaticLayer):
    """A layer's keys and values in buffers of `length` slots, n_slots of them used; TypeError if it has others.

    A layer with a sliding window gets slots for all tokens as well; the mask hides those outside of the window. Under
    autocast, keys and values are kept in the dtype to which attention casts them: keys are in float32, values are not.
    """

    def __init__(self, layer: Any, n_slots: int, length: int):
        if not isinstance(layer, SlotLayer) and type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise TypeError(f"it has a {type(layer).__name__}")
        super().__init__(length)
        kind = layer.keys.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else layer.keys.dtype
        known = [states[:, :, :n_slots].to(dtype) for states in (layer.keys, layer.values)]
        self.lazy_initialization(*known)
        self.cumulative_length.fill_(n_slots)
        for buffer, states in zip((self.keys, self.values), known, strict=True):
            assert buffer is not None
            buffer[:, :, n_slots - states.shape[2] : n_slots] = states  # a sliding window keeps the last ones

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        dtype = self.keys.dtype
        return super().update(key_states.to(dtype), value_states.to(dtype), *args, **kwargs)


class WholeRows:
    """Rows without cache and padding: every step computes the whole texts, those of one length together."""

    check_every, ended_share = 1, 0.0

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Sequence[int]]):
        self.model = model
        self.texts = [list(prompt) for prompt in prompts]
        self.logits = self.forward()

    def forward(self) -> Tensor:
        found: dict[int, Tensor] = {}
        for length in {len(text) for text in self.texts}:
            rows = [i for i, text in enumerate(self.texts) if len(text) == length]
            ids = torch.tensor([self.texts[i] for i in rows], device=self.model.device)
            logits = self.model(input_ids=ids, use_cache=False, **last_logits(self.model)).logits[:, -1]
            found |= dict(zip(rows, logits, strict=True))
        return torch.stack([found[i] for i in range(len(self.texts))])

    def select(self, rows: Tensor) -> None:
        self.logits = self.logits[rows]
        self.texts = [list(self.texts[i]) for i in rows.tolist()]

    def append(self, tokens: Tensor) -> None:
        for text, token in zip(self.texts, tokens.tolist(), strict=True):
            text.append(token)
        self.logits = self.forward()


def kinds_of_rows(device: torch.device) -> dict[str, MakeRows]:
    """The kinds of rows to try on a device, fastest first, by the name of their cache."""
    kinds: dict[str, MakeRows] = {"key-value cache": CachedRows}
    if device.type == "cuda":
        kinds = {"static key-value cache": partial(StaticRows, recorder=Recorder()), **kinds}
    return kinds


@torch.no_grad()
def choose_rows(
    model: PreTrainedModel,
    max_length: int,
    dtype: torch.dtype = torch.float32,
    kinds: Mapping[str, MakeRows] | None = None,
) -> MakeRows:
    """The first of the device's kinds, or of others, that changes no log-probabilities; else WholeRows.

    The comparison is in float32 without TF32, on a short text and one of max_length tokens, since a sliding window
    shows only there. The rows are repeated, selected and dropped as in decoding. Then they are computed in dtype.
    """
    n_ids = model.get_input_embeddings().get_parameter("weight").shape[0]
    texts = [[i % n_ids for i in range(length)] for length in (max(1, max_length // 4), max(1, max_length - 2))]

    def trial(kind: MakeRows) -> Tensor:
        rows, found = kind(model, texts), []
        for selected in ([1, 0, 0], [2, 1]):
            rows.select(torch.tensor(selected, device=model.device))
            rows.append(torch.arange(len(selected), device=model.device))
            found.append(rows.logits.log_softmax(-1))
        return torch.cat(found)

    with torch_attention(model):
        with float32_parameters(model):
            whole = trial(WholeRows)
        for name, kind in (kinds or kinds_of_rows(model.device)).items():
            try:
                with float32_parameters(model):
                    worst = (whole.exp() * (trial(kind) - whole).abs()).sum(-1).max().item()  # mean over drawn tokens
                if worst <= TOLERANCE:
                    with autocast(model.dtype, dtype, model.device):
                        trial(kind)
                    return kind
                problem = f"changes log-probabilities by {worst:.2g} nats per token"
            except Exception as error:  # a model with another kind of cache fails in many ways
                if is_out_of_memory(error):
                    raise
                problem = f"fails ({type(error).__name__}: {summarize_error(error)})"
            log_message(f"This model's {name} {problem}.")
    log_message("Each token is computed from its whole text, which is slow.")
    return WholeRows


@dataclass(frozen=True)
class Continuation:
    """Sampled ids, with the stop token if it finished, and log pi(ids | prompt) at temperature 1."""

    ids: list[int]
    finished: bool
    logp: float


@dataclass(frozen=True)
class Decoder:
    """Settings of decoding; max_length counts the tokens of prompt and continuation together."""

    max_length: int
    temperature: float
    top_k: int
    top_p: float
    dtype: torch.dtype  # the compute dtype, if the model's parameters are in float32
    stops: Sequence[int]  # with eos

    @classmethod
    def of(
        cls, settings: Settings, tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], dtype: torch.dtype
    ) -> "Decoder":
        """The decoder of a run's settings; stops are stop tokens in addition to eos."""
        return cls(
            max_length=settings.max_length,
            temperature=settings.sample_temperature,
            top_k=settings.sample_top_k,
            top_p=settings.sample_top_p,
            dtype=dtype,
            stops=(tokenizer.eos_token_id, *stops),
        )

    @cached_property
    def warpers(self) -> LogitsProcessorList:
        """What generate applies to logits for the same settings, in its order."""
        warpers = LogitsProcessorList()
        if self.temperature != 1:
            warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers

    def limit(self, prompt: Sequence[int]) -> int:
        """The most tokens of a continuation; a prompt that leaves no room gets one."""
        return max(1, self.max_length - len(prompt))

    @torch.no_grad()
    def decode(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        kind: MakeRows = CachedRows,
    ) -> list[Continuation]:
        """Continue each prompt with the random numbers of its seed. kind is that of choose_rows.

        A continuation depends on its prompt and seed alone, except by rounding. Equal prompts are computed once, and
        rows that have ended no more. RunError if logits are not finite.
        """
        limits = [self.limit(prompt) for prompt in prompts]
        shape, device = (len(prompts), max(limits)), model.device
        randoms = torch.zeros(shape, dtype=torch.int64)
        for row, (seed, limit) in enumerate(zip(seeds, limits, strict=True)):
            generator = torch.Generator().manual_seed(seed)
            randoms[row, :limit] = torch.randint(2**PRECISION, (limit,), generator=generator)
        randoms, stops = randoms.to(device), torch.tensor(self.stops, device=device)
        last_steps = torch.tensor(limits, device=device) - 1
        ids = torch.full(shape, -1, device=device)
        logps = torch.zeros(shape, device=device)
        live = torch.arange(len(prompts), device=device)
        places = {prompt: place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        with torch_attention(model), autocast(model.dtype, self.dtype, device):
            rows = kind(model, list(places))
            rows.select(torch.tensor([places[tuple(prompt)] for prompt in prompts], device=device))
            is_live = torch.ones_like(live, dtype=torch.bool)
            for step in range(max(limits)):
                logits = rows.logits.float()
                scores = self.warpers(
                    cast(torch.LongTensor, ids), cast(torch.FloatTensor, logits)
                )  # which ignore the ids
                tokens = draw(scores, randoms[live, step])
                logp = logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
                ids[live, step], logps[live, step] = tokens.where(is_live, -1), logp.where(is_live, 0.0)
                ended = torch.isin(tokens, stops) | (last_steps[live] == step) | ~logp.isfinite()
                is_live &= ~ended
                tokens = tokens.where(is_live, -1)
                if (step + 1) % rows.check_every == 0 or step + 1 == max(limits):
                    kept = is_live.nonzero()[:, 0]
                    if not len(kept):
                        break
                    if len(live) - len(kept) > rows.ended_share * len(live):
                        live, tokens, is_live = live[kept], tokens[kept], is_live[kept]
                        rows.select(kept)
                rows.append(tokens)
        if not logps.isfinite().all():
            raise RunError(
                "the policy's logits are not finite; its weights are broken, or overflow in 16 bits", "not finite"
            )
        continuations = []
        for drawn, logp in zip(ids.tolist(), logps.double().sum(1).tolist(), strict=True):
            drawn = [token for token in drawn if token >= 0]
            continuations.append(Continuation(drawn, drawn[-1] in self.stops, logp))
        return continuations


def draw(scores: Tensor, randoms: Tensor) -> Tensor:
    """A token for each row of logits, by the inverse of its cumulative distribution.

    randoms are whole numbers below 2**PRECISION. Probabilities are made whole numbers too: their sums are then exact
    and never fall, whatever the order in which a device adds, so that no token of probability 0 is drawn.
    """
    weights = (scores.softmax(-1) * 2**PRECISION).round().to(torch.int64)
    sums = weights.cumsum(-1)
    targets = (randoms * sums[:, -1]) >> PRECISION
    return torch.searchsorted(sums, targets[:, None], right=True)[:, 0].clamp(max=scores.shape[1] - 1)
