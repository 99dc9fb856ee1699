"""The gated MLP with DoRA on its three projections, in plain PyTorch: the definition; autograd differentiates it.

Its steps are those of ``lora_linear``, ``dora_linear`` and ``lora_mlp``.
"""

from collections.abc import Sequence

from torch import Tensor

from .dora_linear import dora_linear
from .lora_linear import lora_linear
from .lora_mlp import activate


def dora_mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    magnitudes: Sequence[Tensor | None],
    biases: Sequence[Tensor | None] = (None, None, None),
    scales: Sequence[float] = (1.0, 1.0, 1.0),
    dropouts: Sequence[float] = (0.0, 0.0, 0.0),
    seeds: Tensor | None = None,
    norms: Sequence[Tensor | None] = (None, None, None),
    activation: str = "silu",
) -> Tensor:
    """``down(act(gate(x)) ∘ up(x))``, each projection a ``dora_linear``, or a ``lora_linear`` without a magnitude.

    Args:
        x: the input ``[..., K]``.
        weights: of gate ``[I, K]``, up ``[I, K]`` and down ``[N, I]``; every list is in this order.
        lora_as: ``[r, K]``, ``[r, K]`` and ``[r, I]``, each of its own rank.
        lora_bs: ``[I, r]``, ``[I, r]`` and ``[N, r]``.
        magnitudes: ``[I]``, ``[I]`` and ``[N]``, the norms that the rows are given; None for a projection with LoRA.
        biases: ``[I]``, ``[I]`` and ``[N]``, or None.
        scales: factors of B A, without a unit.
        dropouts: probabilities of dropping an element wherever an adapter acts, in [0, 1).
        seeds: of the dropout masks, int64 ``[3]`` on x's device. They are read where there is dropout.
        norms: the rows' norms where they are known; constants to every gradient.
        activation: "silu", "gelu" (erf) or "gelu_tanh".

    Returns:
        ``[..., N]`` in x's dtype.
    """
    drawn = [None] * 3 if seeds is None else seeds.unbind()

    def projection(x: Tensor, p: int) -> Tensor:
        tensors, magnitude = (x, weights[p], lora_as[p], lora_bs[p]), magnitudes[p]
        settings = biases[p], scales[p], dropouts[p], drawn[p]
        return (
            lora_linear(*tensors, *settings)
            if magnitude is None
            else dora_linear(*tensors, magnitude, *settings, norms[p])
        )

    return projection(activate(projection(x, 0), activation) * projection(x, 1), 2)
