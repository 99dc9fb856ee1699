"""The norms of the rows of ``W + scale · B A``, which is never formed.

    n² = ‖W‖² + 2 s Σ_r (W Aᵀ) ∘ B + s² Σ_r (B A Aᵀ) ∘ B

W is read twice: for its own norms and for W Aᵀ ``[N, r]``. Nothing is kept from one call to the next: optimizers that
write by address (8-bit ones, fused ones, those that go through ``.data``) change A and B without a trace.
"""

import torch
from torch import Tensor

from .. import _backend


def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, backend: str) -> Tensor:
    """``‖W + scale · B A‖`` of each row, ``[N]`` in float32 (float64 for float64 adapters).

    Its square errs by about ``eps · (‖W‖² + ‖scale · B A‖²)``, as does a norm of the sum itself unless nearly all of a
    row cancels.
    """
    sums = torch.promote_types(lora_a.dtype, torch.float32)
    a, b = lora_a.to(sums), lora_b.to(sums)
    product = _backend.load("lora_linear", backend).down(weight, [a], [1.0], [0.0], None)
    term = product.mul_(2).addmm_(b, a @ a.T, alpha=scale).mul_(b).sum(1)
    own = torch.linalg.vector_norm(weight, dim=1, dtype=sums)
    return own.square_().add_(term, alpha=scale).clamp_(min=0).sqrt_()
