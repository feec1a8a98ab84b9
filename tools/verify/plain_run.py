"""The plain computation of a run's loss and gradient: with its policy, its reference and its loss."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoConfig

from dpo.data.examples import TokenizedExample
from dpo.model.loading import is_quantized
from dpo.model.logps import Logps
from dpo.model.lora import REFERENCE
from dpo.model.pretrained import auto_class
from dpo.runs.weights import AdapterWeights
from dpo.settings.constraints import START
from dpo.training.objectives import Context, LabelLoss, mismatch
from tools.verify import plain
from tools.verify.formulas import written_out
from tools.verify.plain import Precision, Result, Text, Tokens
from tools.verify.session import Session
from tools.verify.table import NotRun
from trainers import BasicTrainer


def texts_of(example: TokenizedExample) -> list[Text]:
    masks = example.loss_masks or [[True] * len(response) for response in example.responses]
    return [Text(example.prompt, *each) for each in zip(example.responses, masks, strict=True)]


class PlainRun:
    """The plain computation of a batch's loss and gradient, with the policy and the reference of a trainer.

    The reference has the weights of the files, or those that the policy has when this is made.
    """

    def __init__(self, session: Session, trainer: BasicTrainer):
        model = trainer.policy.model
        if is_quantized(model):
            raise NotRun("quantized weights have no exact values to compute with in another dtype")
        self.settings, self.loss, self.trainer = session.settings, session.loss, trainer
        self.loss_settings: dict[str, Any] = OmegaConf.to_container(session.config.loss)  # type: ignore[assignment]
        self.from_files = not (self.settings.model.archive or self.settings.model.from_scratch)
        own = self.settings.lora is not None and self.settings.lora.path is not None
        is_start = self.settings.reference == START and self.settings.model.reference_dtype is None and not own
        self.has_plain_reference = is_start or trainer.reference is None
        self.start = {} if self.from_files else {name: each.clone() for name, each in self.weights().items()}

        autocast = trainer.dtype if model.dtype == torch.float32 and trainer.dtype != torch.float32 else None
        self.own = Precision(None, autocast, torch.float32)  # that of the run
        more = torch.float64 if trainer.dtype == torch.float32 else torch.float32
        self.exact = Precision(more, None, torch.float64)

    def weights(self) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.trainer.policy.model.state_dict()
        return {name: value for name, value in state.items() if f".{REFERENCE}." not in name}

    def open(self, precision: Precision) -> Any:
        """The starting model: from its files, or with the starting weights of the run if there are no such files."""
        model, name = self.trainer.policy.model, self.settings.model.name_or_path
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        dtype = precision.weights or getattr(torch, self.settings.model.policy_dtype)
        n_embeddings = model.get_input_embeddings().get_parameter("weight").shape[0]
        source = name if self.from_files else config
        opened = plain.open_model(auto_class(config), source, dtype, self.trainer.device, n_embeddings)
        if self.start:
            base = {name.replace(".base_layer", ""): value for name, value in self.start.items()}
            plain.set_weights(opened, base, precision.weights)
        return opened

    def policy(self, precision: Precision, model: Any = None) -> Any:
        """The policy as it is now, made of a starting model if one is open."""
        model = self.open(precision) if model is None else model
        if isinstance(self.trainer.weights, AdapterWeights):
            plain.add_adapter(model, self.trainer.weights.shape.peft_config(model))
        plain.set_weights(model, self.weights(), precision.weights)
        return model

    def compute(self, examples: Sequence[TokenizedExample], precision: Precision) -> Result:
        others = mismatch(examples) if isinstance(self.loss, LabelLoss) else []  # whose sums the loss depends on
        texts, texts_of_others = ([texts_of(example) for example in each] for each in (examples, others))
        model = self.open(precision)
        reference: list[Tokens] = []  # of the examples, and of the others
        if self.trainer.reference is not None and self.has_plain_reference:
            reference = [plain.all_logps(model, each, precision) for each in (texts, texts_of_others)]
        elif self.trainer.reference is not None:
            reference = [self.reference_of_run(each, precision) for each in (examples, others)]
        model = self.policy(precision, model)

        def sums_of_others(_: Sequence[TokenizedExample]) -> tuple[Tensor, Tensor]:
            return as_logps(plain.all_logps(model, texts_of_others, precision)).sums, as_logps(reference[1]).sums

        collisions = plain.all_collisions(model, texts, precision) if self.loss.needs_collisions else None
        context = Context(examples, self.loss.batch_sums(examples, sums_of_others))
        trained = [name for name, each in self.trainer.policy.model.named_parameters() if each.requires_grad]
        loss_of = self.loss_of(context, collisions)
        return plain.compute(model, texts, reference[0] if reference else None, loss_of, trained, precision)

    def reference_of_run(self, examples: Sequence[TokenizedExample], precision: Precision) -> Tokens:
        """The log-probabilities of another reference than the start, as the run computes them."""
        assert self.trainer.reference is not None
        if not examples:
            return []
        with torch.no_grad(), self.trainer.autocast():
            batch = next(replace(self.trainer.packer, max_tokens=2**40)(examples))
            logps = self.trainer.reference.logps(batch)
        if logps.tokens is None:
            raise NotRun("a precomputed reference of its own has no log-probabilities of tokens")
        rows = iter(logps.tokens.to(precision.sums).split(logps.lengths.flatten().tolist()))
        return [[next(rows) for _ in example.responses] for example in examples]

    def loss_of(self, context: Context, collisions: Tokens | None) -> Callable[[Tokens, Tokens | None], Tensor]:
        """The loss of a batch: written out, or by this project's formula."""
        weights = [example.text.weight for example in context.examples]
        formula = written_out(self.loss_settings)
        if formula is not None:
            return lambda policy, reference: formula(policy, reference, weights)

        def own(policy: Tokens, reference: Tokens | None) -> Tensor:
            logps = as_logps(policy)
            if collisions is not None:
                logps = replace(logps, collisions=as_logps(collisions).tokens)
            losses, _ = self.loss(logps, None if reference is None else as_logps(reference), context)
            return (losses * losses.new_tensor(weights)).sum() / sum(weights)

        return own

    @property
    def remark(self) -> str:
        """What is not independent of this project."""
        own = [] if written_out(self.loss_settings) else ["by this project's formula"]
        return ", ".join(own + ([] if self.has_plain_reference else ["with the run's reference"]))


def as_logps(tokens: Tokens) -> Logps:
    lengths = torch.tensor([[len(text) for text in texts] for texts in tokens])
    flat = [text for texts in tokens for text in texts]
    return Logps.from_tokens(torch.cat(flat), lengths.to(flat[0].device))
