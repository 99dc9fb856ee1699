"""The launches of lora_mlp that aot.py compiles: what lies between the products, which are lora_linear's."""

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (x's dtype, the adapters', the activation, no dropout, rows of a chunk, I)
LORA_MLP = (
    *((BF16, BF16, (activation,), 0.0, 512, 14336) for activation in ("silu", "gelu", "gelu_tanh")),
    (FP16, FP16, ("silu",), 0.0, 127, 1001),
    (FP32, FP32, ("gelu",), 0.0, 512, 96),
)


def lora_mlp(x_dtype, dtype, activations, dropout, rows, inner) -> None:
    """Launch the activation's forward and backward."""
    from fastpeft.kernels import lora_mlp as kernels

    gate, up, dh = (torch.empty(rows, inner, dtype=x_dtype, device="meta") for _ in range(3))
    for activation in activations:
        kernels.forward(gate, up, activation)
        kernels.backward_(dh, gate, up, activation)
