"""The training run of a round: which weights policy and reference have, and which pairs it trains on."""

from pathlib import Path

import pytest
from test_rounds_settings import compose

from tools.rounds.settings import validate_config
from tools.rounds.training import run_config, weights_of_round

OUT = Path("/out")


def config(*overrides: str):
    values = compose(*overrides)
    values.local_run_dir = str(OUT)
    return validate_config(values)


def last(k: int, name: str = "policy.pt") -> str:
    """Return a path of the weights that round k has trained."""
    return str(OUT / f"round-{k}" / "run" / "LATEST" / name)


MODEL = compose().model.name_or_path
FULL = {  # start and reference: what rounds 1 and 3 begin with
    ("previous", "previous"): ({"reference": "start"}, {"model.archive": last(2), "reference": "start"}),
    ("previous", "first"): ({"reference": "start"}, {"model.archive": last(2), "reference": MODEL}),
    ("first", "previous"): ({"reference": "start"}, {"reference": last(2)}),
    ("first", "first"): ({"reference": "start"}, {"reference": "start"}),
    ("previous", "models/mine"): (
        {"reference": "models/mine"},
        {"model.archive": last(2), "reference": "models/mine"},
    ),
}


@pytest.mark.parametrize("start, reference", FULL)
def test_policy_and_reference_begin_with_the_weights_that_are_asked_for(start, reference):
    first, third = FULL[start, reference]
    chosen = config(f"start={start}", f"reference={reference}")
    assert weights_of_round(chosen, 1) == first
    assert weights_of_round(chosen, 3) == third


def test_an_archive_is_the_first_policy(tmp_path):
    archive = tmp_path / "policy.pt"
    archive.touch()
    chosen = config("model=tiny", f"model.archive='{archive}'", "reference=first")
    assert weights_of_round(chosen, 1) == {"reference": "start"}  # model.archive stays as it is
    assert weights_of_round(chosen, 2) == {"model.archive": last(1), "reference": str(archive)}
    assert run_config(chosen, 1).model.archive == str(archive)


@pytest.mark.parametrize("start", ["previous", "first"])
def test_adapters_begin_with_the_last_adapter_and_may_keep_it_as_the_reference(start):
    chosen = config("lora=default", f"start={start}")
    assert weights_of_round(chosen, 1) == {"reference": "start"}
    weights = {"previous": {"lora.path": last(2, "hf"), "reference": "start"}, "first": {"reference": last(2, "hf")}}
    assert weights_of_round(chosen, 3) == weights[start]


def test_the_reference_of_adapters_may_stay_the_frozen_model_or_the_first_adapter(tmp_path):
    chosen = config("lora=default", "reference=first")
    assert weights_of_round(chosen, 2) == {"lora.path": last(1, "hf"), "reference": MODEL}
    (tmp_path / "adapter_config.json").write_text("{}")
    chosen = config("lora=default", f"lora.path='{tmp_path}'", "reference=first")
    assert weights_of_round(chosen, 2) == {"lora.path": last(1, "hf"), "reference": str(tmp_path)}


def test_a_loss_without_a_reference_gets_none():
    assert weights_of_round(config("loss=simpo"), 2) == {"model.archive": last(1), "reference": "start"}
    assert weights_of_round(config("loss=simpo", "start=first"), 2) == {"reference": "start"}


def test_a_round_trains_on_its_own_pairs_those_of_earlier_rounds_and_further_data():
    chosen = config("replay=1", "datasets=[hh,other.jsonl]", "shares=[0.5,2]")
    assert run_config(chosen, 1).datasets == ["/out/round-1/data", "hh", "other.jsonl"]
    run = run_config(chosen, 3)
    assert run.datasets == ["/out/round-2/data", "/out/round-3/data", "hh", "other.jsonl"]
    assert run.shares == [1.0, 1.0, 0.5, 2]
    assert run.local_run_dir == "/out/round-3/run" and run.exp_name.endswith("-round-3")
    assert not {"rounds", "samples", "engine", "scorer", "prompts"} & run.keys()


def test_names_of_columns_are_those_of_the_prompts_files():
    columns = run_config(config("columns.prompt=question", "columns.sampled_ids=none"), 1).columns
    assert (columns.prompt, columns.sampled_ids) == (None, "none")


def test_scores_go_along_where_the_loss_needs_them():
    assert run_config(config("loss=odpo"), 1).columns.score_chosen == "score_chosen"
    assert run_config(config("loss=odpo"), 1).columns.score_rejected == "score_rejected"
    assert run_config(config(), 1).columns.score_chosen is None
