"""The whole evaluation of a policy against a reference, as a run evaluates itself, and more: see measures.py."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from build import load_inputs
from dpo.data.examples import TokenizedExample
from dpo.distributed.splitting import BatchSplitter
from dpo.model.attention import use_attention
from dpo.model.layout_check import choose_layout
from dpo.model.loading import set_quantized_products
from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.packing import Packer
from dpo.model.reference_weights import config_problems, tokens_needed
from dpo.model.sampling import Sampler, distinct_prompts
from dpo.reporting.diagnosis import diagnose, diagnose_samples, diagnose_texts, lengths, log_ratios
from dpo.reporting.findings import figures_of_pairs
from dpo.reporting.metrics import BatchMetrics, MetricLogger
from dpo.settings.schema import Settings
from dpo.system.console import progress
from dpo.system.devices import autocast, compute_dtype, limit_onednn_cache, read_facts
from dpo.system.errors import raise_problems
from dpo.training.budgets import estimate_memory, resolve_max_tokens
from dpo.training.objectives import Context, Loss
from dpo.training.references import ModelReference
from tools.diagnose.checkpoints import Checkpoint, Model, naming
from tools.diagnose.measures import (
    Formats,
    Tokens,
    bos_gap,
    distance_figures,
    position_figures,
    weight_figures,
)
from tools.diagnose.tokenizer_check import tokenizer_figures
from trainers import Inputs

N_TOGGLED = 64  # pairs for the figures that compute them in another form


@dataclass(frozen=True)
class Evaluation:
    """The two models of a diagnosis, loaded, with the data."""

    settings: Settings
    loss: Loss
    inputs: Inputs
    policy: ResponseLogps
    reference: ModelReference
    splitter: BatchSplitter
    sampler: Sampler

    @property
    def examples(self) -> list[TokenizedExample]:
        """The pairs that are evaluated."""
        return [example for batch in self.inputs.eval_batches.from_start() for example in batch.examples]

    def autocast(self) -> torch.autocast:
        return autocast(self.policy.model.dtype, self.sampler.dtype, self.inputs.device)

    @torch.no_grad()
    def evaluate(self, logger: MetricLogger, n_examples: int) -> dict[str, float]:
        """The figures of the pairs, which are logged as those of a run after n_examples."""
        metrics, start = BatchMetrics(), BatchMetrics()
        tokens = Tokens()
        with self.autocast():
            for batch in progress(self.inputs.eval_batches.from_start(), "evaluating"):
                for microbatch, _, _ in self.splitter(batch.examples):
                    with self.splitter.packer.memory_hint(microbatch):
                        policy, reference = response_logps(self.policy, microbatch), self.reference.logps(microbatch)
                    context = Context(microbatch.examples)
                    _, values = self.loss(policy, reference, context)
                    metrics.add(microbatch.examples, values | log_ratios(policy, reference) | lengths(microbatch))
                    start.add(microbatch.examples, self.loss(reference, reference, context)[1])
                    tokens.add(microbatch.examples, policy, reference)
        metrics = metrics.gathered(self.splitter.ranks)
        logger.log_pairs(n_examples, metrics)
        figures = metrics.means("eval") | {"first_loss": start.means("eval")["loss/eval"]} | diagnose(metrics)
        figures |= figures_of_pairs(metrics.rows())
        return figures | position_figures(tokens) | distance_figures(tokens)

    def sample(self, logger: MetricLogger, n_examples: int) -> dict[str, float]:
        """The figures of samples of both models for the same prompts, which are logged as those of a run."""
        prompts = distinct_prompts(self.inputs.eval_batches, self.settings.n_eval_model_samples)
        with self.autocast():
            samples = {
                "policy": self.sampler.sample(self.policy.model, prompts, "sampling the policy"),
                "reference": self.reference.generate(prompts),
            }
            logger.log_samples(n_examples, samples)
            figures = diagnose_samples(samples, self.policy, self.reference, self.splitter)
            of_reference = diagnose_samples(
                {"policy": samples["reference"]}, self.reference.module, None, self.splitter
            )
        figures["first_entropy_per_token"] = of_reference["diagnosis/entropy_per_token"]
        figures["empty_samples"] = float(np.mean([not one.text.responses[0].strip() for one in samples["policy"]]))
        return figures | diagnose_texts(samples, self.sampler.stop_ids) | {"samples": float(len(prompts))}

    @torch.no_grad()
    def toggle(self) -> dict[str, float]:
        """How much likelier the pairs are for the reference with another BOS, and in other formats of the prompt."""
        examples = self.examples[:N_TOGGLED]
        formats = Formats(self.inputs.tokenizer, self.inputs.eval_batches.tokenize, self.settings)
        with self.autocast():
            of_bos = bos_gap(examples, self.inputs.tokenizer, self.token_logps, self.settings.max_length)
            return of_bos | formats.gaps(examples, self.token_logps)

    def token_logps(self, examples: Sequence[TokenizedExample]) -> Tokens:
        """The reference's log-probability of each token of some examples."""
        tokens = Tokens()
        for microbatch, _, _ in self.splitter(examples):
            reference = self.reference.logps(microbatch)
            tokens.add(microbatch.examples, reference, reference)
        return tokens


def load(
    policy: Checkpoint, reference: Checkpoint, settings: Settings, loss: Loss
) -> tuple[Evaluation, dict[str, float]]:
    """Load data and models, with the figures of how they loaded; UserError names the argument that cannot be loaded."""
    limit_onednn_cache()
    with naming(policy.key, policy.name):
        inputs = load_inputs(settings, loss)
    check_vocabulary(reference, settings, inputs)
    device = inputs.device
    dtype = compute_dtype(settings.compute_precision, getattr(torch, settings.model.policy_dtype), device)
    trained, figures = policy.load(settings, device)
    original, _ = reference.load(settings, device)
    for model in (trained, original):
        set_quantized_products(model, dtype)
    figures |= weight_figures(trained, original)
    figures |= tokenizer_figures(policy, reference, trained, inputs)
    one, other = ResponseLogps.wrap(trained), ResponseLogps.wrap(original)
    one.with_collisions = loss.needs_collisions
    examples = next(iter(inputs.eval_batches.from_start())).examples
    choice = choose_layout(one, examples, settings.layout, settings.max_length, dtype)
    if choose_layout(other, examples, choice.layout, settings.max_length, dtype).layout != choice.layout:
        use_attention(trained, "sdpa")
        choice = choose_layout(one, examples, "padded", settings.max_length, dtype)
    for model in (trained, original):
        model.eval().requires_grad_(False)
    budget = resolve_max_tokens(
        settings.max_tokens_per_pass,
        read_facts(device),
        lambda: estimate_memory(one, settings, loss, dtype, choice, second=other),
    )
    sampler = Sampler.of(settings, inputs.tokenizer, device, dtype)
    sampler = replace(sampler, stops=inputs.stops)
    splitter = BatchSplitter(Packer(choice.layout, budget, device))
    kept = dtype if original.dtype == torch.float32 else original.dtype
    module = ModelReference(other, kept, sampler.fit(original))
    return Evaluation(settings, loss, inputs, one, module, splitter, sampler.fit(trained)), figures


def check_vocabulary(reference: Checkpoint, settings: Settings, inputs: Inputs) -> None:
    """Refuse a reference whose vocabulary or positions are too few for the tokens of the data."""
    if not isinstance(reference, Model):
        return
    from functools import partial

    from transformers import AutoConfig

    from dpo.model.pretrained import fetch

    config = fetch("reference", reference.name, partial(AutoConfig.from_pretrained, reference.name))
    needed = tokens_needed(settings, inputs.model_config, inputs.tokenizer)
    raise_problems([f"reference={reference.name}: {line}" for line in config_problems(config, settings, needed)])
