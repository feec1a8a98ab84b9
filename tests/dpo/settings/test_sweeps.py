"""The runs of a sweep: which arguments the first has, and how each is named."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dpo.settings.sweeps import Sweep, first_run, sweep_problems


def named(arguments, runs):
    """Return (exp_name, local_run_dir) of each run of a sweep, whose run directories differ by a time stamp."""
    sweep, names = Sweep(arguments), []
    for stamp, overrides in enumerate(runs):
        given = dict(override.split("=") for override in overrides)
        config = OmegaConf.create({"exp_name": "dpo", "local_run_dir": given.get("local_run_dir", f"runs/dpo_{stamp}")})
        sweep.name_run(config, overrides)
        names.append((config.exp_name, config.local_run_dir))
    assert sweep.runs == [Path(folder) for _, folder in names]
    return names


def test_the_first_run_of_a_sweep_has_the_first_value_of_each():
    assert first_run(["loss=dpo", "-m", "loss.beta=0.1,0.5"]) == ["loss=dpo", "loss.beta=0.1"]
    assert first_run(["loss=dpo", "lr=1e-6"]) == ["loss=dpo", "lr=1e-6"]


def test_the_runs_of_a_sweep_lie_in_the_directory_that_its_first_run_would_have_alone():
    runs = [["loss=dpo", f"loss.beta={beta}", f"seed={seed}"] for beta in (0.1, 0.5) for seed in (0, 1)]
    found = named(["-m", "loss=dpo", "loss.beta=0.1,0.5", "seed=0,1"], runs)
    names = [f"loss.beta={beta}_seed={seed}" for beta in (0.1, 0.5) for seed in (0, 1)]
    assert found == [(f"dpo_{name}", f"runs/dpo_0/{name}") for name in names]


@pytest.mark.parametrize(
    "arguments, run, expected",
    [
        (
            ["-m", "lr=1e-6,1e-5", "local_run_dir=here"],
            ["lr=1e-6", "local_run_dir=here"],
            ("dpo_lr=1e-6", "here/lr=1e-6"),
        ),
        (["-m", "local_run_dir=a,b"], ["local_run_dir=a"], ("dpo_local_run_dir=a", "a")),
        (["-m", "lr=1e-6"], ["lr=1e-6"], ("dpo", "runs/dpo_0")),  # nothing is swept
        (["-m", "datasets=[a/b],[c]"], ["datasets=[a/b]"], ("dpo_datasets=-a-b-", "runs/dpo_0/datasets=-a-b-")),
    ],
    ids=["a given directory", "swept directories", "no sweep", "characters that names of files lack"],
)
def test_what_is_swept_names_a_run(arguments, run, expected):
    assert named(arguments, [run]) == [expected]


def test_what_needs_a_sweeper_or_a_launcher_of_a_plugin_is_refused_by_name():
    """Optuna's needs a value that a run returns, and the runs of joblib's would lie in folders of their own."""
    own = ["-m", "lr=1e-6,1e-5", "hydra/sweeper=basic", "hydra.sweep.dir=here"]
    assert sweep_problems(own) == []
    lines = sweep_problems([*own, "hydra/sweeper=optuna", "+hydra/launcher=joblib", "loss.beta=interval(0.05,0.5)"])
    assert [line.split(":")[0] for line in lines] == [
        "hydra/sweeper=optuna",
        "+hydra/launcher=joblib",
        "loss.beta=interval(0.05,0.5)",
    ]
    assert lines[0].endswith("KEY=A,B") and lines[2].endswith("give values, as loss.beta=0.05,0.5")
