"""The training loop. BasicTrainer runs on one device; read `train` and `train_step` first."""

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch._dynamo.exc import TorchDynamoException
from tqdm import tqdm
from transformers import GenerationConfig

from checkpoints import (
    export_model,
    load_weights,
    random_states,
    save_checkpoint,
    set_random_states,
    weights_checksum,
)
from losses import LOSSES, preference_loss  # noqa: F401  (the original's users import preference_loss from here)
from packing import (
    Float32Head,
    Layout,
    attention_kinds,
    check_layout,
    compile_layers,
    find_head,
    make_passes,
    recompute_activations,
    sequence_logps,
    torch_attention,
    use_attention,
)
from preference_datasets import START, Batch, BatchIterator, Example
from references import LiveReference, ReferenceTable, fingerprint
from utils import (
    MetricLogger,
    RunError,
    Signals,
    Stopped,
    UserError,
    compute_dtype,
    device_name,
    first_line,
    lacks_memory,
    local_dir,
    prefetch,
    progress,
    say,
    tokens_per_pass,
)

NUMBERS = 3  # in the key of a table of log-probabilities; raise it where the code begins to give others
COUNTERS = ("examples", "updates", "position", "next_eval")  # of a trainer, kept in its checkpoints


class BasicTrainer:
    """Trains a policy on one device, by SFT or from preferences, as config.loss says."""

    def __init__(
        self,
        policy: torch.nn.Module,
        config: Any,
        seed: int,
        run_dir: str | Path,
        reference_model: torch.nn.Module | None = None,
        *,
        tokenizer: Any,
        train_batches: BatchIterator,
        eval_batches: BatchIterator,
        logger: MetricLogger,
        signals: Signals | None = None,
        identity: dict[str, str] | None = None,
    ):
        self.policy, self.tokenizer = policy, tokenizer
        self.config, self.seed, self.run_dir, self.logger = config, seed, Path(run_dir), logger
        self.train_batches, self.eval_batches, self.signals = train_batches, eval_batches, signals or Signals()
        self.device = next(policy.parameters()).device
        self.dtype = compute_dtype(config.precision, policy.dtype, self.device)
        self.loss = LOSSES[config.loss.name](config.loss)
        self.layout = self.checked_layout(reference_model)
        self.max_tokens = tokens_per_pass(config.max_tokens_per_pass, self.device)
        self.head = find_head(policy)
        if config.compile:
            compile_layers(policy)
        self.reference = None if reference_model is None else self.live_reference(reference_model)
        self.wants_table = self.loss.needs_reference and reference_model is None
        if self.wants_table and self.head is not None and self.dtype != torch.float32:
            self.head = Float32Head(self.head)  # later epochs meet the table's numbers in other passes
        self.optimizer = getattr(torch.optim, config.optimizer)(policy.parameters(), lr=config.lr)
        warmup = config.warmup_steps
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda t: min(1.0, (t + 1) / (warmup + 1)))
        if config.activation_checkpointing and not policy.supports_gradient_checkpointing:
            raise UserError("activation_checkpointing=true: this kind of model does not support it; set it to false")
        if config.activation_checkpointing:
            recompute_activations(policy)
        self.examples = self.updates = 0
        self.position = dict(START)  # of train_batches, after the last update
        self.next_eval = 0 if config.do_first_eval else config.eval_every
        self.next_save = self.following(config.save_every)
        self.truncated: Counter[str] = Counter()
        self.reference_samples: list[str] | None = None
        # What a resumed run must find again, as fingerprints.
        data = {"the training data": train_batches.fingerprint(), "the evaluation data": eval_batches.fingerprint()}
        self.identity = {**(identity or {}), **data}
        if self.loss.needs_reference:
            self.identity["the reference's weights"] = weights_checksum(policy)
        self.doing: Layout | str = "before the first pass; a smaller model, or model.policy_dtype=bfloat16, needs less"

    def live_reference(self, model: torch.nn.Module) -> LiveReference:
        """Return the reference as a second model, which computes in its own dtype where autocast is off."""
        return LiveReference(model, self.dtype if self.dtype != self.policy.dtype else model.dtype, self.config.compile)

    def checked_layout(self, reference_model: torch.nn.Module | None) -> str:
        """Return the layout to use: config.layout, or padded where the models would not compute the same with it."""
        layout, config = self.config.layout, self.config
        if layout == "padded":
            return layout
        batch = next(iter(replace(self.eval_batches, position=dict(START))))
        models = [model for model in (self.policy, reference_model) if model is not None]
        for kind in attention_kinds(self.device):
            try:
                for model in models:
                    use_attention(model, kind)
            except (ValueError, ImportError) as error:  # this kind of model has no such attention
                say(f"Attention is not {kind}: {first_line(error)}")
                continue
            problem = check_layout(self.policy, batch.examples[:3], layout, config.max_length, self.dtype)
            if problem is None:
                return layout
            say(f"layout={layout} cannot be used with {kind} attention: {problem}.")
        say("Using layout=padded.")
        for model in models:
            use_attention(model, "sdpa")
        return "padded"

    # Training

    def train(self) -> None:
        """Walk the batches to the end, evaluating and saving whenever due."""
        with self.failures_told():
            if self.wants_table and self.reference is None:
                self.reference = self.precompute_reference()
            with self.signals.deferred():
                self.walk()
                self.evaluate_and_save(final=True)

    def walk(self) -> None:
        """Update the policy on each batch that is left."""
        total = len(self.train_batches)
        bar = tqdm(desc="training", unit="update", dynamic_ncols=True, disable=None, initial=self.updates, total=total)
        for batch in prefetch(self.train_batches):
            if self.eval_is_due():
                self.evaluate_and_save()
            metrics = self.train_step(batch)
            self.log(metrics, thin=True)
            if self.save_is_due():
                self.save()
            self.signals.check()
            bar.update()
            bar.set_postfix(loss=f"{metrics['loss/train']:.4g}", pairs_per_s=f"{metrics['examples_per_second']:.3g}")
        bar.close()

    def train_step(self, batch: Batch) -> dict[str, float]:
        """Update the policy once by the gradient of the batch's mean loss, and return the update's metrics."""
        start = time.perf_counter()
        self.policy.train()
        metrics = Metrics()
        with self.autocast():
            for layout in self.passes(batch.examples, self.config.gradient_accumulation_steps):
                losses = self.losses(layout, metrics)
                (losses.sum() / len(batch.examples)).backward()
        grad_norm = self.clip_gradient()
        self.check_finite(metrics, grad_norm)
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        self.examples += len(batch.examples)
        self.updates += 1
        self.position = batch.position
        self.truncated.update(what for example in batch.examples for what in example.cut)
        means = metrics.means("train")  # reading them waits for the device, so the clock is read after it
        seconds = time.perf_counter() - start
        return means | {
            "grad_norm": float(grad_norm),
            "lr": lr,
            "examples_per_second": len(batch.examples) / seconds,
            "tokens_per_second": sum(map(len, batch.examples)) / seconds,
            "counters/examples": self.examples,
            "counters/updates": self.updates,
        }

    def passes(self, examples: Sequence[Example], n_microbatches: int = 1) -> Iterator[Layout]:
        """Yield the forward passes of a batch, on the device."""
        size = -(-len(examples) // n_microbatches)
        parts = (examples[start : start + size] for start in range(0, len(examples), size))
        layouts = (layout for part in parts for layout in make_passes(part, self.layout, self.max_tokens))
        for layout in layouts:
            self.doing = layout
            yield layout.to(self.device)

    def losses(self, layout: Layout, metrics: "Metrics") -> torch.Tensor:
        """Return the losses of a pass, (examples,), and add its metrics, one value an example."""
        reference_logps = None if self.reference is None else self.reference.logps(layout)
        logps = sequence_logps(self.policy, layout, self.head)
        losses, values = self.loss.compute(logps, reference_logps, layout.lengths)
        sides = ("chosen", "rejected")
        values |= {
            f"lengths/{side}": lengths for side, lengths in zip(sides, layout.lengths.float().unbind(1), strict=False)
        }
        metrics.add(layout.examples, values)
        return losses

    def check_finite(self, metrics: "Metrics", grad_norm: torch.Tensor) -> None:
        """Stop before the update where the loss or the gradient is not finite; write the batch to the run's folder."""
        losses = torch.cat(metrics.values["loss"])
        if torch.cat((losses, grad_norm.reshape(1).to(losses))).isfinite().all():
            return
        path = self.run_dir / f"not-finite-update-{self.updates + 1}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in metrics.rows()), encoding="utf-8")
        told = f"loss {losses.mean():.4g}, gradient's norm {grad_norm:.4g}"
        remedy = "look at its rows, or begin a new run with a lower lr or with precision=float32"
        raise RunError(
            f"update {self.updates + 1} is not finite ({told}), so it was not made; {path}: {remedy}", "not finite"
        )

    @contextmanager
    def failures_told(self) -> Iterator[None]:
        """Turn a lack of memory, or a failure to compile, into one line that says which setting to change."""
        try:
            yield
        except TorchDynamoException as error:
            told = f"compile=true: the model cannot be compiled here ({first_line(error)})"
            raise UserError(f"{told}; set it to false") from None
        except (RuntimeError, MemoryError, OSError) as error:
            if not lacks_memory(error):
                raise
            reason = first_line(error)
            raise RunError(f"out of memory {self.what_was_done()} ({reason})", "memory") from None

    def what_was_done(self) -> str:
        """Describe the current pass, and the settings that make it smaller, also as the run is resumed."""
        if isinstance(self.doing, str):
            return self.doing
        n, longest = len(self.doing.examples), max(map(len, self.doing.examples))
        smaller = f"max_tokens_per_pass, which is {self.max_tokens}" if n > 1 else "max_length in a new run"
        tokens = self.doing.inputs["input_ids"].numel()
        size = f"in a pass of {tokens:,} tokens, {n} examples, the longest of {longest:,} tokens"
        return f"{size}; lower {smaller}, or set activation_checkpointing=true"

    @torch.no_grad()
    def precompute_reference(self) -> ReferenceTable:
        """Return the table of the reference's log-probabilities, computed by the policy while it still is that.

        It walks the very passes of the first epoch and of the evaluation, so these get the numbers that a live
        reference would give; what the first epoch left out and a later one needs is laid out by itself.
        """
        train, test = (replace(batches, position=dict(START)) for batches in (self.train_batches, self.eval_batches))
        parts, size = self.config.gradient_accumulation_steps, train.batch_size
        train_items = [item for group in train.groups for item in group]
        table = ReferenceTable(
            [*train_items, *(item for group in test.groups for item in group)], self.loss.n_responses
        )
        kind = (self.dtype, self.device.type, self.config.compile, type(self.head))
        how = (NUMBERS, parts, self.layout, self.max_tokens, *kind)
        settings = (train.settings(), test.settings(), how, torch.__version__, transformers.__version__)
        key = fingerprint(self.policy, table.row, settings)
        cached = Path(local_dir(self.config.local_dirs)) / "reference_cache" / f"{key}.pt"
        own = self.run_dir / "reference.pt"
        if self.config.sample_during_eval:
            self.reference_samples = self.generate(self.policy, self.sample_prompts(), "sampling the reference")
        found = next((path for path in (own, cached) if table.load(path, key)), None)
        if found is not None:
            say(f"Reference: log-probabilities taken from {found}")
        else:
            first_epoch = replace(train, n_epochs=1)
            for batch in progress(prefetch(first_epoch), "reference, training data", total=len(first_epoch)):
                self.fill(table, batch.examples, parts)
            for batch in progress(test, "reference, evaluation data"):
                self.fill(table, batch.examples)
            left = table.missing(train_items) if len(train) > train.batches_per_epoch else []
            for start in range(0, len(left), size):
                self.fill(table, train.tokenize(left[start : start + size]), parts)
            table.save(cached, key)
        if len(train) > train.batches_per_epoch:
            self.say_rounding(table, train)
        if found != own and not self.config.debug:
            table.save(own, key)
        return table

    def say_rounding(self, table: ReferenceTable, train: BatchIterator) -> None:
        """Print how far the numbers of a few examples move when they share no pass, as in later epochs' passes."""
        examples = next(iter(replace(train, position=dict(START)))).examples[:8]
        with self.autocast():
            layouts = [layout.to(self.device) for layout in make_passes(examples, self.layout, 1)]
            alone = [sequence_logps(self.policy, layout, self.head) for layout in layouts]
            apart = torch.cat([(a - table.logps(b)).abs().flatten() for a, b in zip(alone, layouts, strict=True)])
        say(f"Reference: other passes move a log-probability by {apart.mean():.2g} nats, at most {apart.max():.2g}.")

    def fill(self, table: ReferenceTable, examples: Sequence[Example], n_microbatches: int = 1) -> None:
        """Compute the examples' log-probabilities in the passes of a batch, and put them into the table."""
        with self.autocast():
            for layout in self.passes(examples, n_microbatches):
                table.fill(layout, sequence_logps(self.policy, layout, self.head))

    def clip_gradient(self) -> torch.Tensor:
        """Clip the gradient to max_grad_norm and return its norm before that."""
        return torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)

    def autocast(self, model: torch.nn.Module | None = None) -> AbstractContextManager:
        """Compute in self.dtype where the parameters are in float32; one context an update casts each weight once."""
        mixed = (model or self.policy).dtype == torch.float32 and self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype, enabled=mixed)

    # Evaluation, samples, checkpoints

    def following(self, interval: int | None) -> float:
        """Return the next multiple of an interval that the count of examples has yet to reach; never for None."""
        return math.inf if interval is None else (self.examples // interval + 1) * interval

    def eval_is_due(self) -> bool:
        """Tell whether the count of examples has passed a multiple of eval_every since the last evaluation."""
        return self.examples >= self.next_eval

    def save_is_due(self) -> bool:
        """Tell whether a signal asks for a checkpoint, or save_every was passed and no evaluation is about to save."""
        evaluates = self.eval_is_due() or self.updates == len(self.train_batches)
        asked = self.signals.take_save() or self.signals.stop is not None
        return asked or (self.examples >= self.next_save and not evaluates)

    def evaluate_and_save(self, final: bool = False) -> None:
        """Evaluate and sample, and write a checkpoint if an update was made and debug is not set."""
        before = self.logger.sizes()
        try:
            metrics = self.evaluate()
            if not math.isfinite(metrics["loss/eval"]):
                told = f"the evaluation after {self.examples:,} examples gave a loss of {metrics['loss/eval']}"
                raise RunError(f"{told}; nothing was saved since the last checkpoint", "not finite")
            self.log(metrics)
            if self.config.sample_during_eval:
                self.sample()
        except Stopped:  # a resumed run evaluates again, from the start
            self.save(logs=before)
            raise
        if self.truncated:
            cut = ", ".join(f"{what} {n:,}" for what, n in sorted(self.truncated.items()))
            say(f"Truncated so far, of {self.examples:,} training examples: {cut}")
        if final:  # a longer run would not know this evaluation, and one that was killed before the export repeats it
            self.save(metrics, logs=before)
            self.export()
        else:
            self.next_eval = self.following(self.config.eval_every)
            self.save(metrics)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the mean metrics of the evaluation examples."""
        self.policy.eval()
        metrics = Metrics()
        with self.autocast():
            for batch in progress(replace(self.eval_batches, position=dict(START)), "evaluating"):
                self.signals.check()
                for layout in self.passes(batch.examples):
                    self.losses(layout, metrics)
        return metrics.means("eval")

    @torch.no_grad()
    def sample(self) -> None:
        """Sample from the policy, and from the reference where there is one, for the same prompts every time."""
        prompts = self.sample_prompts()
        samples = {"policy": self.generate(self.policy, prompts, "sampling the policy")}
        if isinstance(self.reference, LiveReference) and self.reference_samples is None:
            self.reference_samples = self.generate(self.reference.model, prompts, "sampling the reference")
        if self.reference_samples is not None:  # the reference never changes, so neither do its samples
            samples["reference"] = self.reference_samples
        texts = [example.item.prompt for example in prompts]
        for who, answers in samples.items():
            rows = [
                {"examples": self.examples, "model": who, "prompt": prompt, "sample": answer}
                for prompt, answer in zip(texts, answers, strict=True)
            ]
            self.logger.log_samples(f"{who}_samples", rows)
        for i, prompt in enumerate(texts[:3]):
            said = "".join(f"\n  {who}: {answers[i].strip()}" for who, answers in samples.items())
            say(f"\n--- sample {i + 1}, after {self.examples:,} examples ---\n  prompt: {prompt.strip()}{said}")

    def sample_prompts(self) -> list[Example]:
        """Return the first n_eval_model_samples evaluation examples that have different prompts."""
        prompts: dict[str, Example] = {}
        for batch in replace(self.eval_batches, position=dict(START)):
            for example in batch.examples:
                prompts.setdefault(example.item.prompt, example)
            if len(prompts) >= self.config.n_eval_model_samples:
                break
        return list(prompts.values())[: self.config.n_eval_model_samples]

    def generate(self, model: torch.nn.Module, prompts: list[Example], title: str) -> list[str]:
        """Sample one continuation of each prompt, at most max_length tokens in all, with randomness of its own."""
        model.eval()
        size = self.config.eval_batch_size
        batches = [[example.prompt for example in prompts[i : i + size]] for i in range(0, len(prompts), size)]
        texts = []
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.autocast(model), plain_generation(model), torch_attention(model):
            torch.manual_seed(self.seed)
            self.doing = f"while sampling for {min(size, len(prompts))} prompts at a time; lower eval_batch_size"
            for batch in progress(batches, title):
                self.signals.check()
                width = max(map(len, batch))
                ids = torch.tensor([[self.pad_id] * (width - len(prompt)) + prompt for prompt in batch])
                mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
                inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
                output = model.generate(**inputs, generation_config=self.generation_config(width))
                texts += self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return texts

    @property
    def pad_id(self) -> int:
        """The id of padding, where there is none that of eos; it is always masked by position."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def generation_config(self, prompt_length: int) -> GenerationConfig:
        """Return the run's own sampling settings."""
        config = self.config
        return GenerationConfig(
            do_sample=True,
            temperature=config.sample_temperature,
            top_k=config.sample_top_k,
            top_p=config.sample_top_p,
            max_new_tokens=max(1, config.max_length - prompt_length),
            pad_token_id=self.pad_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )

    def save(self, metrics: dict[str, float] | None = None, logs: list[int] | None = None) -> None:
        """Write a checkpoint, of an evaluation if metrics are given.

        logs are the sizes of the log files to which a resumed run cuts them back, by default the present ones.
        """
        if self.config.debug or not self.examples:
            return
        self.next_save = self.following(self.config.save_every)
        self.doing = "while saving a checkpoint, which gathers all weights and the optimizer's state"
        states = {name: getattr(self, name).state_dict() for name in ("policy", "optimizer", "scheduler")}
        states["run"] = self.run_state(self.logger.sizes() if logs is None else logs)
        keep = (self.config.keep_checkpoints, self.config.keep_policies)
        say(f"Wrote {save_checkpoint(self.run_dir, self.examples, states, metrics or {}, *keep)}")

    def export(self) -> None:
        """Write the model for from_pretrained into the newest checkpoint, as LATEST/hf."""
        if not self.config.debug:
            export_model((self.run_dir / "LATEST").resolve() / "hf", self.policy, self.tokenizer)

    def run_state(self, logs: list[int]) -> dict[str, Any]:
        """Return all that a resumed run needs beside the policy, the optimizer and the scheduler."""
        counters = {name: getattr(self, name) for name in COUNTERS}
        surroundings = {
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "the number of threads": torch.get_num_threads(),
            "the device": device_name(self.device),
            "the layout": f"{self.layout}, {self.policy.config._attn_implementation} attention",
            "the dtype of the computation": str(self.dtype),
            "max_tokens_per_pass": self.max_tokens,
            "activation_checkpointing": self.config.activation_checkpointing,
        }
        return {
            "counters": counters,
            "truncated": dict(self.truncated),
            "logs": logs,
            "random": random_states(),
            "identity": self.identity,
            "surroundings": surroundings,
        }

    def restore(self, states: dict[str, Any]) -> None:
        """Take over the states of a checkpoint, before training.

        UserError if the settings, the data or the reference are others, RunError if the states have another form than
        a trainer writes.
        """
        try:
            for what, value in self.identity.items():
                if states["run"]["identity"][what] != value:
                    raise UserError(f"resume={self.run_dir}: {what} are not those that the run began with")
            with self.failures_told():
                if self.wants_table:
                    self.reference = self.precompute_reference()
            self.take_over(**states)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, UserError) or lacks_memory(error):
                raise
            told = f"{self.run_dir}: the checkpoint does not fit this run ({type(error).__name__}: {error})"
            raise RunError(told.splitlines()[0], "no checkpoint") from None

    def take_over(self, policy: Any, optimizer: Any, scheduler: Any, run: Any) -> None:
        """Load the states of a checkpoint's parts."""
        load_weights(self.policy, policy, f"resume={self.run_dir}")
        self.optimizer.load_state_dict(optimizer)
        self.scheduler.load_state_dict(scheduler)
        for name in COUNTERS:
            setattr(self, name, run["counters"][name])
        self.train_batches.position = dict(self.position)
        self.next_save = self.following(self.config.save_every)
        self.truncated = Counter(run["truncated"])
        self.logger.cut(run["logs"])
        now = self.run_state([])["surroundings"]
        changed = [f"{k} was {v}, is {now[k]}" for k, v in run["surroundings"].items() if now[k] != v]
        if changed:
            say(f"Not bit for bit what it would have been without the stop: {'; '.join(changed)}.")
        set_random_states(run["random"])

    def log(self, metrics: dict[str, float], thin: bool = False) -> None:
        """Log metrics with the counts of examples and updates."""
        self.logger.log({"examples": self.examples, "updates": self.updates} | metrics, thin)


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Take away the settings that came with the model, such as a repetition penalty, which generate would mix in."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class Metrics:
    """Collects one value an example for each metric, on the device, until their means are asked for."""

    def __init__(self):
        self.examples: list[Example] = []
        self.values: dict[str, list[torch.Tensor]] = defaultdict(list)

    def add(self, examples: Sequence[Example], values: dict[str, torch.Tensor]) -> None:
        """Add one tensor of shape (examples,) a metric."""
        self.examples += examples
        for name, value in values.items():
            self.values[name].append(value)

    def means(self, split: str) -> dict[str, float]:
        """Return the means over all examples under the original's names: rewards_train/chosen, loss/train."""
        means = {}
        for name, values in self.values.items():
            kind, slash, side = name.partition("/")
            name = f"{kind}_{split}/{side}" if slash else f"{kind}/{split}"
            means[name] = torch.cat(values).double().mean().item()
        return means

    def rows(self) -> list[dict[str, Any]]:
        """Return what is known of each example: where it comes from, its texts, and its metrics, as JSON has them."""
        values = {name: torch.cat(parts).tolist() for name, parts in self.values.items()}
        return [
            {"source": item.source, "row": item.row, "prompt": item.prompt, "responses": item.responses}
            | {name: column[i] if math.isfinite(column[i]) else str(column[i]) for name, column in values.items()}
            for i, item in enumerate(example.item for example in self.examples)
        ]
