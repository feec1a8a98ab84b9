"""What a device computes in, the kernels that oneDNN keeps, and the memory that is there."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from dpo.model.attention import attention_kinds, half_precision_kinds
from dpo.system import devices
from dpo.system.devices import DeviceFacts, float32_products, has_bfloat16, pick_device, read_facts

GB = 10**9

# Devices, and what is decided for each: bfloat16 with precision=auto, TF32 in float32 products, kinds of attention.
DEVICES = {
    "AVX2": DeviceFacts("cpu", 16 * GB),
    "AVX-512 BF16": DeviceFacts("cpu", 64 * GB, bfloat16=True),
    "AMX": DeviceFacts("cpu", 256 * GB, bfloat16=True),
    "MPS": DeviceFacts("mps", 36 * GB),
    "T4": DeviceFacts("cuda", 16 * GB, capability=(7, 5), triton=True),
    "A100": DeviceFacts("cuda", 85 * GB, capability=(8, 0), triton=True),
    "A100 without Triton": DeviceFacts("cuda", 85 * GB, capability=(8, 0)),
    "RTX 4090": DeviceFacts("cuda", 25 * GB, capability=(8, 9), triton=True),
    "H200": DeviceFacts("cuda", 150 * GB, capability=(9, 0), triton=True),
    "B200": DeviceFacts("cuda", 190 * GB, capability=(10, 0), triton=True),
}
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
FLEX = ["flex_attention", "packed"]
DECISIONS = {
    "AVX2": (False, "highest", ["packed"]),
    "AVX-512 BF16": (True, "highest", ["packed"]),
    "AMX": (True, "highest", ["packed"]),
    "MPS": (False, "highest", ["packed"]),
    "T4": (False, "highest", ["packed"]),
    "A100": (True, "high", FLEX),
    "A100 without Triton": (True, "high", ["packed"]),
    "RTX 4090": (True, "high", FLEX),
    "H200": (True, "high", FLEX),
    "B200": (True, "high", FLEX),
}


@pytest.mark.parametrize("name", DEVICES)
def test_what_a_device_computes_in_is_decided_by_its_facts(name):
    facts = DEVICES[name]
    assert (has_bfloat16(facts), float32_products(facts), attention_kinds(facts)) == DECISIONS[name]


@pytest.mark.parametrize("name", DEVICES)
def test_torchs_kernel_for_any_lengths_is_tried_in_16_bits_on_gpus_that_have_bfloat16(name):
    facts = DEVICES[name]
    varlen = ["varlen"] if facts.kind == "cuda" and name != "T4" else []
    assert half_precision_kinds(facts, torch.bfloat16) == half_precision_kinds(facts, torch.float16) == varlen
    assert half_precision_kinds(facts, torch.float32) == []


@pytest.mark.parametrize("avx512, amx", [(False, False), (True, False), (False, True)])
def test_a_cpus_facts_are_its_instructions_and_the_machines_memory(avx512, amx, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert read_facts(torch.device("cpu")) == DeviceFacts("cpu", memory, bfloat16=avx512 or amx)


def test_a_gpus_facts_are_read_from_the_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 * GB, 150 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 40 * GB)  # which this process can use again
    for spec in (None, object()):
        monkeypatch.setattr(devices, "find_spec", lambda name, spec=spec: spec)
        expected = DeviceFacts("cuda", 140 * GB, capability=(9, 0), triton=spec is not None)
        assert read_facts(torch.device("cuda")) == expected


@pytest.mark.parametrize(
    "name, there, off",
    [("auto", True, True), ("cuda", True, True), ("cuda:1", True, True), ("cpu", True, False), ("auto", False, False)],
)
def test_attention_never_runs_in_cudnn_where_a_gpu_is_picked(name, there, off, monkeypatch):
    switched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", switched.append)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", lambda settings: None)
    pick_device(name)
    assert switched == ([False] if off else [])


@pytest.mark.parametrize("variable, expected", [(None, ["expandable_segments:True"]), *((n, []) for n in VARIABLES)])
def test_a_gpus_memory_grows_in_segments_unless_the_environment_says_otherwise(variable, expected, monkeypatch):
    settings = []
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "max_split_size_mb:128")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    pick_device("cpu")
    assert settings == []
    pick_device("cuda")
    assert settings == expected


def test_auto_precision_is_bfloat16_only_where_the_device_computes_it(monkeypatch):
    cpu = torch.device("cpu")
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(devices, "computes_bfloat16_natively", lambda device, native=native: native)
        assert devices.compute_dtype("auto", torch.float32, cpu) == expected
        assert devices.compute_dtype("auto", torch.bfloat16, cpu) == torch.bfloat16
    assert devices.compute_dtype("float32", torch.float32, cpu) == torch.float32


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc")
@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="needs oneDNN's kernels for bfloat16")
def test_products_of_many_shapes_leave_no_kernels_behind():
    code = """
import ctypes, sys, torch
from dpo.system import devices
if sys.argv[1] == "few":
    devices.limit_onednn_cache()
fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
Info = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in fields]})
mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
weight = torch.ones(64, 64, dtype=torch.bfloat16)
def multiply(lengths):
    for n in lengths:
        torch.ones(n, 64, dtype=torch.bfloat16) @ weight
multiply(range(100, 110))
before = mallinfo().uordblks
multiply(range(110, 310))
print(mallinfo().uordblks - before)
"""
    ours = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"}
    env = {name: value for name, value in os.environ.items() if name not in ours}
    commands = [[sys.executable, "-c", code, which] for which in ("all", "few")]
    kept, few = (int(subprocess.check_output(command, cwd=ROOT, env=env)) for command in commands)
    assert few < kept / 2, (few, kept)


def test_a_run_keeps_few_kernels_unless_the_environment_says_how_many(monkeypatch, make_trainer):
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "7")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")  # so that it is taken back, whatever it was
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    make_trainer("loss=sft")
    assert os.environ["LRU_CACHE_CAPACITY"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"


def test_available_memory_is_a_part_of_the_machines():
    device = torch.device("cpu")
    assert 0 < devices.available_memory(device) <= devices.total_memory(device)


@pytest.mark.parametrize(
    "group, files, expected",
    [
        ("", {}, 3_000_000 * 1024 + 100 * os.sysconf("SC_PAGE_SIZE")),  # what is available and what is held
        ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": "5000", "memory.max": "max"}, 5000),
        ("4:memory:/a\n2:cpu:/b", {"memory/a/memory.limit_in_bytes": "7000"}, 7000),
        ("0::/elsewhere", {"memory.max": "6000"}, 6000),  # in a container, whose own group is the root
    ],
    ids=["none", "version 2", "version 1", "container"],
)
def test_a_control_groups_limit_is_kept(group, files, expected, tmp_path):
    contents = {
        "proc/self/statm": "900 100 50 1 0 80 0",
        "proc/meminfo": "MemFree: 1 kB\nMemAvailable:    3000000 kB\n",
        "proc/self/cgroup": group,
    }
    for name, text in (contents | {f"sys/fs/cgroup/{name}": text for name, text in files.items()}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert devices.available_memory(torch.device("cpu"), tmp_path) == expected
