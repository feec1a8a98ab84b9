"""What a pair's passes take on a CPU with its responses attending apart, above what they take together.

    python benchmarks/branches.py [--lengths 150,75,75 500,250,250] [--repeats 5]

Lengths are those of prompt, chosen and rejected in tokens. Each is one pass of a reference and one pass of a policy,
forward and backward, with random weights of SmolLM2-135M's shape in float32. Both ways run in turn in one process.
Writes a Markdown table of medians to stdout. MIN_BRANCHED_TOKENS of dpo/model/attention.py follows from it.
"""

import argparse
import random
import statistics
import time

import torch
from throughput import SHAPES  # which adds the project's root to the path
from transformers import AutoModelForCausalLM

from dpo.data.examples import TextExample, TokenizedExample
from dpo.model import attention
from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.packing import shared_prefix

WAYS = {"together": 2**30, "apart": 1}  # the number of tokens from which responses attend apart


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = ["150,75,75", "200,100,100", "250,125,125", "100,300,300", "500,250,250", "1000,500,500"]
    parser.add_argument("--lengths", nargs="+", default=defaults)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    module = ResponseLogps.wrap(AutoModelForCausalLM.from_config(SHAPES["smollm2-135m"](), dtype=torch.float32))
    attention.use_attention(module.model, "packed")
    rng = random.Random(0)
    print("| prompt, chosen, rejected | seconds, together | seconds, apart | apart / together |\n|---|---|---|---|")
    for lengths in args.lengths:
        prompt, *responses = ([rng.randrange(49152) for _ in range(int(n))] for n in lengths.split(","))
        example = TokenizedExample(TextExample("", ("", ""), "keep_end", 0, ""), prompt, tuple(responses))
        batch = shared_prefix([example])
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for repeat in range(args.repeats + 1):
            for name in list(WAYS)[:: 1 if repeat % 2 else -1]:
                attention.MIN_BRANCHED_TOKENS = WAYS[name]
                start = time.perf_counter()
                with torch.no_grad():
                    response_logps(module, batch)
                response_logps(module, batch).sums.sum().backward()
                seconds[name].append(time.perf_counter() - start)
        together, apart = (times[1:] for times in seconds.values())  # without the warm-up
        ratio = statistics.median(a / b for a, b in zip(apart, together, strict=True))
        cells = [lengths.replace(",", ", "), *(f"{statistics.median(times):.2f}" for times in (together, apart))]
        print("| " + " | ".join([*cells, f"{ratio:.2f}"]) + " |", flush=True)


if __name__ == "__main__":
    main()
