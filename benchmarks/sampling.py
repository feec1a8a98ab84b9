"""Sampling: samples per second and peak memory of the rounds' built-in engine, beside `generate` as it is called.

    python benchmarks/sampling.py --model DIR --data FILE

FILE has a prompt per line, JSON {"prompt": text or messages}; the model's chat template renders messages. All ways
sample for the same prompts, in turn, in one process. Speed is the median ratio of the process's CPU time per token,
which other processes hardly change (so run it with one thread on a CPU); samples per second are by the clock. Memory is
the peak of a process of its own for each way. Writes a Markdown table to stdout.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpo.model.decoding import Decoder
from dpo.model.sampling import up_to_stop
from dpo.system.devices import limit_onednn_cache, peak_memory, pick_device, reset_peak_memory

Ids = list[int]


class LikeGenerate(Decoder):
    """max_length counts the tokens of the continuation alone."""

    def limit(self, prompt: Sequence[int]) -> int:
        return self.max_length


@dataclass(frozen=True)
class Bench:
    """The prompts, and what is drawn for each: `samples` texts of at most `tokens` tokens, `rows` at a time."""

    prompts: list[Ids]
    samples: int
    tokens: int
    rows: int
    eos: int

    def generate_each(self, model: PreTrainedModel, dtype: torch.dtype) -> list[Ids]:
        """One call for each prompt."""
        return [ids for prompt in self.prompts for ids in self.generate(model, [prompt])]

    def generate_padded(self, model: PreTrainedModel, dtype: torch.dtype) -> list[Ids]:
        """Calls for as many prompts as fit into `rows`, in the order of the data."""
        n = max(1, self.rows // self.samples)
        starts = range(0, len(self.prompts), n)
        return [ids for start in starts for ids in self.generate(model, self.prompts[start : start + n])]

    def generate(self, model: PreTrainedModel, prompts: list[Ids]) -> list[Ids]:
        width = max(map(len, prompts))
        ids = torch.tensor([[self.eos] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=ids.device)
        output = model.generate(  # type: ignore[operator]  # known to causal models
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.tokens,
            num_return_sequences=self.samples,
            eos_token_id=self.eos,
            pad_token_id=self.eos,
        )
        return [up_to_stop(row, [self.eos]) for row in output[:, width:].tolist()]

    def engine(self, model: PreTrainedModel, dtype: torch.dtype) -> list[Ids]:
        """The batches of BuiltinEngine."""
        rows = [prompt for prompt in sorted(self.prompts, key=len) for _ in range(self.samples)]
        drawn: list[Ids] = []
        for start in range(0, len(rows), self.rows):
            batch = rows[start : start + self.rows]
            decoder = LikeGenerate(self.tokens, 1.0, 0, 1.0, dtype, (self.eos,))
            continuations = decoder.decode(model, batch, range(start, start + len(batch)))
            drawn += [continuation.ids for continuation in continuations]
        return drawn


@dataclass(frozen=True)
class Way:
    """A row of the table: the dtype of the weights, and that of the computation."""

    draw: Callable[[Bench, PreTrainedModel, torch.dtype], list[Ids]]
    weights: torch.dtype
    dtype: torch.dtype


WAYS = {
    "generate, each prompt, float32": Way(Bench.generate_each, torch.float32, torch.float32),
    "generate, padded, float32": Way(Bench.generate_padded, torch.float32, torch.float32),
    "engine, float32": Way(Bench.engine, torch.float32, torch.float32),
    "generate, each prompt, bfloat16 weights": Way(Bench.generate_each, torch.bfloat16, torch.bfloat16),
    "generate, padded, bfloat16 weights": Way(Bench.generate_padded, torch.bfloat16, torch.bfloat16),
    "engine, bfloat16 weights": Way(Bench.engine, torch.bfloat16, torch.bfloat16),
    "engine, bfloat16 by autocast": Way(Bench.engine, torch.float32, torch.bfloat16),
}


def read_prompts(args: argparse.Namespace) -> Bench:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts: list[Ids] = []
    for line in args.data.read_text().splitlines():
        prompt = json.loads(line)["prompt"]
        if not isinstance(prompt, str):
            prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        if len(ids) <= args.max_prompt_tokens:
            prompts.append(ids)
    return Bench(prompts[: args.prompts], args.samples, args.tokens, args.rows, tokenizer.eos_token_id)


def load(args: argparse.Namespace, dtype: torch.dtype) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).eval()
    return model.to(pick_device(args.device))  # type: ignore[arg-type]  # a decorator hides its arguments


def measure(args: argparse.Namespace, names: list[str]) -> None:
    """Print the table of some ways."""
    bench = read_prompts(args)
    models = {dtype: load(args, dtype) for dtype in {WAYS[name].weights for name in names}}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    speed: dict[str, list[float]] = {name: [] for name in names}
    for repeat in range(args.repeats):
        for name in names:
            way, start, cpu_start = WAYS[name], time.perf_counter(), time.process_time()
            drawn = way.draw(bench, models[way.weights], way.dtype)
            speed[name].append(len(drawn) / (time.perf_counter() - start))
            n_tokens = sum(map(len, drawn))
            cpu[name].append((time.process_time() - cpu_start) / n_tokens)
            figures = f"{speed[name][-1]:.2f} samples/s, {1000 * cpu[name][-1]:.1f} CPU ms per token, {n_tokens} tokens"
            print(f"{repeat}, {name}: {figures}", file=sys.stderr, flush=True)
    columns = "way | samples/s | CPU ms per token | speed | of each repeat | peak GB"
    print(f"| {columns} |\n" + "|---" * 6 + "|")
    for name in names:
        first = next(
            other for other in names if other.startswith("generate, each") and WAYS[other].dtype == WAYS[name].dtype
        )
        ratios = [one / other for one, other in zip(cpu[first], cpu[name], strict=True)]
        cells = [name, f"{statistics.median(speed[name]):.2f}", f"{1000 * statistics.median(cpu[name]):.1f}"]
        cells += [f"{statistics.median(ratios):.1f}", ", ".join(f"{ratio:.1f}" for ratio in ratios)]
        print(f"| {' | '.join(cells)} | {peak_gb(name):.2f} |", flush=True)


def peak_gb(name: str) -> float:
    """The peak memory of a way, in a process of its own."""
    command = [sys.executable, *sys.argv, "--peak-of", name]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that from_pretrained opens")
    parser.add_argument("--data", type=Path, required=True, help='JSON lines {"prompt": text or messages}')
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-prompt-tokens", type=int, default=120, help="longer prompts are left out")
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--tokens", type=int, default=64, help="per sample, at most")
    parser.add_argument("--rows", type=int, default=64, help="samples at a time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY")
    parser.add_argument("--peak-of", choices=list(WAYS), help="only print the peak memory of one way, in GB")
    args = parser.parse_args()
    limit_onednn_cache()
    if args.peak_of is None:
        measure(args, args.only)
        return
    way, bench = WAYS[args.peak_of], read_prompts(args)
    model = load(args, way.weights)
    reset_peak_memory(model.device)
    way.draw(bench, model, way.dtype)
    print(peak_memory(model.device) / 1e9)


if __name__ == "__main__":
    main()
