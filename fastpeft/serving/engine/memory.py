"""How much memory the cache may take by default, and what an error says of the memory and of the device."""

import os
from pathlib import Path

import torch

GPU_SHARE, HOST_SHARE = 0.8, 0.25  # of what is free when the batcher is made


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no more."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def device_lost(error: BaseException) -> bool:
    """Whether the device serves nothing from now on, as after a wrong address or an assertion on it."""
    return isinstance(error, torch.AcceleratorError)


def cache_bytes(device: torch.device, promised: int) -> int:
    """What the cache may take: a share of the memory that is free, without what is promised to the slots.

    Args:
        device: of the model.
        promised: bytes that others will take yet.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(0, int(GPU_SHARE * (free - promised)))
    return max(0, int(HOST_SHARE * (_host_free() - promised)))


def _host_free() -> int:
    """Bytes that this process may still take, as far as the system tells: of the machine, and of its own group."""
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except OSError:
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    try:
        most, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        found.append(most - used)
    except (OSError, ValueError):  # no group, or no bound
        pass
    return min(found)
