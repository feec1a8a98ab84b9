"""Where the reference's log-probabilities come from: when they are taken from a cache, and in which dtype computed."""

import copy
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from conftest import without_measurements
from faults import few_rows
from tiny_models import EXAMPLES, mask_responses, respond, tiny

import build
from dpo.data.examples import TextExample, TokenizedExample
from dpo.distributed.ranks import Ranks
from dpo.distributed.splitting import BatchSplitter, Microbatch
from dpo.model.archives import load_archive
from dpo.model.loading import copy_reference
from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.packing import Packer
from dpo.training.precomputation import Precomputation
from dpo.training.references import AdapterReference, CachedReference, ModelReference, sums_of_logps
from utils import local_dir

CACHED = (
    "loss=dpo",
    "loss.precompute_reference=true",
    "max_length=48",
    "max_prompt_length=24",
    "batch_size=4",
    "eval_batch_size=4",
    "max_tokens_per_pass=300",
)
TAKEN = "Reference: log-probabilities read from"


# A cache is used where it holds the same numbers


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a small data set and room for the cache that runs share."""
    folder = tmp_path_factory.mktemp("home")
    few_rows(folder / "data", 8, 4)
    return folder


@pytest.fixture
def precompute(home, make_trainer, capsys, monkeypatch):
    """A function that builds a trainer and returns its cache, and whether it came from a file."""
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

    def several(world_size: int, data_size: int) -> Ranks:
        ranks = Ranks()
        ranks.world_size, ranks.data_size = world_size, data_size
        return ranks

    made = []
    monkeypatch.setattr(Precomputation, "run", lambda self, *arguments: made.append(self))
    precompute()
    (own,) = made

    def split(**changes) -> Precomputation:
        return replace(own, split_batch=BatchSplitter(replace(own.packer, **changes)))

    others = [
        replace(own, dtype=torch.bfloat16),
        replace(own, policy=ResponseLogps.wrap(own.policy.model, float32_head=True)),
        replace(own, compiled=True),
        replace(own, n_microbatches=2),
        split(layout="padded"),
        split(max_tokens=100),
        split(device=torch.device("meta")),
        replace(own, train_batches=replace(own.train_batches, seed=1)),
        replace(own, train_batches=replace(own.train_batches, examples=own.eval_batches.examples)),
        replace(own, eval_batches=replace(own.eval_batches, batch_size=2)),
        *(replace(own, split_batch=BatchSplitter(own.packer, several(*sizes))) for sizes in ((2, 1), (2, 2), (4, 2))),
    ]
    keys = [one.key() for one in (own, *others)]
    keys.append(own.key(merged=True))
    own.policy.model.config.layer_norm_epsilon = 1e-3
    keys.append(own.key())
    assert len(set(keys)) == len(keys)
    assert own.key() == keys[-1]


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
                found = cached.logps(part)
                torch.testing.assert_close(found.sums, trainer.reference.logps(part).sums)
                assert torch.equal(found.lengths, part.lengths)
                assert cached.logps(part.to(torch.device("meta"))).sums.device.type == "meta"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_microbatches_of_the_first_epoch_and_of_the_evaluation_find_exactly_what_the_policy_gives(
    precision, make_trainer, home
):
    place = (f"datasets=['{home / 'data'}']", f"local_dirs=['{home}']")
    trainer = make_trainer(*CACHED, *place, f"precision={precision}")
    for batches in (trainer.train_batches, trainer.eval_batches):
        for part in (part for batch in batches.from_start() for part in trainer.packer(batch.examples)):
            with torch.no_grad(), trainer.autocast():
                assert torch.equal(trainer.reference.logps(part).sums, response_logps(trainer.policy, part).sums)


@pytest.mark.parametrize("n_epochs, left", [(1, []), (2, [1, 1])])
def test_each_example_is_computed_once_if_a_batch_needs_it_in_parts_as_large_as_those_of_its_batch(
    n_epochs, left, precompute, monkeypatch
):
    """8 rows are one batch of 6, in halves, and 2 that come in a later epoch's; the evaluation has 4."""
    passes = []
    compute = lambda policy, batch: passes.append(len(batch.examples)) or response_logps(policy, batch)  # noqa: E731
    monkeypatch.setattr("dpo.training.precomputation.response_logps", compute)
    settings = ("batch_size=6", "gradient_accumulation_steps=2", "max_tokens_per_pass=100000")
    cache, _ = precompute(*settings, f"n_epochs={n_epochs}")
    assert passes == [3, 3, 4, *left]
    assert len(cache.sums) == 12 and cache.sums.isnan().any(dim=1).sum() == 2 - len(left)


def test_a_cache_in_the_shared_folder_is_readable_and_named_by_its_key(precompute, home):
    precompute()
    files = list(Path(local_dir([str(home)]), "reference_cache").iterdir())
    assert files and all(len(path.stem) == 64 and path.suffix == ".pt" for path in files)


def numbered(*indices):
    """Make examples with these numbers."""
    text = TextExample("p", ("c", "r"), "keep_end", 1, "mine")
    return [TokenizedExample(text, [1], ([2], [3]), index=index) for index in indices]


def test_a_cache_has_numbers_for_each_example():
    cache = CachedReference(3, 2)
    for index in range(3):
        cache.sums[cache.rows(numbered(index))] = float(index)
    assert cache.sums[cache.rows(numbered(2, 0, 1, 0))].tolist() == [[2, 2], [0, 0], [1, 1], [0, 0]]
    assert cache.missing() == []
    cache.sums[1, 1] = torch.nan
    assert cache.missing() == [1]
    for index in (3, -1):
        with pytest.raises(AssertionError, match="was not made for this example"):
            cache.rows(numbered(index))


def test_a_corrupt_cache_is_computed_again(tmp_path):
    cache = CachedReference(2, 2)
    cache.sums = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    path = tmp_path / "reference.pt"
    cache.save(path, "key")
    other = CachedReference(2, 2)
    assert not other.load(path, "another key") and other.sums.isnan().all()
    assert not CachedReference(1, 2).load(path, "key")
    assert other.load(path, "key") and torch.equal(other.sums, cache.sums)
    content, number = path.read_bytes(), cache.sums.numpy().tobytes()
    at = content.index(number)
    cut_off = [content[: int(share * len(content))] for share in (0.3, 0.6, 0.9, 0.99)]
    for damaged in (content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :], content[:-1], *cut_off):
        path.write_bytes(damaged)
        assert not CachedReference(2, 2).load(path, "key")


class Touching:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_cache_that_holds_code_is_computed_again_and_the_code_never_runs(tmp_path):
    cache = CachedReference(1, 2)
    cache.save(tmp_path / "reference.pt", "key")
    content = torch.load(tmp_path / "reference.pt")
    torch.save(content | {"more": Touching(tmp_path / "touched")}, tmp_path / "reference.pt")
    assert not cache.load(tmp_path / "reference.pt", "key") and not (tmp_path / "touched").exists()


def test_a_cache_that_cannot_be_written_is_one_line_and_stops_nothing(tmp_path, capsys):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "reference.pt"
    CachedReference(1, 2).save(path, "key")
    line = rf"{re.escape(str(path))}: cannot be written \(.*\), so a later run may compute it again\.\n"
    assert re.fullmatch(line, capsys.readouterr().out)


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


@pytest.mark.parametrize(
    "family, weight",  # GPT-2's output head is its embedding
    [("Llama", "model.layers.0.mlp.up_proj.weight"), ("GPT2", "transformer.h.0.mlp.c_fc.weight")],
)
def test_a_reference_computes_in_the_dtype_of_the_run_or_else_in_its_own(family, weight):
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
    assert modules[1].model.get_parameter(weight).dtype == torch.bfloat16


def test_a_second_model_samples_once():
    class CountingSampler:
        calls = 0

        def sample(self, model, prompts, title):
            self.calls += 1
            return [f"sample {self.calls}" for _ in prompts]

    reference = ModelReference(ResponseLogps.wrap(tiny("GPT2")), torch.float32, CountingSampler())
    assert reference.generate(EXAMPLES) == reference.generate(EXAMPLES) == ["sample 1"] * len(EXAMPLES)


# What an evaluation repeats


@pytest.fixture
def computed(monkeypatch):
    """Collect the passes that references compute."""
    found = []
    for kind in (ModelReference, AdapterReference):
        compute = kind.compute
        monkeypatch.setattr(kind, "compute", lambda self, batch, own=compute: found.append(batch) or own(self, batch))
    return found


@pytest.mark.parametrize(
    "settings", [("loss=dpo",), ("loss=dpo", "lora=default"), ("loss=kto",)], ids=["second model", "adapter", "kto"]
)
def test_a_reference_that_stays_is_computed_in_the_first_evaluation_alone(settings, make_trainer, computed):
    """KTO computes the same prompts with other examples' responses too, in passes of the same texts."""
    trainer = make_trainer(
        "n_eval_examples=8", "eval_batch_size=8", "max_tokens_per_pass=100000", "lr=1e-3", "warmup_steps=0", *settings
    )
    trainer.evaluate()
    assert computed
    for batch in trainer.eval_batches.from_start():
        computed.clear()
        trainer.train_step(batch)
        assert computed  # of an evaluation's examples too
    computed.clear()
    found = trainer.evaluate()
    assert not computed and found["rewards_eval/margins"] != 0.0
    trainer.reference.forget()
    assert trainer.evaluate() == found and computed


def test_a_reference_that_has_moved_is_computed_again(make_trainer, computed):
    trainer = make_trainer("loss=dpo", "sync_reference=2", "sync_mix=1.0", "lr=1e-3", "warmup_steps=0")
    moved = []
    for batch in islice(trainer.train_batches, 2):
        trainer.evaluate()
        computed.clear()
        trainer.evaluate()
        moved.append(bool(computed))
        trainer.train_step(batch)
    computed.clear()
    assert trainer.evaluate()["rewards_eval/margins"] == 0.0 and computed
    assert moved == [False, False]


def test_a_microbatch_that_comes_twice_is_computed_twice_and_none_of_an_evaluation_that_fails_is_kept(computed):
    """A rank with fewer passes than another repeats one to keep up, as long as the other computes."""
    reference = ModelReference(ResponseLogps.wrap(tiny("GPT2")), torch.float32)
    batch = next(Packer("padded", 1000, torch.device("cpu"))(EXAMPLES))
    with pytest.raises(ZeroDivisionError), reference.repeated():
        reference.logps(batch)
        raise ZeroDivisionError
    counts = []
    for _ in range(2):
        computed.clear()
        with reference.repeated():
            sums = [reference.logps(batch).sums for _ in range(2)]
        counts.append(len(computed))
    assert counts == [2, 0] and torch.equal(*sums) and torch.equal(sums[0], reference.logps(batch).sums)


def test_the_same_tokens_with_another_mask_are_computed_in_the_same_evaluation():
    reference = ModelReference(ResponseLogps.wrap(tiny("GPT2")), torch.float32)
    masks = ([1, 1, 1], [1]), ([1, 0, 1], [1])
    examples = [mask_responses(respond([5, 6], [7, 8, 9], [3]), *mask) for mask in masks]
    batches = [next(Packer("padded", 1000, torch.device("cpu"))([example])) for example in examples]
    for _ in range(2):
        with reference.repeated():
            first, second = (reference.logps(batch).sums[0].tolist() for batch in batches)
        assert first[0] < second[0] and first[1] == second[1]


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


def test_a_reference_that_has_become_the_policy_samples_what_it_samples(make_trainer):
    settings = ("max_length=48", "max_prompt_length=24", "lr=1e-3", "warmup_steps=0")
    trainer = make_trainer("loss=dpo", "sync_reference=1", "sync_mix=1.0", *settings)
    batch = next(iter(trainer.train_batches))
    prompts = batch.examples[:2]
    before = trainer.reference.generate(prompts)
    trainer.train_step(batch)
    assert trainer.reference.generate(prompts) == trainer.sampler.sample(trainer.policy.model, prompts, "") != before


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
    """A rank whose share is the first example, and which has one microbatch more because another rank has it."""

    def __init__(self, others):
        self.others = others

    def gather(self, value):
        return [value, self.others]


class Split(BatchSplitter):
    def __call__(self, examples, n_equal=1):
        for example, scale in ((examples[0], 1.0), (examples[1], 0.0)):
            yield Microbatch(next(self.packer([example])), scale, True)


def test_sums_of_a_batch_are_those_of_all_ranks_without_microbatches_that_only_keep_up_with_another_rank():
    policy, reference = (
        ResponseLogps.wrap(tiny("GPT2")),
        ModelReference(ResponseLogps.wrap(tiny("Llama")), torch.float32),
    )
    packer, others, calls = (
        Packer("padded", 1000, torch.device("cpu")),
        torch.tensor([[[-1.0, -2.0]], [[-3.0, -4.0]]]),
        [],
    )
    found = sums_of_logps(policy, reference, Split(packer, TwoRanks([others])), EXAMPLES, lambda: calls.append(1))
    with torch.no_grad():
        own = next(packer(EXAMPLES[:1]))
        expected = [response_logps(policy, own).sums[0].tolist(), reference.logps(own).sums[0].tolist()]
    assert [sums.tolist() for sums in found] == [[expected[0], [-1.0, -2.0]], [expected[1], [-3.0, -4.0]]]
    assert expected[0] != expected[1] and len(calls) == 2
