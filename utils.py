"""Devices, the run's directory, progress on the console, and the metric logger."""

import errno
import fcntl
import getpass
import json
import math
import netrc
import os
import queue
import re
import signal
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")


class UserError(ValueError):
    """Something a user can mend; its message is shown without a traceback."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its kind where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def lacks_memory(error: BaseException) -> bool:
    """Tell whether an error means that a device's memory, or the machine's, did not suffice."""
    told = isinstance(error, RuntimeError) and re.search(
        "out of memory|not enough memory|can't allocate memory", str(error)
    )
    return bool(told) or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


# Why a run ended, and the exit code that says so.
EXIT_CODES = {
    **{"refused": 2, "no checkpoint": 3, "disk": 4, "not finite": 5, "memory": 6},
    **{"SIGHUP": 129, "SIGINT": 130, "SIGTERM": 143},  # 128 and the signal's number, as a shell has it
}


class RunError(Exception):
    """A run cannot go on; its message is shown without a traceback."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.exit_code = EXIT_CODES[reason]


# Devices


def pick_device(name: str) -> torch.device:
    """Return the device called `name` (cuda, mps, cpu), or the best there is for auto; UserError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    if not available.get(name, False):
        raise UserError(f"device={name}: not available here; use device=auto or device=cpu")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Name what decides how numbers are rounded on a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def computes_bfloat16_natively(device: torch.device) -> bool:
    """Tell whether matrix products in bfloat16 run in hardware; emulation would be slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def compute_dtype(precision: str, policy_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Resolve the precision setting (float32, bfloat16 or auto) to the dtype of forward and backward passes."""
    if precision != "auto":
        return getattr(torch, precision)
    native = policy_dtype == torch.bfloat16 or computes_bfloat16_natively(device)
    return torch.bfloat16 if native else torch.float32


TOKENS_PER_PASS = {"cpu": 768, "mps": 2048, "cuda": 8192}  # for the CPU measured (benchmarks/README.md), else guessed


def keep_few_kernels() -> None:
    """Let oneDNN keep the kernels of few shapes, unless the environment says otherwise; call it before any product.

    Each pass has lengths of its own, and oneDNN makes a kernel for each shape of a bfloat16 product and keeps 1,024 of
    them, twice (LRU_CACHE_CAPACITY is that of torch's bridge to it): 0.7 GB, in pieces that split malloc's free memory.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")  # a pass uses about 30 shapes


def tokens_per_pass(setting: int | str, device: torch.device) -> int:
    """Resolve max_tokens_per_pass to a number of tokens."""
    return TOKENS_PER_PASS[device.type] if setting == "auto" else setting


# The run's directory


def slug(name: str) -> str:
    """Turn a hub name or path into a word that can stand in a file name."""
    return re.sub(r"[^\w.-]+", "_", str(name).rstrip("/").rsplit("/", 1)[-1])


def local_run_dir(exp_name: str, local_dirs: Iterable[str]) -> str:
    """Return DIR/USER/EXP_TIMESTAMP; makes nothing."""
    return os.path.join(local_dir(local_dirs), f"{exp_name}_{datetime.now():%Y-%m-%d_%H-%M-%S_%f}")


def local_dir(local_dirs: Iterable[str]) -> str:
    """Return DIR/USER in the first of local_dirs that exists, else in the last; makes nothing."""
    local_dirs = list(local_dirs)
    base = next((folder for folder in local_dirs if os.path.isdir(folder)), local_dirs[-1])
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run under a user id that has no name
        user = str(os.getuid())
    return os.path.join(base, user)


def make_run_dir(path: str | Path) -> Path:
    """Make the run's directory; UserError if it holds anything or cannot be made."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        occupied = any(path.iterdir())
    except OSError as error:
        raise UserError(f"local_run_dir={path}: cannot be made ({error.strerror}); choose another") from None
    if occupied:
        raise UserError(f"local_run_dir={path}: holds another run; choose a new exp_name or local_run_dir")
    return path


@contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Hold the run's directory for this process; UserError if another one does."""
    try:
        file = open(run_dir / ".lock", "a")
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be written ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir}: another process writes to this run; wait for it, or stop it") from None
        except OSError as error:
            say(f"{run_dir}: cannot be locked ({error.strerror}), so see to it that no other process writes to it.")
        yield


# Signals


class Stopped(Exception):
    """A signal asked the run to stop; the state is saved where there was something to save."""

    def __init__(self, name: str):
        super().__init__(name)
        self.exit_code = EXIT_CODES[name]


class Signals:
    """What signals ask of a training: nothing, ever. For a trainer that does not run under the command line."""

    stop: str | None = None  # the name of the signal that asked for it

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let signals wait until the trainer looks for them."""
        yield

    def take_save(self) -> bool:
        """Tell, once, whether a checkpoint was asked for."""
        return False

    def check(self) -> None:
        """Raise Stopped if the run is to stop."""
        if self.stop is not None:
            raise Stopped(self.stop)


class ProcessSignals(Signals):
    """Takes SIGTERM, SIGINT and SIGHUP as a wish to stop and SIGUSR1 as one for a checkpoint.

    A second SIGINT stops at once. A signal that is ignored, as under nohup, stays so.
    """

    def __init__(self):
        self.waiting = self.save = False
        self.interrupts = 0

    @contextmanager
    def installed(self) -> Iterator["ProcessSignals"]:
        """Handle the process's signals for a while."""
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
        numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        before = [signal.signal(number, self.handle) for number in numbers]
        try:
            yield self
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def handle(self, number: int, frame: Any) -> None:
        """Note a signal; before training begins and at a second Ctrl-C, stop at once."""
        name = signal.Signals(number).name
        self.interrupts += name == "SIGINT"
        if name == "SIGUSR1":
            self.save = True
        elif not self.waiting or self.interrupts > 1:
            raise KeyboardInterrupt if name == "SIGINT" else SystemExit(EXIT_CODES[name])
        else:
            self.stop = self.stop or name
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"{name}: stopping after this update.\n".encode())  # print is not safe in a handler

    @contextmanager
    def deferred(self) -> Iterator[None]:
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False

    def take_save(self) -> bool:
        asked, self.save = self.save, False
        return asked


# The console


def progress(items: Iterable[T], title: str, total: int | None = None, silent: bool = False) -> Iterator[T]:
    """Yield the items under a tqdm bar, or, where stderr is no terminal, with a plain line every 10 seconds."""
    total = len(items) if total is None and hasattr(items, "__len__") else total
    if silent:
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, desc=title, total=total, dynamic_ncols=True, leave=False)
        return
    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said >= 10:
            said = now
            say(f"{title}: {done}/{total or '?'}, {done / (now - start):.1f} a second")
        yield item


def prefetch(items: Iterable[T], ahead: int = 2) -> Iterator[T]:
    """Yield the items, of which a thread makes up to `ahead` while the caller works; its exceptions are raised here."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=ahead)
    stopped = threading.Event()

    def put(kind: str, value: Any) -> None:
        while not stopped.is_set():
            try:
                return ready.put((kind, value), timeout=0.1)
            except queue.Full:
                pass

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:  # whatever it is, it belongs to the caller
            put("error", error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        stopped.set()


def say(message: str) -> None:
    """Print a message whole, above a progress bar if one is being drawn; a closed terminal does not stop the run."""
    with suppress(OSError):
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()


# Metrics


class MetricLogger:
    """Writes every record to metrics.jsonl as it happens, and thinned ones to the console and to wandb."""

    def __init__(self, run_dir: Path, tracker: "Tracker", minimum_interval_secs: float = 0.0):
        self.file, self.samples = self.files = [
            open(run_dir / name, "a", encoding="utf-8") for name in ("metrics.jsonl", "samples.jsonl")
        ]
        self.tracker = tracker
        self.minimum_interval_secs = minimum_interval_secs
        self.last_shown = float("-inf")

    def log(self, record: dict[str, float], thin: bool = False) -> None:
        """Log one record, which holds `examples` and `updates`; a thin one is shown at most once an interval."""
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}  # JSON has no NaN
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()
        now = time.monotonic()
        if thin and now - self.last_shown < self.minimum_interval_secs:
            return
        self.last_shown = now if thin else self.last_shown
        self.tracker.log({k: v for k, v in record.items() if k not in ("examples", "updates")}, record["examples"])
        if not (thin and sys.stderr.isatty()):  # on a terminal the bar shows what an update brought
            say(console_line(record, SHOWN if thin else record))

    def log_samples(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Append sampled texts to samples.jsonl and to the wandb table called `name`."""
        for row in rows:
            self.samples.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.samples.flush()
        self.tracker.table(
            name, ["step", "prompt", "sample"], [[r["examples"], r["prompt"], r["sample"]] for r in rows]
        )

    def sizes(self) -> list[int]:
        """Return the sizes of the files in bytes, once all of it is on disk."""
        for file in self.files:
            os.fsync(file.fileno())
        return [os.fstat(file.fileno()).st_size for file in self.files]

    def cut(self, sizes: list[int]) -> None:
        """Cut the files back to sizes that they had; what was written after a checkpoint will be written again."""
        for file, size in zip(self.files, sizes, strict=True):
            if os.fstat(file.fileno()).st_size < size:
                say(f"{file.name} is shorter than when the checkpoint was written: records are missing from it.")
            else:
                os.ftruncate(file.fileno(), size)

    def close(self) -> None:
        """Close the files and finish the wandb run."""
        for file in self.files:
            file.close()
        self.tracker.finish()


# What the console shows of an update; of an evaluation it shows everything.
SHOWN = ("loss/train", "rewards_train/accuracies", "rewards_train/margins", "grad_norm", "lr", "examples_per_second")


def console_line(record: dict[str, float], shown: Iterable[str]) -> str:
    """Format what is shown of a record as a readable line."""
    head = f"{record['examples']:,} examples, {record['updates']:,} updates:"
    values = [f"{k} {record[k]:.4g}" for k in shown if k in record and k not in ("examples", "updates")]
    return f"{head} {', '.join(values)}"


class Tracker:
    """The tracker of a run without wandb: does nothing."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics at a step, counted in examples."""

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Log a table."""

    def finish(self) -> None:
        """End the run."""


class WandbTracker(Tracker):
    """Sends metrics to wandb; whatever wandb raises is said once and never reaches the training."""

    def __init__(self, run_dir: Path, settings: dict[str, Any]):
        """Start a run with wandb.init's settings: online if there is a key and its server answers, else offline.

        A resumed run goes on under the id that it has in the run directory.
        """
        self.run = None
        with self.guard():
            import wandb  # slow to import, and not needed by runs that switch it off

            mode = os.environ.get("WANDB_MODE", "online")
            mode = "offline" if mode == "online" and not can_reach_wandb(wandb) else mode
            settings = {**settings, "dir": str(run_dir), "settings": wandb.Settings(init_timeout=3, silent=True)}
            settings["id"] = next((folder.name.rsplit("-", 1)[1] for folder in wandb_folders(run_dir)), None)
            resume = "allow" if settings["id"] and mode == "online" else None
            try:
                self.run = wandb.init(mode=mode, resume=resume, **settings)
            except Exception:  # the server answered once and then not in time, or refused the key
                mode = "offline"
                self.run = wandb.init(mode=mode, **settings)
            if mode == "offline":
                folders = " ".join(map(str, wandb_folders(run_dir)))
                say(f"wandb: no key or no network, so it records offline; to upload it: wandb sync {folders}")

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Turn any failure of wandb into one printed line, after which nothing more is sent."""
        try:
            yield
        except Exception as error:  # whatever it is, a broken monitor must not stop a training
            self.run = None
            reason = first_line(error)
            say(f"wandb: switched off after {type(error).__name__}: {reason}")

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self.run is not None:
            with self.guard():
                self.run.log(metrics, step=step)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        if self.run is not None:
            with self.guard():
                import wandb

                self.run.log({name: wandb.Table(columns=columns, data=rows)}, step=rows[0][0])

    def finish(self) -> None:
        if self.run is not None:
            with self.guard():
                self.run.finish()


def wandb_folders(run_dir: Path) -> list[Path]:
    """Return the folders in which wandb recorded a run and its resumes, the first one first."""
    return sorted((run_dir / "wandb").glob("*run-*_*-*"), key=lambda folder: folder.name.removeprefix("offline-"))


def can_reach_wandb(wandb: Any) -> bool:
    """Tell whether wandb has a key and its server answers within 2 seconds; never asks for a key."""
    url = wandb.setup().settings.base_url
    try:
        in_netrc = netrc.netrc().authenticators(urllib.parse.urlparse(url).hostname) is not None
    except (OSError, netrc.NetrcParseError):
        in_netrc = False
    return (in_netrc or bool(os.environ.get("WANDB_API_KEY"))) and answers(url)


def answers(url: str, seconds: float = 2.0) -> bool:
    """Tell whether an HTTP server answers at url in time; a name look-up can hang, so a daemon thread does it."""
    answered = []

    def attempt() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds)
            answered.append(True)
        except urllib.error.HTTPError:  # an answer too: somebody is there
            answered.append(True)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answered)
