"""How a round is judged: scores and failures, metrics with intervals, the verdict, log-probabilities of samples."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, TINY, validated
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dpo.system.errors import UserError
from tools.candidates import Candidate, find_candidate, load_model
from tools.rounds.judgement import (
    Estimate,
    Judged,
    Judgement,
    best_round,
    diversity,
    judge,
    read_history,
    score_samples,
    stop_reason,
    to_ask,
    write_judgement,
)
from tools.rounds.policies import Policy, sums_of_samples
from tools.rounds.records import Prompt, Sample


def sample(prompt, text="a text", finished=True, n_tokens=4):
    return Sample(f"0/{prompt}/0", prompt, 0, text, list(range(n_tokens)), finished)


def prompts(n):
    return [Prompt(i, f"Prompt {i}", f"Prompt {i}:", [5, 6]) for i in range(n)]


def scored(samples, answers, is_pairwise=False, first=None):
    return score_samples(prompts(len(samples)), samples, answers, is_pairwise, first)


# Scores


UNFINISHED, EMPTY = {"finished": False}, {"text": " \n"}


def test_a_scorer_is_asked_about_samples_that_finish_with_a_text():
    samples = [sample(0), sample(1, **UNFINISHED), sample(2, **EMPTY), sample(3, finished=True)]
    assert to_ask(samples) == [0, 3]


def test_a_scorer_of_pairs_is_asked_where_both_samples_hold_and_differ():
    first = [sample(0, "x"), sample(1, "x", finished=False), sample(2, "same"), sample(3, "x"), sample(4, "")]
    samples = [sample(0, "y"), sample(1, "y"), sample(2, "same"), sample(3, "y", finished=False), sample(4, "y")]
    assert to_ask(samples, first) == [0] and to_ask(first, first) == []


@pytest.mark.parametrize("failure", [UNFINISHED, EMPTY], ids=["unfinished", "empty"])
def test_a_failure_has_the_lowest_score_of_the_first_policys_others_and_loses_to_any_of_them(failure):
    first = scored([sample(0), sample(1), sample(2), sample(3, **failure)], {0: 2.0, 1: -1.0, 2: 0.5})
    assert [judged.score for judged in first] == [2.0, -1.0, 0.5, -1.0]
    assert [judged.win for judged in first] == [0.5] * 4  # against itself
    # Prompt 1: a failure has the score of the sample that it is compared with, and loses. 2: a score below -1 counts.
    later = scored([sample(0), sample(1, **failure), sample(2), sample(3)], {0: 2.0, 2: -3.0, 3: -1.0}, first=first)
    assert [judged.score for judged in later] == [2.0, -1.0, -3.0, -1.0]
    assert [judged.win for judged in later] == [0.5, 0, 0, 1]
    both = scored([sample(0), sample(1), sample(2), sample(3, **failure)], {0: 2.5, 1: 0, 2: 0}, first=first)
    assert [judged.win for judged in both] == [1, 1, 0, 0.5]


@pytest.mark.parametrize("failure", [UNFINISHED, EMPTY], ids=["unfinished", "empty"])
def test_the_score_of_a_scorer_of_pairs_is_the_win_over_the_first_policys_sample(failure):
    start = [sample(0, "x"), sample(1, **failure), sample(2, "x"), sample(3, "same"), sample(4, **failure)]
    first = scored(start, {}, is_pairwise=True)
    assert [(judged.score, judged.win) for judged in first] == [(0.5, 0.5)] * 5
    later = [sample(0, "y"), sample(1, "y"), sample(2, **failure), sample(3, "same"), sample(4, **failure)]
    found = scored(later, {0: 0.75}, is_pairwise=True, first=first)
    assert [judged.win for judged in found] == [judged.score for judged in found] == [0.75, 1, 0, 0.5, 0.5]


def test_a_first_policy_whose_samples_all_fail_is_refused():
    with pytest.raises(UserError, match="of 2 held-out samples of the first policy, none finishes with a text"):
        scored([sample(0, **UNFINISHED), sample(1, **EMPTY)], {})


# Metrics


def same(*sums):
    return {"policy": sums, "first": sums, "previous": sums}


def judged(scores, wins=None, lengths=None, **kinds):
    """Make judged samples with these scores."""
    wins, lengths = wins or [0.5] * len(scores), lengths or [4] * len(scores)
    rows = enumerate(zip(scores, wins, lengths, strict=True))
    return [Judged(f"Prompt {i}:", sample(i, n_tokens=n, **kinds), score, win) for i, (score, win, n) in rows]


def test_the_first_round_has_a_mean_score_and_no_comparison():
    metrics = judge(0, judged([1.0, 2.0, 3.0]), same(-4.0, -8.0, -12.0), []).metrics
    error = 1.96 * 1 / math.sqrt(3)  # the variance of 1, 2, 3 is 1
    assert metrics["score"] == pytest.approx((2, 2 - error, 2 + error))
    assert metrics["kl_first"] == metrics["kl_previous_per_token"] == (0, 0, 0)
    assert not {"win_rate", "score_minus_first", "score_minus_best"} & metrics.keys()


def test_scores_are_compared_prompt_by_prompt_with_the_first_and_the_best_round():
    zeros = [0.0] * 4
    first = judge(0, judged([0.0, 10.0, 20.0, 30.0]), same(*zeros), [])
    better = judge(1, judged([4.0, 14.0, 24.0, 34.0]), same(*zeros), [first])
    last = judge(2, judged([1.0, 11.0, 21.0, 33.0], wins=[1, 1, 0.5, 0]), same(*zeros), [first, better]).metrics
    # Differences from round 0: 1 1 1 3, mean 1.5, variance (3 * 0.25 + 2.25) / 3 = 1, so a standard error of 1 / 2.
    assert last["score_minus_first"] == pytest.approx((1.5, 1.5 - 0.98, 1.5 + 0.98))
    assert last["score_minus_best"] == pytest.approx((-2.5, -2.5 - 0.98, -2.5 + 0.98))
    # Wilson for 2.5 of 4: z2 = 3.8416; center (2.5 + 1.9208) / 7.8416; 2.5 * 1.5 / 4 + z2 / 4 = 1.8979
    spread = 1.96 * math.sqrt(1.8979) / 7.8416
    assert last["win_rate"] == pytest.approx((0.625, 4.4208 / 7.8416 - spread, 4.4208 / 7.8416 + spread), abs=1e-4)


def test_the_win_rate_at_equal_length_is_lower_if_the_longer_texts_win():
    zeros = [0.0] * 8
    first = judge(0, judged(zeros, lengths=[10] * 8), same(*zeros), [])
    lengths, wins = [20, 20, 20, 20, 20, 10, 10, 10], [1, 1, 1, 1, 1, 0, 1, 0]
    longer = judge(1, judged(zeros, wins, lengths), same(*zeros), [first]).metrics
    assert longer["win_rate"].value == 0.75 and longer["win_rate_equal_length"].value < 0.7
    equal = judge(1, judged(zeros, wins, [10] * 8), same(*zeros), [first]).metrics
    assert equal["win_rate_equal_length"].value == pytest.approx(0.75, abs=0.02)  # the prior pulls towards one half


def test_kl_is_the_mean_of_log_ratios_and_entropy_that_of_negative_log_probabilities():
    rows = judged([0.0, 0.0], lengths=[2, 8])
    logps = {"policy": [-3.0, -12.0], "first": [-5.0, -18.0], "previous": [-4.0, -12.0]}
    metrics = judge(1, rows, logps, [judge(0, rows, same(0, 0), [])]).metrics
    assert metrics["kl_first"].value == 4 and metrics["kl_first_per_token"].value == pytest.approx(0.8)  # 2, 6; 8 / 10
    assert metrics["kl_previous"].value == 0.5 and metrics["kl_previous_per_token"].value == pytest.approx(0.1)
    assert metrics["entropy_per_token"].value == pytest.approx(1.5) and metrics["length"].value == 5
    # Log-ratios 2 and 6: standard deviation sqrt(8), error 2. Per token: residuals 2 - 1.6 and 6 - 6.4 over length 5.
    assert metrics["kl_first"].high == pytest.approx(4 + 1.96 * 2)
    assert metrics["kl_first_per_token"].high == pytest.approx(0.8 + 1.96 * 0.4 / 5)


def test_the_shares_that_finish_and_that_are_empty_are_counted_apart():
    rows = [Judged("", each, 0.0, 0.5) for each in (sample(0), sample(1, **UNFINISHED), sample(2, **EMPTY), sample(3))]
    metrics = judge(0, rows, same(0, 0, 0, 0), []).metrics
    assert metrics["finished"].value == 0.75 and metrics["empty"].value == 0.25
    assert 0 < metrics["finished"].low < 0.75 < metrics["finished"].high < 1


def test_diversity_counts_distinct_n_grams_of_words_over_all_texts():
    found = diversity(["a b a b", "a b", "a b", ""])
    # Words: a b a b a b a b, 2 of 8. Pairs: ab ba ab, ab, ab: 2 of 5, not across texts. Triples: aba bab: 2 of 2.
    assert {name: value for name, (value, _, _) in found.items()} == {
        "distinct_1": 0.25,
        "distinct_2": 0.4,
        "distinct_3": 1.0,
        "duplicates": 0.25,  # one of four
    }
    assert diversity(["", ""])["distinct_1"].value == 0


def test_a_single_prompt_has_no_interval_and_samples_without_tokens_no_entropy():
    metrics = judge(0, judged([1.0], lengths=[0]), same(0.0), []).metrics
    assert metrics["score"] == (1, None, None) and metrics["entropy_per_token"] == (0, None, None)


# The verdict


def judgement(number, score=0.0, difference=(0.0, 0.0, 0.0), entropy=2.0, finished=0.9):
    metrics = {
        "score": Estimate(score),
        "score_minus_best": Estimate(*difference),
        "entropy_per_token": Estimate(entropy),
        "finished": Estimate(finished),
    }
    return Judgement(number, metrics, [])


def reason(last, *earlier, start=None):
    return stop_reason([start or judgement(0), *earlier, last], min_entropy=0.5, max_unfinished=0.1)


def test_the_first_round_and_a_round_within_all_bounds_do_not_stop():
    assert stop_reason([judgement(0, entropy=0.0)], 0.5, 0.1) is None
    assert reason(judgement(1, difference=(-1, -2, 0), entropy=1.0, finished=0.8)) is None  # each at its bound
    assert reason(judgement(1, difference=(-1, None, None))) is None  # a single prompt


def test_a_round_that_lowers_the_score_significantly_stops():
    found = reason(judgement(3, difference=(-1, -2, -0.01)), judgement(1, score=3), judgement(2, score=2))
    lower = "its mean score is below that of round 1 by 1, 95% interval 0.01 to 2"
    assert found == f"round 3 made the policy worse: {lower}"


def test_a_round_that_loses_entropy_stops():
    found = reason(judgement(1, entropy=0.99))
    assert found.endswith("its entropy is 0.99 nats per token, below 0.5 times the first policy's, which is 2")


@pytest.mark.parametrize("before", [0.9, 0.8, 0.3])
def test_a_round_that_finishes_less_stops_and_rounding_does_not(before):
    start = judgement(0, finished=before)
    assert reason(judgement(1, finished=before - 0.1), start=start) is None
    assert reason(judgement(1, finished=before - 0.101), start=start).endswith("at most 10.0% more are allowed")


def test_all_reasons_are_given():
    found = reason(judgement(1, difference=(-1, -2, -0.5), entropy=0.1, finished=0.25))
    assert found.count(";") == 3 and "score" in found and "entropy" in found
    assert "75.0% of its samples do not finish, and 10.0% of the first policy's" in found


def test_the_best_round_has_the_highest_score_and_no_reason_to_stop():
    def best(*history):
        return best_round(history, 0.5, 0.1).round

    assert best(judgement(0)) == 0
    assert best(judgement(0, 1.0), judgement(1, 3.0), judgement(2, 2.0)) == 1
    assert best(judgement(0, 1.0), judgement(1, 1.0), judgement(2, 0.9)) == 0  # no improvement
    assert best(judgement(0, 1.0), judgement(1, 2.0), judgement(2, 2.0)) == 1
    assert best(judgement(0, 1.0), judgement(1, 2.0), judgement(2, 9.0, entropy=0.5)) == 1  # it has collapsed
    assert best(judgement(0, 1.0), judgement(1, 0.9), judgement(2, 9.0, finished=0.1)) == 0


# Files


def test_a_judgement_is_read_as_it_was_written(tmp_path):
    rows = [
        Judged("Tell\u2028 me: \ud83d", sample(0, "\x00 \u20ac", n_tokens=3), 0.1, 0.5),
        Judged("<b>", sample(1, **UNFINISHED), 1 / 3, 0),
    ]
    first = judge(0, rows, same(-1.0, -2.0), [])
    second = judge(1, rows, {"policy": [-1, -2], "first": [-2, -2], "previous": [-2, -3]}, [first])
    for one in (first, second):
        write_judgement(tmp_path, one)
    assert read_history(tmp_path) == [first, second]
    (tmp_path / "round-0" / "judgement.json").rename(tmp_path / "elsewhere")
    assert read_history(tmp_path) == []


def test_a_judgement_of_one_prompt_is_valid_json(tmp_path):
    write_judgement(tmp_path, judge(0, judged([1.0]), same(-2.0), []))

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "round-0" / "judgement.json").read_text()
    assert json.loads(text, parse_constant=refuse)["metrics"]["score"] == {"value": 1.0}


# Log-probabilities


def policy_of(candidate):
    return Policy(candidate, None, [], Path())


def draw(n, vocab_size=97):
    """Prompts of 2 to 12 random ids, and samples of 1 to 40."""
    random = torch.Generator().manual_seed(0)

    def ids(most):
        length = int(torch.randint(1, most, (1,), generator=random))
        return torch.randint(3, vocab_size, (length,), generator=random).tolist()

    asked = [Prompt(10 * i, "", "", [4, *ids(12)]) for i in range(n)]
    return asked, [Sample(f"{prompt.id}", prompt.id, 0, "", ids(41), True) for prompt in asked]


@torch.no_grad()
def plain(model, prompt, response):
    """The log-probability of a response by a forward pass without batching."""
    logits = model.eval()(torch.tensor([prompt + response])).logits[0].double()
    logps = logits.log_softmax(-1)
    return sum(logps[len(prompt) + i - 1, token].item() for i, token in enumerate(response))


@pytest.mark.parametrize("budget", ["auto", "64"])
def test_log_probabilities_of_samples_are_those_of_a_plain_forward_pass(budget):
    settings, loss = validated(*TINY, f"max_tokens_per_pass={budget}", "loss=dpo")
    asked, samples = draw(9)
    samples.append(Sample("empty", asked[0].id, 1, "", [], False))
    found = sums_of_samples(policy_of(Candidate("", settings, loss, None)), samples, asked[::-1], torch.device("cpu"))
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "tiny-gpt2")
    expected = [plain(model, asked[i].ids, samples[i].ids) for i in range(9)]
    assert found == pytest.approx([*expected, 0], abs=1e-4) and min(expected) < -20
    candidate = policy_of(Candidate("", settings, loss, None))
    assert sums_of_samples(candidate, samples[::-1], asked, torch.device("cpu")) == pytest.approx(found[::-1], abs=1e-4)
    assert sums_of_samples(candidate, samples[-1:], asked, torch.device("cpu")) == [0]


def test_log_probabilities_are_those_of_the_adapter_that_was_trained(make_trainer, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=512, initializer_range=0.3, bos_token_id=None, eos_token_id=0, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    for file in GOLDENS.glob("tiny-gpt2/*token*"):
        (tmp_path / "llama" / file.name).write_bytes(file.read_bytes())
    few = ("n_examples=8", "n_eval_examples=8", "eval_batch_size=8", "do_first_eval=false", "max_length=100")
    model = (f"model.name_or_path='{tmp_path / 'llama'}'", "lora=default", "loss=dpo", "lr=1e-1", "warmup_steps=0")
    trainer = make_trainer(*few, *model)
    trainer.train()
    candidate = find_candidate(trainer.run.path)
    asked, samples = draw(4, vocab_size=400)
    found = sums_of_samples(policy_of(candidate), samples, asked, torch.device("cpu"))
    adapted = load_model(candidate, torch.device("cpu"))
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    pairs = [(prompt.ids, each.ids) for prompt, each in zip(asked, samples, strict=True)]
    assert found == pytest.approx([plain(adapted, *pair) for pair in pairs], abs=1e-4)
    assert found != pytest.approx([plain(start, *pair) for pair in pairs], abs=1e-2)
