"""Runs the command line in forked children, which start at once, and what can go wrong in them."""

import contextlib
import copy
import hashlib
import importlib.abc
import json
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch
import yaml
from conftest import GOLDENS, ROOT, TINY, Run, without_measurements
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser

import train
import trainers
from dpo.runs import checkpoints
from dpo.settings import run_config
from dpo.system import files
from tools.rounds import devices, training
from utils import register_resolvers

Fault = Callable[[], None]
HANG = 900.0  # seconds after which a process hangs, however busy the machine is

# A run of 6 updates with everything in it: evaluations, samples, checkpoints by both clocks, and removal of old ones.
BUSY = (
    *TINY,
    "max_length=48",
    "max_prompt_length=24",
    "n_examples=48",
    "n_eval_examples=8",
    "eval_batch_size=4",
    "eval_every=16",
    "save_every=8",
    "sample_during_eval=true",
    "n_eval_model_samples=2",
    "lr=1e-3",
    "warmup_steps=2",
    "wandb.enabled=false",
)


@cache
def prepare_children() -> None:
    """Do here, once, what would be a quarter of each child's time: import slow libraries, and parse config/."""
    import peft  # noqa: F401

    pyarrow.array([0])  # imports pandas

    yaml.load, yaml.compose = parsing_once(yaml.load), parsing_once(yaml.compose)
    parse = cache(partial(OverridesParser.parse_rule, OverridesParser.create()))
    OverridesParser.parse_rule = lambda self, text, rule: copy.copy(parse(text, rule))
    Hydra.get_mode = lambda self, config_name, overrides: None  # else it composes once more, for a mode that is null
    register_resolvers()
    train.check_arguments((*BUSY, "loss=dpo"))


def parsing_once(parse: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return a function of yaml that parses each text once, also for the children that are forked later."""
    parsed: dict[tuple[str, str], bytes] = {}

    def remembered(source: Any, Loader: Any) -> Any:
        text = source if isinstance(source, (str, bytes)) else source.read()
        if (text, Loader.__name__) not in parsed:
            if text is not source:
                source.seek(0)  # so that an error names the file
            parsed[text, Loader.__name__] = pickle.dumps(parse(source, Loader))
        return pickle.loads(parsed[text, Loader.__name__])

    return remembered


def command_line(folder: Path, arguments: tuple[str, ...], *faults: Fault, timeout: float = HANG) -> Run:
    """Run `python train.py ARGUMENTS` in a child in which the faults were put; folder is its run directory."""
    prepare_children()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            be_the_command_line(arguments, faults, out.fileno(), err.fileno())
        code = wait(pid, timeout)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return Run(code, *texts, folder)


def run_code(code: str, folder: Path) -> Run:
    """Run `python -c CODE` in a folder, in a forked child."""

    def instead() -> None:
        os.chdir(folder)
        exec(code, {"__name__": "__main__"})
        sys.exit()

    return command_line(folder, (), instead)


def rounds_line(folder: Path, arguments: tuple[str, ...], *faults: Fault) -> Run:
    """Run `python -m tools.rounds ARGUMENTS` in a folder, in a forked child, and so each training run."""

    def instead() -> None:
        for module in (training, devices):
            module.get_context = lambda method: get_context("fork")  # which need not import everything again
        os.chdir(folder)
        sys.path.insert(0, str(ROOT))
        sys.argv = ["rounds", *arguments]
        sys.modules.pop("tools.rounds.__main__", None)  # another test may have imported it
        runpy.run_module("tools.rounds", run_name="__main__", alter_sys=True)
        sys.exit(0)

    return command_line(folder, (), *faults, instead)


def be_the_command_line(arguments: tuple[str, ...], faults: tuple[Fault, ...], out: int, err: int) -> None:
    """Become the command line; never returns."""
    os._exit(run_command_line(arguments, faults, out, err))


def run_command_line(arguments: tuple[str, ...], faults: tuple[Fault, ...], out: int, err: int) -> int:
    """Run the command line in this process, and return its exit code."""
    code = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(ROOT)
        sys.argv = ["train.py", *arguments]
        for number in (signal.SIGHUP, signal.SIGTERM):  # what runs the tests may ignore them, as nohup does
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fault in faults:
            fault()
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError):  # a fault may have limited the files that they are
                stream.flush()
    return code


def wait(pid: int, timeout: float) -> int:
    """Return a child's exit code, negative for the signal that killed it."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"the command line still ran after {timeout} s")


def fresh(folder: Path, *overrides: str) -> tuple[str, ...]:
    """Return the arguments of a new run."""
    return (f"local_run_dir='{folder}'", *overrides)


def again(folder: Path, *overrides: str) -> tuple[str, ...]:
    """Return the arguments that resume a run."""
    return (f"resume='{folder}'", *overrides)


# What two runs have in common


def state_of(folder: Path) -> str:
    """Return a SHA-256 of weights, optimizer, scheduler, counters and random states in a run's newest checkpoint."""
    newest = run_config.list_checkpoints(folder)[0]
    states = checkpoints.read_checkpoint(newest)
    assert isinstance(states, dict), states
    run = states["run"]
    states["run"] = {name: run[name] for name in ("counters", "truncated", "random")}
    return digest(states)


def digest(value: Any) -> str:
    """Return a SHA-256 of nested dicts and lists of numbers and tensors."""
    sha = hashlib.sha256()
    if isinstance(value, torch.Tensor):
        sha.update(f"{value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        sha.update("".join(f"{key!r}{digest(value[key])}" for key in sorted(value, key=repr)).encode())
    elif isinstance(value, (list, tuple)):
        sha.update("".join(map(digest, value)).encode())
    else:
        sha.update(repr(value).encode())
    return sha.hexdigest()


def logs_of(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Return a run's metrics without what a clock measured, and its samples."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [without_measurements(json.loads(line)) for line in lines]
    return records, (folder / "samples.jsonl").read_text()


def assert_same(folder: Path, other: Path) -> None:
    """Assert that two runs ended alike, to the last bit."""
    assert logs_of(folder)[0] == logs_of(other)[0]
    assert logs_of(folder)[1] == logs_of(other)[1]
    assert state_of(folder) == state_of(other)


# Faults


def dropout() -> None:
    """Switch dropout on once the model is built: without it an update draws no random number."""
    make = trainers.BasicTrainer.__init__

    def with_dropout(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        for module in self.policy.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1

    trainers.BasicTrainer.__init__ = with_dropout


def forget_random_states() -> None:
    """Resume without the random states."""
    trainers.set_random_states = lambda states: None


def forget_position() -> None:
    """Resume without the iterator's position."""
    load = trainers.BasicTrainer.load_state_dict

    def without_position(self: Any, states: Any) -> None:
        load(self, states)
        self.train_batches.position = {"epoch": 0, "batch": 0}

    trainers.BasicTrainer.load_state_dict = without_position


def limit_files(method: str, size: int, examples: int) -> Fault:
    """Let no file grow beyond a size in bytes, from the call of a trainer's method after so many examples on."""
    original = getattr(trainers.BasicTrainer, method)

    def limited(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.examples == examples:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return original(self, *args, **kwargs)

    return lambda: setattr(trainers.BasicTrainer, method, limited)


def limit_file(name: str, size: int, examples: int) -> Fault:
    """Let one file of a save (or, of the export, any) grow no further than a size, after so many examples."""
    write, manifest, save = torch.save, files.write_manifest, trainers.BasicTrainer.save
    export, now = trainers.BasicTrainer.export, [False]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def saved(self: Any, *args: Any, **kwargs: Any) -> None:
        now[0] = self.examples == examples
        save(self, *args, **kwargs)

    def written(value: Any, path: Path) -> None:
        if now[0] and path.name == name:
            limit()
        write(value, path)

    def manifested(*args: Any) -> None:
        if now[0] and name == "MANIFEST":
            limit()
        manifest(*args)

    def exported(self: Any, metrics: dict[str, float]) -> None:
        if name == "hf":
            limit()
        export(self, metrics)

    def install() -> None:
        torch.save, files.write_manifest = written, manifested
        trainers.BasicTrainer.save, trainers.BasicTrainer.export = saved, exported

    return install


PHASES = ("train_step", "evaluate", "sample", "save")


def at_event(number: int, act: Callable[[], None], delay: float = 0.0, log: Path | None = None) -> Fault:
    """Act some seconds after a phase of the training has begun for the number-th time; log the phase."""

    def install() -> None:
        count = iter(range(10**9))

        def watch(phase: str) -> None:
            method = getattr(trainers.BasicTrainer, phase)

            def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
                if next(count) == number:
                    if log is not None:
                        log.write_text(phase)
                    threading.Timer(delay, act).start() if delay else act()
                return method(self, *args, **kwargs)

            setattr(trainers.BasicTrainer, phase, watched)

        for phase in PHASES:
            watch(phase)

    return install


def send(number: int) -> Callable[[], None]:
    """Return what sends this process a signal."""
    return lambda: os.kill(os.getpid(), number)


kill = send(signal.SIGKILL)


def during_import(name: str, act: Callable[[], None]) -> Fault:
    """Act when a module is about to be imported for the first time."""

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname: str, path: object, target: object = None) -> None:
            if fullname == name:
                sys.meta_path.remove(self)
                act()

    def install() -> None:
        sys.modules.pop(name, None)
        sys.meta_path.insert(0, Finder())

    return install


# Points of a save, as the event of Python's audit hooks that comes right before, and what ends the path that it names.
SAVE_EVENTS = {
    "before the manifest": ("open", r"/MANIFEST"),
    "before the rename": ("os.rename", r"/step-\d+"),
    "before LATEST": ("os.symlink", r"/\.staging-LATEST"),
    "in the change of LATEST": ("os.rename", r"/LATEST"),
    "before an old one is removed": ("shutil.rmtree", r"/\.doomed-step-\d+"),
    "while an old one is removed": ("os.remove", r"policy\.pt"),
}
SAVE_POINTS = (*(f"half of {name}.pt" for name in checkpoints.PARTS), *SAVE_EVENTS)


def kill_in_save(point: str, nth: int) -> Fault:
    """Kill at a named point of the nth save, or of the first one after it that comes to this point."""
    event, ending = SAVE_EVENTS.get(point, ("", ""))
    saves, write = [0], torch.save

    def watch(name: str, arguments: tuple[Any, ...]) -> None:
        if not name.startswith(("os.", "open", "shutil.")) or not arguments:
            return
        path = str(arguments[1 if name in ("os.rename", "os.symlink") else 0])
        saves[0] += name == "os.mkdir" and "/.staging-step-" in path
        if saves[0] >= nth and name == event and re.search(f"{ending}$", path):
            kill()

    def half(value: Any, path: Path, **options: Any) -> None:
        write(value, path, **options)
        if saves[0] >= nth and point == f"half of {getattr(path, 'name', path)}":
            os.truncate(path, path.stat().st_size // 2)
            kill()

    def install() -> None:
        sys.addaudithook(watch)
        torch.save = half

    return install


def copy_until(folder: Path, target: Path, step: int) -> Path:
    """Copy a run as it was when it had written step-N and was killed a little later."""
    shutil.copytree(folder, target, symlinks=True)
    for checkpoint in run_config.list_checkpoints(target):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    with contextlib.suppress(FileNotFoundError):
        (target / "LATEST").unlink()
    (target / "LATEST").symlink_to(f"step-{step}")
    shutil.rmtree(target / f"step-{step}" / "hf", ignore_errors=True)
    return target


def few_rows(folder: Path, n_train: int, n_test: int) -> Path:
    """Write a small part of the goldens' data set."""
    folder.mkdir()
    for split, n in (("train", n_train), ("test", n_test)):
        lines = (GOLDENS / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        (folder / f"{split}.jsonl").write_text("\n".join(lines[:n]) + "\n", encoding="utf-8")
    return folder


def rng(seed: int) -> np.random.RandomState:
    """Return a generator for a test's own draws."""
    return np.random.RandomState(seed)
