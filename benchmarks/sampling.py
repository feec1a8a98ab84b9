"""Sampling: seconds per 1,000 samples of this project's decoder, transformers' generate, and vLLM if it is installed.

    python benchmarks/sampling.py --model DIR --data FILE

FILE has a prompt per line, JSON {"prompt": text or messages}; the model's chat template renders messages. Each way
samples for the same prompts in a process of its own, on a GPU once more before, so that nothing is compiled while the
time is taken. Time is by the clock on a GPU. On a CPU it is that of the process, which other processes hardly change,
so run it with one thread. Samples have different lengths, so ways are compared by tokens per second. Writes a Markdown
table to stdout.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dpo.model.cuda_graphs import Recorder
from dpo.model.decoding import CachedRows, Decoder, MakeRows, StaticRows
from dpo.model.sampling import up_to_stop
from dpo.system.devices import autocast, limit_onednn_cache, peak_memory, pick_device, reset_peak_memory

Ids = list[int]
DTYPES = {  # of the weights, and of the computation
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "autocast": (torch.float32, torch.bfloat16),
}


class LikeGenerate(Decoder):
    """max_length counts the tokens of the continuation alone."""

    def limit(self, prompt: Sequence[int]) -> int:
        return self.max_length


@dataclass
class Bench:
    """The prompts; for each, args.samples texts of at most args.tokens tokens are drawn, args.rows at a time."""

    args: argparse.Namespace
    device: torch.device

    @cached_property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        return DTYPES[self.args.dtype or ("bfloat16" if self.device.type == "cuda" else "float32")]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.args.model)

    @property
    def eos(self) -> int:
        return self.tokenizer.eos_token_id

    @cached_property
    def prompts(self) -> list[Ids]:
        """The token ids of the prompts, the shortest first."""
        tokenizer = self.tokenizer
        prompts: list[Ids] = []
        for line in self.args.data.read_text().splitlines():
            prompt = json.loads(line)["prompt"]
            if not isinstance(prompt, str):
                prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(prompt, add_special_tokens=False).input_ids
            if len(ids) <= self.args.max_prompt_tokens:
                prompts.append(ids)
        return sorted(prompts[: self.args.prompts], key=len)

    @cached_property
    def model(self) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.args.model, dtype=self.dtypes[0]).eval()
        return model.to(self.device)  # type: ignore[arg-type]  # a decorator hides its arguments

    def generate(self, cache: str | None) -> list[Ids]:
        """Calls for as many prompts as fit into args.rows."""
        n = max(1, self.args.rows // self.args.samples)
        drawn: list[Ids] = []
        for start in range(0, len(self.prompts), n):
            prompts = self.prompts[start : start + n]
            width = max(map(len, prompts))
            ids = [[self.eos] * (width - len(prompt)) + prompt for prompt in prompts]
            mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
            with autocast(*self.dtypes, self.device):
                output = self.model.generate(  # type: ignore[operator]  # known to causal models
                    input_ids=torch.tensor(ids, device=self.device),
                    attention_mask=torch.tensor(mask, device=self.device),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=self.args.tokens,
                    num_return_sequences=self.args.samples,
                    eos_token_id=self.eos,
                    pad_token_id=self.eos,
                    cache_implementation=cache,
                )
            drawn += [up_to_stop(row, [self.eos]) for row in output[:, width:].tolist()]
        return drawn

    def decode(self, rows: MakeRows) -> list[Ids]:
        """The batches of rounds (BuiltinEngine)."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.args.samples)]
        decoder = LikeGenerate(self.args.tokens, 1.0, 0, 1.0, self.dtypes[1], (self.eos,))
        drawn: list[Ids] = []
        for start in range(0, len(prompts), self.args.rows):
            batch = prompts[start : start + self.args.rows]
            drawn += [one.ids for one in decoder.decode(self.model, batch, range(start, start + len(batch)), rows)]
        return drawn

    def decode_static(self) -> list[Ids]:
        return self.decode(partial(StaticRows, recorder=Recorder() if self.device.type == "cuda" else None))

    @cached_property
    def server(self) -> Any:
        longest = self.args.max_prompt_tokens + self.args.tokens
        name = str(self.dtypes[1]).removeprefix("torch.")
        return import_module("vllm").LLM(
            self.args.model, dtype=name, max_model_len=longest, max_num_seqs=self.args.rows
        )

    def vllm(self) -> list[Ids]:
        lengths = {"max_tokens": self.args.tokens, "stop_token_ids": [self.eos]}
        parameters = import_module("vllm").SamplingParams(n=self.args.samples, temperature=1.0, top_p=1.0, **lengths)
        prompts = [{"prompt_token_ids": prompt} for prompt in self.prompts]
        answers = self.server.generate(prompts, parameters, use_tqdm=False)
        return [list(one.token_ids) for answer in answers for one in answer.outputs]


WAYS: dict[str, Callable[[Bench], list[Ids]]] = {
    "generate": partial(Bench.generate, cache=None),
    "generate, static cache": partial(Bench.generate, cache="static"),  # which it compiles on a GPU
    "decoder, growing cache": partial(Bench.decode, rows=CachedRows),
    "decoder, static cache": Bench.decode_static,  # the project's way on a GPU; the row above is that on a CPU
    "vLLM": Bench.vllm,
}


def measure(args: argparse.Namespace) -> dict[str, float]:
    """The seconds per 1,000 samples, tokens per second and peak memory in GB of args.way."""
    bench = Bench(args, pick_device(args.device))
    on_gpu = bench.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    draw, seconds, rates = partial(WAYS[args.way], bench), [], []
    bench.prompts  # noqa: B018  # read before the clock starts, as is the model
    if args.way != "vLLM":
        bench.model  # noqa: B018
    if on_gpu:
        draw()
    reset_peak_memory(bench.device)
    for _ in range(args.repeats):
        start = clock()
        drawn = draw()
        elapsed = clock() - start
        seconds.append(1000 * elapsed / len(drawn))
        rates.append(sum(map(len, drawn)) / elapsed)
    peak = peak_memory(bench.device) / 1e9
    return {"seconds": statistics.median(seconds), "rate": statistics.median(rates), "peak": peak}


def table(measured: dict[str, dict[str, float]]) -> str:
    """The rows of the ways that were measured; speed is relative to the first one."""
    lines = ["| way | s per 1,000 samples | tokens/s | speed | peak GB |", "|---|---|---|---|---|"]
    first = next(iter(measured.values()), {})
    for way, figures in measured.items():
        cells = f"{figures['seconds']:,.1f} | {figures['rate']:,.0f} | {figures['rate'] / first['rate']:.1f}"
        lines.append(f"| {way} | {cells} | {figures['peak']:.2f} |")
    return "\n".join(lines)


def available_ways() -> list[str]:
    return [way for way in WAYS if way != "vLLM" or find_spec("vllm")]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    ways = available_ways()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that from_pretrained opens")
    parser.add_argument("--data", type=Path, required=True, help='JSON lines {"prompt": text or messages}')
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--max-prompt-tokens", type=int, default=120, help="longer prompts are left out")
    parser.add_argument("--samples", type=int, default=8, help="per prompt")
    parser.add_argument("--tokens", type=int, default=64, help="per sample, at most")
    parser.add_argument("--rows", type=int, default=64, help="samples at a time")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--only", nargs="+", choices=ways, default=ways, metavar="WAY")
    parser.add_argument("--way", choices=ways, help="only print the figures of one way, as JSON")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    limit_onednn_cache()
    if args.way is not None:
        print(json.dumps(measure(args)))
        return
    measured = {}
    for way in args.only:
        command = [sys.executable, *sys.argv, "--way", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{way}: failed", file=sys.stderr)
        else:
            measured[way] = json.loads(done.stdout.splitlines()[-1])
    print(table(measured))


if __name__ == "__main__":
    main()
