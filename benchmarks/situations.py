"""Trains tiny models with a fault whose cause is known, diagnoses each, and prints findings against causes.

    python benchmarks/situations.py                     all situations, in about ten minutes on one core
    python benchmarks/situations.py --only "flipped labels" healthy-0

A run or a diagnosis that is complete is not repeated; delete its folder to repeat it. The findings are computed again
from the figures, so that a changed rule shows at once. Situations trained with TRL need it to be importable. Exit code
1 if a finding is missing or a healthy model has one.
"""

import argparse
import json
import os
import random
import runpy
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import tools.diagnose.evaluation  # noqa: F401  (here, so that the children need not import it)
from dpo.data.film_reviews import BODY, KINDS, OPENINGS, SLOTS, make_rows, take_side
from dpo.reporting.findings import findings
from tools.demo import ROOT, STAGES
from tools.diagnose.__main__ import start

SEEDS = range(5)
SHARED = (
    *("max_length=128", "max_prompt_length=64", "eval_batch_size=200", "wandb.enabled=false", "report=false"),
    *("device=cpu", "do_first_eval=false", "sample_during_eval=false"),
)
BOS, USER, ASSISTANT, END = "<s>", "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FAST = ("device=cpu", "eval_batch_size=200")  # of a diagnosis
Rows = list[dict[str, Any]]
Change = Callable[[Rows, random.Random], Rows]


# Data


def flipped(rows: Rows, rng: random.Random) -> Rows:
    """A quarter of the pairs with their labels exchanged."""
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if rng.random() < 0.25 else row for row in rows
    ]


def longer(rows: Rows, rng: random.Random) -> Rows:
    """Pairs of which only the length tells the chosen response: two to four sentences after the verdict, not one."""
    return [{**row, "chosen": review(rng, rng.choice((2, 3, 4))), "rejected": review(rng, 1)} for row in rows]


def review(rng: random.Random, n_sentences: int) -> str:
    """A review of either kind with a number of sentences after its verdict."""
    fillings = {slot: rng.choice(choices) for slot, choices in SLOTS.items()}
    templates = [rng.choice(OPENINGS), *rng.sample(BODY, n_sentences)]
    return " " + take_side(" ".join(each.format(**fillings) for each in templates), rng.choice(KINDS))


def without_turns(rows: Rows, rng: random.Random) -> Rows:
    """Prompts without the Human and Assistant turns that the model was trained with."""
    return [{**row, "prompt": question(row)} for row in rows]


def as_conversations(rows: Rows, rng: random.Random) -> Rows:
    """Conversations for SFT with a chat template."""
    return [
        {
            "messages": [
                {"role": "user", "content": question(row)},
                {"role": "assistant", "content": row["sft_target"].strip()},
            ]
        }
        for row in rows
    ]


def as_messages(rows: Rows, rng: random.Random) -> Rows:
    """Pairs whose prompt is a conversation."""
    return [{**row, "prompt": [{"role": "user", "content": question(row)}],
             "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
             "rejected": [{"role": "assistant", "content": row["rejected"].strip()}]} for row in rows]  # fmt: skip


def with_two_bos(model: Path) -> Change:
    """Pairs as token ids: rendered with the chat template of a model, whose BOS its tokenizer has doubled."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def change(rows: Rows, rng: random.Random) -> Rows:
        return [
            row | {"sampled_ids": {"prompt": ids(f"{BOS}{BOS}{USER}{question(row)}{END}{ASSISTANT}")}
                   | {side: ids(row[side][0]["content"] + END) for side in ("chosen", "rejected")}}
            for row in as_messages([row | {"text": row["prompt"]} for row in rows], rng)
        ]  # fmt: skip

    return change


def question(row: Mapping[str, Any]) -> str:
    return str(row.get("text", row["prompt"])).split("Human: ")[1].split("\n\nAssistant")[0]


def write_data(folder: Path, change: Change) -> Path:
    """Write the demo's pairs, changed, as train.jsonl and test.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = change([dict(row) for row in make_rows(split)], random.Random(split))
        kept = [{key: value for key, value in row.items() if key != "sft_target"} for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    return folder


def write_chat_model(folder: Path) -> Path:
    """The demo's model and tokenizer with the tokens of a chat template, and the template."""
    if folder.exists():
        return folder
    shutil.copytree(ROOT / "config" / "tiny", folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    first = len(tokenizer["model"]["vocab"])
    for i, content in enumerate((BOS, USER, ASSISTANT, END)):
        like = {**tokenizer["added_tokens"][0], "id": first + i, "content": content}
        tokenizer["added_tokens"].append(like)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = {"bos_token": BOS, "eos_token": END, "chat_template": TEMPLATE}
    change_json(folder / "tokenizer_config.json", names)
    ids = {"vocab_size": first + 4, "bos_token_id": first, "eos_token_id": first + 3}
    change_json(folder / "config.json", ids)
    return folder


def change_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(values), indent=2))


# Models


def hf(run: Path) -> Path:
    """The exported model of a run."""
    return run / "LATEST" / "hf"


@dataclass(frozen=True)
class Makers:
    """Makes the models of situations in a folder; what is there already is not made again."""

    folder: Path

    def run(self, name: str, *overrides: str) -> Path:
        """A run by the command line of train.py."""
        run = self.folder / name
        if not (run / "LATEST" / "hf").exists():
            shutil.rmtree(run, ignore_errors=True)
            places = (f"local_run_dir='{run}'", f"local_dirs=['{self.folder}']")
            in_child(partial(train, [*SHARED, *overrides, *places]), self.folder / f"{name}.log")
        return run

    def sft(self, seed: int = 0, epochs: int = 6) -> Path:
        of_stage = [override for override in STAGES["sft"] if "n_epochs" not in override]
        own = (*of_stage, "model=tiny", "datasets=[demo]", f"n_epochs={epochs}", f"seed={seed}", "export_dtype=float32")
        return self.run(f"sft-{seed}-{epochs}", *own)

    def chat_sft(self) -> Path:
        model = write_chat_model(self.folder / "chat-model")
        data = write_data(self.folder / "conversations", as_conversations)
        own = (*STAGES["sft"], f"model.name_or_path='{model}'", "model.from_scratch=true", f"datasets=['{data}']")
        own = (*(override for override in own if "n_epochs" not in override), "n_epochs=4")
        return self.run("chat-sft", *own, "export_dtype=float32")

    def dpo(self, name: str, start: Path, data: str, *overrides: str, exact: bool = True) -> Path:
        of_stage = [override for override in STAGES["dpo"] if "eval" not in override] + ["n_examples=1024"]
        dtype = ("export_dtype=float32",) if exact else ()
        model = f"model.name_or_path='{hf(start)}'"
        return self.run(name, *of_stage, model, f"datasets=[{data}]", *dtype, *overrides)

    def healthy(self, seed: int) -> Path:
        return self.dpo(f"healthy-{seed}", self.sft(), "demo", f"seed={seed}")

    def adapter(self) -> Path:
        """The folder of a healthy adapter."""
        return hf(self.dpo("adapter", self.sft(), "demo", "lora=default", "optimizer=AdamW", "lr=3e-4"))

    def on_data(self, name: str, change: Change, start: Path, *overrides: str) -> Path:
        """A run on the demo's pairs after a change."""
        return self.dpo(name, start, f"'{write_data(self.folder / f'data-{name}', change)}'", *overrides)

    def trl(self, name: str, start: Path, **options: Any) -> Path:
        """A model trained with TRL, in a process of its own."""
        folder = self.folder / name
        if not (folder / "config.json").exists():
            work = partial(train_with_trl, str(hf(start)), str(folder), **options)
            in_child(work, self.folder / f"{name}.log")
        return folder


def in_child(work: Callable[[], None], log: Path) -> None:
    """Call work in a forked child, with its output in a file; RuntimeError names the file if it fails."""
    if (pid := os.fork()) == 0:
        code = 1
        try:
            with open(log, "w", encoding="utf-8") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            work()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"a program failed; see {log}")


def train(arguments: Sequence[str]) -> None:
    """Be `python train.py ARGUMENTS`."""
    sys.argv = ["train.py", *arguments]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def train_with_trl(start: str, folder: str, **options: Any) -> None:
    """Train on the demo's pairs with TRL's DPOTrainer, and save the model and the trainer's state."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in make_rows("train")]
    config = DPOConfig(
        output_dir=f"{folder}-output", per_device_train_batch_size=32, num_train_epochs=1, max_length=128,
        lr_scheduler_type="constant_with_warmup", warmup_steps=15, max_grad_norm=10.0, report_to="none",
        save_strategy="no", logging_steps=5, use_cpu=True, bf16=False, gradient_checkpointing=False, **options,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(start, dtype="float32")
    trainer = DPOTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(start),
    )
    trainer.train()
    trainer.save_model(folder)
    trainer.state.save_to_json(f"{folder}/trainer_state.json")


def change_adapter(source: Path, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A copy of an adapter's folder with other tensors."""
    from safetensors.torch import load_file, save_file

    if not folder.exists():
        shutil.copytree(source, folder)
        tensors = change(load_file(source / "adapter_model.safetensors"))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def zeroed(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor * 0 if "lora_B" in name else tensor for name, tensor in tensors.items()}


def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
    """As saved from a model that was wrapped once more."""
    return {name.replace("base_model.model.", "base_model.model.module."): t for name, t in tensors.items()}


def break_tokenizer(source: Path, folder: Path) -> Path:
    """A copy of a model's folder whose tokenizer lost its byte-level decoder and the order of its vocabulary."""
    if not folder.exists():
        shutil.copytree(source, folder)
        path = folder / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        names = [name for name in tokenizer["model"]["vocab"] if len(name) > 1 and not name.startswith("<")]
        ids = [tokenizer["model"]["vocab"][name] for name in names]
        tokenizer["model"]["vocab"] |= dict(zip(names, ids[1:] + ids[:1], strict=True))
        path.write_text(json.dumps(tokenizer))
    return folder


# Situations


@dataclass(frozen=True)
class Situation:
    """What is diagnosed: the arguments of tools.diagnose, made when needed; expected names a rule, "" for none."""

    name: str
    cause: str
    expected: str
    arguments: Callable[[Makers], Sequence[str]]
    needs_trl: bool = False


def policy(path: Path) -> str:
    return f"policy='{path}'"


def reference(path: Path) -> str:
    return f"reference='{path}'"


def healthy(seed: int, makers: Makers) -> Sequence[str]:
    return [policy(makers.healthy(seed))]


# Arguments for models that are not runs, which do not bring their data along
DEMO = ("datasets=[demo]", "max_length=128", "max_prompt_length=64", "n_eval_model_samples=100", *FAST)

SITUATIONS = (
    Situation("too high a rate", "lr=0.5 loss.beta=0.1", "over-optimization",
              lambda m: [policy(m.dpo("hot", m.sft(), "demo", "loss.beta=0.1", "lr=0.5"))]),
    Situation("flipped labels", "25% of the labels exchanged", "label noise",
              lambda m: [policy(m.on_data("flipped", flipped, m.sft(), "lr=0.01"))]),
    Situation("length bias", "the chosen response is always longer", "length exploitation",
              lambda m: [policy(m.on_data("longer", longer, m.sft(), "lr=0.02"))]),
    Situation("wrong template", "plain prompts for a chat model", "another prompt format",
              lambda m: [policy(m.on_data("no-template", without_turns, m.chat_sft()))]),
    Situation("double BOS", "the template's BOS and the tokenizer's", "BOS",
              lambda m: [policy(m.on_data("two-bos", with_two_bos(hf(m.chat_sft())), m.chat_sft()))]),
    Situation("other reference", "another SFT model as the reference", "another reference",
              lambda m: [policy(hf(m.healthy(0))), reference(hf(m.sft(1, 2))), *DEMO]),
    Situation("adapter of zeros", "lora_B is 0", "adapter not loaded",
              lambda m: [policy(change_adapter(m.adapter(), m.folder / "zeroed", zeroed)), *DEMO]),
    Situation("adapter of other names", "no tensor fits a module", "adapter not loaded",
              lambda m: [policy(change_adapter(m.adapter(), m.folder / "renamed", renamed)), *DEMO]),
    Situation("adapter left off", "the base model instead of the adapter", "policy unchanged",
              lambda m: [policy(hf(m.sft())), reference(hf(m.sft())), *DEMO]),
    Situation("healthy, TRL", "none", "",
              lambda m: [policy(m.trl("trl", m.sft(), learning_rate=0.08, beta=2.0, optim="sgd")),
                         reference(hf(m.sft())), "loss.beta=2", *DEMO], needs_trl=True),
    Situation("too high a rate, TRL", "learning_rate=1e-3", "over-optimization",
              lambda m: [policy(m.trl("trl-hot", m.sft(), learning_rate=1e-3, beta=0.1, optim="adamw_torch")),
                         reference(hf(m.sft())), *DEMO], needs_trl=True),
    *(Situation(f"healthy-{seed}", "none", "", partial(healthy, seed)) for seed in SEEDS),
    # Further ones
    Situation("earlier reference", "an earlier checkpoint of SFT as the reference", "another reference",
              lambda m: [policy(hf(m.healthy(0))), reference(hf(m.sft(0, 2))), *DEMO]),
    Situation("no turns", "prompts without Human and Assistant", "another prompt format",
              lambda m: [policy(m.on_data("no-turns", without_turns, m.sft()))]),
    Situation("too low a rate", "lr=1e-6", "nothing learned",
              lambda m: [policy(m.dpo("cold", m.sft(), "demo", "lr=1e-6"))]),
    Situation("broken tokenizer", "the vocabulary in another order", "broken tokenizer",
              lambda m: [policy(break_tokenizer(hf(m.healthy(0)), m.folder / "broken")),
                         reference(hf(m.sft())), *DEMO]),
    Situation("healthy adapter", "none", "", lambda m: [policy(m.adapter()), "loss.beta=2", *DEMO]),
    Situation("healthy, bfloat16 export", "none", "",
              lambda m: [policy(hf(m.dpo("rounded", m.sft(), "demo", exact=False))), reference(hf(m.sft())),
                         "loss.beta=2", *DEMO]),
    Situation("healthy, chat", "none", "",
              lambda m: [policy(m.on_data("chat", as_messages, m.chat_sft()))]),
)  # fmt: skip


def diagnose(makers: Makers, situation: Situation) -> dict[str, float]:
    """The figures of a situation."""
    out = makers.folder / "diagnoses" / situation.name.replace(" ", "-").replace(",", "")
    if not (out / "metrics.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(exist_ok=True)
        arguments = situation.arguments(makers)
        samples = [] if any("samples" in one for one in arguments) else ["n_eval_model_samples=100"]
        everything = [*arguments, *samples, f"local_dirs=['{makers.folder}']", f"out='{out}'"]
        in_child(partial(start, everything), out.with_suffix(".log"))
    figures: dict[str, float] = json.loads((out / "metrics.json").read_text())
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".cache/situations"), help="where everything lies")
    names = [situation.name for situation in SITUATIONS]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help="only these situations")
    options = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads do not survive a fork
    options.folder.mkdir(parents=True, exist_ok=True)
    makers, failed = Makers(options.folder.resolve()), False
    rows = []
    for situation in SITUATIONS:
        if options.only and situation.name not in options.only:
            continue
        if situation.needs_trl and find_spec("trl") is None:
            print(f"{situation.name}: left out, since trl is not installed (pip install trl)", file=sys.stderr)
            continue
        found = [finding.rule.name for finding in findings(diagnose(makers, situation))]
        is_right = situation.expected in found if situation.expected else not found
        failed |= not is_right
        rows.append(f"| {situation.name} | {situation.cause} | {', '.join(found) or 'none'} | {is_right} |")
        print(rows[-1], file=sys.stderr, flush=True)
    print("\n".join(["| situation | cause | findings | right |", "|---|---|---|---|", *rows]))
    sys.exit(failed)


if __name__ == "__main__":
    main()
