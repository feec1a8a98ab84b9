"""Metrics of a batch; metrics.jsonl, samples.jsonl, pairs.jsonl and the console."""

import json
import math
import os
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from dpo.data.examples import TokenizedExample
from dpo.distributed.ranks import ALONE, Ranks
from dpo.reporting.trackers import Tracker
from dpo.system.console import log_message, on_terminal, printable
from dpo.system.errors import RunError
from dpo.system.files import atomic_write, naming_file


class BatchMetrics:
    """Collects one value per example for each metric, on the device, until the means are needed."""

    def __init__(self) -> None:
        self.examples: list[TokenizedExample] = []
        self.values: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, examples: Sequence[TokenizedExample], values: dict[str, torch.Tensor]) -> None:
        """Add one tensor of shape (examples,) per metric, a shorter one for a metric that only some examples have."""
        self.examples += examples
        for name, value in values.items():
            self.values[name].append(value)

    def means(self, split: str, ranks: Ranks = ALONE) -> dict[str, float]:
        """Return the means over all ranks' examples under the original's names: rewards_train/chosen, loss/train."""
        columns = {name: torch.cat(values).cpu().double() for name, values in self.values.items()}  # MPS has no float64
        parts = ranks.gather_shares({name: (column.sum().item(), len(column)) for name, column in columns.items()})
        means = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            kind, slash, side = name.partition("/")
            sums, counts = zip(*(part[name] for part in parts if name in part), strict=True)
            if sum(counts):
                means[f"{kind}_{split}/{side}" if slash else f"{kind}/{split}"] = sum(sums) / sum(counts)
        return means

    def gathered(self, ranks: Ranks) -> "BatchMetrics":
        """Return the examples and values of all ranks, on the host."""
        merged = BatchMetrics()
        values = {name: torch.cat(parts).cpu() for name, parts in self.values.items()}
        for examples, columns in ranks.gather_shares((self.examples, values)):
            merged.add(examples, columns)
        return merged

    def column(self, name: str) -> torch.Tensor:
        """Return one metric of all examples, (examples,)."""
        return torch.cat(self.values[name])

    def rows(self) -> list[dict[str, Any]]:
        """Return one dict per example, ready for JSON: its source and row, its texts, and the metrics that all have."""
        values = {name: torch.cat(parts).tolist() for name, parts in self.values.items()}
        values = {name: column for name, column in values.items() if len(column) == len(self.examples)}
        return [
            {"source": text.source, "row": text.row, "prompt": text.prompt, "responses": text.responses}
            | {name: column[i] if math.isfinite(column[i]) else str(column[i]) for name, column in values.items()}
            for i, text in enumerate(example.text for example in self.examples)
        ]


def check_finite(
    metrics: BatchMetrics, grad_norm: torch.Tensor, update: int, run_dir: Path, ranks: Ranks = ALONE
) -> None:
    """Raise RunError before an update whose loss or gradient is not finite; write its batch into the run directory."""
    losses = metrics.column("loss")
    if not ranks.any(not torch.cat((losses, grad_norm.reshape(1).to(losses))).isfinite().all()):
        return
    path = run_dir / f"not-finite-update-{update}.jsonl"
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for rows in ranks.gather_shares(metrics.rows()) for row in rows]
    ranks.run_on_main(lambda: atomic_write(path, "".join(rows).encode()))
    mean = torch.cat(ranks.gather_shares(losses.detach().cpu())).mean()
    found = f"loss {mean:.4g}, gradient norm {grad_norm:.4g}"
    remedy = "look at its rows, or start a new run with a lower lr or with precision=float32"
    message = f"update {update} is not finite ({found}), so it was not made; {path}: {remedy}"
    raise RunError(message, "not finite")


def check_evaluation(loss: float, examples: int) -> None:
    """Raise RunError if an evaluation's mean loss is not finite."""
    if not math.isfinite(loss):
        found = f"the evaluation after {examples:,} examples gave a loss of {loss}"
        raise RunError(f"{found}; nothing was saved since the last checkpoint", "not finite")


class MetricLogger:
    """Writes every record to metrics.jsonl as it happens, and thinned ones to the console and to trackers."""

    def __init__(self, run_dir: Path, tracker: Tracker, minimum_interval_secs: float = 0.0):
        self.paths = [run_dir / name for name in ("metrics.jsonl", "samples.jsonl", "pairs.jsonl")]
        self.file, self.samples, self.pairs = self.files = [open(path, "a", encoding="utf-8") for path in self.paths]
        self.tracker = tracker
        self.minimum_interval_secs = minimum_interval_secs
        self.last_shown = float("-inf")
        self.drop_partial_records()

    def log(self, record: dict[str, float], thin: bool = False) -> None:
        """Log one record, which holds `examples` and `updates`; a thin one is shown at most once per interval.

        OSError that names the file if the disk does not take it.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}  # JSON has no NaN
        with naming_file(self.paths[0]):
            self.file.write(json.dumps(finite) + "\n")
            self.file.flush()
        now = time.monotonic()
        if thin and now - self.last_shown < self.minimum_interval_secs:
            return
        self.last_shown = now if thin else self.last_shown
        self.tracker.log({k: v for k, v in record.items() if k not in ("examples", "updates")}, int(record["examples"]))
        if not (thin and on_terminal()):  # on a terminal the bar shows what an update brought
            log_message(console_line(record, SHOWN if thin else record))

    def log_samples(self, examples: int, samples: Mapping[str, Sequence[TokenizedExample]]) -> None:
        """Append what each model ("policy", "reference") sampled for the same prompts; print the first three.

        They go, verbatim, to samples.jsonl and to a tracker's table per model, policy_samples and reference_samples.
        OSError that names the file if the disk does not take it.
        """
        for model, drawn in samples.items():
            texts = [(sample.text.prompt, sample.text.responses[0]) for sample in drawn]
            with naming_file(self.paths[1]):
                for prompt, text in texts:
                    row = {"examples": examples, "model": model, "prompt": prompt, "sample": text}
                    self.samples.write(json.dumps(row, ensure_ascii=False) + "\n")
                self.samples.flush()
            rows: list[list[int | str]] = [[examples, prompt, text] for prompt, text in texts]
            self.tracker.table(f"{model}_samples", examples, ["step", "prompt", "sample"], rows)
        for i, sample in enumerate(samples["policy"][:3]):
            lines = {"prompt": sample.text.prompt}
            lines |= {model: drawn[i].text.responses[0] for model, drawn in samples.items()}
            shown = "".join(f"\n  {name}: {printable(text.strip(), indent='    ')}" for name, text in lines.items())
            log_message(f"\n--- sample {i + 1}, after {examples:,} examples ---{shown}")

    def log_pairs(self, examples: int, metrics: BatchMetrics) -> None:
        """Append the rewards and log-ratios of each evaluated pair to pairs.jsonl; nothing where there are no pairs.

        A checksum of the responses distinguishes the pairs of one row, whose order the token budget decides.
        OSError that names the file if the disk does not take it.
        """
        names = [name for name in metrics.values if name.startswith(("rewards/", "log_ratios/", "lengths/"))]
        if "rewards/margins" not in names:
            return
        with naming_file(self.paths[2]):
            for row in metrics.rows():
                pair = zlib.crc32(repr(row["responses"]).encode("utf-8", "backslashreplace"))
                record = {"examples": examples, "pair": pair} | {name: row[name] for name in ("source", "row", *names)}
                self.pairs.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.pairs.flush()

    def sizes(self) -> list[int]:
        """Return the sizes of the files in bytes, once all of it is on disk."""
        for path, file in zip(self.paths, self.files, strict=True):
            with naming_file(path):
                os.fsync(file.fileno())
        return [os.fstat(file.fileno()).st_size for file in self.files]

    def cut(self, sizes: list[int]) -> None:
        """Cut the files back to sizes that they had, 0 where there was none; what is cut will be written again."""
        sizes = [*sizes, *[0] * (len(self.files) - len(sizes))]
        for file, size in zip(self.files, sizes, strict=True):
            if os.fstat(file.fileno()).st_size < size:
                log_message(f"{file.name} is shorter than when the checkpoint was written; it lacks records.")
            else:
                os.ftruncate(file.fileno(), size)
        self.drop_partial_records()

    def drop_partial_records(self) -> None:
        """Cut off a last line that has no end, left by a kill or a full disk, so that no record is glued to it."""
        for path, file in zip(self.paths, self.files, strict=True):
            end = end_of_last_line(path)
            partial = os.fstat(file.fileno()).st_size - end
            if partial:
                os.ftruncate(file.fileno(), end)
                log_message(f"{path}: dropped its last record, {partial:,} bytes that were not written to the end.")

    def close(self) -> None:
        """Close the files and end the trackers' runs."""
        for file in self.files:
            with suppress(OSError):  # a record that could not be written, which has been reported
                file.close()
        self.tracker.finish()


class NoLogger(MetricLogger):
    """The logger of a rank that writes nothing, since the main one does."""

    def __init__(self) -> None:
        self.paths, self.files = [], []
        self.tracker = Tracker()

    def log(self, record: dict[str, float], thin: bool = False) -> None:
        """Do nothing."""

    def log_samples(self, examples: int, samples: Mapping[str, Sequence[TokenizedExample]]) -> None:
        """Do nothing."""

    def log_pairs(self, examples: int, metrics: BatchMetrics) -> None:
        """Do nothing."""

    def cut(self, sizes: list[int]) -> None:
        """Do nothing."""


def make_logger(run_dir: Path, ranks: Ranks, make_tracker: Callable[[], Tracker], interval: float) -> MetricLogger:
    """Return the logger of a run, which writes on the main rank alone; interval is that between shown updates."""
    return MetricLogger(run_dir, make_tracker(), interval) if ranks.is_main else NoLogger()


def end_of_last_line(path: Path) -> int:
    """Return the number of bytes of a file up to its last newline, that included."""
    with open(path, "rb") as file:
        start = file.seek(0, os.SEEK_END)
        while start > 0:
            stop, start = start, max(0, start - 2**16)
            file.seek(start)
            newline = file.read(stop - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
    return 0


# What the console shows of an update; of an evaluation it shows everything.
SHOWN = (
    *("loss/train", "rewards_train/accuracies", "rewards_train/margins", "rewards_train/desirable"),
    *("rewards_train/undesirable", "grad_norm", "lr", "examples_per_second"),
)


def console_line(record: dict[str, float], shown: Iterable[str]) -> str:
    """Format what is shown of a record as a readable line."""
    head = f"{record['examples']:,} examples, {record['updates']:,} updates:"
    values = [f"{k} {record[k]:.4g}" for k in shown if k in record and k not in ("examples", "updates")]
    return f"{head} {', '.join(values)}"


def log_notes(truncated: Counter[str], n_examples: int, advice: str | None) -> None:
    """Print how much of the training examples so far was truncated, and advice on an evaluation if there is some."""
    if advice is not None:
        log_message(f"Advice: {advice}.")
    if truncated:
        counts = ", ".join(f"{what} {n:,}" for what, n in sorted(truncated.items()))
        log_message(f"Truncated so far, of {n_examples:,} training examples: {counts}")
