"""Figures of the policy's tokenizer, compared with the reference's: what an export may have broken."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dpo.model.loading import load_tokenizer
from tools.diagnose.checkpoints import Checkpoint, Model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dpo.data.examples import TokenizedExample
    from trainers import Inputs

N_TEXTS = 200  # that are tokenized by both


def tokenizer_figures(
    policy: Checkpoint, reference: Checkpoint, model: "PreTrainedModel", inputs: "Inputs"
) -> dict[str, float]:
    """What differs between the two tokenizers on the texts of the data.

    tokenizer/round_trip   share of the texts that the policy's tokenizer gives back unchanged
    tokenizer/lost         how much smaller that is than the reference's share
    tokenizer/same         share of the texts that both turn into the same ids
    tokenizer/other_eos    1 if their eos tokens have different ids, else 0
    tokenizer/no_template  1 if only the reference's has a chat template, else 0
    tokenizer/stops        share of the tokens that end a response at which generation stops, by generation_config
    """
    own = inputs.tokenizer
    texts = texts_of(inputs)
    figures = {"tokenizer/round_trip": round_trip(own, texts)}
    if isinstance(policy, Model):
        stops = {own.eos_token_id, *inputs.stops} - {None}
        eos = model.generation_config.eos_token_id if model.generation_config else None
        known = {eos} if isinstance(eos, int) else set(eos or ())
        ends = {ids[-1] for example in first_examples(inputs) for ids in example.responses} & stops
        if ends:
            figures["tokenizer/stops"] = len(ends & known) / len(ends)
    try:
        other = load_tokenizer(reference.tokenizer_name)
    except Exception:  # transformers raises nearly anything; the reference needs no tokenizer
        return figures
    same = [a == b for a, b in zip(ids_of(own, texts), ids_of(other, texts), strict=True)]
    return figures | {
        "tokenizer/lost": max(0.0, round_trip(other, texts) - figures["tokenizer/round_trip"]),
        "tokenizer/same": sum(same) / len(same),
        "tokenizer/other_eos": float(own.eos_token_id != other.eos_token_id),
        "tokenizer/no_template": float(bool(other.chat_template) and not own.chat_template),
    }


def first_examples(inputs: "Inputs") -> list["TokenizedExample"]:
    return [example for batch in inputs.eval_batches.from_start() for example in batch.examples][: N_TEXTS // 2]


def texts_of(inputs: "Inputs") -> list[str]:
    """The responses without special tokens, which only one of the tokenizers may have."""
    texts: list[str] = []
    for example in first_examples(inputs):
        is_rendered = example.text.messages is not None
        decoded = inputs.tokenizer.batch_decode(list(example.responses), skip_special_tokens=True)
        texts += decoded if is_rendered else example.text.responses
    return texts


def ids_of(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def round_trip(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> float:
    """The share of texts that are the same after encoding and decoding."""
    decoded = tokenizer.batch_decode(ids_of(tokenizer, texts), clean_up_tokenization_spaces=False)
    return sum(text == back for text, back in zip(texts, decoded, strict=True)) / len(texts)
