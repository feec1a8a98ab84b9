"""Experiment trackers: wandb, TensorBoard, trackio."""

import netrc
import os
import shlex
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from dpo.system.console import log_message
from dpo.system.errors import summarize_error
from dpo.system.network import is_reachable


class Tracker:
    """The interface of a tracker; this one does nothing."""

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics at a step, counted in examples."""

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[int | str]]) -> None:
        """Log a table at a step, counted in examples."""

    def finish(self) -> None:
        """End the run."""


class Trackers(Tracker):
    """Several trackers by name; one that raises is reported and disabled."""

    def __init__(self, makers: Mapping[str, Callable[[], Tracker]]):
        self.trackers: dict[str, Tracker] = {}
        for name, make in makers.items():
            with self.guard(name):
                self.trackers[name] = make()

    @contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Disable a tracker that raises."""
        try:
            yield
        except Exception as error:  # of any kind: a broken tracker must not stop training
            self.trackers.pop(name, None)
            log_message(f"{name}: switched off after {type(error).__name__}: {summarize_error(error)}")

    def for_each(self, use: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            with self.guard(name):
                use(tracker)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.for_each(lambda tracker: tracker.log(metrics, step))

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[int | str]]) -> None:
        self.for_each(lambda tracker: tracker.table(name, step, columns, rows))

    def finish(self) -> None:
        self.for_each(lambda tracker: tracker.finish())


class RunTracker(Tracker):
    """Sends metrics to wandb, or a library with the same interface."""

    library: Any
    run: Any

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.run.log(metrics, step=step)

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[int | str]]) -> None:
        self.log({name: self.library.Table(columns=list(columns), data=[list(row) for row in rows])}, step)

    def finish(self) -> None:
        self.run.finish()


class WandbTracker(RunTracker):
    def __init__(self, run_dir: Path, settings: dict[str, Any]):
        """Start a run with settings for wandb.init: offline unless there is a key and the server responds.

        A resumed run keeps its id, read from the run directory.
        """
        import wandb  # slow to import

        self.library = wandb
        mode = os.environ.get("WANDB_MODE", "online")
        mode = "offline" if mode == "online" and not can_reach_wandb(wandb) else mode
        run_id = next((folder.name.rsplit("-", 1)[1] for folder in wandb_folders(run_dir)), None)
        options = wandb.Settings(init_timeout=3, silent=True)
        settings = {**settings, "dir": str(run_dir), "settings": options, "id": run_id}
        settings |= {"mode": mode, "resume": "allow" if run_id and mode == "online" else None}
        try:
            self.run = wandb.init(**settings)
        except Exception:  # the server did not respond in time, or refused the key
            mode = "offline"
            self.run = wandb.init(**settings | {"mode": mode, "resume": None})
        if mode == "offline":
            folders = shlex.join(map(str, wandb_folders(run_dir)))
            log_message(f"wandb: no key or no network; recording offline, upload with: wandb sync {folders}")


def wandb_folders(run_dir: Path) -> list[Path]:
    """The folders in which wandb recorded a run and its resumes, oldest first."""
    return sorted((run_dir / "wandb").glob("*run-*_*-*"), key=lambda folder: folder.name.removeprefix("offline-"))


def can_reach_wandb(wandb: ModuleType) -> bool:
    """Whether wandb has a key and its server responds within 2 seconds, without prompting for a key."""
    url = wandb.setup().settings.base_url
    try:
        in_netrc = netrc.netrc().authenticators(urllib.parse.urlparse(url).hostname) is not None
    except (OSError, netrc.NetrcParseError):
        in_netrc = False
    return (in_netrc or bool(os.environ.get("WANDB_API_KEY"))) and is_reachable(url)


class TensorBoardTracker(Tracker):
    """Writes metrics and tables into RUN/tensorboard, for `tensorboard --logdir`."""

    def __init__(self, run_dir: Path, resumed_at: int | None):
        """Open an event file; TensorBoard hides earlier records beyond resumed_at, in examples."""
        from torch.utils.tensorboard import SummaryWriter  # slow to import; optional

        purge_step = None if resumed_at is None else resumed_at + 1
        self.writer = SummaryWriter(run_dir / "tensorboard", purge_step=purge_step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def table(self, name: str, step: int, columns: Sequence[str], rows: Sequence[Sequence[int | str]]) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        cells = [[str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in line] for line in lines]
        self.writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in cells), step)

    def finish(self) -> None:
        self.writer.close()


class TrackioTracker(RunTracker):
    """Sends metrics and tables to trackio, which stores them in TRACKIO_DIR, for `trackio show`."""

    def __init__(self, project: str, run_dir: Path, config: Any, is_resumed: bool):
        """Start or continue a run named like the run directory."""
        import trackio

        self.library = trackio
        resume = "allow" if is_resumed else "never"
        self.run = trackio.init(project=project, name=run_dir.name, config=config, resume=resume, embed=False)
