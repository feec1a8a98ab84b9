"""Combinations of valid settings that cannot be honoured together.

The combinations that a loss refuses are in `Loss.problems` of dpo/training/objectives.py.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from operator import ge
from pathlib import Path
from typing import Any, NamedTuple

from dpo.settings.config_files import format_value
from dpo.system.installation import is_installed


class Rule(NamedTuple):
    """A combination that is refused.

    keys       names of the settings; the rule is skipped if one of them is missing or invalid
    is_broken  called with their values
    message    cause and mitigation, printed after "KEY=VALUE KEY=VALUE: "
    """

    keys: str
    is_broken: Callable[..., Any]
    message: str


def all_set(*values: Any) -> bool:
    return all(values)


def float32_with_bfloat16(precision: str | None, dtype: str) -> bool:
    return precision == "float32" and dtype == "bfloat16"


def is_distributed(trainer: str) -> bool:
    return trainer != "BasicTrainer"


def for_several_processes(key: str, off: tuple[Any, ...], trainer: str = "FSDPTrainer") -> Rule:
    """The rule that BasicTrainer takes only the values in `off`."""
    message = f"is for several processes; set trainer={trainer}"
    return Rule(f"{key} trainer", lambda value, name: not is_distributed(name) and value not in off, message)


def is_template(text: str) -> bool:
    """Whether chat_template is a template's text, not a file."""
    return "{{" in text or "{%" in text


START = "start"  # value of `reference`: the weights that the policy starts from
NOT_QUANTIZED = "only the weights of model.name_or_path can be quantized; set lora.quantize=null"
NOT_UPLOADED = "only this machine has the adapter's base model; set push_to_hub=null"
RULES: tuple[Rule, ...] = (
    # Training
    Rule("batch_size gradient_accumulation_steps", lambda size, n_steps: size % n_steps,
         "batch_size must be divisible by gradient_accumulation_steps"),
    Rule("max_prompt_length max_length", ge,
         "max_prompt_length must be below max_length, or no token is left for a response"),
    Rule("n_epochs n_examples", lambda epochs, examples: epochs is None and examples is None,
         "set one of them, or training never ends"),
    Rule("compile activation_checkpointing", lambda *values: values == (True, True),
         "recomputed layers cannot be compiled; set one of the two to false"),
    Rule("precision model.policy_dtype", float32_with_bfloat16,
         "computing in float32 needs model.policy_dtype=float32"),
    Rule("model.fsdp_policy_mp model.policy_dtype", float32_with_bfloat16,
         "computing in float32 needs model.policy_dtype=float32"),
    Rule("model.archive", lambda path: path and not Path(path).is_file(),
         "no such file; give the path of a policy.pt"),
    Rule("scheduler min_lr_ratio", lambda scheduler, ratio: scheduler == "constant" and ratio,
         "a constant learning rate does not fall; choose linear, cosine or wsd, or set min_lr_ratio=0"),
    Rule("optimizer model.policy_dtype", lambda optimizer, dtype: optimizer == "Muon" and dtype == "bfloat16",
         "Muon does not support stochastic rounding; set model.policy_dtype=float32"),
    Rule("sync_mix sync_reference", lambda mix, n: mix != 1 and n is None,
         "has no effect without sync_reference=N; set it"),
    Rule("sync_reference model.reference_dtype", all_set,
         "the reference takes the policy's dtype; set model.reference_dtype=null"),
    Rule("sync_reference sync_mix model.policy_dtype", lambda n, mix, dtype: n and mix != 1 and dtype == "bfloat16",
         "bfloat16 would round away the mix's small changes; set sync_mix=1 or model.policy_dtype=float32"),
    # Data
    Rule("chat_template", lambda template: template and not is_template(template) and not Path(template).is_file(),
         "no such file; give the path of a Jinja template, or its text"),
    *(Rule(f"{name} prompt_format", lambda value, form: value is not None and form in ("text", "hh"),
           "has no effect, since no chat template is applied; leave it out, or set prompt_format=chat")
      for name in ("chat_template_args", "chat_template_time")),
    Rule("columns.score_chosen columns.score_rejected", lambda *columns: columns.count(None) == 1,
         "set both or neither"),
    *(Rule(f"columns.label columns.{name}", lambda *columns: not {None, "none"} & {*columns},
           "a row has one response and a label, or a chosen and a rejected response; set the columns of one kind")
      for name in ("chosen", "rejected", "score_chosen")),
    Rule("inspect_ids inspect", lambda ids, n: ids and not n, "has no effect without inspect=N; set it"),
    Rule("dry_run inspect", all_set, "each stops before training; set only one of them"),
    # Checkpoints, export and logging
    Rule("keep_policies keep_checkpoints", lambda keep, n: keep and n is None,
         "every checkpoint is kept anyway; set keep_checkpoints to a number, or keep_policies=false"),
    Rule("stop_after keep_best", lambda n, metric: n is not None and metric is None,
         "counts evaluations without a better keep_best; set keep_best=METRIC"),
    Rule("keep_best debug", lambda metric, debug: metric is not None and debug,
         "debug=true writes no checkpoints; set keep_best=null"),
    Rule("save_every debug", all_set, "debug=true writes no checkpoints; set save_every=null"),
    Rule("push_to_hub debug", all_set, "debug=true exports nothing; set push_to_hub=null"),
    Rule("export_dtype debug", lambda dtype, debug: dtype != "auto" and debug,
         "debug=true exports nothing; set export_dtype=auto"),
    *(Rule("trackers", lambda names, name=name: name in names and not is_installed(name),
           f"the library {name} is not installed; pip install {name}")
      for name in ("tensorboard", "trackio")),
    # LoRA: the keys below lora exist only with lora=default
    Rule("lora.r", lambda _: not is_installed("peft"), "needs the library peft; pip install peft"),
    Rule("lora.r sync_reference", lambda _, n: n is not None,
         "an adapter's reference is frozen; set sync_reference=null"),
    Rule("reference lora.r model.reference_dtype",
         lambda reference, _, dtype: dtype is not None and reference == START,
         "the policy without its adapter is the reference; set model.reference_dtype=null"),
    Rule("lora.use_dora model.policy_dtype", lambda dora, dtype: dora and dtype != "float32",
         "DoRA needs model.policy_dtype=float32, or the first update's margin is not 0"),
    Rule("lora.path", lambda path: path and not (Path(path) / "adapter_config.json").is_file(),
         "holds no adapter_config.json; give the folder of an adapter"),
    Rule("lora.path lora.init", lambda path, init: path and init != "kaiming",
         "an existing adapter is not initialized; leave lora.init out"),
    Rule("lora.quantize", lambda kind: kind and not is_installed("bitsandbytes"),
         "needs the library bitsandbytes; pip install bitsandbytes"),
    Rule("lora.quantize device", lambda kind, device: kind and device == "mps",
         "there are no kernels for MPS; set device=cuda or device=cpu"),
    Rule("lora.quantize lora.use_dora", all_set, "cannot be combined; set lora.quantize=null or lora.use_dora=false"),
    Rule("lora.quantize lora.export_merged", all_set,
         "an adapter cannot be merged into 4-bit weights; set lora.export_merged=false"),
    Rule("lora.quantize model.archive", all_set, NOT_QUANTIZED),
    Rule("lora.quantize model.from_scratch", all_set, NOT_QUANTIZED),
    Rule("lora.quantize model.resize_embeddings", all_set, NOT_QUANTIZED),
    Rule("push_to_hub lora.r model.archive", all_set, NOT_UPLOADED),
    Rule("push_to_hub lora.r model.from_scratch", all_set, NOT_UPLOADED),
    Rule("push_to_hub lora.r model.resize_embeddings", all_set, NOT_UPLOADED),
    Rule("push_to_hub lora.r model.name_or_path", lambda name, _, model: name and Path(model).is_dir(), NOT_UPLOADED),
    # Several processes: WORLD_SIZE is their number in the environment of torchrun and srun, 1 without these
    for_several_processes("n_processes", ("auto", 1)),
    for_several_processes("replicate", (1,)),
    for_several_processes("tensor_parallel", ("auto",), "TensorParallelTrainer"),
    for_several_processes("ddp", (False,)),
    for_several_processes("reduce_every_pass", (False,)),
    Rule("trainer WORLD_SIZE", lambda trainer, n: not is_distributed(trainer) and n != "1",
         "this trainer uses one process; set trainer=FSDPTrainer, or start without torchrun and srun"),
    Rule("dry_run WORLD_SIZE", lambda dry_run, n: dry_run and n != "1",
         "a dry run uses one process; start without torchrun and srun, with n_processes=N"),
    Rule("n_processes WORLD_SIZE", lambda n, world_size: world_size != "1" and str(n) not in ("auto", world_size),
         "torchrun or srun sets the number of processes; set n_processes=auto"),
    Rule("tensor_parallel trainer", lambda n, trainer: n != "auto" and trainer == "FSDPTrainer",
         "is for trainer=TensorParallelTrainer; set tensor_parallel=auto"),
    Rule("ddp trainer", lambda ddp, trainer: ddp and trainer == "TensorParallelTrainer",
         "TensorParallelTrainer splits every layer; set ddp=false"),
    Rule("ddp replicate", lambda ddp, copies: ddp and copies > 1,
         "with ddp=true every device holds the whole model; set replicate=1"),
    Rule("ddp reduce_every_pass", all_set, "with ddp=true gradients are not sharded; set reduce_every_pass=false"),
    Rule("compile trainer", lambda on, trainer: on is True and is_distributed(trainer),
         "this trainer cannot compile the layers yet; set compile=false"),
    Rule("optimizer trainer", lambda name, trainer: name in ("Muon", "AdamW8bit") and is_distributed(trainer),
         "this optimizer needs whole matrices, and the trainer shards them; choose another optimizer"),
    Rule("sync_reference trainer", lambda n, trainer: n and is_distributed(trainer),
         "this trainer cannot update the reference; set sync_reference=null"),
    Rule("lora.r trainer", lambda _, trainer: trainer == "TensorParallelTrainer",
         "TensorParallelTrainer cannot split an adapter; set trainer=FSDPTrainer"),
    Rule("lora.quantize trainer", lambda kind, trainer: kind and is_distributed(trainer),
         "this trainer cannot shard quantized layers; set lora.quantize=null"),
    Rule("model.policy_dtype lora trainer", lambda dtype, _, trainer: dtype == "bfloat16" and is_distributed(trainer),
         "this trainer does not support stochastic rounding yet; set model.policy_dtype=float32"),
    Rule("max_tokens_per_pass trainer", lambda tokens, trainer: tokens == "fit" and is_distributed(trainer),
         "fit is measured on one device; give a number of tokens, or auto"),
    Rule("device trainer", lambda device, trainer: is_distributed(trainer) and device not in ("auto", "cuda", "cpu"),
         "each process uses its own GPU, or the CPU; set device to auto, cuda or cpu"),
)  # fmt: skip


def combination_problems(valid: Mapping[str, Any]) -> list[str]:
    """One line per refused combination of the valid settings."""
    values = {**valid, "WORLD_SIZE": os.environ.get("WORLD_SIZE") or "1"}
    problems = []
    for keys, is_broken, message in RULES:
        names = keys.split()
        if all(name in values for name in names) and is_broken(*(values[name] for name in names)):
            problems.append(f"{' '.join(f'{name}={format_value(values[name])}' for name in names)}: {message}")
    return [*problems, *process_count_problems(values)]


def process_count_problems(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield problems with the number of processes, if it is known before they start."""
    world_size, trainer = values["WORLD_SIZE"], values.get("trainer")
    n = int(world_size) if world_size.isdigit() and world_size != "1" else values.get("n_processes")
    if trainer == "BasicTrainer" or not isinstance(n, int):
        return
    size, copies, tensor = values.get("batch_size"), values.get("replicate"), values.get("tensor_parallel")
    groups = n  # each computes examples of its own
    if trainer == "TensorParallelTrainer":
        groups = max(1, n // tensor) if isinstance(tensor, int) else 1
    if size is not None and size < groups:
        kind = "processes" if groups == n else "groups of processes"
        yield f"batch_size={size}: each of {groups} {kind} needs an example of every batch; set it to {groups} or more"
    if copies is not None and n % copies:
        yield f"replicate={copies}: must divide the number of processes, {n}"
