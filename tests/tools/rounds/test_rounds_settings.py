"""The config of rounds: its keys, what is refused, and what may change when rounds are resumed."""

import copy
from functools import cache
from pathlib import Path

import hydra
import pytest
from conftest import GOLDENS, ROOT
from omegaconf import DictConfig, OmegaConf

from dpo.settings.config_files import read_config_files
from dpo.settings.schema import Settings
from dpo.system.errors import UserError
from tools.rounds.settings import (
    GROUPS,
    MAY_CHANGE,
    RoundsSettings,
    override_config,
    settings_fingerprint,
    validate_config,
)
from utils import register_resolvers

BASE = (
    *("loss=dpo", f"model.name_or_path='{GOLDENS / 'tiny-gpt2'}'", "scorer=function", "scorer.function=score:length"),
    *("prompts=[prompts.jsonl]", "wandb.enabled=false"),
)
KNOWN = read_config_files(ROOT / "config", "rounds").keys()


def compose(*overrides: str) -> DictConfig:
    return copy.deepcopy(compose_once((*BASE, *overrides)))


@cache
def compose_once(overrides: tuple[str, ...]) -> DictConfig:
    register_resolvers()
    with hydra.initialize_config_dir(str(ROOT / "config"), version_base=None):
        return hydra.compose("rounds", overrides=list(overrides))


def problems(*overrides: str) -> list[str]:
    """Return the lines with which a command line is refused."""
    with pytest.raises(UserError) as raised:
        validate_config(compose(*overrides))
    return list(raised.value.args)


def test_a_field_is_declared_for_each_key_of_the_yaml_that_a_training_run_does_not_have():
    own = {key for key in OmegaConf.load(ROOT / "config" / "rounds.yaml") if key != "defaults"}
    assert own - Settings.model_fields.keys() == RoundsSettings.model_fields.keys() - {"reference", "datasets"}
    assert {"reference", "datasets"} <= own


@pytest.mark.parametrize("group, name", [(group, name) for group, kinds in GROUPS.items() for name in kinds])
def test_engines_and_scorers_have_the_fields_of_their_yaml_each_with_a_comment(group, name):
    options = {g.name: {option.name: option for option in g.options} for g in FILES.groups}[group]
    settings = {setting.key: setting for setting in options[name].settings}
    assert settings.keys() - {f"{group}.name"} == {f"{group}.{key}" for key in GROUPS[group][name].model_fields}
    assert all(setting.comment for key, setting in settings.items() if key != f"{group}.name")


FILES = read_config_files(ROOT / "config", "rounds")


def test_every_key_of_rounds_has_a_comment_and_what_may_change_exists():
    assert all(setting.comment or setting.key == "exp_name" for setting in FILES.settings)
    assert [key for key in MAY_CHANGE if key not in KNOWN] == []


def test_settings_of_a_training_run_apply_as_well():
    config = validate_config(compose("lr=1e-6", "loss.beta=0.3", "rounds=5", "engine.batch_size=8"))
    assert (config.run.lr, config.loss.beta, config.rounds.rounds, config.engine.batch_size) == (1e-6, 0.3, 5, 8)
    assert config.run.reference == "start" and config.rounds.reference == "previous"


def test_all_problems_are_in_one_message():
    assert problems("rounds=0", "samples=1", "lr=0", "engine.batch_size=0", "start=last", "min_margin=-1") == [
        "rounds=0: must be a whole number of rounds, 1 or more",
        "samples=1: must be a whole number of samples, 2 or more",
        "start=last: must be one of previous, first",
        "min_margin=-1: must be a number, 0 or more",
        "engine.batch_size=0: must be a whole number of samples, 1 or more",
        "lr=0: must be a number above 0",
    ]


REFUSED = {
    "loss=sft": ("loss=sft",),
    "reference=first": ("model=tiny", "reference=first"),
    "reference=models/sft": ("loss=simpo", "reference=models/sft"),
    "shares=": ("datasets=[hh]", "shares=[1,2]"),
    "columns.prompt=question": ("datasets=[hh]", "columns.prompt=question"),
    "push_to_hub=me/name": ("push_to_hub=me/name",),
    "debug=true": ("debug=true",),
    "inspect=3": ("inspect=3",),
}


@pytest.mark.parametrize("begins", REFUSED)
def test_what_no_round_could_honour_is_refused(begins):
    (line,) = problems(*REFUSED[begins])
    assert line.startswith(begins)


def test_resumed_rounds_take_more_rounds_and_other_devices_and_pass_on_what_concerns_training():
    values = compose()
    before = settings_fingerprint(values)
    of_runs = override_config(
        values, ["rounds=5", "engine.batch_size=8", "device=cpu", "report=false", "min_entropy=0.1"], KNOWN
    )
    assert of_runs == ["device=cpu", "report=false"]
    assert (values.rounds, values.device, values.report, values.min_entropy) == (5, "cpu", False, 0.1)
    assert settings_fingerprint(values) == before


def test_resumed_rounds_refuse_what_would_change_what_is_done_already():
    with pytest.raises(UserError) as raised:
        override_config(compose(), ["lr=1", "samples=16", "loss=ipo", "sample=3", "loss.beta=0.1"], KNOWN)
    kept = "leave it out, or begin anew"
    assert list(raised.value.args) == [
        f"lr=1: resumed rounds keep lr=5e-07; {kept}",
        f"samples=16: resumed rounds keep samples=8; {kept}",
        f"loss=ipo: resumed rounds keep loss=dpo; {kept}",
        "sample: there is no such setting; did you mean samples?",
    ]


def test_the_fingerprint_depends_on_all_other_settings_but_not_on_the_folder():
    base = settings_fingerprint(compose())
    assert settings_fingerprint(compose(f"local_run_dir={Path('elsewhere')}", "exp_name=other")) == base
    for override in (
        "lr=1e-6",
        "samples=4",
        "loss.beta=0.2",
        "sample_temperature=0.7",
        "pairing=all",
    ):
        assert settings_fingerprint(compose(override)) != base, override
