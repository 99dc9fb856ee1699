"""What lies between the products of a gated MLP, element by element; the products are lora_linear's and cuBLAS's.

    forward      h = act(gate) ∘ up                                      one read of both, one write
    backward_    dgate = dh ∘ up ∘ act'(gate), dup = dh ∘ act(gate)      one read of three, dup in dh's place

All ``[rows, I]``, any strides, computed in float32 (float64 for gradcheck) and rounded once.
"""

import triton
import triton.language as tl
from torch import Tensor

from .bottleneck_tiles import activate, slope
from .launch import Tile, cdiv, math, next_power_of_2, run

# Elements of the narrowest product of a chunk: 128 tiles of 128 x 128, one wave of a large GPU. Not yet measured.
WAVE = 1 << 21
CHUNKS = 4  # at most: four chunks need half of what one of the MLP's wide tensors takes, and launches count
STEP = 128  # rows of a tile of those products


def config(columns: int) -> Tile:
    """The tile for so many columns: 2048 elements, 16 bytes at a time for each thread."""
    block_k = min(max(16, next_power_of_2(columns)), 512)
    return Tile(2048 // block_k, block_k)


def chunk_rows(rows: int, columns: int) -> int:
    """How many rows are computed at a time, of so many rows of x and so many columns of the narrowest product.

    No fewer than fill a GPU in that product, so that chunks cost no time, and a quarter of the rows at least.
    """
    wanted = max(cdiv(rows, CHUNKS), cdiv(WAVE, max(1, columns)))
    return cdiv(wanted, STEP) * STEP


def part_columns(rows: int, columns: int) -> int:
    """How many columns of a product are computed at a time where its weight is quantised, of so many rows and columns.

    As few rows or columns of the weight are written out at a time as give the product a wave, and a quarter at least.
    """
    wanted = max(cdiv(columns, CHUNKS), cdiv(WAVE, max(1, rows)))
    return cdiv(wanted, STEP) * STEP


@triton.jit
def _gated_kernel(
    gate_ptr, up_ptr, h_ptr, M, K,
    stride_gm, stride_gk, stride_um, stride_uk, stride_hm, stride_hk,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (m < M)[:, None] & (k < K)[None, :]  # [BLOCK_M, BLOCK_K]
    gate = tl.load(gate_ptr + m[:, None] * stride_gm + k[None, :] * stride_gk, mask=inside, other=0.0).to(ACC)
    up = tl.load(up_ptr + m[:, None] * stride_um + k[None, :] * stride_uk, mask=inside, other=0.0).to(ACC)
    tl.store(h_ptr + m[:, None] * stride_hm + k[None, :] * stride_hk, activate(gate, ACTIVATION) * up, mask=inside)


@triton.jit
def _gated_backward_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, M, K,
    stride_dm, stride_dk, stride_gm, stride_gk, stride_um, stride_uk, stride_om, stride_ok,
    ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = (m < M)[:, None] & (k < K)[None, :]  # [BLOCK_M, BLOCK_K]
    dh_tile = dh_ptr + m[:, None] * stride_dm + k[None, :] * stride_dk
    dh = tl.load(dh_tile, mask=inside, other=0.0).to(ACC)
    gate = tl.load(gate_ptr + m[:, None] * stride_gm + k[None, :] * stride_gk, mask=inside, other=0.0).to(ACC)
    up = tl.load(up_ptr + m[:, None] * stride_um + k[None, :] * stride_uk, mask=inside, other=0.0).to(ACC)
    dgate_tile = dgate_ptr + m[:, None] * stride_om + k[None, :] * stride_ok
    tl.store(dgate_tile, dh * up * slope(gate, ACTIVATION), mask=inside)
    tl.store(dh_tile, dh * activate(gate, ACTIVATION), mask=inside)


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``h = act(gate) ∘ up``."""
    h = gate.new_empty(gate.shape)
    _launch(_gated_kernel, (gate, up, h), gate, activation)
    return h


def backward_(dh: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """``dgate = dh ∘ up ∘ act'(gate)`` and ``dup = dh ∘ act(gate)``, which takes dh's place."""
    dgate = dh.new_empty(dh.shape)
    _launch(_gated_backward_kernel, (dh, gate, up, dgate), gate, activation)
    return dgate, dh


def _launch(kernel, tensors: tuple[Tensor, ...], gate: Tensor, activation: str) -> None:
    (m, k), c = gate.shape, config(gate.shape[1])
    grid = cdiv(m, c.block_m), cdiv(k, c.block_k)
    if 0 in grid:
        return
    strides = [stride for tensor in tensors for stride in tensor.stride()]
    run(
        kernel, grid, *tensors, m, k, *strides, ACTIVATION=activation, ACC=math(gate, gate).triton,
        **c.options,
    )  # fmt: skip


def describe(x: Tensor, lora_as, weights=(), *_) -> list[str]:
    """The kernel configuration of a call, for ``fastpeft.explain``."""
    if not weights:
        return ["the products as lora_linear"]
    rows, (inner, k), n = x.numel() // max(1, x.shape[-1]), weights[0].shape, weights[2].shape[0]
    cut = f"{min(rows, chunk_rows(rows, min(k, n)))} of {rows} rows"
    if not all(isinstance(weight, Tensor) for weight in weights):
        cut = f"{min(inner, part_columns(rows, inner))} of {inner} columns"
    return [f"activation: {config(inner)}, {cut} at a time; the products as lora_linear"]
