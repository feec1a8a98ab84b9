"""Settings that are valid by themselves and cannot be honoured together."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpo.settings.config_files import written

Check = Callable[[str, Callable[..., Any], str], None]
WITHOUT_REFERENCE = ("sft", "simpo", "orpo", "cpo")  # losses; a test compares it with the losses themselves


def combination_problems(values: Mapping[str, Any], wrong_keys: Sequence[str]) -> list[str]:
    """Return one line per combination of settings, each valid by itself, that cannot be honoured."""
    valid = {key: value for key, value in values.items() if key not in wrong_keys}
    problems = []

    def check(keys: str, is_wrong: Callable[..., Any], words: str) -> None:
        names = keys.split()
        if all(name in valid for name in names) and is_wrong(*(valid[name] for name in names)):
            problems.append(f"{' '.join(f'{name}={written(valid[name])}' for name in names)}: {words}")

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
        lambda prompt, total: prompt >= total,
        "max_prompt_length must be below max_length, or no token is left for a response",
    )
    check("columns.score_chosen columns.score_rejected", lambda *both: both.count(None) == 1, "set both or neither")
    check("inspect_ids inspect", lambda ids, n: ids and not n, "nothing is printed without inspect=N; set it")
    check("dry_run inspect", lambda dry, n: dry and n, "each stops before training; set one of them alone")
    check("n_epochs n_examples", lambda *limits: limits == (None, None), "set one of them, or training never ends")
    for name in ("precision", "model.fsdp_policy_mp"):
        check(
            f"{name} model.policy_dtype",
            lambda precision, dtype: (precision, dtype) == ("float32", "bfloat16"),
            "computing in float32 needs model.policy_dtype=float32",
        )
    check_loss(check)
    problems += check_sync(valid)
    check_optimizer(check)
    check(
        "keep_policies keep_checkpoints",
        lambda policies, n: policies and n is None,
        "every checkpoint is kept anyway; set keep_checkpoints to a number, or keep_policies=false",
    )
    check("save_every debug", lambda n, debug: n and debug, "debug=true writes no checkpoints; set save_every=null")
    check("push_to_hub debug", lambda name, debug: name and debug, "debug=true exports nothing; set push_to_hub=null")
    check("model.archive", lambda path: path and not Path(path).is_file(), "no such file; give the path of a policy.pt")
    positions = max_positions(values.get("model.name_or_path"))
    check("max_length", lambda n: positions and n > positions, f"the model has {positions} positions; lower it")
    optional = [name for name in valid.get("trackers", ()) if name != "wandb" and not is_installed(name)]
    problems += [f"trackers: the library {name} is not installed; pip install {name}" for name in optional]
    if "lora.r" in values:
        problems += lora_problems(valid)
    parallel_problems(valid, check)
    return problems


def check_loss(check: Check) -> None:
    """Check what a loss's settings need of each other and of the run's."""
    check(
        "loss.precompute_reference model.reference_dtype",
        lambda precompute, dtype: precompute and dtype,
        "the policy itself computes the reference's log-probabilities, so model.reference_dtype must be null",
    )
    check(
        "loss.precompute_reference loss.reference_free",
        lambda precompute, free: precompute and free,
        "a loss without a reference has nothing to precompute; set one of them to false",
    )
    check(
        "loss.ld_alpha loss.precompute_reference",
        lambda alpha, precompute: alpha != 1 and precompute,
        "the cache holds no log-probabilities of tokens; set loss.precompute_reference=false",
    )
    check(
        "loss.ld_alpha loss.length_normalize",
        lambda alpha, normalize: alpha != 1 and normalize,
        "each is a correction for length; set one of them alone",
    )
    check(
        "loss.divergence loss.reference_free",
        lambda divergence, free: divergence != "reverse_kl" and free,
        "without a reference there is no divergence from it; set one of them alone",
    )
    check(
        "loss.name columns.score_chosen",
        lambda name, column: name == "odpo" and column is None,
        "ODPO reads a score of each response; set columns.score_chosen=NAME and columns.score_rejected=NAME",
    )
    words = "only loss=kto and loss=sft read a label; choose one of them, or set columns.label=null"
    check("loss.name columns.label", lambda name, column: name not in ("kto", "sft") and column is not None, words)
    words = "rows have one response and a label, or a chosen and a rejected response; set columns of one kind"
    for use in ("chosen", "rejected", "score_chosen"):
        check(f"columns.label columns.{use}", lambda *columns: None not in columns, words)
    check(
        "loss.name batch_size",
        lambda name, size: name == "kto" and size == 1,
        "KTO compares each prompt with another example's response, so batch_size must be 2 or more",
    )


def check_optimizer(check: Check) -> None:
    """Check what schedule, optimizer and a reference that follows the policy need."""
    words = "mixes nothing without sync_reference=N; set it"
    check("sync_mix sync_reference", lambda mix, n: mix != 1 and n is None, words)
    check(
        "scheduler min_lr_ratio",
        lambda name, ratio: name == "constant" and ratio,
        "a constant learning rate does not fall; choose linear, cosine or wsd, or set min_lr_ratio=0",
    )
    check(
        "optimizer model.policy_dtype",
        lambda name, dtype: name == "Muon" and dtype == "bfloat16",
        "Muon's steps cannot be rounded stochastically; use model.policy_dtype=float32",
    )


def check_sync(values: Mapping[str, Any]) -> list[str]:
    """Return a line for each reason why the reference cannot follow the policy."""
    n, reasons = values.get("sync_reference"), []
    if n is None:
        return []
    if values.get("loss.reference_free") or values.get("loss.name") in WITHOUT_REFERENCE:
        reasons.append("the loss has no reference; set sync_reference=null")
    if values.get("loss.precompute_reference"):
        reasons.append("a reference that is computed once cannot follow; set loss.precompute_reference=false")
    if values.get("model.reference_dtype"):
        reasons.append("the reference keeps the policy's dtype; set model.reference_dtype=null")
    if values.get("model.policy_dtype") == "bfloat16" and values.get("sync_mix") != 1:
        reasons.append("bfloat16 loses a mix of weights; set sync_mix=1 or model.policy_dtype=float32")
    return [f"sync_reference={written(n)}: {reason}" for reason in reasons]


def lora_problems(valid: Mapping[str, Any]) -> list[str]:
    """Return one line for each reason why an adapter cannot be trained with these settings."""
    quantized = valid.get("lora.quantize") is not None
    path = valid.get("lora.path")
    own_weights = [key for key in ("model.archive", "model.from_scratch") if valid.get(key)]
    found = {
        "lora=default: needs the library peft; pip install peft": not is_installed("peft"),
        "sync_reference: the reference of an adapter is frozen, so it must be null": valid.get("sync_reference"),
        "model.reference_dtype: the policy with its adapter off is the reference, so it must be null": valid.get(
            "model.reference_dtype"
        ),
        "lora.use_dora=true: needs model.policy_dtype=float32, or the first update's margin would not be 0": valid.get(
            "lora.use_dora"
        )
        and valid.get("model.policy_dtype") != "float32",
        f"lora.path={path}: there is no adapter_config.json in it; give the folder of an adapter": path is not None
        and not (Path(str(path)) / "adapter_config.json").is_file(),
        "lora.path lora.init: a given adapter is not initialized; leave lora.init out": path is not None
        and valid.get("lora.init") != "kaiming",
        "lora.quantize=nf4: needs the library bitsandbytes; pip install bitsandbytes": quantized
        and not is_installed("bitsandbytes"),
        "lora.quantize=nf4: has no kernels for MPS; use device=cuda or device=cpu": quantized
        and valid.get("device") == "mps",
        "lora.quantize=nf4 lora.use_dora=true: are not computed together; set one of them to its default": quantized
        and valid.get("lora.use_dora"),
        f"lora.quantize=nf4 {' '.join(own_weights)}: only weights of model.name_or_path can be quantized": quantized
        and own_weights,
        "lora.quantize=nf4 lora.export_merged=true: an adapter cannot be merged into weights of 4 bits": quantized
        and valid.get("lora.export_merged"),
        "push_to_hub: this machine alone has the adapter's base, whose path would be uploaded; set it to null": bool(
            valid.get("push_to_hub")
        )
        and (own_weights or Path(str(valid.get("model.name_or_path"))).is_dir()),
    }
    return [line for line, is_wrong in found.items() if is_wrong]


def is_installed(library: str) -> bool:
    """Return whether a library can be imported, without importing it."""
    return find_spec(library) is not None


# The values of settings for several processes that mean one process.
SINGLE = {
    "n_processes": ("auto", 1),
    "replicate": (1,),
    "tensor_parallel": ("auto",),
    "ddp": (False,),
    "reduce_every_pass": (False,),
}


def parallel_problems(valid: Mapping[str, Any], check: Check) -> None:
    """Check the settings of several processes, and the processes that torchrun has started."""
    launched = os.environ.get("WORLD_SIZE") or "1"
    if valid.get("trainer") == "BasicTrainer":
        for key, default in SINGLE.items():
            name = "TensorParallelTrainer" if key == "tensor_parallel" else "FSDPTrainer"
            words = f"is for several processes; set trainer={name}"
            check(f"{key} trainer", lambda value, _, default=default: value not in default, words)
        words = "set trainer=FSDPTrainer, which shares one model, or start without torchrun"
        check("trainer", lambda _: launched != "1", f"is for one process, and torchrun has started {launched}; {words}")
        return
    trainer = valid.get("trainer")
    words = "is for trainer=TensorParallelTrainer; set it to auto"
    check("tensor_parallel", lambda n: n != "auto" and trainer == "FSDPTrainer", words)
    words = "trainer=TensorParallelTrainer splits every layer; set it to false"
    check("ddp", lambda ddp: ddp and trainer == "TensorParallelTrainer", words)
    words = "with ddp=true every device holds the whole model; set replicate=1"
    check("ddp replicate", lambda ddp, copies: ddp and copies > 1, words)
    words = "with ddp=true whole gradients are kept anyway; set reduce_every_pass=false"
    check("ddp reduce_every_pass", lambda ddp, reduce: ddp and reduce, words)
    check("compile", lambda on: on, f"trainer={trainer} cannot compile its layers yet; set it to false")
    words = f"trainer={trainer} shards matrices, of which this optimizer needs whole ones or blocks; choose another one"
    check("optimizer", lambda name: name in ("Muon", "AdamW8bit"), words)
    words = f"trainer={trainer} keeps the reference sharded apart from the policy, so it must be null"
    check("sync_reference", lambda n: n is not None, words)
    words = "trainer=TensorParallelTrainer cannot split the layers of an adapter; set trainer=FSDPTrainer"
    check("lora.r", lambda r: r is not None and trainer == "TensorParallelTrainer", words)
    words = f"trainer={trainer} shards matrices, of which quantized layers have blocks; set it to null"
    check("lora.quantize", lambda how: how is not None, words)
    words = f"trainer={trainer} cannot round sharded parameters stochastically yet; set it to float32"
    check("model.policy_dtype", lambda dtype: dtype == "bfloat16" and valid.get("lora.r") is None, words)
    words = "is measured on one device; give a number of tokens, or auto"
    check("max_tokens_per_pass trainer", lambda tokens, _: tokens == "fit", words)
    words = f"trainer={trainer} gives every process a GPU of its own, or the CPU; set it to auto, cuda or cpu"
    check("device", lambda name: name not in ("auto", "cuda", "cpu"), words)
    if launched != "1":
        check("dry_run", lambda dry: dry, "one process computes what N take; start it without torchrun, n_processes=N")
        words = f"torchrun has started {launched} processes; set it to auto"
        check("n_processes", lambda n: str(n) not in ("auto", launched), words)
    n = int(launched) if launched.isdigit() and launched != "1" else valid.get("n_processes")
    if isinstance(n, int):
        tensor = valid.get("tensor_parallel") if trainer == "TensorParallelTrainer" else 1
        groups = max(1, n // tensor) if isinstance(tensor, int) else 1
        who = f"{n} processes" if groups == n else f"{groups} groups of processes"
        words = f"each of {who} needs an example of every batch; set it to {groups} or more"
        check("batch_size", lambda size: size < groups, words)
        check("replicate", lambda copies: n % copies, f"must divide the number of processes, {n}")


def max_positions(model: Any) -> int | None:
    """Return the number of positions that a local model's config.json gives, or None if it is not known."""
    try:
        config = json.loads((Path(model) / "config.json").read_bytes())
        config = config.get("text_config", config)
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        return next((config[name] for name in names if isinstance(config.get(name), int)), None)
    except (OSError, TypeError, ValueError, AttributeError):  # a hub's name, or what transformers will refuse
        return None
