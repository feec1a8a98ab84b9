"""The table of metrics against what a run records, and against the documentation."""

import json
import re

import pytest
from conftest import ROOT

from dpo.reporting.metric_table import CONSOLE, METRICS, PAIR_COLUMNS, interval, record_name

PAGES = "".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in ("metrics", "report"))


def is_documented(name):
    """Tell whether docs/metrics.md or docs/report.md names a metric, in any split and without diagnosis/."""
    name = re.sub(r"^(\w+)_(train|eval)/", r"\1/", name)
    name = re.sub(r"/(train|eval)$|_stderr$|^diagnosis/", "", name)
    return f"`{name}`" in PAGES or f"`diagnosis/{name}`" in PAGES


def test_the_names_are_those_of_the_original():
    assert [record_name(name, "eval") for name in ("loss", "rewards/chosen")] == ["loss/eval", "rewards_eval/chosen"]
    assert next(iter(CONSOLE)) == "loss/train" and "lr" in CONSOLE and "rewards/margins" in PAIR_COLUMNS


def test_every_metric_is_documented_and_every_one_of_the_table_is_recorded(make_trainer):
    settings = ("n_examples=8", "n_eval_examples=8", "sample_during_eval=true", "n_eval_model_samples=2", "debug=true")
    trainer = make_trainer("loss=dpo", *settings)
    trainer.train()
    records = [json.loads(line) for line in (trainer.run.path / "metrics.jsonl").read_text().splitlines()]
    recorded = {name for record in records for name in record} - {"examples", "updates"}
    assert [name for name in sorted(recorded | {metric.name for metric in METRICS}) if not is_documented(name)] == []
    of_others = {"rewards/desirable", "rewards/undesirable", "router_loss"}  # of labels and mixtures
    names = {metric.name for metric in METRICS} - of_others
    assert [name for name in sorted(names) if not {name, record_name(name, "eval")} & recorded] == []


def test_an_interval_is_1_96_standard_errors_or_the_one_that_was_recorded():
    assert interval({"x": 3.0, "x_stderr": 0.5}, "x") == pytest.approx((2.02, 3.98))
    assert interval({"x": 3.0}, "x") is None
    ends = {"diagnosis/accuracy_low": 0.4, "diagnosis/accuracy_high": 0.9}
    assert interval({"rewards_eval/accuracies": 0.75} | ends, "rewards_eval/accuracies") == (0.4, 0.9)
