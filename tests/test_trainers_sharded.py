"""FSDPTrainer on several processes gives the numbers of one, and those of the original."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from conftest import GOLDENS, TINY, compose, validated
from ranks import command_lines, run_ranks
from test_goldens import compare_steps, overrides_of, read
from test_trainers import labelled_rows
from tiny_models import weigh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

import build as build_module
from build import build_trainer, load_inputs
from dpo.distributed import sharding
from dpo.distributed.process_group import ProcessGroup
from dpo.distributed.sharding import reshard, whole_tensors
from dpo.runs.run_dir import RunDir

PLAIN = ("loss=dpo", "max_tokens_per_pass=300", "n_eval_model_samples=3")  # of 4 ranks, one has no sample of its own
UNEVEN = ("loss=dpo", "max_tokens_per_pass=100", "eval_batch_size=3", "n_eval_examples=12")
KTO = ("loss=kto", "max_tokens_per_pass=300")
WEIGHTS = (1.0, 2.0, 0.5, 1.0, 4.0, 1.0, 3.0, 0.25)
LORA = (*PLAIN, "lora=default", "lora.r=4")
ADAPTERS = {
    "plain": LORA,
    "DoRA, recomputed": (*LORA, "lora.use_dora=true", "activation_checkpointing=true"),
    "of bfloat16 weights": (*LORA, "model.policy_dtype=bfloat16", "precision=bfloat16"),
    "computed in bfloat16": (*LORA, "precision=bfloat16"),
    "replicated": (*LORA, "ddp=true"),
}
EXPERTS = (*UNEVEN, "lora=default", "lora.targets=[q_proj,gate_up_proj,down_proj]")
MIXTURES = {
    "all weights": UNEVEN,
    "an adapter of experts": EXPERTS,
    "an adapter of experts, recomputed": (*EXPERTS, "activation_checkpointing=true"),
}


class Case(NamedTuple):
    """What is trained, and how: settings beside those of the golden trace."""

    trace: str
    settings: tuple[str, ...]

    def __str__(self) -> str:
        return "-".join((self.trace, *self.settings))


def cases(n: int, soak: bool) -> list[Case]:
    """Return the cases for a number of ranks: for each thing that shards differently one, or with soak all."""
    cached = ("loss.precompute_reference=true", "model.reference_dtype=null")
    few = [Case("dpo", ("layout=padded",)), Case("dpo", ("max_tokens_per_pass=300", *cached))]
    few += [Case("sft", ("reduce_every_pass=true",)), Case("dpo", ("ddp=true", "max_tokens_per_pass=300"))]
    few = few if n == 2 else [Case("dpo", ("replicate=2", "max_tokens_per_pass=300", *cached))]
    if not soak:
        return few
    layouts = ("layout=shared_prefix", "layout=padded", "max_tokens_per_pass=300")
    kinds = [("sft", ()), ("dpo", ()), ("dpo", cached)]
    found = few + [Case(trace, (layout, *own)) for layout in layouts for trace, own in kinds]
    found += [Case("dpo", (setting,)) for setting in ("ddp=true", "reduce_every_pass=true", "precision=bfloat16")]
    return [*found, Case("dpo_accum4", ("activation_checkpointing=true",))]


def build(folder: Path, ranks, *overrides: str):
    """Build the trainer of a command line."""
    overrides = (*overrides, f"local_run_dir='{folder}'", f"local_dirs=['{folder.parent}']")
    settings, loss = validated(*overrides)
    run = RunDir(Path(settings.local_run_dir), compose(*overrides), ranks)
    return build_trainer(settings, loss, load_inputs(settings, loss), run)


def move(policy) -> None:
    """Move the policy away from the reference, so that each pair has a weight of its own, alike on all ranks."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = 0.05 * torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
            parameter += noise


def whole_gradient(trainer, weights: Sequence[float] = ()) -> torch.Tensor:
    """Return the gradient of the first batch before it is clipped, as one vector; with weights of its examples."""
    kept, clip = [], trainer.clip_gradient

    def keep():
        gradients = (parameter.grad for parameter in trainer.policy.trained_parameters())
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
        kept.append(torch.cat([gradient.flatten().double() for gradient in whole]))
        return clip()

    trainer.clip_gradient = keep
    move(trainer.policy)
    batch = next(iter(trainer.train_batches))
    weighted = [weigh(*pair) for pair in zip(batch.examples, weights, strict=True)] if weights else batch.examples
    trainer.train_step(replace(batch, examples=weighted))
    return kept[0]


def divergence(trainer) -> tuple[dict[str, float], int]:
    """Return what KTO sums over the first batch, and how many examples this rank has computed for it."""
    reference, examples = trainer.reference.logps, []
    trainer.reference.logps = lambda batch: examples.extend(batch.examples) or reference(batch)
    move(trainer.policy)
    with trainer.autocast():
        sums = trainer.loss.batch_sums(next(iter(trainer.train_batches)).examples, trainer.sums_of_logps)
    trainer.reference.logps = reference
    return dict(sums), len(examples)


def evaluation(trainer, ranks) -> tuple[dict[str, float], list[int]]:
    """Evaluate, and count the microbatches that the reference of each rank computes."""
    compute, microbatches = trainer.reference.compute, []
    trainer.reference.compute = lambda batch: microbatches.append(batch) or compute(batch)
    metrics = trainer.evaluate()
    trainer.reference.compute = compute
    return metrics, ranks.gather(len(microbatches))


def weights_of(model) -> dict[str, torch.Tensor]:
    """Return the weights of a sharded model, whole, on every rank."""
    return whole_tensors(model.state_dict(keep_vars=True), keep=True)


def archived(folder: Path, ranks) -> dict[str, torch.Tensor]:
    """Return the weights of policy and reference of a run that begins with an archive, which is written first."""
    path = folder / "archive.pt"
    settings = (*TINY, "loss=dpo", "model.reference_dtype=bfloat16", f"model.archive='{path}'")

    def write() -> None:
        state = AutoModelForCausalLM.from_pretrained(GOLDENS / "tiny-gpt2").state_dict()
        torch.save({"state": {name: value + 0.01 for name, value in state.items()}}, path)

    ranks.run_on_main(write)
    trainer = build(folder / "archived", ranks, *settings, "trainer=FSDPTrainer")
    models = {"policy": trainer.policy.model, "reference": trainer.reference.module.model}
    return {f"{which}.{name}": value for which, model in models.items() for name, value in weights_of(model).items()}


def mixture_in(folder: Path) -> tuple[str, ...]:
    """The settings of a mixture of experts, in a folder."""
    return f"model.name_or_path='{folder / 'mixtral'}'", "max_tokens_per_pass=300"


def routers_of(trainer) -> tuple[torch.Tensor, dict[str, float]]:
    """Return the first gradient, and the routers' loss of the first batch and of an evaluation."""
    metrics, step = {}, trainer.train_step
    trainer.train_step = lambda batch: metrics.update(step(batch))
    return whole_gradient(trainer), {k: v for k, v in (metrics | trainer.evaluate()).items() if "router" in k}


def bytes_held(trainer) -> int:
    """Return the bytes of weights and of the optimizer's state on this rank, after an update."""
    reshard(trainer.policy)
    states = (value for state in trainer.optimizer.state.values() for value in state.values())
    tensors = (*trainer.policy.parameters(), *states)
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def train_cases(soak: bool, rank: int, n: int, folder: Path) -> None:
    """Write the first updates of each case, and one gradient, as n ranks compute them together."""
    ranks = ProcessGroup(torch.device("cpu"), timedelta(seconds=60))
    if rank:
        build_module.load_policy = None  # the main rank alone reads weights
    for i, case in enumerate(cases(n, soak)):
        overrides = (*overrides_of(read(f"trace_{case.trace}")), "trainer=FSDPTrainer", *case.settings)
        copies = {"ddp=true": n, "replicate=2": 2}
        ranks.init_mesh(max((copies.get(setting, 1) for setting in case.settings), default=1))
        trainer = build(folder / f"run{i}", ranks, *overrides)
        records = [trainer.train_step(batch) for batch in islice(trainer.train_batches, None if soak else 3)]
        if rank == 0:
            (folder / f"{i}.json").write_text(json.dumps(records))
    ranks.init_mesh(1)
    trainer = build(folder / "gradient", ranks, *TINY, *PLAIN, "trainer=FSDPTrainer")
    found = whole_gradient(trainer)
    held = ranks.gather(bytes_held(trainer))
    sampled = trainer.sample()
    if rank == 0:
        (folder / "sampled.json").write_text(json.dumps(sampled))
    for batch in islice(trainer.train_batches, 2):
        trainer.log(trainer.train_step(batch))
    trainer = build(folder / "uneven", ranks, *TINY, *UNEVEN, "trainer=FSDPTrainer")
    move(trainer.policy)
    evaluations = [evaluation(trainer, ranks) for _ in range(2)]
    if rank == 0:
        (folder / "evaluations.json").write_text(json.dumps(evaluations))
    trainer = build(folder / "kto", ranks, *TINY, *KTO, f"datasets=['{folder / 'labels'}']", "trainer=FSDPTrainer")
    sums, n_examples = divergence(trainer)
    shares, gradient = ranks.gather((sums, n_examples)), whole_gradient(trainer, WEIGHTS)
    if rank == 0:
        (folder / "shares.json").write_text(json.dumps(shares))
        torch.save(gradient, folder / "kto.pt")
        torch.save(found, folder / "gradient.pt")
        (folder / "held.json").write_text(json.dumps(held))
    for name, settings in ADAPTERS.items() if n == 2 else ():
        ranks.init_mesh(n if "ddp=true" in settings else 1)
        trainer = build(folder / name, ranks, *TINY, *settings, "trainer=FSDPTrainer")
        seeds = ranks.gather(torch.initial_seed())
        gradient, held = whole_gradient(trainer), bytes_held(trainer)
        if rank == 0:
            torch.save((gradient, held, seeds), folder / f"{name}.pt")
    ranks.init_mesh(1)
    for name, settings in MIXTURES.items() if n == 2 else ():
        trainer = build(folder / name, ranks, *TINY, *settings, *mixture_in(folder), "trainer=FSDPTrainer")
        result = routers_of(trainer)
        if rank == 0:
            torch.save(result, folder / f"{name}.pt")
    weights = archived(folder, ranks)
    if rank == 0:
        torch.save(weights, folder / "archived-weights.pt")
    ranks.close()


@pytest.fixture(scope="module", params=[2, 4])
def sharded(request, tmp_path_factory, write_tiny_folder) -> tuple[int, bool, Path]:
    """Return a number of ranks, whether all cases are tried, and the folder with what they computed."""
    folder = tmp_path_factory.mktemp("sharded")
    soak = request.config.getoption("--soak")
    labelled_rows(folder / "labels")
    (folder / "mixtral").symlink_to(write_tiny_folder("mixtral"))
    run_ranks(request.param, partial(train_cases, soak), folder)
    return request.param, soak, folder


def test_every_update_is_the_originals(sharded):
    n, soak, folder = sharded
    for i, case in enumerate(cases(n, soak)):
        steps = json.loads((folder / f"{i}.json").read_text())
        golden = read(f"trace_{case.trace}")["steps"][: None if soak else 3]
        tolerance = 2e-2 if "precision=bfloat16" in case.settings else 1e-3
        compare_steps(f"{case} on {n} ranks", steps, golden, tolerance)


def test_the_gradient_is_that_of_one_process(sharded, make_trainer):
    folder = sharded[-1]
    expected = whole_gradient(make_trainer(*PLAIN))
    assert (torch.load(folder / "gradient.pt") - expected).norm() < 1e-6 * expected.norm()


def test_the_gradient_of_an_adapter_is_that_of_one_process_and_each_rank_holds_its_share(sharded, make_trainer, report):
    """The sums of bfloat16 products depend on which examples share a pass."""
    n, *_, folder = sharded
    for name, settings in ADAPTERS.items() if n == 2 else ():
        trainer = make_trainer(*(setting for setting in settings if setting != "ddp=true"))
        expected, total = whole_gradient(trainer), bytes_held(trainer)
        gradient, held, seeds = torch.load(folder / f"{name}.pt")
        apart = float((gradient - expected).norm() / expected.norm())
        report(f"gradient of an adapter, {name}: {apart:.1g} from that of one process")
        assert apart < (1e-2 if "bfloat16" in name else 1e-6)
        assert len(set(seeds)) == n  # of dropout
        assert held == total if name == "replicated" else held < 1.1 * total / n


def test_the_routers_loss_is_that_of_one_process_and_so_is_its_gradient(sharded, make_trainer):
    n, *_, folder = sharded
    for name, settings in MIXTURES.items() if n == 2 else ():
        expected, values = routers_of(make_trainer(*settings, *mixture_in(folder)))
        gradient, found = torch.load(folder / f"{name}.pt")
        assert found.keys() == {"router_loss/train", "router_loss/eval"}
        assert found == pytest.approx(values, rel=1e-6)
        assert (gradient - expected).norm() < 1e-5 * expected.norm(), name


def test_a_rank_that_has_never_built_a_mixture_computes_the_routers_loss_as_well(write_tiny_folder, tmp_path):
    """transformers learns which modules are routers when a model is built, and a rank only gets a copy."""
    mixture = f"model.name_or_path='{write_tiny_folder('mixtral')}'"
    settings = (*TINY, mixture, "trainer=FSDPTrainer", "n_examples=8", "debug=true", "do_first_eval=false")
    arguments = ("loss=dpo", *settings, f"local_run_dir='{tmp_path / 'run'}'")
    done = command_lines(tmp_path, arguments, 2, {rank: [_CAN_RECORD_REGISTRY.clear] for rank in range(2)})
    assert [run.returncode for run in done] == [0, 0], done[0].stderr + done[1].stderr
    assert "evaluation: loss " in done[0].stdout and "router loss " in done[0].stdout


def test_samples_and_their_divergence_are_those_of_one_process(sharded, make_trainer):
    trainer = make_trainer(*PLAIN)
    whole_gradient(trainer)
    expected, found = trainer.sample(), json.loads((sharded[-1] / "sampled.json").read_text())
    assert found == pytest.approx(expected, rel=1e-4) and expected["diagnosis/kl"] != 0.0


def test_ranks_evaluate_as_one_process_and_all_compute_the_reference_in_the_first_evaluation_alone(
    sharded, make_trainer
):
    """Of 3 examples in each of 4 batches; a rank with fewer microbatches than another repeats an example."""
    trainer = make_trainer(*UNEVEN)
    move(trainer.policy)
    expected, (first, second) = trainer.evaluate(), json.loads((sharded[-1] / "evaluations.json").read_text())
    (metrics, counts), (again, later_counts) = first, second
    assert metrics == again == pytest.approx(expected, rel=1e-4)
    assert counts == [{2: 8, 4: 4}[sharded[0]]] * sharded[0] and later_counts == [0] * sharded[0]


def test_each_rank_computes_its_share_of_what_ktos_divergence_needs_and_all_get_that_of_one_process(
    sharded, make_trainer
):
    n, *_, folder = sharded
    trainer = make_trainer(*KTO, f"datasets=['{folder / 'labels'}']")
    sums, n_examples = divergence(trainer)
    shares = json.loads((folder / "shares.json").read_text())
    counts = [count for _, count in shares]  # a rank with fewer passes than another computes an example again
    assert n_examples == 8 <= sum(counts) < 8 + n and max(counts) < 8 and len(shares) == n
    for own, _ in shares:
        assert own == shares[0][0] == pytest.approx(sums, rel=1e-5)
    expected = whole_gradient(trainer, WEIGHTS)
    assert (torch.load(folder / "kto.pt") - expected).norm() < 1e-5 * expected.norm()


def test_every_rank_gets_the_weights_that_the_main_one_has_read_and_the_reference_those_of_the_policy(sharded):
    """Rounded to bfloat16, as the settings ask for the reference."""
    folder = sharded[-1]
    archive = torch.load(folder / "archive.pt")["state"]
    found = torch.load(folder / "archived-weights.pt")
    assert found.keys() == {f"{which}.{name}" for which in ("policy", "reference") for name in archive}
    for name, value in archive.items():
        assert torch.equal(found[f"policy.{name}"], value)
        assert torch.equal(found[f"reference.{name}"], value.bfloat16())


def test_each_record_has_the_peak_memory_of_the_ranks(sharded):
    for line in (sharded[-1] / "gradient" / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        assert record["memory_gb/max"] >= record["memory_gb/mean"] > 0.05


def test_each_rank_holds_its_share_of_weights_and_optimizer(sharded, make_trainer, report):
    """In whole rows, so that the largest share may be a row of each of the 28 tensors above the mean."""
    n, *_, folder = sharded
    trainer = make_trainer("loss=dpo")
    trainer.train_step(next(iter(trainer.train_batches)))
    total, held = bytes_held(trainer), json.loads((folder / "held.json").read_text())
    report(f"weights and RMSprop's state: {total:,} bytes on one process, {held} on {n}")
    assert len(held) == n and max(held) < 1.1 * total / n


# Layers gathered in bfloat16, as on GPUs


def one_update(trainer) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.dtype]]:
    """Return log-probabilities and gradient of one microbatch after an evaluation, and the dtypes of some outputs."""
    move(trainer.policy)
    trainer.evaluate()
    batch = next(trainer.packer(next(iter(trainer.train_batches)).examples[:3]))
    dtypes = {}

    def watch(name: str) -> None:
        def keep(module, inputs, output) -> None:
            dtypes[name] = output.dtype

        trainer.policy.model.get_submodule(name).register_forward_hook(keep)

    for name in ("transformer.wte", "transformer.h.0.ln_1", "transformer.h.0.attn.c_attn", "transformer.h.1"):
        watch(name)
    with trainer.autocast():
        tokens = trainer.policy(batch)
        tokens.sum().backward()
    gradients = [parameter.grad for parameter in trainer.policy.trained_parameters()]
    whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
    return tokens.detach(), torch.cat([gradient.flatten() for gradient in whole]), dtypes


def gather_in_bfloat16(rank: int, n: int, folder: Path) -> None:
    """Write what n ranks compute, each the same microbatch, with the precision that a mesh of GPUs would get."""
    ranks, precision = ProcessGroup(torch.device("cpu"), timedelta(seconds=60)), sharding.mixed_precision
    sharding.mixed_precision = lambda mesh, *dtypes: precision(SimpleNamespace(device_type="cuda"), *dtypes)
    for name in ("sharded", "replicated"):
        ddp = name == "replicated"
        ranks.init_mesh(n if ddp else 1)
        trainer = build(folder / name, ranks, *TINY, *PLAIN, "precision=bfloat16", "trainer=FSDPTrainer", f"ddp={ddp}")
        result = one_update(trainer)
        if rank == 0:
            torch.save(result, folder / f"{name}.pt")
    ranks.init_mesh(1)
    dora = (*LORA, "lora.use_dora=true", "precision=bfloat16", "trainer=FSDPTrainer")
    build(folder / "dora", ranks, *TINY, *dora)  # which compares the policy with the reference
    ranks.close()


def test_layers_gathered_in_bfloat16_compute_the_bits_of_one_device(make_trainer, tmp_path):
    """Hidden states between layers stay in float32, also where an evaluation has left the embeddings gathered."""
    run_ranks(2, gather_in_bfloat16, tmp_path)
    logps, gradient, dtypes = one_update(make_trainer(*PLAIN, "precision=bfloat16"))
    assert dtypes.pop("transformer.h.0.attn.c_attn") == torch.bfloat16 and set(dtypes.values()) == {torch.float32}
    for name in ("sharded", "replicated"):
        found, its_gradient, its_dtypes = torch.load(tmp_path / f"{name}.pt")
        assert torch.equal(found, logps) and its_dtypes.pop("transformer.h.0.attn.c_attn") == torch.bfloat16
        assert its_dtypes == dtypes
        assert (its_gradient - gradient).norm() < 1e-6 * gradient.norm()
