"""What aot.py compiles of lora_embedding."""

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
LORA_EMBEDDING = (
    *((BF16, dtype, (rank,), 0.0, 4096, 4096, 128256) for dtype in (BF16, FP32) for rank in (8, 16, 64, 256)),
    (FP16, FP32, (17,), 0.0, 127, 1001, 1003),
    (FP32, FP32, (16,), 0.0, 4096, 4096, 128256),
)


def lora_embedding(x_dtype, dtype, ranks, dropout, m, d, v) -> None:
    """Launch a forward with the table and one without, and a backward."""
    from fastpeft.kernels import lora_embedding as kernels

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    ids, (rank,) = new(m, dtype=torch.int64), ranks
    s, b = new(m, rank), new(d, rank)
    y = kernels.forward(ids, new(v, d, dtype=x_dtype), s, b)
    kernels.forward(ids, new(0), s, b)
    kernels.backward(y, s, b, 0.5, True, True)
