"""What kernels and the choice of backends ask of a device."""

import functools

import torch


def capability(device: torch.device) -> int:
    """Compute capability of a CUDA device as one number, 80, 90, ...; 0 of any other, where kernels are interpreted."""
    if device.type != "cuda":
        return 0
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor
