"""What can be tested on this machine: its device, and which backend serves which dtypes there."""

import pytest
import torch

from fastpeft.ops.lora_linear import REASONS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ("reference", "triton")
FP64, FP32, FP16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


def served(*dtypes: tuple[torch.dtype, torch.dtype]) -> list:
    """(backend, x's dtype, the adapters' dtype) for every backend that serves the pair here."""
    found = []
    for backend in BACKENDS:
        for dtype, adapter in dtypes or ((FP64, FP64), *TRAINING):
            x, a = (torch.empty(1, 1, dtype=d, device=DEVICE) for d in (dtype, adapter))
            if REASONS[backend](x, [a]) is None:
                names = dict.fromkeys(str(d).removeprefix("torch.") for d in (dtype, adapter))
                found.append(pytest.param(backend, dtype, adapter, id="-".join((backend, *names))))
    return found


TRAINING = ((FP32, FP32), (FP16, FP16), (BF16, BF16), (FP16, FP32), (BF16, FP32))
