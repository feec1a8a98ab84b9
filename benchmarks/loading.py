"""Host memory while several processes load a model: the sum over them of the peak of each, above what it held before.

    python benchmarks/loading.py --model DIR --ranks 1 2 4

DIR is a local model. Each process builds the trainer of a DPO run with a live reference, on the CPU, and ends before
the first update. Another process reads their proportional set size (PSS: shared pages are divided among those that
share them) from /proc every 20 ms, so this needs Linux. Writes a Markdown table to stdout.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def pss(pid: int) -> int:
    """The bytes of a process's memory, those that it shares by its part; 0 if it has ended."""
    try:
        found = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 1024 * int(found[1]) if found else 0


def load(settings: list[str], folder: Path) -> None:
    """Build a trainer as one of the ranks, once every rank has been asked to."""
    from composition import compose

    from build import build_trainer, load_inputs
    from dpo.distributed.process_group import join, joined
    from dpo.runs.run_dir import RunDir

    config, values, loss = compose(settings)
    with joined(lambda: join(values)) as ranks, RunDir(Path(values.local_run_dir), config, ranks) as run:
        inputs = load_inputs(values, loss)
        (folder / f"ready-{ranks.rank}").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)
        trainer = build_trainer(values, loss, inputs, run)
        assert trainer.updates == 0


def measure(model: str, n: int) -> list[int]:
    """The bytes by which each of n processes grows at most while it loads a model."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [
            f"model.name_or_path='{model}'",
            f"datasets=['{ROOT / 'tests' / 'goldens' / 'data'}']",
            f"local_run_dir='{folder / 'run'}'",
            *("loss=dpo", "trainer=FSDPTrainer", "device=cpu", "debug=true", "batch_size=8", "prompt_format=hh"),
        ]
        command = [sys.executable, str(Path(__file__).resolve()), "--rank-of", str(folder), *settings]
        shared = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500 + n}
        processes = []
        for rank in range(n):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1} | shared
            texts = {key: str(value) for key, value in environment.items()}
            processes.append(subprocess.Popen(command, env=os.environ | texts, stdout=subprocess.DEVNULL))
        while len(list(folder.glob("ready-*"))) < n:
            assert all(process.poll() is None for process in processes), "a process has failed"
            time.sleep(0.1)
        before = [pss(process.pid) for process in processes]
        (folder / "go").touch()
        peaks = before
        while any(process.poll() is None for process in processes):
            peaks = [max(peak, pss(process.pid)) for peak, process in zip(peaks, processes, strict=True)]
            time.sleep(0.02)
        assert not any(process.returncode for process in processes), "a process has failed"
    return [peak - start for peak, start in zip(peaks, before, strict=True)]


def main() -> None:
    """Print the table, or be one of the processes that it measures."""
    if sys.argv[1:2] == ["--rank-of"]:
        return load(sys.argv[3:], Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a local folder")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    print("| processes | GB, all together | GB, each |\n|---|---|---|")
    for n in args.ranks:
        found = [grown / 1e9 for grown in measure(args.model, n)]
        print(f"| {n} | {sum(found):.2f} | {', '.join(f'{gigabytes:.2f}' for gigabytes in found)} |", flush=True)


if __name__ == "__main__":
    main()
