"""The policies of the rounds: the first one, and the one that each round trains."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tools.candidates import Candidate, load_model
from tools.rounds.records import Prompt, Sample

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Policy:
    """A model to sample from.

    candidate  its weights and the settings of the rounds
    stops      stop tokens in addition to eos
    export     where `folder` writes the model if it is nowhere else
    """

    candidate: Candidate
    tokenizer: "PreTrainedTokenizerBase"
    stops: list[int]
    export: Path

    def load(self, device: "torch.device") -> "PreTrainedModel":
        """Load the policy for sampling, with its adapter if it has one."""
        return load_model(self.candidate, device)

    def folder(self) -> str:
        """The folder of the model for from_pretrained, or its name on the Hub, for programs that load it themselves.

        It is written to `export` if no other folder holds the policy's weights: with its adapter merged.
        """
        from dpo.runs.weights import base_name

        settings, weights = self.candidate.settings, self.candidate.weights
        if weights is not None:
            hf = weights.parent.resolve() / "hf"
            exported = hf if settings.lora is None else hf / "merged"
            if exported.is_dir():
                return str(exported)
        elif (settings.lora is None or settings.lora.path is None) and settings.model.tokenizer_name_or_path is None:
            # A new adapter changes nothing.
            if name := base_name(settings.model):
                return name
        self.write_export()
        return str(self.export.resolve())

    def write_export(self) -> None:
        """Write `export`, unless it is there."""
        import torch

        from dpo.model.archives import load_archive
        from dpo.model.loading import load_model_config, load_policy
        from dpo.model.refusals import count_embeddings
        from dpo.model.sampling import add_stops
        from dpo.runs.export import export_dtype, export_model
        from dpo.runs.weights import add_adapter
        from dpo.system.devices import compute_dtype, pick_device

        if self.export.is_dir():
            return
        settings, weights = self.candidate.settings, self.candidate.weights
        config, tokenizer = load_model_config(settings.model)
        model = load_policy(settings, config, torch.device("cpu"), count_embeddings(settings.model, config, tokenizer))
        merged = None
        if settings.lora is not None:
            adapter = add_adapter(model, settings)
            if weights is not None:
                adapter.load_state_dict(load_archive(str(weights)), str(weights))
            merged = adapter.merged_weights(model.state_dict())
        add_stops(model.generation_config, self.stops)
        parameters, device = getattr(torch, settings.model.policy_dtype), pick_device(settings.device)
        dtype = export_dtype(settings, compute_dtype(settings.compute_precision, parameters, device))
        self.export.parent.mkdir(parents=True, exist_ok=True)
        export_model(self.export, model, self.tokenizer, merged, dtype=dtype)


def sums_of_samples(
    policy: Policy, samples: Sequence[Sample], prompts: Iterable[Prompt], device: "torch.device"
) -> list[float]:
    """Compute log pi(response | prompt) of each sample's token ids at temperature 1, in nats, as training computes it.

    prompts has those of the samples, in any order. The policy is loaded, and freed in the end.
    """
    import torch

    from dpo.data.examples import TextExample, TokenizedExample
    from dpo.model.layout_check import LayoutChoice
    from dpo.model.loading import set_quantized_products
    from dpo.model.logps import ResponseLogps, response_logps
    from dpo.model.packing import Packer
    from dpo.system.devices import autocast, compute_dtype, read_facts, reset_peak_memory
    from dpo.training.budgets import estimate_memory, resolve_max_tokens
    from tools.rounds.devices import set_numerics

    settings, loss, facts = policy.candidate.settings, policy.candidate.loss, read_facts(device)
    dtype = compute_dtype(settings.compute_precision, getattr(torch, settings.model.policy_dtype), device)
    set_numerics(settings, str(device))
    by_id = {prompt.id: prompt for prompt in prompts}
    examples = []
    for i, sample in enumerate(samples):
        prompt = by_id[sample.prompt]
        text = TextExample(prompt.text, (sample.text,), "keep_end", 0, "")
        examples.append(TokenizedExample(text, prompt.ids, (sample.ids,), index=i))
    examples = [example for example in examples if example.responses[0]]
    model = policy.load(device).eval()
    set_quantized_products(model, dtype)
    module = ResponseLogps.wrap(model, float32_head=dtype != torch.float32)
    # One response per prompt shares nothing, so that another layout would only have to be checked.
    choice = LayoutChoice("padded", model.config._attn_implementation)
    estimate = partial(estimate_memory, module, settings, loss, dtype, choice)
    budget = settings.max_tokens_per_pass
    if budget == "auto":
        budget = "fit"  # which is resolved to the same number, without a message about the memory of training
    packer = Packer(choice.layout, resolve_max_tokens(budget, facts, estimate), device)
    sums = [0.0] * len(samples)  # that of a response without tokens
    with torch.no_grad(), autocast(model.dtype, dtype, device):
        for batch in packer(examples) if examples else ():
            with packer.memory_hint(batch):
                values = response_logps(module, batch).sums[:, 0].tolist()
            for example, value in zip(batch.examples, values, strict=True):
                sums[example.index] = value
    del model, module, estimate
    reset_peak_memory(device)
    return sums
