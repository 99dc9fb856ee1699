"""The gated MLP with LoRA on its three projections, in plain PyTorch: the definition, and the steps of every backend.

``lora_mlp`` is what the op means; autograd differentiates it. The products around the activation are the steps of
``lora_linear``; what lies between them is here, on the rows of a chunk: ``gate``, ``up``, ``h`` and their gradients
``[rows, I]``.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .lora_linear import lora_linear

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
_FEWEST, _CHUNKS = 64, 4  # rows of a chunk, below which a product of a CPU is slower by the row; chunks at most


def lora_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor | None] = (None, None, None),
    scales: Sequence[float] = (1.0, 1.0, 1.0),
    dropouts: Sequence[float] = (0.0, 0.0, 0.0),
    seeds: Tensor | None = None,
    activation: str = "silu",
) -> Tensor:
    """``down(act(gate(x)) ∘ up(x))``, each projection a ``lora_linear`` (Shazeer, "GLU Variants", 2020).

    Args:
        x: the input ``[..., K]``.
        weights: of gate ``[I, K]``, up ``[I, K]`` and down ``[N, I]``; every list is in this order.
        lora_as: ``[r, K]``, ``[r, K]`` and ``[r, I]``, each of its own rank.
        lora_bs: ``[I, r]``, ``[I, r]`` and ``[N, r]``.
        biases: ``[I]``, ``[I]`` and ``[N]``, or None.
        scales: factors of the low-rank terms, without a unit.
        dropouts: probabilities of dropping an element of a low-rank branch's input, in [0, 1).
        seeds: of the dropout masks, int64 ``[3]`` on x's device. They are read where there is dropout.
        activation: "silu", "gelu" (erf) or "gelu_tanh".

    Returns:
        ``[..., N]`` in x's dtype.
    """
    given = [None] * 3 if seeds is None else seeds.unbind()
    gate, up, down = zip(weights, lora_as, lora_bs, biases, scales, dropouts, given, strict=True)
    return lora_linear(activate(lora_linear(x, *gate), activation) * lora_linear(x, *up), *down)


def activate(gate: Tensor, activation: str) -> Tensor:
    """``act(gate)`` by the activation's name."""
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate=_APPROXIMATE[activation])


def chunk_rows(rows: int, columns: int) -> int:
    """How many rows are computed at a time, of so many rows of x and so many columns of the narrowest product."""
    return max(_FEWEST, -(-rows // _CHUNKS))


def part_columns(rows: int, columns: int) -> int:
    """How many columns of a product are computed at a time where its weight is quantised: all, as a CPU has memory."""
    return columns


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``h = act(gate) ∘ up``."""
    return activate(gate, activation).mul_(up)


def backward_(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``dgate = dh ∘ up ∘ act'(gate)`` and ``dup = dh ∘ act(gate)``, which takes dh's place."""
    dgate = dh * up
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
    else:
        torch.ops.aten.gelu_backward.grad_input(dgate, gate, approximate=_APPROXIMATE[activation], grad_input=dgate)
    return dgate, dh.mul_(activate(gate, activation))
