"""What a row must say about the machine it was timed on, and how fast that machine could be at best."""

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

# Dense peak operations per second, by compute capability (NVIDIA's data sheets, largest board of each).
_FLOPS = {
    80: {"16": 312e12, "32": 19.5e12, "64": 19.5e12},
    86: {"16": 71e12, "32": 35.6e12, "64": 0.56e12},
    89: {"16": 165e12, "32": 82.6e12, "64": 1.29e12},
    90: {"16": 989e12, "32": 66.9e12, "64": 66.9e12},
    100: {"16": 2250e12, "32": 80e12, "64": 40e12},
    120: {"16": 209e12, "32": 104.8e12, "64": 1.64e12},
}


def facts(device: torch.device) -> dict:
    """The columns of a row that do not change during a run."""
    row = {"device": _cpu_name(), "capability": None, "driver": None}
    if device.type == "cuda":
        name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        row = {"device": name, "capability": 10 * capability[0] + capability[1], "driver": _driver()}
    return {
        **row,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "peft": _version("peft"),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        **_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes per second, operations per second) that no run can beat; measured where no data sheet is at hand."""
    bits = str(8 * dtype.itemsize)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        clock, width = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
        flops = _FLOPS.get(10 * properties.major + properties.minor, {}).get(bits)
        if clock and width and flops:
            return 2e3 * clock * width / 8, flops  # clock in kHz, two transfers each; width in bits
    return _measured_bandwidth(device), _measured_flops(device, dtype)


def argument_sets(device: torch.device, bytes_of_a_set: int, most: int | None = None) -> int:
    """How many sets calls rotate through: on a GPU four, or more until they are three times its cache.

    On a CPU one, since there a layer's operands come from the layers around it and are often still in its cache in
    training too.
    """
    if device.type != "cuda":
        return 1
    sets = max(4, 1 + 3 * torch.cuda.get_device_properties(device).L2_cache_size // bytes_of_a_set)
    return sets if most is None else min(most, sets)


def seconds(function, device: torch.device, repeats: int) -> float:
    """The shortest of ``repeats`` runs."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


@functools.cache
def _measured_bandwidth(device: torch.device) -> float:
    source = torch.ones(1 << 26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds(lambda: target.copy_(source), device, 7)


@functools.cache
def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b, device, 5)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _driver() -> str | None:
    found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found.splitlines()[0] if found else None


def _commit() -> dict:
    """Of the checkout; where it travelled without its history, of FASTPEFT_COMMIT."""
    commit = _output("git", "rev-parse", "--short=10", "HEAD")
    if not commit:
        return {"commit": os.environ.get("FASTPEFT_COMMIT"), "dirty": None}
    changed = _output("git", "status", "--porcelain", "--", "../fastpeft", "../kernels", "../csrc", ".")
    return {"commit": commit, "dirty": bool(changed)}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"
