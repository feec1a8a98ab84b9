"""What people type who come from another trainer, and what it is called here.

The names are those of TRL and transformers (DPOConfig, TrainingArguments), LLaMA-Factory, axolotl, OpenRLHF, torchtune
and nearby tools. When a feature is built, its line becomes `Renamed`; when a key goes, a test names its lines.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from dpo.system.installation import COMMAND

# The kinds of answers

BATCH_SIZE = 4  # the default of batch_size, for examples that convert updates; a test compares it with the YAML


class Answer(Protocol):
    """What to do instead of using a setting that does not exist."""

    def text(self, value: str | None) -> str:
        """Return the end of the sentence "KEY: there is no such setting; ...", given the value that was typed."""


@dataclass(frozen=True)
class Renamed:
    """The same setting under our name; form is how its value is written."""

    key: str
    note: str = ""
    form: str = "{}"

    def text(self, value: str | None) -> str:
        setting = self.key if value is None else f"{self.key}={self.form.format(value.strip('[]'))}"
        return f"use {setting}" + (f", {self.note}" if self.note else "")


@dataclass(frozen=True)
class Steps:
    """A number of updates where we count training examples."""

    key: str

    def text(self, value: str | None) -> str:
        steps = int(value) if value and re.fullmatch(r"[1-9][0-9]{0,11}", value) else 500
        numbers = f"{steps} steps at batch_size={BATCH_SIZE} are {self.key}={steps * BATCH_SIZE}"
        return f"use {self.key}, which counts training examples: {numbers}"


@dataclass(frozen=True)
class Switch:
    """A setting that is on or off, where each has its own answer."""

    on: str
    off: str

    def text(self, value: str | None) -> str:
        if value is None:
            return f"use {self.on} or {self.off}"
        off = ("false", "no", "none", "off", "null", "0", "disabled")
        return f"use {self.off if value.lower() in off else self.on}"


@dataclass(frozen=True)
class Choice:
    """A choice whose values have other names here; otherwise is the answer to a value that is not listed."""

    settings: Mapping[str, str]
    otherwise: str

    def text(self, value: str | None) -> str:
        setting = self.settings.get(str(value).lower().strip("[]\"'"))
        return f"use {setting}" if setting else self.otherwise


@dataclass(frozen=True)
class Note:
    """Something that has no counterpart: why, and what to do."""

    note: str

    def text(self, value: str | None) -> str:
        return self.note


# Parts of answers

LESS_MEMORY = (
    "lora=default, activation_checkpointing=true, loss.precompute_reference=true or a smaller model need less memory"
)
WITH_LORA = "with lora=default"
ALL_LINEAR = ("all", "all-linear", "all_linear", "auto")
LORA_NAMES = {
    **{"r": "lora_r lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout", "init": "init_lora_weights"},
    **{"path": "adapter_path adapter_name_or_path lora_model_dir lora_path", "export_merged": "merge_lora"},
}
ADAPTERS = {"lora": "lora=default", "qlora": "lora=default lora.quantize=nf4"}
NAME_OR_FOLDER = "a name or a folder that holds train.jsonl"
LOSS_NAMES = {  # other names of the files in config/loss/
    **{"sigmoid": "loss=dpo", "dpo": "loss=dpo", "ipo": "loss=ipo", "sft": "loss=sft", "nll": "loss=sft"},
    **{"cdpo": "loss=dpo loss.label_smoothing=0.1", "hinge": "loss=hinge", "slic": "loss=hinge", "rso": "loss=hinge"},
    **{"robust": "loss=robust", "rdpo_robust": "loss=robust", "exo": "loss=exo", "exo_pair": "loss=exo"},
    **{"nca": "loss=nca", "nca_pair": "loss=nca", "apo": "loss=apo_zero", "apo_zero": "loss=apo_zero"},
    **{"apo_down": "loss=apo_down", "discopop": "loss=discopop", "sppo": "loss=sppo", "sppo_hard": "loss=sppo"},
    **{"bco": "loss=bco", "bco_pair": "loss=bco", "kto": "loss=kto", "kto_pair": "loss=kto", "orpo": "loss=orpo"},
    **{"simpo": "loss=simpo", "cpo": "loss=cpo", "dpop": "loss=dpop", "dpo_positive": "loss=dpop"},
    **{"odpo": "loss=odpo", "rdpo": "loss=rdpo", "r_dpo": "loss=rdpo", "rpo": "loss=dpo loss.nll_weight=1"},
    **{"sigmoid_norm": "loss=dpo loss.length_normalize=true", "dpo_norm": "loss=dpo loss.length_normalize=true"},
    **{"wpo": "loss=dpo loss.token_weights=wpo"},
}
OPTIMIZERS = {
    **dict.fromkeys(("adamw", "adamw_torch", "adamw_torch_fused", "adamw_hf", "torch.optim.adamw"), "optimizer=AdamW"),
    **{"adam": "optimizer=Adam", "sgd": "optimizer=SGD", "rmsprop": "optimizer=RMSprop", "nadam": "optimizer=NAdam"},
    **{"adagrad": "optimizer=Adagrad", "adamax": "optimizer=Adamax", "radam": "optimizer=RAdam"},
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "adamw8bit", "adamw_torch_8bit"), "optimizer=AdamW8bit"),
    **{"muon": "optimizer=Muon"},
}
SCHEDULES = {
    **dict.fromkeys(("constant", "constant_with_warmup"), "scheduler=constant"),
    **dict.fromkeys(("cosine", "cosine_with_min_lr"), "scheduler=cosine"),
    **{"linear": "scheduler=linear", "wsd": "scheduler=wsd", "warmup_stable_decay": "scheduler=wsd"},
}
DTYPES = {
    **dict.fromkeys(("bfloat16", "bf16", "torch.bfloat16"), "precision=bfloat16"),
    **dict.fromkeys(("float32", "fp32", "torch.float32", "no"), "precision=float32"),
}
TRACKERS = {
    **dict.fromkeys(("wandb", "all"), "wandb.enabled=true"),
    **dict.fromkeys(("none", "null", "false", ""), "wandb.enabled=false"),
    **{name: f"trackers=[{name}]" for name in ("tensorboard", "trackio")},
}


# Each line: names from elsewhere, and the answer to all of them. Dots, underscores and capitals make no difference.

TABLE: tuple[tuple[str, Answer], ...] = (
    # Learning rate and optimizer
    ("learning_rate peak_learning_rate", Renamed("lr")),
    ("warmup num_warmup_steps lr_warmup_steps", Renamed("warmup_steps", "a number of updates")),
    (
        "warmup_ratio lr_warmup_ratio",
        Note("use warmup_steps, a number of updates: the ratio * training examples / batch_size"),
    ),
    (
        "lr_scheduler lr_scheduler_type scheduler_type lr_schedule",
        Choice(
            SCHEDULES, "use scheduler: constant, linear, cosine or wsd, each after a warmup of warmup_steps updates"
        ),
    ),
    ("cosine_min_lr_ratio min_lr_rate lr_min_ratio", Renamed("min_lr_ratio")),
    ("min_lr", Note("use min_lr_ratio, the last learning rate divided by lr")),
    (
        "optim optimizer_name optimizer_type optimizer._component_",
        Choice(OPTIMIZERS, "use optimizer, the name of a class in torch.optim, or AdamW8bit"),
    ),
    ("l2", Renamed("weight_decay")),
    ("momentum", Renamed("optimizer_args", form="{{momentum: {}}}")),
    ("adam_epsilon", Renamed("optimizer_args", form="{{eps: {}}}")),
    (
        "betas adam_betas adam_beta1 adam_beta2",
        Note("use optimizer_args='{betas: [0.9, 0.999]}', the arguments of the optimizer's constructor"),
    ),
    ("optimizer_kwargs optim_args", Note("use optimizer_args='{NAME: VALUE}'")),
    ("gradient_clipping gradient_clip_val clip_grad_norm clip_grad grad_clip max_norm", Renamed("max_grad_norm")),
    # Batch size and length of training
    (
        "per_device_train_batch_size per_device_batch_size per_gpu_train_batch_size micro_batch_size"
        " micro_train_batch_size",
        Renamed("batch_size", "the examples of a whole update: those of a device * devices * accumulation steps"),
    ),
    ("train_batch_size global_batch_size train_global_batch_size bs", Renamed("batch_size", "the examples per update")),
    ("per_device_eval_batch_size per_gpu_eval_batch_size micro_eval_batch_size", Renamed("eval_batch_size")),
    ("precompute_ref_batch_size", Renamed("eval_batch_size")),
    ("auto_find_batch_size", Note("memory depends on max_tokens_per_pass rather than on batch_size")),
    (
        "gradient_accumulation grad_accum grad_accum_steps grad_accumulation_steps accumulate_grad_batches"
        " accumulation_steps",
        Renamed("gradient_accumulation_steps", "the parts that a batch is split into; the update stays the same"),
    ),
    ("num_epochs num_train_epochs max_epochs epochs epoch", Renamed("n_epochs")),
    ("max_steps num_steps train_steps num_train_steps max_train_steps total_steps steps", Steps("n_examples")),
    ("max_samples max_train_samples", Renamed("n_examples", "the training examples of all epochs")),
    ("max_eval_samples", Renamed("n_eval_examples")),
    ("random_seed manual_seed rng_seed data_seed seed_everything", Renamed("seed")),
    # Precision, memory and speed
    ("bf16 bfloat16 bf16_full_eval amp", Switch("precision=bfloat16", "precision=float32")),
    ("fp32 float32", Switch("precision=float32", "precision=auto")),
    (
        "fp16 float16 fp16_full_eval",
        Note("float16 needs loss scaling, which is not supported yet; use precision=bfloat16 or precision=float32"),
    ),
    ("tf32", Note("on CUDA, float32 uses TF32; NVIDIA_TF32_OVERRIDE=0 in the environment switches it off")),
    (
        "mixed_precision dtype torch_dtype",
        Choice(DTYPES, "use precision for the passes, model.policy_dtype for the parameters: float32 or bfloat16"),
    ),
    (
        "gradient_checkpointing use_gradient_checkpointing enable_gradient_checkpointing"
        " enable_activation_checkpointing",
        Renamed("activation_checkpointing"),
    ),
    ("gradient_checkpointing_kwargs", Note("use activation_checkpointing=true or false; it has no settings")),
    ("torch_compile use_torch_compile", Renamed("compile")),
    (
        "flash_attn flash_attention flash_attention_2 use_flash_attention use_flash_attn sdp_attention sdpa"
        " xformers_attention attn_implementation",
        Note("the attention kernel is chosen by the layout and the device; there is nothing to set"),
    ),
    ("use_liger_kernel use_liger_loss", Note("the output head is computed in pieces already, without Liger kernels")),
    # LoRA
    ("peft use_peft use_lora", Switch("lora=default", "the defaults: without lora=default all weights are trained")),
    (
        "adapter finetuning_type train_type",
        Choice({**ADAPTERS, "full": "the defaults, which train all weights"}, "use lora=default, or leave it out"),
    ),
    *((names, Renamed(f"lora.{key}", WITH_LORA)) for key, names in LORA_NAMES.items()),
    (
        "lora_target lora_target_modules lora_attn_modules target_modules",
        Choice(dict.fromkeys(ALL_LINEAR, "lora.targets=auto"), f"use lora.targets=[NAME,NAME], {WITH_LORA}"),
    ),
    ("lora_target_linear", Note(f"lora.targets=auto, the default {WITH_LORA}, adapts all linear layers of the blocks")),
    (
        "use_qlora qlora load_in_4bit quantization quantization_bit quantization_config bnb_4bit_quant_type"
        " bnb_4bit_compute_dtype",
        Note(f"use lora=default lora.quantize=nf4, which needs bitsandbytes; {LESS_MEMORY}"),
    ),
    ("load_in_8bit", Note("weights of 8 bits are not supported; use lora=default lora.quantize=nf4")),
    ("peft_config lora_config", Note(f"use lora=default; `{COMMAND} --help lora` lists its settings")),
    (
        "modules_to_save additional_target",
        Note("beside an adapter no whole layer is trained; lora.targets adapts more"),
    ),
    # Several devices
    (
        "deepspeed deepspeed_config zero_stage fsdp use_fsdp fsdp_config device_map",
        Note("use trainer=FSDPTrainer, which shards the model over all GPUs, under torchrun those of several machines"),
    ),
    (
        "tensor_parallel_size tp_size tp",
        Renamed("tensor_parallel", "with trainer=TensorParallelTrainer"),
    ),
    ("offload cpu_offload adam_offload", Note(f"offloading to the CPU is not supported yet; {LESS_MEMORY}")),
    (
        "n_gpus n_gpu num_gpus ngpu gpus devices gpus_per_node nproc_per_node num_processes",
        Renamed("n_processes", "with trainer=FSDPTrainer; CUDA_VISIBLE_DEVICES in the environment chooses the GPUs"),
    ),
    (
        "nnodes num_nodes world_size local_rank",
        Note("several machines are torchrun's: torchrun --nnodes 2 --nproc-per-node 8 train.py trainer=FSDPTrainer"),
    ),
    ("gpu", Note("use device=cuda; CUDA_VISIBLE_DEVICES in the environment chooses the GPUs")),
    ("use_cpu no_cuda", Switch("device=cpu", "device=auto")),
    ("use_gpu cuda", Switch("device=cuda", "device=cpu")),
    # Model and tokenizer
    (
        "model_name_or_path model_name model.name model_path model_id model_dir base_model pretrain pretrained_model"
        " pretrained_model_name_or_path",
        Renamed("model.name_or_path"),
    ),
    (
        "ref_model ref_model_name_or_path reference_model ref_pretrain sync_ref_model",
        Note("the reference is the policy before its first update; model.archive=FILE sets the weights of both"),
    ),
    ("tokenizer tokenizer_name tokenizer_path tokenizer_name_or_path", Renamed("model.tokenizer_name_or_path")),
    ("checkpoint checkpoint_path load_checkpoint", Renamed("model.archive", "the path of a policy.pt")),
    ("add_bos_token", Renamed("model.add_bos")),
    ("trust_remote_code", Note("code from the hub is never run; choose a model that transformers itself implements")),
    # Loss
    ("beta dpo_beta rl_beta pref_beta", Renamed("loss.beta")),
    ("label_smoothing dpo_label_smoothing label_smoothing_factor", Renamed("loss.label_smoothing")),
    ("reference_free", Renamed("loss.reference_free")),
    ("precompute_ref_log_probs", Renamed("loss.precompute_reference")),
    ("preference_average_log_probs", Renamed("loss.average_log_prob", "which loss=ipo has")),
    (
        "loss_type loss_fn pref_loss dpo_loss_type stage rl rlhf_type",
        Choice(LOSS_NAMES, "use loss, the name of a file in config/loss/"),
    ),
    ("ipo", Switch("loss=ipo", "loss=dpo")),
    ("rpo_alpha pref_ftx nll_loss_coef sft_loss_weight sft_weight cpo_alpha", Renamed("loss.nll_weight")),
    (
        "loss_weights",
        Note("a weighted sum of losses is not supported; loss.nll_weight adds the likelihood of the chosen"),
    ),
    ("simpo_gamma", Renamed("loss.gamma", "which loss=simpo has")),
    ("gamma_beta_ratio", Note("use loss=simpo with loss.gamma, which is this ratio times loss.beta")),
    ("orpo_alpha", Renamed("loss.beta", "the weight of the odds ratio in loss=orpo")),
    ("ld_alpha", Renamed("loss.ld_alpha")),
    ("discopop_tau", Renamed("loss.temperature", "which loss=discopop has")),
    ("dpop_lambda lambda_dpop", Renamed("loss.penalty", "which loss=dpop has")),
    ("f_divergence_type", Renamed("loss.divergence")),
    ("f_alpha_divergence_coef", Renamed("loss.divergence_alpha")),
    ("kto_chosen_weight", Renamed("loss.desirable_weight", "which loss=kto has")),
    ("kto_rejected_weight", Renamed("loss.undesirable_weight", "which loss=kto has")),
    ("use_weighting", Switch("loss.token_weights=wpo", "loss.token_weights=none")),
    ("neftune_noise_alpha neft_alpha", Note("NEFTune is not supported yet; embeddings get no noise")),
    ("disable_dropout", Note("dropout is always off, in the policy as in the reference")),
    # Data
    ("dataset dataset_name train_dataset dataset_mixer data", Renamed("datasets", NAME_OR_FOLDER, form="[{}]")),
    (
        "dataset_path dataset_dir data_path data_dir data_files train_file train_data train_path training_file",
        Note("use datasets=[PATH], a file, a glob, or a folder that holds train.jsonl and perhaps test.jsonl"),
    ),
    (
        "eval_dataset eval_file validation_file test_file val_size val_set_size test_size",
        Note("a folder's test split is evaluated on, split_test names another; without one, a tenth is held out"),
    ),
    ("prompt_key input_key", Renamed("columns.prompt", "the name of a column")),
    ("chosen_key", Renamed("columns.chosen", "the name of a column")),
    ("rejected_key", Renamed("columns.rejected", "the name of a column")),
    (
        "chat_template apply_chat_template template",
        Note("messages are rendered by the tokenizer's own chat template; prompt_format=chat renders texts by it too"),
    ),
    ("shuffle group_by_length", Note("each epoch has an order of its own, which depends on seed alone")),
    (
        "num_workers dataset_num_proc dataloader_num_workers preprocessing_num_workers",
        Note("examples are tokenized as they are needed; there is nothing to set"),
    ),
    (
        "packing sample_packing packing_samples padding_free",
        Note("layout=shared_prefix, the default, packs already; max_tokens_per_pass limits a pass"),
    ),
    (
        "max_seq_length max_seq_len max_sequence_length seq_len seq_length sequence_len sequence_length max_len"
        " max_tokens cutoff_len block_size context_length model_max_length",
        Renamed("max_length", "the tokens of a prompt and one response"),
    ),
    ("prompt_max_len max_prompt_len", Renamed("max_prompt_length")),
    (
        "max_completion_length max_target_length max_response_length max_new_tokens generate_max_len",
        Note("use max_length, the tokens of a prompt and one response, and of a prompt and its sample"),
    ),
    ("truncation_mode", Note("the function that reads a data set chooses which end of a long prompt is kept")),
    # The run, its checkpoints and its logs
    (
        "output_dir output_path output out_dir save_dir save_path ckpt_path run_dir log_dir logging_dir checkpoint_dir",
        Renamed("local_run_dir", "the run directory; local_dirs=[FOLDER] makes it below a folder"),
    ),
    ("cache_dir", Note("the hub's cache is chosen in the environment, with HF_HOME=FOLDER")),
    ("run_name experiment_name wandb_name wandb_run_name", Renamed("exp_name")),
    ("wandb_project", Renamed("wandb.project")),
    ("wandb_entity wandb_org", Renamed("wandb.entity")),
    ("wandb use_wandb wandb_mode", Switch("wandb.enabled=true", "wandb.enabled=false")),
    ("no_wandb disable_wandb", Switch("wandb.enabled=false", "wandb.enabled=true")),
    (
        "report_to logger metric_logger tensorboard",
        Choice(TRACKERS, "use trackers, a list of wandb, tensorboard, trackio; metrics.jsonl gets every number"),
    ),
    (
        "logging_steps log_steps log_every_n_steps log_interval log_every",
        Note("metrics.jsonl gets every update; minimum_log_interval_secs limits the console and trackers"),
    ),
    ("eval_steps eval_interval eval_freq val_check_interval", Steps("eval_every")),
    (
        "eval_strategy evaluation_strategy evals_per_epoch",
        Note("use eval_every, the number of training examples between evaluations"),
    ),
    ("eval_on_start", Renamed("do_first_eval")),
    (
        "do_train do_eval",
        Note("a run both trains and evaluates; do_first_eval=false leaves out the evaluation before the first update"),
    ),
    ("save_steps save_interval save_freq checkpoint_every", Steps("save_every")),
    (
        "save_strategy saves_per_epoch",
        Note("evaluations write checkpoints; save_every, in training examples, adds others"),
    ),
    ("save_total_limit max_ckpt_num", Renamed("keep_checkpoints")),
    (
        "load_best_model_at_end early_stopping_patience",
        Note("not supported yet; the metrics.json of an evaluation's step-N/ shows which one is best"),
    ),
    (
        "resume_from_checkpoint auto_resume resume_from resume_path",
        Note("use resume=RUN, where RUN is a run directory, whose own settings hold"),
    ),
    ("hub_model_id hub_repo_id", Renamed("push_to_hub")),
    # Samples
    ("generate_during_eval", Renamed("sample_during_eval")),
    ("num_samples", Renamed("n_eval_model_samples")),
    ("temperature", Renamed("sample_temperature")),
    ("top_k", Renamed("sample_top_k")),
    ("top_p", Renamed("sample_top_p")),
)

ALIASES: dict[str, Answer] = {name: answer for names, answer in TABLE for name in names.split()}
