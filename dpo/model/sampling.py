"""Sampling: one continuation per prompt, with a separate random state."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpo.data.batches import BatchIterator
from dpo.data.examples import TokenizedExample, padding_id
from dpo.model.attention import torch_attention
from dpo.model.decoding import Decoder, MakeRows, choose_rows
from dpo.settings.schema import Settings
from dpo.system.console import progress
from dpo.system.devices import autocast
from dpo.system.errors import actionable_errors


@dataclass(frozen=True)
class Sampler:
    """Settings of sampling; max_length counts the tokens of prompt and continuation together.

    transformers' generate samples, or on a GPU a Decoder.
    """

    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype  # the compute dtype, if the model's parameters are in float32
    max_length: int
    batch_size: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    before_batch: Callable[[], None] = lambda: None  # raises to stop the run
    stops: Sequence[int] = ()  # stop tokens in addition to eos
    rows: MakeRows | None = None  # of the Decoder; None: generate

    @classmethod
    def of(
        cls, settings: Settings, tokenizer: PreTrainedTokenizerBase, device: torch.device, dtype: torch.dtype
    ) -> "Sampler":
        return cls(
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            max_length=settings.max_length,
            batch_size=settings.eval_batch_size,
            temperature=settings.sample_temperature,
            top_k=settings.sample_top_k,
            top_p=settings.sample_top_p,
            seed=settings.seed,
        )

    def fit(self, model: PreTrainedModel) -> "Sampler":
        """On a GPU, sample by a Decoder with the cache that fits the model, whose weights must not be sharded."""
        if self.device.type != "cuda":
            return self
        return replace(self, rows=choose_rows(model, self.max_length, self.dtype))

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end a response."""
        return list(dict.fromkeys((self.tokenizer.eos_token_id, *self.stops)))

    def generate(self, model: PreTrainedModel, prompts: Sequence[TokenizedExample], title: str) -> list[str]:
        """The texts of `sample`."""
        return [sample.text.responses[0] for sample in self.sample(model, prompts, title)]

    @torch.no_grad()
    def sample(self, model: PreTrainedModel, prompts: Sequence[TokenizedExample], title: str) -> list[TokenizedExample]:
        """Sample one response per prompt, the same for the same model and seed; return prompts with responses.

        A response's token ids include the stop token, if any. Its text has no special tokens.
        """
        model.eval()
        size = self.batch_size
        order = list(range(len(prompts)))
        if self.rows is not None:  # little padding
            order.sort(key=lambda i: len(prompts[i].prompt))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        samples = {}
        devices = [self.device] if self.device.type == "cuda" else []
        hint = f"while sampling for {min(size, len(prompts))} prompts at a time; lower eval_batch_size"
        with torch.random.fork_rng(devices), autocast(model.dtype, self.dtype, self.device), actionable_errors(hint):
            torch.manual_seed(self.seed)
            with default_generation_config(model), torch_attention(model):
                for batch in progress(batches, title):
                    self.before_batch()
                    responses = self.generate_batch(model, [prompts[i].prompt for i in batch])
                    texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
                    for i, text, response in zip(batch, texts, responses, strict=True):
                        example = replace(prompts[i].text, responses=(text,))
                        samples[i] = TokenizedExample(example, prompts[i].prompt, (response,))
        return [samples[i] for i in range(len(prompts))]

    def generate_batch(self, model: PreTrainedModel, prompts: Sequence[list[int]]) -> list[list[int]]:
        """Sample continuations of token ids. Prompts are padded on the left, and masked by position."""
        if self.rows is not None:
            decoder = Decoder(
                self.max_length, self.temperature, self.top_k, self.top_p, self.dtype, tuple(self.stop_ids)
            )
            seeds = torch.randint(2**62, (len(prompts),)).tolist()
            return [one.ids for one in decoder.decode(model, prompts, seeds, self.rows)]
        width = max(map(len, prompts))
        pad_id = padding_id(self.tokenizer, model.config.get_text_config().vocab_size)
        ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        config = self.generation_config(width, pad_id)
        output = model.generate(**inputs, generation_config=config)  # type: ignore[operator]  # known to causal models
        return [up_to_stop(row, config.eos_token_id) for row in output[:, width:].tolist()]

    def generation_config(self, prompt_length: int, pad_id: int) -> GenerationConfig:
        return GenerationConfig(
            do_sample=True,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            max_new_tokens=max(1, self.max_length - prompt_length),
            pad_token_id=pad_id,
            eos_token_id=self.stop_ids,
        )


def up_to_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Cut ids after the first stop token: what follows is padding."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return ids[: end + 1]


def add_stops(config: GenerationConfig, stops: Sequence[int]) -> None:
    """Add ids to the stop tokens of a model's generation config."""
    existing = config.eos_token_id
    existing = [existing] if isinstance(existing, int) else list(existing or ())
    config.eos_token_id = list(dict.fromkeys((*existing, *stops)))


@contextmanager
def default_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Disable the generation settings that came with the model, such as a repetition penalty."""
    original = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = original


def distinct_prompts(batches: BatchIterator, n: int) -> list[TokenizedExample]:
    prompts: dict[str, TokenizedExample] = {}
    for batch in batches.from_start():
        for example in batch.examples:
            prompts.setdefault(example.text.prompt, example)
        if len(prompts) >= n:
            break
    return list(prompts.values())[:n]
