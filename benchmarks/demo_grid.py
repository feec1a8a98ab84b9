"""The demo's real settings over seeds, precisions, token budgets and learning rates of DPO, as a Markdown table.

    python benchmarks/demo_grid.py                            everything: 60 SFT runs and 180 DPO runs
    python benchmarks/demo_grid.py --seeds 0 1 --tokens 768   less

Every run is a command line of train.py in a forked child, on one thread, two at a time (--jobs). A run that is
complete is not repeated, so an interrupted grid goes on where it stopped. Exit code 1 if a cell fails.
"""

import argparse
import itertools
import multiprocessing
import os
import runpy
import statistics
import sys
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import trainers  # noqa: F401  (here, so that the children need not import it)
from dpo.data import film_reviews
from dpo.system.devices import computes_bfloat16_natively
from tools import demo

ROOT = Path(__file__).resolve().parent.parent
SEEDS, PRECISIONS, TOKENS, FACTORS = range(10), ("float32", "bfloat16"), (512, 768, 1024), (1.0, 0.5, 2.0)
ATEN = torch.ops.aten
PRODUCTS = {
    *(ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.baddbmm.default),
    ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
Cell = tuple[str, int, int, float]  # precision, max_tokens_per_pass, seed, factor of the learning rate


class BFloat16Products(TorchDispatchMode):
    """Computes bfloat16 products in float32 and rounds the results.

    This is what hardware with bfloat16 does, too; torch's own emulation on a CPU without it is 30 times slower.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)

        def float32(value: Any) -> Any:
            return value.float() if isinstance(value, torch.Tensor) else value

        out = func(*map(float32, args), **{key: float32(value) for key, value in kwargs.items()})
        if isinstance(out, torch.Tensor):
            return out.bfloat16()
        if func is ATEN._scaled_dot_product_flash_attention_for_cpu.default:
            return out[0].bfloat16(), out[1]  # the second is the logarithm of the sums, in float32
        return tuple(part.bfloat16() for part in out)


def run_train(run: Path, overrides: Sequence[str]) -> None:
    """Run train.py in a forked child unless its run is complete; RuntimeError names the log of one that failed."""
    if (run / "LATEST" / "hf").exists():
        return
    log = run.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    if (pid := os.fork()) == 0:
        be_train(log, [*overrides, f"local_run_dir='{run}'"])
    if os.waitpid(pid, 0)[1] != 0:
        raise RuntimeError(f"the run failed; see {log}")


def be_train(log: Path, overrides: Sequence[str]) -> None:
    """Become `python train.py OVERRIDES`, with its output in a file; never returns."""
    code: Any = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        sys.argv = ["train.py", *overrides]
        native = computes_bfloat16_natively(torch.device("cpu"))
        with nullcontext() if native else BFloat16Products():
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def run_cell(folder: Path, cell: Cell) -> demo.DemoResult:
    """Run the cell's SFT, if no cell before did, and its DPO."""
    precision, tokens, seed, factor = cell
    base = folder / f"{precision}-{tokens}-{seed}"
    shared = [f"seed={seed}", f"precision={precision}", f"max_tokens_per_pass={tokens}", "device=cpu", "report=false"]
    rate = factor * next(float(o.removeprefix("lr=")) for o in demo.STAGES["dpo"] if o.startswith("lr="))
    run_train(base / "sft", [*demo.overrides("sft", base), *shared])
    run = base / f"dpo-{factor:g}"
    once = ["do_first_eval=false", f"eval_every={film_reviews.SIZES['train']}"]  # one evaluation, at the end
    run_train(run, [*demo.overrides("dpo", base), *shared, *once, f"lr={rate:g}"])
    return demo.DemoResult.read(run)


def spread(values: Sequence[float], form: str = "g") -> str:
    """The smallest, the median and the largest of some values."""
    return " / ".join(f"{value:{form}}" for value in (min(values), statistics.median(values), max(values)))


def table(outcomes: dict[Cell, demo.DemoResult]) -> str:
    """One row for each precision, budget and learning rate: min / median / max over the seeds."""
    lines = ["| precision | tokens a pass | lr × | SFT warm | SFT broken | DPO warm | DPO cold | DPO broken "]
    lines[0] += "| most more broken | accuracy | margin | seeds | failed |"
    lines += ["|---" * 13 + "|"]
    for row in dict.fromkeys((cell[0], cell[1], cell[3]) for cell in outcomes):
        cells = [outcome for cell, outcome in outcomes.items() if (cell[0], cell[1], cell[3]) == row]
        before, after = ([outcome.counts(model) for outcome in cells] for model in demo.MODELS)
        columns = [spread([c[v] for c in counts]) for counts, v in ((before, "warm"), (before, "broken"))]
        columns += [spread([counts[verdict] for counts in after]) for verdict in demo.VERDICTS]
        columns += [f"{max(b['broken'] - a['broken'] for a, b in zip(before, after, strict=True)):+}"]
        columns += [spread([o.accuracy for o in cells], ".3f"), spread([o.margin for o in cells], ".2f")]
        columns += [str(len(cells)), str(sum(bool(o.problems()) for o in cells))]
        lines += [f"| {row[0]} | {row[1]} | {row[2]:g} | {' | '.join(columns)} |"]
    return "\n".join(lines)


def main() -> None:
    """Run the cells that the command line asks for and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--precisions", nargs="+", default=PRECISIONS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="max_tokens_per_pass")
    parser.add_argument("--factors", nargs="+", type=float, default=FACTORS, help="of the learning rate of DPO")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--folder", type=Path, default=Path(".cache/demo_grid"), help="where the runs lie")
    options = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    groups = list(itertools.product(options.precisions, options.tokens, options.seeds))
    outcomes: dict[Cell, demo.DemoResult] = {}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("fork")) as pool:
        tasks = [(group, pool.submit(run_group, options.folder, group, options.factors)) for group in groups]
        for _, task in tasks:
            outcomes |= task.result()
    print(table(outcomes))
    sys.exit(any(outcome.problems() for outcome in outcomes.values()))


def run_group(folder: Path, group: tuple[str, int, int], factors: Sequence[float]) -> dict[Cell, demo.DemoResult]:
    """Run the cells that share an SFT model, and print what each reached."""
    outcomes = {}
    for cell in [(*group, factor) for factor in factors]:
        outcomes[cell] = outcome = run_cell(folder, cell)
        counts = [dict(outcome.counts(model)) for model in demo.MODELS]
        print(*cell, *counts, *outcome.problems(), file=sys.stderr, flush=True)
    return outcomes


if __name__ == "__main__":
    main()
