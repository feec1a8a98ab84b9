"""Figures of an evaluation's pairs, against numbers derived by hand and against policies that do one thing alone."""

import math

import pytest
import torch
from tiny_models import mask_responses, respond, tiny

from dpo.data.examples import TextExample, TokenizedExample
from dpo.distributed.splitting import BatchSplitter
from dpo.model.logps import Logps, ResponseLogps
from dpo.model.packing import Packer, make_microbatches
from dpo.reporting.diagnosis import diagnose, diagnose_samples, lengths, log_ratios
from dpo.reporting.findings import findings
from dpo.reporting.metrics import BatchMetrics
from dpo.training.references import ModelReference


def pairs(responses, chosen, rejected, beta=0.1, truncated=()):
    """Return the metrics of pairs of responses, as token ids, whose log-ratios are given."""
    metrics = BatchMetrics()
    examples = [
        TokenizedExample(TextExample("", ("", ""), "keep_end", i, "x"), [1], pair, ("response",) * (i in truncated))
        for i, pair in enumerate(responses)
    ]
    lengths = torch.tensor([[len(response) for response in pair] for pair in responses]).float()
    chosen, rejected = torch.tensor(chosen), torch.tensor(rejected)
    values = {"log_ratios/chosen": chosen, "log_ratios/rejected": rejected, "loss": chosen}
    values |= {"rewards/chosen": beta * chosen, "rewards/rejected": beta * rejected}
    values |= {"rewards/margins": beta * (chosen - rejected), "rewards/accuracies": (chosen > rejected).float()}
    values |= {"lengths/chosen": lengths[:, 0], "lengths/rejected": lengths[:, 1]}
    metrics.add(examples, values)
    return metrics


def tokens(*lengths):
    """Return a pair of responses of two lengths that share no token."""
    return [2] * lengths[0], [3] * lengths[1]


def test_log_ratios_are_the_differences_of_the_sums_and_carry_no_gradient():
    lengths = torch.tensor([[1, 1]])
    policy = Logps(torch.tensor([[-1.0, -5.0]], requires_grad=True), lengths)
    found = log_ratios(policy, Logps(torch.tensor([[-2.0, -3.0]]), lengths))
    assert {name: value.tolist() for name, value in found.items()} == {
        "log_ratios/chosen": [1.0],
        "log_ratios/rejected": [-2.0],
    }
    assert not any(value.requires_grad for value in found.values())
    assert log_ratios(policy, None) == {}
    assert log_ratios(Logps(torch.zeros(1, 1), lengths[:, :1]), Logps(torch.zeros(1, 1), lengths[:, :1])) == {}


def test_lengths_of_rows_with_a_label_are_told_apart_by_it():
    texts = [TextExample("", ("",), "keep_end", i, "", label=label) for i, label in enumerate((True, False, True))]
    examples = [TokenizedExample(text, [1], ([2] * n,)) for text, n in zip(texts, (4, 3, 5), strict=True)]
    (batch,) = make_microbatches(examples, "shared_prefix", 100)
    found = {name: values.tolist() for name, values in lengths(batch).items()}
    assert found == {"lengths/desirable": [4.0, 5.0], "lengths/undesirable": [3.0]}


def test_a_policy_that_only_displaces_has_a_full_accuracy_and_shows_in_the_share_of_displaced_pairs():
    """Both responses fall, the rejected one further: margins are right, yet every chosen response is less likely."""
    found = diagnose(pairs([tokens(4, 4)] * 4, [-2.0, -2.0, -4.0, -4.0], [-6.0, -6.0, -8.0, -8.0]))
    assert found["diagnosis/displaced"] == 1.0
    assert found["diagnosis/chosen_log_ratio_per_token"] == pytest.approx(-12 / 16)
    assert found["diagnosis/rejected_log_ratio_per_token"] == pytest.approx(-28 / 16)
    assert found["diagnosis/margin_p50"] == pytest.approx(0.4)


def test_a_policy_that_learns_displaces_nothing():
    found = diagnose(pairs([tokens(4, 4)] * 4, [1.0, 2.0, 1.0, 2.0], [-1.0, -1.0, -1.0, -1.0]))
    assert found["diagnosis/displaced"] == 0.0
    assert found["diagnosis/chosen_log_ratio_per_token"] > 0


def test_a_policy_that_only_shortens_has_margins_that_fall_with_the_length_of_the_chosen_response():
    """Each token costs 1 nat, so the margin is beta (rejected length - chosen length), whatever the label."""
    lengths = [(2, 6), (5, 3), (4, 9), (7, 7)]
    found = diagnose(
        pairs([tokens(*n) for n in lengths], [-float(n) for n, _ in lengths], [-float(n) for _, n in lengths])
    )
    assert found["diagnosis/length_correlation"] == pytest.approx(-1.0)


def displacement(figures):
    """Return the finding on displacement as the log prints it, or None."""
    return next((str(f) for f in findings(figures) if f.rule.name == "likelihood displacement"), None)


def advice(*args, **settings):
    """Return the advice on an evaluation of pairs."""
    return displacement(diagnose(pairs(*args, **settings)))


def test_a_policy_that_only_displaces_gets_one_line_that_names_the_remedies():
    """Of 20 tokens each the chosen lose 6 nats, the rejected 8: 0.3 nats per token."""
    line = advice([tokens(20, 20)] * 4, [-6.0] * 4, [-8.0] * 4)
    assert "100% of the chosen responses are less likely than under the reference, by 0.3 nats per token" in line
    assert "\n" not in line and all(remedy in line for remedy in ("loss=dpop", "loss.nll_weight=1", "a lower lr"))


def test_a_policy_that_learns_gets_no_advice_though_its_chosen_responses_fall_as_usual():
    """All of them fall, by 0.15 nats per token, and the rejected by 0.4; or half of them, the mean by 0.25."""
    assert advice([tokens(20, 20)] * 4, [-3.0] * 4, [-8.0] * 4) is None
    assert advice([tokens(20, 20)] * 4, [-11.0, -11.0, 1.0, 1.0], [-12.0] * 4) is None
    assert advice([tokens(20, 20)] * 4, [1.0] * 4, [-8.0] * 4) is None


def test_a_policy_that_only_shortens_gets_no_advice_on_displacement():
    """Each end is 2 nats likelier, each token before it 0.05 less: n tokens move by 2 - 0.05 (n - 1)."""
    lengths = [(40, 60), (60, 40), (80, 90), (90, 100)]
    moved = [[2 - 0.05 * (n - 1) for n in side] for side in zip(*lengths, strict=True)]
    found = diagnose(pairs([tokens(*n) for n in lengths], *moved))
    assert found["diagnosis/displaced"] == 0.75 and found["diagnosis/length_correlation"] < -0.9
    assert displacement(found) is None


def test_without_pairs_or_a_reference_there_is_no_advice():
    assert displacement({"loss/eval": 1.0}) is None


def test_displacement_is_split_by_truncation_and_by_similarity():
    """Pairs 0 and 1 differ in one of four tokens, 2 and 3 in all; 0 and 2 are truncated."""
    near, far = ([5, 6, 7, 8], [5, 6, 7, 9]), tokens(4, 4)
    found = diagnose(pairs([near, near, far, far], [-1.0, -1.0, -1.0, 1.0], [-2.0] * 4, truncated=(0, 2)))
    shares = {name.rpartition("/")[2]: value for name, value in found.items() if "displaced" in name}
    assert shares == {
        "displaced": 0.75,
        "displaced_truncated": 1.0,
        "displaced_whole": 0.5,
        "displaced_similar": 1.0,
        "displaced_different": 0.5,
    }


def test_responses_are_as_similar_as_their_trained_tokens():
    """Pair 0 differs in two tokens of context, pair 1 in one trained token."""
    metrics = pairs([([5, 6, 7, 8], [5, 9, 9, 8]), ([5, 6, 7, 8], [5, 6, 7, 9])], [-1.0, 1.0], [-2.0] * 2)
    metrics.examples = [mask_responses(example, [1, 0, 0, 1], [1, 0, 0, 1]) for example in metrics.examples]
    found = diagnose(metrics)
    assert (found["diagnosis/displaced_similar"], found["diagnosis/displaced_different"]) == (1.0, 0.0)


def test_a_share_of_no_pairs_and_a_correlation_of_constants_are_left_out():
    found = diagnose(pairs([tokens(4, 4)] * 2, [0.0, 0.0], [0.0, 0.0]))
    missing = {"displaced_truncated", "displaced_different", "length_correlation", "calibration_error"}
    assert not any(f"diagnosis/{name}" in found for name in missing)
    assert found["diagnosis/displaced"] == 0.0 and not any(map(math.isnan, found.values()))


def test_sft_and_losses_without_a_reference_have_no_figures_that_need_one():
    metrics = pairs([tokens(4, 4)] * 2, [1.0, 2.0], [0.0, 0.0])
    for name in ("log_ratios/chosen", "log_ratios/rejected"):
        del metrics.values[name]
    found = diagnose(metrics)
    assert "diagnosis/margin_p50" in found and not any("displaced" in name for name in found)
    del metrics.values["rewards/margins"]
    assert diagnose(metrics) == {}


# Samples

PACKER = Packer("shared_prefix", 12, torch.device("cpu"))  # tokens: two of the samples below share no pass


class Constant:
    """Stands for a policy and for a reference that give every token the same log-probability."""

    knows_any_response = True

    def __init__(self, logp):
        self.logp = logp

    def __call__(self, batch):
        return torch.full((len(batch.targets),), self.logp)

    def logps(self, batch):
        return Logps(self.logp * batch.lengths.float(), batch.lengths)


def samples_of(*lengths):
    """Return samples of some lengths in tokens."""
    return [respond([5, 6], [7] * n) for n in lengths]


def test_the_divergence_is_the_mean_log_ratio_of_the_policys_own_samples_with_its_standard_error():
    """Half a nat per token: 1 nat of two tokens, 4 of eight. Mean 2.5, deviation 3 / sqrt(2), error 3 / 2.

    The same half a nat for every token, so that the mean per token has no error.
    """
    samples = {"policy": samples_of(2, 8), "reference": samples_of(3, 3)}
    found = diagnose_samples(samples, Constant(-1.0), Constant(-1.5), BatchSplitter(PACKER))
    assert found == pytest.approx(
        {
            "diagnosis/kl": 2.5,
            "diagnosis/kl_stderr": 1.5,
            "diagnosis/kl_per_token": 0.5,
            "diagnosis/kl_per_token_stderr": 0.0,
            "diagnosis/entropy_per_token": 1.0,
            "diagnosis/entropy_per_token_stderr": 0.0,
            "diagnosis/sample_length": 5.0,
            "diagnosis/sample_length_difference": 2.0,  # -1 and 5
            "diagnosis/sample_length_difference_stderr": 3.0,
        }
    )


def test_identical_models_have_a_divergence_of_exactly_zero():
    models = [tiny("Llama"), tiny("Llama")]
    policy, reference = (ResponseLogps.wrap(model) for model in models)
    samples = [respond([5, 6, 7], [8, 9, 2]), respond([11], [12] * 9), respond([13, 14], [2])]
    found = diagnose_samples(
        {"policy": samples, "reference": samples},
        policy,
        ModelReference(reference, torch.float32),
        BatchSplitter(PACKER),
    )
    names = ("kl", "kl_stderr", "kl_per_token", "kl_per_token_stderr", "sample_length_difference")
    assert [found[f"diagnosis/{name}"] for name in names] == [0.0] * 5
    with torch.no_grad():
        sums = []
        for sample in samples:
            ids = torch.tensor([sample.prompt + sample.responses[0]])
            logps = models[0](ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            sums.append(logps[len(sample.prompt) - 1 :].sum().item())
    assert found["diagnosis/entropy_per_token"] == pytest.approx(-sum(sums) / 13, rel=1e-5)  # the ends count as tokens


def test_without_a_reference_or_with_a_cached_one_there_is_no_divergence():
    cached = Constant(-1.5)
    cached.knows_any_response = False
    for reference in (None, cached):
        found = diagnose_samples({"policy": samples_of(2, 8)}, Constant(-1.0), reference, BatchSplitter(PACKER))
        assert {name.removeprefix("diagnosis/").removesuffix("_stderr") for name in found} == {
            "entropy_per_token",
            "sample_length",
        }


def test_a_single_sample_has_no_standard_error():
    found = diagnose_samples({"policy": samples_of(4)}, Constant(-1.0), Constant(-1.5), BatchSplitter(PACKER))
    assert found["diagnosis/kl"] == 2.0 and not any("stderr" in name for name in found)
