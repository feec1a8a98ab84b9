"""The demo: its data set and judge, its real settings, what it prints, and its figure."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from conftest import ROOT
from faults import command_line, rounds_line, run_code

from dpo.data import film_reviews
from dpo.reporting.page import CURVES, RunFiles
from dpo.system.devices import computes_bfloat16_natively
from tools import demo
from tools.rounds import demo as rounds_demo

WARM, COLD = (film_reviews.make_rows("test")[0][side] for side in ("chosen", "rejected"))


# The real settings


def train_demo(base: Path, *extra: str) -> demo.DemoResult:
    """Run the demo's two stages with its real settings and some more, on one thread; return what they reached."""
    for stage in demo.STAGES:
        done = command_line(base / stage, (*demo.overrides(stage, base), *extra))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return demo.DemoResult.read(base / "dpo")


def test_the_demo_makes_a_policy_that_writes_whole_warm_reviews(tmp_path, counts, report, monkeypatch):
    native = computes_bfloat16_natively(torch.device("cpu"))  # emulated, it takes hours
    soak = itertools.product(range(10), ["float32", "bfloat16"] if native else ["float32"])
    for seed, precision in counts([(0, "float32")], soak):
        base = tmp_path / f"{seed}-{precision}"
        result = train_demo(base, f"seed={seed}", f"precision={precision}")
        numbers = " and ".join(f"{dict(result.counts(model))} ({name})" for model, name in demo.MODELS.items())
        report(f"demo, seed {seed}, {precision}: {numbers}; {result.accuracy:.3f}, {result.margin:.2f}")
        assert result.problems() == []
        assert result.accuracy >= 0.95
        records = RunFiles(base / "dpo").metrics
        evaluations = [record["examples"] for record in records if "loss/eval" in record]
        assert evaluations == [0, 512, 1024, 1504, 1984]  # the first updates of 32 at or after each 500; the end
        page = (base / "dpo" / "report.html").read_text(encoding="utf-8")
        assert page.count("<svg") == len(CURVES) + 1  # all are curves, and a chart of the pairs, which are equally long
        assert 0.35 <= result.share("reference", "warm") <= 0.65  # DPO starts from a model that writes both kinds
        check_rounds(base, report, f"seed={seed}", f"precision={precision}")
    monkeypatch.chdir(ROOT)
    ask, draw = re.findall(r"^  (\S.*)$", demo.next_steps(base), re.MULTILINE)
    python, flag, code = shlex.split(ask)
    assert (os.path.abspath(python), flag) == (os.path.abspath(sys.executable), "-c")
    done = run_code(code, ROOT)
    assert done.returncode == 0 and "How was The Golden Harbour" in done.stdout, done.stderr
    draw = draw.replace("demo.svg", str(tmp_path / "demo.svg"))
    done = subprocess.run(["bash", "-c", draw], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "demo.svg").stat().st_size > 1000, draw + done.stderr


def check_rounds(base: Path, report, *extra: str) -> None:
    """Run the rounds of `make demo-rounds` from the demo's SFT model."""
    _, (_, _, *arguments) = rounds_demo.commands(base, *extra)
    done = rounds_line(ROOT, tuple(arguments))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    counts = rounds_demo.counts(base / "rounds")
    report(f"demo-rounds, {', '.join(extra)}: {counts}")
    assert len(counts) == 3 and rounds_demo.problems(counts) == []
    shown = rounds_demo.summary(counts, base / "rounds")
    assert f"{'round 2':12}{''.join(f'{n:8}' for n in counts[2].values())}\n" in shown and "FAILED" not in shown
    assert (base / "rounds" / "best" / "model.safetensors").is_file()


ROUNDS = {  # warm, cold and broken samples of the SFT model and of the last round, and what is wrong
    "rounds that are good": ((97, 98, 5), (170, 15, 15), []),
    "too few warm samples": ((97, 98, 5), (169, 31, 0), ["84.5% are warm"]),
    "too many broken samples": ((97, 98, 5), (180, 4, 16), ["has 16 broken samples, the SFT model 5"]),
}


@pytest.mark.parametrize("kind", ROUNDS)
def test_the_demo_of_rounds_fails_for(kind):
    first, last, expected = ROUNDS[kind]
    counts = [dict(zip(demo.VERDICTS, numbers, strict=True)) for numbers in (first, last)]
    found = rounds_demo.problems(counts)
    assert len(found) == len(expected) and all(part in line for part, line in zip(expected, found, strict=True))
    assert rounds_demo.summary(counts, Path("out")).count("FAILED: ") == len(expected)


# What is printed


def write_run(folder: Path, policy: list[str], reference: list[str]) -> Path:
    """Write the files of a DPO run whose models gave these samples to the same prompts."""
    folder.mkdir(parents=True)
    records = [{"rewards_train/accuracies": 0.0}, {"rewards_train/accuracies": 1.0}]
    records += [{"loss/eval": 0.1, "rewards_eval/accuracies": 0.995, "rewards_eval/margins": 2.1}]
    samples = [("policy", [COLD] * len(policy)), ("policy", policy), ("reference", reference)]  # the last ones count
    rows = [{"model": m, "prompt": f"p{i}", "sample": s} for m, texts in samples for i, s in enumerate(texts)]
    for name, lines in (("metrics.jsonl", records), ("samples.jsonl", rows)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


REFERENCE = [WARM] * 9 + [COLD] * 10 + ["film film"]
RUNS = {  # samples of the policy, how many are warm, cold and broken, and what its failures say
    "a policy that is good": ([WARM] * 17 + [COLD] + ["film"] * 2, [17, 1, 2], []),
    "a policy with too few warm samples": ([WARM] * 16 + [COLD] * 3 + ["film"], [16, 3, 1], ["80.0% are warm"]),
    "a policy that breaks more": (
        [WARM] * 17 + ["film"] * 3,
        [17, 0, 3],
        ["broken samples than the SFT model: 15.0%"],
    ),
    "a policy that collapsed": (["Film film film!"] * 20, [0, 0, 20], ["0.0% are warm", "100.0%, 5.0% before"]),
}


@pytest.mark.parametrize("kind", RUNS)
def test_the_summary_counts_broken_samples_as_failures_for(kind, tmp_path):
    policy, numbers, failures = RUNS[kind]
    result = demo.DemoResult.read(write_run(tmp_path / "dpo", policy, REFERENCE))
    printed = demo.summary(result)
    assert len(result.problems()) == len(failures) == printed.count("FAILED: ")
    for problem, part in zip(result.problems(), failures, strict=True):
        assert part in problem and f"FAILED: {problem}" in printed
    assert f"{'SFT model':12}{9:8}{10:8}{1:8}\n" in printed
    assert f"{'DPO policy':12}{''.join(f'{number:8}' for number in numbers)}\n" in printed
    assert "reward accuracy 0.995, reward margin 2.10" in printed and "neither" not in printed


@pytest.mark.parametrize("kind", RUNS)
def test_the_demo_exits_with_1_if_and_only_if_its_policy_is_not_good(kind, tmp_path, monkeypatch, capsys):
    policy, _, failures = RUNS[kind]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "train", lambda base: write_run(base / "dpo", policy, REFERENCE) and 0)
    assert demo.main([]) == (1 if failures else 0)
    assert "Result: one sample for each of 20 held-out prompts" in capsys.readouterr().out


def test_the_demo_exits_with_the_code_of_a_training_that_failed(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(demo, "STAGES", {"sft": ["loss=sft", "lr=0"], "dpo": ["loss=dpo"]})
    monkeypatch.chdir(tmp_path)
    assert demo.main([]) == 2
    assert "lr=0: must be a number above 0" in capfd.readouterr().err


def test_commands_of_the_demo_find_modules_of_the_project_and_those_that_the_user_added(monkeypatch, tmp_path):
    folder = tmp_path / "user"
    folder.mkdir()
    (folder / "added.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.chdir(tmp_path)
    assert demo.run_commands([["-c", "import added, utils"]]) == 0


# The figure


def texts(path):
    """Return the texts of an SVG."""
    return [element.text for element in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


def bars(path):
    """Return the numbers in the bars: of SFT model and policy, first the warm samples, then cold, then broken ones."""
    numbers = [int(text) for text in texts(path) if text.isdecimal()][:6]
    return numbers[::2], numbers[1::2]


def test_the_figure_shows_the_counts_and_the_accuracy(tmp_path):
    policy, numbers, _ = RUNS["a policy that breaks more"]
    write_run(tmp_path / "dpo", policy, REFERENCE)
    assert demo.main(["--figure", str(tmp_path / "demo.svg"), str(tmp_path)]) == 0
    assert bars(tmp_path / "demo.svg") == ([9, 10, 1], numbers)
    expected = {"SFT model", "DPO policy", "20 samples", "2 updates; held out 0.995", "Reward accuracy", *demo.VERDICTS}
    assert expected <= set(texts(tmp_path / "demo.svg"))


def test_the_figure_of_the_readme_is_drawn_from_a_run_that_is_good():
    _, (warm, cold, broken) = bars(ROOT / "docs" / "demo.svg")
    assert warm + cold + broken == 200 and warm >= 200 * demo.MIN_WARM
