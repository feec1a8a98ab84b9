"""Metrics of a whole evaluation: displacement, length, divergence from the reference. docs/report.md explains each."""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dpo.data.examples import TokenizedExample
from dpo.distributed.splitting import BatchSplitter
from dpo.model.logps import Logps, ResponseLogps, response_logps
from dpo.model.packing import PackedBatch
from dpo.reporting.metrics import BatchMetrics
from dpo.reporting.statistics import (
    calibration_error,
    correlation,
    distinct_ngrams,
    edit_distance,
    longest_repeat,
    mean,
    mean_per_token,
    wilson_interval,
)
from dpo.training.objectives import by_label
from dpo.training.references import Reference

QUANTILES = (5, 25, 50, 75, 95)  # percent


def log_ratios(policy: Logps, reference: Logps | None) -> dict[str, Tensor]:
    """log pi(y) - log ref(y) of chosen and rejected responses, (batch,), in nats per response; {} without pairs."""
    if reference is None or policy.sums.shape[1] != 2:
        return {}
    chosen, rejected = (policy.sums.detach() - reference.sums).unbind(1)
    return {"log_ratios/chosen": chosen, "log_ratios/rejected": rejected}


def lengths(batch: PackedBatch) -> dict[str, Tensor]:
    """The number of trained tokens of chosen and rejected responses, (batch,) each; an SFT target counts as chosen.

    For single labelled responses: those of desirable and undesirable ones.
    """
    columns = batch.lengths.float().unbind(1)
    if batch.examples[0].text.label is not None:
        return by_label("lengths", columns[0], batch.examples)
    return {f"lengths/{side}": n for side, n in zip(("chosen", "rejected"), columns, strict=False)}


def diagnose(metrics: BatchMetrics) -> dict[str, float]:
    """The metrics of an evaluation of pairs; {} without pairs."""
    columns = {name: metrics.column(name).double().cpu().numpy() for name in metrics.values}
    if "rewards/margins" not in columns:
        return {}
    margins = columns["rewards/margins"]
    longer = columns["lengths/chosen"] - columns["lengths/rejected"]
    low, high = wilson_interval(int(columns["rewards/accuracies"].sum()), len(margins))
    figures = {"accuracy_low": low, "accuracy_high": high, "calibration_error": calibration_error(margins)}
    figures |= {f"margin_p{q}": float(np.percentile(margins, q)) for q in QUANTILES}
    figures["length_correlation"] = correlation(margins, longer)
    if "log_ratios/chosen" in columns:
        figures |= displacement(columns, metrics.examples)
    return named(figures)


def named(figures: Mapping[str, float]) -> dict[str, float]:
    """The figures under their names in records, without undefined ones."""
    return {f"diagnosis/{name}": value for name, value in figures.items() if not math.isnan(value)}


def displacement(columns: Mapping[str, np.ndarray], examples: Sequence[TokenizedExample]) -> dict[str, float]:
    """Measure how far the chosen responses became less likely than under the reference; arXiv 2410.08847.

    The share of such pairs is computed for all pairs, for those with and without a truncated text, and for the halves
    with more and with less similar responses. The share of no pairs is NaN.
    """
    displaced = columns["log_ratios/chosen"] < 0
    truncated = np.array([bool(example.truncated) for example in examples])
    distances = np.array([edit_distance(*example.trained_responses) for example in examples])
    similar = distances <= np.median(distances)
    groups = {
        "displaced": np.ones_like(displaced),
        "displaced_truncated": truncated,
        "displaced_whole": ~truncated,
        "displaced_similar": similar,
        "displaced_different": ~similar,
    }
    figures = {}
    for name, group in groups.items():
        figures[name] = float(displaced[group].mean()) if group.any() else math.nan
    for side in ("chosen", "rejected"):
        total = columns[f"log_ratios/{side}"].sum()
        figures[f"{side}_log_ratio_per_token"] = float(total / columns[f"lengths/{side}"].sum())
    return figures


@torch.no_grad()
def diagnose_samples(
    samples: Mapping[str, Sequence[TokenizedExample]],
    policy: ResponseLogps,
    reference: Reference | None,
    split_batch: BatchSplitter,
) -> dict[str, float]:
    """The metrics of samples: entropy, length, and divergence from the reference.

    samples has those of "policy" and, with a reference, of "reference", for the same prompts.
    """
    metrics = BatchMetrics()
    for batch, scale, _ in split_batch(samples["policy"]):
        with split_batch.packer.memory_hint(batch):
            values = {"lengths": batch.lengths[:, 0], "policy": response_logps(policy, batch).sums[:, 0]}
            if reference is not None and reference.knows_any_response:
                values["reference"] = reference.logps(batch).sums[:, 0]
        if scale:
            metrics.add(batch.examples, values)
    metrics = metrics.gathered(split_batch.ranks)
    columns = {name: metrics.column(name).double().numpy() for name in metrics.values}
    figures = {"sample_length": float(columns["lengths"].mean())}
    figures |= mean_per_token("entropy_per_token", -columns["policy"], columns["lengths"])
    if "reference" in columns:
        ratios = columns["policy"] - columns["reference"]
        figures |= mean("kl", ratios)
        figures |= mean_per_token("kl_per_token", ratios, columns["lengths"])
    if "reference" in samples:
        lengths_of_policy = np.array([len(sample.responses[0]) for sample in samples["policy"]])
        lengths_of_reference = np.array([len(sample.responses[0]) for sample in samples["reference"]])
        figures |= mean("sample_length_difference", lengths_of_policy - lengths_of_reference)
    return named(figures)


def diagnose_texts(samples: Mapping[str, Sequence[TokenizedExample]], stops: Collection[int]) -> dict[str, float]:
    """The metrics of the texts of samples: how many are finished, with one of the stops, and how they repeat.

    Those of "reference" samples are named so.
    """
    figures = {}
    for model, prefix in (("policy", ""), ("reference", "reference_")):
        if model not in samples:
            continue
        responses = [sample.responses[0] for sample in samples[model]]
        ngrams = [n for response in responses if not math.isnan(n := distinct_ngrams(response, 4))]
        figures[f"{prefix}finished"] = float(np.mean([bool(ids) and ids[-1] in stops for ids in responses]))
        figures[f"{prefix}distinct_4grams"] = float(np.mean(ngrams)) if ngrams else math.nan
        figures[f"{prefix}longest_repeat"] = float(np.mean([longest_repeat(response) for response in responses]))
    return named(figures)
