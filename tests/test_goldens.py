"""The original's numbers: every file of goldens/ is recomputed here. With -s, a table of all comparisons is printed."""

import json
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import GOLDENS, golden_rows, read_data
from faults import command_line, fresh
from transformers import AutoTokenizer

import losses
import preference_datasets
from dpo.data.batches import BatchIterator
from dpo.data.examples import TextExample, TokenizedExample
from dpo.data.mixture import Mixture
from dpo.model.logps import ResponseLogps, response_logps
from dpo.model.packing import LAYOUTS, make_microbatches
from dpo.reporting.metrics import BatchMetrics
from preference_datasets import (
    strip_html,
    tokenize_batch_element,
)

# From goldens/README.md: relative error that a float32 run may have, whatever its layout.
TOLERANCES = {"sft": 1e-3, "dpo": 1e-3, "dpo_accum4": 1e-3, "reference_free": 1e-3, "cdpo": 5e-3, "ipo": 5e-3}
EXACT = 0.0


@dataclass
class Comparisons:
    """How many numbers or texts of one golden were compared, and the worst relative error among them."""

    n: int = 0
    worst: float = 0.0
    tolerance: float = EXACT


TABLE: dict[str, Comparisons] = defaultdict(Comparisons)


@pytest.fixture(scope="module", autouse=True)
def table():
    """Print all comparisons after the module's last test."""
    yield
    print("\n\n| golden | comparisons | worst relative error | tolerance |\n|---|---|---|---|")
    for name, row in TABLE.items():
        print(f"| {name} | {row.n:,} | {row.worst:.1e} | {f'{row.tolerance:.0e}' if row.tolerance else 'exact'} |")
    print(f"| total | {sum(row.n for row in TABLE.values()):,} | | |")


def read(name):
    """Read goldens/NAME.json."""
    return json.loads((GOLDENS / f"{name}.json").read_text())


def compare(name, actual, expected, tolerance, scale=None):
    """Note and check the errors of some numbers, relative to scale, or each to the expected number."""
    actual, expected = np.atleast_1d(np.asarray(actual, float)), np.atleast_1d(np.asarray(expected, float))
    assert actual.shape == expected.shape
    errors = np.abs(actual - expected)
    scale = np.broadcast_to(np.abs(expected) if scale is None else scale, errors.shape)
    errors = np.where(errors == 0, 0.0, errors / np.where(scale == 0, 1e-300, scale))  # at scale 0 only 0 will do
    row = TABLE[name]
    row.n += errors.size
    row.worst = max(row.worst, float(errors.max()))
    row.tolerance = tolerance
    assert not np.isnan(actual).any()
    assert errors.max() <= tolerance


def compare_exactly(name, actual, expected):
    """Note and check integers and texts, however nested."""
    assert actual == expected
    TABLE[name].n += leaves(expected)


def leaves(value):
    """Count the numbers and texts in nested lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    return sum(map(leaves, value)) if isinstance(value, (list, tuple)) else 1


# losses.json


@pytest.mark.parametrize("case", read("losses")["preference_loss"], ids=lambda c: f"{c['beta']}-{c['label_smoothing']}")
def test_losses_rewards_and_gradients_are_the_originals(case):
    names = [f"{model}_{side}_logps" for model in ("policy", "reference") for side in ("chosen", "rejected")]
    logps = [torch.tensor(case[name], dtype=torch.float64, requires_grad=True) for name in names]
    settings = {name: case[name] for name in ("beta", "label_smoothing", "ipo", "reference_free")}
    values, chosen_rewards, rejected_rewards = losses.preference_loss(*logps, **settings)
    values.mean().backward()
    for actual, key in [
        (values.detach(), "losses"),
        (chosen_rewards, "chosen_rewards"),
        (rejected_rewards, "rejected_rewards"),
        (logps[0].grad, "grad_policy_chosen"),
        (logps[1].grad, "grad_policy_rejected"),
    ]:
        assert not actual.requires_grad
        compare("losses.json", actual, case[key], 1e-12)
    assert logps[2].grad is None or not case["reference_free"]


class Recorded(torch.nn.Module):
    """A model that gives the same logits, (1, seq, vocabulary), whatever its input."""

    dtype = torch.float64
    config = SimpleNamespace(_attn_implementation="eager")

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, input_ids, logits_to_keep, **_):
        return SimpleNamespace(logits=self.logits[:, : input_ids.shape[1]][:, logits_to_keep])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_and_means_of_log_probabilities_are_the_originals(layout):
    """logits[t] predicts labels[t + 1]; labels of -100 are a prompt before, and padding after the response."""
    golden = read("losses")["batch_logps"]
    for logits, labels, summed, averaged in zip(*(golden[key] for key in golden), strict=True):
        start = next(t for t, label in enumerate(labels) if label != -100)
        response = [label for label in labels if label != -100]
        assert labels[start : start + len(response)] == response
        logits = torch.tensor([logits], dtype=torch.float64)
        example = TokenizedExample(TextExample("", ("",), "keep_end", 1, ""), [0] * start, (response,))
        (part,) = make_microbatches([example], layout, 1000)
        logps = response_logps(ResponseLogps(Recorded(logits)), part)
        compare("losses.json", logps.sums.flatten(), summed, 1e-12)
        compare("losses.json", logps.means.flatten(), averaged, 1e-12)


# tokens.json


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_every_field_of_every_tokenized_pair_is_the_originals(truncation):
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS / "tiny-gpt2")
    dialogues = golden_rows("test")
    expected = read("tokens")[truncation]
    assert [golden["row"] for golden in expected] == list(range(len(dialogues)))
    for golden, dialogue in zip(expected, dialogues, strict=True):
        start = dialogue["chosen"].rfind("\n\nAssistant:") + len("\n\nAssistant:")
        texts = (dialogue["chosen"][:start], dialogue["chosen"][start:], dialogue["rejected"][start:])
        fields = tokenize_batch_element(*texts, truncation, tokenizer, max_length=160, max_prompt_length=96)
        tokens = {key: value for key, value in golden.items() if key != "row"}
        compare_exactly("tokens.json", {key: fields[key] for key in tokens}, tokens)
        whole = {"prompt": texts[0], "chosen": dialogue["chosen"], "chosen_response_only": texts[1]}
        whole |= {"rejected": texts[0] + texts[2], "rejected_response_only": texts[2]}
        assert {key: fields[key] for key in fields if key not in tokens} == whole


# order.json


def batches_of_rows(groups, batch_size, **limits):
    """Walk data as a trainer does, and return what a batch's items say of their rows, counted from 0."""
    return [
        [(item.text.row - 1, item.text.prompt + item.text.responses[0]) for item in batch.examples]
        for batch in BatchIterator(Mixture([groups.split]), groups.split.tokenize, batch_size, seed=0, **limits)
    ]


@pytest.mark.parametrize(
    "key, split, limits",
    [
        ("train_pairs_3_epochs_batch_8", "train", {"n_epochs": 3}),
        ("train_pairs_n_examples_100_batch_8", "train", {"n_epochs": None, "n_examples": 100}),
        ("test_pairs_n_examples_32_batch_16", "test", {"n_epochs": 1, "n_examples": 32, "keep_last": True}),
    ],
)
def test_pairs_come_in_the_originals_order(key, split, limits):
    groups = read_data(GOLDENS / "data")[split]
    batches = batches_of_rows(groups, int(key.rsplit("_", 1)[1]), **limits)
    compare_exactly("order.json", [[row for row, _ in batch] for batch in batches], read("order")[key])


def test_sft_targets_come_in_the_originals_order():
    """A prompt's target is the chosen text of its last row; the golden lists all rows with that text."""
    dialogues = [row["chosen"] for row in golden_rows("train")]
    batches = batches_of_rows(read_data(GOLDENS / "data", sft=True)["train"], 8, n_epochs=3)
    rows = [[[i for i, text in enumerate(dialogues) if text == chosen] for _, chosen in batch] for batch in batches]
    compare_exactly("order.json", rows, read("order")["train_sft_3_epochs_batch_8"])
    assert [[row for row, _ in batch] for batch in batches] == [[found[-1] for found in batch] for batch in rows]


# loaders.json


@pytest.fixture
def hub(monkeypatch):
    """Return a function that puts rows in the place of what the hub would send."""

    def serve(rows):
        table = datasets.Dataset.from_list(rows)
        monkeypatch.setattr(preference_datasets, "load_hub_split", lambda path, split, cache_dir: table)

    return serve


def as_json(data):
    """Return a data set's map as JSON would hold it, in order."""
    return json.loads(json.dumps(list(data.items())))


def test_shp_is_read_as_in_the_original(hub):
    golden = read("loaders")["shp"]
    hub(golden["rows"])
    compare_exactly("loaders.json", as_json(preference_datasets.get_shp("train")), golden["expected"])


@pytest.mark.parametrize("split", ["train", "test"])
def test_se_is_read_as_in_the_original(hub, split):
    golden = read("loaders")["se"]
    hub(golden["rows"])
    compare_exactly("loaders.json", as_json(preference_datasets.get_se(split)), golden[f"expected_{split}"])


def test_html_is_stripped_as_in_the_original():
    pairs = read("loaders")["se"]["strip_html"]
    compare_exactly("loaders.json", [strip_html(html) for html, _ in pairs], [text for _, text in pairs])


# trace_*.json


def overrides_of(trace):
    """Return a trace's config, every key, as a command line; its data and model are in goldens/."""
    config = trace["config"] | {"datasets": "[tests/goldens/data]"}
    config["model"] = config["model"] | {"name_or_path": "tests/goldens/tiny-gpt2"}
    groups = [f"loss={config['loss']['name']}", "precision=float32", "device=cpu", "report=false"]
    flat = {key: value for key, value in config.items() if key not in ("model", "loss")}
    flat |= {f"{group}.{key}": value for group in ("model", "loss") for key, value in config[group].items()}
    words = {None: "null", True: "true", False: "false"}
    return groups + [f"{key}={words[v] if v is None or isinstance(v, bool) else v}" for key, v in flat.items()]


def compare_record(name, actual, golden, tolerance, scale, skip):
    """Compare one update or evaluation; its rewards are relative to scale, all else each to itself."""
    for key, value in golden.items():
        if not (skip and key.startswith(skip)):
            is_reward = key.startswith("rewards") and not key.endswith("accuracies")
            compare(name, actual[key], np.mean(value), tolerance, scale if is_reward else None)


def compare_steps(name, steps, golden_steps, tolerance, skip=None):
    """Compare updates; the scale of rewards is the batch's mean |reward|."""
    for actual, golden in zip(steps, golden_steps, strict=True):
        rewards = [golden.get(f"rewards_train/{side}", [0.0]) for side in ("chosen", "rejected")]
        compare_record(name, actual, golden, tolerance, np.mean(np.abs(rewards)), skip)


def compare_evaluations(name, evaluations, golden_evaluations, tolerance, skip=None):
    """Compare evaluations; the scale of rewards is the record's largest."""
    for actual, golden in zip(evaluations, golden_evaluations, strict=True):
        rewards = [abs(v) for k, v in golden.items() if k.startswith("rewards") and not k.endswith("accuracies")]
        compare_record(name, actual, golden, tolerance, max(rewards, default=0.0), skip)


@pytest.mark.parametrize("name", TOLERANCES)
def test_a_run_from_the_command_line_is_the_originals_run(name, tmp_path):
    """The original logs rewards against a reference that reference_free ignores; none is loaded here."""
    trace, tolerance = read(f"trace_{name}"), TOLERANCES[name]
    skip = "rewards" if name == "reference_free" else None
    run = command_line(tmp_path / "run", fresh(tmp_path / "run", "wandb.enabled=false", *overrides_of(trace)))
    assert run.returncode == 0, run.stderr
    steps = [record for record in run.records() if "loss/train" in record]
    evaluations = [record for record in run.records() if "loss/eval" in record]
    assert [record["examples"] for record in evaluations] == [0, 80, 160, 240]  # the last comes on top
    compare_steps(f"trace_{name}", steps, trace["steps"], tolerance, skip)
    compare_evaluations(f"trace_{name}", evaluations[:3], trace["evals"], tolerance, skip)
    state = torch.load(run.folder / "LATEST" / "policy.pt", weights_only=True)["state"]
    for parameter, (_, norm) in trace["final_parameters_sum_and_l2"].items():
        compare("final parameters of the traces", state[parameter].double().norm(), norm, 1e-3)


@pytest.mark.parametrize("accumulation, max_tokens", [(1, 100_000), (4, 100_000), (1, 300)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_accumulation_and_token_budget_gives_the_originals_updates(
    layout, accumulation, max_tokens, make_trainer, monkeypatch
):
    trace = read("trace_dpo")
    monkeypatch.chdir(GOLDENS.parent.parent)
    own = {"layout": layout, "gradient_accumulation_steps": accumulation, "max_tokens_per_pass": max_tokens}
    trainer = make_trainer(*overrides_of(trace), *(f"{key}={value}" for key, value in own.items()))
    assert trainer.packer.layout == layout
    name = f"trace_dpo, 10 updates, {layout}, accumulation {accumulation}, up to {max_tokens:,} tokens a pass"
    for batch, golden in zip(islice(trainer.train_batches, 10), trace["steps"][:10], strict=True):
        for key, values in values_by_example(trainer, batch.examples).items():
            compare(name, values, golden[key], 1e-3, np.mean(np.abs(golden[key])))
        compare_steps(name, [trainer.train_step(batch)], [golden], 1e-3)


def values_by_example(trainer, examples):
    """Return the metrics that an update on these examples would average, in the order of the batch."""
    metrics, order = BatchMetrics(), []
    with torch.no_grad():
        for layout in trainer.packer(examples):
            trainer.losses(layout, metrics)
            order += [examples.index(example) for example in layout.examples]
    names = {
        f"{kind}_train/{side}": f"{kind}/{side}" for kind in ("rewards", "logps") for side in ("chosen", "rejected")
    }
    names |= {"loss/train": "loss"}
    return {key: torch.cat(metrics.values[name])[np.argsort(order)].numpy() for key, name in names.items()}
