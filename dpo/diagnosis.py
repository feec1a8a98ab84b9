"""What an evaluation shows beyond its means: displacement, length, divergence, and how sure its figures are."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from dpo.distributed import Ranks
from dpo.examples import TokenizedExample
from dpo.logps import Logps, ResponseLogps, response_logps
from dpo.metrics import BatchMetrics
from dpo.objectives import by_label
from dpo.packing import PackedBatch, Packer
from dpo.references import Reference

QUANTILES = (5, 25, 50, 75, 95)  # percent
BINS = 10  # of the calibration error
Z = 1.96  # standard errors on each side of a 95% interval
# Displacement is out of the ordinary beyond both; docs/report.md has the measurements from which they were chosen.
DISPLACED_SHARE = 0.6  # of the pairs
FALL_PER_TOKEN = 0.2  # nats by which a token of a chosen response is less likely than under the reference, in the mean


def log_ratios(policy: Logps, reference: Logps | None) -> dict[str, Tensor]:
    """Return log pi(y) - log ref(y) of the chosen and the rejected responses, (batch,) each, in nats per response."""
    if reference is None or policy.sums.shape[1] != 2:
        return {}
    chosen, rejected = (policy.sums.detach() - reference.sums).unbind(1)
    return {"log_ratios/chosen": chosen, "log_ratios/rejected": rejected}


def lengths(batch: PackedBatch) -> dict[str, Tensor]:
    """Return the tokens of the chosen and the rejected responses, (batch,) each; SFT's targets count as chosen.

    Of single responses with a label, those of the desirable and of the undesirable ones.
    """
    columns = batch.lengths.float().unbind(1)
    if batch.examples[0].text.label is not None:
        return by_label("lengths", columns[0], batch.examples)
    return {f"lengths/{side}": n for side, n in zip(("chosen", "rejected"), columns, strict=False)}


def diagnose(metrics: BatchMetrics) -> dict[str, float]:
    """Return figures of an evaluation's pairs, docs/report.md explains each; none where there are no pairs."""
    columns = {name: metrics.column(name).double().cpu().numpy() for name in metrics.values}
    if "rewards/margins" not in columns:
        return {}
    margins = columns["rewards/margins"]
    longer = columns["lengths/chosen"] - columns["lengths/rejected"]
    low, high = wilson_interval(int(columns["rewards/accuracies"].sum()), len(margins))
    found = {"accuracy_low": low, "accuracy_high": high, "calibration_error": calibration_error(margins)}
    found |= {f"margin_p{q}": float(np.percentile(margins, q)) for q in QUANTILES}
    found["length_correlation"] = correlation(margins, longer)
    if "log_ratios/chosen" in columns:
        found |= displacement(columns, metrics.examples)
    return {f"diagnosis/{name}": value for name, value in found.items() if not math.isnan(value)}


def displacement(columns: Mapping[str, np.ndarray], examples: Sequence[TokenizedExample]) -> dict[str, float]:
    """Return how far the chosen responses became less likely than under the reference; arXiv 2410.08847.

    The share of such pairs is also given for pairs with and without a truncated text, and for the half with the more
    and the half with the less similar responses. NaN stands for a share of no pairs.
    """
    displaced = columns["log_ratios/chosen"] < 0
    truncated = np.array([bool(example.truncated) for example in examples])
    distances = np.array([edit_distance(*example.responses) for example in examples])
    similar = distances <= np.median(distances)
    groups = {"": truncated | True, "_truncated": truncated, "_whole": ~truncated}
    groups |= {"_similar": similar, "_different": ~similar}
    found = {
        f"displaced{name}": float(displaced[group].mean()) if group.any() else math.nan
        for name, group in groups.items()
    }
    for side in ("chosen", "rejected"):
        per_token = columns[f"log_ratios/{side}"].sum() / columns[f"lengths/{side}"].sum()
        found[f"{side}_log_ratio_per_token"] = float(per_token)
    return found


def displacement_advice(metrics: Mapping[str, float]) -> str | None:
    """Return a line with a remedy where chosen responses fell out of the ordinary, by the figures of an evaluation."""
    share, fall = metrics.get("diagnosis/displaced", 0.0), -metrics.get("diagnosis/chosen_log_ratio_per_token", 0.0)
    if share < DISPLACED_SHARE or fall < FALL_PER_TOKEN:
        return None
    return (
        f"{share:.0%} of the chosen responses are less likely than under the reference, by {fall:.2g} nats per token, "
        "which is more than DPO's usual fall: try loss=dpop, loss.nll_weight=1 or a lower lr"
    )


@torch.no_grad()
def diagnose_samples(
    samples: Mapping[str, Sequence[TokenizedExample]],
    policy: ResponseLogps,
    reference: Reference | None,
    packer: Packer,
    ranks: Ranks,
) -> dict[str, float]:
    """Return figures of what the policy sampled ("policy"): entropy, length, and divergence from the reference.

    samples["reference"] holds what the reference sampled for the same prompts, where there is a reference.
    """
    metrics = BatchMetrics()
    for batch, scale, _ in ranks.passes(packer, samples["policy"]):
        with packer.memory_hint(batch):
            values = {"lengths": batch.lengths[:, 0], "policy": response_logps(policy, batch).sums[:, 0]}
            if reference is not None and reference.knows_any_response:
                values["reference"] = reference.logps(batch).sums[:, 0]
        if scale:
            metrics.add(batch.examples, values)
    metrics = metrics.gathered(ranks)
    columns = {name: metrics.column(name).double().numpy() for name in metrics.values}
    found = {"sample_length": float(columns["lengths"].mean())}
    found |= mean_per_token("entropy_per_token", -columns["policy"], columns["lengths"])
    if "reference" in columns:
        ratios = columns["policy"] - columns["reference"]
        found |= mean("kl", ratios) | mean_per_token("kl_per_token", ratios, columns["lengths"])
    if "reference" in samples:
        own, other = (np.array([len(s.responses[0]) for s in samples[name]]) for name in ("policy", "reference"))
        found |= mean("sample_length_difference", own - other)
    return {f"diagnosis/{name}": value for name, value in found.items() if not math.isnan(value)}


def mean(name: str, values: np.ndarray) -> dict[str, float]:
    """Return the mean of values, (n,), and its standard error, NaN of a single value."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return {name: float(values.mean()), f"{name}_stderr": error}


def mean_per_token(name: str, sums: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Return the mean over all tokens of responses' sums, (n,), and its standard error.

    It is a ratio of two means, whose error is that of its residuals (Cochran, Sampling Techniques, 1977, eq. 6.13).
    """
    per_token = sums.sum() / lengths.sum()
    residuals = mean(name, (sums - per_token * lengths) / lengths.mean())
    return residuals | {name: float(per_token)}


def wilson_interval(hits: float, n: int) -> tuple[float, float]:
    """Return the 95% interval of a share, by Wilson's score (1927), which stays between 0 and 1."""
    center, spread = (hits + Z**2 / 2) / (n + Z**2), Z * math.sqrt(hits * (n - hits) / n + Z**2 / 4) / (n + Z**2)
    return max(0.0, center - spread), min(1.0, center + spread)


def calibration_error(margins: np.ndarray) -> float:
    """Return the expected calibration error of sigmoid(|margin|) as the chance of being right; NaN if all are 0.

    arXiv 1706.04599, eq. 3, with ten bins of equal width.
    """
    if not margins.any():
        return math.nan
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), margins > 0
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(float((right[bins == b] - confidence[bins == b]).sum())) for b in range(BINS)]
    return sum(gaps) / len(margins)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Pearson's correlation, NaN where one of the two is constant."""
    if x.std() == 0 or y.std() == 0:
        return math.nan
    return float(np.corrcoef(x, y)[0, 1])


def edit_distance(one: Sequence[int], other: Sequence[int]) -> float:
    """Return the Levenshtein distance of two token sequences over the length of the longer, from 0 (equal) to 1."""
    target, steps = np.asarray(other), np.arange(len(other) + 1)
    row = steps
    for i, token in enumerate(one, start=1):
        changed = np.minimum(row[:-1] + (target != token), row[1:] + 1)  # a token replaced, or removed
        row = np.minimum.accumulate(np.concatenate(([i], changed)) - steps) + steps  # or inserted
    return float(row[-1]) / max(len(one), len(other), 1)
