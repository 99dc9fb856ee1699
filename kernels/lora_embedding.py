"""LoRA around a frozen embedding: the table's rows and the low-rank term, added before they are rounded, in one write.

    forward         Y = E[ids] + S Bᵀ                  one read of what Y is made of, one write of Y
    backward        dS = scale · dY B, dB = dYᵀ S      lora_linear's: one read of dY, up to rank 16

Alphabet: ids [M] are rows of E [V, D]; Y has rows m and columns k < D; S has columns r < R. An id outside of the table
reads nothing.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Config, capability, cdiv, launch, next_power_of_2
from .lora_linear_backward import ups_backward
from .planes import dot, products


def config(rank: int, capability: int) -> Config:
    """The tile sizes by rank, which is walked in blocks; more columns spill in three TF32 terms. Not yet measured."""
    if capability == 120:
        return Config(32, 32, 16, 4, 1)
    return Config(32, 64, min(max(16, next_power_of_2(rank)), 32), 4, 1)


@triton.jit
def _embed_kernel(
    ids_ptr, e_ptr, s_ptr, b_ptr, y_ptr,
    M, D, R, V,
    stride_i, stride_ev, stride_ek, stride_sm, stride_sr, stride_bk, stride_br, stride_ym,
    TABLE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    for r0 in range(0, R, BLOCK_R):
        r = (r0 + tl.arange(0, BLOCK_R)).to(tl.int64)
        s_tile = s_ptr + m[:, None] * stride_sm + r[None, :] * stride_sr
        s = tl.load(s_tile, mask=(m < M)[:, None] & (r < R)[None, :], other=0.0)  # [BLOCK_M, BLOCK_R]
        b_tile = b_ptr + r[:, None] * stride_br + k[None, :] * stride_bk
        b = tl.load(b_tile, mask=(r < R)[:, None] & (k < D)[None, :], other=0.0)  # [BLOCK_R, BLOCK_K]
        acc = dot(s, b, acc, PRECISION)
    inside = (m < M)[:, None] & (k < D)[None, :]
    if TABLE:
        row = tl.load(ids_ptr + m * stride_i, mask=m < M, other=-1).to(tl.int64)  # [BLOCK_M]
        known = (row >= 0) & (row < V)
        e = tl.load(e_ptr + row[:, None] * stride_ev + k[None, :] * stride_ek, mask=inside & known[:, None], other=0.0)
        acc += e.to(ACC)
    tl.store(y_ptr + m[:, None] * stride_ym + k[None, :], acc, mask=inside)


def forward(ids: Tensor, table: Tensor, s: Tensor, b: Tensor) -> Tensor:
    """``E[ids] + S Bᵀ``, rounded once: ``[M, D]``; an absent table is an empty tensor."""
    (m, rank), d, found = s.shape, b.shape[0], table.numel() > 0
    y = s.new_empty(m, d, dtype=table.dtype if found else b.dtype)
    c = config(rank, capability(s))
    strides = table.stride() if found else (0, 0)
    launch(
        _embed_kernel, (cdiv(m, c.block_m), cdiv(d, c.block_k)), c, products(s, b, y.dtype),
        ids, table, s, b, y, m, d, rank, table.shape[0],
        ids.stride(0), *strides, *s.stride(), *b.stride(), y.stride(0), TABLE=found,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor, s: Tensor, b: Tensor, scale: float, need_ds: bool, need_db: bool
) -> tuple[Tensor | None, Tensor | None]:
    """``dS = scale · dY B`` ``[M, r]`` and ``dB = dYᵀ S`` ``[D, r]``."""
    ds, dbs = ups_backward([dy], s, [b], [scale], need_ds, need_db)
    return ds, None if dbs is None else dbs[0]


def describe(table: Tensor, lora_a: Tensor) -> list[str]:
    """The kernel configuration of a call, for ``fastpeft.explain``."""
    return [f"embed: {config(lora_a.shape[0], capability(lora_a))}"]
