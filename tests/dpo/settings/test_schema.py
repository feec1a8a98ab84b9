"""What a config may hold: every value is accepted or refused in one line, and all problems come together."""

import re

import pytest
import yaml
from conftest import ROOT, TINY, compose, validated

from dpo.settings.hints import suggest
from dpo.settings.schema import Settings, allowed, default_values, flatten, group_of, known_keys, validate
from dpo.system.errors import UserError
from losses import LOSSES


def problems(*overrides: str) -> list[str]:
    """Return the lines in which a command line is refused."""
    try:
        validated(*overrides)
    except UserError as error:
        return str(error).splitlines()
    return []


VALID = ("loss=dpo", *TINY)


def test_every_setting_has_the_type_of_its_yaml_value():
    settings, loss = validated(*VALID, "lr=1", "max_grad_norm=2")
    assert (settings.batch_size, settings.lr, settings.max_tokens_per_pass) == (8, 1.0, "auto")
    assert isinstance(settings.lr, float) and settings.n_examples is None and settings.datasets
    assert (loss.beta, loss.label_smoothing, loss.needs_reference) == (0.1, 0.0, True)


def test_all_problems_come_in_one_message_one_line_each():
    wrong = ("batch_size=abc", "lr=-1", "loss.beta=0", "exp_name=../x", "n_epochs=null", "optimizer=Sgd")
    lines = problems(*VALID, *wrong)
    starts = ["batch_size=abc: ", "lr=-1: ", "loss.beta=0: ", "exp_name=../x: ", "optimizer=Sgd: "]
    assert [sum(line.startswith(start) for line in lines) for start in starts] == [1] * 5
    assert "n_epochs=null n_examples=null: set one of them, or training never ends" in lines
    assert len(lines) == 6


def test_a_list_of_losses_is_refused():
    expected = f"loss.name=['dpo', 'ipo']: must be one of {', '.join(LOSSES)}"
    assert expected in problems(*VALID, "loss.name=[dpo,ipo]")


@pytest.mark.parametrize(
    "override, line",
    [
        ("seed=-1", "seed=-1: must be a whole number from 0 to 4294967295"),
        ("seed=1.0", "seed=1.0: must be a whole number from 0 to 4294967295"),
        ("batch_size=true", "batch_size=true: must be a whole number of examples, 1 or more"),
        ("batch_size=0", "batch_size=0: must be a whole number of examples, 1 or more"),
        ("n_examples=0", "n_examples=0: must be a whole number of examples, 1 or more, or null"),
        ("lr=inf", "lr=inf: must be a number above 0"),
        ("lr=nan", "lr=nan: must be a number above 0"),
        ("lr=true", "lr=true: must be a number above 0"),
        ("lr='1e-3'", "lr=1e-3: must be a number above 0"),
        ("sample_top_p=1.5", "sample_top_p=1.5: must be a number above 0, at most 1"),
        ("debug=1", "debug=1: must be true or false"),
        ("debug=yes", "debug=yes: must be true or false"),
        ("max_tokens_per_pass=0", "max_tokens_per_pass=0: must be auto, fit, or a whole number of tokens"),
        ("max_tokens_per_pass=true", "max_tokens_per_pass=true: must be auto, fit, or a whole number of tokens"),
        ("precision=float16", "precision=float16: must be one of auto, float32, bfloat16"),
        ("datasets=hh", "datasets=hh: must be a list, as in [hh] or [hh,shp]"),
        ("datasets=[]", "datasets=[]: must be a list, as in [hh] or [hh,shp]"),
        ("wandb.project=null", "wandb.project=null: must be a name"),
        ("wandb.entity=' '", "wandb.entity= : must be a name, or null"),
        ("model.policy_dtype=float16", "model.policy_dtype=float16: must be one of float32, bfloat16"),
        (
            "model.reference_dtype=float8",
            "model.reference_dtype=float8: must be one of float32, bfloat16, float16, or null",
        ),
        ("loss.label_smoothing=0.5", "loss.label_smoothing=0.5: must be a number from 0, below 0.5"),
        ("loss.beta=x", "loss.beta=x: must be a number above 0"),
        ("loss.divergence=kl", "loss.divergence=kl: must be one of reverse_kl, forward_kl, js, alpha"),
        ("loss.ld_alpha=0", "loss.ld_alpha=0: must be a number above 0, at most 1"),
        ("optimizer_args=3", "optimizer_args=3: must be {NAME: VALUE, ...}, or null"),
        ("scheduler=polynomial", "scheduler=polynomial: must be one of constant, linear, cosine, wsd"),
        ("min_lr_ratio=1", "min_lr_ratio=1: must be a number from 0, below 1"),
        ("loss.name=dpoo", f"loss.name=dpoo: must be one of {', '.join(LOSSES)}"),
    ],
)
def test_a_wrong_value_is_one_line_with_key_value_and_what_is_allowed(override, line):
    assert problems(*VALID, override) == [line]


def test_a_missing_model_is_one_line_whatever_is_interpolated_from_it():
    (line,) = problems("loss=dpo")
    assert line.startswith("model.name_or_path: is missing; set model.name_or_path=VALUE, a local folder or a name")


@pytest.mark.parametrize(
    "override, line",
    [
        ("~lr", "lr: is missing; a run's config.yaml holds every setting"),
        ("local_run_dir=???", "local_run_dir: is missing; set local_run_dir=VALUE, a name"),
        ("wandb.enabled=${nowhere}", "wandb.enabled: is missing; set wandb.enabled=VALUE, true or false"),
        ("wandb=none", "wandb: is a group of settings; use wandb.enabled=true or wandb.enabled=false"),
        ("columns=null", "columns: is a group of settings; `python train.py --help columns` lists them"),
    ],
)
def test_a_setting_that_is_taken_away_or_a_value_in_the_place_of_a_group_is_one_line(override, line):
    assert problems(*VALID, override) == [line]


@pytest.mark.parametrize(
    "loss, override",
    [
        *(("sft", "+loss.beta=0.1"), ("ipo", "+loss.label_smoothing=0.1"), ("dpo", "+loss.average_log_prob=true")),
        *(("simpo", "+loss.precompute_reference=true"), ("nca", "+loss.reference_free=true")),
        *(("orpo", "+loss.nll_weight=1"), ("kto", "+loss.precompute_reference=true"), ("sppo", "+loss.ld_alpha=0.5")),
        *(
            ("hinge", "+loss.divergence=js"),
            ("cpo", "+loss.token_weights=wpo"),
            ("rdpo", "+loss.length_normalize=true"),
        ),
    ],
)
def test_a_setting_that_the_loss_does_not_read_is_refused(loss, override):
    key = override[1:].partition("=")[0]
    assert problems(*VALID, f"loss={loss}", override) == [f"{key}: the chosen loss has no such setting"]


def test_a_setting_of_another_trainer_is_answered_with_the_value_that_was_typed():
    expected = suggest("learning_rate", "0.001", known_keys(LOSSES))
    assert "use lr=0.001" in expected
    assert problems(*VALID, "+learning_rate=0.001") == [expected]


SEVERAL = ("trainer=FSDPTrainer", "batch_size=8")


@pytest.mark.parametrize(
    "overrides, line",
    [
        (["compile=true", "activation_checkpointing=true"], "cannot be compiled; set one of the two to false"),
        (["batch_size=6", "gradient_accumulation_steps=4"], "must be divisible by gradient_accumulation_steps"),
        (["max_prompt_length=160"], "max_prompt_length=160 max_length=160: max_prompt_length must be below"),
        (["sync_mix=0.5"], "sync_mix=0.5 sync_reference=null: has no effect without sync_reference=N"),
        (["inspect_ids=true"], "inspect_ids=true inspect=0: has no effect without inspect=N"),
        (["dry_run=true", "inspect=1"], "dry_run=true inspect=1: each stops before training; set only one of them"),
        (
            ["max_tokens_per_pass=fit", "trainer=FSDPTrainer"],
            "fit is measured on one device; give a",
        ),
        (["columns.score_chosen=a"], "columns.score_chosen=a columns.score_rejected=null: set both or neither"),
        ([*SEVERAL, "tensor_parallel=2"], "is for trainer=TensorParallelTrainer; set tensor_parallel=auto"),
        (["trainer=TensorParallelTrainer", "ddp=true"], "splits every layer; set ddp=false"),
        (
            ["trainer=TensorParallelTrainer", "compile=true"],
            "this trainer cannot compile the layers",
        ),
        (
            ["trainer=TensorParallelTrainer", "n_processes=8", "tensor_parallel=2", "batch_size=3"],
            "each of 4 groups of processes needs an example of every batch; set it to 4 or more",
        ),
        (["n_processes=2"], "n_processes=2 trainer=BasicTrainer: is for several processes; set trainer=FSDPTrainer"),
        (
            ["tensor_parallel=2"],
            "tensor_parallel=2 trainer=BasicTrainer: is for several processes; set trainer=TensorParallelTrainer",
        ),
        (["replicate=2"], "replicate=2 trainer=BasicTrainer: is for several processes"),
        (["ddp=true"], "ddp=true trainer=BasicTrainer: is for several processes"),
        (["reduce_every_pass=true"], "reduce_every_pass=true trainer=BasicTrainer: is for several processes"),
        ([*SEVERAL, "ddp=true", "replicate=2"], "every device holds the whole model; set replicate=1"),
        ([*SEVERAL, "ddp=true", "reduce_every_pass=true"], "set reduce_every_pass=false"),
        ([*SEVERAL, "compile=true"], "compile=true trainer=FSDPTrainer: this trainer cannot compile"),
        (
            [*SEVERAL, "precision=auto", "model.policy_dtype=bfloat16"],
            "this trainer does not support stochastic rounding yet",
        ),
        (
            [*SEVERAL, "lora=default", "lora.quantize=nf4"],
            "this trainer cannot shard quantized",
        ),
        (["trainer=TensorParallelTrainer", "batch_size=8", "lora=default"], "cannot split an adapter"),
        ([*SEVERAL, "device=mps"], "device=mps trainer=FSDPTrainer: each process uses its own GPU"),
        ([*SEVERAL, "n_processes=3", "replicate=2"], "replicate=2: must divide the number of processes, 3"),
        ([*SEVERAL, "n_processes=9"], "each of 9 processes needs an example of every batch; set it to 9 or more"),
        (["precision=float32", "model.policy_dtype=bfloat16"], "computing in float32 needs"),
        (
            ["precision=auto", "model.fsdp_policy_mp=float32", "model.policy_dtype=bfloat16"],
            "computing in float32 needs",
        ),
        (["loss.precompute_reference=true", "model.reference_dtype=float16"], "set model.reference_dtype=null"),
        (["loss.precompute_reference=true", "loss.reference_free=true"], "there is no reference to precompute"),
        (["loss.ld_alpha=0.5", "loss.precompute_reference=true"], "the cache holds no log-probabilities of tokens"),
        (["loss.ld_alpha=0.5", "loss.length_normalize=true"], "both correct for length"),
        (["loss.divergence=js", "loss.reference_free=true"], "without a reference there is no divergence from it"),
        (["loss=simpo", "sync_reference=8"], "sync_reference=8: the loss has no reference"),
        (["loss.reference_free=true", "sync_reference=8"], "sync_reference=8: the loss has no reference"),
        (["loss.precompute_reference=true", "sync_reference=8"], "a precomputed reference cannot follow"),
        (["model.reference_dtype=bfloat16", "sync_reference=8"], "the reference takes the policy's dtype"),
        (
            ["precision=auto", "model.policy_dtype=bfloat16", "sync_reference=8", "sync_mix=0.5"],
            "bfloat16 would round away the mix's small changes",
        ),
        (["loss=kto", "batch_size=1"], "set batch_size=2 or more"),
        (
            ["columns.label=good"],
            "loss=dpo columns.label=good: this loss reads no label",
        ),
        (["loss=kto", "columns.label=a", "columns.rejected=b"], "columns.label=a columns.rejected=b: a row has one"),
        (["min_lr_ratio=0.1"], "scheduler=constant min_lr_ratio=0.1: a constant learning rate does not fall"),
        (
            ["optimizer=Muon", "precision=auto", "model.policy_dtype=bfloat16"],
            "Muon does not support stochastic",
        ),
        (["keep_policies=true"], "every checkpoint is kept anyway"),
        (["save_every=8", "debug=true"], "debug=true writes no checkpoints"),
        (["keep_best=loss/eval", "debug=true"], "debug=true writes no checkpoints"),
        (["stop_after=2"], "counts evaluations without a better keep_best; set keep_best=METRIC"),
        (["push_to_hub=me/name", "debug=true"], "debug=true exports nothing; set push_to_hub=null"),
        (["export_dtype=float32", "debug=true"], "debug=true exports nothing; set export_dtype=auto"),
        (["model.archive=nowhere/policy.pt"], "model.archive=nowhere/policy.pt: no such file"),
    ],
)
def test_settings_that_cannot_be_honoured_together_are_one_line(overrides, line):
    (found,) = problems(*VALID, *overrides)
    assert line in found


def test_a_loss_says_what_it_refuses_also_where_another_of_its_settings_is_wrong():
    lines = problems(*VALID, "loss=odpo", "loss.beta=0", "sync_reference=8", "loss.reference_free=true")
    starts = (
        "loss.beta=0: must",
        "sync_reference=8: the loss has no",
        "loss=odpo columns.score_chosen=null: this loss",
    )
    assert len(lines) == 3 and all(line.startswith(start) for line, start in zip(lines, starts, strict=True))


def test_a_role_without_a_column_and_scores_of_lists_are_accepted():
    assert problems(*VALID, "columns.label=none", "columns.chosen=a", "columns.rejected=b") == []
    assert problems(*VALID, "loss=kto", "columns.label=none", "columns.chosen=a") == []
    assert problems(*VALID, "loss=odpo", "columns.scores=overall_score") == []
    assert len(problems(*VALID, "loss=odpo", "columns.scores=none")) == 1


def test_a_wrong_value_makes_no_second_line_about_its_combinations():
    assert problems(*VALID, "batch_size=0", "gradient_accumulation_steps=3") == [
        "batch_size=0: must be a whole number of examples, 1 or more"
    ]


def test_processes_of_torchrun_need_a_trainer_for_several(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    (line,) = problems(*VALID)
    assert line.startswith("trainer=BasicTrainer WORLD_SIZE=2: this trainer uses one process; set")
    assert problems(*VALID, *SEVERAL) == []
    assert problems(*VALID, *SEVERAL, "n_processes=2", "replicate=2") == []
    (line,) = problems(*VALID, *SEVERAL, "n_processes=4")
    assert line == "n_processes=4 WORLD_SIZE=2: torchrun or srun sets the number of processes; set n_processes=auto"
    (line,) = problems(*VALID, *SEVERAL, "dry_run=true")
    assert line.startswith("dry_run=true WORLD_SIZE=2: a dry run uses one process; start without torchrun and srun")
    (line,) = problems(*VALID, *SEVERAL, "replicate=4")
    assert line == "replicate=4: must divide the number of processes, 2"
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert problems(*VALID) == []


def test_settings_are_frozen():
    settings, loss = validated(*VALID)
    for part, key in ((settings, "lr"), (settings.model, "add_bos"), (loss, "beta")):
        with pytest.raises(ValueError, match="frozen"):
            setattr(part, key, 1)


def test_the_original_name_of_precision_replaces_ours():
    assert validated(*VALID)[0].compute_precision == "float32"
    assert validated(*VALID, "precision=auto", "model.fsdp_policy_mp=bfloat16")[0].compute_precision == "bfloat16"


# YAML is the only place of defaults and comments


def yaml_keys(path, prefix="") -> dict[str, str]:
    """Return {dotted key: its line} of a file in config/, without what Hydra itself reads."""
    body = re.sub(r"(?ms)^(defaults|hydra):.*?(?=^\S)|^hydra:.*", "", path.read_text())
    keys, group = {}, ""
    for line in body.splitlines():
        if match := re.match(r"( *)(\w+):(.*)", line):
            indent, key, rest = match.groups()
            if rest.strip():
                keys[prefix + (f"{group}.{key}" if indent else key)] = line
            else:
                group = key
    return keys


def test_yaml_and_settings_have_the_same_keys_each_with_a_comment():
    config = ROOT / "config"
    found = yaml_keys(config / "config.yaml") | yaml_keys(config / "model" / "blank_model.yaml", "model.")
    found |= yaml_keys(config / "lora" / "default.yaml", "lora.")
    for name, loss in LOSSES.items():  # a key that several losses have needs a comment in one of them
        keys = yaml_keys(config / "loss" / f"{name}.yaml", "loss.")
        assert set(keys) == {"loss.name", *(f"loss.{field}" for field in loss.model_fields)}
        found |= {key: line for key, line in keys.items() if "#" in line or key not in found}
    assert {*found, "lora"} == set(known_keys(LOSSES))
    assert [line for key, line in found.items() if "#" not in line and key != "loss.name"] == []
    assert {path.stem for path in (config / "loss").glob("*.yaml")} == set(LOSSES)


def test_a_config_without_lora_trains_all_weights_and_one_with_some_of_its_keys_takes_the_others_defaults():
    """As the config.yaml of an earlier version's run, which is resumed."""
    values = {key: value for key, value in flatten(compose(*VALID)).items() if key != "lora"}
    defaults = default_values(ROOT / "config", "dpo", resumed=True)
    assert validate(values, defaults, LOSSES)[0].lora is None
    lora = validate(values | {"lora.r": 8}, defaults, LOSSES)[0].lora
    assert lora.model_dump() == yaml.safe_load((ROOT / "config" / "lora" / "default.yaml").read_text()) | {"r": 8}


def test_a_resumed_run_that_lacks_keys_takes_the_values_of_the_files_that_need_no_other():
    defaults = default_values(ROOT / "config", "dpo", resumed=True)
    without = {"exp_name", "local_run_dir", "model.name_or_path", "lora"}  # given, interpolated, or a group
    assert set(defaults) == set(known_keys({"dpo": LOSSES["dpo"]})) - without
    assert (defaults["lr"], defaults["wandb.enabled"], defaults["loss.beta"]) == (5e-7, True, 0.1)
    assert defaults["model.router_loss_weight"] == 0  # which versions without this key never added


def test_a_flat_config_holds_plain_values_and_the_mapping_of_an_optimizer_whole():
    values = flatten(compose(*VALID, "optimizer_args={betas:[0.8,0.9]}"))
    assert yaml.safe_load(yaml.safe_dump(values)) == values  # which takes no other types
    assert values["optimizer_args"] == {"betas": [0.8, 0.9]}


def test_a_setting_of_lora_without_lora_is_one_line():
    line = "lora.r: needs lora=default; without it all weights are trained"
    assert suggest("lora.r", "8", known_keys(LOSSES)) == line


def test_no_field_has_a_default_of_its_own():
    models = [Settings, *LOSSES.values(), *(group_of(Settings, name) for name in ("wandb", "model", "lora"))]
    assert [name for model in models for name, field in model.model_fields.items() if not field.is_required()] == []


def test_every_field_says_what_it_takes():
    for key in known_keys({}):
        assert key == "loss.name" or allowed(Settings, key) != "another value", key


@pytest.mark.parametrize("group", ["model", "loss"])
def test_every_config_file_composes_and_validates(group):
    for path in sorted((ROOT / "config" / group).glob("*.yaml")):
        chosen = {"model": "gpt2", "loss": "dpo"} | {group: path.stem}
        others = ("max_length=128", "max_prompt_length=64", "columns.score_chosen=a", "columns.score_rejected=b")
        found = problems(*(f"{key}={value}" for key, value in chosen.items()), *others)
        assert [line.partition(":")[0] for line in found] == ["model.name_or_path"] * (path.stem == "blank_model")


def test_a_yaml_file_without_optional_keys_takes_their_defaults():
    values = flatten(compose(*VALID))
    few = {key: value for key, value in values.items() if not key.startswith(("model.", "loss."))}
    few |= {"model.name_or_path": "somewhere", "loss.name": "ipo", "loss.beta": 0.3}
    settings, loss = validate(few, default_values(ROOT / "config", "ipo"), LOSSES)
    assert settings.model.policy_dtype == "float32" and settings.model.archive is None
    assert (loss.beta, loss.average_log_prob) == (0.3, False)
    defaults = yaml.safe_load((ROOT / "config" / "model" / "blank_model.yaml").read_text())
    assert settings.model.model_dump() == defaults | {"name_or_path": "somewhere"}


def test_the_time_that_chat_templates_see_is_a_date_or_a_time():
    for time in ("2026-01-31", "2026-01-31T12:00"):
        assert validated(*VALID, f"chat_template_time={time}")[0].chat_template_time == time
    for time in ("noon", "31", "2026-13-01"):
        line = f"chat_template_time={time}: must be a time, as 2026-01-31 or 2026-01-31T12:00, or null"
        assert problems(*VALID, f"chat_template_time={time}") == [line]
    line = "chat_template_args={'a': 1} prompt_format=hh: has no effect, since no chat template is applied"
    assert problems(*VALID, "chat_template_args={a: 1}", "prompt_format=hh")[0].startswith(line)
