"""The training loop: BasicTrainer on one device, and its subclasses for several devices.

Read `train` and `train_step` first. FSDPTrainer and TensorParallelTrainer override how a module is prepared and copied,
how its gradient is clipped and how its state is stored, nothing else.
"""

import copy
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dpo.data.batches import Batch, BatchIterator
from dpo.data.examples import TokenizedExample
from dpo.distributed.process_group import ProcessGroup
from dpo.distributed.ranks import Ranks
from dpo.distributed.sharding import (
    Split,
    clip_gradient,
    copy_shards,
    distinct,
    no_weights,
    reshard,
    shard,
    weights_of_main,
    whole_tensors,
    without_weights,
)
from dpo.distributed.splitting import BatchSplitter, Microbatch
from dpo.distributed.tensor_parallel import parallelize
from dpo.model.accumulation import accumulate_in_place
from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.packing import PackedBatch, Packer
from dpo.model.reference_weights import ReferenceWeights
from dpo.model.routers import load_balancing_loss
from dpo.model.sampling import Sampler, distinct_prompts
from dpo.reporting.diagnosis import diagnose, diagnose_samples, diagnose_texts, lengths, log_ratios
from dpo.reporting.findings import findings
from dpo.reporting.metrics import BatchMetrics, MetricLogger, check_evaluation, check_finite, log_notes
from dpo.reporting.model_card import Outcome, model_card
from dpo.reporting.page import update_report
from dpo.reporting.stopping import Judge, Progress, Stop, resumed_notes
from dpo.reporting.utilization import Utilization, memory_use
from dpo.runs.checkpoints import fitting, mend_best, read_checkpoint, read_metrics, rewind
from dpo.runs.export import describe_export, export_dtype, upload
from dpo.runs.run_dir import RunDir, log_changes, read_environment
from dpo.runs.shards import load_shards
from dpo.runs.weights import AdapterWeights, AllWeights, TrainedWeights
from dpo.runs.writer import SAVING, CheckpointWriter
from dpo.settings.schema import Settings
from dpo.system.console import log_message, prefetch, progress, progress_bar
from dpo.system.devices import autocast, platform
from dpo.system.errors import RunError, Stopped, actionable_errors
from dpo.system.signals import Signals
from dpo.system.state import random_states, set_random_states
from dpo.system.stopwatch import Stopwatch
from dpo.system.threads import ThreadCheck
from dpo.training.first_update import FirstMargin, check_gradients, has_dropout, strict_autograd
from dpo.training.objectives import NO_SUMS, Context, Loss, Sums
from dpo.training.optimizers import OptimizerOptions, make_optimizer
from dpo.training.references import Reference, repeated, sums_of_logps
from dpo.training.schedules import make_scheduler
from losses import preference_loss  # noqa: F401  (the original's users import preference_loss from here)

COUNTERS = ("examples", "updates", "position", "next_eval")  # attributes that checkpoints keep
NO_MEMORY = "outside of a forward pass; a smaller model or fewer trained parameters need less"


@dataclass(frozen=True)
class Inputs:
    """What a run reads before any weights load."""

    device: torch.device
    model_config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    train_batches: BatchIterator
    eval_batches: BatchIterator
    stops: list[int]  # ids that end a turn in the conversations of the data, if there are any
    template_time: datetime | None = None  # that the chat template saw, if it reads the clock
    reference: ReferenceWeights | None = None  # if it does not start from the policy's weights
    warnings: list[str] = field(default_factory=list)


@dataclass
class Models:
    """The policy, its reference, and how both compute; build.py fills in the fields step by step."""

    policy: ResponseLogps
    adapter: AdapterWeights | None  # if it alone is trained
    packer: Packer
    dtype: torch.dtype  # of forward passes
    second: ResponseLogps | None = None  # if the reference is a second model
    reference_checksum: str | None = None  # of its weights, if it does not start from the policy's
    starts_equal: bool = True  # whether policy and reference have the same weights before the first update
    compiled: bool = False  # whether their layers are compiled
    reference: Reference | None = None
    sampler: Sampler = field(init=False)

    @property
    def weights(self) -> TrainedWeights:
        """What is trained, saved and exported."""
        return self.adapter or AllWeights(self.policy.model)


class BasicTrainer:
    """Trains a policy on one device."""

    def __init__(
        self,
        settings: Settings,
        loss: Loss,
        inputs: Inputs,
        models: Models,
        run: RunDir,
        logger: MetricLogger,
        signals: Signals,
    ):
        self.settings = settings
        self.loss = loss
        self.loss_state: Sums = {}  # what the loss keeps of earlier batches
        self.train_batches = inputs.train_batches
        self.eval_batches = inputs.eval_batches

        self.policy = models.policy
        self.routers: torch.Tensor | None = None  # the sums of the routers in the last microbatch, as in Logps
        self.router_weight = 0.0 if models.policy.router_loss is None else models.policy.router_loss.weight
        self.weights = models.weights
        self.reference = models.reference
        self.sampler = models.sampler
        self.packer = models.packer
        self.device = models.packer.device
        self.dtype = models.dtype

        self.run = run
        self.ranks = run.ranks
        self.logger = logger
        self.signals = signals
        self.writer = CheckpointWriter(run.path, run.ranks, settings)

        options = OptimizerOptions.of(settings, self.policy)
        self.optimizer = make_optimizer(settings.optimizer, self.policy.trained_parameters(), settings.lr, options)
        self.scheduler = make_scheduler(settings, self.optimizer, len(self.train_batches))

        self.clock = Stopwatch()
        self.utilization = Utilization(self.policy, self.reference, self.dtype, self.ranks.world_size)
        width = self.policy.model.config.get_text_config().hidden_size
        self.threads = ThreadCheck.of(width, self.dtype, self.device, None if settings.debug else run.path)

        self.examples = 0
        self.updates = 0
        self.position = dict(self.train_batches.position)  # after the last update
        self.next_eval: float = 0 if settings.do_first_eval else settings.eval_every
        self.next_save = next_multiple(0, settings.save_every)
        self.truncated: Counter[str] = Counter()
        self.first_margin: FirstMargin | None = None  # compares policy and reference before the first update
        self.advised = ""  # the rule that the last evaluation's advice came from
        self.judge = Judge(settings)
        self.progress = Progress()
        self.ends = False  # whether the next checkpoint is the last one
        self.gradients_checked = False  # checked once in every process, also in one that resumes a run

    # Modules and batches: trainers for several devices override the first three

    @staticmethod
    def prepare(module: ResponseLogps, settings: Settings, ranks: Ranks, dtype: torch.dtype) -> ResponseLogps:
        """Prepare the policy or the second model, before the optimizer gets the policy's parameters."""
        return accumulate_in_place(module)

    @staticmethod
    def copy(module: ResponseLogps) -> ResponseLogps:
        """Copy a module before it is prepared; the copy may lack weights until `copy_weights`."""
        return copy.deepcopy(module)

    @staticmethod
    def copy_weights(source: ResponseLogps, module: ResponseLogps) -> None:
        """Copy the weights of a prepared module to its prepared copy, if `copy` did not."""

    def split_batch(self, examples: Sequence[TokenizedExample], n_equal: int = 1) -> Iterator[Microbatch]:
        """Yield this rank's microbatches of a batch, first split into n_equal groups of equal size."""
        return BatchSplitter(self.packer, self.ranks)(examples, n_equal)

    def sums_of_logps(
        self, examples: Sequence[TokenizedExample], before_microbatch: Callable[[], None] = lambda: None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute log pi(response) of policy and reference, both (examples, n_responses), for `Loss.batch_sums`."""
        splitter = BatchSplitter(self.packer, self.ranks)
        return sums_of_logps(self.policy, self.reference, splitter, examples, before_microbatch)

    # Training

    def train(self) -> None:
        """Train on the remaining batches, evaluating and saving whenever due, then evaluate, save and export.

        An evaluation may end the run before that.
        """
        if self.reference is not None and not self.updates:
            if math.isinf(self.reference.start_tolerance) or not has_dropout(self.policy):
                self.first_margin = FirstMargin(self.reference, f"reference={self.settings.reference}")
        bar = progress_bar("training", "update", len(self.train_batches), initial=self.updates)
        with bar, actionable_errors(NO_MEMORY), strict_autograd(), self.signals.deferred(), self.writer:
            for batch in self.clock.waiting("data", prefetch(self.train_batches)):
                if self.eval_due() and self.evaluate_and_save() is not None:
                    return
                metrics = self.train_step(batch)
                self.log(metrics, thin=True)
                self.threads.after_update()
                if self.save_due():
                    self.save()
                self.writer.check()
                self.signals.check()
                bar.update()
                bar.set_postfix(loss=f"{metrics['loss/train']:.4g}", pairs_per_s=f"{metrics['examples_per_second']:.3}")
            self.evaluate_and_save(final=True)

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Update the policy once, by the gradient of the batch's weighted mean loss; return the update's metrics."""
        start = time.perf_counter()
        self.policy.train()
        metrics = BatchMetrics()
        with self.clock("forward_backward"), self.autocast():
            sums = self.loss.batch_sums(batch.examples, self.sums_of_logps)
            total_weight = sum(example.text.weight for example in batch.examples)
            routers = self.router_sums(batch)
            n_equal = self.settings.gradient_accumulation_steps
            for microbatch, scale, is_last in self.split_batch(batch.examples, n_equal):
                self.policy.set_requires_gradient_sync(is_last or self.settings.reduce_every_pass)
                with self.packer.memory_hint(microbatch):
                    losses = self.losses(microbatch, metrics if scale else None, sums)
                    loss = (losses * microbatch.weights).sum() * scale / total_weight
                    if self.routers is not None:
                        routers = self.routers.detach() if routers is None else routers  # of the only microbatch
                        loss = loss + self.router_weight * scale * load_balancing_loss(self.routers, routers)
                    loss.backward()
        with self.clock("forward_backward"):  # waits for a GPU, once per update
            (grad_norm,) = metrics.to_host(self.clip_gradient())
            check_finite(metrics, grad_norm, self.updates + 1, self.run.path, self.ranks)
            if not self.gradients_checked:
                self.gradients_checked = self.check_gradients(batch)
        with self.clock("optimizer"):
            lr = float(self.scheduler.get_last_lr()[0])
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
        self.examples += len(batch.examples)
        self.updates += 1
        if self.reference is not None:
            self.reference.after_update(self.updates)
        self.position = batch.position
        self.truncated.update(what for example in batch.examples for what in example.truncated)
        means = metrics.means("train", self.ranks)
        self.loss_state = self.loss.next_state(self.loss_state, means)
        seconds = time.perf_counter() - start
        return means | {
            "grad_norm": float(grad_norm),
            "lr": lr,
            "counters/examples": self.examples,
            "counters/updates": self.updates,
            **router_metrics(routers, "train"),
            **self.utilization(batch.examples, seconds),
        }

    def losses(self, batch: PackedBatch, metrics: BatchMetrics | None, sums: Sums = NO_SUMS) -> torch.Tensor:
        """Compute the losses of a microbatch, (examples,), and add its metrics, one value per example, to `metrics`.

        Sets `routers`.
        """
        with self.clock("reference"):
            reference_logps = None if self.reference is None else self.reference.logps(batch)
        policy_logps, context = response_logps(self.policy, batch), Context(batch.examples, sums, self.loss_state)
        losses, values = self.loss(policy_logps, reference_logps, context)
        if metrics is not None:
            metrics.add(batch.examples, values | log_ratios(policy_logps, reference_logps) | lengths(batch))
            if self.first_margin is not None and not self.updates and reference_logps is not None:
                self.first_margin.compare(policy_logps, reference_logps)
        self.routers = policy_logps.routers
        return losses

    @torch.no_grad()
    def router_sums(self, batch: Batch) -> torch.Tensor | None:
        """Compute the sums of the routers over a whole batch, as in Logps.

        None without their loss, or if the batch is a single microbatch, which has them.
        """
        if not self.router_weight:
            return None
        microbatches = list(self.split_batch(batch.examples, self.settings.gradient_accumulation_steps))
        if len(microbatches) == 1 and self.ranks.data_size == 1:
            return None
        computed = []
        for microbatch, scale, _ in microbatches:
            with self.packer.memory_hint(microbatch):
                routers = response_logps(self.policy, microbatch).routers
            if scale and routers is not None:
                computed.append(routers)
        return sum_over_ranks(computed, self.ranks)

    def check_gradients(self, batch: Batch) -> bool:
        """Check that every trained parameter has a gradient; False if the next update must be checked instead."""

        def compute_logps() -> torch.Tensor:
            with self.autocast():
                microbatches = self.split_batch(batch.examples, self.settings.gradient_accumulation_steps)
                return torch.cat([response_logps(self.policy, each.batch).sums for each in microbatches])

        return check_gradients(self.policy, compute_logps, self.ranks)

    def clip_gradient(self) -> torch.Tensor:
        """Clip the gradient to max_grad_norm, and return its norm before clipping."""
        return torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm)

    def autocast(self) -> torch.autocast:
        """Compute in self.dtype if parameters are in float32; one context per update casts each weight once."""
        return autocast(self.policy.model.dtype, self.dtype, self.device)

    # Evaluation and samples

    def eval_due(self) -> bool:
        """Whether eval_every examples have been trained on since the last evaluation."""
        return self.examples >= self.next_eval

    def save_due(self) -> bool:
        """Whether a signal asks for a checkpoint, or save_every is reached and no evaluation is about to save."""
        evaluates = self.eval_due() or self.updates == len(self.train_batches)
        requested = self.signals.pop_save() or self.signals.stop is not None
        return requested or (self.examples >= self.next_save and not evaluates)

    def evaluate_and_save(self, final: bool = False) -> Stop | None:
        """Evaluate, sample and write a checkpoint; return why the evaluation ends the run, if it does."""
        before = self.logger.sizes()
        try:
            metrics = self.evaluate()
            if self.settings.sample_during_eval:
                metrics |= self.sample()
            self.log(metrics)
            self.update_report()
        except Stopped:  # the resumed run repeats the evaluation
            self.save(logs=before)
            raise
        log_notes(self.truncated, self.examples, None if final else self.advice(metrics))
        judge = partial(self.judge, self.progress, self.examples, self.updates, metrics)
        progress, stop = self.ranks.run_on_main(judge)
        if final and stop is not None and not stop.is_bad:
            stop = None  # the run is complete anyway
        if stop is not None and stop.is_bad:
            self.go_back(stop)
        elif final or stop is not None:
            # not part of a longer run's schedule; and a run that is killed before its export repeats it
            self.ends = True
            self.save(metrics, logs=before, progress=progress)
            self.export(metrics)
        else:
            self.next_eval = next_multiple(self.examples, self.settings.eval_every)
            self.progress = progress
            self.save(metrics)
            return None
        self.close(stop, progress)
        return stop

    def update_report(self) -> None:
        """Write report.html, if it is wanted."""
        if self.settings.report:
            self.ranks.run_on_main(lambda: update_report(self.run.path))

    def advice(self, metrics: dict[str, float]) -> str | None:
        """The most important finding of an evaluation, once; the end of the run lists all."""
        sizes = {"pairs": n_evaluated(self), "samples": self.settings.n_eval_model_samples, "updates": self.updates}
        found = findings(metrics | sizes) if self.updates else []
        new = found[0] if found and found[0].rule.name != self.advised else None
        self.advised = found[0].rule.name if found else ""
        return None if new is None else str(new)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Compute mean metrics and the diagnosis, and log each pair; RunError if the loss is not finite."""
        self.policy.eval()
        metrics = BatchMetrics()
        routers: list[torch.Tensor] = []
        with self.clock("evaluation"), self.autocast(), repeated(self.reference):
            examples = (example for batch in self.eval_batches.from_start() for example in batch.examples)
            sums = self.loss.batch_sums(examples, partial(self.sums_of_logps, before_microbatch=self.signals.check))
            for batch in progress(self.eval_batches.from_start(), "evaluating"):
                self.signals.check()
                for microbatch, scale, _ in self.split_batch(batch.examples):
                    with self.packer.memory_hint(microbatch):
                        self.losses(microbatch, metrics if scale else None, sums)
                        if scale and self.routers is not None:
                            routers.append(self.routers)
        metrics = metrics.gathered(self.ranks)
        means = metrics.means("eval")
        check_evaluation(means["loss/eval"], self.examples)
        self.logger.log_pairs(self.examples, metrics)
        return means | router_metrics(sum_over_ranks(routers, self.ranks), "eval") | diagnose(metrics)

    def sample(self) -> dict[str, float]:
        """Log samples of policy and reference, always for the same prompts, and compute their metrics."""
        prompts = distinct_prompts(self.eval_batches, self.settings.n_eval_model_samples)
        with self.clock("sampling"), self.autocast():
            samples = {"policy": self.sampler.sample(self.policy.model, prompts, "sampling the policy")}
            if self.reference is not None:
                samples["reference"] = self.reference.generate(prompts)
            self.logger.log_samples(self.examples, samples)
            splitter = BatchSplitter(self.packer, self.ranks)
            figures = diagnose_samples(samples, self.policy, self.reference, splitter)
        return figures | diagnose_texts(samples, self.sampler.stop_ids)

    # The end

    def go_back(self, stop: Stop) -> None:
        """Export the last checkpoint that an evaluation found good, and make it the newest one."""
        if not self.settings.debug:
            self.writer.wait()
            self.ranks.run_on_main(lambda: rewind(self.run.path, stop.step))
            if stop.step is not None:
                self.export_stored(f"step-{stop.step}", "at the last evaluation before `stop_if` ended the run")

    def close(self, stop: Stop | None, progress: Progress) -> None:
        """Export the best checkpoint, and record why an evaluation ended the run; RunError if nothing is exported."""
        if progress.best_step is not None:
            log_message(f"Best evaluation: {progress.describe_best()}.")
            self.export_stored(f"step-{progress.best_step}", f"at the best evaluation by `keep_best={progress.metric}`")
        if stop is not None:
            self.ranks.run_on_main(lambda: stop.write(self.run.path))
            self.update_report()
            stop.report(self.run.path)

    # State

    def save(
        self,
        metrics: dict[str, float] | None = None,
        logs: list[int] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Write a checkpoint, with the metrics of its evaluation, if any.

        logs: the sizes in bytes to which a resumed run cuts the log files, by default their current sizes. progress:
        what a last evaluation has shown, which a resumed run repeats.
        """
        if self.settings.debug or not self.examples:
            return
        self.next_save = next_multiple(self.examples, self.settings.save_every)
        with self.clock("saving"), actionable_errors(SAVING):
            states = self.state_dict(self.logger.sizes() if logs is None else logs)
            best, good = (progress or self.progress).best_step, (progress or self.progress).good_step
            blocking = self.ends or self.updates == len(self.train_batches)
            self.writer.write(self.examples, states, metrics or {}, best, good, blocking=blocking)

    def export(self, metrics: dict[str, float]) -> None:
        """Write the model for from_pretrained to LATEST/hf, and upload it if push_to_hub is set."""
        if not self.settings.debug:
            self.export_to((self.run.path / "LATEST").resolve() / "hf", outcome(self, metrics))

    def export_stored(self, name: str, when: str) -> None:
        """Write the model of an earlier checkpoint to its hf/, unless that exists; `when` is for the model card.

        The trainer has its weights afterwards. RunError if the checkpoint is damaged.
        """
        folder = (self.run.path / name).resolve()
        if self.ranks.run_on_main(lambda: (folder / "hf").exists()):
            return
        states = self.ranks.run_on_main(lambda: read_checkpoint(folder))
        if isinstance(states, str):
            raise RunError(f"{folder}: cannot be exported: {states}", "no checkpoint")
        self.load_tensors(states)
        counters, metrics = states["run"]["counters"], self.ranks.run_on_main(lambda: read_metrics(folder))
        facts = replace(outcome(self, metrics), examples=counters["examples"], updates=counters["updates"], when=when)
        self.export_to(folder / "hf", facts)

    def export_to(self, folder: Path, facts: Outcome) -> None:
        """Write the model for from_pretrained to a folder; upload it if push_to_hub is set, and LATEST leads to it."""
        weights, dtype = self.full_weights(), export_dtype(self.settings, self.dtype)
        card = model_card(self.settings, self.loss, facts, dtype)

        def write() -> None:
            self.weights.export(folder, self.sampler.tokenizer, card, weights, dtype)
            log_message(describe_export(folder, self.policy.model.dtype))
            if folder.parent == (self.run.path / "LATEST").resolve():
                upload(folder, self.settings.push_to_hub)

        self.ranks.run_on_main(write)

    def state_dict(self, logs: list[int]) -> dict[str, Any]:
        """Everything that a resumed run needs: the states of policy, optimizer and scheduler, and of the run."""
        run = {
            "counters": {name: getattr(self, name) for name in COUNTERS},
            "truncated": dict(self.truncated),
            "loss": dict(self.loss_state),
            "reference": {} if self.reference is None else self.reference.state_dict(),
            "progress": self.progress.state_dict(),
            "logs": logs,
            "random": random_states(),
            "fingerprints": self.run.fingerprints,
            "environment": environment(self),
            "stops": list(self.sampler.stops),  # this and the next for tools/export.py
            "n_evaluated": n_evaluated(self),
        }
        return self.tensors() | {"scheduler": self.scheduler.state_dict(), "run": run}

    def tensors(self) -> dict[str, Any]:
        """The states of policy and optimizer."""
        return {"policy": self.weights.state_dict(), "optimizer": self.optimizer.state_dict()}

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """The whole weights to export, on the main rank, if the model holds only a shard of them; else None."""
        return None

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Continue from the states of a checkpoint; RunError if they do not have the form of `state_dict`."""
        with fitting(self.run.path):
            run = states["run"]
            self.load_tensors(states)
            self.scheduler.load_state_dict(states["scheduler"])
            for name in COUNTERS:
                setattr(self, name, run["counters"][name])
            self.train_batches.position = dict(self.position)
            self.next_save = next_multiple(self.examples, self.settings.save_every)
            self.truncated = Counter(run["truncated"])
            self.loss_state = dict(run.get("loss", {}))  # checkpoints of earlier versions have none
            if self.reference is not None:
                self.reference.load_state_dict(run.get("reference", {}))
            self.progress = self.load_progress(run.get("progress", {}))  # checkpoints of earlier versions have none
            self.logger.cut(run["logs"])
            log_changes(read_environment(states), environment(self))
            set_random_states(run["random"])

    def load_progress(self, state: dict[str, Any]) -> Progress:
        """Read what evaluations have shown from a checkpoint, and mend BEST.

        The state does not know the last evaluation of a run, which wrote it: a longer run does not repeat that.
        """
        progress, criterion = Progress.load(state, self.settings.keep_best), self.judge.criterion
        metrics = self.ranks.run_on_main(lambda: read_metrics(self.run.path / f"step-{self.examples}"))
        if metrics:
            progress = replace(progress, good_step=self.examples)
        if progress.metric is not None and criterion is not None:
            value = metrics.get(criterion.name, math.nan)
            if criterion.is_better(value, progress.best):
                progress = replace(progress, best=value, best_step=self.examples, waited=0)
        for note in resumed_notes(self.settings, progress.first):
            log_message(note)
        if criterion is None or self.ranks.run_on_main(lambda: mend_best(self.run.path, progress.best_step)):
            return progress
        log_message(f"step-{progress.best_step}, the best checkpoint, is gone; the best one from now on is kept.")
        return replace(progress, best=None, best_step=None)

    def load_tensors(self, states: dict[str, Any]) -> None:
        """Load the states of policy and optimizer."""
        self.weights.load_state_dict(states["policy"], f"resume={self.run.path}")
        self.optimizer.load_state_dict(states["optimizer"])

    def log(self, metrics: dict[str, float], thin: bool = False) -> None:
        """Log metrics with the numbers of examples and updates, the seconds per activity and the peak memory."""
        if self.first_margin is not None:
            self.first_margin.close(self.ranks)
        usage = self.clock.pop() | memory_use(self.device, self.ranks)
        self.logger.log({"examples": self.examples, "updates": self.updates} | metrics | usage, thin)


def next_multiple(n: int, interval: int | None) -> float:
    """The next multiple of an interval above n; infinity for None."""
    return math.inf if interval is None else (n // interval + 1) * interval


def environment(trainer: BasicTrainer) -> dict[str, Any]:
    """Everything that determines a trainer's rounding; checkpoints store it."""
    return platform(trainer.device) | {
        "threads": torch.get_num_threads(),
        "world_size": trainer.ranks.world_size,
        "data_size": trainer.ranks.data_size,
        "layout": trainer.packer.layout,
        "attention": trainer.policy.model.config._attn_implementation,
        "dtype": str(trainer.dtype),
        "max_tokens_per_pass": trainer.packer.max_tokens,
        "activation_checkpointing": trainer.settings.activation_checkpointing,
    }


def sum_over_ranks(microbatches: Sequence[torch.Tensor], ranks: Ranks) -> torch.Tensor | None:
    """Sum tensors of one shape over the microbatches of all ranks; None if there are none."""
    shares = ranks.gather_shares([one.cpu() for one in microbatches])
    every = [one for share in shares for one in share]
    return torch.stack(every).double().sum(0).float().to(microbatches[0].device) if every else None


def router_metrics(routers: torch.Tensor | None, split: str) -> dict[str, float]:
    """The load-balancing loss of a whole batch or evaluation, from the sums of its routers."""
    return {} if routers is None else {f"router_loss/{split}": load_balancing_loss(routers, routers).item()}


def outcome(trainer: BasicTrainer, metrics: dict[str, float]) -> Outcome:
    """The facts of a run for its model card."""
    name, fingerprints = trainer.run.config.loss.name, trainer.run.fingerprints
    return Outcome(name, trainer.examples, trainer.updates, n_evaluated(trainer), metrics, fingerprints)


def n_evaluated(trainer: BasicTrainer) -> int:
    return min(trainer.eval_batches.n_items, trainer.settings.n_eval_examples)


# Trainers for several devices

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class FSDPTrainer(BasicTrainer):
    """Trains a policy that is sharded over the devices of several processes."""

    ranks: ProcessGroup

    @staticmethod
    def prepare(
        module: ResponseLogps, settings: Settings, ranks: Ranks, dtype: torch.dtype, split: Split = lambda modules: None
    ) -> ResponseLogps:
        """Shard the parameters; the main rank has the weights, or no rank has them yet, as in a copy."""
        assert isinstance(ranks, ProcessGroup)
        has_weights = ranks.run_on_main(lambda: not any(parameter.is_meta for parameter in module.parameters()))
        weights = weights_of_main(torch.device(ranks.device_type)) if has_weights else no_weights
        if settings.lora is not None and settings.lora.use_dora:
            dtype = module.model.dtype  # autocast does not cast the weights whose norms DoRA computes
        return shard(module, ranks.mesh, dtype, settings.model.block_name, weights, split)

    copy = staticmethod(without_weights)
    copy_weights = staticmethod(copy_shards)

    def clip_gradient(self) -> torch.Tensor:
        """Clip the gradient of all shards, and return the norm of the whole."""
        return clip_gradient(self.policy.trained_parameters(), self.settings.max_grad_norm)

    def tensors(self) -> dict[str, Any]:
        """The shards of policy and optimizer that this rank writes, and the other values of the optimizer."""
        tensors, values = self.sharded_state()
        states = {"shards": tensors, "values": values}
        if self.settings.keep_policies or self.ends or self.updates == len(self.train_batches):
            states["policy"] = self.weights.state_dict(whole_tensors(self.weights.tensors(), self.ranks.is_main))
        return states

    def sharded_state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors of policy and optimizer under distinct names, and the other values of the optimizer."""
        reshard(self.policy)
        state: dict[str, Any] = get_optimizer_state_dict(self.policy, self.optimizer, options=FLAT)
        tensors = {f"optimizer.{name}": value for name, value in state.items() if isinstance(value, torch.Tensor)}
        tensors |= {f"policy.{name}": value.detach() for name, value in distinct(self.weights.tensors()).items()}
        return tensors, {name: value for name, value in state.items() if not isinstance(value, torch.Tensor)}

    def state_dict(self, logs: list[int]) -> dict[str, Any]:
        """Everything that a resumed run needs, with the random states of all ranks."""
        states = super().state_dict(logs)
        states["run"] |= {"optimizer": states.pop("values"), "ranks": self.ranks.gather(random_states())}
        return states

    def load_state_dict(self, states: dict[str, Any]) -> None:
        """Continue from the states of a checkpoint, which may come from another number of ranks."""
        super().load_state_dict(states)
        stored = states["run"]["ranks"]
        set_random_states(stored[self.ranks.rank % len(stored)])

    def load_tensors(self, states: dict[str, Any]) -> None:
        """Read this rank's shards of policy and optimizer."""
        tensors, _ = self.sharded_state()
        load_shards(tensors, states["shards"])
        optimizer = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
        set_optimizer_state_dict(self.policy, self.optimizer, optimizer | states["run"]["optimizer"], options=FLAT)

    def full_weights(self) -> dict[str, torch.Tensor]:
        """Gather what is exported on the main rank's host."""
        return whole_tensors(self.weights.tensors_to_export(), self.ranks.is_main)


class TensorParallelTrainer(FSDPTrainer):
    """Splits every layer over the ranks of a group, and shards parameters over such groups."""

    @staticmethod
    def prepare(
        module: ResponseLogps, settings: Settings, ranks: Ranks, dtype: torch.dtype, split: Split | None = None
    ) -> ResponseLogps:
        assert isinstance(ranks, ProcessGroup)
        split = split or partial(parallelize, module.model, ranks.mesh["tensor"])
        return FSDPTrainer.prepare(module, settings, ranks, dtype, split)


TRAINERS: dict[str, type[BasicTrainer]] = {
    trainer.__name__: trainer for trainer in (BasicTrainer, FSDPTrainer, TensorParallelTrainer)
}
