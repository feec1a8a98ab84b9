"""The rules of figures that only a diagnosis of two models has: each at the edge of its threshold."""

import pytest

from dpo.reporting.findings import FIGURES, RULES, findings

HEALTHY = {  # as measured on the demo's healthy run
    "rewards_eval/accuracies": 1.0,
    "diagnosis/chosen_log_ratio_per_token": 0.022,
    "diagnosis/rejected_log_ratio_per_token": -0.098,
    "position/first": -1.81,
    "position/early": -0.28,
    "position/middle": -0.53,
    "position/end": -0.34,
    "position/bos": 0.0,
    "position/gap_bos": -0.4,
    "format/text": -1.96,
    "start_distance": 0.068,
    "weights_changed": 0.93,
    "weights_distance": 0.012,
    "weights_step": 0.00085,
    "lr_sum": 4.36,
    "tokenizer/round_trip": 1.0,
    "tokenizer/lost": 0.0,
    "tokenizer/same": 1.0,
    "tokenizer/other_eos": 0.0,
    "tokenizer/no_template": 0.0,
    "tokenizer/stops": 1.0,
    "adapter/fitting": 1.0,
    "adapter/active": 1.0,
}


def names(**figures):
    given = {name.replace("__", "/"): value for name, value in figures.items()}
    return [finding.rule.name for finding in findings(HEALTHY | given)]


def test_a_healthy_model_has_no_finding():
    assert names() == []


@pytest.mark.parametrize(
    ("rule", "just_right", "just_wrong"),
    [
        ("broken tokenizer", {"tokenizer__lost": 0.04}, {"tokenizer__lost": 0.05}),
        ("broken tokenizer", {"tokenizer__same": 0.95}, {"tokenizer__same": 0.94}),
        ("broken tokenizer", {"tokenizer__other_eos": 0.0}, {"tokenizer__other_eos": 1.0}),
        ("adapter not loaded", {"adapter__fitting": 1.0}, {"adapter__fitting": 0.99}),
        ("adapter not loaded", {"adapter__active": 0.01}, {"adapter__active": 0.0}),
        ("policy unchanged", {"start_distance": 2e-6}, {"start_distance": 1e-6}),
        (
            "updates rounded away",
            {"weights_changed": 0.1, "start_distance": 0.009},
            {"weights_changed": 0.09, "start_distance": 0.009},
        ),
        (
            "updates rounded away",
            {"weights_changed": 0.09, "start_distance": 0.01},
            {"weights_changed": 0.01, "start_distance": 0.009},
        ),
        (
            "another reference",
            {"weights_distance": 0.49, "start_distance": 1},
            {"weights_distance": 0.5, "start_distance": 1},
        ),
        (
            "another reference",
            {"weights_distance": 0.2, "start_distance": 0.31, "weights_changed": 1.0},
            {"weights_distance": 0.2, "start_distance": 0.3, "weights_changed": 0.99},
        ),
        (
            "another reference",
            {"weights_distance": 0.2, "start_distance": 0.1, "weights_changed": 0.98},
            {"weights_distance": 0.1, "start_distance": 0.1, "weights_changed": 1.0},
        ),
        ("another reference", {"weights_step": 0.0299, "lr_sum": 0.01}, {"weights_step": 0.0301, "lr_sum": 0.01}),
        (
            "another reference",
            {"diagnosis__chosen_log_ratio_per_token": 0.3, "diagnosis__rejected_log_ratio_per_token": 0.09},
            {"diagnosis__chosen_log_ratio_per_token": 0.1, "diagnosis__rejected_log_ratio_per_token": 0.1},
        ),
        ("another prompt format", {"format__chat_first": 0.9}, {"format__chat_first": 1.0}),
        ("another prompt format", {"format__chat": 0.24}, {"format__chat": 0.25}),
        ("another prompt format", {"format__hh_first": 0.9}, {"format__hh_first": 1.0}),
        ("another prompt format", {"format__hh": 0.24}, {"format__hh": 0.25}),
        ("another prompt format", {"format__text_first": 0.9}, {"format__text_first": 1.0}),
        ("another prompt format", {"format__text": 0.24}, {"format__text": 0.25}),
        ("BOS", {"position__bos": 1.0}, {"position__bos": 1.1}),
        ("BOS", {"position__gap_bos": 0.04}, {"position__gap_bos": 0.05}),
        ("BOS", {"position__bos": 1.0, "position__gap_bos": 0.04}, {"position__bos": 1.0, "position__gap_bos": 0.05}),
        ("unknown end of turn", {"position__end": -4.52}, {"position__end": -4.54}),
        ("generation does not stop", {"tokenizer__stops": 1.0}, {"tokenizer__stops": 0.5}),
        ("generation does not stop", {"tokenizer__no_template": 0.0}, {"tokenizer__no_template": 1.0}),
    ],
)
def test_a_rule_applies_from_its_threshold_on(rule, just_right, just_wrong):
    assert rule not in names(**just_right)
    assert names(**just_wrong) == [rule]


def test_a_rule_without_its_figures_says_nothing():
    assert findings({"rewards_eval/accuracies": 1.0}) == []


def test_each_figure_is_explained_and_each_rule_has_a_source():
    assert {*HEALTHY} <= {*FIGURES, "rewards_eval/accuracies"}
    assert all(rule.cause and rule.advice and rule.source for rule in RULES)
