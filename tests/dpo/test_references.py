"""Where the reference's log-probabilities come from: when they are taken from a cache, and in which dtype computed."""

import copy
import getpass
import re
import tracemalloc
from dataclasses import replace

import pytest
import torch
from conftest import without_measurements
from faults import few_rows
from tiny_models import EXAMPLES, tiny

import build
from dpo.archives import load_archive
from dpo.distributed import Pass, Ranks
from dpo.examples import TextExample
from dpo.logps import ResponseLogps, response_logps
from dpo.models import copy_reference
from dpo.packing import Packer, make_microbatches
from dpo.precomputation import Precomputation
from dpo.references import CachedReference, ModelReference, sums_of_logps

CACHED = (
    "loss=dpo",
    "loss.precompute_reference=true",
    "max_length=48",
    "max_prompt_length=24",
    "batch_size=4",
    "eval_batch_size=4",
    "max_tokens_per_pass=300",
)
TAKEN = "Reference: log-probabilities taken from"


# A cache is used where it holds the same numbers


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Return a folder with a small data set and room for the cache that runs share."""
    folder = tmp_path_factory.mktemp("home")
    few_rows(folder / "data", 8, 4)
    return folder


@pytest.fixture
def precompute(home, make_trainer, capsys, monkeypatch):
    """Return a function that builds a trainer and returns its cache, and whether it was taken from a file."""
    monkeypatch.setattr(build, "compile_layers", lambda model: None)  # it takes half a minute

    def run(*overrides: str) -> tuple[CachedReference, bool]:
        capsys.readouterr()
        trainer = make_trainer(*CACHED, f"datasets=['{home / 'data'}']", f"local_dirs=['{home}']", *overrides)
        assert isinstance(trainer.reference, CachedReference)
        return trainer.reference, TAKEN in capsys.readouterr().out

    return run


CHANGES = (
    *("layout=padded", "max_tokens_per_pass=100", "precision=bfloat16", "compile=true"),
    *("gradient_accumulation_steps=2", "max_length=40", "batch_size=2"),
)


def test_a_setting_that_changes_a_log_probability_has_a_cache_of_its_own(precompute):
    first, _ = precompute()
    again, taken = precompute()
    assert taken and torch.equal(first.sums, again.sums)
    assert [change for change in CHANGES if precompute(change)[1]] == []


def test_each_part_of_a_key_counts_by_itself(precompute, monkeypatch):
    """A run in bfloat16 also computes its logits in float32, which no other setting does."""
    made = []
    monkeypatch.setattr(Precomputation, "run", lambda self, reference, *paths: made.append((self, reference)))
    precompute()
    ((own, reference),) = made
    others = [
        replace(own, dtype=torch.bfloat16),
        replace(own, policy=ResponseLogps.wrap(own.policy.model, float32_head=True)),
        replace(own, compiled=True),
        replace(own, n_microbatches=2),
        replace(own, packer=replace(own.packer, layout="padded")),
        replace(own, packer=replace(own.packer, max_tokens=100)),
        replace(own, packer=replace(own.packer, device=torch.device("meta"))),
        replace(own, train_batches=replace(own.train_batches, seed=1)),
        replace(own, eval_batches=replace(own.eval_batches, batch_size=2)),
    ]
    keys = [one.key(reference) for one in (own, *others)]
    reference.order = "another"
    keys.append(own.key(reference))
    assert len(set(keys)) == len(keys)
    assert own.key(reference) == keys[-1]


def test_other_weights_have_a_cache_of_their_own(precompute, make_trainer, tmp_path):
    policy = make_trainer("loss=sft").policy.model
    path = tmp_path / "policy.pt"
    torch.save({"step_idx": 0, "state": policy.state_dict(), "metrics": {}}, path)
    assert load_archive(str(path))
    first, _ = precompute()
    _, taken = precompute(f"model.archive='{path}'")
    assert taken  # the weights that it has anyway
    with torch.no_grad():
        policy.transformer.h[0].mlp.c_fc.bias[3] += 1e-3
    torch.save({"step_idx": 0, "state": policy.state_dict(), "metrics": {}}, path)
    changed, taken = precompute(f"model.archive='{path}'")
    assert not taken and not torch.equal(first.sums, changed.sums)


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_other_versions_have_a_cache_of_their_own(library, precompute, monkeypatch):
    def key_of_another_version(self, *arguments: object) -> str:
        with monkeypatch.context() as patched:
            patched.setattr(f"{library}.__version__", "0.1")
            return key(self, *arguments)

    key = Precomputation.key
    precompute()
    monkeypatch.setattr(Precomputation, "key", key_of_another_version)
    assert not precompute()[1]


def test_a_cache_holds_what_a_second_model_would_give(precompute, make_trainer, home):
    cached, _ = precompute()
    data = f"datasets=['{home / 'data'}']"
    trainer = make_trainer(*CACHED, data, "loss.precompute_reference=false")
    for batches in (trainer.train_batches, trainer.eval_batches):
        for batch in batches.from_start():
            for part in trainer.packer(batch.examples):
                torch.testing.assert_close(cached.logps(part).sums, trainer.reference.logps(part).sums)


def test_a_cache_in_the_shared_folder_is_readable_and_named_by_its_key(precompute, home):
    precompute()
    files = list((home / getpass.getuser() / "reference_cache").iterdir())
    assert files and all(len(path.stem) == 64 and path.suffix == ".pt" for path in files)


def test_later_epochs_report_how_far_other_passes_move_the_cached_numbers(make_trainer, home, capsys):
    trainer = make_trainer(*CACHED, f"datasets=['{home / 'data'}']", f"local_dirs=['{home}']")
    assert "other passes move" not in capsys.readouterr().out
    trainer = make_trainer(*CACHED, f"datasets=['{home / 'data'}']", f"local_dirs=['{home}']", "n_epochs=2")
    line = re.search(r"other passes move a log-probability by (\S+) nats, at most (\S+)\.\n", capsys.readouterr().out)
    apart = []
    with torch.no_grad():
        for example in next(iter(trainer.train_batches.from_start())).examples[:8]:
            (batch,) = make_microbatches([example], trainer.packer.layout, 1)
            alone = response_logps(trainer.policy, batch).sums
            apart += (alone - trainer.reference.logps(batch).sums).abs().flatten().tolist()
    assert [line[1], line[2]] == [f"{sum(apart) / len(apart):.2g}", f"{max(apart):.2g}"]


def texts(*rows):
    """Make examples of the same prompt and responses, each of which is 60 KB long, in some rows of a file."""
    return (TextExample("p" * 20_000, ("c" * 20_000, "r" * 20_000), "keep_end", row, "mine") for row in rows)


def test_a_cache_keeps_a_digest_of_each_example_and_no_text():
    """8 bytes of digest and 4 per response; the texts of 500 examples are 30 MB."""
    tracemalloc.start()
    cache = CachedReference(texts(*range(500)), 2)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cache.digests.nbytes + cache.sums.nbytes == 500 * 16
    assert held < 100_000


def test_equal_pairs_of_different_rows_have_numbers_of_their_own_and_one_row_has_them_once():
    cache = CachedReference(texts(1, 2, 1, 3), 2)
    assert cache.sums.shape == (3, 2) and cache.rows(texts(1, 1)).unique().numel() == 1
    for row in (1, 2, 3):
        cache.sums[cache.rows(texts(row))] = float(row)
    assert cache.sums[cache.rows(texts(3, 1, 2, 1))].tolist() == [[3, 3], [1, 1], [2, 2], [1, 1]]
    cache.sums[cache.rows(texts(2)), 1] = torch.nan
    assert [example.row for example in cache.missing(texts(1, 2, 3))] == [2]
    with pytest.raises((AssertionError, IndexError)):
        cache.rows(texts(4))


def test_the_order_of_the_examples_counts_for_the_key_and_their_scores_do_not():
    scored = [example._replace(scores=(2.0, 1.0)) for example in texts(1, 2)]
    orders = [CachedReference(examples, 2).order for examples in (texts(1, 2), texts(2, 1), scored)]
    assert orders[0] == orders[2] != orders[1]


def test_a_corrupt_cache_is_computed_again(tmp_path):
    cache = CachedReference(["a", "b"], 2)
    cache.sums = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    path = tmp_path / "reference.pt"
    cache.save(path, "key")
    other = CachedReference(["a", "b"], 2)
    assert not other.load(path, "another key") and other.load(path, "key")
    assert torch.equal(other.sums, cache.sums)
    content, number = path.read_bytes(), cache.sums.numpy().tobytes()
    at = content.index(number)
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    assert not CachedReference(["a", "b"], 2).load(path, "key")


# A second model


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "null"])
def test_reference_dtype_is_the_dtype_of_the_reference_alone(dtype, make_trainer):
    trainer = make_trainer("loss=dpo", f"model.reference_dtype={dtype}")
    expected = torch.float32 if dtype == "null" else getattr(torch, dtype)
    assert {parameter.dtype for parameter in trainer.reference.module.parameters()} == {expected}
    assert {parameter.dtype for parameter in trainer.policy.parameters()} == {torch.float32}
    batch = next(iter(trainer.train_batches)).examples
    with trainer.autocast():
        part = next(trainer.packer(batch))
        apart = (trainer.reference.logps(part).sums - response_logps(trainer.policy, part).sums).abs().max()
    assert (apart > 0) == (expected != torch.float32)
    assert apart < 5


@pytest.mark.parametrize("family", ["Llama", "GPT2"])  # GPT-2's output head is its embedding
def test_a_reference_computes_in_the_dtype_of_the_run_or_else_in_its_own(family):
    """Of the policy in float32: of a run in bfloat16 as under its autocast, of a reference in float16 without one."""
    policy = tiny(family)
    modules = [ResponseLogps.wrap(copy_reference(policy, dtype)) for dtype in (None, None, "float16")]
    part = next(Packer("shared_prefix", 1000, torch.device("cpu"))(EXAMPLES))
    with torch.no_grad():
        in_float16 = response_logps(modules[2], part).sums
        with torch.autocast("cpu", torch.bfloat16):
            in_bfloat16 = response_logps(modules[0], part).sums
            for module, expected in ((modules[1], in_bfloat16), (modules[2], in_float16)):
                assert torch.equal(ModelReference(module, torch.bfloat16).logps(part).sums, expected)


def test_a_second_model_samples_once():
    class CountingSampler:
        calls = 0

        def sample(self, model, prompts, title):
            self.calls += 1
            return [f"sample {self.calls}" for _ in prompts]

    reference = ModelReference(ResponseLogps.wrap(tiny("GPT2")), torch.float32, CountingSampler())
    assert reference.generate(EXAMPLES) == reference.generate(EXAMPLES) == ["sample 1"] * len(EXAMPLES)


# A reference that follows the policy


@pytest.mark.parametrize("mix", [1.0, 0.25])
def test_a_synced_reference_moves_every_second_update(mix, make_trainer):
    """Weights r become mix * p + (1 - mix) * r after updates 2 and 4; its samples are drawn again."""
    trainer = make_trainer("loss=dpo", "sync_reference=2", f"sync_mix={mix}", "lr=1e-3", "warmup_steps=0")
    own, policy = (list(module.parameters()) for module in (trainer.reference.module, trainer.policy))
    for update, batch in enumerate(trainer.train_batches, 1):
        before, trainer.reference.samples = [p.detach().clone() for p in own], ["old"]
        margin = trainer.train_step(batch)["rewards_train/margins"]
        moved = update % 2 == 0
        for old, new, latest in zip(before, own, policy, strict=True):
            expected = mix * latest + (1 - mix) * old if moved else old
            assert torch.allclose(new, expected, rtol=1e-6, atol=1e-7) and not new.requires_grad
        assert (trainer.reference.samples is None) == moved
        assert (margin == 0.0) == (update == 1 or (mix == 1 and update % 2 == 1))
        if update == 4:
            break


def test_a_synced_reference_is_in_the_checkpoint_and_goes_on_bit_for_bit(make_trainer):
    settings = ("loss=dpo", "sync_reference=2", "sync_mix=0.5", "lr=1e-3", "warmup_steps=0")
    trainer = make_trainer(*settings)
    batches = iter(trainer.train_batches)
    for _ in range(3):
        trainer.train_step(next(batches))
    states = copy.deepcopy(trainer.state_dict([0, 0]))
    expected = [trainer.train_step(next(batches)) for _ in range(2)]
    resumed = make_trainer(*settings)
    resumed.load_state_dict(states)
    for before, batch in zip(expected, resumed.train_batches, strict=False):
        after = resumed.train_step(batch)
        assert without_measurements(after) == without_measurements(before)


def test_a_reference_that_stays_has_no_state(make_trainer):
    for setting in ("false", "true"):
        trainer = make_trainer("loss=dpo", f"loss.precompute_reference={setting}")
        trainer.reference.after_update(1)
        assert trainer.state_dict([0, 0])["run"]["reference"] == {}


# Sums over a batch that several ranks share


class TwoRanks(Ranks):
    """A rank whose part is the first example, and which makes a pass more because another rank has it."""

    def __init__(self, others):
        self.others = others

    def gather(self, value):
        return [value, self.others]

    def passes(self, packer, examples, n_parts=1):
        for example, scale in ((examples[0], 1.0), (examples[1], 0.0)):
            yield Pass(next(packer([example])), scale, True)


def test_sums_of_a_batch_are_those_of_all_ranks_without_passes_that_only_keep_up_with_another_rank():
    policy, reference = (
        ResponseLogps.wrap(tiny("GPT2")),
        ModelReference(ResponseLogps.wrap(tiny("Llama")), torch.float32),
    )
    packer, others, calls = (
        Packer("padded", 1000, torch.device("cpu")),
        torch.tensor([[[-1.0, -2.0]], [[-3.0, -4.0]]]),
        [],
    )
    found = sums_of_logps(policy, reference, packer, TwoRanks([others]), EXAMPLES, lambda: calls.append(1))
    with torch.no_grad():
        own = next(packer(EXAMPLES[:1]))
        expected = [response_logps(policy, own).sums[0].tolist(), reference.logps(own).sums[0].tolist()]
    assert [sums.tolist() for sums in found] == [[expected[0], [-1.0, -2.0]], [expected[1], [-3.0, -4.0]]]
    assert expected[0] != expected[1] and len(calls) == 2
