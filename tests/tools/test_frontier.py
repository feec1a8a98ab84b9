"""The runs of a sweep side by side: a line for each, and curves of reward against KL."""

import json
import re
import shlex
import sys
from xml.etree import ElementTree

import pytest
import yaml

from dpo.reporting.figures import COLORS
from dpo.reporting.page import RunFiles
from dpo.system.errors import UserError
from tools import frontier
from tools.frontier import close_sweep, curves, labels, points, summary, win_rates


def write_run(folder, beta, kl=(0.0, 2.0, 5.0), seed=0, samples=()):
    """Write a run with an evaluation before, during and after its training; kl None: none was recorded."""
    folder.mkdir(parents=True)
    config = {"exp_name": folder.name, "local_run_dir": str(folder), "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"loss": {"name": "dpo", "beta": beta}}))
    records = []
    for n, (value, accuracy) in enumerate(zip(kl or (None, None, None), (0.0, 0.6, 0.75), strict=True)):
        records.append({"examples": 8 * n, "updates": n, "loss/train": 0.5})
        evaluation = {"loss/eval": 0.7 - 0.1 * n, "rewards_eval/accuracies": accuracy, "rewards_eval/margins": beta * n}
        evaluation |= {"rewards_eval/chosen": -0.25 * n} | ({"diagnosis/kl": value} if kl else {})
        records.append({"examples": 8 * n, "updates": n} | evaluation)
    for name, rows in (("metrics", records), ("samples", samples)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return RunFiles(folder)


def test_each_run_has_a_line_with_the_figures_of_its_last_evaluation(tmp_path):
    runs = [write_run(tmp_path / "loss.beta=0.1", 0.1), write_run(tmp_path / "loss.beta=0.5", 0.5, kl=None)]
    assert summary(runs) == [
        "loss.beta=0.1: loss/eval 0.5, rewards_eval/accuracies 0.75, rewards_eval/margins 0.2, diagnosis/kl 5",
        "loss.beta=0.5: loss/eval 0.5, rewards_eval/accuracies 0.75, rewards_eval/margins 1",
    ]
    (tmp_path / "loss.beta=0.1" / "metrics.jsonl").write_text("")
    assert summary([RunFiles(tmp_path / "loss.beta=0.1")]) == ["loss.beta=0.1: no evaluation"]


def test_a_curve_is_named_by_what_was_swept_and_seeds_share_a_name(tmp_path):
    runs = [write_run(tmp_path / f"{beta}-{seed}", beta, seed=seed) for beta in (0.1, 0.5) for seed in (0, 1)]
    assert labels(runs) == ["loss.beta=0.1"] * 2 + ["loss.beta=0.5"] * 2
    assert labels(runs[:2]) == ["0.1-0", "0.1-1"]
    assert labels(runs[:1]) == ["0.1-0"]
    long = write_run(tmp_path / "long", 0.1)
    (long.path / "config.yaml").write_text(f"exp_name: long\nmodel: {{name_or_path: {'x' * 50}}}\n")
    assert labels([runs[0], RunFiles(long.path)]) == ["0.1-0", "long"]  # a legend has no room for more


def test_points_are_the_evaluations_in_their_order(tmp_path):
    run = write_run(tmp_path / "run", 0.1, kl=(0.0, 3.0, 2.0))
    found = points(run, "rewards_eval/accuracies")
    assert [(point.kl, point.value) for point in found] == [(0.0, 0.0), (3.0, 0.6), (2.0, 0.75)]
    assert {(point.kl_ends, point.ends) for point in found} == {(None, None)}  # of an earlier version


def test_points_have_the_95_percent_intervals_of_both_axes(tmp_path):
    """Wilson's of the accuracy, as recorded; 1.96 standard errors of KL and margin, which is 1 for margins 1, 3."""
    run = write_run(tmp_path / "run", 0.1)
    ends = {"diagnosis/kl_stderr": 0.5, "diagnosis/accuracy_low": 0.41, "diagnosis/accuracy_high": 0.93}
    evaluation = {"loss/eval": 0.1, "rewards_eval/accuracies": 0.75, "rewards_eval/margins": 2.0, "diagnosis/kl": 6.0}
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"examples": 24, "updates": 3} | evaluation | ends) + "\n")
    pairs = [{"examples": n, "rewards/margins": margin} for n, margin in ((16, 9), (24, 1.0), (24, 3.0))]
    (run.path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run = RunFiles(run.path)
    accuracy, margin = (points(run, f"rewards_eval/{name}")[-1] for name in ("accuracies", "margins"))
    assert accuracy.kl_ends == margin.kl_ends == pytest.approx((6 - 0.98, 6 + 0.98), abs=1e-3)
    assert accuracy.ends == (0.41, 0.93) and margin.ends == pytest.approx((2 - 1.96, 2 + 1.96), abs=1e-3)
    (line,) = next(iter(curves([run]).values()))
    assert (line.x_band[1][-1], line.band[1][-1]) == (pytest.approx(6.98, abs=1e-3), 0.93)
    assert (line.x_band[0][0], line.band[0][0]) == (0.0, 0.0)  # not known


def test_the_page_has_a_curve_per_value_of_the_swept_setting(tmp_path, capsys):
    runs = [write_run(tmp_path / f"loss.beta={beta}", beta) for beta in (0.1, 0.5)]
    close_sweep(tmp_path, [run.path for run in runs])
    page = (tmp_path / "frontier.html").read_text()
    assert re.findall(r'aria-label="([^"]*)"', page)[:2] == ["Reward accuracy", "Reward margin"]
    for chart in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        assert [label for label in ("loss.beta=0.1", "loss.beta=0.5") if f">{label}<" in chart] == labels(runs)
    assert page.count(">KL to the reference, nats per response<") == 2
    assert "<script" not in page and len(page) < 200_000
    out = capsys.readouterr().out
    assert (
        out.splitlines()[1].startswith("loss.beta=0.1: loss/eval 0.5") and f"Wrote {tmp_path / 'frontier.html'}" in out
    )


def test_the_first_chart_is_a_file_of_its_own_which_needs_no_page(tmp_path, capsys):
    runs = [write_run(tmp_path / f"loss.beta={beta}", beta) for beta in (0.1, 0.5)]
    close_sweep(tmp_path, [run.path for run in runs], svg=tmp_path / "chart.svg")
    text = (tmp_path / "chart.svg").read_text()
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg" and root.get("aria-label") == "Reward accuracy"
    assert COLORS[0] in text and COLORS[1] in text
    assert f"Wrote {tmp_path / 'chart.svg'}" in capsys.readouterr().out


def test_a_chart_for_a_folder_that_is_not_there_is_refused_before_a_judge_is_asked(tmp_path, monkeypatch):
    write_run(tmp_path / "loss.beta=0.1", 0.1)
    monkeypatch.setattr(
        sys, "argv", ["frontier.py", str(tmp_path), "--svg", str(tmp_path / "no" / "x.svg"), "--judge", "no"]
    )
    with pytest.raises(UserError, match="--svg .*x.svg: there is no folder"):
        frontier.main()


def test_without_a_recorded_kl_nothing_is_written_and_that_is_said(tmp_path, capsys):
    runs = [write_run(tmp_path / f"loss.beta={beta}", beta, kl=None) for beta in (0.1, 0.5)]
    close_sweep(tmp_path, [run.path for run in runs])
    assert not (tmp_path / "frontier.html").exists()
    assert "No frontier.html: no evaluation recorded a KL" in capsys.readouterr().out


def test_a_sweep_that_left_no_run_says_nothing(tmp_path, capsys):
    close_sweep(tmp_path, [tmp_path / "dry"])
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_a_judge_compares_the_samples_of_policy_and_reference_at_each_evaluation(tmp_path):
    """It prefers "x". After 8 examples the policy wins on one of two prompts, and loses on none: 0.75; after 16 all.

    No samples were written before the first update.
    """
    texts = {8: ("x", "y"), 16: ("x", "x")}
    samples = [
        {"examples": n, "model": model, "prompt": prompt, "sample": text if model == "policy" else "y"}
        for n, pair in texts.items()
        for model in ("policy", "reference")
        for prompt, text in zip("pq", pair, strict=True)
    ]
    run = write_run(tmp_path / "run", 0.1, samples=samples)
    answer = "'A' if r['a'] < r['b'] else 'B' if r['a'] > r['b'] else 'tie'"
    judge = shlex.join(
        [sys.executable, "-c", f"import json, sys\nfor r in map(json.loads, sys.stdin): print({answer})"]
    )
    found = win_rates(run, judge)
    assert [(point.kl, point.value) for point in found] == [(2.0, 0.75), (5.0, 1.0)]
    assert all(point.ends[0] < point.value <= point.ends[1] for point in found)
    close_sweep(tmp_path, [run.path], judge)
    assert 'aria-label="Win rate over the reference, by the judge"' in (tmp_path / "frontier.html").read_text()


def test_the_command_line_takes_runs_or_the_folder_of_a_sweep(tmp_path, monkeypatch):
    for beta in (0.1, 0.5):
        write_run(tmp_path / "sweep" / f"loss.beta={beta}", beta)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["frontier.py", "sweep"])
    frontier.main()
    in_folder = (tmp_path / "sweep" / "frontier.html").read_text()
    monkeypatch.setattr(sys, "argv", ["frontier.py", "sweep/loss.beta=0.1", "sweep/loss.beta=0.5"])
    frontier.main()
    assert (tmp_path / "frontier.html").read_text() == in_folder
    monkeypatch.setattr(sys, "argv", ["frontier.py", str(tmp_path / "none")])
    with pytest.raises(UserError, match="none: is neither a run directory nor the folder of a sweep"):
        frontier.main()
