"""Settings that are valid by themselves and cannot be honoured together."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo.suggestions import written


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
    check("n_epochs n_examples", lambda *limits: limits == (None, None), "set one of them, or training never ends")
    for name in ("precision", "model.fsdp_policy_mp"):
        check(
            f"{name} model.policy_dtype",
            lambda precision, dtype: (precision, dtype) == ("float32", "bfloat16"),
            "computing in float32 needs model.policy_dtype=float32",
        )
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
        "keep_policies keep_checkpoints",
        lambda policies, n: policies and n is None,
        "every checkpoint is kept anyway; set keep_checkpoints to a number, or keep_policies=false",
    )
    check("save_every debug", lambda n, debug: n and debug, "debug=true writes no checkpoints; set save_every=null")
    check("model.archive", lambda path: path and not Path(path).is_file(), "no such file; give the path of a policy.pt")
    positions = max_positions(values.get("model.name_or_path"))
    check("max_length", lambda n: positions and n > positions, f"the model has {positions} positions; lower it")
    parallel_problems(valid, check)
    return problems


# The values of settings for several processes that mean one process.
SINGLE = {"n_processes": ("auto", 1), "replicate": (1,), "ddp": (False,), "reduce_every_pass": (False,)}
Check = Callable[[str, Callable[..., Any], str], None]


def parallel_problems(valid: Mapping[str, Any], check: Check) -> None:
    """Check the settings of several processes, and the processes that torchrun has started."""
    launched = os.environ.get("WORLD_SIZE") or "1"
    if valid.get("trainer") == "BasicTrainer":
        words = "is for several processes; set trainer=FSDPTrainer"
        for key, default in SINGLE.items():
            check(f"{key} trainer", lambda value, _, default=default: value not in default, words)
        words = "set trainer=FSDPTrainer, which shares one model, or start without torchrun"
        check("trainer", lambda _: launched != "1", f"is for one process, and torchrun has started {launched}; {words}")
        return
    check("trainer", lambda name: name == "TensorParallelTrainer", "is not built yet; use trainer=FSDPTrainer")
    words = "with ddp=true every device holds the whole model; set replicate=1"
    check("ddp replicate", lambda ddp, copies: ddp and copies > 1, words)
    words = "with ddp=true whole gradients are kept anyway; set reduce_every_pass=false"
    check("ddp reduce_every_pass", lambda ddp, reduce: ddp and reduce, words)
    check("compile", lambda on: on, "trainer=FSDPTrainer cannot compile its layers yet; set it to false")
    words = "trainer=FSDPTrainer cannot round sharded parameters stochastically yet; set it to float32"
    check("model.policy_dtype", lambda dtype: dtype == "bfloat16", words)
    words = "trainer=FSDPTrainer gives every process a GPU of its own, or the CPU; set it to auto, cuda or cpu"
    check("device", lambda name: name not in ("auto", "cuda", "cpu"), words)
    if launched != "1":
        words = f"torchrun has started {launched} processes; set it to auto"
        check("n_processes", lambda n: str(n) not in ("auto", launched), words)
    n = int(launched) if launched.isdigit() and launched != "1" else valid.get("n_processes")
    if isinstance(n, int):
        words = f"each of {n} processes needs an example of every batch; set it to {n} or more"
        check("batch_size", lambda size: size < n, words)
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
