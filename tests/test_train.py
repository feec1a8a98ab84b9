"""The real command line on tiny models: what it refuses, what it writes, and that SFT leads into DPO."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import GOLDENS, ROOT, TINY, compose
from transformers import AutoModelForCausalLM, AutoTokenizer

import packing
import train
import utils
from packing import sequence_logps

SHORT = (
    *TINY,
    "eval_batch_size=8",
    "n_eval_examples=10",
    "n_examples=24",
    "eval_every=16",
    "lr=1e-4",
    "warmup_steps=2",
)


def errors(run) -> list[str]:
    """Return the lines in which a run told what is wrong."""
    return [line.removeprefix("error: ") for line in run.stderr.splitlines() if line.startswith("error: ")]


# What is refused


def test_all_problems_of_values_are_reported_together_before_any_model_loads(run_cli):
    wrong = [
        "batch_size=abc",
        "datasets=hh",
        "lr=-1",
        "optimizer=Sgd",
        "loss.label_smoothing=0.5",
        "n_epochs=null",
        "n_examples=null",
        "max_prompt_length=300",
        "max_length=300",
        "precision=float16",
        "gradient_accumulation_steps=0",
        "eval_every=1.5",
        "do_first_eval=maybe",
        "model.policy_dtype=float15",
        "exp_name=../escape",
    ]
    run = run_cli("loss=dpo", f"model.name_or_path='{GOLDENS / 'tiny-gpt2'}'", *wrong)
    told = errors(run)
    assert run.returncode == 2 and "Traceback" not in run.stderr and not run.folder.exists()
    for key in ("batch_size=abc", "datasets=hh", "lr=-1", "optimizer=Sgd", "loss.label_smoothing=0.5", "n_epochs=null"):
        assert sum(line.startswith(key) for line in told) == 1, (key, told)
    for key in ("precision=float16", "gradient_accumulation_steps=0", "eval_every=1.5", "do_first_eval=maybe"):
        assert sum(line.startswith(key) for line in told) == 1, (key, told)
    assert any(line.startswith("max_prompt_length=300 max_length=300: ") for line in told)
    assert any(line.startswith("max_length=300: ") and "256 positions" in line for line in told)
    assert any(line.startswith("exp_name=../escape: ") for line in told)
    assert any(line.startswith("model.policy_dtype=float15: ") for line in told)
    assert len(told) == 14


@pytest.mark.parametrize(
    "overrides, told",
    [
        ([], "You must specify 'loss', e.g, loss=<OPTION> Available options: dpo ipo sft"),
        (["loss=dpo"], "model.name_or_path: is missing; set model.name_or_path=VALUE, "),
        (["loss=dpoo"], "loss=dpoo: there is no such file in config/loss/; choose one of dpo ipo sft"),
        (["loss=dpo", "model=gpt22"], "model=gpt22: there is no such file in config/model/; choose one of blank_model"),
        (["loss=dpo", "bacth_size=3"], "bacth_size: there is no such setting; did you mean batch_size?"),
        (["loss=sft", "loss.beta=3"], "loss.beta: the chosen loss has no such setting"),
        (["loss=dpo", "modle=gpt2"], "modle: there is no such setting; did you mean model?"),
    ],
)
def test_a_mistyped_key_or_group_is_one_line(overrides, told):
    done = subprocess.run([sys.executable, "train.py", *overrides], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {told}") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["+beta=0.2"], "beta: there is no such setting; did you mean loss.beta?"),
        (
            ["batch_size=6", "gradient_accumulation_steps=4"],
            "batch_size must be divisible by gradient_accumulation_steps",
        ),
        (["trainer=FSDPTrainer"], "trainer=FSDPTrainer: is not built yet"),
        (["fsdp_port=1234"], "fsdp_port needs trainer=FSDPTrainer"),
        (["precision=float32", "model.policy_dtype=bfloat16"], "computing in float32 needs model.policy_dtype=float32"),
        (["device=mps"], "device=mps: not available here"),
        (["model.archive=nowhere/policy.pt"], "model.archive=nowhere/policy.pt: no such file"),
        (["model.add_bos=2"], "model.add_bos=2: must be true or false"),
        (["seed=-1"], "seed=-1: must be a whole number from 0 to 4294967295"),
        (["batch_size=true"], "batch_size=True: must be a whole number"),
        (["compile=true", "activation_checkpointing=true"], "cannot be compiled; set one of the two to false"),
    ],
)
def test_a_setting_is_honoured_or_refused(overrides, told):
    config = compose("loss=dpo", *TINY, *overrides)
    with pytest.raises(train.UserError) as refusal:
        train.prepare(config)
    assert told in str(refusal.value)


def test_a_data_set_smaller_than_a_batch_is_refused_with_its_size():
    with pytest.raises(train.UserError, match="batch_size=161: the training data holds 160 examples"):
        train.prepare(compose("loss=dpo", *TINY, "batch_size=161"))


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2")
    tokenizer.add_tokens([f"<extra{i}>" for i in range(3)])
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(train.UserError) as refusal:
        train.prepare(compose("loss=dpo", *TINY, f"model.tokenizer_name_or_path='{tmp_path}'"))
    told = str(refusal.value).splitlines()
    assert any("has 515 tokens" in line and "has 512 embeddings" in line for line in told)
    assert any("no eos token" in line for line in told)


def test_a_reference_in_another_dtype_and_a_policy_in_bfloat16_train(make_trainer):
    for dtypes in (("bfloat16", "null"), ("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")):
        names = ("model.policy_dtype", "model.reference_dtype")
        settings = [f"{name}={dtype}" for name, dtype in zip(names, dtypes, strict=True)]
        trainer = make_trainer("loss=dpo", "precision=auto", *settings)
        metrics = trainer.train_step(next(iter(trainer.train_batches)))
        assert math.isfinite(metrics["loss/train"])
        assert dtypes[1] != "null" or metrics["rewards_train/margins"] == 0.0


def test_a_model_whose_weights_do_not_fit_its_config_is_refused_by_name(tmp_path, run_cli):
    shutil.copytree(GOLDENS / "tiny-gpt2", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"n_positions": 256', '"n_positions": 300'))
    run = run_cli("loss=sft", *SHORT, f"model.name_or_path='{tmp_path / 'model'}'")
    assert run.returncode == 2 and "transformer.wpe.weight" in run.stderr and "Traceback" not in run.stderr
    assert not run.folder.exists()


def test_every_key_in_config_has_a_comment_and_a_rule():
    keys = set()
    for path in (ROOT / "config").rglob("*.yaml"):
        nested = ""
        body = re.sub(r"(?ms)^(defaults|hydra):.*?(?=^\S)|^hydra:.*", "", path.read_text())
        for line in body.splitlines():
            if not (match := re.match(r"( *)(\w+):(.*)", line)):
                continue
            indent, key, rest = match.groups()
            nested = nested if indent else key
            if not rest.strip():
                continue  # a group, whose keys follow
            name = f"{nested}.{key}" if indent else key
            group = "" if path.name == "config.yaml" else f"{path.parent.name}."
            keys.add(group + name)
            derived = path.name not in ("config.yaml", "blank_model.yaml", "dpo.yaml", "ipo.yaml")
            assert "#" in rest or derived or key == "name", f"{path.name}: {line}"
    assert keys == set(train.RULES)


@pytest.mark.parametrize("group", ["model", "loss"])
def test_every_config_file_composes_and_validates(group):
    for path in sorted((ROOT / "config" / group).glob("*.yaml")):
        chosen = {"model": "gpt2", "loss": "dpo"} | {group: path.stem}
        config = compose(*(f"{k}={v}" for k, v in chosen.items()))
        problems = train.setting_problems(train.flat_settings(config))
        assert [p for p in problems if path.stem != "blank_model"] == []


def test_secrets_from_the_environment_are_neither_printed_nor_saved(run_cli, monkeypatch):
    monkeypatch.setenv("MY_TEAM", "s3cret")
    run = run_cli("loss=sft", *SHORT, "debug=true", "wandb.entity=${oc.env:MY_TEAM}")
    assert run.returncode == 0, run.stderr
    assert "${oc.env:MY_TEAM}" in (run.folder / "config.yaml").read_text()
    assert "s3cret" not in run.stdout + (run.folder / "config.yaml").read_text()


def test_a_model_that_cannot_be_fetched_is_one_line_with_advice():
    command = [sys.executable, "train.py", "loss=dpo", "model.name_or_path=nobody/nothing", "wandb.enabled=false"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: model.name_or_path=nobody/nothing: cannot be loaded") and "make demo" in line


def test_a_machine_that_cannot_compile_is_told_in_one_line(run_cli, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    run = run_cli("loss=sft", *SHORT, "compile=true")
    assert run.returncode == 2
    line = run.stderr.splitlines()[-1]
    assert line.startswith("error: compile=true: the model cannot be compiled here (") and "set it to false" in line
    assert "Traceback" not in run.stderr


# What a run leaves behind


@pytest.fixture(scope="module")
def sft_run(tmp_path_factory):
    """Run SFT once, with samples, for the tests of what it wrote."""
    folder = tmp_path_factory.mktemp("sft") / "run"
    command = [sys.executable, "train.py", "loss=sft", *SHORT, "sample_during_eval=true", "n_eval_model_samples=3"]
    command += [f"local_run_dir='{folder}'", "batch_size=8", "exp_name=offline"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_directory_holds_what_the_readme_says(sft_run):
    folder, _ = sft_run
    there = {path.name for path in folder.iterdir()}
    assert there == {"config.yaml", "metrics.jsonl", "samples.jsonl", "step-16", "step-24", "LATEST", "wandb", ".lock"}
    assert (folder / "LATEST").resolve().name == "step-24"
    for step in (16, 24):
        for name in ("policy", "optimizer", "scheduler", "run"):
            part = torch.load(folder / f"step-{step}" / f"{name}.pt", weights_only=True)
            assert set(part) == {"step_idx", "state", "metrics"} and part["step_idx"] == step
            assert part["metrics"]["loss/eval"] > 0


def test_metrics_have_every_update_and_an_evaluation_at_each_multiple_and_at_the_end(sft_run):
    records = [json.loads(line) for line in (sft_run[0] / "metrics.jsonl").read_text().splitlines()]
    updates = [(r["examples"], r["updates"]) for r in records if "loss/train" in r]
    assert updates == [(8, 1), (16, 2), (24, 3)]
    assert [(r["examples"], r["updates"]) for r in records if "loss/eval" in r] == [(0, 0), (16, 2), (24, 3)]
    names = {"loss/train", "logps_train/chosen", "lengths_train/chosen", "grad_norm", "lr", "examples_per_second"}
    names |= {"tokens_per_second", "counters/examples", "counters/updates", "examples", "updates"}
    assert set(next(r for r in records if "loss/train" in r)) == names
    assert [r["lr"] for r in records if "lr" in r] == pytest.approx([1e-4 / 3, 2e-4 / 3, 1e-4])


def test_samples_are_for_the_same_prompts_every_time(sft_run):
    rows = [json.loads(line) for line in (sft_run[0] / "samples.jsonl").read_text().splitlines()]
    by_step = {step: [r["prompt"] for r in rows if r["examples"] == step] for step in (0, 16, 24)}
    assert by_step[0] == by_step[16] == by_step[24] and len(set(by_step[0])) == 3
    assert {r["model"] for r in rows} == {"policy"}
    assert rows[0]["sample"] != rows[6]["sample"]


def test_other_tools_open_the_model_that_a_run_leaves(sft_run):
    folder = sft_run[0] / "LATEST"
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    assert AutoTokenizer.from_pretrained(folder / "hf").eos_token == "<|endoftext|>"
    state = torch.load(folder / "policy.pt", weights_only=True)["state"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_wandb_without_a_key_records_offline_with_the_samples_as_tables(sft_run):
    folder, printed = sft_run
    (recorded,) = (folder / "wandb").glob("offline-run-*")
    assert f"wandb sync {recorded}" in printed
    assert list(recorded.glob("*.wandb"))[0].stat().st_size > 1000
    tables = [json.loads(path.read_text()) for path in recorded.glob("files/media/table/policy_samples*.json")]
    assert len(tables) == 3
    assert all(table["columns"] == ["step", "prompt", "sample"] and len(table["data"]) == 3 for table in tables)


def test_latest_of_sft_serves_as_the_archive_of_dpo(sft_run, run_cli):
    archive = sft_run[0] / "LATEST" / "policy.pt"
    run = run_cli("loss=dpo", *SHORT, f"model.archive='{archive}'", "sample_during_eval=true", "n_eval_model_samples=2")
    assert run.returncode == 0, run.stderr
    records = run.records()
    first = next(r for r in records if "loss/train" in r)
    assert first["rewards_train/margins"] == 0.0
    assert first["loss/train"] == pytest.approx(0.6931472)
    sft_end = [json.loads(line) for line in (sft_run[0] / "metrics.jsonl").read_text().splitlines()][-1]
    assert records[0]["logps_eval/chosen"] != sft_end["logps_eval/chosen"]  # SFT evaluates one response a prompt
    rows = [json.loads(line) for line in (run.folder / "samples.jsonl").read_text().splitlines()]
    reference = [r["sample"] for r in rows if r["model"] == "reference"]
    assert len(reference) == 6 and reference[:2] == reference[2:4] == reference[4:]
    policy = [r["sample"] for r in rows if r["model"] == "policy"]
    assert policy[:2] == reference[:2]  # before the first update they are the same model, asked with the same seed


def test_debug_writes_neither_checkpoints_nor_wandb(run_cli):
    run = run_cli("loss=sft", *SHORT, "debug=true", "wandb.enabled=true")
    assert run.returncode == 0, run.stderr
    assert {path.name for path in run.folder.iterdir()} == {"config.yaml", "metrics.jsonl", "samples.jsonl", ".lock"}


def test_a_run_directory_that_holds_a_run_is_refused(run_cli):
    assert run_cli("loss=sft", *SHORT, "debug=true").returncode == 0
    again = run_cli("loss=sft", *SHORT, "debug=true")
    assert again.returncode == 2 and "holds another run" in again.stderr


def test_the_last_partial_evaluation_batch_counts_and_the_order_of_evaluation_ignores_the_seed(make_trainer):
    one, other = (
        make_trainer("loss=dpo", "n_eval_examples=10", "eval_batch_size=8", f"seed={seed}") for seed in (0, 5)
    )
    assert one.evaluate() == other.evaluate()
    assert sum(len(batch.examples) for batch in one.eval_batches) == 10


def test_sampling_leaves_the_randomness_of_training_alone(make_trainer, tmp_path):
    trainer = make_trainer("loss=sft", "n_eval_model_samples=2")
    trainer.logger = utils.MetricLogger(tmp_path, utils.Tracker())
    before = torch.get_rng_state()
    trainer.sample()
    assert torch.equal(before, torch.get_rng_state())


def test_sampling_ignores_the_generation_settings_that_came_with_the_model(make_trainer):
    trainer = make_trainer("loss=sft", "sample_top_k=1")
    prompts = trainer.sample_prompts()[:2]
    plain = trainer.generate(trainer.policy, prompts, "plain")
    trainer.policy.generation_config.repetition_penalty = 50.0
    assert trainer.generate(trainer.policy, prompts, "penalized") == plain
    assert trainer.policy.generation_config.repetition_penalty == 50.0


def test_activation_checkpointing_changes_no_gradient(make_trainer):
    norms = []
    for setting in ("false", "true"):
        trainer = make_trainer("loss=dpo", f"activation_checkpointing={setting}")
        norms.append(trainer.train_step(next(iter(trainer.train_batches)))["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_a_compiled_run_gives_the_same_numbers_and_does_not_compile_for_every_length(make_trainer, monkeypatch):
    attended = []
    attend = packing.cpu_attention
    monkeypatch.setattr(packing, "cpu_attention", lambda *args, **how: attended.append(1) or attend(*args, **how))
    losses, graphs = [], []
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for setting in ("false", "true"):
        trainer = make_trainer("loss=dpo", f"compile={setting}", "lr=1e-4")
        batches = [batch for batch, _ in zip(trainer.train_batches, range(4), strict=False)]
        attended.clear()
        losses.append([trainer.train_step(batch)["loss/train"] for batch in batches[:2]])
        compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        losses[-1] += [trainer.train_step(batch)["loss/train"] for batch in batches[2:]]
        graphs.append((compiled, torch._dynamo.utils.counters["stats"]["unique_graphs"], len(attended)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert graphs[0][0] == graphs[0][1] == 0 < graphs[1][0] == graphs[1][1]
    assert graphs[0][2] == graphs[1][2] > 0, "compiled or not, each example is attended to by itself"


def test_attention_on_a_cpu_is_computed_in_float32_also_in_a_bfloat16_run(make_trainer, monkeypatch):
    seen = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def spy(*states, **how):
        seen.extend(tensor.dtype for tensor in (*states, how["attn_mask"]))
        assert not torch.is_autocast_enabled("cpu")
        return attend(*states, **how)

    trainer = make_trainer("loss=sft", "precision=bfloat16")
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    trainer.train_step(next(iter(trainer.train_batches)))
    assert set(seen) == {torch.float32}


def test_a_model_without_known_layers_is_not_compiled():
    with pytest.raises(utils.UserError, match="compile=true"):
        packing.compile_layers(torch.nn.Linear(2, 2))


def test_samples_of_a_compiled_run_are_those_of_another(make_trainer):
    """And generating compiles nothing, since each of its steps would be a shape of its own."""
    samples = []
    for setting in ("false", "true"):
        trainer = make_trainer("loss=sft", f"compile={setting}")
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        samples.append(trainer.generate(trainer.policy, trainer.sample_prompts(), "sampling"))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
    assert samples[0] == samples[1]


def test_bfloat16_keeps_parameters_optimizer_and_log_probabilities_in_float32(make_trainer):
    trainer = make_trainer("loss=dpo", "precision=bfloat16", "model.fsdp_policy_mp=bfloat16")
    batch = next(iter(trainer.train_batches))
    with trainer.autocast():
        logps = sequence_logps(trainer.policy, next(trainer.passes(batch.examples)), trainer.head)
    assert trainer.dtype == torch.bfloat16 and logps.dtype == torch.float32
    assert trainer.train_step(batch)["rewards_train/margins"] == 0.0
    assert {p.dtype for p in trainer.policy.parameters()} == {torch.float32}
    states = [v for state in trainer.optimizer.state.values() for k, v in state.items() if k != "step"]
    assert {v.dtype for v in states} == {torch.float32}
