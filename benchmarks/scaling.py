"""What several processes gain on this machine: pairs per second, memory per rank, and how evenly work is split.

    python benchmarks/scaling.py --ranks 1 2 4                the balance, and runs of a model of 26 million parameters
    python benchmarks/scaling.py --balance                    the balance alone: no process is started
    python benchmarks/scaling.py --ranks 1 8 --device cuda --hidden 2048 --layers 16      what fits a machine with GPUs

Each run is `train.py trainer=FSDPTrainer` on the goldens' pairs, on a CPU with one thread per rank. Pairs per second
are the median of its updates but the first two; memory is the peak of the rank with the most, on a CPU that of the
process with its loading. The balance of tokens is that of hh_lengths.json in batches of --pairs: the tokens of the rank
with the most, in percent above the mean, when a batch is split by counting pairs, and when it is split as training
does. Writes Markdown tables to stdout.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import LlamaConfig

from dpo.model.packing import balance

ROOT = Path(__file__).resolve().parent.parent


def pair_lengths(max_length: int = 512, max_prompt_length: int = 256) -> list[int]:
    """The tokens of each of hh's pairs, its prompt counted once, cut as training cuts them."""
    lengths = []
    for prompt, *responses in json.loads(Path(__file__).with_name("hh_lengths.json").read_text()):
        if prompt + max(responses) > max_length:
            prompt = min(prompt, max_prompt_length)
        if prompt + max(responses) > max_length:
            responses = [min(n, max_length - max_prompt_length) for n in responses]
        lengths.append(prompt + sum(responses))
    return lengths


def excess(shares: list[list[int]], lengths: list[int]) -> float:
    """By how much the largest share of tokens is above the mean, 0.1 for 10%."""
    totals = [sum(lengths[i] for i in share) for share in shares]
    return max(totals) * len(totals) / sum(totals) - 1


def balance_table(pairs: int, ranks: list[int]) -> str:
    """The mean excess of the slowest rank over all batches, by both ways to split."""
    lengths = pair_lengths()
    random.Random(0).shuffle(lengths)
    batches = [lengths[start : start + pairs] for start in range(0, len(lengths) - pairs + 1, pairs)]
    lines = ["| ranks | split by count | split by tokens |", "|---|---|---|"]
    for n in ranks:
        by_count = [excess([list(range(r, pairs, n)) for r in range(n)], batch) for batch in batches]
        by_tokens = [excess(balance(batch, n), batch) for batch in batches]
        lines.append(f"| {n} | {statistics.mean(by_count):.1%} | {statistics.mean(by_tokens):.1%} |")
    return "\n".join(lines)


def make_model(folder: Path, hidden: int, n_layers: int) -> None:
    """Write the config of a Llama of random weights, with the tokenizer of the demo's model."""
    tiny = ROOT / "config" / "tiny"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny / name).read_bytes())
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=n_layers,
        vocab_size=json.loads((tiny / "config.json").read_text())["vocab_size"],
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    config.save_pretrained(folder)


def measure(args: argparse.Namespace, folder: Path, n: int) -> dict[str, float]:
    """Run n ranks, and return the medians of an update's metrics."""
    run = folder / f"{n}"
    settings = {
        "model.name_or_path": folder,
        "model.from_scratch": "true",
        "datasets": f"[{ROOT / 'tests' / 'goldens' / 'data'}]",
        "loss": "dpo",
        "trainer": "FSDPTrainer",
        "n_processes": n,
        "device": args.device,
        "batch_size": args.pairs,
        "n_examples": args.pairs * args.updates,
        "do_first_eval": "false",
        "sample_during_eval": "false",
        "n_eval_examples": 4,
        "debug": "true",
        "local_run_dir": run,
    }
    command = [sys.executable, str(ROOT / "train.py"), *(f"{key}={value}" for key, value in settings.items())]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    updates = [record for record in records if "loss/train" in record][2:]
    return {name: statistics.median(u[name] for u in updates) for name in ("examples_per_second", "memory_gb/max")}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--pairs", type=int, default=64, help="pairs per update")
    parser.add_argument("--updates", type=int, default=6, help="updates per run")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--balance", action="store_true", help="print the balance alone")
    args = parser.parse_args()
    print(balance_table(args.pairs, [2, 4, 8]))
    if args.balance:
        return
    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name), args.hidden, args.layers)
        print("\n| ranks | pairs/s | GB, the rank with the most |\n|---|---|---|")
        for n in args.ranks:
            medians = measure(args, Path(name), n)
            print(f"| {n} | {medians['examples_per_second']:.2f} | {medians['memory_gb/max']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
