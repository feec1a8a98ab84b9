"""TensorParallelTrainer on several processes gives the numbers of one, and files like those of any run."""

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_config, tiny_tokenizer
from faults import BUSY, again, copy_until, fresh, logs_of
from ranks import command_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

SETTINGS = (*BUSY, "loss=dpo", "lr=1e-3")
SPLIT = (*SETTINGS, "trainer=TensorParallelTrainer")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> str:
    """Write a tiny random Llama and return the setting that names it."""
    folder, tokenizer = tmp_path_factory.mktemp("llama"), tiny_tokenizer("llama")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer))).save_pretrained(folder)
    return f"model.name_or_path='{folder}'"


def run(folder: Path, arguments: tuple[str, ...], n: int) -> Path:
    """Run the command line as n ranks and return its folder."""
    done = command_lines(folder, arguments, n)
    assert [rank.returncode for rank in done] == [0] * n, [rank.stderr for rank in done]
    return folder


@pytest.fixture(scope="module")
def alone(llama, tmp_path_factory) -> Path:
    """Return the folder of a run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    return run(folder, fresh(folder, *SETTINGS, llama), 1)


@pytest.fixture(scope="module")
def pair(llama, tmp_path_factory) -> Path:
    """Return the folder of a run of two ranks that share each layer."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    return run(folder, fresh(folder, *SPLIT, llama), 2)


def assert_alike(folder: Path, other: Path, tolerance: float = 1e-3) -> None:
    """Assert that two runs have the same records, but for rounding, clocks and memory."""
    for records in zip(*(logs_of(path)[0] for path in (folder, other)), strict=True):
        first, second = ({k: v for k, v in record.items() if "memory" not in k} for record in records)
        assert first == pytest.approx(second, rel=tolerance, abs=tolerance)


def test_every_update_evaluation_and_exported_weight_is_that_of_one_process(alone, pair):
    assert_alike(pair, alone)
    weights, expected = (load_file(path / "LATEST" / "hf" / "model.safetensors") for path in (pair, alone))
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert (weights[name] - value).norm() <= 1e-4 * value.norm(), name


def test_each_evaluated_pair_is_logged_once(alone, pair):
    rows = [[json.loads(line) for line in (path / "pairs.jsonl").read_text().splitlines()] for path in (pair, alone)]
    assert sorted((row["examples"], row["row"]) for row in rows[0]) == sorted(
        (row["examples"], row["row"]) for row in rows[1]
    )


@pytest.mark.parametrize("copies", [1, 2])
def test_groups_of_ranks_share_a_batch_and_the_parameters(copies, llama, alone, tmp_path):
    """Two groups of two: sharded over the groups, or a copy in each."""
    own = (llama, "tensor_parallel=2", f"replicate={copies}", "layout=padded", "n_examples=24")
    folder = run(tmp_path / "run", fresh(tmp_path / "run", *SPLIT, *own), 4)
    updates = [[record for record in logs_of(path)[0] if "loss/train" in record] for path in (folder, alone)]
    for first, second in zip(updates[0], updates[1], strict=False):
        assert first["loss/train"] == pytest.approx(second["loss/train"], rel=1e-4)
        assert first["grad_norm"] == pytest.approx(second["grad_norm"], rel=1e-4)
    assert len(updates[0]) == 3


def test_a_run_resumes_bit_for_bit(pair, tmp_path):
    folder = run(tmp_path / "run", again(copy_until(pair, tmp_path / "run", 24)), 2)
    assert_alike(folder, pair, tolerance=0)
    for path in (folder / "LATEST").glob("*.distcp"):
        assert path.read_bytes() == (pair / "LATEST" / path.name).read_bytes()


def test_bfloat16_passes_and_a_precomputed_reference_train(llama, alone, tmp_path):
    own = (llama, "precision=bfloat16", "loss.precompute_reference=true", "n_examples=16")
    folder = run(tmp_path / "run", fresh(tmp_path / "run", *SPLIT, *own), 2)
    first, expected = (logs_of(path)[0][:2] for path in (folder, alone))
    assert first[0]["rewards_eval/margins"] == 0
    assert first[1]["loss/train"] == pytest.approx(expected[1]["loss/train"], rel=2e-2)


def test_a_model_without_a_plan_is_refused_before_its_weights_load(tmp_path):
    done = command_lines(tmp_path / "run", fresh(tmp_path / "run", *SPLIT), 2)
    assert [rank.returncode for rank in done] == [2, 2]
    assert "transformers has no tensor-parallel plan for gpt2 models; use trainer=FSDPTrainer" in done[0].stderr
    assert not (tmp_path / "run").exists()
