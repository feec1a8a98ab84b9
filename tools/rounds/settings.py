"""The settings of rounds: config/rounds.yaml, and from them the settings of each training run."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, Field

from dpo.data.columns import NO_COLUMN, PAIR_SCORES
from dpo.settings.config_files import format_value
from dpo.settings.constraints import START
from dpo.settings.hints import suggest
from dpo.settings.schema import (
    REMOVED,
    Flag,
    Group,
    NotNegative,
    Probability,
    Rate,
    Settings,
    Text,
    build,
    default_values,
    flatten,
    known_keys,
    validate,
    whole,
)
from dpo.system.errors import UserError, raise_problems
from dpo.system.installation import CONFIG
from losses import LOSSES
from tools.rounds.engines import BuiltinEngine, Engine
from tools.rounds.external_engines import CommandEngine, ServerEngine
from tools.rounds.scorers import SCORERS, Scorer

if TYPE_CHECKING:
    from dpo.training.objectives import Loss

ENGINES: dict[str, type[Engine]] = {"builtin": BuiltinEngine, "server": ServerEngine, "command": CommandEngine}
GROUPS: dict[str, Mapping[str, type[BaseModel]]] = {"engine": ENGINES, "scorer": SCORERS}


class RoundsSettings(Group):
    """The keys of config/rounds.yaml that a training run does not have, or that mean something else there."""

    prompts: list[Text] = Field(min_length=1, description="a list of files or data sets, as in [prompts.jsonl]")
    eval_prompts: Annotated[list[Text], Field(min_length=1)] | None = Field(
        description="a list of files or data sets, as in [held_out.jsonl]"
    )
    n_eval_prompts: int = whole("prompts", ge=1)
    prompts_per_round: int | None = whole("prompts", ge=1)
    rounds: int = whole("rounds", ge=1)
    samples: int = whole("samples", ge=2)
    start: Literal["previous", "first"]
    reference: Text = Field(description="previous, first, a file, a folder or a name on the Hub")
    pairing: Literal["best_worst", "best_random", "all", "length_matched"]
    min_margin: NotNegative
    replay: int = whole("rounds", ge=0)
    datasets: list[Text] = Field(description="a list, as in [pairs.jsonl]; [] for none")
    accept_scorer: Flag
    min_entropy: Rate
    max_unfinished: Probability


@dataclass(frozen=True)
class Config:
    """A validated config of rounds.

    run  the settings of a training run, for what rounds share with it: model, device, lengths, sampling
    """

    values: DictConfig
    rounds: RoundsSettings
    run: Settings
    loss: "Loss"
    engine: Engine
    scorer: Scorer

    @property
    def out(self) -> Path:
        return Path(self.values.local_run_dir)


def validate_config(config: DictConfig) -> Config:
    """The typed settings of a composed config; UserError with one line per problem."""
    values = flatten(config)
    known = [*known_keys(LOSSES), *RoundsSettings.model_fields, *group_keys()]
    own = {key: value for key, value in values.items() if key in RoundsSettings.model_fields}
    rounds, wrong = build(RoundsSettings, own, "", known)
    problems = [line for line in wrong.values() if line]
    chosen: dict[str, Any] = {}
    for name, kinds in GROUPS.items():
        fields = {key: value for key, value in values.items() if key.startswith(f"{name}.") and key != f"{name}.name"}
        kind = kinds.get(str(values.get(f"{name}.name")))
        if kind is None:
            problems.append(f"{name}.name={values.get(f'{name}.name')}: must be one of {', '.join(kinds)}")
            continue
        chosen[name], wrong = build(kind, fields, f"{name}.", known)
        problems += [line for line in wrong.values() if line]
    try:
        run, loss = validate(run_values(values), default_values(CONFIG, values.get("loss.name")), LOSSES)
    except UserError as error:
        raise UserError(*problems, *error.args) from None
    if chosen.get("engine"):
        problems += chosen["engine"].problems(run)
    if chosen.get("scorer"):
        problems += chosen["scorer"].problems()
    problems += combination_problems(rounds, run, loss)
    raise_problems(problems)
    assert rounds is not None
    return Config(config, rounds, run, loss, chosen["engine"], chosen["scorer"])


def group_keys() -> list[str]:
    return [f"{name}.{key}" for name, kinds in GROUPS.items() for kind in kinds.values() for key in kind.model_fields]


def run_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a training run among those of rounds, with stand-ins for what each round sets itself."""
    own = (*RoundsSettings.model_fields, *REMOVED)
    run = {key: value for key, value in values.items() if key not in own and key.partition(".")[0] not in GROUPS}
    loss = LOSSES.get(str(values.get("loss.name")))
    scores = {f"columns.{role}": role for role in PAIR_SCORES} if loss is not None and loss.needs_scores else {}
    return run | {"datasets": ["pairs.jsonl"], "reference": START} | scores


def combination_problems(rounds: RoundsSettings | None, run: Settings, loss: "Loss") -> list[str]:
    """A line for each combination of settings that no round can honour."""
    problems = []
    if loss.n_responses == 1:
        problems.append("loss=sft: rounds train on pairs; choose a loss of pairs, with loss.nll_weight for an SFT term")
    for key, value in (("debug", run.debug), ("inspect", run.inspect), ("keep_policies", run.keep_policies)):
        if value:
            problems.append(f"{key}={format_value(value)}: is for a single training run; leave it out")
    if run.push_to_hub is not None:
        problems.append(f"push_to_hub={run.push_to_hub}: upload OUT/best afterwards, as `hf upload` does; leave it out")
    if rounds is None:
        return problems
    if rounds.reference == "first" and run.model.from_scratch and not run.model.archive and loss.needs_reference:
        problems.append(
            "reference=first: random weights are not stored anywhere; train a first policy, and set model.archive"
        )
    if rounds.reference not in ("previous", "first") and not loss.needs_reference:
        problems.append(f"reference={rounds.reference}: the loss has no reference; leave it out")
    for role, column in run.columns.model_dump().items():
        if rounds.datasets and column not in (None, NO_COLUMN, role):
            problems.append(
                f"columns.{role}={column}: the rounds' own pairs have no such column; rename it in prompts and datasets"
            )
    if run.shares is not None and len(run.shares) != len(rounds.datasets):
        n = len(rounds.datasets)
        problems.append(
            f"shares={run.shares}: must have one number for each of the {n} datasets, not for the rounds' pairs"
        )
    return problems


# Resuming

# Settings that may change without changing a sample, a score or a weight, or change only their rounding
MAY_CHANGE = (
    "rounds min_entropy max_unfinished accept_scorer trackers wandb.enabled wandb.entity wandb.project "
    "minimum_log_interval_secs report save_every keep_checkpoints background_saves eval_batch_size "
    "max_tokens_per_pass activation_checkpointing device n_processes replicate tensor_parallel ddp "
    "reduce_every_pass collective_timeout engine.batch_size engine.url engine.command engine.at_once engine.timeout "
    "engine.start_timeout engine.max_gap scorer.batch_size scorer.url scorer.at_once scorer.timeout"
).split()
PLACES = ("local_run_dir", "exp_name", "local_dirs")


def override_config(values: DictConfig, arguments: Sequence[str], known: Sequence[str]) -> list[str]:
    """Apply the overrides that resumed rounds accept, and return those that a resumed training run takes as well.

    UserError with a line for each that would change what is done already.
    """
    stored = flatten(values)
    problems, of_runs = [], []
    for override in OverridesParser.create().parse_overrides(list(arguments)):
        key, value = override.key_or_group, override.value()
        name = f"{key}.name" if f"{key}.name" in stored else key  # loss=dpo
        if name not in known and name not in stored:
            problems.append(suggest(key, format_value(value), known))
        elif key in MAY_CHANGE and key in stored:
            OmegaConf.update(values, key, value)
            if key not in RoundsSettings.model_fields and key.partition(".")[0] not in GROUPS:
                of_runs.append(str(override.input_line))
        elif value != stored.get(name):
            kept = f"{key}={format_value(stored.get(name))}"
            problems.append(f"{key}={format_value(value)}: resumed rounds keep {kept}; leave it out, or begin anew")
    raise_problems(problems)
    return of_runs


def settings_fingerprint(values: DictConfig) -> str:
    """A SHA-256 of all settings that resumed rounds keep."""
    kept = {key: value for key, value in flatten(values).items() if key not in (*MAY_CHANGE, *PLACES)}
    return hashlib.sha256(repr(sorted(kept.items())).encode()).hexdigest()
