"""The settings of a diagnosis: those of a run that an evaluation reads."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dpo.settings.config_files import read_config_files
from dpo.settings.constraints import START
from dpo.settings.hints import argument_problems
from dpo.system.errors import UserError, raise_problems
from dpo.system.installation import CONFIG

if TYPE_CHECKING:
    from dpo.settings.schema import Settings
    from dpo.training.objectives import Loss
    from tools.diagnose.checkpoints import Checkpoint

OWN = ("policy", "reference", "out")  # arguments of this program alone
# Settings of a run that change what is evaluated, or how it is computed; those of training would change nothing.
READ = (
    "datasets shares split_train split_test pairs train_on prompt_format chat_template chat_template_args "
    "chat_template_time on_inconsistent max_length max_prompt_length seed local_dirs "
    "device precision layout max_tokens_per_pass eval_batch_size n_eval_examples "
    "n_eval_model_samples sample_temperature sample_top_k sample_top_p "
    "model.tokenizer_name_or_path model.policy_dtype model.add_bos model.resize_embeddings loss.beta"
).split()
# Values for what is only trained with: nothing is trained, and no library or file for it may be here.
UNTRAINED: Mapping[str, Any] = {
    "reference": START, "sync_reference": None, "sync_mix": 1.0, "loss.precompute_reference": False,
    "model.reference_dtype": None, "model.archive": None, "model.from_scratch": False, "model.fsdp_policy_mp": None,
    "model.router_loss_weight": 0.0, "optimizer": "SGD", "optimizer_args": None, "weight_decay": None,
    "batch_size": 1, "gradient_accumulation_steps": 1, "n_epochs": 1, "n_examples": None,
    "scheduler": "constant", "min_lr_ratio": 0.0, "warmup_steps": 0, "eval_every": 1,
    "trainer": "BasicTrainer", "n_processes": "auto", "replicate": 1, "tensor_parallel": "auto", "ddp": False,
    "reduce_every_pass": False, "compile": False, "activation_checkpointing": False,
    "save_every": None, "keep_policies": False, "keep_best": None, "stop_after": None,
    "export_dtype": "auto", "push_to_hub": None, "trackers": [],
    "resume": None, "debug": False, "dry_run": False, "inspect": 0, "inspect_ids": False,
}  # fmt: skip
MODEL_SAMPLES = 64  # prompts: few enough for minutes on a CPU, enough for rates of finished samples


def is_read(key: str) -> bool:
    return key in READ or key.startswith("columns.")


def parse_arguments(arguments: Sequence[str]) -> dict[str, Any]:
    """The values of KEY=VALUE arguments as Hydra reads them; UserError with one line per problem."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from train import explained_by_key

    files = read_config_files(CONFIG)
    known = [*files.keys(), *OWN]
    names = [argument.partition("=")[0] for argument in arguments]
    raise_problems(argument_problems(arguments, known, {}))
    if flags := [argument for argument in arguments if argument.startswith(("-", "~", "+")) or "=" not in argument]:
        raise UserError(f"{flags[0]}: a diagnosis takes settings alone, KEY=VALUE")
    unread = [name for name in names if name not in OWN and not is_read(name)]
    raise_problems([f"{name}: a diagnosis trains nothing and does not read it; leave it out" for name in unread])
    with explained_by_key(known):
        parsed = OverridesParser.create().parse_overrides(list(arguments))
        return {str(override.key_or_group): override.value() for override in parsed}


def resolve(given: Mapping[str, Any], policy: "Checkpoint") -> "tuple[Settings, Loss]":
    """The settings of the evaluation, and its loss: those of the policy's run, else the defaults and DPO."""
    from dpo.settings.schema import default_values, validate
    from losses import LOSSES

    of_run = policy.settings()
    trained_with = LOSSES.get(str(of_run.get("loss.name")))
    values = of_run if trained_with is not None and compares_pairs(trained_with) else without_loss(of_run)
    loss_name = str(values.get("loss.name", "dpo"))
    defaults = default_values(CONFIG, loss_name, resumed=True)
    values = {"n_eval_model_samples": MODEL_SAMPLES, "loss.name": loss_name} | values
    values = {key: value for key, value in values.items() if not key.startswith(("lora.", "wandb.")) and key != "lora"}
    unused = {key: value for key, value in UNTRAINED.items() if key in defaults or key in values}
    unused |= {key: None for key in (*defaults, *values) if key.startswith("stop_if.")}
    place = {"exp_name": "diagnosis", "local_run_dir": ".", "model.name_or_path": policy.model_name}
    if "model.tokenizer_name_or_path" not in given:
        place["model.tokenizer_name_or_path"] = policy.tokenizer_name
    if given.get("max_tokens_per_pass") == "fit":
        raise UserError("max_tokens_per_pass=fit: is measured by training; set auto or a number of tokens")
    if "datasets" not in given and "datasets" not in of_run:
        raise UserError("datasets: is missing; set datasets=[FILE], pairs of a chosen and a rejected response")
    return validate(values | unused | place | dict(given), defaults, LOSSES)


def compares_pairs(loss: "type[Loss]") -> bool:
    """Whether a loss compares the log-ratios of two responses, each pair on its own, as the diagnosis does."""
    from dpo.training.objectives import PairLoss, ReferenceLoss

    return issubclass(loss, (PairLoss, ReferenceLoss))


def without_loss(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a run without those of its loss, and without the column that only such losses read."""
    return {key: value for key, value in values.items() if not key.startswith("loss.") and key != "columns.label"}
