"""Learned prompts in front of token embeddings: one launch writes embeddings, mask, positions and labels of a batch.

    gather            Y[b] = [padding] prompt_b, tokens_b [padding]           one write of Y, one read of what fills it
    prompt_backward   dprompts_p = Σ_{b has p} dY[b, its place]               rows in their order, parts added in order
    source_backward   dX[b, t] = dY[b, its place]

Alphabet: places m < W of row b, columns k < D. The tokens of a row lie between the first and the last position where
its mask is not 0; every program finds them itself, by a read of that one row of the mask. There are no products here.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._device import on_device
from .launch import Tile, cdiv, next_power_of_2, run, split
from .partials import reduce_partials

BLOCK_T = 1024  # positions of the mask read at a time
# What ``rows`` holds of every row of the batch, in this order, and how much that is.
PROMPT, OFFSET, FIRST, COUNT = map(tl.constexpr, range(4))
FIELDS = tl.constexpr(4)


def config(step: str, columns: int, dtype: torch.dtype) -> Tile:
    """The tile sizes of ``step``, by shape and dtype."""
    block_k = min(max(32, next_power_of_2(columns)), 512 if dtype.itemsize <= 2 else 256)
    if step == "gather":  # a program writes all columns of its places, so that the mask is read once for them
        return Tile(8, block_k)
    if step == "prompt_backward":  # few prompts: narrow tiles, so that there are programs enough
        return Tile(8, min(block_k, 128 if dtype.itemsize <= 2 else 64))  # 128 of float32 spill on sm_80
    if step == "source_backward":
        return Tile(8, block_k)
    raise ValueError(f"config: step is {step!r}, expected gather, prompt_backward or source_backward")


@triton.jit
def _gather_kernel(
    prompts_ptr, x_ptr, ids_ptr, prompt_ids_ptr, starts_ptr, mask_ptr, positions_ptr, labels_ptr,
    y_ptr, y_mask_ptr, y_positions_ptr, y_labels_ptr, rows_ptr,
    T, W, D, V, N, IGNORE,
    stride_ps, stride_pd, stride_xb, stride_xt, stride_xd, stride_ib, stride_it, stride_prompt,
    stride_mb, stride_mt, stride_ob, stride_ot, stride_lb, stride_lt,
    IDS: tl.constexpr, MASK: tl.constexpr, POSITIONS: tl.constexpr, LABELS: tl.constexpr, LEFT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    b, pid_m = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first, stop = tl.zeros((), tl.int64), tl.zeros((), tl.int64) + T
    if MASK:
        first, stop = stop, first
        for t0 in range(0, T, BLOCK_T):
            t = (t0 + tl.arange(0, BLOCK_T)).to(tl.int64)
            on = tl.load(mask_ptr + b * stride_mb + t * stride_mt, mask=t < T, other=0) != 0
            first = tl.minimum(first, tl.min(tl.where(on, t, T), 0))
            stop = tl.maximum(stop, tl.max(tl.where(on, t + 1, 0), 0))
        first = tl.minimum(first, stop)
    count = stop - first
    p = tl.load(prompt_ids_ptr + b * stride_prompt).to(tl.int64)
    known = (p >= 0) & (p < N)
    p = tl.where(known, p, -1)
    start = tl.load(starts_ptr + p, mask=known, other=0)
    size = tl.load(starts_ptr + p + 1, mask=known, other=0) - start
    offset = tl.zeros((), tl.int64)
    if LEFT:
        offset += W - size - count
    if pid_m == 0:
        tl.store(rows_ptr + b * FIELDS + PROMPT, p)
        tl.store(rows_ptr + b * FIELDS + OFFSET, offset)
        tl.store(rows_ptr + b * FIELDS + FIRST, first)
        tl.store(rows_ptr + b * FIELDS + COUNT, count)

    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    place = m - offset
    token = place - size
    prompted = (m < W) & (place >= 0) & (token < 0)
    inside = (m < W) & (token >= 0) & (token < count)
    t = first + token
    on = (prompted | inside).to(tl.int64)
    if MASK:
        read = tl.load(mask_ptr + b * stride_mb + t * stride_mt, mask=inside, other=0)
        on = tl.where(inside, read.to(tl.int64), on)
    tl.store(y_mask_ptr + b * W + m, on.to(y_mask_ptr.dtype.element_ty), mask=m < W)
    number = token
    if POSITIONS:
        number = tl.load(positions_ptr + b * stride_ob + t * stride_ot, mask=inside, other=0).to(tl.int64)
    number = tl.where(inside, number + size, tl.where(prompted, place, 0))
    tl.store(y_positions_ptr + b * W + m, number, mask=m < W)
    if LABELS:
        label = tl.load(labels_ptr + b * stride_lb + t * stride_lt, mask=inside, other=0).to(tl.int64)
        tl.store(y_labels_ptr + b * W + m, tl.where(inside, label, IGNORE), mask=m < W)

    if IDS:
        at = tl.load(ids_ptr + b * stride_ib + t * stride_it, mask=inside, other=0).to(tl.int64)
        found = inside & (at >= 0) & (at < V)
    else:
        at, found = t, inside
    for k0 in range(0, D, BLOCK_K):
        k = (k0 + tl.arange(0, BLOCK_K)).to(tl.int64)  # [BLOCK_K]
        ok = (k < D)[None, :]
        if IDS:
            x_tile = x_ptr + at[:, None] * stride_xt + k[None, :] * stride_xd
        else:
            x_tile = x_ptr + b * stride_xb + at[:, None] * stride_xt + k[None, :] * stride_xd
        y = tl.load(x_tile, mask=found[:, None] & ok, other=0.0)  # [BLOCK_M, BLOCK_K]
        if IDS:  # a token that is not in the vocabulary must not look like one that is
            y = tl.where((inside & (found == 0))[:, None], float("nan"), y).to(y.dtype)
        p_tile = prompts_ptr + (start + place)[:, None] * stride_ps + k[None, :] * stride_pd
        prompt = tl.load(p_tile, mask=prompted[:, None] & ok, other=0.0)
        y = tl.where(prompted[:, None], prompt.to(y.dtype), y)
        tl.store(y_ptr + (b * W + m)[:, None] * D + k[None, :], y, mask=(m < W)[:, None] & ok)


@triton.jit
def _prompt_backward_kernel(
    dy_ptr, rows_ptr, starts_ptr, dp_ptr,
    B, S, D, TILES, SPAN,
    stride_yb, stride_ym, stride_yk,
    ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid_m, pid_k, pid_p = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    p = pid_m // TILES
    start = tl.load(starts_ptr + p)
    size = tl.load(starts_ptr + p + 1) - start
    m = pid_m % TILES * BLOCK_M + tl.arange(0, BLOCK_M)  # of the prompt
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), ACC)
    first = pid_p * SPAN
    for i in range(first, tl.minimum(first + SPAN, B)):
        b = tl.zeros((), tl.int64) + i
        rows = tl.where(tl.load(rows_ptr + b * FIELDS + PROMPT) == p, size, 0)
        offset = tl.load(rows_ptr + b * FIELDS + OFFSET)
        dy_tile = dy_ptr + b * stride_yb + (offset + m)[:, None] * stride_ym + k[None, :] * stride_yk
        acc += tl.load(dy_tile, mask=(m < rows)[:, None] & (k < D)[None, :], other=0.0).to(ACC)
    dp_tile = dp_ptr + pid_p * S * D + (start + m)[:, None] * D + k[None, :]
    tl.store(dp_tile, acc, mask=(m < size)[:, None] & (k < D)[None, :])


@triton.jit
def _source_backward_kernel(
    dy_ptr, rows_ptr, starts_ptr, dx_ptr,
    T, D,
    stride_yb, stride_ym, stride_yk,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    b, pid_m, pid_k = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)  # positions in the input
    k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    p, offset = tl.load(rows_ptr + b * FIELDS + PROMPT), tl.load(rows_ptr + b * FIELDS + OFFSET)
    first, count = tl.load(rows_ptr + b * FIELDS + FIRST), tl.load(rows_ptr + b * FIELDS + COUNT)
    start = tl.load(starts_ptr + p, mask=p >= 0, other=0)
    size = tl.load(starts_ptr + p + 1, mask=p >= 0, other=0) - start
    inside = (m >= first) & (m < first + count)
    place = offset + size + m - first
    dy_tile = dy_ptr + b * stride_yb + place[:, None] * stride_ym + k[None, :] * stride_yk
    dy = tl.load(dy_tile, mask=inside[:, None] & (k < D)[None, :], other=0.0)
    tl.store(dx_ptr + (b * T + m)[:, None] * D + k[None, :], dy, mask=(m < T)[:, None] & (k < D)[None, :])


@lru_cache(maxsize=256)
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """``int64 [N + 1]``: where each prompt begins in the table."""
    return on_device([*accumulate(lengths, initial=0)], torch.int64, device)


def forward(
    prompts: Tensor,
    lengths: Sequence[int],
    prompt_ids: Tensor,
    source: Tensor,
    ids: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    position_ids: Tensor | None,
    width: int,
    left: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Embeddings, mask, positions, labels, and ``rows [B, 4]``: prompt, offset, first token and tokens of every row."""
    (b, t), d = (source.shape[:2] if ids is None else ids.shape), source.shape[-1]
    c = config("gather", d, source.dtype)
    y = source.new_empty(b, width, d)
    kind = torch.int64 if attention_mask is None else attention_mask.dtype
    mask, positions = (source.new_empty(b, width, dtype=dtype) for dtype in (kind, torch.int64))
    y_labels = None if labels is None else source.new_empty(b, width, dtype=torch.int64)
    rows = source.new_empty(b, FIELDS.value, dtype=torch.int64)
    grid = b, max(1, cdiv(width, c.block_m))  # without places, still the rows
    strides = [(0, 0) if o is None else o.stride() for o in (ids, attention_mask, position_ids, labels)]
    if b:
        run(
            _gather_kernel, grid,
            prompts, source, ids, prompt_ids, _starts(tuple(lengths), source.device),
            attention_mask, position_ids, labels, y, mask, positions, y_labels, rows,
            t, width, d, source.shape[0], len(lengths), ignore_index,
            *prompts.stride(), *(source.stride() if ids is None else (0, *source.stride())), *strides[0],
            prompt_ids.stride(0), *strides[1], *strides[2], *strides[3],
            IDS=ids is not None, MASK=attention_mask is not None, POSITIONS=position_ids is not None,
            LABELS=labels is not None, LEFT=left,
            BLOCK_T=min(BLOCK_T, next_power_of_2(max(t, 16))),
            **c.options,
        )  # fmt: skip
    return y, mask, positions, y_labels, rows


def backward(
    dy: Tensor,
    rows: Tensor,
    lengths: Sequence[int],
    dtype: torch.dtype,
    tokens: int,
    need_prompts: bool,
    need_source: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dprompts ``[S, D]`` in ``dtype`` and dx ``[B, tokens, D]``; None where it is not needed."""
    dprompts = prompt_backward(dy, rows, lengths, dtype) if need_prompts else None
    return dprompts, source_backward(dy, rows, lengths, tokens) if need_source else None


def prompt_backward(dy: Tensor, rows: Tensor, lengths: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``dprompts [S, D]`` in ``dtype``: sums in float32 (float64 for gradcheck), of a prompt's rows in their order."""
    (b, _, d), s, c = dy.shape, sum(lengths), config("prompt_backward", dy.shape[2], dy.dtype)
    wide = dtype == torch.float64
    tiles = cdiv(max(lengths, default=0), c.block_m)
    grid = len(lengths) * tiles, cdiv(d, c.block_k)
    parts, span = split(b, 1, grid[0] * grid[1], least=16)
    partials = dy.new_empty(parts, s, d, dtype=torch.float64 if wide else torch.float32)
    if 0 not in grid:
        run(
            _prompt_backward_kernel, (*grid, parts),
            dy, rows, _starts(tuple(lengths), dy.device), partials, b, s, d, tiles, span, *dy.stride(),
            ACC=tl.float64 if wide else tl.float32, **c.options,
        )  # fmt: skip
    return reduce_partials(partials, dtype)


def source_backward(dy: Tensor, rows: Tensor, lengths: Sequence[int], tokens: int) -> Tensor:
    """``dx [B, T, D]``: 0 where x was padding."""
    (b, _, d), c = dy.shape, config("source_backward", dy.shape[2], dy.dtype)
    dx = dy.new_empty(b, tokens, d)
    grid = b, cdiv(tokens, c.block_m), cdiv(d, c.block_k)
    if 0 not in grid:
        run(
            _source_backward_kernel, grid,
            dy, rows, _starts(tuple(lengths), dy.device), dx, tokens, d, *dy.stride(),
            **c.options,
        )  # fmt: skip
    return dx


def describe(source: Tensor, prompts: Tensor) -> list[str]:
    """The kernel configurations of a call, for ``fastpeft.explain``."""
    steps = ("gather", "prompt_backward", "source_backward")
    return [f"{step}: {config(step, source.shape[-1], source.dtype)}" for step in steps]
