"""Compares two models: samples from both for the same prompts, and lets a judge choose.

python -m tools.compare RUN_A RUN_B --judge COMMAND
python -m tools.compare RUN_A reference --judge COMMAND       RUN_B is the reference of RUN_A
python -m tools.compare RUN_A RUN_B --judge COMMAND --prompts FILE
python -m tools.compare FOLDER RUN_B --judge COMMAND          any trainer's model or adapter, with RUN_B's settings
python -m tools.compare FOLDER FOLDER --judge COMMAND --prompts FILE

A judge is a command that reads JSON lines {"prompt", "a", "b"} and writes A, B or tie for each: tools/judges.py.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo.reporting.comparison import Comparison
from dpo.system.console import guard_streams, log_message
from dpo.system.errors import UserError, exit_on_error
from tools.candidates import REFERENCE, Candidate, find_candidate, is_model_folder, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dpo.data.examples import TokenizedExample
    from dpo.data.rows import Row
    from dpo.settings.schema import Settings


# Prompts


@dataclass(frozen=True)
class Prompts:
    """A candidate's tokenized prompts; stops are stop tokens in addition to eos."""

    examples: "list[TokenizedExample]"
    tokenizer: "PreTrainedTokenizerBase"
    stops: list[int]

    def for_judge(self) -> list[Any]:
        """The prompts for a judge: texts, or messages if a chat template renders them."""
        return [example.text.original_prompt for example in self.examples]


def prompts_of_run(candidate: Candidate, n: int | None) -> Prompts:
    """The first n distinct prompts of a run's evaluation data."""
    from build import load_inputs
    from dpo.model.sampling import distinct_prompts

    inputs = load_inputs(candidate.settings, candidate.loss)
    examples = distinct_prompts(inputs.eval_batches, n or inputs.eval_batches.n_items)
    return Prompts(examples, inputs.tokenizer, inputs.stops)


def prompts_of_file(path: Path, candidate: Candidate, n: int | None) -> Prompts:
    """The first n prompts of a file, with the run's chat template and length limits."""
    from dpo.data.examples import Tokenization
    from dpo.data.formats import FileTable, read_json
    from dpo.data.formatting import RowFormatter, template_time
    from dpo.data.records import Encoder
    from dpo.model.loading import load_model_config
    from dpo.model.refusals import count_embeddings

    settings = candidate.settings
    config, tokenizer = load_model_config(settings.model, settings.chat_template)
    lengths = settings.max_length, settings.max_prompt_length
    vocab_size = count_embeddings(settings.model, config, tokenizer)
    tokenize = Tokenization(tokenizer, *lengths, settings.model.add_bos, vocab_size)
    time = template_time(settings.chat_template_time)
    formatter = RowFormatter(settings.prompt_format, tokenizer, settings.chat_template_args, time)
    raw_rows = islice(FileTable(path, read_json), n)
    rows = [(number, read_prompt(raw, settings, str(path), number)) for number, raw in raw_rows]
    if not rows:
        raise UserError(f"{path}: holds no prompt")
    examples = Encoder(formatter, tokenize, sft=False).prompts(str(path), rows)
    if n_truncated := sum(bool(example.truncated) for example in examples):
        log_message(f"{path}: {n_truncated} of {len(rows)} prompts are truncated for {candidate.name}.")
    is_chat = any(formatter.conversation(row) is not None for _, row in rows)
    return Prompts(examples, tokenizer, formatter.template.stops() if is_chat else [])


def read_prompt(row: Any, settings: "Settings", source: str, number: int) -> "Row":
    """The prompt of a row, without a response; UserError names the row."""
    from dpo.data.messages import as_messages, checked_text
    from dpo.data.rows import Row

    try:
        prompt = row["prompt"]
        if isinstance(prompt, str) and settings.prompt_format != "chat":
            return Row(checked_text(prompt, "prompt"), ())
        return Row(as_messages(prompt, "prompt", "user"), ())
    except (KeyError, TypeError):
        raise UserError(f'{source}, row {number}: is not {{"prompt": text or messages}}') from None
    except UserError as error:
        raise UserError(f"{source}, row {number}: {error}") from None


def same_prompts(a: Candidate, b: Candidate, file: Path | None, n: int | None) -> tuple[Prompts, Prompts]:
    """The same prompts for both candidates, from a file or their evaluation data; UserError if these differ."""
    if file is not None:
        return prompts_of_file(file, a, n), prompts_of_file(file, b, n)
    of_a, of_b = prompts_of_run(a, n), prompts_of_run(b, n)
    n = min(len(of_a.examples), len(of_b.examples))
    of_a = replace(of_a, examples=of_a.examples[:n])
    of_b = replace(of_b, examples=of_b.examples[:n])
    if of_a.for_judge() != of_b.for_judge():
        raise UserError("the two runs evaluate on different prompts; give --prompts FILE")
    return of_a, of_b


# Samples


def sample(candidate: Candidate, prompts: Prompts, like: "Settings") -> list[str]:
    """A text per prompt, sampled with the temperature, limits and seed of `like`."""
    import torch

    from dpo.model.loading import set_quantized_products
    from dpo.model.sampling import Sampler
    from dpo.system.devices import compute_dtype, limit_onednn_cache, pick_device

    limit_onednn_cache()
    settings = candidate.settings
    device = pick_device(settings.device)
    dtype = compute_dtype(settings.compute_precision, getattr(torch, settings.model.policy_dtype), device)
    model = load_model(candidate, device)
    set_quantized_products(model, dtype)
    max_length = min(settings.max_length, like.max_length)
    sampler = replace(Sampler.of(like, prompts.tokenizer, device, dtype), max_length=max_length, stops=prompts.stops)
    return sampler.fit(model).generate(model, prompts.examples, f"sampling {candidate.name}")


# The command line


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_a", type=Path, metavar="RUN_A", help="a run, RUN/step-N, or a model's folder")
    parser.add_argument("run_b", type=Path, metavar="RUN_B", help=f"another one, or {REFERENCE}")
    parser.add_argument("--judge", required=True, metavar="COMMAND", help="a command that answers A, B or tie")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help='JSON lines {"prompt": text or messages}')
    parser.add_argument("--n", type=int, metavar="N", help="compare on the first N prompts")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write prompts, texts and answers as JSON lines")
    options = parser.parse_args(arguments)
    if options.n is not None and options.n < 1:
        parser.error("--n: must be 1 or more")
    return options


def find_candidates(path_a: Path, path_b: Path, prompts: Path | None) -> tuple[Candidate, Candidate]:
    """Both candidates; the model of a folder has the settings of the other's run, if that is one."""
    if str(path_b) == REFERENCE:
        return find_candidate(path_a), find_candidate(path_a, as_reference=True)
    if not is_model_folder(path_a):
        a = find_candidate(path_a)
        return a, find_candidate(path_b, like=a)
    if is_model_folder(path_b) and prompts is None:
        raise UserError(f"{path_a}, {path_b}: neither is a run, so nothing says what to ask; give --prompts FILE")
    b = find_candidate(path_b)
    return find_candidate(path_a, like=b), b


def compare(options: argparse.Namespace) -> Comparison:
    """Sample from both models and ask the judge."""
    from utils import register_resolvers

    register_resolvers()
    a, b = find_candidates(options.run_a, options.run_b, options.prompts)
    prompts_of_a, prompts_of_b = same_prompts(a, b, options.prompts, options.n)
    texts_of_a = sample(a, prompts_of_a, a.settings)
    texts_of_b = sample(b, prompts_of_b, a.settings)
    log_message(f"A: {a.name}\nB: {b.name}")
    return Comparison.judged(options.judge, prompts_of_a.for_judge(), texts_of_a, texts_of_b)


def main() -> None:
    guard_streams()
    options = parse_arguments()
    comparison = compare(options)
    log_message("\n".join(comparison.summary()))
    if options.output is not None:
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in comparison.rows())
        options.output.write_text(text, encoding="utf-8", errors="backslashreplace")
        log_message(f"Wrote {options.output}")


if __name__ == "__main__":
    exit_on_error(main)
