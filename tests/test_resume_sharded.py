"""Several processes: a run that was killed or stopped goes on bit for bit, and a rank that fails ends the others."""

import signal
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, validated
from faults import (
    BUSY,
    again,
    at_event,
    command_line,
    copy_until,
    dropout,
    fresh,
    kill,
    kill_in_save,
    limit_files,
    logs_of,
    rng,
    send,
)
from ranks import command_lines, run_ranks, torchrun
from safetensors.torch import load_file

import dpo.runs.shards
import trainers
from build import build_trainer, load_inputs
from dpo.distributed import watchdog
from dpo.distributed.process_group import ProcessGroup
from dpo.model.archives import load_archive
from dpo.model.lora import PREFIX
from dpo.runs import checkpoints
from dpo.runs.run_dir import RunDir
from dpo.settings import run_config
from dpo.settings.run_config import read_run_config

SHARDED = (
    *BUSY,
    "loss=dpo",
    "trainer=FSDPTrainer",
    "background_saves=true",
    "sample_during_eval=false",
    "n_eval_examples=4",
)
DROPOUT = {rank: [dropout] for rank in range(4)}
N_EVENTS = 6 + 4 + 7  # updates, evaluations and calls of save


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """Return the folder of an uninterrupted run of two ranks with dropout."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = command_lines(folder, fresh(folder, *SHARDED), 2, DROPOUT)
    assert [run.returncode for run in done] == [0, 0], done[0].stderr + done[1].stderr
    return folder


def same(folder: Path, other: Path) -> None:
    """Assert that two sharded runs ended alike, to the last bit, but for what a clock or the system measured."""
    assert logs_of(folder)[0] == logs_of(other)[0]
    for path in (folder / "LATEST").glob("*.distcp"):
        assert path.read_bytes() == (other / "LATEST" / path.name).read_bytes()
    states = [torch.load(run / "LATEST" / "run.pt", weights_only=True)["state"] for run in (folder, other)]
    assert str([state["ranks"] for state in states][0]) == str(states[1]["ranks"])
    assert (folder / "LATEST" / "policy.pt").read_bytes() == (other / "LATEST" / "policy.pt").read_bytes()


def change_layer(apply: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
    """Return a fault that passes what a layer computes through a function, in the policy alone."""

    def fault() -> None:
        train = trainers.BasicTrainer.train

        def with_change(self: trainers.BasicTrainer) -> None:
            layer = self.policy.model.transformer.h[0].mlp.c_fc
            layer.register_forward_hook(lambda module, inputs, output: apply(output))
            train(self)

        trainers.BasicTrainer.train = with_change

    return fault


@pytest.mark.parametrize(
    "apply, line",
    [
        (torch.detach, "no gradient reaches 4 of 28 trained tensors that affect the log-probabilities"),
        (lambda output: output * 1.01, "before the first update, although they have the same weights"),
    ],
    ids=["a cut graph", "another reference"],
)
def test_a_run_that_would_train_something_else_ends_before_its_first_update_on_all_ranks(apply, line, tmp_path):
    folder, faults = tmp_path / "run", {rank: [change_layer(apply)] for rank in range(2)}
    done = command_lines(folder, fresh(folder, *SHARDED, "do_first_eval=false"), 2, faults)
    assert all(run.returncode for run in done) and line in done[0].stderr + done[1].stderr
    assert not any("loss/train" in record for record in done[0].records())


def test_only_the_main_rank_writes_and_the_end_can_be_opened_by_anyone(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {
        "LATEST",
        "config.yaml",
        "metrics.jsonl",
        "samples.jsonl",
        "pairs.jsonl",
        ".lock",
        "warnings.json",
    } | {f"step-{n}" for n in range(8, 56, 8)}
    updates = [record["updates"] for record in logs_of(whole)[0] if "loss/train" in record]
    assert updates == [1, 2, 3, 4, 5, 6]  # each once
    assert not (whole / "step-40" / "policy.pt").exists()
    weights = load_archive(str(whole / "LATEST" / "policy.pt"))
    exported = dict(checkpoints_of_export(whole / "LATEST" / "hf"))
    assert all(torch.equal(value, weights[name]) for name, value in exported.items()) and len(exported) > 20
    assert checkpoints.find_corruption(whole / "LATEST") is None


def checkpoints_of_export(folder: Path):
    """Return the names and tensors of an exported model."""
    return load_file(folder / "model.safetensors").items()


def test_a_run_resumes_bit_for_bit_with_as_many_ranks(whole, tmp_path):
    folder = copy_until(whole, tmp_path / "run", 24)
    done = command_lines(folder, again(folder), 2, DROPOUT)
    assert [run.returncode for run in done] == [0, 0], done[0].stderr
    assert "not be bit for bit" not in done[0].stdout
    same(folder, whole)


def worse_after_16_examples() -> None:
    evaluate = trainers.BasicTrainer.evaluate
    trainers.BasicTrainer.evaluate = lambda self: evaluate(self) | {"loss/eval": 0.4 + abs(self.examples - 16) / 100}


@pytest.mark.parametrize("condition", [("stop_after=1",), ("stop_after=5", "stop_if.max_loss=0.9")])
def test_an_evaluation_ends_all_ranks_and_the_best_shards_are_exported_also_after_a_kill(condition, tmp_path):
    """Of the losses 0.56, 0.4 and 0.56 the last is no better than the second, and above 0.9 times the first."""
    settings = (*SHARDED, "keep_best=loss/eval", "keep_checkpoints=1", *condition)
    faults = {rank: [worse_after_16_examples] for rank in range(2)}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = command_lines(whole, fresh(whole, *settings), 2, faults)
    assert [run.returncode for run in done] == [0, 0], done[0].stderr + done[1].stderr
    export = lambda self, name, when: kill()  # noqa: E731
    at_export = lambda: setattr(trainers.BasicTrainer, "export_stored", export)  # noqa: E731
    done = command_lines(killed, fresh(killed, *settings), 2, {0: [worse_after_16_examples, at_export], 1: faults[1]})
    assert all(run.returncode for run in done) and not (killed / "stopped.json").exists()
    done = command_lines(killed, again(killed), 2, faults)
    assert [run.returncode for run in done] == [0, 0], done[0].stderr + done[1].stderr
    assert (whole / "stopped.json").read_text() == (killed / "stopped.json").read_text()
    for run in (whole, killed):
        assert (run / "BEST").resolve().name == "step-16"
        assert (run / "LATEST").resolve().name == ("step-32" if len(condition) == 1 else "step-16")
    same_export = [(run / "BEST" / "hf" / "model.safetensors").read_bytes() for run in (whole, killed)]
    assert same_export[0] == same_export[1]


def test_a_run_of_an_adapter_resumes_bit_for_bit_and_holds_and_exports_that_alone(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    adapter = ("lora=default", "lora.r=4", "lora.dropout=0.1", "lora.export_merged=true")
    done = command_lines(whole, fresh(whole, *SHARDED, *adapter), 2)
    assert [run.returncode for run in done] == [0, 0], done[0].stderr + done[1].stderr
    copy_until(whole, folder, 24)
    done = command_lines(folder, again(folder), 2)
    assert [run.returncode for run in done] == [0, 0], done[0].stderr + done[1].stderr
    same(folder, whole)
    state = torch.load(folder / "LATEST" / "policy.pt", weights_only=True)["state"]
    exported = load_file(folder / "LATEST" / "hf" / "adapter_model.safetensors")
    assert {name.removeprefix(PREFIX): value.tolist() for name, value in exported.items()} == {
        name: value.tolist() for name, value in state["weights"].items()
    }
    names = dpo.runs.shards.IndexReader(folder / "LATEST").read_metadata().state_dict_metadata.keys()
    assert {name for name in names if name.startswith("policy.")} == {f"policy.{name}" for name in state["weights"]}
    assert all(".lora_" in name for name in names) and any(name.endswith("square_avg") for name in names)
    merged = load_file(folder / "LATEST" / "hf" / "merged" / "model.safetensors")
    base = load_file(GOLDENS / "tiny-gpt2" / "model.safetensors")
    assert merged.keys() == base.keys()  # the tied head once
    name = "transformer.h.0.attn.c_proj"
    a, b = (state["weights"][f"{name}.lora_{which}.weight"] for which in "AB")
    torch.testing.assert_close(merged[f"{name}.weight"], base[f"{name}.weight"] + 32 / 4 * (b @ a).T)  # alpha / r
    assert b.any()
    further = (*SHARDED, *adapter[:2], f"lora.path='{folder / 'LATEST' / 'hf'}'", "n_examples=16", "eval_every=16")
    several, alone = tmp_path / "several", tmp_path / "alone"
    done = command_lines(several, fresh(several, *further), 2)
    done.append(command_line(alone, fresh(alone, *further, "trainer=BasicTrainer")))
    assert [run.returncode for run in done] == [0, 0, 0], done[0].stderr + done[1].stderr + done[2].stderr
    for own, expected in zip(*(logs_of(each)[0] for each in (several, alone)), strict=True):
        assert own == pytest.approx(expected, rel=1e-3, abs=1e-5)


def whole_state(folder: Path, rank: int, n: int, out: Path) -> None:
    """Write the state that n ranks load from a run's newest checkpoint, every tensor whole."""
    ranks = ProcessGroup(torch.device("cpu"), timedelta(seconds=60))
    config = read_run_config(folder)
    settings, loss = validated(*SHARDED, f"local_run_dir='{folder}'")
    run = RunDir.reopen(folder, config, {}, ranks)
    trainer = build_trainer(settings, loss, load_inputs(settings, loss), run)
    tensors, values = trainer.sharded_state()
    found = {name: value.full_tensor() if hasattr(value, "full_tensor") else value for name, value in tensors.items()}
    if rank == 0:
        torch.save((found, values), out / f"{n}.pt")
    ranks.close()


def test_another_number_of_ranks_loads_the_same_bits_and_says_what_differs(whole, tmp_path, capfd, counts):
    found = []
    for n in counts(small=(2, 4), full=(2, 4, 1, 3)):
        folder = copy_until(whole, tmp_path / f"run{n}", 24)
        run_ranks(n, partial(whole_state, folder), tmp_path)
        found.append(torch.load(tmp_path / f"{n}.pt"))
    assert "the number of processes was 2, is 4" in capfd.readouterr().out
    (expected, values), *others = found
    assert len(expected) > 50 and any(name.endswith("square_avg") and value.any() for name, value in expected.items())
    for tensors, own in others:
        assert own == values and tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())


def test_weights_that_do_not_fit_are_named_by_the_rank_that_reads_them_and_end_all(whole, tmp_path):
    path, folder = tmp_path / "archive.pt", tmp_path / "run"
    state = dict(load_archive(str(whole / "LATEST" / "policy.pt")))
    state["more"] = state.pop("transformer.h.0.ln_1.weight")
    torch.save({"state": state}, path)
    done = command_lines(folder, fresh(folder, *SHARDED, f"model.archive='{path}'"), 2)
    assert [run.returncode for run in done] == [2, 2]
    assert "does not fit the model: missing transformer.h.0.ln_1.weight; unexpected more" in done[0].stderr
    assert done[1].stderr == "" and not folder.exists()


def test_a_damaged_or_missing_shard_is_named(whole, tmp_path):
    folder = copy_until(whole, tmp_path / "run", 32) / "step-32"
    with open(folder / "__1_0.distcp", "r+b") as file:
        file.seek(5000)
        file.write(b"\x00\xff")
    assert checkpoints.find_corruption(folder) == "__1_0.distcp is damaged"
    (folder / "__1_0.distcp").unlink()
    assert checkpoints.find_corruption(folder) == "__1_0.distcp is missing"


def test_shards_without_a_manifest_are_not_opened(whole, tmp_path):
    folder = copy_until(whole, tmp_path / "run", 8)
    (folder / "step-8" / "MANIFEST").unlink()
    assert checkpoints.read_checkpoint(folder / "step-8") == "MANIFEST cannot be read (FileNotFoundError)"


# Failures


def boom() -> None:
    """Raise an error that nobody expects."""
    raise ValueError("boom")


ACTS = {"raises": boom, "is killed": kill, "is stopped": send(signal.SIGSTOP), "gets SIGTERM": send(signal.SIGTERM)}
ENDS = {
    "raises": (1, "rank {}: ValueError: boom; all ranks end"),
    "is killed": (7, "rank {}: process "),
    "is stopped": (7, "rank {}: process "),
    "gets SIGTERM": (143, "SIGTERM on rank {}: all ranks stop."),
}


@pytest.mark.parametrize("what", ACTS)
def test_a_rank_that_fails_ends_the_others_and_is_named(what, whole, tmp_path, monkeypatch, counts, report):
    """The run then goes on as if nothing had happened."""
    if what == "is stopped":  # of others the end is seen at once, also on a machine that is busy for seconds
        monkeypatch.setattr(watchdog, "HEARTBEAT_TIMEOUT", 3.0)
    draw, slowest = rng(3), 0.0
    for i in range(counts(small=1, full=20)):
        folder, failing = tmp_path / f"run{i}", int(draw.randint(2))
        log = tmp_path / "moment"
        fault = at_event(int(draw.randint(N_EVENTS)), ACTS[what], log=log)
        faults = {rank: [dropout, *([fault] if rank == failing else [])] for rank in range(2)}
        done = command_lines(folder, fresh(folder, *SHARDED), 2, faults)
        slowest = max(slowest, time.time() - log.stat().st_mtime)
        code, words = ENDS[what]
        killed = done[failing].returncode == -signal.SIGKILL
        assert killed == (what in ("is killed", "is stopped"))
        assert {run.returncode for run in done} - {-signal.SIGKILL} == {code}
        printed = done[0].stdout + done[0].stderr + done[1].stderr
        assert words.format(failing) in printed, printed
        if i < counts(small=what == "is killed", full=5):
            again_ = command_lines(folder, again(folder), 2, DROPOUT)
            assert [run.returncode for run in again_] == [0, 0], again_[0].stderr
            same(folder, whole)
    report(f"a rank {what}: all ranks ended {i + 1} times, at most {slowest:.1f} s after it, and it was named")


POINTS = ("half of run.pt", "before the manifest", "before the rename", "before LATEST", "in the change of LATEST")


@pytest.mark.parametrize("background", [False, True], ids=["at once", "in the background"])
@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_is_killed_in_a_sharded_save_ends_as_if_it_had_not_been(point, background, whole, tmp_path, counts):
    small = (3,) if background and point == "before the rename" else ()
    for nth in counts(small=small, full=(1, 3, 5)):
        folder, arguments = tmp_path / f"run{nth}", (*SHARDED, f"background_saves={background}")
        faults = {0: [dropout, kill_in_save(point, nth)], 1: [dropout]}
        done = command_lines(folder, fresh(folder, *arguments), 2, faults)
        assert [run.returncode for run in done] == [-signal.SIGKILL, 7], done[0].stderr
        done = command_lines(folder, again(folder), 2, DROPOUT)
        assert [run.returncode for run in done] == [0, 0], done[0].stderr
        same(folder, whole)


def kill_in_shards(nth: int):
    """Kill this rank when it has written its shard of the nth save."""
    save, left = dpo.runs.shards.save, iter(range(nth - 1, -1, -1))

    def killed(*args, **kwargs):
        save(*args, **kwargs)
        if next(left) == 0:
            kill()

    return lambda: setattr(dpo.runs.shards, "save", killed)


def test_a_rank_that_is_killed_after_it_wrote_its_shard_spoils_no_checkpoint(whole, tmp_path, counts):
    if counts(small=True, full=False):
        pytest.skip("in make soak")
    folder = tmp_path / "run"
    done = command_lines(folder, fresh(folder, *SHARDED), 2, {0: [dropout], 1: [dropout, kill_in_shards(3)]})
    assert [run.returncode for run in done] == [7, -signal.SIGKILL]
    assert [path.name for path in run_config.list_checkpoints(folder)] == ["step-16", "step-8"]
    done = command_lines(folder, again(folder), 2, DROPOUT)
    assert [run.returncode for run in done] == [0, 0], done[0].stderr
    same(folder, whole)


def test_a_save_that_fails_after_a_signal_ends_all_with_its_exit_code(tmp_path):
    folder = tmp_path / "run"
    faults = {0: [limit_files("save", 100_000, 24), at_event(7, send(signal.SIGTERM))]}  # as the third update begins
    done = command_lines(folder, fresh(folder, *SHARDED), 2, faults)
    assert [run.returncode for run in done] == [4, 4], done[0].stderr + done[1].stderr
    assert "SIGTERM" in done[0].stderr
    assert [path.name for path in run_config.list_checkpoints(folder)] == ["step-16", "step-8"]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_disk_on_one_rank_ends_all_with_its_exit_code(failing, tmp_path, counts):
    if failing not in counts(small=(1,), full=(0, 1)):
        pytest.skip("in make soak")
    folder = tmp_path / "run"
    done = command_lines(folder, fresh(folder, *SHARDED), 2, {failing: [limit_files("save", 100_000, 16)]})
    assert [run.returncode for run in done] == [4, 4]
    printed = done[0].stderr + done[1].stderr
    assert "earlier checkpoints are intact" in printed
    assert [path.name for path in run_config.list_checkpoints(folder)] == ["step-8"]


def test_torchrun_starts_a_run_again_where_it_was(whole, tmp_path, counts, report):
    for i in range(counts(small=1, full=20)):
        draw = rng(10 + i)
        faults = {
            (int(draw.randint(2)), attempt): [at_event(int(draw.randint(4, 9)), kill)]
            for attempt in range(counts(1, 2))
        }
        folders = tmp_path / str(i)
        folders.mkdir()
        arguments = (*SHARDED, f"local_dirs=['{folders}']", "exp_name=restarted")
        done = torchrun(folders, arguments, 2, lambda rank, attempt, f=faults: [dropout, *f.get((rank, attempt), [])])
        assert done.returncode == 0, done.stderr[-3000:]
        (folder,) = folders.glob("*/restarted_*")
        assert len((folder / "resumed.jsonl").read_text().splitlines()) >= 1
        same(folder, whole)
    report(f"torchrun: {i + 1} runs, each killed once or twice and started again, ended bit for bit")
