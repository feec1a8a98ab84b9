"""The rules at their edges, the verdict, and the figures that they read."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from dpo.reporting.findings import (
    DERIVED,
    FIGURES,
    RULES,
    RUN_RULES,
    Rule,
    any_of,
    case,
    figures_of_pairs,
    findings,
    verdict,
    with_derived,
)
from dpo.reporting.page import RunFiles, figures_of_run, log_verdict, page
from dpo.system.console import in_color, log_warning

# A run that learned: 144 of 200 pairs (Wilson's interval 65.4% to 77.8%), samples as good as the reference's.
HEALTHY = {
    "loss/eval": 0.6,
    "first_loss": 0.6931,
    "first_log_ratio": 0.0,
    "updates": 50,
    "pairs": 200,
    "rewards_eval/accuracies": 0.72,
    "rewards_eval/margins": 0.4,
    "diagnosis/accuracy_low": 0.654,
    "diagnosis/accuracy_high": 0.778,
    "diagnosis/displaced": 0.4,
    "diagnosis/chosen_log_ratio_per_token": 0.002,
    "diagnosis/rejected_log_ratio_per_token": -0.03,
    "diagnosis/length_correlation": 0.3,
    "diagnosis/kl": 4.1,
    "diagnosis/kl_per_token": 0.05,
    "diagnosis/entropy_per_token": 1.9,
    "diagnosis/entropy_per_token_stderr": 0.1,
    "first_entropy_per_token": 2.0,
    "samples": 16,
    "diagnosis/finished": 1.0,
    "diagnosis/reference_finished": 1.0,
    "diagnosis/distinct_4grams": 0.97,
    "diagnosis/reference_distinct_4grams": 0.98,
    "diagnosis/sample_length": 40.0,
    "diagnosis/sample_length_difference": 2.0,
    "train_accuracy": 0.75,
    "confidence": 0.6,
    "flipped_share": 0.15,
    "undecided_share": 0.25,
    "accuracy_equal_length": 0.7,
    "empty_samples": 0.0,
}
STILL = {"diagnosis/chosen_log_ratio_per_token": 0.0, "diagnosis/rejected_log_ratio_per_token": 0.0}
SAME_LOSS = {"pairs": 0, "loss/eval": 0.693}
LENGTH = {"diagnosis/length_correlation": 0.7}
SFT = {"loss/eval": 1.5, "first_loss": 3.2, "updates": 50, "pairs": 0, "samples": 16, "diagnosis/finished": 0.9}


def names(figures):
    return [finding.rule.name for finding in findings(figures)]


# Each rule: what else differs from HEALTHY, the figure that is moved, and its value just before the edge and at it.
EDGES = [
    # 16 of 16 finished: at least 80.6%. 9 of 16: at most 76.9%, 3.7 points below; 8 of 16: 72.0%, 8.6 points below.
    ("over-optimization", {}, "diagnosis/finished", 9 / 16, 8 / 16),
    # 1,000 of 1,000: at least 99.62%. 933: at most 94.69%, 4.93 points below; 932: 94.60%, 5.02 points below.
    ("over-optimization", {"samples": 1000}, "diagnosis/finished", 0.933, 0.932),
    ("over-optimization", {}, "diagnosis/distinct_4grams", 0.831, 0.829),  # 0.98 - 0.15
    ("over-optimization", {"diagnosis/distinct_4grams": 0.5}, "samples", 7, 8),
    ("over-optimization", {"diagnosis/entropy_per_token": 0.9}, "samples", 7, 8),
    ("over-optimization", {"diagnosis/entropy_per_token": 3.0}, "samples", 7, 8),
    ("over-optimization", {"diagnosis/kl_per_token": 1.0}, "samples", 7, 8),
    ("over-optimization", {}, "diagnosis/entropy_per_token", 1.01, 0.99),  # half of 2
    ("over-optimization", {}, "diagnosis/entropy_per_token", 2.39, 2.41),  # 2.4 - 2 * 0.1 = 1.1 * 2
    ("over-optimization", {}, "diagnosis/kl_per_token", 0.49, 0.5),
    ("reference is not the start", {}, "first_log_ratio", 0.0099, 0.01),
    ("loss above its start", {}, "loss/eval", 0.727, 0.728),  # 1.05 * 0.6931 = 0.72776
    ("loss above its start", {"first_loss": -1.0}, "loss/eval", -0.96, -0.94),  # robust: 5% of 1 above -1 is -0.95
    ("nothing learned", {"diagnosis/chosen_log_ratio_per_token": 0.0, "loss/eval": 0.693},
     "diagnosis/rejected_log_ratio_per_token", -0.001, -0.00099),
    ("nothing learned", STILL, "loss/eval", 0.6896, 0.68967),  # 0.6931 * 0.995 = 0.68963
    ("nothing learned", STILL | {"loss/eval": 0.693}, "warmup_share", 0.5, 0.49),
    ("nothing learned", SAME_LOSS, "loss/eval", 0.6896, 0.68967),
    ("nothing learned", SAME_LOSS, "pairs", 1, 0),
    ("nothing learned", SAME_LOSS, "warmup_share", 0.5, 0.49),
    ("warmup too long", STILL | {"loss/eval": 0.693}, "warmup_share", 0.49, 0.5),
    ("warmup too long", STILL | {"warmup_share": 1.0}, "loss/eval", 0.6896, 0.68967),
    ("warmup too long", SAME_LOSS | {"warmup_share": 1.0, "pairs": 5, "diagnosis/chosen_log_ratio_per_token": 0.0},
     "diagnosis/rejected_log_ratio_per_token", -0.001, -0.00099),
    ("warmup too long", SAME_LOSS, "warmup_share", 0.49, 0.5),
    ("warmup too long", SAME_LOSS | {"warmup_share": 1.0}, "loss/eval", 0.6896, 0.68967),
    ("warmup too long", SAME_LOSS | {"warmup_share": 1.0}, "pairs", 1, 0),
    ("no preference learned", STILL | {"diagnosis/accuracy_low": 0.4}, "diagnosis/rejected_log_ratio_per_token",
     -0.00099, -0.001),
    ("no preference learned", {}, "diagnosis/accuracy_low", 0.501, 0.5),
    ("no preference learned", {"diagnosis/accuracy_low": 0.4}, "pairs", 49, 50),
    ("swapped labels", {"diagnosis/accuracy_low": 0.3}, "diagnosis/accuracy_high", 0.5, 0.499),
    ("swapped labels", {"diagnosis/accuracy_high": 0.1}, "pairs", 9, 10),
    ("swapped labels", STILL | {"diagnosis/accuracy_high": 0.1}, "diagnosis/rejected_log_ratio_per_token", 9e-4, 1e-3),
    ("no preference learned", {"diagnosis/accuracy_low": 0.4}, "diagnosis/accuracy_high", 0.499, 0.5),
    ("likelihood displacement", {"diagnosis/chosen_log_ratio_per_token": -0.2}, "diagnosis/displaced", 0.59, 0.6),
    ("likelihood displacement", {"diagnosis/displaced": 0.6}, "diagnosis/chosen_log_ratio_per_token", -0.19, -0.2),
    # Samples of 40 tokens: the reference's have 40 - d; 9.3 / 30.7 = 0.303, 9.2 / 30.8 = 0.299
    ("length exploitation", {"diagnosis/length_correlation": 0.4}, "diagnosis/sample_length_difference", 9.2, 9.3),
    # -17.2 / 57.2 = -0.301, -17.1 / 57.1 = -0.299
    ("length exploitation", {"diagnosis/length_correlation": -0.4}, "diagnosis/sample_length_difference", -17.1, -17.2),
    ("length exploitation", {"diagnosis/sample_length_difference": 20.0}, "diagnosis/length_correlation", 0.39, 0.4),
    ("length exploitation", {"diagnosis/sample_length_difference": -20.0}, "diagnosis/length_correlation", 0.39, 0.4),
    ("length exploitation", {"accuracy_equal_length": 0.5}, "diagnosis/length_correlation", 0.39, 0.4),
    ("length exploitation", LENGTH | {"diagnosis/sample_length_difference": 20.0}, "pairs", 49, 50),
    ("length exploitation", LENGTH | {"diagnosis/sample_length_difference": -20.0}, "pairs", 49, 50),
    ("length exploitation", LENGTH, "accuracy_equal_length", 0.58, 0.56),
    ("label noise", {"undecided_share": 0.04}, "flipped_share", 0.059, 0.061),  # 1.5 * 0.04
    ("label noise", {"undecided_share": 0.0}, "flipped_share", 0.049, 0.05),
    ("label noise", {"undecided_share": 0.1, "flipped_share": 0.2}, "rewards_eval/accuracies", 0.59, 0.6),
    ("label noise", {"undecided_share": 0.1, "flipped_share": 0.2}, "pairs", 49, 50),
    ("memorization", {"train_accuracy": 1.0}, "pairs", 49, 50),
    ("memorization", {"confidence": 0.95}, "pairs", 49, 50),
    ("memorization", {"train_accuracy": 1.0}, "diagnosis/accuracy_high", 0.901, 0.899),
    ("memorization", {}, "train_accuracy", 0.949, 0.95),
    ("memorization", {}, "confidence", 0.877, 0.879),  # 0.778 + 0.1
    ("unfinished samples", {"diagnosis/reference_finished": 0.5}, "diagnosis/finished", 0.5, 0.499),
    ("unfinished samples", {"diagnosis/reference_finished": 0.4, "diagnosis/finished": 0.4}, "samples", 7, 8),
    # 500 of 1,000 of the reference's: at least 46.91%. 388: at most 41.86%, 5.05 points below; 389: 4.95 points below.
    ("unfinished samples", {"samples": 1000, "diagnosis/reference_finished": 0.5}, "diagnosis/finished", 0.388, 0.389),
    ("empty samples", {"empty_samples": 0.5}, "samples", 7, 8),
    ("empty samples", {}, "empty_samples", 0.19, 0.2),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "others", "figure", "before", "at"), EDGES)
def test_a_rule_applies_from_its_edge_on(rule, others, figure, before, at):
    assert rule not in names(HEALTHY | others | {figure: before})
    if at is not None:
        assert rule in names(HEALTHY | others | {figure: at})


def test_every_rule_has_a_tested_edge():
    assert {rule for rule, *_ in EDGES} == {rule.name for rule in RUN_RULES}


def test_a_healthy_run_shows_nothing_and_neither_do_unknown_or_undefined_figures():
    assert findings(HEALTHY) == [] and findings(SFT) == [] and findings({}) == []
    assert findings(dict.fromkeys(HEALTHY, float("nan"))) == []


def test_sft_that_left_the_loss_where_it_was_learned_nothing():
    assert names(SFT | {"loss/eval": 3.19}) == ["nothing learned"]  # 0.3% lower
    assert names(SFT | {"loss/eval": 3.18}) == []  # 0.6%
    assert names(SFT | {"loss/eval": 3.19, "warmup_share": 7.5}) == ["warmup too long"]


def test_before_the_first_update_nothing_can_have_been_learned():
    start = HEALTHY | STILL | {"updates": 0, "loss/eval": 0.6931}
    assert findings(start) == [] and verdict(start) == "Nothing has been trained yet."


def test_a_finding_has_the_figure_the_log_the_first_advice_and_no_text_its_period():
    (finding,) = findings(HEALTHY | {"diagnosis/finished": 0.25})
    assert str(finding) == ("over-optimization: 25% of the samples end, 100% of the reference's. Try a lower lr.")
    for rule in RULES:
        assert not any(text.endswith(".") for text in (rule.cause, rule.advice, rule.source)), rule.name
        assert re.search(r"arXiv \d{4}\.\d{5}|docs/\w+\.md", rule.source), rule.name


def test_sections_that_rules_and_figures_name_exist():
    named = {place for rule in RULES for place in re.findall(r"docs/[\w.#-]+", rule.source)}
    named |= {meaning.rpartition("(")[2].rstrip(")") for meaning in FIGURES.values()}
    for place in named:
        path, _, section = place.partition("#")
        headings = re.findall(r"^#+ (.*)", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        assert not section or section in [heading.lower().replace(" ", "-") for heading in headings], place


def test_samples_of_sft_are_judged_without_a_reference():
    assert names(SFT | {"diagnosis/finished": 0.4}) == ["unfinished samples"]


def test_nothing_is_said_of_an_unknown_figure():
    assert case("x > 0", "x is {x}, y {y:.0f}")({"x": 1}) is None


def test_several_symptoms_of_a_rule_are_one_finding():
    both = any_of(case("x >= 1", "x is {x:.1f}"), case("y < 0 and x >= 0", "y is {y:.0%}"))
    assert both({"x": 1, "y": -1}) == "x is 1.0; y is -100%" and both({"x": 0, "y": -1}) == "y is -100%"
    assert both({"x": 0, "y": 0}) is None and both({"y": -1}) is None
    rules = (Rule("b", case("y < 0", "low"), "", "", ""), Rule("a", both, "", "", ""))
    assert [finding.rule.name for finding in findings({"x": 1, "y": -1}, rules)] == ["b", "a"]


def test_every_figure_that_a_rule_reads_is_explained():
    """Conditions and sentences may use nothing else: a misspelt name would be unknown forever, and show nothing."""
    source = (ROOT / "dpo" / "reporting" / "findings.py").read_text(encoding="utf-8")
    table = source[source.index("MODEL_RULES = (") : source.index("def findings")]
    read = set(re.findall(r'"(?:[\w/. <>=-]+ and )?([\w/]+) [<>]=? ', table))
    read |= {
        name for text in re.findall(r'"([^"]* and [^"]*)"', table) for name in re.findall(r"([\w/]+) [<>]=? ", text)
    }
    read |= set(re.findall(r"\{([\w/]+)[:}]", table))
    derived = source[source.index("def finished_gap") : source.index("OPERATORS")]
    read |= set(re.findall(r'f\["([\w/]+)"\]', derived))
    known = {re.sub(r"_eval/|/eval$|_stderr$", lambda m: "/" if m[0] == "_eval/" else "", name) for name in read}
    assert len(read) > 40 and known - FIGURES.keys() - DERIVED.keys() == set()


# The verdict


def test_the_verdict_of_a_run_that_learned():
    assert verdict(HEALTHY) == (
        "Learned the preference: 72% [65%, 78%] of 200 held-out pairs are ranked as labelled, KL 4.1 nats per "
        "response. No fault found."
    )


def test_the_verdict_names_faults_that_do_not_outweigh_the_accuracy():
    assert verdict(HEALTHY | {"train_accuracy": 1.0}).endswith(" nats per response. Found: memorization.")


def test_the_verdict_begins_with_a_fault_that_outweighs_the_accuracy():
    text = verdict(HEALTHY | {"diagnosis/finished": 0.25, "train_accuracy": 1.0})
    assert text.startswith("The text fell apart: 25% of the samples end, 100% of the reference's. 72% [65%, 78%] of ")
    assert text.endswith(" Also found: memorization.") and "Learned" not in text


def test_full_accuracy_on_two_pairs_is_no_success():
    """Wilson's interval of 2 of 2 is 34% to 100%; of 9 of 9 it is 70% to 100%, and still of too few pairs."""
    two = {"rewards_eval/accuracies": 1.0, "diagnosis/accuracy_low": 0.342, "diagnosis/accuracy_high": 1.0, "pairs": 2}
    assert verdict(HEALTHY | two) == (
        "2 pairs say nothing: 100% [34%, 100%] are ranked as labelled, which can be chance. Evaluate 50 or more."
    )
    assert "Learned" not in verdict(HEALTHY | two | {"pairs": 9, "diagnosis/accuracy_low": 0.7})
    ten = verdict(HEALTHY | two | {"pairs": 10, "diagnosis/accuracy_low": 0.72})
    assert ten.startswith("Learned the preference: 100% [72%, 100%] of only 10 held-out pairs")


def test_chance_is_not_called_learned():
    text = verdict(HEALTHY | {"diagnosis/accuracy_low": 0.49})
    assert text.startswith("The preference was not learned: the policy moved") and "Learned" not in text


def test_without_pairs_the_verdict_compares_losses():
    assert verdict(SFT) == "The evaluation loss went from 3.2 to 1.5. No fault found."
    assert verdict({"loss/eval": 1.5}) == "The evaluation loss is 1.5. No fault found."
    assert verdict({}) == "There was no evaluation. No fault found."
    assert verdict(SFT | {"stopped": 1}).endswith(" 1.5. A condition of stop_if ended the run.")


# Figures


def pair(margin, chosen=10, rejected=20):
    return {"examples": 8, "source": "mine", "row": 0, "rewards/margins": margin, "lengths/chosen": chosen,
            "lengths/rejected": rejected}  # fmt: skip


def test_figures_of_pairs_tell_flipped_labels_from_hard_pairs():
    """Medians of abs are 2, so m is 1: one of eight is below -1, two are from -1 to 1."""
    margins = [2.0, 2.0, 2.0, 2.0, 3.0, -2.0, 1.0, -1.0]
    figures = figures_of_pairs([pair(margin) for margin in margins])
    assert (figures["pairs"], figures["flipped_share"], figures["undecided_share"]) == (8, 1 / 8, 2 / 8)
    assert "accuracy_equal_length" not in figures  # all lengths differ
    assert figures_of_pairs([]) == {"pairs": 0} and figures_of_pairs([pair(0.0)] * 3) == {"pairs": 3}
    assert figures_of_pairs([pair("nan"), pair(1.0)]) == {"pairs": 2}
    assert figures_of_pairs([pair(0.0, 5, 5), pair(1e9)])["confidence"] == 0.75  # sigmoid(0) and sigmoid(1e9)


def test_the_accuracy_at_equal_length_needs_ten_pairs_whose_lengths_differ_by_a_tenth_or_less():
    near = [pair(1.0, 18, 20)] * 6 + [pair(-1.0, 20, 18)] * 4
    assert figures_of_pairs([*near, pair(1.0, 17, 20)])["accuracy_equal_length"] == 0.6
    assert "accuracy_equal_length" not in figures_of_pairs(near[1:])


def test_derived_figures_are_unknown_where_what_they_need_is():
    assert with_derived(HEALTHY)["loss_rise"] == pytest.approx((0.6 - 0.6931) / 0.6931)
    for first_loss in ({}, {"first_loss": 0.0}, {"first_loss": float("nan")}):
        known = with_derived({"loss/eval": 1.0} | first_loss)
        assert "loss_rise" not in known and known["loss/eval"] == 1.0


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_run(folder, n_updates=20):
    """Write a run of updates of 8 pairs with two evaluations; the last two updates have accuracies 0.5 and 1."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text("exp_name: mine\n")
    evaluated = {"loss/eval": 0.7, "rewards_eval/accuracies": 0.0, "diagnosis/entropy_per_token": 2.0,
                 "diagnosis/chosen_log_ratio_per_token": -0.5}  # fmt: skip
    rows = [{"examples": 0, "updates": 0} | evaluated]
    for n in range(1, n_updates + 1):
        accuracy = {n_updates: 1.0, n_updates - 1: 0.5}.get(n, 0.25)
        rows.append({"examples": 8 * n, "updates": n, "loss/train": 0.6, "rewards_train/accuracies": accuracy})
    last = {"examples": 8 * n_updates, "updates": n_updates, "loss/eval": 0.5, "diagnosis/kl": None}
    write_lines(folder / "metrics.jsonl", [*rows, last])
    write_lines(folder / "pairs.jsonl", [pair(9.0) | {"examples": 0}] * 5 + [pair(1.0) | {"examples": 160}] * 3)
    samples = [{"examples": n, "model": model, "prompt": "Hi", "sample": text}
               for n, model, text in ((0, "policy", ""), (160, "policy", "a"), (160, "policy", " \n"),
                                      (160, "reference", ""))]  # fmt: skip
    write_lines(folder / "samples.jsonl", samples)
    return RunFiles(folder)


def test_the_figures_of_a_run_are_those_of_its_newest_evaluation_and_of_its_start(tmp_path):
    figures = figures_of_run(write_run(tmp_path))
    expected = {"loss/eval": 0.5, "first_loss": 0.7, "first_entropy_per_token": 2.0, "first_log_ratio": 0.5}
    expected |= {"updates": 20, "pairs": 3, "samples": 2, "empty_samples": 0.5}
    assert expected.items() <= figures.items() and "diagnosis/kl" not in figures


def test_the_training_accuracy_is_that_of_the_last_50_pairs_or_the_last_tenth(tmp_path):
    """Of 160 pairs those after 110, 7 updates: (5 * 0.25 + 0.5 + 1) / 7. Of 800 the last 80: (8 * 0.25 + 1.5) / 10."""
    assert figures_of_run(write_run(tmp_path))["train_accuracy"] == pytest.approx(2.75 / 7)
    assert figures_of_run(write_run(tmp_path, n_updates=100))["train_accuracy"] == pytest.approx(0.35)


def test_a_run_that_was_not_evaluated_before_its_first_update_has_no_figures_of_its_start(tmp_path):
    run = write_run(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[1:]))
    assert not any(name.startswith("first_") for name in figures_of_run(run))
    assert figures_of_run(RunFiles(tmp_path / "none")) == {"updates": 0, "stopped": 0, "pairs": 0}


def test_a_warmup_of_150_with_20_updates_is_the_cause_that_the_log_names(tmp_path, capsys):
    run = write_run(tmp_path)
    (tmp_path / "config.yaml").write_text("exp_name: mine\nwarmup_steps: 150\n")
    rows = [{"examples": n, "updates": n // 8, "loss/eval": loss} for n, loss in ((0, 3.2), (160, 3.199))]
    write_lines(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "pairs.jsonl").unlink()
    log_verdict(run)
    assert figures_of_run(RunFiles(tmp_path))["warmup_share"] == 7.5
    assert capsys.readouterr().out.splitlines()[1:] == [
        "Verdict: Almost nothing was learned: the loss changed by 0.03%. The evaluation loss went from 3.2 to 3.199.",
        "Finding: warmup too long: the learning rate is still rising for most of the run. Try warmup_steps of a tenth "
        "of the updates.",
    ]


# The log and the page


def test_the_log_ends_with_the_verdict_the_warnings_and_the_findings(tmp_path, capsys):
    run = write_run(tmp_path)
    (tmp_path / "warnings.json").write_text('["too few"]')
    log_verdict(run)
    assert capsys.readouterr().out.splitlines() == [
        "",
        "Verdict: The evaluation loss went from 0.7 to 0.5. Found: reference is not the start.",
        "Warning: too few",
        "Finding: reference is not the start: before the first update, policy and reference differed by 0.5 nats per "
        "token. Try reference=start.",
    ]


def test_a_verdict_that_fails_is_only_printed(tmp_path, capsys):
    write_run(tmp_path)
    (tmp_path / "warnings.json").write_text("[")
    log_verdict(RunFiles(tmp_path))
    assert "There is no verdict (" in capsys.readouterr().out


def test_the_page_shows_the_verdict_and_each_finding_with_cause_advice_and_source(tmp_path):
    run = write_run(tmp_path)
    text = page([run])
    (finding,) = findings(figures_of_run(run))
    assert verdict(figures_of_run(run)) in text and finding.text in text
    assert all(part in text for part in (finding.rule.cause, finding.rule.source, "reference=start; model.archive"))
    assert "Verdict" not in page([run, run]) and finding.text not in page([run, run])


def test_a_warning_has_one_form_in_color_on_a_terminal_and_escapes_what_it_names(monkeypatch, capsys):
    log_warning("row \x1b[2J is bad.")
    assert capsys.readouterr().out == "Warning: row \\x1b[2J is bad.\n" and not in_color()
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    log_warning("row \x1b[2J is bad.")
    assert capsys.readouterr().out == "\x1b[33mWarning: row \\x1b[2J is bad.\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert not in_color()


def test_the_rules_are_imported_without_anything_slow():
    code = "import sys, dpo.reporting.findings; print(*({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
