"""What a resumed run may change, and what it is advised to do instead."""

import pytest
from omegaconf import OmegaConf

from dpo.settings.run_config import find_run_dir, override_run_config
from dpo.system.errors import UserError


def test_a_new_run_is_advised_with_an_archive_that_is_there(tmp_path):
    config = OmegaConf.create({"lr": 1.0, "local_run_dir": str(tmp_path)})

    def advice() -> str:
        with pytest.raises(UserError) as error:
            override_run_config(config.copy(), ["lr=2"], ["lr"])
        return str(error.value).removeprefix("lr=2: a resumed run keeps lr=1.0; leave this out, or ")

    assert advice() == "start a new run"
    for name in ("step-8", "step-16"):
        (tmp_path / name).mkdir()
    (tmp_path / "LATEST").symlink_to("step-16")
    several = "start a new run with model.name_or_path=OUT, which `python -m tools.export {}"
    assert advice().startswith(several.format(f"{tmp_path}/LATEST OUT`"))
    with pytest.raises(UserError, match=f"newest checkpoint, step-16; {several.format(f'{tmp_path}/step-8 OUT`')}"):
        find_run_dir(tmp_path / "step-8")
    (tmp_path / "step-16" / "policy.pt").touch()
    assert advice() == f"start a new run with model.archive={tmp_path}/LATEST/policy.pt"


@pytest.mark.parametrize("override", ["n_epochs=2", "n_examples=80", "n_examples=null"])
def test_a_schedule_that_knows_the_runs_length_refuses_a_longer_one(override):
    stored = {"n_epochs": 1, "n_examples": 40, "local_run_dir": "RUN"}
    key, _, value = override.partition("=")
    with pytest.raises(UserError) as error:
        override_run_config(OmegaConf.create(stored | {"scheduler": "cosine"}), [override], list(stored))
    assert str(error.value) == (
        f"{key}={value}: scheduler=cosine lowers the learning rate over {key}={stored[key]},"
        " so a longer run needs another schedule; start a new run"
    )
    for scheduler in ({"scheduler": "constant"}, {}):  # runs of earlier versions have no scheduler
        config = OmegaConf.create(stored | scheduler)
        assert override_run_config(config, [override], list(stored)).keys() == {key}
    cosine = OmegaConf.create(stored | {"scheduler": "cosine"})
    assert override_run_config(cosine, [f"{key}={stored[key]}"], list(stored)) == {}


def test_a_run_that_is_older_than_a_setting_takes_it_if_it_changes_no_numbers(tmp_path):
    config = OmegaConf.create({"lr": 1.0, "local_run_dir": str(tmp_path)})
    known = ["lr", "export_dtype", "batch_size"]
    assert override_run_config(config, ["export_dtype=float32"], known) == {"export_dtype": "float32"}
    assert config.export_dtype == "float32"
    with pytest.raises(UserError, match="batch_size: the chosen loss has no such setting"):
        override_run_config(config, ["batch_size=2"], known)
