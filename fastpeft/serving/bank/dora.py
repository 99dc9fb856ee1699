"""DoRA in a bank: folded when an adapter is read into B and a factor for each column of what the layer gives.

y = g ∘ (x Wᵀ) + bias + scale · (x Aᵀ) (g ∘ B)ᵀ        g = magnitude / ‖W + scale · B A‖
"""

from typing import Any

import torch
from torch import Tensor

from ...nn import dora
from ..errors import BadCheckpoint
from .experts import ExpertSite


@torch.no_grad()
def folded(
    op: str, name: str, site: Any, a: Tensor, b: Tensor, magnitude: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """``g ∘ B`` and ``g - 1``, in float32 in the host's memory.

    Raises:
        BadCheckpoint: the layer is none that DoRA is served for, or the magnitude does not fit.
    """
    rows = site.out_features
    if site.embedding or isinstance(site, ExpertSite):
        raise BadCheckpoint(f"{op}: {name!r} has DoRA at {site.path}, expected it on linear layers alone")
    if magnitude is None or magnitude.shape != (rows,):
        found = "none" if magnitude is None else list(magnitude.shape)
        raise BadCheckpoint(f"{op}: {name!r} has the magnitude {found} at {site.path}, expected [{rows}]")
    if b.shape[0] != rows or a.shape != (b.shape[1], site.in_features):
        raise BadCheckpoint(f"{op}: {name!r} has A {list(a.shape)} and B {list(b.shape)} at {site.path}")
    a, b, magnitude = (t.to(site.device, torch.float32) for t in (a, b, magnitude))
    try:
        gain = magnitude / dora.norm(site.module, a, b, scale)
    except ValueError as error:
        raise BadCheckpoint(f"{op}: {name!r} has DoRA at {site.path}, where {error}") from None
    return (b * gain[:, None]).cpu(), (gain - 1).cpu()
