"""From validated settings to a trainer.

`load_inputs` reads what settings are checked against before any weights load; `build_trainer` does the rest in steps.
"""

import hashlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf

from dpo.data.batches import BatchIterator, data_problems, data_warnings, schedule_notes
from dpo.data.examples import Tokenization, bos_notes
from dpo.data.formatting import RowFormatter, template_time
from dpo.data.records import Encoder
from dpo.data.sources import is_hub_name
from dpo.distributed.process_group import check_same, synchronize
from dpo.distributed.ranks import Ranks
from dpo.distributed.sharding import reshard, without_weights
from dpo.distributed.splitting import BatchSplitter
from dpo.distributed.tensor_parallel import plan_problems
from dpo.model.archives import weights_checksum
from dpo.model.attention import use_attention
from dpo.model.layout_check import LayoutChoice, choose_layout, recorded_layout
from dpo.model.loading import (
    compile_layers,
    copy_reference,
    freeze,
    is_quantized,
    load_model_config,
    load_policy,
    recompute_activations,
    set_quantized_products,
)
from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.lora import POLICY, adapter_checksum
from dpo.model.packing import Packer
from dpo.model.pretrained import auto_class, skip_unreachable_hub
from dpo.model.reference_weights import ReferenceWeights, find_reference, same_config
from dpo.model.refusals import count_embeddings, model_problems, quantization_method
from dpo.model.routers import make_router_loss
from dpo.model.sampling import Sampler, add_stops, distinct_prompts
from dpo.reporting.metrics import MetricLogger, make_logger
from dpo.reporting.stopping import keep_best_problems, stop_if_notes
from dpo.reporting.trackers import TensorBoardTracker, Tracker, Trackers, TrackioTracker, WandbTracker
from dpo.runs.run_dir import RunDir
from dpo.runs.weights import add_adapter
from dpo.settings.constraints import START
from dpo.settings.schema import Settings
from dpo.system.console import log_message, log_warning
from dpo.system.devices import autocast, compute_dtype, float32_products, limit_onednn_cache, pick_device, read_facts
from dpo.system.errors import UserError, actionable_errors, raise_problems
from dpo.system.signals import Signals
from dpo.system.threads import set_threads
from dpo.training.budgets import estimate_memory, fit_budget, has_second_model, resolve_max_tokens
from dpo.training.compiling import compiling_pays, try_compiling
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
from trainers import TRAINERS, BasicTrainer, Inputs, Models
from utils import local_dir

Prepare = Callable[[ResponseLogps], ResponseLogps]  # as `prepare` of a trainer
LOADING = "before training; a smaller model needs less"


def load_inputs(settings: Settings, loss: Loss, start: datetime | None = None) -> Inputs:
    """Load the data, the tokenizer and the model's config; UserError with one line per problem.

    start is the time that chat templates see without chat_template_time; None: now.
    """
    raise_problems(optimizer_problems(settings) + keep_best_problems(settings, loss))
    model = settings.model
    names = {model.name_or_path: True, model.tokenizer_name_or_path or model.name_or_path: True}
    names[settings.reference] = settings.reference != START and not Path(settings.reference).exists()
    on_hub = {name: is_hub_name(name) or (name in DATASETS and name != "demo") for name in settings.datasets}
    skip_unreachable_hub(names | on_hub)
    device = pick_device(settings.device)
    model_config, tokenizer = load_model_config(settings.model, settings.chat_template)
    problems = model_problems(settings, model_config, tokenizer, device)
    raise_problems(problems + plan_problems(settings, model_config))
    reference = find_reference(settings, model_config, tokenizer)
    if reference is not None and reference.config is not None:
        raise_problems([f"{reference.setting} {line}" for line in plan_problems(settings, reference.config)])
    tokenize = Tokenization(
        tokenizer,
        settings.max_length,
        settings.max_prompt_length,
        add_bos=settings.model.add_bos,
        vocab_size=count_embeddings(model, model_config, tokenizer),
    )
    time = template_time(settings.chat_template_time, start)
    formatter = RowFormatter(settings.prompt_format, tokenizer, settings.chat_template_args, time)
    if tokenizer.chat_template and (settings.chat_template or settings.chat_template_args):
        formatter.check_template()
    drop = settings.on_inconsistent == "drop"
    encoder = Encoder(formatter, tokenize, sft=loss.n_responses == 1, drop_inconsistent=drop)
    train_batches, eval_batches, is_chat, warnings = load_batches(settings, loss, encoder)
    warnings += stop_if_notes(settings, loss)
    for warning in warnings:
        log_warning(warning)
    stops = formatter.template.stops() if is_chat else []
    time_seen = time if is_chat and formatter.template.clock_formats else None
    raise_problems(list(unread_settings(settings, is_chat, time_seen)))
    return Inputs(device, model_config, tokenizer, train_batches, eval_batches, stops, time_seen, reference, warnings)


def unread_settings(settings: Settings, is_chat: bool, time_seen: datetime | None) -> Iterator[str]:
    """Yield a line for each setting of chat templates that changes nothing."""
    if settings.chat_template_time is not None and time_seen is None:
        yield f"chat_template_time={settings.chat_template_time}: no chat template reads the clock; leave it out"
    if settings.chat_template_args is not None and not is_chat:
        yield "chat_template_args: no row is rendered with the chat template; leave it out, or set prompt_format=chat"


def load_batches(
    settings: Settings, loss: Loss, encoder: Encoder
) -> tuple[BatchIterator, BatchIterator, bool, list[str]]:
    """Load training and evaluation data; UserError if the run cannot use it.

    Also returns whether there are conversations, and warnings of anything unusual.
    """
    cache = None if settings.dry_run else Path(local_dir(settings.local_dirs)) / "data_cache"
    data = load_data(settings, encoder, cache, loss.takes_labels)
    tokenize = encoder.tokenize
    train_batches = BatchIterator(
        data.train, tokenize, settings.batch_size, settings.seed, settings.n_epochs, settings.n_examples
    )
    eval_batches = BatchIterator(
        data.test, tokenize, settings.eval_batch_size, n_epochs=1, n_examples=settings.n_eval_examples, keep_last=True
    )
    problems = data_problems(settings, train_batches, data.lost)
    raise_problems(problems or (data.score_problems() if loss.needs_scores else []))
    warnings = data.warnings + loss.label_notes(*train_batches.examples.label_counts())
    if not data.is_chat:  # a chat template writes its own BOS
        warnings += bos_notes(tokenize.tokenizer, tokenize.add_bos)
    warnings += data_warnings(settings, train_batches, eval_batches, encoder.sft)
    for note in schedule_notes(settings, train_batches):
        log_message(note)
    return train_batches, eval_batches, data.is_chat, warnings


def build_trainer(
    settings: Settings, loss: Loss, inputs: Inputs, run: RunDir, signals: Signals | None = None
) -> BasicTrainer:
    """Build the trainer, and load the checkpoint if the run directory has one."""
    trainer_class = TRAINERS[settings.trainer]
    signals = synchronize(signals or Signals(), run.ranks)
    set_threads(inputs.device, run.recorded_environment())
    with actionable_errors(LOADING):
        models = load_models(settings, loss, inputs, run)
        if models.reference_checksum is None and has_second_model(settings, loss):
            models.second = copy_reference(models.policy, settings.model.reference_dtype, trainer_class.copy)
    compile_models(settings, inputs, models, run)
    seed_generators(settings.seed, run.ranks)
    log_bfloat16(settings, models)
    check_fingerprints(loss, inputs, models, run)
    set_token_budget(settings, inputs, models, run)
    run.warnings = inputs.warnings
    run.create()

    prepare = partial(trainer_class.prepare, settings=settings, ranks=run.ranks, dtype=models.dtype)
    models.policy = prepare(models.policy)
    models.sampler = make_sampler(settings, inputs, models, signals)
    logger = open_logger(settings, run)
    models.reference = make_reference(settings, loss, inputs, models, run, prepare)
    reshard(models.policy)  # the optimizer is made of sharded parameters
    if settings.activation_checkpointing:
        recompute_activations(models.policy.model)
    trainer = trainer_class(settings, loss, inputs, models, run, logger, signals)
    resume_trainer(trainer, run)
    return trainer


# Loading: only the main rank loads weights, and sends the other ranks a policy without them


def load_models(settings: Settings, loss: Loss, inputs: Inputs, run: RunDir) -> Models:
    """Load the policy, its adapter and a reference of its own, and choose the layout, on the main rank."""
    limit_onednn_cache()
    dtype = compute_dtype(settings.compute_precision, getattr(torch, settings.model.policy_dtype), inputs.device)
    if dtype == torch.float32:
        torch.set_float32_matmul_precision(float32_products(read_facts(inputs.device)))
    load = partial(load_on_main, settings, loss, inputs, run, dtype)
    models = run.ranks.broadcast_from_main(load, without_model_weights)
    for module in (models.policy, models.second):
        if module is not None:
            use_attention(module.model, module.model.config._attn_implementation)  # which each process registers
    models.policy.with_collisions = loss.needs_collisions
    make_loss = partial(make_router_loss, models.policy.model, settings.model)
    models.policy.router_loss = run.ranks.run_on_main(make_loss)  # adds hooks, which cannot be sent to other ranks
    if models.policy.router_loss is not None and not run.ranks.is_main:
        with torch.device("meta"):  # transformers learns which modules are routers when it builds a model, not a copy
            auto_class(inputs.model_config).from_config(inputs.model_config)
    return models


def load_on_main(settings: Settings, loss: Loss, inputs: Inputs, run: RunDir, dtype: torch.dtype) -> Models:
    """Load the policy, add its adapter, load the reference, and choose the layout by a check on a few examples."""
    device, policy_dtype, reference = inputs.device, settings.model.policy_dtype, inputs.reference
    known = recorded_layout(run.recorded_environment(), device)
    # A model that is sharded is whole on one device only for the check of the layout, if there is one.
    stays_on_host = run.ranks.world_size > 1 and (known is not None or settings.layout == "padded")
    method = quantization_method(inputs.model_config)
    frozen = f", frozen weights as they are stored ({method})" if method else ""
    log_message(f"Device: {device}. Computing in {dtype}, parameters and optimizer in {policy_dtype}{frozen}.")
    n_embeddings = count_embeddings(settings.model, inputs.model_config, inputs.tokenizer)
    model = load_policy(settings, inputs.model_config, torch.device("cpu") if stays_on_host else device, n_embeddings)
    adapter = None if settings.lora is None else add_adapter(model, settings, reference)
    # From the second epoch on, a cached reference meets the policy in other microbatches, where bfloat16 logits differ.
    float32_head = loss.needs_reference and loss.cached_reference and dtype != torch.float32
    policy = ResponseLogps.wrap(model, float32_head)
    examples = next(iter(inputs.eval_batches.from_start())).examples
    choice = choose_layout(policy, examples, settings.layout, settings.max_length, dtype, known)
    set_quantized_products(model, dtype)
    models = Models(policy, adapter, Packer(choice.layout, 1, device), dtype)
    if reference is not None:
        if adapter is None or adapter.reference is None:
            choice = load_second(settings, inputs, reference, models, choice)
        compare_start(settings, inputs, reference, models)
    n_shards = 1 if settings.ddp else run.ranks.world_size // settings.replicate
    estimate = partial(estimate_memory, policy, settings, loss, dtype, choice, n_shards, models.second)
    max_tokens = resolve_max_tokens(settings.max_tokens_per_pass, read_facts(device), estimate)
    models.packer = Packer(choice.layout, max_tokens, device)
    return models


def load_second(
    settings: Settings, inputs: Inputs, reference: ReferenceWeights, models: Models, choice: LayoutChoice
) -> LayoutChoice:
    """Load the model that `reference` names, and return a layout that both models support.

    Of several processes, the main one keeps both on its host until they are sharded.
    """
    policy, host = models.policy, torch.device("cpu")
    if is_quantized(policy.model):
        raise UserError(f"{reference.setting}: adapts other experts than lora.targets; set lora.targets to the same")
    place = inputs.device if settings.trainer == "BasicTrainer" else host
    policy.to(place)
    n_embeddings = count_embeddings(settings.model, inputs.model_config, inputs.tokenizer)
    model = reference.load(settings, inputs.model_config, n_embeddings)
    models.second = ResponseLogps.wrap(model, policy.float32_head)
    if reference.config is None or same_config(reference.config, inputs.model_config):
        use_attention(model, choice.attention)
    else:
        examples = next(iter(inputs.eval_batches.from_start())).examples
        models.second.to(inputs.device)
        own = choose_layout(models.second, examples, choice.layout, settings.max_length, models.dtype)
        if own.layout != choice.layout:
            use_attention(policy.model, "sdpa")
            choice = LayoutChoice(own.layout, policy.model.config._attn_implementation)
    models.second.to(place)
    return choice


def compare_start(settings: Settings, inputs: Inputs, reference: ReferenceWeights, models: Models) -> None:
    """Take the checksum of a reference of its own, compare it with the policy, and freeze it."""
    adapter, second, model = models.adapter, models.second, models.policy.model
    if second is None:
        assert adapter is not None
        if settings.model.reference_dtype is not None:
            problem = "an adapter of the policy's frozen weights is in their dtype; set model.reference_dtype=null"
            raise UserError(f"{reference.setting} model.reference_dtype={settings.model.reference_dtype}: {problem}")
        models.reference_checksum = adapter.reference
        models.starts_equal = adapter_checksum(model, POLICY) == adapter.reference
        return
    checksum = weights_checksum(second.model.state_dict())
    models.reference_checksum = reference.fingerprint(checksum)
    is_same_function = reference.config is None or same_config(reference.config, inputs.model_config)
    start = weights_checksum(model.state_dict()) if adapter is None else adapter.base
    is_start = is_same_function and start == checksum
    models.starts_equal = is_start and (settings.lora is None or settings.lora.path is None)
    if is_start and adapter is not None and settings.model.reference_dtype is None:
        models.second = None  # it is the policy without its adapter
        return
    shapes = [[parameter.shape for parameter in each.parameters()] for each in (models.policy, second)]
    if settings.sync_reference and not (is_same_function and shapes[0] == shapes[1]):
        problem = "its config or shapes are not the policy's, so it cannot follow it; set sync_reference=null"
        raise UserError(f"{reference.setting} sync_reference={settings.sync_reference}: {problem}")
    freeze(second, settings.model.reference_dtype)
    log_message(f"Reference: a second model, with the weights that {reference.setting} names.")


def without_model_weights(models: Models) -> Models:
    """The values that the main rank sends to the others."""
    policy = without_weights(models.policy)
    adapter = models.adapter and replace(models.adapter, model=policy.model)
    second = None if models.second is None else without_weights(models.second)
    return replace(models, policy=policy, adapter=adapter, second=second)


def compile_models(settings: Settings, inputs: Inputs, models: Models, run: RunDir) -> None:
    """Compile the layers of the policy, and of the second model if the reference is one, if that is asked or pays."""
    models.compiled = settings.compile is True
    if models.compiled:
        compile_layers(models.policy.model)
    elif settings.compile == "auto":
        models.compiled = compile_if_it_pays(settings, inputs, models, run)
    if models.compiled and models.second is not None:
        compile_layers(models.second.model)


def compile_if_it_pays(settings: Settings, inputs: Inputs, models: Models, run: RunDir) -> bool:
    """Decide for compile=auto, and record what was chosen on a GPU, so that a resumed run uses it too."""
    facts = read_facts(inputs.device)
    if facts.kind != "cuda":
        return False
    first = next(iter(inputs.train_batches.from_start())).examples
    n_tokens = len(inputs.train_batches) * sum(map(len, first))
    run.config.compile = False
    if compiling_pays(settings, facts, models.policy.model, n_tokens):
        with actionable_errors(LOADING):
            run.config.compile = try_compiling(models.policy, next(models.packer(first[:2])), models.dtype)
    return run.config.compile


def seed_generators(seed: int, ranks: Ranks) -> None:
    """Seed all random generators; ranks with different examples get different dropout."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed + ranks.data_rank)


def log_bfloat16(settings: Settings, models: Models) -> None:
    if note := bfloat16_note(models.policy.trained_parameters(), settings.optimizer):
        log_message(note)


def check_fingerprints(loss: Loss, inputs: Inputs, models: Models, run: RunDir) -> None:
    """Raise UserError unless all ranks, and the run before its stop, have read the same data and weights."""
    batches = {"the training data": inputs.train_batches, "the evaluation data": inputs.eval_batches}
    fingerprints = {name: one.fingerprint() for name, one in batches.items()}
    if loss.needs_scores:
        scores = repr(list(inputs.train_batches.examples.scores()))
        fingerprints["the scores"] = hashlib.sha256(scores.encode()).hexdigest()
    if models.adapter is not None:
        fingerprints |= models.adapter.fingerprints()
    if models.reference_checksum is not None:
        fingerprints["the reference's weights"] = models.reference_checksum
    elif models.adapter is None and loss.needs_reference:
        checksum = run.ranks.run_on_main(lambda: weights_checksum(models.policy.model.state_dict()))
        fingerprints["the reference's weights"] = checksum
    check_same(fingerprints, run.ranks)
    run.check_fingerprints(fingerprints, earlier={name: one.earlier_fingerprint for name, one in batches.items()})


def set_token_budget(settings: Settings, inputs: Inputs, models: Models, run: RunDir) -> None:
    """Measure max_tokens_per_pass=fit; record the number that fit or auto chose, so that a resumed run uses it too."""
    if settings.max_tokens_per_pass == "fit":
        models.packer = fit_budget(settings, models.policy, models.packer, inputs.train_batches, models.dtype)
    if settings.max_tokens_per_pass == "fit" or read_facts(inputs.device).kind == "cuda":
        run.config.max_tokens_per_pass = models.packer.max_tokens


# Sampler, logger and reference


def make_sampler(settings: Settings, inputs: Inputs, models: Models, signals: Signals) -> Sampler:
    """Make the sampler, which also stops at the end-of-turn tokens of the data's conversations."""
    if inputs.stops:
        add_stops(models.policy.model.generation_config, inputs.stops)
    sampler = Sampler.of(settings, inputs.tokenizer, inputs.device, models.dtype)
    sampler = replace(sampler, before_batch=signals.check, stops=inputs.stops)
    if settings.trainer == "BasicTrainer" and settings.sample_during_eval:
        sampler = sampler.fit(models.policy.model)
    return sampler


def open_logger(settings: Settings, run: RunDir) -> MetricLogger:
    """Open the run's log files and start its trackers; they are closed with the run directory."""
    logger = make_logger(run.path, run.ranks, lambda: make_tracker(settings, run), settings.minimum_log_interval_secs)
    run.open_files.callback(logger.close)
    return logger


def make_reference(
    settings: Settings, loss: Loss, inputs: Inputs, models: Models, run: RunDir, prepare: Prepare
) -> Reference | None:
    """Make the reference that the loss needs, if any."""
    if not loss.needs_reference:
        return None
    reference: Reference
    computed: ModelReference | AdapterReference | None = None
    if models.second is not None:
        computed = second_model_reference(settings, models, prepare)
    elif models.adapter is not None:
        computed = adapter_reference(inputs, models)
    if loss.cached_reference:
        models.second = None  # freed once the cache is computed
        own = None if models.reference_checksum is None else computed
        reference = cached_reference(settings, loss, inputs, models, run, own)
    else:
        assert computed is not None
        reference = computed
    reference.start_tolerance = max(reference.start_tolerance, start_tolerance(settings, models))
    return reference


def second_model_reference(settings: Settings, models: Models, prepare: Prepare) -> ModelReference:
    """Use a second model as the reference: frozen, or following the policy."""
    assert models.second is not None
    reference: ModelReference
    sampler = models.sampler
    if sampler.rows is not None and models.reference_checksum is not None:  # it may be another kind of model
        sampler = sampler.fit(models.second.model)
    if settings.sync_reference:
        every, mix = settings.sync_reference, settings.sync_mix
        reference = SyncedReference(models.second, models.policy, sampler, every, mix)
    else:
        is_mixed = models.policy.model.dtype != models.dtype  # then training computes under autocast
        dtype = models.dtype if is_mixed else models.second.model.dtype
        reference = ModelReference(models.second, dtype, sampler)
    reference.module = prepare(reference.module)
    if models.reference_checksum is None:
        TRAINERS[settings.trainer].copy_weights(models.policy, reference.module)
    return reference


def adapter_reference(inputs: Inputs, models: Models) -> AdapterReference:
    """Use the policy without its adapter, or with a frozen one, as the reference.

    UserError if both start from the same weights, but differ on a short example.
    """
    assert models.adapter is not None
    reference = AdapterReference(models.policy, models.adapter, models.sampler)
    log_message(f"Reference: {models.adapter.describe_reference()}; no second model is loaded.")
    if not models.starts_equal:
        return reference
    shortest = min(next(iter(inputs.eval_batches.from_start())).examples, key=len)
    batch = next(models.packer([shortest]))
    with torch.no_grad(), autocast(models.policy.model.dtype, models.dtype, inputs.device):
        models.policy.eval()
        check_first_margin(response_logps(models.policy, batch), reference.logps(batch), reference)
    return reference


def cached_reference(
    settings: Settings,
    loss: Loss,
    inputs: Inputs,
    models: Models,
    run: RunDir,
    computed: ModelReference | AdapterReference | None,
) -> CachedReference:
    """Compute a reference's log-probabilities before training, or read them from the file of an earlier run.

    computed is a reference of its own; None: the policy computes them.
    """
    train, test = inputs.train_batches, inputs.eval_batches
    samples = None
    if settings.sample_during_eval and not settings.dry_run:
        prompts = distinct_prompts(test, settings.n_eval_model_samples)
        if computed is None:
            samples = models.sampler.sample(models.policy.model, prompts, "sampling the reference")
        else:
            samples = computed.generate(prompts)
    cache = CachedReference(train.n_items + test.n_items, loss.n_responses, samples)
    if settings.dry_run:  # its losses mean nothing
        cache.sums.zero_()
        return cache
    path = None if settings.debug else run.path / "reference.pt"
    shared_folder = Path(local_dir(settings.local_dirs)) / "reference_cache"
    precomputation = Precomputation(
        models.policy,
        BatchSplitter(models.packer, run.ranks),
        models.dtype,
        train,
        test,
        n_microbatches=settings.gradient_accumulation_steps,
        compiled=models.compiled,
        reference=computed,
    )
    precomputation.run(cache, path, shared_folder)
    return cache


def start_tolerance(settings: Settings, models: Models) -> float:
    """How far policy and reference may differ before the first update, in nats per token on average."""
    if (
        settings.dry_run
        or not models.starts_equal
        or settings.model.reference_dtype not in (None, settings.model.policy_dtype)
    ):
        return math.inf
    return ROUNDED if models.compiled else 0.0  # compiled with and without gradients, a model may round differently


def resume_trainer(trainer: BasicTrainer, run: RunDir) -> None:
    """Load the run directory's checkpoint into the trainer, if there is one, and record the resume."""
    if run.checkpoint is not None:
        trainer.load_state_dict(run.checkpoint.states)
        run.checkpoint = replace(run.checkpoint, states={})  # frees tensors as large as the model
    elif run.resumed:
        trainer.logger.cut([])
    if run.resumed:
        run.record()


def make_tracker(settings: Settings, run: RunDir) -> Tracker:
    """Start the trackers of a run."""
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
    chosen = [name for name in settings.trackers if name != "wandb" or settings.wandb.enabled]
    return Trackers({name: makers[name] for name in chosen})
