"""Hints on settings that do not exist: right for other trainers' names, never absurd, never about missing keys."""

import re
from pathlib import Path

import pytest

from dpo.settings.config_files import read_config_files
from dpo.settings.hints import HINTS, OTHER_LOSSES, TABLE, argument_problems, suggest, suggest_option

FILES = read_config_files(Path(__file__).resolve().parents[3] / "config")
KNOWN, OPTIONS = FILES.keys(), FILES.options()
NO_IDEA = "`python train.py --help` lists all of them"


def hint(key: str, value: str | None = None) -> str:
    """Return what is suggested for a key, without the words that every line begins with."""
    line = suggest(key, value, KNOWN)
    assert "\n" not in line and line.startswith(f"{key}: ")
    return line.removeprefix(f"{key}: there is no such setting; ").removeprefix(f"{key}: is a group of settings; ")


# The table


@pytest.mark.parametrize("name", HINTS)
def test_every_hint_names_settings_and_choices_that_exist(name):
    text = hint(name, "dpo")
    names = set(re.findall(r"[\w.]+", text)) & {*KNOWN, *OPTIONS, "resume"}
    assert names - {"loss", "lora", "model"} or re.search("loss=|lora=", text), text
    for key, choice in re.findall(r"(?<![\w.])([a-z][\w.]*)=([\w.]+)?", text):
        assert key in KNOWN or key in OPTIONS, text
        assert key not in OPTIONS or choice in (*OPTIONS[key], "help"), text
    for word in re.findall(r"[a-z]+(?:_[a-z]+)+(?:\.\w+)?|\w+\.\w+_\w+", text):
        assert word in KNOWN or word == "shared_prefix", text


def test_no_name_of_the_table_is_a_setting_and_each_stands_there_once():
    names = [name for names in TABLE for name in names.split()]
    assert len(names) == len(set(names)) > 150
    assert not set(names) & set(KNOWN)


@pytest.mark.parametrize("name, choice", OTHER_LOSSES.items())
def test_names_of_losses_elsewhere_lead_to_losses_and_settings_that_exist(name, choice):
    loss, *settings = choice.split()
    assert loss in OPTIONS["loss"] and name not in OPTIONS["loss"]
    assert all(setting.partition("=")[0] in KNOWN for setting in settings)


@pytest.mark.parametrize(
    "key, value, expected",
    [
        ("learning_rate", "1e-5", "use lr=1e-5"),
        ("ref_model_name_or_path", "me/sft", "use reference=me/sft"),
        ("ref_adapter_name", "reference", "use reference=reference"),
        ("LearningRate", "1e-5", "use lr=1e-5"),
        ("learning-rate", None, "use lr"),
        ("training.learning_rate", "1e-5", "use lr=1e-5"),
        ("learning_rat", "1e-5", "use lr=1e-5"),
        ("per_device_train_batch_size", "8", "use batch_size=8, the examples per update: "),
        ("gradient_accumulation", "2", "use gradient_accumulation_steps=2, "),
        ("num_train_epochs", "3", "use n_epochs=3"),
        ("max_steps", "1000", "use n_examples, which counts training examples: the number of updates * batch_size"),
        ("eval_steps", "500", "use eval_every, which counts training examples"),
        ("save_steps", "0.1", "use save_every, which counts training examples"),
        ("output_dir", "out", "use local_run_dir=out, "),
        ("run_name", "x", "use exp_name=x"),
        ("use_peft", "true", "use lora=default"),
        ("moe_aux_loss_coef", "0.1", "use model.router_loss_weight=0.1"),
        ("finetuning_type", "lora", "use lora=default"),
        ("model.lora_rank", "8", "use lora=default lora.r=8"),
        ("lora.rank", "8", "use lora=default lora.r=8"),
        ("lora_target", "all", "use lora=default lora.targets=[NAME,NAME], or lora.targets=auto"),
        ("lora.any_thing", "8", "`python train.py --help lora` lists all of them"),
        ("load_in_4bit", "true", "use lora=default lora.quantize=nf4"),
        ("deepspeed", "zero3.json", "use trainer=FSDPTrainer, which shards the model over all GPUs"),
        ("n_gpus", "8", "use trainer=FSDPTrainer n_processes=8"),
        ("bf16", "true", "use precision=bfloat16"),
        ("fp16", "true", "use precision=bfloat16 or precision=float32; float16 needs loss scaling"),
        ("report_to", "none", "use trackers, "),
        ("wandb", "false", "use wandb.enabled=true or wandb.enabled=false"),
        ("model_name_or_path", "org/name", "use model.name_or_path=org/name"),
        ("beta", "0.2", "use loss.beta=0.2"),
        ("loss_type", "sigmoid", "use loss=dpo; "),
        ("loss_type", "[ipo]", "use loss=ipo; "),
        ("loss_type", "bco_pair", "use loss=bco; "),
        ("loss_type", None, "use loss=NAME; `python train.py loss=help` lists all of them"),
        ("lr_scheduler_type", "cosine", "use scheduler: constant, linear, cosine or wsd"),
        ("adam_beta1", "0.9", "use optimizer_args='{NAME: VALUE}', as "),
        ("rpo_alpha", "1.0", "use loss.nll_weight=1.0"),
        ("use_weighting", "true", "use loss.token_weights=wpo"),
        ("optim", "adamw_torch", "use optimizer=NAME, a class of torch.optim such as AdamW"),
        ("train_dataset", "me/set", "use datasets=[NAME], "),
        ("model.dtype", "bfloat16", "use precision for the computation and model.policy_dtype for the parameters"),
        ("split", "train_sft", "use split_train=train_sft, and split_test for the split to evaluate on"),
        ("data.split", "train", "use split_train=train, "),
        ("streaming", "true", "leave it out: datasets are read once"),
        ("enable_thinking", "false", "use chat_template_args='{NAME: VALUE}'"),
        (
            "new_special_tokens",
            "[<a>]",
            "add new tokens to the tokenizer's folder, and set model.resize_emb",
        ),
        ("dataset_mixer", "{a: 1.0}", "use datasets=[NAME,NAME] and shares=[SHARE,SHARE], "),
        ("load_best_model_at_end", "true", "use keep_best=METRIC, "),
        ("metric_for_best_model", "loss/eval", "use keep_best=loss/eval, "),
        ("greater_is_better", "true", "use keep_best=max:NAME or keep_best=min:NAME"),
        ("early_stopping_patience", "3", "use stop_after=3 with keep_best=METRIC"),
        ("patience", "3", "use stop_after=3 with keep_best=METRIC"),
        ("early_stopping_threshold", "0.01", "leave it out: every better value of keep_best counts"),
        ("max_seq_length", "1024", "use max_length=1024, "),
        ("gradient_checkpointing", "true", "use activation_checkpointing=true"),
        ("save_total_limit", "2", "use keep_checkpoints=2"),
        ("fsdp_port", "12355", "leave it out: "),
    ],
)
def test_names_of_other_trainers_and_earlier_versions_lead_to_ours(key, value, expected):
    assert hint(key, value).startswith(expected)


# Nearest keys


@pytest.mark.parametrize(
    "key, meant",
    [
        ("bacth_size", "batch_size"),
        ("batchsize", "batch_size"),
        ("BatchSize", "batch_size"),
        ("size_batch", "batch_size"),
        ("sede", "seed"),
        ("max_lenght", "max_length"),
        ("wamup_steps", "warmup_steps"),
        ("optimiser", "optimizer"),
        ("eval_evry", "eval_every"),
        ("n_example", "n_examples"),
        ("modle", "model"),
        ("losss", "loss"),
        ("lrr", "lr"),
        ("llr", "lr"),
        ("n_epoch", "n_epochs"),
        ("lr.x", "lr"),
        ("optimizer.lr", "lr"),
        ("average_log_prob", "loss.average_log_prob"),
        ("loss.bta", "loss.beta"),
        ("wandb.enable", "wandb.enabled"),
        ("archive", "model.archive"),
    ],
)
def test_a_typing_error_is_answered_with_the_nearest_key(key, meant):
    assert hint(key, "1") == f"did you mean {meant}?"


UNRELATED = """
    apple river stone cloud window garden mirror bridge candle forest rocket pencil bottle ladder hammer jacket kitten
    lemon magnet napkin orange parrot quartz ribbon saddle tunnel umbrella violin walnut yellow zebra anchor basket
    camera dragon engine feather guitar helmet island jungle kettle lantern mountain needle ocean pepper queen rabbit
    silver ticket uncle valley winter yogurt airport balance cabinet diamond eagle falcon giraffe harbor beetle jewel
    kingdom letter market number office planet question reason school theory under voice weather year zone action
    animal answer arrow autumn beach bird blood board body book bottom box boy brain branch bread brother building
    butter cake call car castle cat chair child church circle city clock coat coffee color corner country cousin cow
    crown culture cup dance daughter day deal death desk dinner doctor dog door dream dress earth east economy edge
    egg evening eye face family farm father feeling field finger fire fish flower food foot friend fruit game girl
    glass gold government grass ground group hair hand head health heart hill history home horse hospital hotel hour
    house idea iron kitchen king knife lady lake land law leaf leg lesson life light line lion lip love machine man
    map meat metal milk mind minute money month moon morning mother mouth movie music name need feed speech spend
    later device_driver deeper seen slot boss less lose last slope layer louder drain rain price bug
    trr band handle compute pile simple tempo epic table cable deed seat beam lossless medal
"""


def test_no_absurd_guess_is_made():
    words = UNRELATED.split()
    assert len(set(words)) > 200
    assert {word: hint(word, "1") for word in words if hint(word, "1") != NO_IDEA} == {}


@pytest.mark.parametrize("key", ["model.foo", "loss.foo", "wandb.foo"])
def test_an_unknown_key_of_a_group_leads_to_the_help_on_it(key):
    assert hint(key, "1") == f"`python train.py --help {key.partition('.')[0]}` lists all of them"


def test_a_key_that_the_chosen_loss_lacks_is_reported_as_such():
    assert suggest("loss.label_smoothing", "0.1", KNOWN) == "loss.label_smoothing: the chosen loss has no such setting"
    assert suggest("engine.url", "x", ["engine.url"]) == "engine.url: the chosen engine has no such setting"


def test_a_group_of_settings_is_no_setting_itself():
    assert (
        suggest("wandb", "false", KNOWN)
        == "wandb: is a group of settings; use wandb.enabled=true or wandb.enabled=false"
    )
    assert suggest("model", "x", KNOWN) == "model: is a group of settings; `python train.py --help model` lists them"


# Files of a group


@pytest.mark.parametrize(
    "group, name, end",
    [
        ("loss", "dpoo", "; did you mean dpo?"),
        ("loss", "sigmoid", "; use loss=dpo"),
        ("loss", "cdpo", "; use loss=dpo loss.label_smoothing=0.1"),
        ("loss", "zebra", " sppo"),
        ("lora", "null", "; leave it out to train all weights"),
        ("model", "gpt22", "; did you mean gpt2?"),
        ("model", "pythia-28", "; did you mean pythia28?"),
        ("model", "gpt7", "; use model.name_or_path=gpt7, a folder or a name on the Hub"),
        ("model", "HF/SmolLM2-135M", "; use model.name_or_path=HF/SmolLM2-135M, a folder or a name on the Hub"),
    ],
)
def test_a_file_that_a_group_lacks_is_answered_with_those_it_has(group, name, end):
    line = suggest_option(group, name, OPTIONS[group])
    assert line.startswith(f"{group}={name}: there is no such file in config/{group}/; choose one of ")
    assert all(option in line for option in OPTIONS[group]) and line.endswith(end)


# Whole command lines


@pytest.mark.parametrize(
    "command",
    [
        "loss=dpo model=gpt2 lr=1e-6 datasets=[hh,shp] loss.beta=0.1",
        "loss=dpo +lr=1 ++seed=2 ~wandb.entity ~loss",
        "-m loss=dpo,ipo model=gpt2,pythia28 loss.beta=0.1,0.2 seed=range(3)",
        "loss=[dpo] model=${oc.env:MODEL} exp_name=a=b local_dirs.0=/data wandb={enabled:false}",
        "hydra.run.dir=. hydra/launcher=basic hydra.verbose=true --cfg job",
        "loss=dpo -c job --resolve --info all --multirun --package model --run --version --hydra-help",
        "--config-name other learning_rate=1 nonsense",
        "-cd folder learning_rate=1",
        "-sc query=bash typo=1",
        "--experimental-rerun job.pickle typo=1",
        "loss=dpo model=gpt2 exp_name=",
    ],
)
def test_what_hydra_takes_or_alone_can_judge_passes(command):
    assert argument_problems(command.split(), KNOWN, OPTIONS) == []


def test_every_wrong_word_is_reported_and_none_of_the_right_ones():
    command = "loss=dpoo lr=1e-5 wandb=false +beta=0.1 typo=1 model=org/name seed=3 datasets.x=1"
    lines = argument_problems(command.split(), KNOWN, OPTIONS)
    assert [re.match(r"[\w.]+", line)[0] for line in lines] == ["loss", "wandb", "beta", "typo", "model", "datasets.x"]


@pytest.mark.parametrize(
    "command, line",
    [
        ("--lr=1e-5", "--lr=1e-5: settings are written without dashes; use lr=1e-5"),
        ("loss=dpo --lr 1e-5", "--lr: settings are written without dashes; use lr=1e-5"),
        ("--batch-size 8 loss=dpo", "--batch-size: settings are written without dashes; use batch_size=8"),
        ("--debug loss=dpo", "--debug: settings are written without dashes; use debug=VALUE"),
        ("--model gpt2", "--model: settings are written without dashes; use model=gpt2"),
        ("--epochs 3", "--epochs: settings are written without dashes; use n_epochs=3"),
        ("--num-epochs 3 loss=dpo", "--num-epochs: settings are written without dashes; use n_epochs=3"),
        ("--beta=0.1", "--beta=0.1: settings are written without dashes; use loss.beta=0.1"),
    ],
)
def test_a_setting_that_is_written_as_a_flag_is_answered_with_its_right_form(command, line):
    (problem,) = argument_problems(command.split(), KNOWN, OPTIONS)
    assert problem.startswith(line)


@pytest.mark.parametrize(
    "command, word", [("lr = 1e-5", "lr"), ("datasets=[hh, shp]", "shp]"), ("deepspeed", "deepspeed")]
)
def test_words_without_an_equals_sign_lead_to_one_line_about_the_form(command, word):
    (problem,) = argument_problems(command.split(), KNOWN, OPTIONS)
    assert problem.startswith(f"{word}: a setting is written KEY=VALUE without spaces; ")


def test_what_a_terminal_would_obey_is_escaped():
    evil = "\x1b[2J\nerror: forged"
    for arguments in (["epochs=" + evil], ["typo" + evil], ["--lr=" + evil], ["--lr", evil]):
        lines = argument_problems(arguments, KNOWN, OPTIONS)
        assert len(lines) == 1 and lines[0].isprintable()
