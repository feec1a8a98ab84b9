"""From validated settings to a trainer: data, tokenizer, models, layout, reference.

`load_inputs` reads everything that settings can be checked against before weights load; `build_trainer` does the rest.
Apart from train.py because it needs torch, whose import takes longer than answering a mistyped command.
"""

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dpo.data.batches import BatchIterator, data_problems, schedule_notes
from dpo.data.chat import Rendering
from dpo.data.examples import Tokenization, bos_note
from dpo.data.row_index import joined, score_problems, scores_of
from dpo.data.sources import is_hub_name
from dpo.distributed.ranks import Ranks
from dpo.distributed.sharding import reshard, without_weights
from dpo.distributed.tensor_parallel import plan_problems
from dpo.model.archives import weights_checksum
from dpo.model.attention import use_attention
from dpo.model.layout_check import choose_layout, recorded_layout
from dpo.model.loading import (
    compile_layers,
    copy_reference,
    load_model_config,
    load_policy,
    model_problems,
    recompute_activations,
    set_quantized_dtype,
    skip_unreachable_hub,
)
from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.packing import Packer
from dpo.model.sampling import Sampler, add_stops, distinct_prompts
from dpo.reporting.metrics import make_logger
from dpo.reporting.trackers import TensorBoardTracker, Tracker, Trackers, TrackioTracker, WandbTracker
from dpo.runs.run_dir import RunDir
from dpo.runs.weights import AdapterWeights, AllWeights, add_adapter
from dpo.settings.schema import Settings
from dpo.system.console import log_message
from dpo.system.devices import autocast, compute_dtype, float32_products, limit_onednn_cache, pick_device, read_facts
from dpo.system.errors import actionable_errors, raise_problems
from dpo.system.signals import Signals
from dpo.system.threads import set_threads
from dpo.training.budgets import fit_budget, has_second_model, pass_memory, tokens_per_pass
from dpo.training.first_update import check_first_margin
from dpo.training.objectives import Loss
from dpo.training.optimizers import bfloat16_note, optimizer_problems
from dpo.training.precomputation import Precomputation
from dpo.training.references import (
    ROUNDED,
    AdapterReference,
    CachedReference,
    ModelReference,
    Reference,
    SyncedReference,
)
from preference_datasets import DATASETS, load_data
from trainers import TRAINERS, BasicTrainer
from utils import local_dir

LOADING = "before the first pass; a smaller model needs less"


@dataclass(frozen=True)
class Inputs:
    """What a run is checked against before any weights load."""

    device: torch.device
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    train_batches: BatchIterator
    eval_batches: BatchIterator
    stops: list[int]  # ids that end a turn in the conversations of the data, if there are any


def load_inputs(settings: Settings, loss: Loss) -> Inputs:
    """Load the data, the tokenizer and the model's config; UserError with a line for each misfit."""
    raise_problems(optimizer_problems(settings))
    model = settings.model
    names = {model.name_or_path: True, model.tokenizer_name_or_path or model.name_or_path: True}
    on_hub = {name: is_hub_name(name) or (name in DATASETS and name != "demo") for name in settings.datasets}
    skip_unreachable_hub(names | on_hub)
    device = pick_device(settings.device)
    model_config, tokenizer = load_model_config(settings.model)
    problems = model_problems(settings, model_config, tokenizer, device)
    raise_problems(problems + plan_problems(settings, model_config))
    lengths, add_bos = (settings.max_length, settings.max_prompt_length), settings.model.add_bos
    tokenize = Tokenization(tokenizer, *lengths, add_bos, model_config.get_text_config().vocab_size)
    sft = loss.n_responses == 1
    rendering = Rendering(settings.prompt_format, tokenizer)
    train, test = load_data(settings, sft, tokenize, rendering, loss.takes_labels)
    if rendering.template is None and (note := bos_note(tokenizer, add_bos)):  # a chat template writes its own BOS
        log_message(note)
    limits = (settings.n_epochs, settings.n_examples)
    train_batches = BatchIterator(train, tokenize, settings.batch_size, settings.seed, *limits)
    eval_batches = BatchIterator(test, tokenize, settings.eval_batch_size, 0, 1, settings.n_eval_examples, True)
    raise_problems(data_problems(settings, train_batches, eval_batches))
    raise_problems(score_problems(joined([train, test])) if loss.needs_scores else [])
    for note in schedule_notes(settings, len(train_batches)):
        log_message(note)
    left = train_batches.n_items - train_batches.batches_per_epoch * settings.batch_size
    if left:
        n = train_batches.n_items
        log_message(f"The last {left:,} of an epoch's {n:,} examples fill no batch and are left out.")
    stops = rendering.template.stops() if rendering.template else []
    return Inputs(device, model_config, tokenizer, train_batches, eval_batches, stops)


@dataclass(frozen=True)
class Models:
    """The policy, its adapter if that alone is trained, the second model if the reference is one; how all compute."""

    policy: ResponseLogps
    adapter: AdapterWeights | None
    reference: ResponseLogps | None
    packer: Packer
    dtype: torch.dtype

    def without_weights(self) -> "Models":
        """Return the policy and its adapter without their weights."""
        policy = without_weights(self.policy)
        return replace(self, policy=policy, adapter=self.adapter and replace(self.adapter, model=policy.model))


def load_models(settings: Settings, loss: Loss, inputs: Inputs, run: RunDir) -> Models:
    """Load the policy, of several ranks on the main one alone, copy the reference, and seed all generators."""
    limit_onednn_cache()
    dtype = compute_dtype(settings.compute_precision, getattr(torch, settings.model.policy_dtype), inputs.device)
    if dtype == torch.float32:
        torch.set_float32_matmul_precision(float32_products(read_facts(inputs.device)))
    load = partial(load_policy_module, settings, loss, inputs, run, dtype)
    models = run.ranks.from_main(load, Models.without_weights)
    use_attention(models.policy.model, models.policy.model.config._attn_implementation)  # which each process registers
    if has_second_model(settings, loss):
        reference = copy_reference(models.policy, settings.model.reference_dtype, run.ranks.copy)
        models = replace(models, reference=reference)
    models.policy.with_collisions = loss.needs_collisions
    for module in (models.policy, models.reference):
        if module is not None and settings.compile:
            compile_layers(module.model)
    random.seed(settings.seed)
    np.random.seed(settings.seed)
    torch.manual_seed(settings.seed + run.ranks.data_rank)  # ranks with other examples have other dropout
    return models


def load_policy_module(settings: Settings, loss: Loss, inputs: Inputs, run: RunDir, dtype: torch.dtype) -> Models:
    """Load the policy to a device, and its adapter, and choose the layout by a check on a few examples."""
    device, policy_dtype = inputs.device, settings.model.policy_dtype
    known = None if run.checkpoint is None else recorded_layout(run.checkpoint.states, device)
    # A model that is shared out is whole on one device only for the check of the layout, if there is one.
    stays = run.ranks.world_size > 1 and (known is not None or settings.layout == "padded")
    place = torch.device("cpu") if stays else device
    log_message(f"Device: {device}. Computing in {dtype}, parameters and optimizer in {policy_dtype}.")
    policy = load_policy(settings, inputs.model_config, place)
    adapter = None if settings.lora is None else add_adapter(policy, settings)
    # A cached reference meets the policy in other passes from the second epoch on, where bfloat16 logits would differ.
    float32_head = loss.needs_reference and loss.cached_reference and dtype != torch.float32
    module = ResponseLogps.wrap(policy, float32_head)
    examples = next(iter(inputs.eval_batches.from_start())).examples
    choice = choose_layout(module, [module], examples, settings.layout, settings.max_length, dtype, known)
    set_quantized_dtype(policy, dtype)
    n_shards = 1 if settings.ddp else run.ranks.world_size // settings.replicate
    estimate = partial(pass_memory, module, settings, loss, dtype, choice, n_shards)
    packer = Packer(choice.layout, tokens_per_pass(settings.max_tokens_per_pass, read_facts(device), estimate), device)
    return Models(module, adapter, None, packer, dtype)


def build_trainer(
    settings: Settings, loss: Loss, inputs: Inputs, run: RunDir, signals: Signals | None = None
) -> BasicTrainer:
    """Load the models and build the trainer, which stands where the run directory's checkpoint left it, if any."""
    signals = run.ranks.agree(signals or Signals())
    set_threads(inputs.device, run.checkpoint and run.checkpoint.states)
    with actionable_errors(LOADING):
        models = load_models(settings, loss, inputs, run)
    if inputs.stops:
        add_stops(models.policy.model.generation_config, inputs.stops)
    note = partial(bfloat16_note, models.policy.trained_parameters(), settings.lr, settings.optimizer)
    if text := run.ranks.on_main(note):
        log_message(text)
    found = identity(loss, inputs, models, run.ranks)
    run.ranks.check_same(lambda: found)
    batches = {"the training data": inputs.train_batches, "the evaluation data": inputs.eval_batches}
    run.identify(found, {name: partial(own.fingerprint, by_text=True) for name, own in batches.items()})
    if settings.max_tokens_per_pass == "fit":
        models = replace(
            models, packer=fit_budget(settings, models.policy, models.packer, inputs.train_batches, models.dtype)
        )
    if settings.max_tokens_per_pass == "fit" or read_facts(inputs.device).kind == "cuda":
        run.config.max_tokens_per_pass = models.packer.max_tokens  # with which the run is resumed
    run.create()
    prepare = partial(TRAINERS[settings.trainer].prepare, settings=settings, ranks=run.ranks, dtype=models.dtype)
    models = replace(models, policy=prepare(models.policy))
    interval = settings.minimum_log_interval_secs
    logger = make_logger(run.path, run.ranks, lambda: make_tracker(settings, run), interval)
    run.open_files.callback(logger.close)
    sampler = Sampler.of(settings, inputs.tokenizer, inputs.device, models.dtype)
    sampler = replace(sampler, before_batch=signals.check, stops=inputs.stops)
    reference = make_reference(settings, loss, inputs, models, sampler, run)
    if reference is not None:
        reference.start_tolerance = max(reference.start_tolerance, start_tolerance(settings))
    reshard(models.policy)  # the optimizer is made of sharded parameters
    if isinstance(reference, ModelReference):
        reference.module = prepare(reference.module)
        run.ranks.fill(reference.module, models.policy)
    if settings.activation_checkpointing:
        recompute_activations(models.policy.model)
    trainer = TRAINERS[settings.trainer](
        models.policy,
        loss,
        reference,
        settings,
        weights=models.adapter or AllWeights(models.policy.model),
        train_batches=inputs.train_batches,
        eval_batches=inputs.eval_batches,
        packer=models.packer,
        sampler=sampler,
        dtype=models.dtype,
        run=run,
        logger=logger,
        signals=signals,
        ranks=run.ranks,
    )
    resume_trainer(trainer, run)
    return trainer


def identity(loss: Loss, inputs: Inputs, models: Models, ranks: Ranks) -> dict[str, str]:
    """Return fingerprints of what a resumed run must find again, besides the settings."""
    found = {"the training data": inputs.train_batches.fingerprint()}
    found["the evaluation data"] = inputs.eval_batches.fingerprint()
    if loss.needs_scores:
        found["the scores"] = hashlib.sha256(repr(list(scores_of(inputs.train_batches.groups))).encode()).hexdigest()
    if models.adapter is not None:
        found |= models.adapter.identity()
    elif loss.needs_reference:
        checksum = ranks.on_main(lambda: weights_checksum(models.policy.model.state_dict()))
        found["the reference's weights"] = checksum
    return found


def make_reference(
    settings: Settings, loss: Loss, inputs: Inputs, models: Models, sampler: Sampler, run: RunDir
) -> Reference | None:
    """Return the reference that the loss needs: the second model, or a cache that the policy fills now, or None."""
    if models.reference is not None and settings.sync_reference:
        return SyncedReference(models.reference, models.policy, sampler, settings.sync_reference, settings.sync_mix)
    if models.reference is not None:
        is_mixed = models.policy.model.dtype != models.dtype  # then training computes under autocast, else as it is
        dtype = models.dtype if is_mixed else models.reference.model.dtype
        return ModelReference(models.reference, dtype, sampler)
    if not loss.needs_reference:
        return None
    train, test = inputs.train_batches, inputs.eval_batches
    if models.adapter is not None:
        reference = AdapterReference(models.policy, models.adapter, sampler)
        log_message(f"Reference: {models.adapter.describe_reference()}; no second model is loaded.")
        shortest = min(next(iter(test.from_start())).examples, key=len)
        with torch.no_grad(), autocast(models.policy.model.dtype, models.dtype, inputs.device):
            models.policy.eval()
            batch = next(models.packer([shortest]))
            check_first_margin(response_logps(models.policy, batch), reference.logps(batch), reference)
        if not loss.cached_reference:
            return reference
    samples = None
    if settings.sample_during_eval and not settings.dry_run:
        prompts = distinct_prompts(test, settings.n_eval_model_samples)
        samples = sampler.sample(models.policy.model, prompts, "sampling the reference")
    examples = (example for batches in (train, test) for group in batches.groups for example in group)
    cache = CachedReference(examples, loss.n_responses, samples)
    if settings.dry_run:  # whose losses mean nothing
        cache.sums.zero_()
        return cache
    own = None if settings.debug else run.path / "reference.pt"
    shared = Path(local_dir(settings.local_dirs)) / "reference_cache"
    precomputation = Precomputation(
        models.policy,
        models.packer,
        models.dtype,
        train,
        test,
        n_microbatches=settings.gradient_accumulation_steps,
        compiled=settings.compile,
        ranks=run.ranks,
    )
    precomputation.run(cache, own, shared)
    return cache


def start_tolerance(settings: Settings) -> float:
    """Return how far policy and reference may differ before the first update, in nats per token on average."""
    if settings.dry_run or settings.model.reference_dtype not in (None, settings.model.policy_dtype):
        return math.inf
    return ROUNDED if settings.compile else 0.0  # compiled passes with and without a gradient may round differently


def resume_trainer(trainer: BasicTrainer, run: RunDir) -> None:
    """Bring a trainer to where the run directory's checkpoint left it, and record the resume."""
    if run.checkpoint is not None:
        trainer.load_state_dict(run.checkpoint.states)
        run.checkpoint = replace(run.checkpoint, states={})  # tensors as large as the model, which are needed no more
    elif run.resumed:
        trainer.logger.cut([])
    if run.resumed:
        run.record()


def make_tracker(settings: Settings, run: RunDir) -> Tracker:
    """Start the trackers of a run; wandb.enabled=false leaves wandb out."""
    if settings.debug:
        return Tracker()
    project, config = settings.wandb.project, OmegaConf.to_container(run.config, resolve=False)
    start = int(run.checkpoint.folder.name.removeprefix("step-")) if run.checkpoint else 0
    names = {"entity": settings.wandb.entity, "project": project, "name": settings.exp_name, "config": config}
    makers: dict[str, Callable[[], Tracker]] = {
        "wandb": lambda: WandbTracker(run.path, names),
        "tensorboard": lambda: TensorBoardTracker(run.path, start if run.resumed else None),
        "trackio": lambda: TrackioTracker(project, run.path, config, run.resumed),
    }
    return Trackers([makers[name]() for name in settings.trackers if name != "wandb" or settings.wandb.enabled])
