"""dry_run=true: forecasts the tokens, the time and the scorer's calls of each stage, from samples for a few prompts."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from math import comb, perm
from tempfile import TemporaryDirectory

from build import load_inputs
from dpo.settings.schema import default_values, flatten, validate
from dpo.system.console import log_message
from dpo.system.installation import CONFIG
from dpo.system.signals import Signals
from losses import LOSSES
from tools.dry_run import dry_run as forecast_run
from tools.dry_run import duration
from tools.rounds.answers import answer_requests, requests_of
from tools.rounds.drawing import Drawing, read_samples
from tools.rounds.engines import BuiltinEngine
from tools.rounds.pairs import Pair, Scored, split_rows, to_row
from tools.rounds.policies import Policy
from tools.rounds.prompts import PromptReader, prompts_of_round, split_prompts
from tools.rounds.records import Prompt
from tools.rounds.scoring import Texts, distinct_texts, is_usable
from tools.rounds.settings import Config
from tools.rounds.store import Shards, write_rows
from tools.rounds.training import find_policy, round_dir, run_config

N_PROMPTS = 32  # prompts that are sampled for, each twice
MAX_PAIRS = 20_000  # on which training is forecast


@dataclass(frozen=True)
class Measured:
    """What a few samples showed. Seconds are None if they were not measured: of servers, commands and paid scorers."""

    tokens_per_sample: float
    seconds_per_sample: float | None
    seconds_per_answer: float | None
    seconds_of_training: float | None


def dry_run(config: Config) -> None:
    """Print the forecast. Files are temporary; no server and no command is started, and no paid call is made."""
    reader, rounds, seed = PromptReader(config.run), config.rounds, config.run.seed
    prompts, held_out = split_prompts(reader, rounds, seed)
    chosen = prompts_of_round(prompts, 1, rounds.prompts_per_round, seed)
    with TemporaryDirectory() as folder:
        values = config.values.copy()
        values.local_run_dir = folder
        measured = measure(replace(config, values=values), reader, chosen)
    report(config, measured, len(chosen), len(held_out))


def measure(config: Config, reader: PromptReader, prompts: Sequence[Prompt]) -> Measured:
    """Sample twice for a few prompts with this project's engine, score, pair and train on copies of these pairs."""
    few, out = prompts[:N_PROMPTS], config.out
    policy = Policy(find_policy(config, 0), reader.tokenizer, reader.stops, out / "model")
    is_builtin = isinstance(config.engine, BuiltinEngine)
    engine = config.engine if is_builtin else BuiltinEngine(batch_size=2 * N_PROMPTS)
    start = time.perf_counter()
    drawing = Drawing(engine, policy, few, 2, "dry-run", out / "samples.jsonl")
    drawing.run()
    samples = read_samples(drawing.path)
    per_sample = (time.perf_counter() - start) / len(samples)
    texts = distinct_texts([sample for sample in samples if is_usable(sample)])
    per_answer = None if config.scorer.is_paid else time_answers(config, few, texts)
    pairs = [
        to_row(prompt, Pair(Scored(one, 1.0), Scored(other, 0.0)))
        for prompt, one, other in zip(few, samples[::2], samples[1::2], strict=True)
    ]
    n_pairs = min(MAX_PAIRS, len(prompts) * pairs_per_prompt(config))
    for name, part in zip(("train", "test"), split_rows(list(islice(cycle(pairs), n_pairs)), 0), strict=True):
        write_rows(round_dir(out, 1) / "data" / f"{name}.jsonl", part)
    values = run_config(config, 1)
    settings, loss = validate(flatten(values), default_values(CONFIG, values.loss.name), LOSSES)
    log_message("A training run, on pairs of these samples:")
    training = forecast_run(settings, loss, load_inputs(settings, loss), values, Signals())
    n_tokens = sum(len(sample.ids) for sample in samples)
    return Measured(n_tokens / len(samples), per_sample if is_builtin else None, per_answer, training)


def time_answers(config: Config, prompts: Sequence[Prompt], texts: Texts) -> float | None:
    """Seconds per request of the scorer, with loading it; None if no sample is worth a score."""
    scorer, by_id = config.scorer, {prompt.id: prompt.prompt for prompt in prompts}
    requests = [request for id in texts for request in requests_of(scorer, by_id[id], texts[id])]
    if not requests:
        return None
    start = time.perf_counter()
    cache = Shards(config.out / "answers.jsonl", "key")
    answer_requests(scorer, scorer.fingerprint(), config.run.device, requests, cache)
    return (time.perf_counter() - start) / len(requests)


def pairs_per_prompt(config: Config) -> int:
    """The number of pairs of a prompt, at most."""
    return comb(config.rounds.samples, 2) if config.rounds.pairing == "all" else 1


def report(config: Config, measured: Measured, n_prompts: int, n_held_out: int) -> None:
    rounds, scorer = config.rounds, config.scorer
    n_samples = n_prompts * rounds.samples
    per_prompt = perm(rounds.samples, 2) if scorer.is_pairwise else rounds.samples
    n_answers = n_prompts * per_prompt
    n_judged = n_held_out * (2 if scorer.is_pairwise else 1)
    parts = {
        f"{n_samples:,} samples, {n_samples * measured.tokens_per_sample:,.0f} tokens": (
            scaled(measured.seconds_per_sample, n_samples)
        ),
        f"up to {n_answers:,} calls of the scorer": scaled(measured.seconds_per_answer, n_answers),
        f"training on up to {n_prompts * pairs_per_prompt(config):,} pairs": measured.seconds_of_training,
        f"{n_held_out:,} held-out samples": scaled(measured.seconds_per_sample, n_held_out),
        f"up to {n_judged:,} calls to judge them": scaled(measured.seconds_per_answer, n_judged),
    }
    lines = [f"  {what}: {'not measured' if seconds is None else duration(seconds)}" for what, seconds in parts.items()]
    known = sum(seconds for seconds in parts.values() if seconds is not None)
    calls = rounds.rounds * n_answers + (rounds.rounds + (not scorer.is_pairwise)) * n_judged
    log_message("\n".join(["Each round, measured on a few samples:", *lines]))
    log_message(
        f"{rounds.rounds} rounds: {duration(rounds.rounds * known)} for what was measured, and up to {calls:,} calls "
        "of the scorer. Equal texts are asked about once."
    )


def scaled(seconds: float | None, n: int) -> float | None:
    return None if seconds is None else seconds * n
