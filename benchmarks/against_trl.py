"""DPO of the same pairs by this project and by TRL: pairs per second and peak memory, each program as it is.

    pip install trl
    python benchmarks/against_trl.py --model DIR --data FOLDER [--pairs 16 --updates 2 --repeats 3]

DIR is a local model, FOLDER has pairs as train.py reads them. Every way is a program of its own, and they run in turn.
Each trains two epochs on the same pairs, none of which is truncated, and the second one is timed. TRL is used through
its public API: DPOTrainer, with microbatches of the sizes that --microbatches names, with and without recomputed
activations where its default is to recompute. Memory is the peak of the whole process, models included. Writes a
Markdown table to stdout: medians over the repeats, and speed as the ratio to the fastest row of TRL with as many
forward passes (with a live reference, or a cached one). --cpu-seconds measures CPU seconds, for a machine that other
programs use; pairs/s are then those of one core, if OMP_NUM_THREADS=1.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from composition import compose  # which adds the project's root to the path

from build import build_trainer, load_inputs
from dpo.runs.run_dir import RunDir
from dpo.system.devices import peak_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU = torch.device("cpu")
MAX_LENGTH, MAX_PROMPT = 512, 256
SHARED = (
    *("loss=dpo", f"max_length={MAX_LENGTH}", f"max_prompt_length={MAX_PROMPT}", "lr=1e-6", "warmup_steps=0"),
    *("n_epochs=2", "n_eval_examples=1", "sample_during_eval=false", "wandb.enabled=false", "debug=true"),
)


class Measured(NamedTuple):
    """The seconds of an epoch, and the peak of the process's memory in GB."""

    seconds: float
    peak_gb: float


def write_pairs(args: argparse.Namespace, folder: Path) -> None:
    """Write the first pairs of the data that no limit truncates into a folder, as rows with a prompt."""
    n, prefix = args.pairs * args.updates, [f"model.name_or_path='{args.model}'", f"local_run_dir='{folder}/none'"]
    _, settings, loss = compose([*SHARED, *prefix, f"datasets=['{args.data}']", f"batch_size={args.pairs}"])
    rows: list[dict[str, str]] = []
    for batch in load_inputs(settings, loss).train_batches:
        for example in batch.examples:
            if not example.truncated and len(rows) < n:
                chosen, rejected = example.text.responses
                rows.append({"prompt": example.text.prompt, "chosen": chosen, "rejected": rejected})
    assert len(rows) == n, f"the data has {len(rows)} pairs that are short enough, of {n}"
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(args: argparse.Namespace, folder: Path, overrides: tuple[str, ...]) -> Measured:
    """Train with this project."""
    places = (f"model.name_or_path='{args.model}'", f"datasets=['{folder}']", "prompt_format=text")
    with tempfile.TemporaryDirectory() as run_dir:
        where = (f"local_run_dir='{run_dir}/run'", f"local_dirs=['{run_dir}']", f"batch_size={args.pairs}")
        config, settings, loss = compose([*SHARED, *places, *where, *overrides])
        run = RunDir(Path(settings.local_run_dir), config)
        trainer = build_trainer(settings, loss, load_inputs(settings, loss), run)
        ends = [args.clock() for batch in trainer.train_batches if trainer.train_step(batch)]
    assert len(ends) == 2 * args.updates
    return Measured(ends[-1] - ends[args.updates - 1], peak_memory(CPU) / 1e9)


def run_trl(
    model: "PreTrainedModel",
    tokenizer: Path,
    data: Path,
    pairs: int,
    microbatch: int,
    ref_model: "PreTrainedModel | None" = None,
    peft_config: Any = None,
    clock: Callable[[], float] = time.perf_counter,
    **options: Any,
) -> list[float]:
    """Train with TRL's DPOTrainer on rows of data, and return the times at which updates ended, by a clock in seconds.

    pairs are those of an update, options those of DPOConfig.
    """
    from datasets import load_dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    ends: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(clock())

    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output,
            per_device_train_batch_size=microbatch,
            gradient_accumulation_steps=pairs // microbatch,
            learning_rate=1e-6,
            lr_scheduler_type="constant",
            optim="rmsprop",
            beta=0.1,
            max_grad_norm=10.0,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            **options,
        )
        rows = load_dataset("json", data_files=str(data), split="train", cache_dir=output)
        trainer = DPOTrainer(
            model,
            ref_model=ref_model,
            args=config,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(tokenizer),
            peft_config=peft_config,
            callbacks=[Watch()],
        )
        trainer.train()
    return ends


def trl(args: argparse.Namespace, folder: Path, microbatch: int, **options: Any) -> Measured:
    """Train with TRL."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    options |= {"num_train_epochs": 2, "max_length": MAX_LENGTH, "use_cpu": True, "clock": args.clock}
    ends = run_trl(model, args.model, folder / "train.jsonl", args.pairs, microbatch, **options)
    assert len(ends) == 2 * args.updates
    return Measured(ends[-1] - ends[args.updates - 1], peak_memory(CPU) / 1e9)


def ways(args: argparse.Namespace) -> dict[str, Callable[[Path], Measured]]:
    """What is measured, by its name in the table."""
    cached = "loss.precompute_reference=true"
    found: dict[str, Callable[[Path], Measured]] = {}
    for dtype in args.precisions:
        options = {"bf16": dtype == "bfloat16", "gradient_checkpointing": False}
        for size in args.microbatches:
            found[f"TRL, {dtype}, {size} per microbatch"] = partial(trl, args, microbatch=size, **options)
        size = min(args.microbatches)
        recomputed = options | {"gradient_checkpointing": True}
        found[f"TRL, {dtype}, {size} per microbatch, recomputed"] = partial(trl, args, microbatch=size, **recomputed)
        stored = options | {"precompute_ref_log_probs": True}
        found[f"TRL, {dtype}, {size} per microbatch, cached"] = partial(trl, args, microbatch=size, **stored)
        found[f"ours, {dtype}"] = partial(ours, args, overrides=(f"precision={dtype}",))
        found[f"ours, {dtype}, cached"] = partial(ours, args, overrides=(f"precision={dtype}", cached))
    return found


def print_table(args: argparse.Namespace, found: dict[str, list[Measured]]) -> None:
    """Print medians, and the ratio to TRL's fastest with as many forward passes."""
    speeds = {
        name: args.pairs * args.updates / statistics.median(m.seconds for m in all_) for name, all_ in found.items()
    }
    fastest = {
        cached: max(speed for name, speed in speeds.items() if name.startswith("TRL") and ("cached" in name) == cached)
        for cached in (False, True)
    }
    print("| way | pairs/s | times TRL's fastest | peak GB |\n|---|---|---|---|")
    for name, measured in found.items():
        times = speeds[name] / fastest["cached" in name]
        peak = statistics.median(m.peak_gb for m in measured)
        print(f"| {name} | {speeds[name]:.2f} | {times:.2f} | {peak:.1f} |")


def main() -> None:
    """Measure and print, or be one of the programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that from_pretrained opens")
    parser.add_argument("--data", required=True, help="a folder or file of pairs")
    parser.add_argument("--pairs", type=int, default=16, help="per update")
    parser.add_argument("--updates", type=int, default=2, help="per epoch")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--microbatches", nargs="+", type=int, default=[1, 2, 4], help="of TRL")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--cpu-seconds", dest="clock", action="store_const", const=time.process_time, default=time.perf_counter
    )
    parser.add_argument("--way", nargs=2, metavar=("NAME", "FOLDER"), help="only print a way's seconds and peak")
    args = parser.parse_args()
    if args.way:
        print("measured", *ways(args)[args.way[0]](Path(args.way[1])))
        return
    found: dict[str, list[Measured]] = {name: [] for name in ways(args)}
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(args, Path(folder))
        for name in list(found) * args.repeats:
            command = [sys.executable, *sys.argv, "--way", name, folder]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found[name].append(Measured(*map(float, output.split("measured ")[-1].split())))
            print(name, *found[name][-1], file=sys.stderr, flush=True)
    print_table(args, found)


if __name__ == "__main__":
    main()
