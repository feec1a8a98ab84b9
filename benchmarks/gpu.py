"""What one GPU does: training beside TRL and the original's way, evaluation, saving, sampling, the demo, the tests.

    python benchmarks/gpu.py --folder DIR [--minutes 8.5] [--only PART ...]

Each measurement is a cell, in a process of its own; an error is a result too. A call measures the cells that
DIR/cells.jsonl lacks, most important first, as long as --minutes allow, and prints the tables of all that are there:
call it until nothing is missing. To measure a cell again, delete its line. DIR/log.txt has what the cells print. TRL is
measured if it is installed. Torch keeps compiled code on disk, so a later cell with the same layers starts sooner.
Without a GPU, or with --small, tiny models go the same way.

Models have the shapes of real ones and random weights, pairs have the lengths of real ones (times 8 for 4,096 tokens)
and random tokens. Training has the default settings, but for those that a task's name has.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from against_trl import run_trl
from cells import (
    TEXT,
    Cell,
    Figures,
    Place,
    Row,
    last_line,
    measure_here,
    measure_missing,
    read_rows,
    run_program,
    show_missing,
    show_table,
)
from composition import ROOT, compose
from sampling import available_ways, parse
from sampling import measure as measure_sampling
from throughput import SHAPES, draw_examples, matrix_rate
from transformers import AutoModelForCausalLM, PreTrainedModel

from build import build_trainer, load_inputs
from dpo.model.layout_check import LayoutChoice
from dpo.model.loading import load_policy
from dpo.runs.run_dir import RunDir
from dpo.settings.run_config import read_run_config
from dpo.settings.schema import default_values, flatten, validate
from dpo.system.console import prefetch
from dpo.system.devices import peak_memory, pick_device, platform, reset_peak_memory
from losses import LOSSES
from trainers import BasicTrainer

WARMUP = 3  # updates before those that are timed: they compile, and allocate the optimizer's state
MAX_SECONDS = 60.0  # of timed updates; a cell then ends early, after three of them or more
SPEED, MEMORY, MACHINE = "pairs/s", "peak GB", "machine"  # keys of figures
DEFAULT = "default settings"
ADDED_TOKEN = ("single_word", "lstrip", "rstrip", "normalized")  # fields of an added token in tokenizer.json


@dataclass(frozen=True)
class Task:
    """What is trained: a shape of SHAPES, examples of at most max_length tokens, and settings besides the defaults."""

    shape: str
    settings: tuple[str, ...] = ()
    cached: bool = False
    max_length: int = 512
    pairs: int = 64  # per update

    def __str__(self) -> str:
        reference = "cached reference" if self.cached else "live reference"
        return ", ".join([self.shape, f"{self.max_length} tokens", *self.settings, reference])


# What is trained


def write_inputs(task: Task, folder: Path) -> None:
    """Write a model's config with a tokenizer of words "t1", "t2", ..., and pairs as rows of text."""
    config = SHAPES[task.shape]()
    config.eos_token_id = 0
    config.save_pretrained(folder / "model")
    words = {f"t{i}" if i else "<eos>": i for i in range(config.vocab_size)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<eos>", "special": True} | dict.fromkeys(ADDED_TOKEN, False)],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "<eos>"},
    }
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "pad_token": "<eos>"}
    (folder / "model" / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(names))

    def text(ids: Sequence[int]) -> str:
        return " ".join(f"t{max(1, i)}" for i in ids)

    rows = []
    longest, n = task.max_length, 6 * task.pairs
    for example in draw_examples(n, config.vocab_size, longest, longest // 2, scale=max(1, longest // 512)):
        chosen, rejected = (" " + text(ids[:-1] or ids) for ids in example.responses)  # training adds <eos>
        rows.append({"prompt": text(example.prompt), "chosen": chosen, "rejected": rejected})
    (folder / "data").mkdir()
    for name in ("train", "test"):
        (folder / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def load_on_device(settings: Any, config: Any, device: torch.device, *others: Any) -> PreTrainedModel:
    """Make a policy with random weights on its device: a host takes minutes for billions of them."""
    with device:
        return load_policy(settings, config, device, *others)


def overrides(task: Task, folder: Path) -> list[str]:
    """The command line of a run long enough for every default that depends on its length."""
    return [
        *("loss=dpo", f"loss.precompute_reference={task.cached}", f"batch_size={task.pairs}", "n_epochs=1000"),
        *(f"max_length={task.max_length}", f"max_prompt_length={task.max_length // 2}", "prompt_format=text"),
        *(f"model.name_or_path='{folder / 'model'}'", "model.from_scratch=true", f"datasets=['{folder / 'data'}']"),
        *(f"local_dirs=['{folder}']", f"local_run_dir='{folder / 'run'}'", "wandb.enabled=false"),
        *("sample_during_eval=false", *task.settings),
    ]


def build(run: RunDir, kind: str | None = None) -> BasicTrainer:
    """Build the trainer of a run; with a kind of attention, as if the check of the layout had chosen it."""
    settings, loss = validate(flatten(run.config), default_values(ROOT / "config", run.config.loss.name), LOSSES)
    with ExitStack() as stack:
        stack.enter_context(patch("build.load_policy", load_on_device))
        if kind is not None:
            choice = LayoutChoice("shared_prefix", kind)
            stack.enter_context(patch("build.recorded_layout", lambda *_: choice))
        return build_trainer(settings, loss, load_inputs(settings, loss), run)


def first_update(trainer: BasicTrainer) -> dict[str, float]:
    return trainer.train_step(next(iter(prefetch(trainer.train_batches))))


def memory_held(device: torch.device) -> float:
    """The GB of a GPU's tensors; of a CPU, the peak of the process."""
    return (torch.cuda.memory_allocated(device) if device.type == "cuda" else peak_memory(device)) / 1e9


# Cells


def ours(task: Task, place: Place, settings: Sequence[str] = (), kind: str | None = None, updates: int = 12) -> Figures:
    """Train, and time updates by the clock."""
    write_inputs(task, place.folder)
    config, *_ = compose([*overrides(task, place.folder), "debug=true", "n_eval_examples=16", *settings])
    with RunDir(Path(config.local_run_dir), config) as run:
        trainer = build(run, kind)
        model, device = trainer.policy.model, trainer.device
        attention = model.config._attn_implementation
        metrics: list[dict[str, float]] = []
        ends, memory = [time.time()], []
        for batch in prefetch(trainer.train_batches):
            metrics.append(trainer.train_step(batch))  # waits for the device
            ends.append(time.time())
            memory.append(memory_held(device))
            done = len(metrics) - WARMUP
            if done >= updates or (done >= 3 and ends[-1] - ends[WARMUP] > MAX_SECONDS):
                break
        tflops = statistics.median(m["mfu"] for m in metrics[WARMUP:]) * trainer.utilization.rate / 1e12
        is_compiled = any(module._compiled_call_impl is not None for module in model.modules())
        return {
            SPEED: task.pairs / median_seconds(ends),
            "TFLOP/s": tflops,
            "of matrix rate": f"{tflops / matrix_rate(device, trainer.dtype):.0%}",
            MEMORY: peak_memory(device) / 1e9,
            "GB after first and last update": f"{memory[0]:.2f}, {memory[-1]:.2f} (of {len(memory)})",
            "first loss": f"{metrics[0]['loss/train']:.5f}",
            "first margin": metrics[0]["rewards_train/margins"],
            "s to first update": ends[1] - place.started,
            "attention": f"{attention}{', compiled' if is_compiled else ''}",
            "tokens per pass": f"{trainer.packer.max_tokens:,}",
        }


def median_seconds(ends: Sequence[float]) -> float:
    """The median of the seconds per update after the warm-up, from the times at which updates ended, and a start."""
    return statistics.median(end - start for start, end in zip(ends[WARMUP:-1], ends[WARMUP + 1 :], strict=True))


def trl(task: Task, place: Place, microbatch: int, cudnn: bool = False, **options: Any) -> Figures:
    """Train with TRL, in bfloat16 with parameters in float32, and activations kept.

    RMSprop as here: the fused AdamW would save less than 1% of an update. cuDNN's attention is off unless stated.
    """
    write_inputs(task, place.folder)
    device = pick_device("auto")
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    with device:
        model = AutoModelForCausalLM.from_config(SHAPES[task.shape]())
    is_lora = "lora=default" in task.settings
    if is_lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    elif not task.cached:
        options["ref_model"] = copy.deepcopy(model)
    ends = run_trl(
        model,
        place.folder / "model",
        place.folder / "data" / "train.jsonl",
        pairs=task.pairs,
        microbatch=microbatch,
        max_length=task.max_length,
        max_steps=WARMUP + 4,
        bf16=device.type == "cuda",
        use_cpu=device.type == "cpu",
        gradient_checkpointing=False,
        precompute_ref_log_probs=task.cached,
        **options,
    )
    return {SPEED: task.pairs / median_seconds([0.0, *ends]), MEMORY: peak_memory(device) / 1e9}


def original(task: Task, place: Place, microbatch: int) -> Figures:
    """The original's way, as throughput.py does it; its FLOPs are other ones, of padding too."""
    row = "original's way, bfloat16"
    sizes = ("--shape", task.shape, "--pairs", str(task.pairs), "--microbatch", str(microbatch), "--repeats", "3")
    output = run_program(place, "benchmarks/throughput.py", *sizes, "--only", row)
    shown = next(line for line in output.splitlines() if line.startswith(f"| {row}")).strip("| ").split(" | ")
    return {SPEED: float(shown[1]), MEMORY: float(shown[5])}


def life(task: Task, place: Place) -> Figures:
    """The seconds of a run's parts: start, evaluation, a save in the background while training goes on, resuming."""
    write_inputs(task, place.folder)
    config, *_ = compose(overrides(task, place.folder))
    path = Path(config.local_run_dir)
    with RunDir(path, config) as run:
        trainer = build(run)
        device, update = trainer.device, partial(first_update, trainer)
        update()
        figures: Figures = {"s to first update": time.time() - place.started}
        figures["first evaluation"], figures["next evaluation"] = time_of(trainer.evaluate), time_of(trainer.evaluate)
        with trainer.writer:
            figures |= {"an update": time_of(update), "training waits for a save": time_of(trainer.save)}
            figures |= {"an update meanwhile": time_of(update), "rest of the save": time_of(trainer.writer.wait)}
    del trainer, update
    reset_peak_memory(device)
    with RunDir.reopen(path, read_run_config(path), {}) as run:
        return figures | {"resuming to first update": time_of(lambda: first_update(build(run)))}


def time_of(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def demo(place: Place, **environment: str) -> Figures:
    start = time.monotonic()
    output = run_program(place, "-m", "tools.demo", verdict=1, **environment)
    seconds = time.monotonic() - start
    results = (line for line in output.splitlines() if line.startswith("FAILED") or "samples are warm before" in line)
    return {"result": next(results, last_line(output)), "seconds": seconds}


def gpu_tests(place: Place) -> Figures:
    """The tests with the plugins that they need, and in parallel if they can be: most of the time goes to imports."""
    options = ["-q", "-m", "gpu", f"--rootdir={ROOT}", "-p", "no:cacheprovider"]
    if find_spec("xdist"):
        options += ["-p", "xdist.plugin", "-n", "8"]
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    output = run_program(place, "-m", "pytest", *options, "tests/test_gpu.py", verdict=1, **alone)
    failed = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return {"result": last_line(output), TEXT: "\n".join(failed)}


def verify(task: Task, place: Place) -> Figures:
    write_inputs(task, place.folder)
    output = run_program(place, "-m", "tools.verify", *overrides(task, place.folder), verdict=8)
    return {"result": last_line(output)}


def sampling(task: Task, place: Place, way: str, options: Sequence[str]) -> Figures:
    """A row of sampling.py."""
    write_inputs(task, place.folder)
    with pick_device("auto"):
        AutoModelForCausalLM.from_config(SHAPES[task.shape]()).save_pretrained(place.folder / "model")
    inputs = ("--model", str(place.folder / "model"), "--data", str(place.folder / "data" / "train.jsonl"))
    figures = measure_sampling(parse([*inputs, "--way", way, *options]))
    return {"s per 1,000 samples": figures["seconds"], "tokens/s": figures["rate"], MEMORY: figures["peak"]}


# What is measured


def training(task: Task, way: str, seconds: int, measure: Callable[..., Figures] = ours, **options: Any) -> Cell:
    return Cell("training", str(task), way, partial(measure, task, **options), seconds)


def with_trl(task: Task, seconds: int, microbatch: int, note: str = "", **options: Any) -> Cell:
    return training(task, f"TRL, {microbatch} per microbatch{note}", seconds, trl, microbatch=microbatch, **options)


def kinds_of_attention(task: Task, seconds: int) -> Iterator[Cell]:
    for compiled in ("compile=false", "compile=true"):
        for kind in ("varlen", "flex_attention", "packed"):
            yield training(task, f"{kind}, {compiled}", seconds, kind=kind, settings=[compiled])
        yield training(task, f"layout=padded, {compiled}", seconds, settings=["layout=padded", compiled])


def ways_of_sampling(task: Task, seconds: int, *options: str) -> Iterator[Cell]:
    for way in available_ways():
        draw = partial(sampling, task, way=way, options=options)
        yield Cell("sampling", f"sampling, {task.shape}", way, draw, seconds)


def small_cells() -> list[Cell]:
    """What takes a minute or two on a CPU."""
    live = Task("tiny", pairs=8)
    cached, lora = replace(live, cached=True), replace(live, settings=("lora=default",))
    few = ("--prompts", "2", "--samples", "2", "--tokens", "8", "--repeats", "1")
    return [
        *(training(task, DEFAULT, 90, updates=3) for task in (live, cached, lora)),
        training(live, "packed, compile=false", 90, kind="packed", settings=["compile=false"], updates=3),
        with_trl(live, 90, 4),
        training(live, "original's way, 4 per microbatch", 90, original, microbatch=4),
        Cell("runs", str(live), "a run", partial(life, live), 90),
        *ways_of_sampling(live, 60, *few),
    ]


def gpu_cells() -> list[Cell]:
    """All that is measured on a GPU, the most important first."""
    smollm2, pythia, llama1b = shapes = [Task("smollm2-135m"), Task("pythia-2.8b"), Task("llama-3.2-1b")]
    smollm2_cached, pythia_cached, llama1b_cached = (replace(task, cached=True) for task in shapes)
    loras = [replace(task, settings=("lora=default",)) for task in (*shapes, Task("llama-3.1-8b"))]
    long = [replace(task, max_length=4096) for task in (*shapes, loras[-1])]
    bf16 = Task("llama-3.1-8b", settings=("model.policy_dtype=bfloat16",))
    compiled: dict[str, Any] = {"note": ", compiled", "torch_compile": True}
    liger: dict[str, Any] = {"note": ", Liger", "use_liger_kernel": True}
    return [
        training(smollm2, DEFAULT, 100, updates=50),
        training(pythia, DEFAULT, 120, updates=50),
        training(pythia_cached, DEFAULT, 100),
        training(smollm2_cached, DEFAULT, 90),
        with_trl(pythia, 80, 16),
        with_trl(smollm2, 60, 64),
        Cell("programs", "tests/test_gpu.py", "on the GPU", gpu_tests, 240),
        Cell("programs", "make demo", "on the GPU", demo, 100),
        Cell("programs", "make demo", "on the CPU", partial(demo, CUDA_VISIBLE_DEVICES=""), 120),
        with_trl(pythia_cached, 80, 16),
        with_trl(smollm2_cached, 60, 64),
        *(training(task, DEFAULT, 130) for task in (llama1b, loras[-1], llama1b_cached)),
        Cell("runs", str(smollm2), "a run", partial(life, smollm2), 90),
        *ways_of_sampling(smollm2, 90, "--prompts", "125", "--rows", "256"),
        *(with_trl(task, 80, 16) for task in (smollm2, llama1b, llama1b_cached, loras[-1])),
        *(with_trl(task, 80, 8) for task in (pythia, pythia_cached, llama1b, loras[-1])),
        *kinds_of_attention(pythia, 90),
        *kinds_of_attention(smollm2, 80),
        *(training(task, "original's way, 16 per microbatch", 110, original, microbatch=16) for task in shapes),
        *(with_trl(task, 80, 32) for task in (pythia, smollm2, pythia_cached, smollm2_cached, llama1b, loras[-1])),
        *(with_trl(task, 60, 64) for task in (pythia, llama1b, llama1b_cached)),
        *(with_trl(pythia, 80, 16, **options) for options in (liger, compiled)),
        *(with_trl(smollm2, 80, 64, **options) for options in (liger, compiled)),
        with_trl(pythia, 80, 16, ", cuDNN attention", cudnn=True),
        *(training(task, DEFAULT, 150) for task in (bf16, replace(loras[-1], cached=True), *long, *loras[:-1])),
        *(with_trl(task, 150, 2) for task in long),
        *(with_trl(task, 80, 16) for task in loras[:-1]),
        Cell("runs", str(pythia), "a run", partial(life, pythia), 200),
        Cell("programs", "tools.verify", smollm2.shape, partial(verify, smollm2), 240),
    ]


# The command line


def add_ratios(cells: Sequence[Cell], rows: Mapping[str, Row]) -> None:
    """Add each speed as a multiple of TRL's best for the same task."""
    best: dict[str, float] = {}
    known = [
        (cell, rows[cell.name].figures) for cell in cells if cell.name in rows and SPEED in rows[cell.name].figures
    ]
    for cell, figures in known:
        if cell.way.startswith("TRL"):
            best[cell.task] = max(best.get(cell.task, 0.0), figures[SPEED])
    for cell, figures in known:
        if cell.task in best:
            figures["times TRL's best"] = figures[SPEED] / best[cell.task]


def report(cells: Sequence[Cell], rows: Mapping[str, Row]) -> Iterator[str]:
    """The lines of all tables."""
    yield from sorted({row.figures.pop(MACHINE) for row in rows.values() if MACHINE in row.figures})
    add_ratios(cells, rows)
    for table in dict.fromkeys(cell.table for cell in cells):
        yield from show_table([cell for cell in cells if cell.table == table], rows)
    yield from show_missing(cells, rows)


def machine() -> Figures:
    return {MACHINE: ", ".join(f"{name} {value}" for name, value in platform(pick_device("auto")).items())}


def main() -> None:
    """Measure what is missing and print the tables, or be the process of a cell."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="what earlier calls have measured, and their log")
    parser.add_argument("--minutes", type=float, default=8.5, help="a call ends by then, its own imports not counted")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="cells with one of these in their name")
    parser.add_argument("--small", action="store_true", help="tiny models, as without a GPU")
    parser.add_argument("--cell", nargs=2, metavar=("NAME", "TIME"), help="only measure this cell, in this process")
    args = parser.parse_args()
    small = args.small or not torch.cuda.is_available()
    cells = small_cells() if small else gpu_cells()
    if args.cell is not None:
        return measure_here(cells, args.cell[0], float(args.cell[1]), machine)
    chosen = [cell for cell in cells if any(part in cell.name for part in args.only)]
    command = [sys.executable, __file__, "--folder", str(args.folder), *(["--small"] if small else []), "--cell"]
    measure_missing(chosen, args.folder, start + 60 * args.minutes, command)
    print("\n".join(report(cells, read_rows(args.folder))))


if __name__ == "__main__":
    main()
