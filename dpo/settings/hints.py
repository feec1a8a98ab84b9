"""Hints for settings that do not exist: names from other trainers, typos, keys of other losses.

Nothing slow is imported, so that mistyped commands fail immediately.
"""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence

from dpo.system.installation import COMMAND

ON_GPUS = "use trainer=FSDPTrainer, which shards the model over all GPUs; torchrun starts several machines"
IN_4_BITS = "use lora=default lora.quantize=nf4 (QLoRA), which needs bitsandbytes"
EXAMPLES = "which counts training examples: the number of updates * batch_size"

# Setting names of TRL, transformers, LLaMA-Factory, axolotl, OpenRLHF and torchtune, with our key or a hint. Dots,
# underscores and case are ignored. {} becomes =VALUE as it was typed.
TABLE = {
    # Training
    "learning_rate peak_learning_rate": "lr",
    "warmup num_warmup_steps": "warmup_steps",
    "warmup_ratio": "use warmup_steps, a number of updates: the ratio * training examples / batch_size",
    "lr_scheduler lr_scheduler_type lr_schedule": "use scheduler: constant, linear, cosine or wsd",
    "optim optimizer_name optimizer_type": "use optimizer=NAME, a class of torch.optim such as AdamW, or AdamW8bit",
    "momentum adam_beta1 adam_beta2 adam_epsilon optim_args": "use optimizer_args='{NAME: VALUE}', as in '{eps: 1e-6}'",
    "gradient_clipping gradient_clip_val clip_grad_norm grad_clip max_norm": "max_grad_norm",
    "per_device_train_batch_size micro_batch_size micro_train_batch_size": (
        "use batch_size{}, the examples per update: examples per device * devices * accumulation steps"
    ),
    "train_batch_size global_batch_size": "use batch_size{}, the examples per update",
    "per_device_eval_batch_size micro_eval_batch_size": "eval_batch_size",
    "gradient_accumulation grad_accum_steps accumulate_grad_batches accumulation_steps": (
        "use gradient_accumulation_steps{}, the microbatches that a batch is split into; batch_size stays the same"
    ),
    "num_epochs num_train_epochs max_epochs epochs epoch": "n_epochs",
    "max_steps num_steps train_steps num_train_steps total_steps": f"use n_examples, {EXAMPLES}",
    "max_samples max_train_samples": "use n_examples{}, the training examples of all epochs",
    "random_seed manual_seed data_seed": "seed",
    # Precision, memory and devices
    "bf16 bfloat16 mixed_precision": "use precision=bfloat16, or precision=float32 without it",
    "fp16 float16": "use precision=bfloat16 or precision=float32; float16 needs loss scaling, which is not supported",
    "fp32 tf32": "use precision=float32",
    "dtype torch_dtype": "use precision for the computation and model.policy_dtype for the parameters",
    "gradient_checkpointing use_gradient_checkpointing": "activation_checkpointing",
    "torch_compile use_torch_compile": "compile",
    "flash_attn flash_attention attn_implementation": "leave it out: layout and device choose the attention kernel",
    "deepspeed zero_stage fsdp use_fsdp fsdp_config device_map nnodes num_nodes": ON_GPUS,
    "n_gpus n_gpu num_gpus gpus devices nproc_per_node num_processes world_size": (
        "use trainer=FSDPTrainer n_processes{}; CUDA_VISIBLE_DEVICES in the environment chooses the GPUs"
    ),
    "tensor_parallel_size tp_size": "use trainer=TensorParallelTrainer tensor_parallel{}",
    "use_cpu no_cuda cuda gpu": "use device=cuda or device=cpu",
    # LoRA
    "peft use_peft use_lora peft_config lora_config": f"use lora=default; `{COMMAND} --help lora` lists its settings",
    "adapter finetuning_type": "use lora=default to train adapters; leave it out to train all weights",
    "lora_r lora_rank lora.rank": "use lora=default lora.r{}",
    "lora_alpha": "use lora=default lora.alpha{}",
    "lora_dropout": "use lora=default lora.dropout{}",
    "lora_target lora_target_modules target_modules": "use lora=default lora.targets=[NAME,NAME], or lora.targets=auto",
    "use_qlora qlora load_in_4bit load_in_8bit quantization_bit quantization_config": IN_4_BITS,
    # Model and tokenizer
    "model_name_or_path model_name model.name model_path model_id base_model pretrain": "model.name_or_path",
    "ref_model ref_model_name_or_path reference_model reference_model_name_or_path ref_adapter_name": "reference",
    "tokenizer tokenizer_name tokenizer_path tokenizer_name_or_path": "model.tokenizer_name_or_path",
    "checkpoint checkpoint_path load_checkpoint": "use model.archive{}, the path of a policy.pt",
    "new_special_tokens add_special_tokens resize_vocab resize_token_embeddings": (
        "add new tokens to the tokenizer's folder, and set model.resize_embeddings=true"
    ),
    "trust_remote_code": "code from the Hub is never run; choose a model.name_or_path that transformers implements",
    # Loss
    "beta dpo_beta pref_beta": "loss.beta",
    "label_smoothing label_smoothing_factor": "loss.label_smoothing",
    "reference_free": "loss.reference_free",
    "precompute_ref_log_probs": "loss.precompute_reference",
    "loss_type loss_fn pref_loss stage": f"use loss={{loss}}; `{COMMAND} loss=help` lists all of them",
    "rpo_alpha pref_ftx nll_loss_coef cpo_alpha": "loss.nll_weight",
    "simpo_gamma": "use loss=simpo loss.gamma{}",
    "gamma_beta_ratio": "use loss=simpo loss.gamma, which is this ratio * loss.beta",
    "ld_alpha": "loss.ld_alpha",
    "discopop_tau": "use loss=discopop loss.temperature{}",
    "f_divergence_type": "loss.divergence",
    "use_weighting": "use loss.token_weights=wpo",
    "disable_dropout": "leave it out: dropout is always off, except lora.dropout",
    "router_aux_loss_coef moe_aux_loss_coef aux_loss_coef": "model.router_loss_weight",
    "output_router_logits": "use model.router_loss_weight=NUMBER, the weight of the routers' load-balancing loss",
    # Data
    "dataset dataset_name train_dataset data dataset_path data_path data_files train_file": (
        "use datasets=[NAME], names of data sets, files or folders"
    ),
    "dataset_mixer dataset_weights mixing_ratios": (
        "use datasets=[NAME,NAME] and shares=[SHARE,SHARE], the part of each that an epoch takes"
    ),
    "split dataset_split train_split": "use split_train{}, and split_test for the split to evaluate on",
    "streaming": "leave it out: datasets are read once, into a file that is mapped into memory",
    "eval_dataset test_file val_size val_set_size test_size": (
        "use split_test, the split to evaluate on; without one, a tenth of the prompts is held out"
    ),
    "prompt_key": "columns.prompt",
    "chosen_key": "columns.chosen",
    "rejected_key": "columns.rejected",
    "apply_chat_template template": "use prompt_format=chat, which uses the tokenizer's chat template",
    "chat_template_kwargs template_kwargs enable_thinking reasoning_effort": "use chat_template_args='{NAME: VALUE}'",
    "shuffle group_by_length": "leave it out: the order of each epoch depends only on seed",
    "packing sample_packing padding_free": "leave it out: layout=shared_prefix, the default, already packs",
    "max_seq_length max_seq_len seq_length sequence_len max_len cutoff_len context_length model_max_length": (
        "use max_length{}, the tokens of a prompt and one response"
    ),
    "max_completion_length max_target_length max_new_tokens": "use max_length, the tokens of prompt and response",
    # The run
    "output_dir output_path output out_dir save_dir save_path run_dir logging_dir checkpoint_dir": (
        "use local_run_dir{}, the run directory, or local_dirs=[FOLDER] to create it in a folder"
    ),
    "run_name experiment_name wandb_name wandb_run_name": "exp_name",
    "wandb_project": "wandb.project",
    "wandb_entity": "wandb.entity",
    "wandb use_wandb wandb_mode no_wandb": "use wandb.enabled=true or wandb.enabled=false",
    "report_to logger tensorboard": "use trackers, such as trackers=[wandb,tensorboard], or [] for none",
    "logging_steps log_every_n_steps log_interval": (
        "use minimum_log_interval_secs for the console and trackers; metrics.jsonl gets every update"
    ),
    "eval_steps eval_interval eval_strategy evaluation_strategy": f"use eval_every, {EXAMPLES}",
    "save_steps save_interval save_strategy": f"use save_every, {EXAMPLES}; each evaluation also saves",
    "save_total_limit": "keep_checkpoints",
    "load_best_model_at_end save_best keep_best_model": (
        "use keep_best=METRIC, such as keep_best=loss/eval; the best checkpoint is exported to RUN/BEST/hf"
    ),
    "metric_for_best_model monitor best_metric": "use keep_best{}, a name from metrics.jsonl such as loss/eval",
    "greater_is_better": "use keep_best=max:NAME or keep_best=min:NAME; the direction of most metrics is known",
    "early_stopping early_stopping_patience patience": (
        "use stop_after{} with keep_best=METRIC: evaluations without a better value"
    ),
    "early_stopping_threshold min_delta": (
        "leave it out: every better value of keep_best counts; stop_after=N waits for N evaluations without one"
    ),
    "resume_from_checkpoint resume_from auto_resume": (
        "use resume=RUN, the run directory, which keeps its own settings; or resume=auto with a fixed local_run_dir"
    ),
    "hub_model_id": "push_to_hub",
    "fsdp_port": "leave it out: processes started by n_processes or torchrun find each other",
    "generate_during_eval": "sample_during_eval",
    "temperature": "sample_temperature",
}
HINTS = {name: hint for names, hint in TABLE.items() for name in names.split()}
OTHER_LOSSES = {  # loss names of other libraries, and the settings to use here
    "sigmoid": "dpo",
    "cdpo": "dpo loss.label_smoothing=0.1",
    "rpo": "dpo loss.nll_weight=1",
    "wpo": "dpo loss.token_weights=wpo",
    "sigmoid_norm": "dpo loss.length_normalize=true",
    "slic": "hinge",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "bco_pair": "bco",
    "kto_pair": "kto",
    "sppo_hard": "sppo",
    "dpo_positive": "dpop",
}
HYDRA_FLAG = re.compile(
    r"--(config|experimental|hydra|shell)|-(cp|cn|cd|sc)$"
)  # with these, only Hydra checks the arguments


def argument_problems(
    arguments: Sequence[str], known: Collection[str], options: Mapping[str, Sequence[str]]
) -> list[str]:
    """One line per command-line argument that no config accepts.

    known    the dotted names of all settings
    options  the names of each group's files

    Hydra's own flags, deletions and interpolations pass, since only Hydra can check them.
    """
    if any(HYDRA_FLAG.match(argument) for argument in arguments):
        return []
    problems: list[str] = []
    printable = [argument if argument.isprintable() else ascii(argument)[1:-1] for argument in arguments]
    for before, argument, after in zip(["", *printable], printable, [*printable[1:], ""], strict=False):
        if argument.startswith("--"):
            problems += _flag_problem(argument, after, known, options)
        elif setting := re.fullmatch(r"\+{0,2}([\w.-]+)=(.*)", argument):
            problems += _setting_problem(setting[1], setting[2], known, options)
        elif argument[:1] not in ("-", "~", "+") and not argument.strip("=").count("=") and before[:1] != "-":
            form = "a setting is written KEY=VALUE without spaces; quote a value that has spaces"
            return [*problems, f"{argument}: {form}"]  # what follows may belong to the same setting
    return problems


def suggest(key: str, value: str | None, known: Collection[str]) -> str:
    """The error for a key that does not exist or that the chosen loss, engine or scorer does not have.

    value is the text after the equals sign, None if unknown.
    """
    groups = _groups(known)
    if key in known:
        if key.startswith("lora."):
            return f"{key}: needs lora=default; without it all weights are trained"
        chosen = key.partition(".")[0] if key.startswith(("engine.", "scorer.")) else "loss"
        return f"{key}: the chosen {chosen} has no such setting"
    if key in groups:
        return f"{key}: is a group of settings; {_hint(key, value) or f'`{COMMAND} --help {key}` lists them'}"
    problem = f"{key}: there is no such setting; "
    group, parent, last = key.partition(".")[0], key.rpartition(".")[0], key.rpartition(".")[2]
    names = _names(known)
    for word in (key, last):
        if hint := _hint(word, value):
            return problem + hint
        for name, setting in names.items():
            if _squash(name) == _squash(word):
                return f"{problem}did you mean {setting}?"
    if parent in known and parent not in groups:  # lr.anything
        return f"{problem}did you mean {parent}?"
    if near := _nearest(key, names, cutoff=0.8):
        return f"{problem}did you mean {names[near]}?"
    if group in groups:
        return f"{problem}`{COMMAND} --help {group}` lists all of them"
    near = group if group in HINTS else _nearest(key, HINTS, cutoff=0.9)
    return problem + ((near and _hint(near, value)) or f"`{COMMAND} --help` lists all of them")


def suggest_option(group: str, name: str, options: Sequence[str]) -> str:
    """The error for an option that a group, such as model or loss, does not have."""
    problem = f"{group}={name}: there is no such file in config/{group}/; choose one of {' '.join(options)}"
    if group == "loss" and name.lower() in OTHER_LOSSES:
        return f"{problem}; use loss={OTHER_LOSSES[name.lower()]}"
    if "/" not in name and (near := _nearest(name, options, cutoff=0.8)):  # a path or a name on the Hub is no error
        return f"{problem}; did you mean {near}?"
    mitigations = {
        "model": f"use model.name_or_path={name}, a folder or a name on the Hub",
        "lora": "leave it out to train all weights",
    }
    return f"{problem}; {mitigations[group]}" if group in mitigations else problem


def _hint(name: str, value: str | None) -> str | None:
    """The hint for a name of another trainer, with the value that was typed; None for any other name."""
    hint = next((hint for other, hint in HINTS.items() if _squash(other) == _squash(name)), None)
    if hint is None:
        return None
    loss = "NAME" if value is None else value.strip("[]\"'").lower()
    template = hint if " " in hint else f"use {hint}{{}}"
    filled = template.replace("{loss}", OTHER_LOSSES.get(loss, loss))
    return filled.replace("{}", "" if value is None else f"={value}")


def _setting_problem(key: str, value: str, known: Collection[str], options: Mapping[str, Sequence[str]]) -> list[str]:
    """The line for KEY=VALUE if there is no such key, or one per file that a group does not have."""
    if key in options:
        names = value.split(",") if re.fullmatch(r"[\w./~,-]+", value) else []  # several in a sweep
        return [suggest_option(key, name, options[key]) for name in names if name not in options[key]]
    parent, _, last = key.rpartition(".")
    is_element = parent in known and last.isdecimal()  # local_dirs.0
    is_mapping = key in _groups(known) and value.startswith("{")  # wandb={enabled:false}
    if key in known or is_element or is_mapping or key.split(".")[0] == "hydra":
        return []
    return [suggest(key, value, known)]


def _flag_problem(argument: str, after: str, known: Collection[str], options: Mapping[str, Sequence[str]]) -> list[str]:
    """The line for a setting that is written as a flag, --KEY=VALUE or --KEY VALUE; none for Hydra's flags."""
    flag, _, typed = argument.partition("=")
    key = flag[2:].replace("-", "_")
    value = typed or (None if after[:1] == "-" or "=" in after else after) or None
    hint = f"use {key}={value or 'VALUE'}" if key in known or key in options else _hint(key, value)
    return [f"{argument}: settings are written without dashes; {hint}"] if hint else []


def _names(known: Collection[str]) -> dict[str, str]:
    """{name: setting} for every setting, the last part of its name, and every group."""
    full = {key: key for key in known if not key.endswith(".name")}  # loss.name is set by loss=NAME
    return {key.rpartition(".")[2]: key for key in full} | {group: group for group in _groups(known)} | full


def _groups(known: Collection[str]) -> list[str]:
    """The names before a dot, such as wandb, model and loss."""
    return list(dict.fromkeys(key.partition(".")[0] for key in known if "." in key))


def _squash(name: str) -> str:
    """A name without what people vary: dots, dashes, underscores, capitals."""
    return re.sub(r"[\W_]", "", name).lower()


def _nearest(typed: str, names: Collection[str], cutoff: float) -> str | None:
    """The name that was probably meant, which is similar or has the same letters; None if there is none."""
    word, squashed = _squash(typed), {_squash(name): name for name in names}
    near = difflib.get_close_matches(word, squashed, n=1, cutoff=cutoff)
    near += [other for other in squashed if sorted(other) == sorted(word)]
    return squashed[near[0]] if near else None
