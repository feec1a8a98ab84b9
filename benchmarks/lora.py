"""DPO of an adapter (LoRA) beside DPO of all weights: losses, accuracies, pairs per second and peak memory.

    python benchmarks/lora.py --model PATH --data FOLDER [overrides of train.py, for both]

Both ways train in one process, on the same pairs, their updates in turn. Speed is the median ratio of the process's CPU
time per update, which other processes hardly change (so run it with one thread on a CPU); pairs per second are by the
clock. Memory is the peak of the whole process during three updates, of each way in a process of its own. The tables,
written to stdout, are those of docs/lora.md.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from composition import compose  # which adds the project's root to the path

from build import build_trainer, load_inputs
from dpo.runs.run_dir import RunDir
from dpo.system.devices import peak_memory
from trainers import BasicTrainer

WAYS = {"all weights": ("lr=5e-7",), "LoRA": ("lora=default", "lr=5e-5")}
SHARED = (
    *("loss=dpo", "batch_size=4", "n_examples=160", "max_length=192", "max_prompt_length=96", "warmup_steps=0"),
    *("n_eval_examples=32", "sample_during_eval=false", "wandb.enabled=false", "debug=true"),
)
COLUMNS = ("loss/train", "rewards_train/accuracies", "rewards_train/margins")


def make_trainer(way: str, args: argparse.Namespace, overrides: list[str], folder: str) -> BasicTrainer:
    """Build the trainer of a way as train.py does."""
    given = [f"model.name_or_path='{args.model}'", f"datasets=['{args.data}']", f"local_run_dir='{folder}/{way}'"]
    config, settings, loss = compose([*SHARED, *given, *WAYS[way], *overrides])
    run = RunDir(Path(settings.local_run_dir), config)
    return build_trainer(settings, loss, load_inputs(settings, loss), run)


def peak_gb(way: str, args: argparse.Namespace, overrides: list[str], n_updates: int = 3) -> float:
    """This process's peak of resident memory in GB while a way makes its first updates."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(way, args, overrides, folder)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
        for _, batch in zip(range(n_updates), trainer.train_batches, strict=False):
            trainer.train_step(batch)
    return peak_memory(torch.device("cpu")) / 1e9


def train(trainers: dict[str, BasicTrainer]) -> dict[str, list[dict[str, float]]]:
    """The metrics of every update of each trainer, and last those of its evaluations before and after."""
    records: dict[str, list[dict[str, float]]] = {way: [] for way in trainers}
    before = {way: trainer.evaluate() for way, trainer in trainers.items()}
    for batches in zip(*(trainer.train_batches for trainer in trainers.values()), strict=True):
        for (way, trainer), batch in zip(trainers.items(), batches, strict=True):
            start = time.process_time()
            metrics = trainer.train_step(batch)
            records[way].append(metrics | {"cpu_seconds": time.process_time() - start})
            shown = ", ".join(f"{records[way][-1][column]:.4g}" for column in (*COLUMNS, "cpu_seconds"))
            print(f"{trainer.updates}, {way}: {shown}", file=sys.stderr, flush=True)
    for way, trainer in trainers.items():
        records[way].append({f"{key} before": value for key, value in before[way].items()} | trainer.evaluate())
    return records


def print_tables(records: dict[str, list[dict[str, float]]], peaks: dict[str, float]) -> None:
    """Print speed and memory beside those of all weights, and the curves as means of 10 updates."""
    first = "all weights"
    columns = "trained | pairs/s | CPU s an update | speed | peak GB | memory | evaluation loss, before and after"
    print(f"\n| {columns} | accuracy after |\n" + "|---" * 8 + "|")
    for way, (*steps, last) in records.items():
        seconds = {name: [step["cpu_seconds"] for step in found[:-1]] for name, found in records.items()}
        faster = statistics.median(a / b for a, b in zip(seconds[first], seconds[way], strict=True))
        cells: list[Any] = [way, f"{statistics.median(step['examples_per_second'] for step in steps):.2f}"]
        cells += [f"{statistics.median(seconds[way]):.1f}", f"{faster:.2f}"]
        cells += [f"{peaks[way]:.2f}", f"{peaks[way] / peaks[first]:.2f}"]
        cells += [f"{last['loss/eval before']:.3f}, {last['loss/eval']:.3f}", f"{last['rewards_eval/accuracies']:.2f}"]
        print("| " + " | ".join(cells) + " |")
    heads = [f"{way}, {column.partition('/')[2].replace('train', 'loss')}" for way in records for column in COLUMNS]
    print(f"\n| updates | {' | '.join(heads)} |\n" + "|---" * (len(heads) + 1) + "|")
    for start in range(0, len(records[first]) - 1, 10):
        parts = [updates[:-1][start : start + 10] for updates in records.values()]
        means = [statistics.mean(step[column] for step in part) for part in parts for column in COLUMNS]
        print(f"| {start + 1} to {start + len(parts[0])} | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that from_pretrained opens")
    parser.add_argument("--data", required=True, help="a folder with train.jsonl and test.jsonl")
    parser.add_argument("--way", choices=list(WAYS), help="only print the peak memory of one way, in GB")
    args, overrides = parser.parse_known_args()
    if args.way:
        print(peak_gb(args.way, args, overrides))
        return
    peaks = {}
    for way in WAYS:
        command = [sys.executable, *sys.argv, "--way", way]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        peaks[way] = float(output.split()[-1])
        print(f"{way}: {peaks[way]:.2f} GB", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        records = train({way: make_trainer(way, args, overrides, folder) for way in WAYS})
    print_tables(records, peaks)


if __name__ == "__main__":
    main()
