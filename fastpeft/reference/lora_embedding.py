"""LoRA around a frozen embedding, in plain PyTorch: the definition, and the steps that every backend offers.

``lora_embedding`` is what the op means; autograd differentiates it. Shapes: ``ids [M]``, ``table [V, D]``,
``a [r, V]``, ``b [D, r]``, ``s [M, r]``. a and b may have a wider dtype than the table; s always has theirs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .lora_linear import row_blocks


def lora_embedding(
    ids: Tensor,
    table: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scale: float = 1.0,
    padding_idx: int | None = None,
) -> Tensor:
    """``y = E[ids] + scale · A[:, ids]ᵀ Bᵀ`` (Hu et al., "LoRA", 2021).

    Args:
        ids: token ids ``[...]``.
        table: E ``[V, D]``, or None for the low-rank term alone.
        lora_a: A ``[r, V]``, in the table's dtype or a wider one, in which the low-rank branch is then computed.
        lora_b: B ``[D, r]`` in lora_a's dtype.
        scale: factor of the low-rank term, without a unit.
        padding_idx: the id of whose column A gets no gradient, or None.

    Returns:
        ``[..., D]`` in the table's dtype, without one in lora_a's.
    """
    low = scale * (F.embedding(ids, lora_a.T, padding_idx) @ lora_b.T)
    return low if table is None else (F.embedding(ids, table) + low).to(table.dtype)


def forward(ids: Tensor, table: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """``E[ids] + S Bᵀ``, rounded once: ``[M, D]``; an absent table is an empty tensor."""
    if not table.numel():
        return s @ b.T
    y = table.new_empty(ids.shape[0], table.shape[1])
    for rows in row_blocks(s.dtype, y):
        y[rows] = torch.mm(s[rows], b.T).add_(table.index_select(0, ids[rows]))
    return y


def backward(
    dy: Tensor, s: Tensor, b: Tensor, scale: float, need_ds: bool, need_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``dS = scale · dY B`` ``[M, r]`` and ``dB = dYᵀ S`` ``[D, r]``."""
    ds = b.new_empty(dy.shape[0], b.shape[1]) if need_ds else None
    db = b.new_zeros(b.shape[1], b.shape[0]) if need_db else None
    for rows in row_blocks(b.dtype, dy):
        wide = dy[rows].to(b.dtype)
        if ds is not None:
            ds[rows].addmm_(wide, b, beta=0, alpha=scale)
        if db is not None:
            db.addmm_(s[rows].T, wide)
    return ds, None if db is None else db.T.contiguous()
