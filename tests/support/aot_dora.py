"""The launches of dora_linear that aot.py compiles: what lies between the products, which are lora_linear's."""

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (x's dtype, the adapters', ranks, dropout, M, K)
DORA_LINEAR = (
    (BF16, FP32, (16, 64), 0.1, 8192, 4096),
    (BF16, BF16, (17,), 0.1, 127, 1001),
    (FP16, FP16, (16, 256), 0.1, 8192, 4096),
    (FP32, FP32, (16,), 0.1, 8192, 96),
)


def dora_linear(x_dtype, dtype, ranks, dropout, rows, columns) -> None:
    """Launch the mask's, the gain's and its gradient's kernels."""
    from fastpeft.kernels import dora_linear as kernels

    x, y = (torch.empty(rows, columns, dtype=x_dtype, device="meta") for _ in range(2))
    gain, seeds = torch.empty(columns, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
    kernels.add_masked_(y, kernels.masked(x, dropout, seeds), dropout, seeds)
    kernels.gain_gradient(y, kernels.scaled(x, gain), FP32)
    for rank in ranks:
        s, c = (torch.empty(size, rank, dtype=dtype, device="meta") for size in (rows, columns))
        kernels.combined(s, c, None, x, gain)
        kernels.combined(s, c, gain, x, gain, y)
