"""Training throughput of DPO, several ways in one process, interleaved: pairs a second, matrix rate, and peak memory.

    python benchmarks/throughput.py                                  SmolLM2-135M's shape with random weights
    python benchmarks/throughput.py --model DIR                      a real model

gpu.py measures training on a GPU, through the trainer.

Needs torch and transformers alone. The pairs have the lengths (prompt, chosen, rejected, in SmolLM2's tokens) of 2,312
real pairs, hh_lengths.json, cut as training cuts them (max_length 512, max_prompt_length 256), and random tokens. Each
way does whole updates: reference, forward, backward, clipping, RMSprop. The first row is the original's way: padded,
logits and their float32 log-softmax for every position, in microbatches. Writes a Markdown table to stdout.
"""

import argparse
import copy
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, PretrainedConfig, PreTrainedModel

from dpo.data.examples import Ids, TextExample, Tokenization, TokenizedExample
from dpo.model.accumulation import accumulate_in_place
from dpo.model.attention import attention_kinds, half_precision_kinds, use_attention
from dpo.model.loading import compile_layers, recompute_activations
from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.packing import LAYOUTS, PackedBatch, make_microbatches
from dpo.system.devices import autocast, limit_onednn_cache, peak_memory, pick_device, read_facts, reset_peak_memory
from dpo.training.budgets import MAX_AUTO_TOKENS
from dpo.training.references import CachedReference, ModelReference, Reference
from losses import preference_loss

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def make(kind: type[PretrainedConfig], *sizes: int, **others: int) -> PretrainedConfig:
    """A config with SIZES, others, and 4,096 positions."""
    return kind.from_dict(dict(zip(SIZES, sizes, strict=True), max_position_embeddings=4096, **others))


# The operations of addmm_, which torch does not count.
IN_PLACE = {torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]}
SHAPES: dict[str, Callable[[], PretrainedConfig]] = {
    "tiny": lambda: make(LlamaConfig, 512, 64, 128, 2, 4, num_key_value_heads=2, tie_word_embeddings=True),
    "smollm2-135m": lambda: make(LlamaConfig, 49152, 576, 1536, 30, 9, num_key_value_heads=3, tie_word_embeddings=True),
    "llama-3.2-1b": lambda: make(
        LlamaConfig, 128256, 2048, 8192, 16, 32, num_key_value_heads=8, tie_word_embeddings=True
    ),
    "pythia-2.8b": lambda: make(GPTNeoXConfig, 50304, 2560, 10240, 32, 32),
    "llama-3.1-8b": lambda: make(LlamaConfig, 128256, 4096, 14336, 32, 32, num_key_value_heads=8),
}


def draw_examples(
    n: int, vocabulary: int, max_length: int = 512, max_prompt_length: int = 256, scale: int = 1
) -> list[TokenizedExample]:
    """Draw examples with the lengths of real pairs, times scale, and random tokens, truncated as training does it."""
    rng, lengths = random.Random(0), json.loads(Path(__file__).with_name("hh_lengths.json").read_text())
    rng.shuffle(lengths)
    cut = Tokenization(None, max_length, max_prompt_length).truncate  # type: ignore[arg-type]  # truncates alone
    examples = []
    for i, triple in enumerate(lengths[:n]):
        prompt, *responses = ([rng.randrange(vocabulary) for _ in range(scale * length)] for length in triple)
        examples.append(cut(Ids(prompt, tuple(responses)), TextExample(str(i), ("", ""), "keep_end", i, ""), i))
    return examples


@dataclass
class Way:
    """One row of the table; dtype is that of the computation, parameters are in float32."""

    name: str
    update: Callable[["Bench", "Way", list[TokenizedExample]], list[float]]
    layout: str = "padded"
    dtype: torch.dtype = torch.float32
    max_tokens: int = 0  # the original's way counts pairs instead
    cached: bool = False
    checkpointing: bool = False
    compile: bool = False


class Bench:
    """The models, the batches and what was measured."""

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.args, self.device = args, device
        torch.manual_seed(0)
        if args.model:
            config = AutoConfig.from_pretrained(args.model)
            self.policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)  # type: ignore[arg-type]  # a wrapper hides self
        else:
            config = SHAPES[args.shape]()
            with device:
                self.policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        self.policy.train()
        self.optimizer = torch.optim.RMSprop(self.policy.parameters(), lr=0.0)  # so that every update is the same
        self.references: dict[torch.dtype, ModelReference] = {}
        self.response_logps = ResponseLogps.wrap(self.policy)
        self.compile(self.policy)
        examples = draw_examples(args.repeats * args.pairs, config.vocab_size, args.max_length, args.max_prompt_length)
        self.batches = [examples[start : start + args.pairs] for start in range(0, len(examples), args.pairs)]
        self.cached_reference = CachedReference(sum(map(len, self.batches)), 2)
        self.cached_reference.sums.zero_()

    def reference(self, dtype: torch.dtype) -> ModelReference:
        """The live reference as training holds it for a dtype; only one at a time is kept."""
        if dtype not in self.references:
            self.drop_references()
            model = copy.deepcopy(self.policy).requires_grad_(False)
            self.references[dtype] = ModelReference(ResponseLogps.wrap(model), dtype)
            self.compile(model)
        use_attention(self.references[dtype].module.model, self.policy.config._attn_implementation)
        return self.references[dtype]

    def drop_references(self) -> None:
        """Free the reference's memory: its compiled layers refer to themselves, so that it outlives its last name."""
        self.references.clear()
        gc.collect()

    def compile(self, model: PreTrainedModel) -> None:
        """Compile a model's layers, but let only the compiled row use what comes of it (see use_compiled)."""
        compile_layers(model)
        for module in model.modules():
            module.compiled_call = module._compiled_call_impl  # type: ignore[assignment]

    def use_compiled(self, on: bool) -> None:
        """Compute with the compiled layers, or as a run with compile=false does."""
        for model in (self.policy, *(reference.module.model for reference in self.references.values())):
            for module in model.modules():
                module._compiled_call_impl = module.compiled_call if on else None

    def accumulate(self, in_place: bool) -> None:
        """Add to the gradients of head and embeddings in place, or let autograd do it as the original does."""
        for part in (self.policy.get_input_embeddings(), self.policy.get_output_embeddings()):
            part._forward_hooks.clear()
        if in_place:
            accumulate_in_place(self.response_logps)

    def finish(self) -> None:
        """Clip, step, and clear the gradient, as training does."""
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 10.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def backward(policy: torch.Tensor, reference: torch.Tensor, n: int) -> None:
    """Run the backward pass of DPO for log-probabilities of shape (examples, 2), as a part of n examples."""
    chosen, rejected = policy.unbind(1)
    reference_chosen, reference_rejected = reference.unbind(1)
    losses, _, _ = preference_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.1)
    (losses.sum() / n).backward()


def update(bench: Bench, way: Way, batch: list[TokenizedExample]) -> list[float]:
    """Do one update as trainers.py does it; return the policy's log-probabilities in the order of the batch."""
    reference: Reference = bench.cached_reference if way.cached else bench.reference(way.dtype)
    result: dict[TextExample, list[float]] = {}
    with autocast(torch.float32, way.dtype, bench.device):
        for layout in make_microbatches(batch, way.layout, way.max_tokens):
            layout = layout.to(bench.device)
            reference_logps = reference.logps(layout).sums
            logps = response_logps(bench.response_logps, layout).sums
            backward(logps, reference_logps, len(batch))
            result |= {e.text: row for e, row in zip(layout.examples, logps.detach().cpu().tolist(), strict=True)}
    bench.finish()
    return [number for example in batch for number in result[example.text]]


def original_update(bench: Bench, way: Way, batch: list[TokenizedExample]) -> list[float]:
    """Do one update in the original's way: padded, with logits and log-softmax in float32 for every position."""
    size, numbers = bench.args.microbatch, []
    reference = bench.reference(way.dtype).module.model
    for start in range(0, len(batch), size):
        part = batch[start : start + size]
        layout = LAYOUTS["padded"].pack(part).to(bench.device)
        with autocast(torch.float32, way.dtype, bench.device):
            with torch.no_grad():
                reference_logps = full_logps(reference, layout, len(part))
            logps = full_logps(bench.policy, layout, len(part))
            backward(logps, reference_logps, len(batch))
        numbers += logps.detach().flatten().cpu().tolist()
    bench.finish()
    return numbers


def full_logps(model: PreTrainedModel, layout: PackedBatch, n: int) -> torch.Tensor:
    """Return summed log-probabilities, (n, 2), through the log-softmax of all positions."""
    ids = layout.inputs["input_ids"]
    logits = model(**layout.inputs, use_cache=False).logits.to(torch.float32)
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    mask = torch.zeros_like(ids, dtype=torch.bool).flatten()
    mask[layout.sources] = True
    return (logps * mask.view_as(ids)[:, :-1]).sum(1).view(2, n).T


# Measuring


def clock(device: torch.device) -> float:
    """The time in seconds once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a large matrix product, in TFLOP/s."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    starts = [(clock(device), a @ b)[0] for _ in range(7)]  # each product's end is the next one's start
    return 2 * n**3 / min(end - start for start, end in pairwise(starts)) / 1e12


def peak_alone(number: int) -> float:
    """The peak of memory, in GB, of two updates of a row in a process of its own.

    Malloc keeps what other rows freed, in pieces, so that in one process each row's memory depends on those before it.
    """
    command = [sys.executable, *sys.argv, "--peak-of", str(number)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def ways(args: argparse.Namespace, device: torch.device) -> list[Way]:
    """The rows of the table."""
    budget = MAX_AUTO_TOKENS[device.type] if args.max_tokens is None else args.max_tokens
    padded = Way("padded, float32", update, max_tokens=budget)
    packed = replace(padded, name="shared_prefix, float32", layout="shared_prefix")
    bf16 = replace(packed, name="shared_prefix, bfloat16", dtype=torch.bfloat16)
    rows = [
        Way("original's way, float32", original_update),
        Way("original's way, bfloat16", original_update, dtype=torch.bfloat16),
        padded,
        replace(padded, name="padded, bfloat16", dtype=torch.bfloat16),
        packed,
        bf16,
        replace(bf16, name="shared_prefix, bfloat16, cached reference", cached=True),
        replace(bf16, name="shared_prefix, bfloat16, activation checkpointing", checkpointing=True),
    ]
    if args.compile:
        rows.append(replace(bf16, name="shared_prefix, bfloat16, compiled", compile=True))
    return [row for row in rows if not args.only or any(part in row.name for part in args.only)]


def attention_of(way: Way, device: torch.device) -> str:
    """The kind of attention that training tries first: torch's own for padded rows."""
    facts = read_facts(device)
    kinds = [*half_precision_kinds(facts, way.dtype), *attention_kinds(facts)]
    return "sdpa" if way.layout == "padded" else kinds[0]


def run_once(
    bench: Bench, way: Way, batch: list[TokenizedExample], kind: str | None = None
) -> tuple[list[float], float, float]:
    """Do one update, with a kind of attention or attention_of; return its log-probabilities, seconds, and peak GB."""
    use_attention(bench.policy, kind or attention_of(way, bench.device))
    recompute_activations(bench.policy, way.checkpointing)
    if way.cached:
        bench.drop_references()
    else:
        bench.reference(way.dtype)
    bench.use_compiled(way.compile)
    bench.response_logps.float32_head = way.cached and way.dtype != torch.float32
    bench.accumulate(in_place=way.update is update)
    reset_peak_memory(bench.device)
    start = clock(bench.device)
    numbers = way.update(bench, way, batch)
    seconds = clock(bench.device) - start
    return numbers, seconds, peak_memory(bench.device) / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder that from_pretrained opens; else random weights of --shape")
    parser.add_argument("--shape", choices=SHAPES, default="smollm2-135m")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--pairs", type=int, default=16, help="pairs an update")
    parser.add_argument("--repeats", type=int, default=3, help="updates a row, each on other pairs; the median counts")
    parser.add_argument("--microbatch", type=int, default=4, help="pairs a forward pass of the original's way")
    parser.add_argument("--max-tokens", type=int, help="tokens a forward pass; default: auto's most")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--max-prompt-length", type=int, default=256)
    parser.add_argument("--compile", action="store_true", help="add the compiled row")
    parser.add_argument("--only", nargs="*", help="only the rows whose name contains one of these")
    parser.add_argument("--peak-of", type=int, help="only print the peak memory of one row, by its number")
    args = parser.parse_args()
    device = pick_device(args.device)
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    limit_onednn_cache()
    bench, rows = Bench(args, device), ways(args, device)
    if args.peak_of is None:
        print_table(bench, rows, measure(bench, rows))
    else:
        print(max(run_once(bench, rows[args.peak_of], bench.batches[0])[2] for _ in range(2)))


@dataclass
class Measured:
    """What was measured of one row: per update, but for flops, those of the first one."""

    seconds: list[float] = field(default_factory=list)
    gb: list[float] = field(default_factory=list)
    logps: list[list[float]] = field(default_factory=list)
    flops: int = 0


def measure(bench: Bench, rows: list[Way]) -> dict[str, Measured]:
    """Run every way once on each batch, interleaved, after one update of each that is not measured."""
    bench.finish()
    measured = {row.name: Measured() for row in rows}
    for row in rows:  # the first update of a way compiles what it needs, and makes its first allocations
        run_once(bench, row, bench.batches[0])
    for number, batch in enumerate(bench.batches):
        for row in rows:
            m, (logps, seconds, gb) = measured[row.name], run_once(bench, row, batch)
            m.seconds, m.gb, m.logps = [*m.seconds, seconds], [*m.gb, gb], [*m.logps, logps]
            print(f"update {number + 1}, {row.name}: {seconds:.1f} s, {gb:.1f} GB", file=sys.stderr, flush=True)
    # Counted apart: counting holds up a GPU, does not see into compiled code, and fails in flex attention.
    for row in rows:
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            run_once(bench, replace(row, compile=False), bench.batches[0], "packed")
        measured[row.name].flops = counter.get_total_flops()
    if bench.device.type == "cpu":
        bench.drop_references()
        for number, row in enumerate(rows):
            measured[row.name].gb = [peak_alone(number)]
    return measured


def print_table(bench: Bench, rows: list[Way], measured: dict[str, Measured]) -> None:
    """Print the table, its ratios against the first row."""
    rates = {dtype: matrix_rate(bench.device, dtype) for dtype in {row.dtype for row in rows}}
    useful = statistics.mean(sum(map(len, batch)) for batch in bench.batches)
    first = measured[rows[0].name]
    print(f"\nMatrix products: {', '.join(f'{k}: {v:.3g} TFLOP/s' for k, v in rates.items())}")
    columns = "way, pairs/s, useful tokens/s, TFLOP/s, of matrix rate, peak GB, speed, memory, largest difference"
    print(f"\n| {columns.replace(', ', ' | ')} |\n" + "|---" * 9 + "|")
    for row in rows:
        m = measured[row.name]
        seconds = statistics.median(m.seconds)
        speed = statistics.median(a / b for a, b in zip(first.seconds, m.seconds, strict=True))
        tflops = m.flops / m.seconds[0] / 1e12
        apart = (torch.tensor(m.logps) - torch.tensor(first.logps)).abs().max().item()
        cells = [row.name, f"{bench.args.pairs / seconds:.2f}", f"{useful / seconds:,.0f}", f"{tflops:.3g}"]
        cells += [f"{tflops / rates[row.dtype]:.0%}", f"{max(m.gb):.1f}", f"{speed:.2f}"]
        cells += [f"{max(m.gb) / max(first.gb):.2f}", f"{apart:.1g}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
