"""What an evaluation shows beyond its means: displacement, length, divergence from the reference."""

import math
from collections.abc import Mapping, Sequence

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
    edit_distance,
    mean,
    mean_per_token,
    wilson_interval,
)
from dpo.training.objectives import by_label
from dpo.training.references import Reference

QUANTILES = (5, 25, 50, 75, 95)  # percent
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
    split_batch: BatchSplitter,
) -> dict[str, float]:
    """Return figures of what the policy sampled ("policy"): entropy, length, and divergence from the reference.

    samples["reference"] holds what the reference sampled for the same prompts, where there is a reference.
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
    found = {"sample_length": float(columns["lengths"].mean())}
    found |= mean_per_token("entropy_per_token", -columns["policy"], columns["lengths"])
    if "reference" in columns:
        ratios = columns["policy"] - columns["reference"]
        found |= mean("kl", ratios) | mean_per_token("kl_per_token", ratios, columns["lengths"])
    if "reference" in samples:
        own, other = (np.array([len(s.responses[0]) for s in samples[name]]) for name in ("policy", "reference"))
        found |= mean("sample_length_difference", own - other)
    return {f"diagnosis/{name}": value for name, value in found.items() if not math.isnan(value)}
