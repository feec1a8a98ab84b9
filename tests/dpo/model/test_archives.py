"""Archives: what is taken over from older ones, and what is refused by name."""

import os
from pathlib import Path

import pytest
import torch
from conftest import tiny_config
from transformers import AutoModelForCausalLM

from dpo.model.archives import load_archive, load_weights
from dpo.system.errors import UserError

MAPS = Path("/proc/self/maps")  # which files are mapped into memory


def tiny(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, 20))


def archive_of(state, tmp_path):
    torch.save({"step_idx": 1, "state": state, "metrics": {"loss/eval": 1.0}}, tmp_path / "policy.pt")
    return str(tmp_path / "policy.pt")


def test_names_and_buffers_of_older_transformers_are_taken_over(tmp_path):
    model, state = tiny("gpt_neox"), tiny("gpt_neox").state_dict()
    state = {name: torch.full_like(value, 0.5) for name, value in state.items()}
    state["embed_out.weight"] = state.pop("lm_head.weight")
    for name in ("bias", "masked_bias", "rotary_emb.inv_freq"):
        state[f"gpt_neox.layers.0.attention.{name}"] = torch.ones(1)
    load_weights(model, load_archive(archive_of(state, tmp_path)), "model.archive=policy.pt")
    assert all((value == 0.5).all() for value in model.state_dict().values())


def test_tied_embeddings_may_be_stored_once(tmp_path):
    model = tiny("gpt2")
    state = {name: value + 1 for name, value in model.state_dict().items() if name != "lm_head.weight"}
    load_weights(model, load_archive(archive_of(state, tmp_path)), "model.archive=policy.pt")
    assert torch.equal(model.lm_head.weight, state["transformer.wte.weight"])


def test_every_tensor_that_does_not_fit_is_named(tmp_path):
    state = tiny("gpt2").state_dict()
    del state["transformer.ln_f.bias"]
    state["transformer.surplus"] = torch.zeros(1)
    state["transformer.wpe.weight"] = torch.zeros(3, 3)
    with pytest.raises(UserError) as refusal:
        load_weights(tiny("gpt2"), load_archive(archive_of(state, tmp_path)), "model.archive=policy.pt")
    told = str(refusal.value)
    assert "missing transformer.ln_f.bias" in told and "unexpected transformer.surplus" in told
    assert "transformer.wpe.weight has shape (3, 3), the model's is (256, 32)" in told


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux")
def test_the_tensors_of_an_archive_stay_in_its_file(tmp_path):
    """Instead of a copy in memory, of the size of a model."""
    path = archive_of(tiny("gpt2").state_dict(), tmp_path)
    state = load_archive(path)
    assert state and path in MAPS.read_text()


class Canary:
    """Its unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("content", ["pickle", "garbage", "tensor", "no state"])
def test_an_archive_that_is_none_is_refused_and_executes_nothing(content, tmp_path):
    path, canary = tmp_path / "policy.pt", tmp_path / "canary"
    if content == "garbage":
        path.write_bytes(b"not a checkpoint")
    else:
        values = {"pickle": {"state": Canary(canary)}, "tensor": torch.zeros(2), "no state": {"state": {"a": 1}}}
        torch.save(values[content], path)
    with pytest.raises(UserError, match=r"model\.archive=.*policy\.pt: (cannot be read|holds no weights)"):
        load_archive(str(path))
    assert not canary.exists()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9, 0.99, 1.0])
def test_an_archive_that_was_cut_off_is_refused(share, tmp_path):
    """As a full disk or a broken download leaves it; at 1.0 one byte is missing."""
    path = Path(archive_of(tiny("gpt2").state_dict(), tmp_path))
    size = path.stat().st_size
    os.truncate(path, min(int(share * size), size - 1))
    with pytest.raises(UserError, match=r"model\.archive=.*policy\.pt: cannot be read"):
        load_archive(str(path))
