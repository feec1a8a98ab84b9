"""The benchmark of sampling, with a tiny model: each way draws all samples, and the table shows their figures."""

import json
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
from conftest import tiny_tokenizer
from tiny_models import tiny

from dpo.system.devices import pick_device

benchmark = import_module("benchmarks.sampling")  # a program, not a package
WAYS, Bench, measure, parse, table = (getattr(benchmark, n) for n in ("WAYS", "Bench", "measure", "parse", "table"))


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampling")
    tokenizer = tiny_tokenizer("gpt2")
    tiny("Llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompts = ["Why is the sky blue?", "Hi.", "Ho!", "a long prompt, which is left out " * 40]
    (folder / "data.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    sizes = ("--samples", "2", "--tokens", "4", "--rows", "4", "--device", "cpu")
    return ["--model", str(folder), "--data", str(folder / "data.jsonl"), *sizes]


CASES = [
    *((way, "float32") for way in WAYS if way != "vLLM"),
    *((way, "autocast") for way in WAYS if "decoder" in way),  # generate's static cache fails there
]


@pytest.mark.parametrize("way, dtype", CASES)
def test_each_way_draws_all_samples(way, dtype, command):
    drawn = WAYS[way](Bench(parse([*command, "--dtype", dtype]), pick_device("cpu")))
    assert len(drawn) == 3 * 2 and all(1 <= len(ids) <= 4 for ids in drawn)


def test_vllm_is_asked_for_the_same_samples_where_it_is_installed(command, monkeypatch):
    class LLM:
        def __init__(self, model, dtype, max_model_len, max_num_seqs):
            assert (model, dtype, max_model_len, max_num_seqs) == (command[1], "float32", 124, 4)

        def generate(self, prompts, parameters, use_tqdm):
            (one,) = [SimpleNamespace(token_ids=(5, 6))]
            return [SimpleNamespace(outputs=[one] * parameters["n"]) for prompt in prompts]

    bench = Bench(parse(command), pick_device("cpu"))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=dict))
    assert bench.vllm() == [[5, 6]] * 6


def test_the_table_compares_ways_by_tokens_per_second(command):
    first = measure(parse([*command, "--way", "generate"]))
    assert min(first.values()) > 0
    second = {"seconds": 2 * first["seconds"], "rate": 3 * first["rate"], "peak": 1.234}
    lines = table({"generate": first, "other": second}).splitlines()
    assert lines[3].startswith(f"| other | {second['seconds']:,.1f} |") and lines[3].endswith("| 3.0 | 1.23 |")
