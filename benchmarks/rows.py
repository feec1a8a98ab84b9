"""Measures what rows of data cost: the time until the first batch of a first and a second run, memory and disk.

    python benchmarks/rows.py 100000 jsonl

Makes N rows of text, loads them as train.py does in two processes, one after the other, and prints a line of JSON for
each. Memory is the process's own (RssAnon on Linux), without pages of files, which the system drops when it needs
memory; worker is the peak of the largest process that helped. cpu is the seconds of all threads and processes, which
other programs on the machine change less than those on the clock. disk is the size of the table in megabytes.
"""

import argparse
import json
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def rows(n: int) -> Iterator[dict[str, str]]:
    """Yield n pairs, each with a prompt of its own."""
    for i in range(n):
        words = " ".join(f"{i * k % 9_973}" for k in range(1, 11)) + f" {i}"
        yield {"prompt": f"\n\nHuman: Say {words}.\n\nAssistant:", "chosen": f" {words}.", "rejected": f" No: {words}"}


def write(folder: Path, n: int, kind: str) -> None:
    """Write n training rows and a few test rows."""
    for split, size in (("train", n), ("test", 64)):
        path = folder / f"{split}.{kind}"
        if kind == "jsonl":
            with open(path, "w", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows(size))
        else:
            import datasets

            with tempfile.TemporaryDirectory() as cache:
                table = datasets.Dataset.from_generator(rows, gen_kwargs={"n": size}, cache_dir=cache)
                table.to_parquet(path)


def memory(kind: str) -> int:
    """A kind of memory of this process in megabytes: RssAnon is its own, VmHWM its peak with pages of files."""
    found = re.search(rf"{kind}:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) // 1024 if found else 0


def cpu_seconds() -> float:
    """The seconds of all threads and of processes that have ended."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def measure(folder: Path, facts: dict[str, object]) -> None:
    """Load a folder as train.py does, make the first batch, and print facts and figures."""
    import hydra

    from dpo.settings.schema import default_values, flatten, validate
    from losses import LOSSES
    from utils import register_resolvers

    register_resolvers()
    overrides = ["loss=dpo", "model=tiny", f"datasets=['{folder}']", "device=cpu", "wandb.enabled=false"]
    overrides += ["max_length=128", "max_prompt_length=64", f"local_dirs=['{folder}']"]
    with hydra.initialize_config_dir(str(ROOT / "config"), version_base=None):
        config = hydra.compose("config", overrides=overrides)
    settings, loss = validate(flatten(config), default_values(ROOT / "config", "dpo"), LOSSES)
    import datasets  # noqa: F401  # the library is not a row

    from build import load_inputs

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    own, peak, start, cpu = memory("RssAnon"), memory("VmHWM"), time.perf_counter(), cpu_seconds()
    inputs = load_inputs(settings, loss)
    inputs.train_batches.fingerprint()
    next(iter(inputs.train_batches))
    figures = {"seconds": round(time.perf_counter() - start, 1), "cpu": round(cpu_seconds() - cpu, 1)}
    figures |= {"megabytes": memory("RssAnon") - own, "peak": memory("VmHWM") - peak}
    worker = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    table = sum(path.stat().st_size for path in folder.glob("*/data_cache/*/*")) // 10**6
    print(json.dumps({**facts, **figures, "worker": worker, "disk": table}))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int, help="rows")
    parser.add_argument("kind", choices=("jsonl", "parquet"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps: list[tuple[Callable[..., None], tuple[Any, ...]]]
        steps = [(write, (Path(folder), arguments.n, arguments.kind))]  # each in a process of its own
        for start in ("first", "second"):
            steps.append((measure, (Path(folder), {"rows": arguments.n, "kind": arguments.kind, "start": start})))
        for step, own in steps:
            process = get_context("spawn").Process(target=step, args=own)
            process.start()
            process.join()


if __name__ == "__main__":
    main()
