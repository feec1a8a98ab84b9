"""The export, reopened by plain transformers and peft: weights, log-probabilities, and where a generated text ends."""

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessorList

from dpo.model.loading import is_quantized
from tools.verify import plain
from tools.verify.gradients import MULTIPLE, UNIT, packed_logps
from tools.verify.plain import Precision
from tools.verify.plain_run import PlainRun, texts_of
from tools.verify.rounding import largest_error, ratio
from tools.verify.session import Session
from tools.verify.table import NOT_RUN, Row, measured
from trainers import BasicTrainer

WEIGHTS, LOGPS = "export: the run's weights, rounded once", "export: log-probabilities of the run"
STOP = "export: generation ends at a stop token"
PROMISES = (WEIGHTS, LOGPS, STOP)
N_EXAMPLES = 2  # whose log-probabilities are compared
N_BEFORE, N_AFTER = 3, 8  # tokens that are generated before a stop token, and may be after it


def check_export(session: Session, trainer: BasicTrainer, folder: Path) -> Iterator[Row]:
    """Compare the export of a trainer that is done with the trainer itself."""
    if is_quantized(trainer.policy.model):
        yield from (Row(promise, NOT_RUN, detail="its base is quantized") for promise in PROMISES)
        return
    examples = next(iter(trainer.eval_batches.from_start())).examples[:N_EXAMPLES]
    texts = [texts_of(example) for example in examples]
    of_run, _ = packed_logps(trainer, examples, [[torch.zeros(sum(t.trained)) for t in each] for each in texts])
    plain_run = PlainRun(session, trainer)
    truth = plain.all_logps(plain_run.policy(plain_run.exact), texts, plain_run.exact)
    rounding = largest_error(plain.all_logps(plain_run.policy(plain_run.own), texts, plain_run.own), truth)
    model = open_export(folder).to(trainer.device)
    expected = plain_run.weights()
    yield weights_row(model, expected)
    stored = Precision(None, None, torch.float32)  # with the parameters in the dtypes of the export
    rounded = plain_run.policy(stored)
    plain.set_weights(rounded, {name: expected[name].to(each.dtype) for name, each in model.named_parameters()})
    rounding += largest_error(plain.all_logps(rounded, texts, stored), truth)
    del rounded
    error = largest_error(plain.all_logps(model, texts, stored), of_run)
    yield measured(LOGPS, ratio(error, rounding), MULTIPLE, UNIT, f"{error:.1e} nats; stored in {model.dtype}")
    yield stop_row(model, texts[0][0], trainer.sampler.stop_ids)


def open_export(folder: Path) -> Any:
    """Open a model by from_pretrained, or an adapter by peft: the model whose tensors have the run's names."""
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads attributes that transformers has renamed
        opened = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), folder).eval()
    model: Any = opened.get_base_model()
    model.generation_config = GenerationConfig.from_pretrained(folder)  # peft leaves that of the base
    return model


def weights_row(model: Any, expected: dict[str, Tensor]) -> Row:
    """The tensors of an opened export that are not those of the run in their dtype."""
    opened = model.state_dict()
    wrong = {name for name in opened.keys() | expected.keys() if not same(opened.get(name), expected.get(name))}
    detail = f"tensors differ{f': {min(wrong)}' if wrong else ', bit for bit'}"
    return measured(WEIGHTS, len(wrong), 0, f"of {len(expected):,}", detail)


def same(opened: Tensor | None, expected: Tensor | None) -> bool:
    return opened is not None and expected is not None and torch.equal(opened, expected.to(opened.dtype))


@torch.no_grad()
def stop_row(model: Any, text: plain.Text, stops: Sequence[int]) -> Row:
    """Force a text on the model, token by token, in which each stop token comes once, and see where it ends."""
    other = next(token for token in [*text.response, *range(len(stops) + 1)] if token not in stops)
    prompt = torch.tensor([text.prompt], device=model.device)
    beyond = []
    for stop in stops:
        forced = [other] * N_BEFORE + [stop] + [other] * N_AFTER

        def force(ids: Tensor, scores: Tensor, forced: list[int] = forced) -> Tensor:
            only = torch.full_like(scores, -torch.inf)
            only[:, forced[ids.shape[1] - len(text.prompt)]] = 0
            return only

        options = {"max_new_tokens": len(forced), "do_sample": False, "logits_processor": LogitsProcessorList([force])}
        ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        if ids.shape[1] != len(text.prompt) + N_BEFORE + 1:
            beyond.append(stop)
    detail = f"stop tokens {', '.join(map(str, stops))}" + (f"; not at {', '.join(map(str, beyond))}" if beyond else "")
    return measured(STOP, len(beyond), 0, f"of {len(stops)} go on", detail)
