"""A run's config.yaml, and which of its settings may change when it is resumed."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo.settings.config_files import format_value
from dpo.settings.constraints import START
from dpo.settings.hints import suggest, suggest_option
from dpo.settings.schema import flatten_plain, read_yaml
from dpo.system.errors import UserError, raise_problems, summarize_error
from dpo.system.installation import CONFIG

MISSING = object()  # equals no value of a setting

# Settings that may change in a resumed run without changing its numbers; the last two lines change only the rounding.
MAY_CHANGE = (
    "trackers wandb.enabled wandb.entity wandb.project minimum_log_interval_secs report push_to_hub "
    "sample_during_eval n_eval_model_samples sample_temperature sample_top_k sample_top_p "
    "keep_best stop_after stop_if.min_entropy stop_if.max_entropy stop_if.max_cross_entropy "
    "stop_if.max_unfinished stop_if.min_log_ratio stop_if.max_loss "
    "save_every keep_checkpoints keep_policies background_saves export_dtype eval_batch_size lora.export_merged "
    "max_tokens_per_pass activation_checkpointing compile device "
    "n_processes replicate tensor_parallel ddp reduce_every_pass collective_timeout"
).split()
MAY_GROW = ("n_epochs", "n_examples")
MAY_MOVE = (
    "datasets local_dirs chat_template model.name_or_path model.tokenizer_name_or_path model.archive lora.path "
    "reference"
).split()


def find_run_dir(path: Path) -> Path:
    """The run directory of RUN, RUN/LATEST, RUN/BEST or RUN/step-N; UserError if it is not the newest checkpoint."""
    if path.name == "BEST" and path.is_symlink():
        path = path.parent / path.readlink()
    if not re.fullmatch(r"step-\d+", path.name):
        return path.parent if path.name == "LATEST" else path
    steps = list_checkpoints(path.parent)
    if steps and path.name != steps[0].name:
        problem = f"resume={path}: a run continues from its newest checkpoint, {steps[0].name}"
        raise UserError(f"{problem}; {new_run_from(path)}" if path.is_dir() else problem)
    return path.parent


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    folders = [path for path in run_dir.glob("step-*") if re.fullmatch(r"step-\d+", path.name) and path.is_dir()]
    return sorted(folders, key=lambda path: -int(path.name.removeprefix("step-")))


def read_run_config(run_dir: Path, setting: str = "resume=") -> DictConfig:
    """Read a run's config.yaml as plain values; UserError, with the setting, if the folder is not a run directory."""
    try:
        made_by_runs = ("LATEST", "BEST", ".staging-LATEST", ".staging-BEST")
        links = [path.name for path in run_dir.iterdir() if path.is_symlink() and path.name not in made_by_runs]
        text = (run_dir / "config.yaml").read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ValueError("it holds YAML aliases, which no run writes")
        config = OmegaConf.create(text)
        assert isinstance(config, DictConfig)
        OmegaConf.to_yaml(config)
    except (OSError, yaml.YAMLError, OmegaConfBaseException, AssertionError, AttributeError, TypeError, ValueError,
            RecursionError) as error:  # fmt: skip
        reason = summarize_error(error)
        raise UserError(f"{setting}{run_dir}: not a run directory: its config.yaml cannot be read ({reason})") from None
    if links:
        problem = f"holds links ({', '.join(sorted(links))}) that no run creates; remove them"
        raise UserError(f"{setting}{run_dir}: {problem}")
    return config


def override_run_config(config: DictConfig, arguments: Sequence[str], known: Sequence[str]) -> dict[str, Any]:
    """Apply the overrides that a resumed run accepts to its config, and return them; UserError for any other.

    known are the names of all settings. Interpolations in the config are refused, since they could expose secrets to
    whoever wrote the file.
    """
    try:
        overrides = [(o, o.key_or_group, o.value()) for o in OverridesParser.create().parse_overrides(list(arguments))]
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(" ".join(str(error).split())) from None
    changes: dict[str, Any] = {}
    problems: list[str] = []
    for override, key, value in overrides:
        is_plain = override.type == OverrideType.CHANGE and not override.is_sweep_override()
        if not is_plain and key in known:  # of an unknown key, that is the problem
            problems.append(f"{override.input_line}: a resumed run accepts only KEY=VALUE")
        elif key == "stop_if":
            changes |= conditions(value, known)
        else:
            changes[key] = value
    return change_run_config(config, changes, known, problems)


def conditions(option: object, known: Sequence[str]) -> dict[str, Any]:
    """The settings of an option of the group stop_if; those that it leaves out are null."""
    folder = CONFIG / "stop_if"
    options = sorted(path.stem for path in folder.glob("*.yaml"))
    if option is not None and option not in options:
        raise UserError(suggest_option("stop_if", str(option), options))
    values = {} if option is None else read_yaml(folder / f"{option}.yaml")
    return {key: values.get(key.removeprefix("stop_if.")) for key in known if key.startswith("stop_if.")}


def changes_of_command(config: DictConfig, command: DictConfig, typed: Collection[str]) -> dict[str, Any]:
    """What a command's config, as composed for a new run, changes in a stored one, {dotted key: value}.

    typed are the keys of the command line: others that the run predates are no change. Neither is a value for which the
    run has recorded its choice. An interpolation is a change, to what it means in the command.
    """
    old, new = (plain_settings(each) for each in (config, command))
    if old["loss.name"] != new["loss.name"]:
        return {"loss.name": new["loss.name"]}
    if ("lora" in old) != ("lora" in new):
        return {"lora": None if "lora" in new else "default"}
    changes = {}
    for key, value in new.items():
        is_recorded = key == "chat_template_time" and value is None
        is_recorded |= key in ("max_tokens_per_pass", "compile") and value in ("auto", "fit")
        is_later = key not in old and key not in typed
        if key in ("local_run_dir", "resume") or is_recorded or is_later:
            continue
        meant = OmegaConf.select(command, key) if is_interpolated(value) else value
        if meant != old.get(key, MISSING) and (value != old.get(key) or is_interpolated(value)):
            changes[key] = meant
    return changes


def plain_settings(config: DictConfig) -> dict[str, Any]:
    """A config as {dotted key: value}, with its interpolations; lora is None for a run without an adapter."""
    values = OmegaConf.to_container(config, resolve=False)
    assert isinstance(values, dict)
    settings = flatten_plain(values)
    return settings if any(key.startswith("lora.") for key in settings) else settings | {"lora": None}


def change_run_config(
    config: DictConfig, changes: Mapping[str, Any], known: Sequence[str], problems: Sequence[str] = ()
) -> dict[str, Any]:
    """Apply changes that a resumed run accepts to its config, and return them; UserError for any other.

    problems are reported with those found.
    """
    path, settings = config.local_run_dir, plain_settings(config)
    problems, applied = [*problems], {}
    for key, value in changes.items():
        if value == settings.get(key, settings.get(f"{key}.name", MISSING)):  # loss=dpo, as the run has it
            continue
        if key not in settings and key not in (*MAY_CHANGE, "model", "loss", "lora"):  # a run may predate a setting
            problems.append(suggest(key, format_value(value), known))
        elif key in MAY_GROW and (name := settings.get("scheduler", "constant")) != "constant":
            length = f"{key}={format_value(settings[key])}"
            reason = f"scheduler={name} lowers the learning rate over {length}, so a longer run needs another schedule"
            problems.append(f"{key}={format_value(value)}: {reason}; start a new run")
        elif may_change(key, settings.get(key), value):
            OmegaConf.update(config, key, value)
            applied[key] = value
        else:
            kept = f"{key}={format_value(settings[key])}" if key in settings else f"its own {key}"
            mitigation = new_run_from(Path(path) / "LATEST")
            problems.append(f"{key}={format_value(value)}: a resumed run keeps {kept}; leave this out, or {mitigation}")
    for key, value in settings.items():
        if key not in applied and is_interpolated(value):
            problems.append(f"{key}={value}: is not resolved again when a run is resumed; add {key}=VALUE")
    raise_problems(problems)
    return applied


def new_run_from(checkpoint: Path) -> str:
    """Advice on how to start a new run with the weights of a checkpoint; a sharded one may hold no policy.pt."""
    if (checkpoint / "policy.pt").is_file():
        return f"start a new run with model.archive={checkpoint}/policy.pt"
    if not checkpoint.is_dir():
        return "start a new run"
    export = f"`python -m tools.export {checkpoint} OUT` (of a LoRA run with --merged)"
    return f"start a new run with model.name_or_path=OUT, which {export} writes"


def may_change(key: str, old: object, new: object) -> bool:
    """Whether a resumed run takes a new value; one for an interpolation is compared with the checkpoint's later."""
    if key == "reference" and START in (old, new):  # other weights, which have another fingerprint or none
        return False
    return key in (*MAY_CHANGE, *MAY_MOVE) or (key in MAY_GROW and grows(old, new)) or is_interpolated(old)


def is_interpolated(value: object) -> bool:
    """Whether OmegaConf would look up something in a stored value, other than a path in this project."""
    return "${" in str(value) and not re.fullmatch(r"\$\{project_dir:[\w./-]+\}", str(value))


def grows(old: object, new: object) -> bool:
    """Whether a limit is raised or lifted."""
    if not isinstance(old, (int, float)) or isinstance(new, bool):
        return False
    return new is None or (isinstance(new, (int, float)) and new > old)
