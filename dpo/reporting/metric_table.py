"""METRICS: where and how each metric is shown. metrics.jsonl and the trackers have every metric anyway."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dpo.reporting.statistics import Z

Split = Literal["train", "eval"]


def record_name(name: str, split: str) -> str:
    """The original's name for a split's mean: rewards_train/chosen for rewards/chosen, loss/train for loss."""
    kind, slash, side = name.partition("/")
    return f"{kind}_{split}/{side}" if slash else f"{kind}/{split}"


@dataclass(frozen=True)
class Chart:
    """A chart of report.html; meaning is its caption. scale "share" is from 0 to 1, "log" logarithmic.

    level is the height of a horizontal line, and its name.
    """

    title: str
    meaning: str = ""
    scale: Literal["linear", "share", "log"] = "linear"
    level: tuple[float, str] | None = None


@dataclass(frozen=True)
class Metric:
    """A metric, and where it is shown.

    name      its name in the code: rewards/margins is rewards_train/margins in metrics.jsonl
    chart     the chart that draws it, possibly with other metrics
    label     of its curve
    splits    for a metric of single examples: whether updates (train), evaluations (eval) or both are drawn
    headline  its newest value is shown at the top of the page, in the model card and in the summary of a sweep
    console   its name on the console, which shows it after each update and evaluation that has it; "" if it does not
    pairs     pairs.jsonl has its value for each evaluated pair
    weighted  its mean over examples is weighted by their weights (columns.weight)
    better    whether a larger ("max") or a smaller value ("min") of an evaluation is better; None if that depends
    """

    name: str
    chart: Chart | None = None
    label: str = ""
    splits: tuple[Split, ...] = ()
    headline: bool = False
    console: str = ""
    pairs: bool = False
    weighted: bool = False
    better: Literal["max", "min"] | None = None

    def recorded(self, split: Split) -> str:
        """Return its name in the records of updates (train) or of evaluations (eval)."""
        return record_name(self.name, split) if self.splits else self.name


BOTH: tuple[Split, ...] = ("train", "eval")
EVAL: tuple[Split, ...] = ("eval",)
LOSS = Chart("Loss", "mean over the examples, weighted if they have weights")
ACCURACY = Chart("Reward accuracy", "share of pairs whose chosen response has the higher reward", "share", (0.5, "50%"))
MARGIN = Chart("Reward margin", "chosen minus rejected reward")
REWARDS = Chart("Rewards, evaluation", "beta times log(policy / reference)")
LOG_RATIOS = Chart("Log-ratio to the reference per token, evaluation", "log(policy / reference) over all tokens, nats")
DISPLACED = Chart("Displaced chosen responses", "share that is less likely than under the reference", "share")
GRADIENT = Chart("Gradient norm", scale="log")
KL = Chart("KL from the reference, nats per response", "mean of log(policy / reference) over the policy's samples")
ENTROPY = Chart("Entropy of the policy, nats per token", "mean of -log(policy) over the tokens of its samples")
LENGTH = Chart("Length of samples minus the reference's, tokens", "for the same prompts")
RATE = Chart("Learning rate")
SPEED = Chart("Pairs per second", "for SFT, targets per second")
MFU = Chart("Share of the matrix rate (mfu)", "of the device's measured rate of matrix products")

# In the order of the page.
METRICS = (
    Metric("loss", LOSS, splits=BOTH, headline=True, console="loss", weighted=True, better="min"),
    Metric("router_loss", LOSS, "load balance of the routers", BOTH, console="router loss", better="min"),
    Metric("rewards/accuracies", ACCURACY, splits=BOTH, headline=True, console="accuracy", pairs=True, better="max"),
    Metric("rewards/margins", MARGIN, splits=BOTH, headline=True, console="margin", pairs=True, better="max"),
    Metric("rewards/chosen", REWARDS, "chosen", EVAL, pairs=True),
    Metric("rewards/rejected", REWARDS, "rejected", EVAL, pairs=True),
    Metric("rewards/desirable", REWARDS, "desirable", EVAL, console="desirable"),
    Metric("rewards/undesirable", REWARDS, "undesirable", EVAL, console="undesirable"),
    Metric("log_ratios/chosen", pairs=True),
    Metric("log_ratios/rejected", pairs=True),
    Metric("lengths/chosen", pairs=True),
    Metric("lengths/rejected", pairs=True),
    Metric("diagnosis/chosen_log_ratio_per_token", LOG_RATIOS, "chosen", better="max"),
    Metric("diagnosis/rejected_log_ratio_per_token", LOG_RATIOS, "rejected"),
    Metric("diagnosis/displaced", DISPLACED, "evaluation", headline=True, console="displaced", better="min"),
    Metric("grad_norm", GRADIENT, "before clipping", console="gradient norm"),
    Metric("diagnosis/kl", KL, "samples", headline=True, console="KL", better="min"),
    Metric("diagnosis/entropy_per_token", ENTROPY, "samples"),
    Metric("diagnosis/sample_length_difference", LENGTH, "samples"),
    Metric("diagnosis/finished", console="finished"),
    Metric("lr", RATE, console="lr"),
    Metric("examples_per_second", SPEED, console="per second"),
    Metric("mfu", MFU),
)
CONSOLE = {metric.recorded(split): metric.console for metric in METRICS if metric.console for split in BOTH}
HEADLINES = {metric.recorded("eval"): metric for metric in METRICS if metric.headline}
PAIR_COLUMNS = frozenset(metric.name for metric in METRICS if metric.pairs) | {"weight"}
WEIGHTED = frozenset(metric.name for metric in METRICS if metric.weighted)


def interval(record: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """The 95% interval of a metric of a record, if one was recorded."""
    low, high = "diagnosis/accuracy_low", "diagnosis/accuracy_high"
    if name == "rewards_eval/accuracies" and low in record:
        return record[low], record[high]
    error = record.get(f"{name}_stderr")
    return None if error is None else (record[name] - Z * error, record[name] + Z * error)


def format_values(record: Mapping[str, float], names: Iterable[str]) -> str:
    """Format the metrics of these names that the record has."""
    return ", ".join(f"{name} {record[name]:.4g}" for name in names if name in record)
