"""Collects metrics and writes them to metrics.jsonl, samples.jsonl, pairs.jsonl, the console and trackers."""

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
from dpo.reporting.metric_table import CONSOLE, PAIR_COLUMNS, WEIGHTED, record_name
from dpo.reporting.trackers import Tracker
from dpo.system.console import log_message, on_terminal, printable
from dpo.system.errors import RunError
from dpo.system.files import atomic_write, naming_file


class BatchMetrics:
    """Collects one value per example and metric, on the device, until the means are needed."""

    def __init__(self) -> None:
        self.examples: list[TokenizedExample] = []
        self.values: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, examples: Sequence[TokenizedExample], values: dict[str, torch.Tensor]) -> None:
        """Add a tensor of shape (examples,) per metric, or a shorter one if only some examples have the metric."""
        self.examples += examples
        for name, value in values.items():
            self.values[name].append(value)

    def to_host(self, *scalars: torch.Tensor) -> list[torch.Tensor]:
        """Move all values to the host, and return the scalars there; one copy, since each one waits for a GPU."""
        tensors = [value for values in self.values.values() for value in values] + [one.reshape(1) for one in scalars]
        parts = torch.cat(tensors).cpu().split([len(tensor) for tensor in tensors])
        host = iter(parts)
        for values in self.values.values():
            values[:] = [next(host) for _ in values]
        return [one[0] for one in host]

    def means(self, split: str, ranks: Ranks = ALONE) -> dict[str, float]:
        """Average over the examples of all ranks, under the original's names: rewards_train/chosen, loss/train.

        The mean loss is weighted by the examples' weights, other means are not.
        """
        weights = torch.tensor([example.text.weight for example in self.examples], dtype=torch.float64)
        totals = {}
        for name, values in self.values.items():
            column = torch.cat(values).cpu().double()  # MPS has no float64
            factors = weights if name in WEIGHTED else torch.ones_like(column)
            totals[name] = ((factors * column).sum().item(), factors.sum().item())
        shares = ranks.gather_shares(totals)
        means = {}
        for name in dict.fromkeys(name for share in shares for name in share):
            sums, counts = zip(*(share[name] for share in shares if name in share), strict=True)
            if sum(counts):
                means[record_name(name, split)] = sum(sums) / sum(counts)
        return means

    def gathered(self, ranks: Ranks) -> "BatchMetrics":
        """Collect the examples and values of all ranks, on the host."""
        merged = BatchMetrics()
        values = {name: torch.cat(tensors).cpu() for name, tensors in self.values.items()}
        for examples, columns in ranks.gather_shares((self.examples, values)):
            merged.add(examples, columns)
        return merged

    def column(self, name: str) -> torch.Tensor:
        """A metric of all examples, (examples,)."""
        return torch.cat(self.values[name])

    def rows(self) -> list[dict[str, Any]]:
        """A JSON-compatible dict per example: source, row, texts, weight, and the metrics that all examples have.

        A weight of 1 is left out.
        """
        columns = {name: torch.cat(tensors).tolist() for name, tensors in self.values.items()}
        rows = []
        for i, example in enumerate(self.examples):
            text = example.text
            row = {"source": text.source, "row": text.row, "prompt": text.prompt, "responses": text.responses}
            row |= {"weight": text.weight} if text.weight != 1 else {}
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


class RecordFile:
    """An append-only JSON lines file; a resumed run cuts records that it will write again."""

    def __init__(self, path: Path):
        self.path = path
        self.file = open(path, "a", encoding="utf-8")
        self.drop_partial_record()

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write rows; OSError with the name of the file if that fails."""
        with naming_file(self.path):
            self.file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            self.file.flush()

    @property
    def is_empty(self) -> bool:
        return os.fstat(self.file.fileno()).st_size == 0

    def size(self) -> int:
        """Flush the file to disk and return its size in bytes."""
        with naming_file(self.path):
            os.fsync(self.file.fileno())
        return os.fstat(self.file.fileno()).st_size

    def cut(self, size: int) -> None:
        """Truncate the file to an earlier size."""
        if os.fstat(self.file.fileno()).st_size < size:
            log_message(f"{self.path}: is shorter than when the checkpoint was written, so records are missing.")
        else:
            os.ftruncate(self.file.fileno(), size)
        self.drop_partial_record()

    def drop_partial_record(self) -> None:
        """Drop a last line without a newline, left by a kill or a full disk; the next record must start a new line."""
        size = os.fstat(self.file.fileno()).st_size
        if size == 0:
            return
        with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            end = content.rfind(b"\n") + 1
        if end < size:
            os.ftruncate(self.file.fileno(), end)
            log_message(f"{self.path}: dropped its last record, {size - end:,} bytes of an incomplete line.")

    def close(self) -> None:
        with suppress(OSError):  # for a record that could not be written, already reported
            self.file.close()


class MetricLogger:
    """Writes every record to metrics.jsonl immediately; the console and trackers may skip records of updates."""

    def __init__(self, run_dir: Path, tracker: Tracker, minimum_interval_secs: float = 0.0):
        self.metrics = RecordFile(run_dir / "metrics.jsonl")
        self.samples = RecordFile(run_dir / "samples.jsonl")
        self.pairs = RecordFile(run_dir / "pairs.jsonl")
        self.files = [self.metrics, self.samples, self.pairs]
        self.tracker = tracker
        self.minimum_interval_secs = minimum_interval_secs
        self.last_shown = float("-inf")

    def log(self, record: dict[str, float], thin: bool = False) -> None:
        """Log a record with `examples` and `updates`; at most one thin record per interval is shown."""
        self.metrics.append([{name: value if math.isfinite(value) else None for name, value in record.items()}])
        now = time.monotonic()
        if thin and now - self.last_shown < self.minimum_interval_secs:
            return
        self.last_shown = now if thin else self.last_shown
        self.tracker.log({k: v for k, v in record.items() if k not in ("examples", "updates")}, int(record["examples"]))
        if not (thin and on_terminal()):  # on a terminal the progress bar shows the loss
            log_message(console_line(record))

    def log_samples(self, examples: int, samples: Mapping[str, Sequence[TokenizedExample]]) -> None:
        """Write the samples of each model ("policy", "reference") for the same prompts; print the first three.

        samples.jsonl and the trackers' tables policy_samples and reference_samples get the texts unchanged.
        """
        for model, drawn in samples.items():
            texts = [(sample.text.prompt, sample.text.responses[0]) for sample in drawn]
            self.samples.append(
                {"examples": examples, "model": model, "prompt": prompt, "sample": text} for prompt, text in texts
            )
            rows: list[list[int | str]] = [[examples, prompt, text] for prompt, text in texts]
            self.tracker.table(f"{model}_samples", examples, ["step", "prompt", "sample"], rows)
        for i, sample in enumerate(samples["policy"][:3]):
            lines = [f"\n--- sample {i + 1}, after {examples:,} examples ---"]
            texts_by_name = {"prompt": sample.text.prompt}
            texts_by_name |= {model: drawn[i].text.responses[0] for model, drawn in samples.items()}
            lines += [f"  {name}: {printable(text.strip(), indent='    ')}" for name, text in texts_by_name.items()]
            log_message("\n".join(lines))

    def log_pairs(self, examples: int, metrics: BatchMetrics) -> None:
        """Append a line per evaluated pair to pairs.jsonl, if there are pairs; the first evaluation's have the texts.

        A checksum of the responses identifies the pairs of one row, whose order depends on the token budget.
        """
        if "rewards/margins" not in metrics.values:
            return
        is_first = self.pairs.is_empty
        records = []
        for row in metrics.rows():
            chosen, rejected = row["responses"]
            checksum = zlib.crc32(repr(row["responses"]).encode("utf-8", "backslashreplace"))
            record = {"examples": examples, "pair": checksum, "source": row["source"], "row": row["row"]}
            record |= {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected} if is_first else {}
            records.append(record | {name: value for name, value in row.items() if name in PAIR_COLUMNS})
        self.pairs.append(records)

    def sizes(self) -> list[int]:
        """Flush the files to disk and return their sizes in bytes."""
        return [file.size() for file in self.files]

    def cut(self, sizes: list[int]) -> None:
        """Truncate the files to earlier sizes, 0 if one is missing; a resumed run writes the rest again."""
        for i, file in enumerate(self.files):
            file.cut(sizes[i] if i < len(sizes) else 0)

    def close(self) -> None:
        """Close the files and end the trackers' runs."""
        for file in self.files:
            file.close()
        self.tracker.finish()


class NoLogger(MetricLogger):
    """The logger of all ranks but the main one; writes nothing."""

    def __init__(self) -> None:
        self.files = []
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
    """The logger of a run; only the main rank writes. interval: minimum seconds between shown updates."""
    return MetricLogger(run_dir, make_tracker(), interval) if ranks.is_main else NoLogger()


def console_line(record: Mapping[str, float]) -> str:
    """The figures of a record that the console shows; metrics.jsonl has all."""
    values = ", ".join(f"{name} {record[metric]:.3g}" for metric, name in CONSOLE.items() if metric in record)
    kind = ", evaluation" if "loss/eval" in record else ""
    return f"{record['examples']:,} examples, {record['updates']:,} updates{kind}: {values}"


def log_notes(truncated: Counter[str], n_examples: int, advice: str | None) -> None:
    """Print advice, if any, and how many training examples have been truncated."""
    if advice is not None:
        log_message(f"Advice: {advice}")
    if truncated:
        counts = ", ".join(f"{what} {n:,}" for what, n in sorted(truncated.items()))
        log_message(f"Truncated so far, of {n_examples:,} training examples: {counts}")
