"""Runs the command line in several forked children, as torchrun runs it in several processes."""

import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import Run
from faults import HANG, Fault, be_the_command_line, prepare_children, run_command_line, wait
from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, launch_agent


def make_store() -> TCPStore:
    """Make the store that torchrun keeps for its processes."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def environment(rank: int, n: int, port: int) -> dict[str, str]:
    """Return what torchrun tells a process of n on one machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_PORT": port}
    texts = {name: str(value) for name, value in numbers.items()}
    return texts | {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}


class Gate:
    """Holds forked children until the last one is forked.

    A child that is forked while the store's thread looks up the address of an earlier child inherits the C library's
    locked resolver, and hangs.
    """

    def __init__(self):
        self.way_in, self.bar = os.pipe()

    def wait(self):
        """Wait in a child until every process has opened the gate."""
        os.close(self.bar)
        os.read(self.way_in, 1)

    def open(self):
        os.close(self.bar)
        os.close(self.way_in)


def command_lines(
    folder: Path,
    arguments: Sequence[str],
    n: int,
    faults: Mapping[int, Sequence[Fault]] | None = None,
    timeout: float = HANG,
) -> list[Run]:
    """Run `python train.py ARGUMENTS` as n ranks, with faults by rank; return what each of them did."""
    prepare_children()
    store, pids, gate = make_store(), [], Gate()
    files = [tempfile.TemporaryFile("w+") for _ in range(2 * n)]
    for rank in range(n):
        pid = os.fork()
        if pid == 0:
            gate.wait()
            os.environ.update(environment(rank, n, store.port))
            own = tuple((faults or {}).get(rank, ()))
            be_the_command_line(tuple(arguments), own, files[2 * rank].fileno(), files[2 * rank + 1].fileno())
        pids.append(pid)
    gate.open()
    end = time.monotonic() + timeout
    codes = [wait(pid, max(0.1, end - time.monotonic())) for pid in pids]
    texts = []
    for file in files:
        file.seek(0)
        texts.append(file.read())
        file.close()
    return [Run(code, texts[2 * i], texts[2 * i + 1], folder) for i, code in enumerate(codes)]


def run_ranks(n: int, work: Callable[[int, int, Path], None], folder: Path, timeout: float = HANG) -> None:
    """Call work(rank, n, folder) in n forked children with torchrun's environment; AssertionError if one fails."""
    prepare_children()
    store, pids, gate = make_store(), [], Gate()
    for rank in range(n):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                gate.wait()
                os.environ.update(environment(rank, n, store.port))
                work(rank, n, folder)
                code = 0
            except BaseException:
                (folder / f"error-{rank}.txt").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        pids.append(pid)
    gate.open()
    codes = [wait(pid, timeout) for pid in pids]
    assert codes == [0] * n, "\n".join(path.read_text() for path in sorted(folder.glob("error-*.txt")))


def call_in_child(work: Callable[[], Any]) -> Any:
    """Return what work returns in a forked child: what PyTorch remembers of process groups and meshes ends with it."""
    with tempfile.TemporaryDirectory() as name:
        run_ranks(1, lambda rank, n, folder: torch.save(work(), folder / "result.pt"), Path(name))
        return torch.load(Path(name) / "result.pt")


def torchrun(folder: Path, arguments: Sequence[str], n: int, fault: Callable[[int, int], Sequence[Fault]]) -> Run:
    """Run `torchrun --standalone --max-restarts 3 --nproc-per-node N train.py ARGUMENTS`, whose processes are forked.

    fault(rank, attempt) returns the faults of a process.
    """

    def rank_main() -> None:
        rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        code = run_command_line(tuple(arguments), tuple(fault(rank, attempt)), 1, 2)
        if code:  # else the launcher waits for this function to return
            os._exit(code)

    def agent() -> None:
        config = LaunchConfig(
            1, 1, n, rdzv_backend="c10d", rdzv_endpoint="localhost:0", local_addr="localhost", max_restarts=3,
            run_id="test", start_method="fork",
        )  # fmt: skip
        launch_agent(config, rank_main, [])

    prepare_children()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = 1
            try:
                agent()
                code = 0
            except ChildFailedError as error:
                code = error.get_first_failure()[1].exitcode
            finally:
                os._exit(code)
        code = wait(pid, HANG)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return Run(code, *texts, folder)
