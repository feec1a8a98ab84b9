"""Devices: which one, in which dtype it computes, and how much memory it has."""

import ctypes
import gc
import os
import re
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch

from dpo.system.errors import UserError


@dataclass(frozen=True)
class DeviceFacts:
    """What is known of a device before anything runs on it; every default that depends on the device follows from it.

    memory is in bytes: on a GPU what this process holds or can still get, elsewhere that of the machine. capability is
    CUDA's compute capability, (0, 0) elsewhere. bfloat16: whether a CPU has instructions for it (AVX-512 BF16 or AMX).
    triton: whether Triton is installed, which compiles kernels for GPUs.
    """

    kind: str
    memory: int
    capability: tuple[int, int] = (0, 0)
    bfloat16: bool = False
    triton: bool = False


def read_facts(device: torch.device) -> DeviceFacts:
    if device.type == "cuda":
        capability, triton = torch.cuda.get_device_capability(device), find_spec("triton") is not None
        return DeviceFacts("cuda", available_memory(device), capability=capability, triton=triton)
    bfloat16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return DeviceFacts(device.type, total_memory(device), bfloat16=device.type == "cpu" and bfloat16)


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the older name


def pick_device(name: str) -> torch.device:
    """Get a device by name, or the best one for auto; UserError if this machine has none.

    cuda:N becomes the current GPU of the process. On CUDA, attention never runs in cuDNN: SDPA prefers it on Hopper,
    and it builds a plan for every new shape, which took 52 to 81 ms on an H200, forward and backward each. Memory is
    reserved in segments that can grow, since microbatches differ in size, unless the environment says otherwise.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in available.items() if there)
    kind, _, index = name.partition(":")
    if not available.get(kind, False) or (index and int(index) >= torch.cuda.device_count()):
        raise UserError(f"device={name}: not available here; use device=auto or device=cpu")
    if kind == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
        if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
            # Not through the environment, which the programs that a run starts inherit.
            torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    if index:
        torch.cuda.set_device(int(index))  # kernels that Triton makes run there
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Name what decides how numbers are rounded on a device: the GPU, or a CPU's instruction set."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def platform(device: torch.device) -> dict[str, str]:
    """The versions and the device that decide how numbers are rounded."""
    return {
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "device": device_name(device),
    }


# What is computed in which dtype


def has_bfloat16(facts: DeviceFacts) -> bool:
    """Whether matrix products in bfloat16 run in hardware; emulation would be slower than float32.

    NVIDIA GPUs have it from compute capability 8.0 (Ampere); AMD reports 9 and above.
    """
    return facts.capability >= (8, 0) if facts.kind == "cuda" else facts.bfloat16


def computes_bfloat16_natively(device: torch.device) -> bool:
    return has_bfloat16(read_facts(device))


def compute_dtype(precision: str, policy_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Resolve the precision setting (float32, bfloat16 or auto) to the dtype of forward and backward passes."""
    if precision != "auto":
        return getattr(torch, precision)
    native = policy_dtype == torch.bfloat16 or computes_bfloat16_natively(device)
    return torch.bfloat16 if native else torch.float32


def float32_products(facts: DeviceFacts) -> Literal["highest", "high"]:
    """Torch's precision of float32 matrix products: TF32 on GPUs from compute capability 8.0."""
    return "high" if facts.kind == "cuda" and facts.capability >= (8, 0) else "highest"


def autocast(parameters: torch.dtype, dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Compute in dtype if the parameters are in float32, else in the parameters' own dtype."""
    return torch.autocast(device.type, dtype, enabled=parameters == torch.float32 and dtype != torch.float32)


def limit_onednn_cache() -> None:
    """Limit oneDNN's kernel caches unless the environment does; call it before any matrix product.

    oneDNN makes a kernel for each shape of a bfloat16 product, and nearly every forward pass has new shapes. By default
    it keeps 1,024 kernels, and torch's bridge to it as many again (LRU_CACHE_CAPACITY): 0.7 GB, in pieces that fragment
    malloc's free memory.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, "64")  # a forward pass uses about 30 shapes


# Memory


def total_memory(device: torch.device) -> int:
    """The bytes of memory of a device; for a CPU, of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_memory(device: torch.device, root: Path = Path("/")) -> int:
    """The bytes that this process holds or can still get on a device, within the limit of its control group.

    What other processes of the group hold is not known. root is where /proc and /sys are.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    held = int((root / "proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    free = re.search(r"MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text())
    assert free is not None, "/proc/meminfo has MemAvailable since Linux 3.14"
    return min([held + 1024 * int(free[1]), *group_limits(root)])


# Where control groups keep their limits, by the controllers in a line of /proc/self/cgroup: versions 2 and 1.
GROUPS = {"": ("sys/fs/cgroup", "memory.max"), "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes")}


def group_limits(root: Path) -> Iterator[int]:
    """Yield the memory limits, in bytes, of this process's control groups and their parents: cgroups(7)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if controllers in GROUPS:
            top, name = GROUPS[controllers]
            path = root / top / group.lstrip("/")
            for folder in [path, *path.parents][: len(Path(group).parts)]:
                with suppress(OSError, ValueError):  # a group of another namespace, or "max"
                    yield int((folder / name).read_text())


def peak_memory(device: torch.device) -> int:
    """The most bytes that were in use at once: on a GPU by torch's tensors, else by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        if peak:
            return 1024 * int(peak[1])
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def reset_peak_memory(device: torch.device) -> bool:
    """Free unused memory and restart peak_memory; False if this system cannot restart it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with suppress(AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)
    except OSError:
        return False
    return True
