"""Train a model with its parameters in float32 and, rounded in several ways, in bfloat16; compare curves and memory.

    python benchmarks/bfloat16_curve.py --model PATH --data FOLDER [overrides of train.py]

Every way is a run of train.py in a process of its own, on the same pairs; the tables are those of docs/bfloat16.md.
Products of bfloat16 matrices are computed in float32 and the results rounded, which on a CPU without such products is
several times as fast as torch's own kernels; --own-kernels leaves it to those, to measure memory.
"""

import argparse
import functools
import json
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import trainers  # noqa: E402
from dpo.system.devices import peak_memory  # noqa: E402
from dpo.training.optimizers import OptimizerOptions, make_optimizer, stochastic_round  # noqa: E402

CPU = torch.device("cpu")
DEFAULTS = ("lr=5e-7", "warmup_steps=0", "batch_size=4", "max_length=256", "max_prompt_length=128")
SWITCHES = ("loss=dpo", "device=cpu", "wandb.enabled=false", "sample_during_eval=false")


class Float32Moments(Optimizer):
    """Steps each bfloat16 parameter in float32, with moments in float32, and rounds it to nearest or stochastically.

    Master weights are kept in float32; else each step begins with the rounded ones.
    """

    def __init__(self, name: str, parameters: Iterable[Parameter], lr: float, masters: bool):
        super().__init__(parameters, {"lr": lr})
        self.masters, self.parameters = masters, self.param_groups[0]["params"]
        kind = getattr(torch.optim, name)
        self.inner = [kind([p.detach().float() if masters else torch.empty(0)], lr=lr) for p in self.parameters]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure
        for parameter, inner in zip(self.parameters, self.inner, strict=True):
            group = inner.param_groups[0]
            weights, group["lr"] = group["params"][0], self.param_groups[0]["lr"]
            if not self.masters:
                weights.data = parameter.float()
            weights.grad = parameter.grad.float()
            inner.step()
            parameter.copy_(weights if self.masters else stochastic_round(weights))
            weights.grad = None
            if not self.masters:
                weights.data = torch.empty(0)


def torch_optimizer(name: str, parameters: Iterable[Parameter], lr: float) -> Optimizer:
    """Make the optimizer of torch.optim whatever the dtype: updates and moments are rounded to nearest."""
    return getattr(torch.optim, name)(parameters, lr=lr)


WAYS: dict[str, tuple[str, str, Callable[..., Optimizer]]] = {  # dtype of parameters, of the computation, optimizer
    "float32, computed in float32": ("float32", "float32", make_optimizer),
    "float32, computed in bfloat16": ("float32", "bfloat16", make_optimizer),
    "bfloat16, float32 master weights": ("bfloat16", "auto", functools.partial(Float32Moments, masters=True)),
    "bfloat16, stochastic, float32 moments": ("bfloat16", "auto", functools.partial(Float32Moments, masters=False)),
    "bfloat16, stochastic, bfloat16 moments": ("bfloat16", "auto", make_optimizer),
    "bfloat16, nearest": ("bfloat16", "auto", torch_optimizer),
}


class Float32Products(TorchDispatchMode):
    """Computes products of bfloat16 matrices in float32 and rounds the results."""

    products = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.products and args[0].dtype == torch.bfloat16:
            return func(*(arg.float() for arg in args), **kwargs or {}).bfloat16()
        return func(*args, **kwargs or {})


def run_here(way: str, own_kernels: bool, overrides: list[str]) -> None:
    """Run train.py in this process and print, last, its peak of memory in GB from the optimizer's making to its end."""
    make = WAYS[way][2]
    peaks = []

    def make_and_watch(name: str, parameters: Iterable[Parameter], lr: float, _: OptimizerOptions) -> Optimizer:
        optimizer = make(name, parameters, lr)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
        optimizer.register_step_post_hook(lambda *_: peaks.append(peak_memory(CPU) / 1e9))
        return optimizer

    trainers.make_optimizer = make_and_watch  # type: ignore[attr-defined, assignment]  # which trainers imports
    sys.argv = ["train.py", *overrides]
    with nullcontext() if own_kernels else Float32Products():
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    print(peaks[-1])


def measure(way: str, args: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Run a way in a process of its own; return its losses, peak of memory and share of changed weights."""
    dtype, precision, _ = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = [f"model.name_or_path='{args.model}'", f"datasets=['{args.data}']", f"local_run_dir='{run}'"]
        settings += [f"model.policy_dtype={dtype}", f"precision={precision}"]
        command = [sys.executable, __file__, "--model", args.model, "--data", args.data, "--way", way]
        command += ["--own-kernels"] * args.own_kernels + settings + list(SWITCHES) + list(DEFAULTS) + overrides
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT).stdout
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        trained = torch.load(run / "LATEST" / "policy.pt", weights_only=True, mmap=True)["state"]
        before = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype)).named_parameters()
        counts = [(int((trained[name] != p.detach()).count_nonzero()), p.numel()) for name, p in before]
    return {
        "train": [record["loss/train"] for record in records if "loss/train" in record],
        "eval": [record["loss/eval"] for record in records if "loss/eval" in record],
        "gb": float(output.split()[-1]),
        "changed": sum(n for n, _ in counts) / sum(n for _, n in counts),
    }


def print_tables(results: dict[str, dict[str, Any]]) -> None:
    """Print the summary and the curves."""
    print("\n| parameters | evaluation loss, before and after | weights changed | peak GB |\n|---|---|---|---|")
    for way, found in results.items():
        first, last = found["eval"][0], found["eval"][-1]
        print(f"| {way} | {first:.3f}, {last:.3f} | {found['changed']:.1%} | {found['gb']:.2f} |")
    print("\n| update | " + " | ".join(results) + " |\n|" + "---|" * (len(results) + 1))
    for number, losses in enumerate(zip(*(found["train"] for found in results.values()), strict=True), 1):
        print(f"| {number} | " + " | ".join(f"{loss:.3f}" for loss in losses) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that from_pretrained opens")
    parser.add_argument("--data", required=True, help="a folder with train.jsonl and test.jsonl")
    parser.add_argument("--only", action="append", choices=list(WAYS), help="this way alone; may be repeated")
    parser.add_argument("--own-kernels", action="store_true", help="compute bfloat16 products by torch's own kernels")
    parser.add_argument("--way", help="run this way here (the script calls itself so)")
    args, overrides = parser.parse_known_args()
    if args.way:
        run_here(args.way, args.own_kernels, overrides)
        return
    results = {}
    for way in args.only or WAYS:
        results[way] = measure(way, args, overrides)
        print(f"{way}: {json.dumps(results[way])}", flush=True)
    print_tables(results)


if __name__ == "__main__":
    main()
