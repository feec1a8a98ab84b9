"""The command line: python train.py loss=dpo model=gpt2. Checks every setting, loads data and models, and trains."""

import copy
import difflib
import hashlib
import json
import math
import os
import random
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from checkpoints import DROPPABLE, clear_leftovers, flush, load_archive, load_weights, newest_checkpoint
from losses import LOSSES
from packing import LAYOUTS
from preference_datasets import DATASETS, BatchIterator, PreferenceData, Tokenization, get_dataset, make_groups
from utils import (
    EXIT_CODES,
    MetricLogger,
    ProcessSignals,
    RunError,
    Stopped,
    Tracker,
    UserError,
    WandbTracker,
    answers,
    compute_dtype,
    first_line,
    keep_few_kernels,
    lacks_memory,
    local_run_dir,
    make_run_dir,
    only_writer,
    pick_device,
    say,
    slug,
)

PROJECT = Path(__file__).resolve().parent
OPTIMIZERS = ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "SGD")

# What each setting must be: (test, words for the message).

Rule = tuple[Callable[[Any], bool], str]


def is_number(value: Any) -> bool:
    """Tell a finite number from anything else, truth values included."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def whole(low: int, unit: str, high: int | None = None) -> Rule:
    """Ask for a whole number from low to high."""
    words = f"a whole number of {unit}, {low} or more" if high is None else f"a whole number from {low} to {high}"
    return (lambda v: is_number(v) and isinstance(v, int) and low <= v <= (v if high is None else high)), words


def number(test: Callable[[float], bool], words: str) -> Rule:
    """Ask for a number that passes a test."""
    return (lambda v: is_number(v) and test(v)), words


def one_of(*names: str) -> Rule:
    """Ask for one of some names."""
    return (lambda v: isinstance(v, str) and v in names), "one of " + ", ".join(names)


def optional(rule: Rule) -> Rule:
    """Allow null too."""
    return (lambda v: v is None or rule[0](v)), rule[1] + ", or null"


TEXT: Rule = (lambda v: isinstance(v, str) and bool(v.strip()), "a name")
FLAG: Rule = (lambda v: isinstance(v, bool), "true or false")
TEXTS: Rule = (lambda v: isinstance(v, list) and bool(v) and all(map(TEXT[0], v)), "a list, as in [hh] or [hh,shp]")
POSITIVE = number(lambda v: v > 0, "a number above 0")
NOT_NEGATIVE = number(lambda v: v >= 0, "a number, 0 or more")

RULES: dict[str, Rule] = {
    "seed": whole(0, "", high=2**32 - 1),
    "exp_name": (lambda v: isinstance(v, str) and bool(re.fullmatch(r"[\w][\w.+=-]*", v)), "a name without slashes"),
    "local_dirs": TEXTS,
    "local_run_dir": TEXT,
    "resume": (lambda v: v is None, "given without Hydra's flags: python train.py resume=RUN_DIR"),
    "debug": FLAG,
    "wandb.enabled": FLAG,
    "wandb.entity": optional(TEXT),
    "wandb.project": TEXT,
    "datasets": TEXTS,
    "max_length": whole(2, "tokens"),
    "max_prompt_length": whole(1, "tokens"),
    "n_epochs": optional(whole(1, "epochs")),
    "n_examples": optional(whole(1, "examples")),
    "trainer": one_of("BasicTrainer", "FSDPTrainer", "TensorParallelTrainer"),
    "device": one_of("auto", "cuda", "mps", "cpu"),
    "precision": one_of("auto", "float32", "bfloat16"),
    "layout": one_of(*LAYOUTS),
    "max_tokens_per_pass": (lambda v: v == "auto" or whole(1, "")[0](v), "auto, or a whole number of tokens"),
    "batch_size": whole(1, "examples"),
    "gradient_accumulation_steps": whole(1, "parts"),
    "lr": POSITIVE,
    "warmup_steps": whole(0, "updates"),
    "max_grad_norm": POSITIVE,
    "optimizer": one_of(*OPTIMIZERS),
    "activation_checkpointing": FLAG,
    "compile": FLAG,
    "fsdp_port": optional(whole(1, "", high=65535)),
    "eval_every": whole(1, "examples"),
    "save_every": optional(whole(1, "examples")),
    "keep_checkpoints": optional(whole(1, "checkpoints")),
    "keep_policies": FLAG,
    "do_first_eval": FLAG,
    "eval_batch_size": whole(1, "examples"),
    "n_eval_examples": whole(1, "examples"),
    "sample_during_eval": FLAG,
    "n_eval_model_samples": whole(1, "prompts"),
    "sample_temperature": POSITIVE,
    "sample_top_k": whole(0, "tokens"),
    "sample_top_p": number(lambda v: 0 < v <= 1, "a number above 0, at most 1"),
    "minimum_log_interval_secs": NOT_NEGATIVE,
    "model.name_or_path": (TEXT[0], "a local folder or a name on the hub; or choose one of config/model/: model=gpt2"),
    "model.tokenizer_name_or_path": optional(TEXT),
    "model.archive": optional(TEXT),
    "model.from_scratch": FLAG,
    "model.block_name": optional(TEXT),
    "model.policy_dtype": one_of("float32", "bfloat16"),
    "model.fsdp_policy_mp": optional(one_of("float32", "bfloat16")),
    "model.reference_dtype": optional(one_of("float32", "bfloat16", "float16")),
    "model.add_bos": FLAG,
    "loss.name": one_of(*LOSSES),
    "loss.beta": POSITIVE,
    "loss.label_smoothing": number(lambda v: 0 <= v < 0.5, "a number from 0, below 0.5"),
    "loss.reference_free": FLAG,
    "loss.average_log_prob": FLAG,
    "loss.precompute_reference": FLAG,
}


def flat_settings(config: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Return {dotted key: value}; a value that is missing or cannot be interpolated becomes its exception."""
    settings: dict[str, Any] = {}
    for key in config:
        try:
            value = config[key]
        except OmegaConfBaseException as error:
            value = error
        if isinstance(value, DictConfig):
            settings |= flat_settings(value, f"{prefix}{key}.")
        else:
            settings[f"{prefix}{key}"] = OmegaConf.to_container(value) if isinstance(value, ListConfig) else value
    return settings


def setting_problems(settings: dict[str, Any]) -> list[str]:
    """Return one line for each setting that is missing, unknown, of the wrong type, or out of range."""
    problems = []
    for key, value in settings.items():
        if key not in RULES:
            problems.append(unknown(key))
        elif isinstance(value, OmegaConfBaseException):
            if "name_or_path" not in str(value) or key == "model.name_or_path":  # else this line has a cause above it
                problems.append(f"{key}: is missing; set {key}=VALUE, {RULES[key][1]}")
        elif not RULES[key][0](value):
            problems.append(f"{key}={'null' if value is None else value}: must be {RULES[key][1]}")
    return problems


def combination_problems(settings: dict[str, Any]) -> list[str]:
    """Return one line for each combination of settings, each well-formed by itself, that cannot be honoured."""
    known = {k: v for k, v in settings.items() if k in RULES and RULES[k][0](v)}
    problems = []

    def check(keys: str, wrong: Callable[..., bool], words: str) -> None:
        names = keys.split()
        if all(name in known for name in names) and wrong(*(known[name] for name in names)):
            values = " ".join(f"{name}={'null' if known[name] is None else known[name]}" for name in names)
            problems.append(f"{values}: {words}")

    check(
        "compile activation_checkpointing",
        lambda compiled, recomputed: compiled and recomputed,
        "layers that are recomputed in the backward pass cannot be compiled; set one of the two to false",
    )
    check(
        "batch_size gradient_accumulation_steps",
        lambda size, parts: size % parts,
        "batch_size must be divisible by gradient_accumulation_steps",
    )
    check(
        "max_prompt_length max_length",
        lambda prompt, whole: prompt >= whole,
        "max_prompt_length must be below max_length, or no token is left for a response",
    )
    check("n_epochs n_examples", lambda *limits: limits == (None, None), "set one of them, or training never ends")
    check("trainer", lambda v: v != "BasicTrainer", "is not built yet; use trainer=BasicTrainer")
    check("fsdp_port trainer", lambda port, v: port and v == "BasicTrainer", "fsdp_port needs trainer=FSDPTrainer")
    for name in ("precision", "model.fsdp_policy_mp"):
        check(
            f"{name} model.policy_dtype",
            lambda precision, dtype: (precision, dtype) == ("float32", "bfloat16"),
            "computing in float32 needs model.policy_dtype=float32",
        )
    check(
        "loss.precompute_reference model.reference_dtype",
        lambda precompute, dtype: precompute and dtype,
        "the policy itself computes the reference's numbers, so model.reference_dtype must be null",
    )
    check(
        "loss.precompute_reference loss.reference_free",
        lambda precompute, free: precompute and free,
        "a loss without a reference has nothing to compute; set one of them to false",
    )
    check(
        "keep_policies keep_checkpoints",
        lambda policies, n: policies and n is None,
        "every checkpoint is kept anyway; set keep_checkpoints to a number, or keep_policies=false",
    )
    check("save_every debug", lambda n, debug: n and debug, "debug=true writes no checkpoints; set save_every=null")
    check("model.archive", lambda path: path and not Path(path).is_file(), "no such file; give the path of a policy.pt")
    return problems


def model_problems(settings: dict[str, Any], model_config: Any, tokenizer: Any) -> list[str]:
    """Return one line for each way in which the settings, the model and the tokenizer do not fit together."""
    problems = []
    text_config = model_config.get_text_config()
    positions = max_positions(text_config)
    max_length, name = settings["max_length"], settings["model.name_or_path"]
    if positions and RULES["max_length"][0](max_length) and max_length > positions:
        problems.append(f"max_length={max_length}: {name} has {positions} positions; lower it")
    if len(tokenizer) > text_config.vocab_size:
        words = f"has {len(tokenizer)} tokens, but {name} has {text_config.vocab_size} embeddings"
        problems.append(f"model.tokenizer_name_or_path: the tokenizer {words}; choose the model's own")
    if tokenizer.eos_token_id is None:
        problems.append("model.tokenizer_name_or_path: the tokenizer has no eos token, which ends a response")
    if settings["model.add_bos"] is True and tokenizer.bos_token_id is None:
        problems.append("model.add_bos=true: the tokenizer has no bos token; set it to false")
    return problems


def max_positions(text_config: Any) -> int | None:
    """Return how many positions a model has, or None where there is no such limit."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    return next(
        (getattr(text_config, name) for name in names if isinstance(getattr(text_config, name, None), int)), None
    )


# Loading


def skip_dead_hub(settings: dict[str, Any]) -> None:
    """Use what is cached, without the hub client's minutes of retries, if a hub is needed and does not answer."""
    models = [settings["model.name_or_path"], settings["model.tokenizer_name_or_path"]]
    datasets = settings["datasets"] if TEXTS[0](settings["datasets"]) else []
    remote = [name for name in models if isinstance(name, str) and not os.path.isdir(name)]
    remote += [name for name in datasets if name in DATASETS and name != "demo"]
    from huggingface_hub import constants

    if remote and not constants.HF_HUB_OFFLINE and not answers(constants.ENDPOINT):
        say("The hub does not answer: looking only for what is on this machine.")
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are imported later


def fetch(what: str, name: str, load: Callable[[], Any]) -> Any:
    """Call load; UserError in one line that names what could not be fetched and says what helps."""
    try:
        return load()
    except Exception as error:  # a damaged or foreign folder makes transformers raise nearly anything
        if lacks_memory(error):
            raise
        reason = first_line(error)
        advice = "give the path of a local folder, or try `make demo`, which needs no download"
        raise UserError(f"{what}={name}: cannot be loaded ({reason}); {advice}") from None


def load_model_config(settings: dict[str, Any]) -> tuple[Any, Any]:
    """Load the model's config, with dropout off, and the tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    name = settings["model.name_or_path"]
    tokenizer_name = settings["model.tokenizer_name_or_path"] or name
    model_config = fetch("model.name_or_path", name, lambda: AutoConfig.from_pretrained(name, trust_remote_code=False))
    load = lambda: AutoTokenizer.from_pretrained(tokenizer_name, trust_remote_code=False)  # noqa: E731
    tokenizer = fetch("model.tokenizer_name_or_path", tokenizer_name, load)
    for part in {id(part): part for part in (model_config, model_config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    return model_config, tokenizer


def load_policy(config: DictConfig, model_config: Any, device: torch.device) -> Any:
    """Load the policy with dropout off; UserError if a tensor of the model is missing or does not fit."""
    from transformers import AutoModelForCausalLM

    dtype, name = getattr(torch, config.model.policy_dtype), config.model.name_or_path
    if config.model.from_scratch:
        torch.manual_seed(config.seed)
        policy = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    else:
        load = lambda: AutoModelForCausalLM.from_pretrained(  # noqa: E731
            name,
            config=model_config,
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that they are in the info, by name
            trust_remote_code=False,
        )
        policy, info = fetch("model.name_or_path", name, load)
        info["unexpected_keys"] = [name for name in info["unexpected_keys"] if not DROPPABLE.search(name)]
        wrong = [f"{kind.removesuffix('_keys')} {sorted(map(str, info[kind]))}" for kind in info if info[kind]]
        if wrong:
            raise UserError(f"model.name_or_path={name}: its weights do not fit its config: {'; '.join(wrong)}")
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if config.model.archive:
        load_weights(policy, load_archive(config.model.archive), f"model.archive={config.model.archive}")
    return policy.to(device)


def make_reference(config: DictConfig, policy: Any) -> Any:
    """Copy the policy as it is before training."""
    reference = copy.deepcopy(policy).eval().requires_grad_(False)
    dtype = config.model.reference_dtype
    for parameter in reference.parameters() if dtype else ():  # buffers such as rotary frequencies stay in float32
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return reference


def load_data(settings: dict[str, Any], split: str) -> dict[str, PreferenceData]:
    """Load one split of each data set."""
    return {name: get_dataset(name, split) for name in dict.fromkeys(settings["datasets"])}


def make_batches(
    config: DictConfig, tokenizer: Any, train: dict[str, PreferenceData], test: dict[str, PreferenceData]
) -> tuple[BatchIterator, BatchIterator]:
    """Make the iterators of training and of evaluation, whose order does not depend on config.seed."""
    tokenize = Tokenization(tokenizer, config.max_length, config.max_prompt_length, config.model.add_bos)
    sft = LOSSES[config.loss.name](config.loss).n_responses == 1

    def groups(split: dict[str, PreferenceData]) -> list[Any]:
        return [g for name, data in split.items() for g in make_groups(data, name, sft, tokenizer.eos_token)]

    limits = {"n_epochs": config.n_epochs, "n_examples": config.n_examples}
    train_batches = BatchIterator(groups(train), tokenize, config.batch_size, config.seed, **limits)
    eval_batches = BatchIterator(groups(test), tokenize, config.eval_batch_size, 0, 1, config.n_eval_examples, True)
    return train_batches, eval_batches


def report_data(split: str, data: dict[str, PreferenceData]) -> None:
    """Print what was read, kept and dropped."""
    for name, part in data.items():
        kept = part.counts["kept"]
        notes = [f"{n:,} {what}" for what, n in part.counts.items() if n and what not in ("read", "kept")]
        head = f"Data {name} {split}: {part.counts['read']:,} rows read, {kept:,} kept, {len(part):,} prompts"
        say("; ".join([head, *notes]))


def data_problems(config: DictConfig, train_batches: BatchIterator, eval_batches: BatchIterator) -> list[str]:
    """Return one line for each way in which there is too little data."""
    problems, n = [], train_batches.n_items
    if n < config.batch_size:
        remedy = f"lower it to {n} or less" if n else "give it some"
        problems.append(f"batch_size={config.batch_size}: the training data holds {n} examples; {remedy}")
    elif len(train_batches) == 0:
        problems.append("n_epochs, n_examples: no update would be made; raise them")
    if eval_batches.n_items == 0:
        problems.append("datasets: there is no example to evaluate on; add a test.jsonl with at least one")
    return problems


def refuse(problems: list[str]) -> None:
    """Raise one UserError that holds all problems, one line each."""
    if problems:
        raise UserError("\n".join(problems))


# The run


def run(config: DictConfig, resumed: Path | None = None, overrides: dict[str, Any] | None = None) -> None:
    """Check everything, make the run directory or go on in the one resumed, load the models, and train."""
    with ExitStack() as stack:
        checkpoint = None if resumed is None else reopen(resumed, stack)
        signals = stack.enter_context(ProcessSignals().installed())
        if not sys.stderr.isatty():
            from transformers.utils import logging  # slow to import, as are the trainers

            logging.disable_progress_bar()
        config, device, model_config, tokenizer, batches = prepare(config)
        if checkpoint is not None and is_complete(*checkpoint, len(batches[0])):
            say(f"{resumed}: the run is complete; set n_epochs or n_examples higher to go on.")
            return
        keep_few_kernels()
        policy, reference = load_models(config, model_config, device)
        run_dir = resumed or make_run_dir(config.local_run_dir)
        if resumed is None:
            stack.enter_context(only_writer(run_dir))
            record(config, run_dir)
        say(f"\n{OmegaConf.to_yaml(config)}\nRun directory: {run_dir}")
        logger = MetricLogger(run_dir, make_tracker(config, run_dir), config.minimum_log_interval_secs)
        stack.callback(logger.close)
        from trainers import BasicTrainer

        parts = {"tokenizer": tokenizer, "train_batches": batches[0], "eval_batches": batches[1], "logger": logger}
        parts |= {"signals": signals, "identity": {"the settings": settings_fingerprint(config)}}
        trainer = BasicTrainer(policy, config, config.seed, run_dir, reference, **parts)
        if checkpoint is not None:
            folder, states = checkpoint
            trainer.restore(states)
            checkpoint = states = None  # its tensors, which may be as large as the model, are needed no more
            record(config, run_dir, {"from": folder.name, "overrides": overrides})
        elif resumed is not None:
            logger.cut([0, 0])
            record(config, run_dir, {"from": None, "overrides": overrides})
        try:
            trainer.train()
        except (Stopped, KeyboardInterrupt):
            say(f"To go on: python train.py resume={shlex.quote(str(run_dir))}")
            raise
    say(f"Done: {trainer.examples:,} examples in {trainer.updates:,} updates. Everything is in {run_dir}")


def reopen(run_dir: Path, stack: ExitStack) -> tuple[Path, dict[str, Any]] | None:
    """Hold a run's directory, clear what a killed process left there, and return its newest checkpoint and states."""
    stack.enter_context(only_writer(run_dir))
    clear_leftovers(run_dir)
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None:
        say(f"{run_dir} holds no checkpoint yet, so the run begins again.")
    return checkpoint


def load_models(config: DictConfig, model_config: Any, device: torch.device) -> tuple[Any, Any]:
    """Load the policy and, where the loss needs a second model, its copy; seed all random generators."""
    dtype = compute_dtype(config.precision, getattr(torch, config.model.policy_dtype), device)
    say(f"Device: {device}. Computing in {dtype}, parameters and optimizer in {config.model.policy_dtype}.")
    if device.type == "cuda" and dtype == torch.float32:
        torch.set_float32_matmul_precision("high")  # TF32
    random.seed(config.seed)
    np.random.seed(config.seed)
    policy = load_policy(config, model_config, device)
    live = LOSSES[config.loss.name](config.loss).needs_reference and not config.loss.precompute_reference
    reference = make_reference(config, policy) if live else None
    torch.manual_seed(config.seed)
    return policy, reference


def prepare(config: DictConfig) -> tuple[DictConfig, torch.device, Any, Any, tuple[BatchIterator, BatchIterator]]:
    """Check the config against itself, the model and the data, all problems in one UserError; return what it loaded."""
    settings = flat_settings(config)
    missing = [key for key in RULES if key not in settings and (not key.startswith("loss.") or key == "loss.name")]
    remedy = (
        "a file in config/model/ begins with `defaults: [blank_model]`, and a run's config.yaml holds every setting"
    )
    refuse([f"{key}: is missing; {remedy}" for key in missing])
    problems = setting_problems(settings) + combination_problems(settings)
    device = model_config = tokenizer = None
    if RULES["device"][0](settings["device"]):
        try:
            device = pick_device(settings["device"])
        except UserError as error:
            problems.append(str(error))
    if TEXT[0](settings["model.name_or_path"]):
        skip_dead_hub(settings)
        try:
            model_config, tokenizer = load_model_config(settings)
            problems += model_problems(settings, model_config, tokenizer)
        except UserError as error:
            problems.append(str(error))
    refuse(problems)

    config = config.copy()
    config.precision = config.model.fsdp_policy_mp or config.precision
    for key in ("exp_name", "local_run_dir"):  # the time stamp is taken once; other interpolations stay as they are
        config[key] = settings[key]
    train, test = (load_data(settings, split) for split in ("train", "test"))
    batches = make_batches(config, tokenizer, train, test)
    report_data("train", train)
    report_data("test", test)
    left = batches[0].n_items - batches[0].batches_per_epoch * config.batch_size
    if left and batches[0].batches_per_epoch:
        say(f"The last {left:,} of an epoch's {batches[0].n_items:,} examples fill no batch and are left out.")
    refuse(data_problems(config, *batches))
    return config, device, model_config, tokenizer, batches


# Resuming

# What may change in a resumed run: it touches no trained number, but for the rounding of the last two settings.
MAY_CHANGE = (
    *("wandb.enabled", "wandb.entity", "wandb.project", "minimum_log_interval_secs"),
    *("sample_during_eval", "n_eval_model_samples", "sample_temperature", "sample_top_k", "sample_top_p"),
    *("save_every", "keep_checkpoints", "keep_policies", "eval_batch_size"),
    *("max_tokens_per_pass", "activation_checkpointing"),
)
MAY_GROW = ("n_epochs", "n_examples")


def resume(arguments: list[str]) -> None:
    """Go on with the run that resume=RUN_DIR names, with its own settings; UserError for any other that matters."""
    paths = [a.removeprefix("resume=") for a in arguments if a.startswith("resume=")]
    run_dir = Path(re.sub(r"""^(['"])(.*)\1$""", r"\2", paths[-1]))
    config = load_run_config(run_dir)
    settings = flat_settings(config)
    try:
        others = OverridesParser.create().parse_overrides([a for a in arguments if not a.startswith("resume=")])
        given = [(override, override.key_or_group, override.value()) for override in others]
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from None
    problems, taken = [], {}
    for override, key, value in given:
        if value == settings.get(key, settings.get(f"{key}.name", override)):  # loss=dpo, as the run has it
            continue
        if key not in settings and key not in ("model", "loss"):
            problems.append(unknown(key))
        elif override.type != OverrideType.CHANGE or override.is_sweep_override():
            problems.append(f"{override.input_line}: a resumed run takes KEY=VALUE alone")
        elif key in MAY_CHANGE or (key in MAY_GROW and grows(settings[key], value)):
            OmegaConf.update(config, key, value)
            taken[key] = value
        else:
            own = f"{key}={settings[key]}" if key in settings else f"its own {key}"
            words = f"{key}={'null' if value is None else value}"
            problems.append(f"{words}: a resumed run keeps {own}; leave this out, or start a new run")
    refuse(problems)
    config.local_run_dir = str(run_dir)
    run(config, run_dir, taken)


def load_run_config(run_dir: Path) -> DictConfig:
    """Load a run's settings; UserError if the folder is none that a run makes."""
    try:
        own = ("LATEST", ".staging-LATEST")
        links = [path.name for path in run_dir.iterdir() if path.is_symlink() and path.name not in own]
        config = OmegaConf.load(run_dir / "config.yaml")
        flat_settings(config)
    except (OSError, YAMLError, OmegaConfBaseException, AttributeError, TypeError, ValueError, RecursionError) as error:
        reason = first_line(error)
        raise UserError(f"resume={run_dir}: is no run directory: its config.yaml cannot be read ({reason})") from None
    if links:
        raise UserError(f"resume={run_dir}: holds links ({', '.join(sorted(links))}), which no run makes; remove them")
    return config


def settings_fingerprint(config: DictConfig) -> str:
    """Return a SHA-256 of the settings that may not change; what lies behind a path is compared by its content."""
    free = ("exp_name", "local_dirs", "local_run_dir", "datasets", "model.archive", "model.name_or_path")
    free += ("model.tokenizer_name_or_path", *MAY_CHANGE, *MAY_GROW)
    kept = {key: value for key, value in flat_settings(config).items() if key not in free}
    return hashlib.sha256(repr(sorted(kept.items())).encode()).hexdigest()


def grows(old: int | None, new: Any) -> bool:
    """Tell whether a limit is raised, or lifted."""
    return is_number(old) and (new is None or (is_number(new) and new > old))


def is_complete(folder: Path, states: dict[str, Any], n_updates: int) -> bool:
    """Tell whether a checkpoint ends a run: no update is left, and the export was written, which comes last."""
    try:
        whole = (folder / "hf").is_dir() and not (folder / "hf").is_symlink()
        return whole and states["run"]["counters"]["updates"] >= n_updates
    except (KeyError, TypeError):  # a forged one, which is told when its states are taken over
        return False


def record(config: DictConfig, run_dir: Path, resumed: dict[str, Any] | None = None) -> None:
    """Write the settings to the run's directory, and a line for each time that it was resumed."""
    staging = run_dir / ".staging-config.yaml"
    OmegaConf.save(config, staging)
    flush(staging)
    os.replace(staging, run_dir / "config.yaml")
    if resumed is not None:
        line = {"time": f"{datetime.now():%Y-%m-%d %H:%M:%S}"} | resumed
        with open(run_dir / "resumed.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


# The run's surroundings


def make_tracker(config: DictConfig, run_dir: Path) -> Tracker:
    """Start wandb unless it is switched off."""
    if config.debug or not config.wandb.enabled:
        return Tracker()
    settings = {"entity": config.wandb.entity, "project": config.wandb.project, "name": config.exp_name}
    return WandbTracker(run_dir, settings | {"config": OmegaConf.to_container(config, resolve=False)})


def register_resolvers() -> None:
    """Teach OmegaConf what the defaults in config/ are made of."""
    resolvers = {"slug": slug, "local_run_dir": local_run_dir, "project_dir": lambda path: str(PROJECT / path)}
    for name, function in resolvers.items():
        OmegaConf.register_new_resolver(name, function, use_cache=name == "local_run_dir", replace=True)


def check_overrides(overrides: list[str]) -> None:
    """Compose the config once before Hydra does, to tell a mistyped key or group in one line."""
    try:
        with hydra.initialize_config_dir(str(PROJECT / "config"), version_base=None):
            hydra.compose("config", overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from None


def explain(error: Exception) -> str:
    """Say in one line what is wrong with an override, and name the nearest key."""
    text = " ".join(str(error).split())
    if key := re.match(r"Could not override '([^']*)'", text):
        return unknown(key[1])
    if group := re.match(
        r"In '[^']*': Could not find '([^/']*)/([^']*)' Available options in '[^']*': (.*?) Config", text
    ):
        return f"{group[1]}={group[2]}: there is no such file in config/{group[1]}/; choose one of {group[3]}"
    return text


def unknown(key: str) -> str:
    """Say that a key does not exist, and which comes nearest."""
    if key in RULES:
        return f"{key}: the chosen loss has no such setting"
    near = difflib.get_close_matches(key, ["model", "loss", *RULES], n=1, cutoff=0.5)
    return f"{key}: there is no such setting" + (f"; did you mean {near[0]}?" if near else "")


@hydra.main(version_base=None, config_path="config", config_name="config")
def hydra_main(config: DictConfig) -> None:
    """Run with a composed config."""
    guarded(lambda: run(config))


def guarded(work: Callable[[], None]) -> None:
    """Do the work; print what stops it, one line a problem and no traceback, and exit with the code that says why."""
    try:
        work()
    except UserError as error:
        sys.exit(tell(error, EXIT_CODES["refused"]))
    except RunError as error:
        sys.exit(tell(error, error.exit_code))
    except (OSError, RuntimeError, MemoryError) as error:
        reason = first_line(error)
        if lacks_memory(error):
            remedy = "a smaller model, or model.policy_dtype=bfloat16, needs less"
            sys.exit(tell(f"out of memory before the first pass ({reason}); {remedy}", EXIT_CODES["memory"]))
        if not isinstance(error, OSError):
            raise
        told = f"a file cannot be read or written ({reason}); earlier checkpoints are intact"
        sys.exit(tell(told, EXIT_CODES["disk"]))
    except Stopped as error:
        say(f"Stopped by {error}.")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        say("Interrupted.")
        sys.exit(EXIT_CODES["SIGINT"])


def tell(problem: object, exit_code: int) -> int:
    """Print a problem, one line for each, and return the exit code."""
    for line in str(problem).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return exit_code


def main() -> None:
    """Run the command line; Hydra's own flags (--help, --multirun, --cfg) work as ever."""
    register_resolvers()
    arguments = sys.argv[1:]
    if any(re.match(r"resume=(?!null$)", argument) for argument in arguments):
        guarded(lambda: resume(arguments))
        return
    if not any(argument.startswith("-") for argument in arguments):
        guarded(lambda: check_overrides(arguments))
    hydra_main()


if __name__ == "__main__":
    main()
