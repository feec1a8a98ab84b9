"""python -m tools.verify: on a healthy run every row holds, and each fault fails the rows that it must."""

import json
import re
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import GOLDENS, TINY, compose
from faults import run_code
from ranks import run_ranks

import build
import tools.verify.__main__ as command
from dpo.distributed.splitting import Microbatch
from dpo.model import packing
from dpo.model.layout_check import LayoutChoice
from dpo.runs import export, weights
from dpo.runs.weights import AllWeights
from dpo.system.errors import RunError, UserError
from dpo.training.budgets import MemoryEstimate
from dpo.training.first_update import FirstMargin
from dpo.training.references import AdapterReference, CachedReference, ModelReference
from losses import DPO
from tools.verify import checks, exports, gradients, processes, speed, training
from tools.verify.checks import CHECKS, Check
from tools.verify.session import Session
from tools.verify.table import FAIL, NOT_RUN, PASS, NotRun, Row, as_json, line, measured, summary
from trainers import BasicTrainer

GRADIENTS, TRAINING, PROCESSES, SPEED = CHECKS
SHORT = ("max_length=48", "max_prompt_length=24", "batch_size=4", "lr=1e-4")


@pytest.fixture
def rows_of(tmp_path):
    """Return a function that makes a check, and returns the status of each promise."""

    def rows(check: Check, *overrides: str) -> dict[str, str]:
        with TemporaryDirectory(dir=tmp_path) as folder:
            session = Session.of(compose(*TINY, "loss=dpo", *SHORT, *overrides), Path(folder))
            found = list(check.rows(session, session.load_inputs()))
        assert [row.promise for row in found] == list(check.promises)
        return {row.promise: row.status for row in found}

    return rows


def failed(rows: dict[str, str]) -> set[str]:
    return {promise for promise, status in rows.items() if status == FAIL}


# Healthy runs

HEALTHY = {
    "dpo": (),
    "bfloat16": ("precision=bfloat16",),
    "adapter": ("lora=default", "lora.r=4"),
    "precomputed": ("loss.precompute_reference=true", "layout=padded", "export_dtype=bfloat16"),
    "synced": ("sync_reference=1", "loss.beta=1"),
    "bfloat16 reference": ("model.reference_dtype=bfloat16",),
    "sft": ("loss=sft",),
    "kto": ("loss=kto", "activation_checkpointing=true"),
    "wpo": ("loss=ipo", "loss.token_weights=wpo"),
    "its own reference": (f"reference='{GOLDENS / 'tiny-gpt2'}'", "loss.beta=1"),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_keeps_its_promises(name, rows_of):
    rows = rows_of(GRADIENTS, *HEALTHY[name]) | rows_of(TRAINING, *HEALTHY[name])
    assert not failed(rows)
    left_out = {promise for promise, status in rows.items() if status == NOT_RUN} - {gradients.COMPILED}
    expected = {
        "adapter": {training.REFERENCE},
        "synced": {training.REFERENCE, training.FROZEN},
        "bfloat16 reference": {gradients.PRECOMPUTED, training.MARGIN, training.FROZEN},
        "sft": {gradients.PRECOMPUTED, training.MARGIN, training.REFERENCE, training.FROZEN},
        "kto": {gradients.PRECOMPUTED, training.FROZEN},
    }
    assert left_out == expected.get(name, {training.FROZEN})


def test_a_run_on_two_processes_keeps_its_promises(rows_of, forked_processes):
    forked_processes()
    rows = rows_of(PROCESSES, "trainer=FSDPTrainer", "n_processes=2")
    assert set(rows.values()) == {PASS}


@pytest.fixture
def forked_processes(tmp_path, monkeypatch):
    """Return a function that lets processes be forked, with a fault in each."""

    def fork(fault=lambda trainer: None):
        build_trainer = processes.build_trainer

        def with_fault(*arguments):
            trainer = build_trainer(*arguments)
            fault(trainer)
            return trainer

        def in_processes(session):
            def work(rank, n, folder):
                processes.build_trainer = with_fault
                processes.of_rank(session, folder / "processes.pt")

            run_ranks(2, work, tmp_path)
            return torch.load(tmp_path / "processes.pt", weights_only=True)

        monkeypatch.setattr(processes, "in_processes", in_processes)

    return fork


# Faults


def one_branch(examples):
    """Lay out a row in which the second response sees the first."""
    batch = packing.shared_prefix(examples)
    return replace(batch, segments=torch.stack((batch.segments[0], torch.zeros_like(batch.segments[1]))))


def branches_see_each_other(patch):
    layout = packing.LAYOUTS["shared_prefix"]
    patch.setitem(packing.LAYOUTS, "shared_prefix", replace(layout, pack=one_branch))

    def choose(policy, *_):
        build.use_attention(policy.model, "packed")
        return LayoutChoice("shared_prefix", "packed")

    patch.setattr(build, "choose_layout", choose)


def wrong_sign(patch):
    right = DPO.pair_losses
    patch.setattr(DPO, "pair_losses", lambda self, h: right(self, -h))


def forget_weights(patch, is_broken):
    """Give each microbatch of a batch the weight of the whole batch, where is_broken says so of their number."""
    split = BasicTrainer.split_batch

    def split_batch(self, examples, n_equal=1):
        parts = list(split(self, examples, n_equal))
        factor = len(parts) if is_broken(n_equal) else 1
        return iter([Microbatch(part.batch, part.scale * factor, part.is_last) for part in parts])

    patch.setattr(BasicTrainer, "split_batch", split_batch)


def other_weights_where_recomputed(patch):
    def recompute(model, on):
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.01 if on else 1 / 1.01)

    patch.setattr(gradients, "recompute_activations", recompute)


def shifted_cache(patch):
    fill = CachedReference.fill

    def shifted(self, batch, logps):
        fill(self, batch, replace(logps, sums=logps.sums + torch.tensor([1.0, 0.0])))

    patch.setattr(CachedReference, "fill", shifted)


def reference_moves(patch):
    def after_update(self, n_updates):
        with torch.no_grad():
            next(self.module.parameters()).mul_(1.001)  # a sum would leave log-probabilities as they are

    patch.setattr(ModelReference, "after_update", after_update)


def another_reference(patch):
    copy = build.copy_reference

    def other(policy, *arguments):
        copied = copy(policy, *arguments)
        with torch.no_grad():
            next(copied.parameters()).mul_(1.01)
        return copied

    patch.setattr(build, "copy_reference", other)
    patch.setattr(FirstMargin, "compare", lambda *_: None)  # else the run itself would end


def cut_gradient(patch):
    load = build.load_policy

    def load_policy(*arguments, **options):
        model = load(*arguments, **options)
        model.transformer.ln_f.bias.register_hook(torch.zeros_like)
        return model

    patch.setattr(build, "load_policy", load_policy)


def frozen_changes(patch):
    def after_update(self, n_updates):
        if n_updates == 2:
            with torch.no_grad():
                next(p for p in self.policy.parameters() if not p.requires_grad).mul_(1.01)

    patch.setattr(AdapterReference, "after_update", after_update)


def optimizer_is_forgotten(patch):
    def load_tensors(self, states):
        self.weights.load_state_dict(states["policy"], "")

    patch.setattr(BasicTrainer, "load_tensors", load_tensors)


def export_of_other_weights(patch):
    write = AllWeights.export

    def other(self, folder, tokenizer, card, weights=None, dtype=None):
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        state["transformer.ln_f.weight"] *= 1.1
        state["lm_head.weight"] = state["transformer.wte.weight"]
        write(self, folder, tokenizer, card, state, dtype)

    patch.setattr(AllWeights, "export", other)


def export_with_another_config(patch):
    save = export.save_model

    def other(folder, model, *arguments):
        save(folder, model, *arguments)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 0.1}))

    patch.setattr(export, "save_model", other)


def export_without_stops(patch):
    save_model = export.save_model

    def save(folder, *_):  # without any, transformers takes that of config.json
        (folder / "generation_config.json").write_text('{"eos_token_id": 5}')

    def save_all(folder, *arguments):
        save_model(folder, *arguments)
        save(folder)

    patch.setattr(export, "save_model", save_all)
    patch.setattr(weights, "save_generation_config", save)  # of an adapter


UPDATE = {gradients.LOSS, gradients.GRADIENT}
FAULTS = [
    # the check, settings, the fault, and the rows that fail
    (GRADIENTS, (), branches_see_each_other, {*UPDATE, gradients.LOGPS, gradients.LOGPS_GRADIENT}),
    (GRADIENTS, (), wrong_sign, UPDATE),
    (GRADIENTS, (), lambda patch: forget_weights(patch, lambda n: n > 1), {gradients.ACCUMULATION}),
    (GRADIENTS, (), lambda patch: forget_weights(patch, lambda n: n == 1), {gradients.BUDGET}),
    (GRADIENTS, (), other_weights_where_recomputed, {gradients.CHECKPOINTING}),
    (GRADIENTS, (), shifted_cache, {gradients.PRECOMPUTED}),
    (GRADIENTS, (), cut_gradient, {gradients.LOGPS_GRADIENT, gradients.GRADIENT}),
    (TRAINING, (), another_reference, {training.MARGIN}),
    (TRAINING, (), reference_moves, {training.REFERENCE, training.RESUME}),
    (TRAINING, (), cut_gradient, {training.TRAINED}),
    (TRAINING, ("lora=default",), frozen_changes, {training.FROZEN, exports.WEIGHTS, exports.LOGPS}),
    (TRAINING, (), optimizer_is_forgotten, {training.RESUME}),
    (TRAINING, (), export_of_other_weights, {exports.WEIGHTS, exports.LOGPS}),
    (TRAINING, (), export_with_another_config, {exports.LOGPS}),
    (TRAINING, (), export_without_stops, {exports.STOP}),
    (TRAINING, ("lora=default",), export_without_stops, {exports.STOP}),
]
NAMES = [
    *("branches see each other", "wrong sign", "accumulation without weights", "microbatches without weights"),
    *("recomputed from other weights", "shifted cache", "gradient cut off"),
    *("reference of other weights", "reference that moves", "gradient cut off", "frozen weight that changes"),
    *("optimizer forgotten", "export of other weights", "export with another config", "export without stop tokens"),
    "adapter without stop tokens",
]


@pytest.mark.parametrize("check, settings, fault, expected", FAULTS, ids=NAMES)
def test_a_fault_fails_its_rows_and_no_others(check, settings, fault, expected, rows_of, monkeypatch):
    fault(monkeypatch)
    rows = rows_of(check, *settings)
    assert failed(rows) == expected


def test_compiled_layers_are_compared(rows_of, monkeypatch):
    """Compiling takes a minute, so layers are left as they are, or get other weights."""
    monkeypatch.setattr(build, "compile_layers", lambda model: None)
    assert rows_of(GRADIENTS, "compile=true")[gradients.COMPILED] == PASS

    def compile_layers(model):
        model.transformer.h[0].register_forward_hook(lambda module, inputs, output: 1.01 * output)

    monkeypatch.setattr(build, "compile_layers", compile_layers)
    assert failed(rows_of(GRADIENTS, "compile=true")) == {gradients.COMPILED}


def test_a_machine_that_cannot_compile_says_so(rows_of, monkeypatch):
    def compile_layers(model):
        raise torch._dynamo.exc.BackendCompilerFailed(None, RuntimeError("no compiler"), None)

    monkeypatch.setattr(build, "compile_layers", compile_layers)
    assert rows_of(GRADIENTS, "compile=true")[gradients.COMPILED] == NOT_RUN


def lose_gradient(trainer):
    """Lose the gradient of one of two processes; its metrics stay."""
    losses = trainer.losses
    if trainer.ranks.rank == 1:
        trainer.losses = lambda *arguments: 0 * losses(*arguments)


def count_twice(trainer):
    """Scale the gradient by 2, which hardly changes the steps of RMSprop."""
    losses = trainer.losses
    trainer.losses = lambda *arguments: 2 * losses(*arguments)


SHARDED_FAULTS = [
    (lose_gradient, {processes.NORM, processes.WEIGHTS, processes.LOSS}),
    (count_twice, {processes.NORM, processes.WEIGHTS}),
]


@pytest.mark.parametrize("fault, expected", SHARDED_FAULTS)
def test_a_fault_of_several_processes_fails_their_rows(fault, expected, rows_of, forked_processes):
    forked_processes(fault)
    assert failed(rows_of(PROCESSES, "trainer=FSDPTrainer", "n_processes=2")) == expected


def test_one_process_is_not_compared_with_itself(rows_of):
    assert set(rows_of(PROCESSES).values()) == {NOT_RUN}


# A GPU


def test_where_sums_differ_from_run_to_run_a_resumed_run_may_differ_as_much(tmp_path, monkeypatch):
    """Two identical runs are 0.5 apart; a resumed run that is 2 apart passes, one that is 2.1 apart does not."""
    session = Session.of(compose(*TINY, "loss=dpo", *SHORT), tmp_path)
    inputs = session.load_inputs()
    monkeypatch.setattr(training, "is_exact", lambda device: False)
    apart = [0.0]
    states = {"policy": {"weight": torch.zeros(1)}}

    class Run:
        updates = 1
        train = staticmethod(lambda: None)
        tensors = staticmethod(lambda: {"policy": {"weight": torch.tensor([apart[0]])}})

    folder = tmp_path / "whole"
    (folder / "step-4").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.dump({"seed": 0}))
    monkeypatch.setattr(training.RunDir, "reopen", lambda *_: None)
    monkeypatch.setattr(Session, "trainer", lambda *_: nullcontext(Run))
    for apart[0], status in ((2.0, PASS), (2.1, FAIL), (float("nan"), FAIL)):
        assert training.resumed_row(session, inputs, folder, states, spread=0.5).status == status


def test_two_identical_runs_show_how_far_runs_are_apart(rows_of, monkeypatch):
    monkeypatch.setattr(training, "is_exact", lambda device: False)
    assert not failed(rows_of(TRAINING))
    optimizer_is_forgotten(monkeypatch)
    assert failed(rows_of(TRAINING)) == {training.RESUME}


def test_waits_for_a_gpu_are_counted_per_pass(monkeypatch):
    """An update waits 3 times, and once more in each of its passes."""

    class Trainer:
        settings = SimpleNamespace(model_copy=lambda update: SimpleNamespace(n=update["gradient_accumulation_steps"]))

        def train_step(self, batch):
            for _ in range(3 + self.settings.n):
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            warnings.warn("another", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    assert speed.syncs_per_pass(Trainer(), SimpleNamespace(examples=[1, 2, 3, 4])) == 1


# Speed and memory


def test_speed_and_memory_are_within_their_bounds_and_each_can_fail(rows_of, monkeypatch):
    assert failed(rows_of(SPEED)) == set()
    monkeypatch.setattr("dpo.reporting.utilization.Utilization.flops", lambda self, parameters: 10**15)
    monkeypatch.setattr(speed, "estimate_memory", lambda *_: MemoryEstimate(0.0, 0.0))
    peaks = iter([10**6, 2 * 10**6])
    monkeypatch.setattr(speed, "peak_memory", lambda device: next(peaks))
    assert failed(rows_of(SPEED)) == {speed.SHARE, speed.MEMORY}


def test_what_does_not_fit_on_one_device_is_not_run(rows_of, monkeypatch):
    monkeypatch.setattr(checks, "available_memory", lambda device: 10**6)
    assert set(rows_of(TRAINING).values()) == {NOT_RUN}


# Rows


def test_a_check_that_ends_with_an_error_has_a_row_for_each_promise(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "check_memory", lambda *_: None)
    for error, status in ((ValueError("x"), FAIL), (NotRun("y"), NOT_RUN), (MemoryError(), NOT_RUN)):

        def rows(session, inputs, error=error):
            yield measured("one", 1, 2)
            raise error

        assert [row.status for row in Check(("one", "two"), rows).rows(None, None)] == [PASS, status]


def test_an_export_that_does_not_open_leaves_the_resumed_run_its_row(rows_of, monkeypatch):
    monkeypatch.setattr(exports, "open_export", lambda folder: 1 / 0)
    assert failed(rows_of(TRAINING)) == set(exports.PROMISES)


def test_a_figure_beyond_its_bound_or_not_a_number_fails():
    assert [measured("", value, 2).status for value in (2, 2.1, float("nan"))] == [PASS, FAIL, FAIL]


def test_the_table_the_summary_and_the_json_agree():
    rows = [measured("one", 0.25, 0.5, "nats", "why"), measured("two", float("inf"), 0)]
    rows.append(Row("three", NOT_RUN, detail="no"))
    assert line(rows[0]).split() == ["one", "0.25", "nats", "<=", "0.5", "pass", "why"]
    assert summary(rows, {"torch": "2"}) == "verify: 1 pass, 1 fail, 1 not run: two inf; torch 2"
    stored = json.loads(as_json(rows, {"torch": "2"}))
    assert stored["about"] == {"torch": "2"}
    assert [row["status"] for row in stored["rows"]] == [PASS, FAIL, NOT_RUN]
    assert stored["rows"][1]["value"] is None and stored["rows"][0]["bound"] == 0.5


# The command


def test_the_command_prints_a_table_writes_json_and_leaves_nothing_on_the_disk(tmp_path):
    (tmp_path / "tmp").mkdir()
    arguments = [*TINY, "--json", str(tmp_path / "rows.json"), *SHORT]
    code = f"""
import os, runpy, sys, tempfile
tempfile.tempdir = {str(tmp_path / "tmp")!r}
sys.modules.pop("tools.verify.__main__", None)
sys.argv = ["verify", *{arguments!r}]
runpy.run_module("tools.verify", run_name="__main__", alter_sys=True)
"""
    done = run_code(code, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    *table, empty, last = done.stdout.splitlines()
    assert empty == "" and re.match(r"verify: \d+ pass, 0 fail, \d+ not run; python .*torch .*device cpu", last)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert [row["promise"] for row in rows] == [promise for check in CHECKS for promise in check.promises]
    assert len(table) == len(rows) + 1 and table[0].split() == ["promise", "measured", "bound", "result"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "tmp"]
    assert not any((tmp_path / "tmp").iterdir())


def test_a_failed_check_ends_the_command_with_exit_code_8(monkeypatch, capsys):
    monkeypatch.setattr(checks, "CHECKS", (Check(("one",), lambda *_: iter([measured("one", 2, 1)])),))
    monkeypatch.setattr(checks, "check_memory", lambda *_: None)
    with pytest.raises(RunError, match="1 of 1 checks failed") as failure:
        command.verify([override for override in TINY if "local" not in override], None)
    assert failure.value.exit_code == 8
    assert "verify: 0 pass, 1 fail, 0 not run: one 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["model=tiny", "resume=runs/one"], "resume: a new short run is verified"),
        (["model=tiny", "learning_rate=1"], "learning_rate: there is no such setting; use lr=1"),
        (["lora=default"], "model.name_or_path: is missing"),
        (["model=tiny", "trainer=FSDPTrainer", "compile=true"], "this trainer cannot compile"),
    ],
)
def test_settings_that_a_run_refuses_are_refused(arguments, problem):
    with pytest.raises(UserError, match=re.escape(problem)):
        command.verify(arguments, None)


def test_json_without_a_file_is_all_of_stdout(monkeypatch, capsys):
    monkeypatch.setattr(checks, "CHECKS", (Check(("one",), lambda *_: iter([measured("one", 0.5, 1)])),))
    monkeypatch.setattr(checks, "check_memory", lambda *_: None)
    settings = [override for override in TINY if "local" not in override]
    monkeypatch.setattr("sys.argv", ["verify", *settings[1:], "--json", settings[0]])
    command.main()
    printed = capsys.readouterr()
    assert json.loads(printed.out)["rows"][0]["promise"] == "one"
    assert "verify: 1 pass, 0 fail" in printed.err
