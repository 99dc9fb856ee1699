"""Sorts the tokens of a batch by adapter slot and cuts them into tiles, on the device and without waiting for it.

Alphabet: a token or slot m is counted against all tokens k. A count of those that come before is a token's place in a
stable sort: no histogram, no atomics, any number of slots, and the same order every time. The work is quadratic in the
tokens, which is nothing at decode and half a millisecond a step at 64k of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, run

BLOCK_M, BLOCK_K = 64, 64


@triton.jit
def _key(token_slots_ptr, stride, k, T, SLOTS):
    """Slots of tokens k: those without an adapter, and any slot that does not exist, come last."""
    slot = tl.load(token_slots_ptr + k.to(tl.int64) * stride, mask=k < T, other=-1)
    return tl.where((slot >= 0) & (slot < SLOTS), slot, SLOTS).to(tl.int32)


@triton.jit
def _sort_kernel(
    token_slots_ptr, order_ptr, starts_ptr, tiles_ptr, T, SLOTS, TILES, stride,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # tokens, then the slots' starts
    token = m < T
    key = tl.where(token, _key(token_slots_ptr, stride, m, T, SLOTS), (m - T).to(tl.int32))
    before = tl.zeros((BLOCK_M,), tl.int32)
    for k0 in range(0, T, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        other = _key(token_slots_ptr, stride, k, T, SLOTS)
        tie = (other[None, :] == key[:, None]) & (k[None, :] < m[:, None]) & token[:, None]
        ahead = (other[None, :] < key[:, None]) | tie  # [BLOCK_M, BLOCK_K]; past T nothing is ahead of anything
        before += tl.sum(ahead.to(tl.int32), 1)
    tl.store(order_ptr + before, m.to(tl.int32), mask=token)
    tl.store(starts_ptr + m - T, before, mask=(m >= T) & (m <= T + SLOTS))
    none = tl.full((BLOCK_M,), -1, tl.int32)
    tl.store(tiles_ptr + m, none, mask=m < TILES)
    tl.store(tiles_ptr + TILES + m, none, mask=m < TILES)


@triton.jit
def _tile_kernel(
    token_slots_ptr, order_ptr, starts_ptr, tiles_ptr, T, SLOTS, TILES, TILE, stride,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # places in the sorted order
    token = tl.load(order_ptr + m, mask=m < T, other=T)
    key = _key(token_slots_ptr, stride, token, T, SLOTS)
    within = m - tl.load(starts_ptr + key)
    index = within // TILE
    for k0 in range(0, SLOTS, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        start = tl.load(starts_ptr + k, mask=k < SLOTS, other=0)
        stop = tl.load(starts_ptr + k + 1, mask=k < SLOTS, other=0)
        tiles = (stop - start + TILE - 1) // TILE
        index += tl.sum(tl.where(k[None, :] < key[:, None], tiles[None, :], 0), 1)  # [BLOCK_M, BLOCK_K]
    first = (m < T) & (key < SLOTS) & (within % TILE == 0)
    tl.store(tiles_ptr + index, key, mask=first)
    tl.store(tiles_ptr + TILES + index, m.to(tl.int32), mask=first)


def forward(token_slots: Tensor, slots: int, tile: int, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """``order [T]``, ``starts [slots + 1]`` and ``tiles [2, tiles]`` of ``fastpeft.reference.Routing``, int32."""
    (t,) = token_slots.shape
    order, starts, table = (
        torch.empty(shape, dtype=torch.int32, device=token_slots.device) for shape in ((t,), (slots + 1,), (2, tiles))
    )
    stride, blocks = token_slots.stride(0), {"BLOCK_M": BLOCK_M, "BLOCK_K": BLOCK_K}
    grid = (cdiv(t + slots + 1, BLOCK_M),)
    run(_sort_kernel, grid, token_slots, order, starts, table, t, slots, tiles, stride, **blocks)
    if t:
        grid = (cdiv(t, BLOCK_M),)
        run(_tile_kernel, grid, token_slots, order, starts, table, t, slots, tiles, tile, stride, **blocks)
    return order, starts, table
