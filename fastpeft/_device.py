"""What kernels and the choice of backends ask of a device."""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device as one number, 80, 90, ...; 0 of any other, where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def on_device(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers, to be kept from call to call.

    What this thread allocates while ``torch.compile`` prepares a CUDA graph is the graph's, which gives it to others
    afterwards; so on a GPU another thread allocates it, and waits until it is there for every stream.
    """
    if device.type != "cuda":
        with torch.inference_mode(False):
            return torch.tensor(values, dtype=dtype, device=device)
    with ThreadPoolExecutor(1) as other:
        return other.submit(torch.tensor, values, dtype=dtype, device=device).result()


def constant(values: tuple, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers, which nobody may write to.

    On a GPU it is made once: copying it there waits for the device, and cannot be captured in a CUDA graph.
    """
    if device.type != "cuda" or torch.compiler.is_compiling() or torch._guards.detect_fake_mode() is not None:
        return torch.tensor(values, dtype=dtype, device=device)
    return _constant(values, dtype, device)


_constant = functools.lru_cache(maxsize=4096)(on_device)
