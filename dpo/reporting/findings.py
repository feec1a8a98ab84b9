"""RULES: what the figures of a run or a model say is wrong, what usually causes it, and what to try.

The same rules close a training run's log and report, and python -m tools.diagnose. Nothing slow is imported, since
--help reads FIGURES.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from string import Formatter
from typing import Any

# Figures by name: those of an evaluation as in metrics.jsonl (loss/eval, rewards_eval/accuracies, diagnosis/...), and
# those that FIGURES explains.
Figures = Mapping[str, float]
Shows = Callable[[Figures], str | None]

SMALL = 50  # pairs; the 95% interval of an accuracy of 50% is then 27 percentage points wide
ACCURACY = "{rewards_eval/accuracies:.0%} [{diagnosis/accuracy_low:.0%}, {diagnosis/accuracy_high:.0%}]"
TOO_FEW = 10  # pairs, of which no verdict is possible


@dataclass(frozen=True)
class Rule:
    """A fault that shows in figures. Texts have no period at the end.

    name      short, for tables and JSON: "length exploitation"
    shows     what the figures say, with their values; None if they do not show the fault
    cause     what usually causes it
    advice    what to try, most promising first, separated by "; "
    source    a paper (arXiv number) or a section of docs/ with the measurement behind it
    headline  how the verdict begins if the rule applies, for faults that outweigh the accuracy
    """

    name: str
    shows: Shows
    cause: str
    advice: str
    source: str
    headline: str = ""

    @property
    def first_advice(self) -> str:
        return self.advice.partition("; ")[0]


@dataclass(frozen=True)
class Finding:
    """A rule that applies; text has the figures."""

    rule: Rule
    text: str

    def __str__(self) -> str:
        return f"{self.rule.name}: {self.text}. Try {self.rule.first_advice}."


# What each figure means, with its unit. Those of single examples are averaged over an update (loss/train,
# rewards_train/margins) or an evaluation (loss/eval, rewards_eval/margins); those of samples have a ..._stderr.

METRICS_PAGE, REPORT_PAGE, FINDINGS_SECTION = "docs/metrics.md", "docs/report.md", "docs/report.md#findings"
MEANINGS: dict[str, dict[str, str]] = {
    METRICS_PAGE: {
        "loss": "mean loss per pair, target or row",
        "router_loss": "load-balancing loss of a mixture's routers",
        "rewards/accuracies": "share of pairs whose chosen response has the higher reward, 0 to 1",
        "rewards/margins": "chosen minus rejected reward, in beta times nats",
        "rewards/chosen": "beta times log(policy / reference) of the chosen response",
        "rewards/rejected": "beta times log(policy / reference) of the rejected response",
        "rewards/desirable": "reward of responses with the label true",
        "rewards/undesirable": "reward of responses with the label false",
        "logps/chosen": "log-probability of the chosen response, in nats per response",
        "logps/rejected": "log-probability of the rejected response, in nats per response",
        "log_ratios/chosen": "log(policy / reference) of the chosen response, in nats per response",
        "log_ratios/rejected": "log(policy / reference) of the rejected response, in nats per response",
        "lengths/chosen": "trained tokens per chosen response",
        "lengths/rejected": "trained tokens per rejected response",
        "grad_norm": "L2 norm of the gradient before it is clipped to max_grad_norm",
        "lr": "learning rate of the update",
        "examples_per_second": "throughput in pairs (SFT: targets)",
        "tokens_per_second": "throughput in tokens",
        "counters/examples": "training examples so far",
        "counters/updates": "updates so far",
    },
    REPORT_PAGE: {
        "diagnosis/accuracy_low": "lower end of the 95% interval of the reward accuracy, 0 to 1",
        "diagnosis/accuracy_high": "upper end of the 95% interval of the reward accuracy, 0 to 1",
        **{f"diagnosis/margin_p{q}": f"percentile {q} of the reward margin" for q in (5, 25, 50, 75, 95)},
        "diagnosis/calibration_error": "mean gap between sigmoid(abs(margin)) and the share of right pairs, 0 to 1",
        "diagnosis/length_correlation": "correlation of the margin with the length of chosen minus rejected, -1 to 1",
        "diagnosis/displaced": "share of pairs whose chosen response is less likely than under the reference, 0 to 1",
        "diagnosis/displaced_truncated": "displaced, of the pairs with a truncated text",
        "diagnosis/displaced_whole": "displaced, of the pairs without a truncated text",
        "diagnosis/displaced_similar": "displaced, of the half of the pairs with more similar responses",
        "diagnosis/displaced_different": "displaced, of the half of the pairs with less similar responses",
        "diagnosis/chosen_log_ratio_per_token": "mean log(policy / reference) of chosen responses, nats per token",
        "diagnosis/rejected_log_ratio_per_token": "mean log(policy / reference) of rejected responses, nats per token",
        "diagnosis/kl": "mean log(policy / reference) over the policy's samples, in nats per response",
        "diagnosis/kl_per_token": "mean log(policy / reference) over all tokens of the policy's samples, in nats",
        "diagnosis/entropy_per_token": "mean of -log(policy) over the tokens of its samples, in nats",
        "diagnosis/sample_length": "tokens per sample of the policy",
        "diagnosis/sample_length_difference": "the same minus the reference's for the same prompts",
        "diagnosis/finished": "share of the policy's samples that end by themselves, 0 to 1",
        "diagnosis/distinct_4grams": "share of a sample's 4-grams that do not occur earlier in it, 0 to 1",
        "diagnosis/longest_repeat": "length of the longest sequence that occurs twice in a sample, in tokens",
        "diagnosis/reference_finished": "finished, of the reference's samples",
        "diagnosis/reference_distinct_4grams": "distinct_4grams, of the reference's samples",
        "diagnosis/reference_longest_repeat": "longest_repeat, of the reference's samples",
        "seconds/data": "seconds spent waiting for batches since the last record",
        "seconds/reference": "seconds in the reference's forward passes since the last record",
        "seconds/forward_backward": "seconds in the policy's passes since the last record",
        "seconds/optimizer": "seconds in the optimizer's step since the last record",
        "seconds/evaluation": "seconds in the policy's passes over evaluation pairs since the last record",
        "seconds/sampling": "seconds in drawing samples and in their log-probabilities since the last record",
        "seconds/saving": "seconds in writing the checkpoint before this record",
        "memory_gb/max": "largest peak memory of a process so far, in GB",
        "memory_gb/mean": "mean peak memory of the processes so far, in GB",
        "mfu": "rate of the model's matrix products, as a share of the device's measured rate",
    },
    FINDINGS_SECTION: {
        "pairs": "number of evaluated pairs",
        "samples": "number of the policy's samples",
        "updates": "number of updates",
        "stopped": "1 if a condition of stop_if ended the run, else 0",
        "warmup_share": "warmup_steps divided by the number of updates",
        "first_loss": "loss/eval before the first update",
        "first_entropy_per_token": "diagnosis/entropy_per_token before the first update, in nats",
        "first_log_ratio": "abs(diagnosis/chosen_log_ratio_per_token) before the first update, in nats",
        "train_accuracy": "rewards_train/accuracies over the last tenth of the run, at least 50 pairs, 0 to 1",
        "flipped_share": "share of evaluated pairs with a margin below -m, where m is half the median of abs(margin)",
        "undecided_share": "share of evaluated pairs with a margin from -m to m",
        "confidence": "mean of sigmoid(abs(margin)) over the evaluated pairs, 0.5 to 1",
        "accuracy_equal_length": "reward accuracy of pairs whose lengths differ by 10% or less, if there are ten",
        "empty_samples": "share of the policy's samples without a text, 0 to 1",
        "policy_per_token": "mean log-probability of the data per response token, in nats",
        "reference_per_token": "the same under the reference",
        "position/first": "the reference's mean log-probability of the first response token, in nats",
        "position/early": "the same of the second to the fourth response token",
        "position/middle": "the same of later response tokens",
        "position/end": "the same of the token that ends a response",
        "position/bos": "BOS tokens before a prompt",
        "position/gap_bos": "how much likelier a response token is for the reference with another BOS, in nats",
        "format/chat": "how much likelier a response token is for the reference with the chat template, in nats",
        "format/hh": "the same with Human and Assistant turns",
        "format/text": "the same with the contents alone",
        "format/chat_first": "format/chat, of the first response token",
        "format/hh_first": "format/hh, of the first response token",
        "format/text_first": "format/text, of the first response token",
        "start_distance": "mean absolute difference of policy and reference on a token of the data, in nats",
        "weights_changed": "share of the weights that differ between policy and reference, 0 to 1",
        "weights_distance": "L2 norm of their difference, divided by that of the reference's weights",
        "weights_step": "root mean square of the differences of the weights that differ",
        "lr_sum": "sum of the learning rates of all updates",
        "adapter/fitting": "share of an adapter's tensors that fit a module of its base model, 0 to 1",
        "adapter/active": "share of an adapter's layers that change something, 0 to 1",
        "tokenizer/round_trip": "share of the texts that the policy's tokenizer gives back unchanged, 0 to 1",
        "tokenizer/lost": "by how much the reference's share is larger",
        "tokenizer/same": "share of the texts that both tokenizers turn into the same tokens, 0 to 1",
        "tokenizer/other_eos": "1 if the two have different eos tokens, else 0",
        "tokenizer/no_template": "1 if only the reference has a chat template, else 0",
        "tokenizer/stops": "share of the tokens that end responses at which generation stops, 0 to 1",
    },
}
FIGURES = {name: f"{meaning} ({page})" for page, names in MEANINGS.items() for name, meaning in names.items()}


# Conditions


def finished_gap(f: Figures) -> float:
    """How far the share of finished samples is below the reference's: between their 95% intervals; 0 without one."""
    from dpo.reporting.statistics import wilson_interval

    if "diagnosis/reference_finished" not in f:
        return 0.0
    n = round(f["samples"])
    lowest, _ = wilson_interval(f["diagnosis/reference_finished"] * n, n)
    _, highest = wilson_interval(f["diagnosis/finished"] * n, n)
    return lowest - highest


def moved(f: Figures) -> float:
    if not f.get("updates", 1):
        return math.nan
    return max(abs(f[f"diagnosis/{side}_log_ratio_per_token"]) for side in ("chosen", "rejected"))


# Figures that conditions and sentences need besides those that are recorded; unknown where one of their own is.
DERIVED: dict[str, Callable[[Figures], float]] = {
    "chosen_fall": lambda f: -f["diagnosis/chosen_log_ratio_per_token"],
    "warmup_share": lambda f: 0.0,  # where it is unknown
    "moved": moved,
    "loss_rise": lambda f: (f["loss/eval"] - f["first_loss"]) / abs(f["first_loss"]),
    "loss_change": lambda f: abs(f["loss/eval"] - f["first_loss"]) / abs(f["first_loss"]) if f["updates"] else math.nan,
    "finished_gap": finished_gap,
    "entropy_ratio": lambda f: f["diagnosis/entropy_per_token"] / f["first_entropy_per_token"],
    "entropy_rise": lambda f: (
        (f["diagnosis/entropy_per_token"] - 2 * f["diagnosis/entropy_per_token_stderr"]) / f["first_entropy_per_token"]
    ),
    "repetition": lambda f: f["diagnosis/reference_distinct_4grams"] - f["diagnosis/distinct_4grams"],
    "reference_length": lambda f: f["diagnosis/sample_length"] - f["diagnosis/sample_length_difference"],
    "longer": lambda f: (
        f["diagnosis/sample_length_difference"]
        / (f["diagnosis/sample_length"] - f["diagnosis/sample_length_difference"])
    ),
    "length_bias": lambda f: abs(f["diagnosis/length_correlation"]),
    "lost_without_length": lambda f: f["rewards_eval/accuracies"] - f["accuracy_equal_length"],
    "overconfidence": lambda f: f["confidence"] - f["diagnosis/accuracy_high"],
    "flipped_ratio": lambda f: f["flipped_share"] / max(f["undecided_share"], 1e-9),
    "end_drop": lambda f: f["position/middle"] - f["position/end"],
    "effect_of_weights": lambda f: f["start_distance"] / f["weights_distance"],
    "weights_in_steps": lambda f: f["weights_step"] / f["lr_sum"],
    "generalization_gap": lambda f: f["train_accuracy"] - f["diagnosis/accuracy_high"],
}
OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}


def with_derived(figures: Figures) -> dict[str, float]:
    """The figures and those in DERIVED, without what is unknown or not finite."""
    known = {name: value for name, value in figures.items() if math.isfinite(value)}
    derived = {}
    for name, compute in DERIVED.items():
        try:
            value = compute(known)
        except (KeyError, ZeroDivisionError):
            continue
        if math.isfinite(value):
            derived[name] = value
    return derived | known


def case(when: str, say: str) -> Shows:
    """Say a sentence, filled with figures, when all conditions hold: "moved < 0.001 and pairs >= 50".

    A condition on an unknown figure does not hold, and nothing is said of one.
    """
    named = {name for _, name, _, _ in Formatter().parse(say) if name}
    conditions = [condition.split() for condition in when.split(" and ")]

    def shows(figures: Figures) -> str | None:
        known = with_derived(figures)
        holds = (name in known and OPERATORS[sign](known[name], float(bound)) for name, sign, bound in conditions)
        return say.format_map(known) if named <= known.keys() and all(holds) else None

    return shows


def any_of(*cases: Shows) -> Shows:
    """What those of the cases that hold say."""

    def shows(figures: Figures) -> str | None:
        return "; ".join(text for one in cases if (text := one(figures)) is not None) or None

    return shows


FORMATS = {"chat": "with the chat template", "hh": "with Human and Assistant turns", "text": "without turns"}


def likelier_format(figures: Figures) -> str | None:
    """The format of prompts in which the data are likeliest for the reference, if it is clearly likelier."""
    gaps = {name: (figures.get(f"format/{name}", 0), figures.get(f"format/{name}_first", 0)) for name in FORMATS}
    clear = {name: gap for name, gap in gaps.items() if gap[0] >= 0.25 or gap[1] >= 1}
    if not clear:
        return None
    name, (gap, first) = max(clear.items(), key=lambda item: item[1])
    return (
        f"{FORMATS[name]}, a token of the responses is {gap:.2g} nats likelier for the reference, the first token "
        f"{first:.2g} nats"
    )


# The rules, most important first. docs/report.md lists them, and has measurements behind the thresholds.

HARDLY_MOVED = "the policy hardly moved: {moved:.1g} nats per token from the reference, loss {loss/eval:.4g}"
SAME_LOSS = "the loss changed by {loss_change:.2%}"

# Of figures that only python -m tools.diagnose has. Such a fault explains others, so these come first.
MODEL_RULES = (
    Rule(
        "broken tokenizer",
        any_of(
            case(
                "tokenizer/lost >= 0.05",
                "{tokenizer/lost:.0%} of the texts come back changed from the policy's tokenizer, but not from the "
                "reference's",
            ),
            case(
                "tokenizer/same < 0.95",
                "the policy's tokenizer gives {tokenizer/same:.0%} of the texts the same tokens as the reference's",
            ),
            case("tokenizer/other_eos >= 1", "its eos token has another id than that of the reference"),
        ),
        "the tokenizer was edited, saved by another version of a library, or is that of another model",
        "the tokenizer's files of the reference's folder; model.tokenizer_name_or_path=REFERENCE, to see the other "
        "figures without this fault",
        "docs/diagnose.md#findings",
        "The tokenizer is broken",
    ),
    Rule(
        "adapter not loaded",
        any_of(
            case(
                "adapter/fitting < 1", "{adapter/fitting:.0%} of the adapter's tensors fit a module of the base model"
            ),
            case("adapter/active <= 0", "the adapter changes nothing: the outer matrix of each layer is 0"),
        ),
        "the adapter was saved from a model that was wrapped or named otherwise, or before its weights were there",
        "saving it again with save_pretrained of the model that was trained; the tensors' names in "
        "adapter_model.safetensors beside those of the base model",
        "docs/diagnose.md#findings",
        "The adapter is not loaded",
    ),
    Rule(
        "policy unchanged",
        case("start_distance <= 1e-6", "policy and reference give every token of the data the same log-probability"),
        "the policy is the reference: the base model instead of its adapter, or a checkpoint that was not trained",
        "the folder that the trainer wrote last, or that of the adapter",
        "docs/diagnose.md#findings",
        "The policy is the reference",
    ),
    Rule(
        "updates rounded away",
        case(
            "weights_changed > 0 and weights_changed < 0.1 and start_distance < 0.01",
            "{weights_changed:.1%} of the weights differ from the reference's: the others kept their rounded values",
        ),
        "weights in bfloat16 were trained at a rate that is below their rounding",
        "weights in float32 (model.policy_dtype=float32), which bfloat16 computes with just as fast; a higher lr",
        "docs/bfloat16.md",
    ),
    Rule(
        "another reference",
        any_of(
            case(
                "weights_distance >= 0.5",
                "the weights differ by {weights_distance:.0%} of their norm, far more than training changes them",
            ),
            case(
                "weights_distance >= 0.1 and weights_distance < 0.5 and weights_changed >= 0.99 "
                "and effect_of_weights <= 1.5",
                "the weights differ by {weights_distance:.0%} of their norm, but a token of the data only by "
                "{start_distance:.2g} nats: so far from the reference, training on these pairs would have changed more",
            ),
            case(
                "weights_in_steps >= 3",
                "a weight differs by {weights_in_steps:.2g} times the sum of all learning rates, which updates of Adam "
                "cannot reach",
            ),
            case(
                "diagnosis/chosen_log_ratio_per_token >= 0.1 and diagnosis/rejected_log_ratio_per_token >= 0.1",
                "chosen and rejected responses are both likelier than under the reference, by "
                "{diagnosis/chosen_log_ratio_per_token:.2g} and {diagnosis/rejected_log_ratio_per_token:.2g} nats per "
                "token, which SFT does, not training on pairs",
            ),
        ),
        "the reference is not the model that training started from, but its base or another checkpoint",
        "reference=PATH of the model that was given to the trainer, after SFT",
        "docs/diagnose.md#findings",
        "The reference is another model",
    ),
    Rule(
        "another prompt format",
        likelier_format,
        "the prompts are not in the format that the model was trained with",
        "prompt_format=chat with the tokenizer's template, prompt_format=hh, or prompts as in the data of SFT",
        "docs/diagnose.md#findings",
        "The prompts have another format",
    ),
    Rule(
        "BOS",
        any_of(
            case(
                "position/bos > 1",
                "a prompt begins with {position/bos:.2g} BOS tokens; with one less, a token is {position/gap_bos:.2g} "
                "nats likelier",
            ),
            case(
                "position/bos <= 0 and position/gap_bos >= 0.05",
                "with a BOS before the prompt, which has none, a token is {position/gap_bos:.2g} nats likelier for the "
                "reference",
            ),
            case(
                "position/bos >= 1 and position/bos <= 1 and position/gap_bos >= 0.05",
                "without the BOS before the prompt, a token is {position/gap_bos:.2g} nats likelier",
            ),
        ),
        "a chat template and the tokenizer both write one, or neither does",
        "texts without BOS and model.add_bos=true; rows with messages, whose template writes it once",
        "docs/diagnose.md#findings",
        "The BOS is wrong",
    ),
    Rule(
        "unknown end of turn",
        case(
            "end_drop >= 4",
            "the token that ends a response has a log-probability of {position/end:.2g} under the reference, those "
            "before it {position/middle:.2g}",
        ),
        "responses end with another token than those that the model was trained on",
        "the tokenizer of the model, whose eos ends its turns; prompt_format=chat; SFT on the same format first",
        "docs/diagnose.md#findings",
    ),
    Rule(
        "generation does not stop",
        any_of(
            case("tokenizer/stops < 1", "generation_config.json lacks a token that ends responses in the data"),
            case("tokenizer/no_template >= 1", "the policy's tokenizer has lost the reference's chat template"),
        ),
        "the export did not take over what the tokenizer of the chat model has",
        "eos_token_id in generation_config.json with all tokens that end a turn; chat_template.jinja of the reference",
        "docs/diagnose.md#findings",
    ),
)
# Of figures that a run has as well
RUN_RULES = (
    Rule(
        "over-optimization",
        any_of(
            case(
                "finished_gap >= 0.05",
                "{diagnosis/finished:.0%} of the samples end, {diagnosis/reference_finished:.0%} of the reference's",
            ),
            case(
                "repetition >= 0.15 and samples >= 8",
                "{diagnosis/distinct_4grams:.0%} of the 4-grams of a sample are new, "
                "{diagnosis/reference_distinct_4grams:.0%} of the reference's",
            ),
            case(
                "entropy_ratio <= 0.5 and samples >= 8",
                "the entropy of samples fell from {first_entropy_per_token:.2g} to {diagnosis/entropy_per_token:.2g} "
                "nats per token",
            ),
            case(
                "entropy_rise >= 1.1 and samples >= 8",
                "the entropy of samples rose from {first_entropy_per_token:.2g} to {diagnosis/entropy_per_token:.2g} "
                "nats per token: they became more random",
            ),
            case(
                "diagnosis/kl_per_token >= 0.5 and samples >= 8",
                "samples are {diagnosis/kl_per_token:.2g} nats per token from the reference",
            ),
        ),
        "the learning rate is too high, or the run too long: rewards keep rising while the text gets worse",
        "a lower lr; a higher loss.beta; fewer epochs; an earlier checkpoint of this run",
        "arXiv 2406.02900, docs/demo.md",
        "The text fell apart",
    ),
    Rule(
        "reference is not the start",
        case(
            "first_log_ratio >= 0.01",
            "before the first update, policy and reference differed by {first_log_ratio:.2g} nats per token",
        ),
        "reference names other weights than the policy starts from",
        "reference=start; model.archive or model.name_or_path with the reference's weights",
        "docs/losses.md#options",
    ),
    Rule(
        "loss above its start",
        case("loss_rise >= 0.05", "the evaluation loss rose from {first_loss:.3g} to {loss/eval:.3g}"),
        "the learning rate is too high, or too many epochs made the policy sure of what it got wrong",
        "a lower lr; fewer epochs; loss.label_smoothing=0.1",
        "arXiv 2310.12036",
        "The loss rose",
    ),
    Rule(
        "warmup too long",
        any_of(
            case("moved < 0.001 and loss_change < 0.005 and warmup_share >= 0.5", HARDLY_MOVED),
            case("pairs <= 0 and loss_change < 0.005 and warmup_share >= 0.5", SAME_LOSS),
        ),
        "the learning rate is still rising for most of the run",
        "warmup_steps of a tenth of the updates; more epochs",
        "docs/metrics.md#symptoms",
        "Almost nothing was learned",
    ),
    Rule(
        "nothing learned",
        any_of(
            case("moved < 0.001 and loss_change < 0.005 and warmup_share < 0.5", HARDLY_MOVED),
            case("pairs <= 0 and loss_change < 0.005 and warmup_share < 0.5", SAME_LOSS),
        ),
        "the learning rate is too low for the updates made",
        "lr ten times as high; more epochs",
        "docs/metrics.md#symptoms",
        "Almost nothing was learned",
    ),
    Rule(
        "swapped labels",
        case(
            "moved >= 0.001 and diagnosis/accuracy_high < 0.5 and pairs >= 10",
            "of the held-out pairs, only {rewards_eval/accuracies:.0%} [{diagnosis/accuracy_low:.0%}, "
            "{diagnosis/accuracy_high:.0%}] are ranked as labelled, which is not chance",
        ),
        "chosen and rejected are swapped in the training data, or in the evaluation data",
        "a look at both with inspect=5; columns.chosen and columns.rejected",
        "docs/metrics.md#symptoms",
        "The policy prefers the rejected responses",
    ),
    Rule(
        "no preference learned",
        case(
            "moved >= 0.001 and diagnosis/accuracy_low <= 0.5 and diagnosis/accuracy_high >= 0.5 and pairs >= 50",
            "the policy moved, but {rewards_eval/accuracies:.0%} of the held-out pairs "
            "[{diagnosis/accuracy_low:.0%}, {diagnosis/accuracy_high:.0%}] can be chance",
        ),
        "too few pairs or updates, labels that are wrong as often as right, or held-out pairs of another kind",
        "more pairs or epochs; a look at the pairs with inspect=5; a higher lr",
        "docs/metrics.md#symptoms",
        "The preference was not learned",
    ),
    Rule(
        "likelihood displacement",
        case(
            "diagnosis/displaced >= 0.6 and chosen_fall >= 0.2",
            "{diagnosis/displaced:.0%} of the chosen responses are less likely than under the reference, by "
            "{chosen_fall:.2g} nats per token, which is more than usual for DPO",
        ),
        "a high learning rate, or pairs with similar responses: what lowers the rejected one lowers both",
        "loss=dpop, loss.nll_weight=1 or a lower lr; without the pairs whose responses are most alike",
        "arXiv 2410.08847, docs/report.md#when-chosen-responses-fall",
    ),
    Rule(
        "length exploitation",
        any_of(
            case(
                "length_bias >= 0.4 and longer >= 0.3 and pairs >= 50",
                "margins follow the length of the chosen response (correlation {diagnosis/length_correlation:.2f}), "
                "and samples grew from {reference_length:.0f} to {diagnosis/sample_length:.0f} tokens",
            ),
            case(
                "length_bias >= 0.4 and longer <= -0.3 and pairs >= 50",
                "margins follow the length of the chosen response (correlation {diagnosis/length_correlation:.2f}), "
                "and samples shrank from {reference_length:.0f} to {diagnosis/sample_length:.0f} tokens",
            ),
            case(
                "length_bias >= 0.4 and lost_without_length >= 0.15",
                "{rewards_eval/accuracies:.0%} of all pairs are ranked as labelled, but {accuracy_equal_length:.0%} of "
                "those with equally long responses (correlation of margin and length "
                "{diagnosis/length_correlation:.2f})",
            ),
        ),
        "chosen responses that are longer, or shorter, than rejected ones: length is easier to learn than content",
        "loss.length_normalize=true; loss.ld_alpha=0.5; pairs whose responses are equally long",
        "arXiv 2403.19159",
    ),
    Rule(
        "label noise",
        case(
            "flipped_share >= 0.05 and flipped_ratio >= 1.5 and rewards_eval/accuracies >= 0.6 and pairs >= 50",
            "{flipped_share:.0%} of the held-out pairs have as strong a margin as the others, but a negative one, and "
            "{undecided_share:.0%} lie between",
        ),
        "labels that are swapped",
        "the pairs that `python -m tools.report RUN --suspects` lists; loss=robust or loss.label_smoothing with the "
        "share of wrong labels",
        "arXiv 2403.00409, docs/report.md#likely-wrong-labels",
    ),
    Rule(
        "memorization",
        any_of(
            case(
                "train_accuracy >= 0.95 and generalization_gap >= 0.1 and pairs >= 50",
                "{train_accuracy:.0%} of the training pairs are ranked as labelled, but {rewards_eval/accuracies:.0%} "
                "of the held-out ones",
            ),
            case(
                "overconfidence >= 0.1 and pairs >= 50",
                "the policy is {confidence:.0%} sure of its rankings, but {rewards_eval/accuracies:.0%} are right",
            ),
        ),
        "more epochs than the number of pairs allows, or a learning rate that is too high",
        "fewer epochs; a higher loss.beta; loss.label_smoothing=0.1; more pairs",
        "arXiv 2310.12036, arXiv 1706.04599",
    ),
    Rule(
        "unfinished samples",
        case(
            "diagnosis/finished < 0.5 and samples >= 8 and finished_gap < 0.05",
            "{diagnosis/finished:.0%} of the samples end before max_length",
        ),
        "the policy starts from a model that was not trained to end its answers, or max_length is too short",
        "SFT first (loss=sft); a higher max_length; a model with a chat template, and rows with messages",
        "docs/metrics.md#symptoms",
    ),
    Rule(
        "empty samples",
        case("empty_samples >= 0.2 and samples >= 8", "{empty_samples:.0%} of the samples are empty"),
        "responses that are empty or very short, or a prompt after which the end of the turn is the likeliest token",
        "inspect=5, to see the prompt's last tokens and where responses end; a lower lr",
        "docs/metrics.md#symptoms",
    ),
)
RULES = MODEL_RULES + RUN_RULES


def findings(figures: Figures, rules: Sequence[Rule] = RULES) -> list[Finding]:
    """The rules that apply, most important first."""
    shown = [(rule, rule.shows(figures)) for rule in rules]
    return [Finding(rule, text) for rule, text in shown if text is not None]


# The verdict


def verdict(figures: Figures) -> str:
    """Two sentences: how the run or the model did, with the figures that carry it."""
    if figures.get("updates") == 0:
        return "Nothing has been trained yet."
    known, found = with_derived(figures), findings(figures)
    worst = next((finding for finding in found if finding.rule.headline), None)
    others = ", ".join(finding.rule.name for finding in found if finding is not worst)
    if worst is not None:
        also = f" Also found: {others}." if others else ""
        return f"{worst.rule.headline}: {worst.text}. {result_of(known)}.{also}"
    learned = known.get("diagnosis/accuracy_low", 0) > 0.5 and known.get("pairs", 0) >= TOO_FEW
    result = f"Learned the preference: {result_of(known)}" if learned else result_of(known)
    if others:
        return f"{result}. Found: {others}."
    if known.get("stopped"):
        return f"{result}. A condition of stop_if ended the run."
    too_few = 0 < known.get("pairs", 0) < TOO_FEW
    return f"{result}. {f'Evaluate {SMALL} or more' if too_few else 'No fault found'}."


def result_of(known: Figures) -> str:
    """What an evaluation measured, as a sentence without its period."""
    if "diagnosis/accuracy_low" not in known:
        if "loss/eval" not in known:
            return "There was no evaluation"
        if "first_loss" not in known:
            return f"The evaluation loss is {known['loss/eval']:.4g}"
        return f"The evaluation loss went from {known['first_loss']:.4g} to {known['loss/eval']:.4g}"
    pairs, share = round(known.get("pairs", 0)), ACCURACY.format_map(known)
    if 0 < pairs < TOO_FEW:
        few = "1 pair says" if pairs == 1 else f"{pairs} pairs say"
        return f"{few} nothing: {share} are ranked as labelled, which can be chance"
    only = "only " if pairs < SMALL else ""
    kl = f", KL {known['diagnosis/kl']:.2g} nats per response" if "diagnosis/kl" in known else ""
    return f"{share} of {only}{pairs:,} held-out pairs are ranked as labelled{kl}"


# Figures of a run that no evaluation records

EQUAL_LENGTH = 0.1  # of the longer response: lengths that differ by no more count as equal


def figures_of_pairs(pairs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Figures of one evaluation's pairs, which are records as in pairs.jsonl; a margin that is not finite is a text."""
    margins = [float(pair["rewards/margins"]) for pair in pairs]
    figures = {"pairs": float(len(pairs))}
    if not margins or not all(map(math.isfinite, margins)) or not any(margins):
        return figures
    strong = median(map(abs, margins)) / 2
    figures["flipped_share"] = fmean(margin < -strong for margin in margins)
    figures["undecided_share"] = fmean(abs(margin) <= strong for margin in margins)
    figures["confidence"] = fmean(1 / (1 + math.exp(-min(abs(margin), 700))) for margin in margins)
    sizes = [(pair["lengths/chosen"], pair["lengths/rejected"]) for pair in pairs]
    equal = [m > 0 for m, n in zip(margins, sizes, strict=True) if max(n) - min(n) <= EQUAL_LENGTH * max(n)]
    if len(equal) >= TOO_FEW:
        figures["accuracy_equal_length"] = fmean(equal)
    return figures
