"""What a training step costs in memory: what autograd keeps for backward, and the peak of a whole process."""

import multiprocessing
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch import Tensor, nn


def saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward: each storage once, parameters and buffers not."""
    resident = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss()  # while it lives, so does what it keeps, and no address is used twice
    value.backward()
    return sum(kept.values())


def in_fresh_process(function: Callable, *arguments):
    """The result of a function in a process of its own, where nothing else has used memory."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(device: torch.device, work: Callable[[], None]) -> int:
    """Peak bytes while ``work`` runs: of this process on the CPU, of torch's allocator on a GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return torch.cuda.max_memory_allocated(device)
    forgot = forget_peak()
    work()
    if forgot:
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> bool:
    """Forget the peak so far, that of loading the model. Only Linux can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
