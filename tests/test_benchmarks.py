"""benchmarks/gpu.py and cells.py: cells in processes of their own, the tables, and each measurement on a CPU."""

import json
import sys
import time
from dataclasses import replace

import cells
import gpu
import pytest
import throughput
import torch
from cells import Cell, Place, Row, measure_missing, read_rows
from conftest import validated

from dpo.system.devices import DeviceFacts

# What stands in for a cell's process: the name says how it ends.
PROCESS = """
import sys, time
name, started = sys.argv[1:]
print("loading", name)
if "hangs" in name: time.sleep(60)
if "fails" in name: sys.exit("OutOfMemoryError: 140 GB")
print('measured {"pairs/s": 2.0, "started": %s}' % started)
"""
LIVE = gpu.Task("tiny", ("precision=float32",), pairs=4)


def cell(name: str, seconds: float = 60) -> Cell:
    """Return a cell that PROCESS stands in for."""
    return Cell("training", "task", name, lambda place: {}, seconds)


def measure(folder, seconds: float, *measured: Cell) -> dict[str, Row]:
    measure_missing(measured, folder, time.monotonic() + seconds, [sys.executable, "-c", PROCESS])
    return read_rows(folder)


def test_figures_and_errors_are_rows_and_no_later_call_measures_a_cell_that_has_one(tmp_path):
    before = time.time()
    rows = measure(tmp_path, 600, cell("fails"), cell("ends"))
    assert rows["task: fails"].error == "exit code 1: OutOfMemoryError: 140 GB"
    assert rows["task: ends"].figures["pairs/s"] == 2.0 and not rows["task: ends"].error
    assert rows["task: ends"].figures["started"] >= before
    assert "=== task: fails\nloading task: fails\nOutOfMemoryError" in (tmp_path / "log.txt").read_text()
    again = measure(tmp_path, 600, cell("fails"), cell("new"), cell("ends"))
    assert list(again) == ["task: fails", "task: ends", "task: new"] and again["task: ends"] == rows["task: ends"]


def test_a_cell_that_exceeds_its_own_limit_is_stopped_and_that_is_its_result(tmp_path):
    start = time.monotonic()
    rows = measure(tmp_path, 600, cell("hangs", 0.5))
    assert rows["task: hangs"].error.startswith("stopped after 1 s") and time.monotonic() - start < 50


def test_a_cell_that_the_end_of_a_call_stops_is_measured_again_and_one_that_does_not_fit_never_starts(tmp_path):
    assert measure(tmp_path, 1.0, cell("hangs", 0.9), cell("ends", 60)) == {}
    assert "=== task: hangs" in (tmp_path / "log.txt").read_text()
    assert "=== task: ends" not in (tmp_path / "log.txt").read_text()


def test_a_speed_is_shown_as_a_multiple_of_the_best_of_trl_for_the_same_task():
    measured = [cell("default settings"), cell("TRL, 8"), cell("TRL, 16"), cell("TRL, 64"), cell("later", 90)]
    other = replace(measured[0], task="other")
    speeds = [90.0, 20.0, 10.0]
    rows = {c.name: Row(c.name, 1.0, {"pairs/s": v}) for c, v in zip(measured, speeds, strict=False)}
    rows |= {
        "task: TRL, 64": Row("", 2.0, {}, "exit code 1: a | b"),
        "other: default settings": Row("", 1.0, {"pairs/s": 5.0}),
    }
    assert list(gpu.report([*measured[:2], other, *measured[2:]], rows)) == [
        "",
        "| what | way | pairs/s | times TRL's best |",
        "|---|---|---|---|",
        "| task | default settings | 90 | 4.5 |",
        "| task | TRL, 8 | 20 | 1 |",
        "| task | TRL, 16 | 10 | 0.5 |",
        "| task | TRL, 64 | failed: exit code 1: a / b |  |",
        "| other | default settings | 5 |  |",
        "",
        "Missing, about 2 minutes:",
        "- task: later",
    ]


def test_all_cells_have_names_of_their_own_and_settings_that_a_run_accepts(tmp_path):
    for measured in (gpu.small_cells(), gpu.gpu_cells()):
        assert len({c.name for c in measured}) == len(measured)
    trained = [c.measure for c in [*gpu.small_cells(), *gpu.gpu_cells()] if c.table == "training"]
    settings = {(*m.args[0].settings, *m.keywords.get("settings", ())) for m in trained}
    assert len(settings) > 2
    for each in settings:
        validated(*gpu.overrides(gpu.Task("tiny"), tmp_path), *each)


def test_examples_have_the_lengths_of_real_pairs_cut_to_the_limits_or_of_longer_ones():
    short, long = throughput.draw_examples(64, 100), throughput.draw_examples(64, 100, 4096, 2048, scale=8)
    lengths = [[len(example.prompt), *map(len, example.responses)] for example in short]
    assert max(prompt + max(responses) for prompt, *responses in lengths) <= 512
    assert [[len(e.prompt), *map(len, e.responses)] for e in long] == [[8 * n for n in triple] for triple in lengths]


def test_throughput_is_measured_with_the_attention_that_training_tries_first(monkeypatch):
    facts = {"cuda": DeviceFacts("cuda", 10**11, (9, 0), triton=True), "cpu": DeviceFacts("cpu", 10**11)}
    monkeypatch.setattr(throughput, "read_facts", lambda device: facts[device.type])
    for kind, layout, dtype, expected in (
        ("cuda", "shared_prefix", torch.bfloat16, "varlen"),
        ("cuda", "shared_prefix", torch.float32, "flex_attention"),
        ("cuda", "padded", torch.bfloat16, "sdpa"),  # others need a row of several examples
        ("cpu", "shared_prefix", torch.bfloat16, "packed"),
        ("cpu", "padded", torch.float32, "sdpa"),
    ):
        way = throughput.Way("", throughput.update, layout, dtype)
        assert throughput.attention_of(way, torch.device(kind)) == expected


def test_a_model_is_trained_from_equal_log_probabilities_with_the_kind_of_attention_that_a_cell_names(tmp_path):
    figures = gpu.ours(LIVE, Place(tmp_path, time.time()), kind="sdpa", updates=3)  # the default is packed
    assert (figures["first loss"], figures["first margin"], figures["attention"]) == ("0.69315", 0.0, "sdpa")
    assert figures["GB after first and last update"].endswith("(of 6)") and figures["pairs/s"] > 0
    row = json.loads((tmp_path / "data" / "train.jsonl").read_text().splitlines()[0])
    (example,) = throughput.draw_examples(1, 512)
    assert [len(row[name].split()) for name in ("prompt", "chosen", "rejected")] == [
        len(example.prompt),
        *(len(response) - 1 for response in example.responses),  # training adds <eos>
    ]


def test_an_attention_that_a_model_does_not_have_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="unknown"):
        gpu.ours(LIVE, Place(tmp_path, time.time()), kind="unknown", updates=3)


def test_a_run_is_timed_from_its_start_to_its_resumption(tmp_path):
    figures = gpu.life(LIVE, Place(tmp_path, time.time()))
    assert len(figures) == 8 and min(figures.values()) >= 0
    assert (tmp_path / "run" / "LATEST").exists() and (tmp_path / "run" / "resumed.jsonl").exists()


def test_a_program_runs_in_the_folder_of_a_cell_and_finds_the_project(tmp_path):
    place = Place(tmp_path, 0.0)
    script = "import os, tools; print(os.getcwd(), os.environ['CELL'])"
    assert cells.run_program(place, "-c", script, CELL="here") == f"{tmp_path} here\n"
    failing = ("-c", "print('last words'); raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="exit code 3: last words"):
        cells.run_program(place, *failing)
    assert cells.run_program(place, *failing, verdict=3) == "last words\n"


def test_samples_are_drawn_by_the_model_of_a_cell(tmp_path):
    sizes = ("--prompts", "2", "--samples", "2", "--tokens", "2", "--device", "cpu")
    figures = gpu.sampling(LIVE, Place(tmp_path, 0.0), "decoder, growing cache", sizes)
    assert list(figures) == ["s per 1,000 samples", "tokens/s", "peak GB"] and min(figures.values()) > 0
