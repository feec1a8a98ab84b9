"""Metrics of a batch, and where they go: metrics.jsonl, samples.jsonl, pairs.jsonl, the console and trackers."""

import json
import math
import mmap
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
from dpo.reporting.metric_table import CONSOLE, PAIR_COLUMNS, format_values, record_name
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
        """Add a tensor of shape (examples,) for each metric, a shorter one where only some examples have the metric."""
        self.examples += examples
        for name, value in values.items():
            self.values[name].append(value)

    def means(self, split: str, ranks: Ranks = ALONE) -> dict[str, float]:
        """Average over the examples of all ranks, under the original's names: rewards_train/chosen, loss/train."""
        columns = {name: torch.cat(values).cpu().double() for name, values in self.values.items()}  # MPS has no float64
        parts = ranks.gather_shares({name: (column.sum().item(), len(column)) for name, column in columns.items()})
        means = {}
        for name in dict.fromkeys(name for part in parts for name in part):
            sums, counts = zip(*(part[name] for part in parts if name in part), strict=True)
            if sum(counts):
                means[record_name(name, split)] = sum(sums) / sum(counts)
        return means

    def gathered(self, ranks: Ranks) -> "BatchMetrics":
        """Collect the examples and values of all ranks, on the host."""
        merged = BatchMetrics()
        values = {name: torch.cat(parts).cpu() for name, parts in self.values.items()}
        for examples, columns in ranks.gather_shares((self.examples, values)):
            merged.add(examples, columns)
        return merged

    def column(self, name: str) -> torch.Tensor:
        """Return a metric of all examples, (examples,)."""
        return torch.cat(self.values[name])

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict per example for JSON: its source, row and texts, and the metrics that all examples have."""
        columns = {name: torch.cat(parts).tolist() for name, parts in self.values.items()}
        rows = []
        for i, example in enumerate(self.examples):
            text = example.text
            row = {"source": text.source, "row": text.row, "prompt": text.prompt, "responses": text.responses}
            for name, column in columns.items():
                if len(column) == len(self.examples):
                    row[name] = column[i] if math.isfinite(column[i]) else str(column[i])
            rows.append(row)
        return rows


def check_finite(
    metrics: BatchMetrics, grad_norm: torch.Tensor, update: int, run_dir: Path, ranks: Ranks = ALONE
) -> None:
    """Raise RunError if the loss or the gradient of an update is not finite; write its batch to the run directory."""
    losses = metrics.column("loss")
    if not ranks.any(not torch.cat((losses, grad_norm.reshape(1).to(losses))).isfinite().all()):
        return
    path = run_dir / f"not-finite-update-{update}.jsonl"
    rows = [json.dumps(row, ensure_ascii=False) + "\n" for rows in ranks.gather_shares(metrics.rows()) for row in rows]
    ranks.run_on_main(lambda: atomic_write(path, "".join(rows).encode()))
    mean = torch.cat(ranks.gather_shares(losses.detach().cpu())).mean()
    raise RunError(
        f"update {update} is not finite (loss {mean:.4g}, gradient norm {grad_norm:.4g}), so it was not made; look at "
        f"its rows in {path}, or start a new run with a lower lr or with precision=float32",
        "not finite",
    )


def check_evaluation(loss: float, examples: int) -> None:
    """Raise RunError if an evaluation's mean loss is not finite."""
    if not math.isfinite(loss):
        raise RunError(
            f"the evaluation after {examples:,} examples gave a loss of {loss}; "
            "nothing was saved since the last checkpoint",
            "not finite",
        )


class MetricLogger:
    """Writes every record to metrics.jsonl at once; the console and trackers get some of those of updates."""

    def __init__(self, run_dir: Path, tracker: Tracker, minimum_interval_secs: float = 0.0):
        self.paths = [run_dir / name for name in ("metrics.jsonl", "samples.jsonl", "pairs.jsonl")]
        self.file, self.samples, self.pairs = self.files = [open(path, "a", encoding="utf-8") for path in self.paths]
        self.tracker = tracker
        self.minimum_interval_secs = minimum_interval_secs
        self.last_shown = float("-inf")
        self.drop_partial_records()

    def log(self, record: dict[str, float], thin: bool = False) -> None:
        """Log a record, which holds `examples` and `updates`; of thin ones at most one per interval is shown.

        Raises OSError with the name of the file if it cannot be written.
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
        if not (thin and on_terminal()):  # on a terminal the progress bar shows the loss
            log_message(console_line(record, CONSOLE if thin else record))

    def log_samples(self, examples: int, samples: Mapping[str, Sequence[TokenizedExample]]) -> None:
        """Write what each model ("policy", "reference") sampled for the same prompts; print the first three.

        The texts go unchanged to samples.jsonl and to the trackers' tables policy_samples and reference_samples.
        Raises OSError with the name of the file if it cannot be written.
        """
        for model, examples_of_model in samples.items():
            texts = [(sample.text.prompt, sample.text.responses[0]) for sample in examples_of_model]
            with naming_file(self.paths[1]):
                for prompt, text in texts:
                    row = {"examples": examples, "model": model, "prompt": prompt, "sample": text}
                    self.samples.write(json.dumps(row, ensure_ascii=False) + "\n")
                self.samples.flush()
            rows: list[list[int | str]] = [[examples, prompt, text] for prompt, text in texts]
            self.tracker.table(f"{model}_samples", examples, ["step", "prompt", "sample"], rows)
        for i, sample in enumerate(samples["policy"][:3]):
            lines = [f"\n--- sample {i + 1}, after {examples:,} examples ---"]
            lines.append(f"  prompt: {printable(sample.text.prompt.strip(), indent='    ')}")
            for model, examples_of_model in samples.items():
                text = examples_of_model[i].text.responses[0]
                lines.append(f"  {model}: {printable(text.strip(), indent='    ')}")
            log_message("\n".join(lines))

    def log_pairs(self, examples: int, metrics: BatchMetrics) -> None:
        """Append a line per evaluated pair to pairs.jsonl; nothing where there are no pairs.

        A checksum of the responses distinguishes the pairs of one row: their order depends on the token budget.
        Raises OSError with the name of the file if it cannot be written.
        """
        names = [name for name in metrics.values if name in PAIR_COLUMNS]
        if "rewards/margins" not in names:
            return
        with naming_file(self.paths[2]):
            for row in metrics.rows():
                pair = zlib.crc32(repr(row["responses"]).encode("utf-8", "backslashreplace"))
                record = {"examples": examples, "pair": pair} | {name: row[name] for name in ("source", "row", *names)}
                self.pairs.write(json.dumps(record, ensure_ascii=False) + "\n")
            self.pairs.flush()

    def sizes(self) -> list[int]:
        """Flush the files to disk and return their sizes in bytes."""
        for path, file in zip(self.paths, self.files, strict=True):
            with naming_file(path):
                os.fsync(file.fileno())
        return [os.fstat(file.fileno()).st_size for file in self.files]

    def cut(self, sizes: list[int]) -> None:
        """Truncate the files to earlier sizes, 0 for a file without one; a resumed run writes the rest again."""
        sizes = [*sizes, *[0] * (len(self.files) - len(sizes))]
        for file, size in zip(self.files, sizes, strict=True):
            if os.fstat(file.fileno()).st_size < size:
                log_message(f"{file.name}: is shorter than when the checkpoint was written, so records are missing.")
            else:
                os.ftruncate(file.fileno(), size)
        self.drop_partial_records()

    def drop_partial_records(self) -> None:
        """Drop a last line without a newline, left by a kill or a full disk, so that the next record starts a line."""
        for path, file in zip(self.paths, self.files, strict=True):
            end = end_of_last_line(path)
            partial = os.fstat(file.fileno()).st_size - end
            if partial:
                os.ftruncate(file.fileno(), end)
                log_message(f"{path}: dropped its last record, {partial:,} bytes of an incomplete line.")

    def close(self) -> None:
        """Close the files and end the trackers' runs."""
        for file in self.files:
            with suppress(OSError):  # of a record that could not be written: it has been reported
                file.close()
        self.tracker.finish()


class NoLogger(MetricLogger):
    """The logger of all ranks but the main one: writes nothing."""

    def __init__(self) -> None:
        self.paths, self.files = [], []
        self.tracker = Tracker()

    def log(self, record: dict[str, float], thin: bool = False) -> None:
        pass

    def log_samples(self, examples: int, samples: Mapping[str, Sequence[TokenizedExample]]) -> None:
        pass

    def log_pairs(self, examples: int, metrics: BatchMetrics) -> None:
        pass

    def cut(self, sizes: list[int]) -> None:
        pass


def make_logger(run_dir: Path, ranks: Ranks, make_tracker: Callable[[], Tracker], interval: float) -> MetricLogger:
    """Return the logger of a run, which writes on the main rank only; interval: seconds between shown updates."""
    return MetricLogger(run_dir, make_tracker(), interval) if ranks.is_main else NoLogger()


def end_of_last_line(path: Path) -> int:
    """Return the number of bytes of a file up to and including its last newline."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # which mmap refuses
            return 0
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return content.rfind(b"\n") + 1


def console_line(record: Mapping[str, float], names: Iterable[str]) -> str:
    """Format some metrics of a record as a readable line."""
    values = format_values(record, [name for name in names if name not in ("examples", "updates")])
    return f"{record['examples']:,} examples, {record['updates']:,} updates: {values}"


def log_notes(truncated: Counter[str], n_examples: int, advice: str | None) -> None:
    """Print advice on an evaluation, if any, and how many training examples were truncated so far."""
    if advice is not None:
        log_message(f"Advice: {advice}.")
    if truncated:
        counts = ", ".join(f"{what} {n:,}" for what, n in sorted(truncated.items()))
        log_message(f"Truncated so far, of {n_examples:,} training examples: {counts}")
