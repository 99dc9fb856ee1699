"""LoRA inside the GEMM of the frozen layer, by csrc/lora_linear.cu on Hopper; steps without a CUDA kernel are Triton's.

    forward     y  = x Wᵀ + bias + S Bᵀ                 one chain of float32 sums; S by Triton, or inside (see below)
    backward    dX = mask ∘ (dS A) / (1 - p) + dY W     likewise; dS, dB and dA by Triton

TMA reads rows that begin at multiples of 16 bytes. Where dY has others, or where several projections of one x drop each
by a mask of its own, dX is the portable path's: Triton's low-rank term, then ``addmm``.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _tape
from .._mask import inverse_keep, threshold

DTYPES = (torch.bfloat16, torch.float16)  # in the order of csrc's numbers
TILES = ("128x256", "128x128")
MAX_RANK = 256
INSIDE_RANK = 64
# Clusters of two blocks that fill an H100. A constant, not the device's count: bits must not depend on the board.
TARGET_CLUSTERS = 66

_inside = False


@dataclass(frozen=True)
class Config:
    """Rows x columns of y that a block computes, and whether S is computed by the same launch."""

    tile: str
    inside: bool = False


def config(m: int, n: int, inside: bool = False) -> Config:
    """The kernel for y [m, n]: the tiles that are over after the least time, the wide ones where both take as long.

    A wave of wide tiles takes as long as two of narrow ones. Not yet measured.
    """

    def waves(columns: int) -> int:  # clusters compute tiles of 256 rows
        return -(-(-(-m // 256) * -(-n // columns)) // TARGET_CLUSTERS)

    return Config(TILES[0] if inside or 2 * waves(256) <= waves(128) else TILES[1], inside)


@contextlib.contextmanager
def computing_s_inside() -> Iterator[None]:
    """Inside, S of a single projection up to rank 64 is computed by warps that the GEMM leaves idle."""
    global _inside
    before, _inside = _inside, True
    try:
        yield
    finally:
        _inside = before


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor],
    lora_bs: Sequence[Tensor],
    biases: Sequence[Tensor],
    scales: Sequence[float],
    dropouts: Sequence[float],
    seeds: Tensor,
) -> tuple[list[Tensor], Tensor]:
    """y of every projection, and S ``[M, R]``; absent weights and biases are empty tensors."""
    from ..kernels import lora_linear

    alone = len(weights) == 1 and weights[0].numel() > 0
    if _inside and alone and lora_as[0].shape[0] <= INSIDE_RANK and _fits(lora_as[0]):
        return _with_s_inside(x, weights[0], lora_as[0], lora_bs[0], biases[0], scales[0], dropouts[0], seeds)
    s = lora_linear.down(x, lora_as, scales, dropouts, seeds)
    ys = []
    parts = s.split([a.shape[0] for a in lora_as], 1)
    for weight, b, bias, s_p in zip(weights, lora_bs, biases, parts, strict=True):
        if not weight.numel():
            ys.append(lora_linear.up(s_p, b, bias if bias.numel() else None, x.dtype))
            continue
        ys.append(linear(x, weight, s_p, b, bias))
    return ys, s


def linear(x: Tensor, weight: Tensor, s: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """``x Wᵀ + bias + S Bᵀ``; S and B may have no columns, bias no elements."""
    y, bias = x.new_empty(x.shape[0], weight.shape[0]), bias.contiguous()
    _extension().lora_linear(
        *_rows(x, weight, s, b), _start(bias), *_rows(y), *y.shape, x.shape[1], b.shape[1],
        DTYPES.index(x.dtype), TILES.index(config(*y.shape).tile), *_place(x),
    )  # fmt: skip
    return y


def _with_s_inside(x, weight, a, b, bias, scale, dropout, seeds):
    y, s = x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0])
    extension, bias = _extension(), bias.contiguous()
    workspace = torch.zeros(extension.lora_linear_workspace(len(x)) // 4, dtype=torch.int32, device=x.device)
    extension.lora_linear_down(
        *_rows(x, weight, a, b), _start(bias), *_rows(s, y), *y.shape, x.shape[1], a.shape[0], scale,
        *_mask(dropout, seeds), workspace.data_ptr(), DTYPES.index(x.dtype), *_place(x),
    )  # fmt: skip
    return [y], s


def backward(dys, x, s, weights, lora_as, lora_bs, scales, dropouts, seeds, need_dx, need_da, need_db):
    """As ``fastpeft.kernels.lora_linear.backward``."""
    from ..kernels import lora_linear

    dx = das = None
    ds, dbs = lora_linear.ups_backward(dys, s, lora_bs, scales, need_dx or need_da, need_db)
    if ds is not None:
        dx, das = down_backward(ds, x, lora_as, dropouts, seeds, need_dx, need_da, dys, weights)
    return dx, das, dbs


def down_backward(
    ds: Tensor,
    x: Tensor,
    lora_as: Sequence[Tensor],
    dropouts: Sequence[float],
    seeds: Tensor,
    need_dx: bool,
    need_da: bool,
    dys: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> tuple[Tensor | None, list[Tensor] | None]:
    """dX, the base's part included, and dA of every projection."""
    from ..kernels import lora_linear

    own_masks = len(lora_as) > 1 and any(map(threshold, dropouts))
    base = [(dy, weight) for dy, weight in zip(dys, weights, strict=True) if weight.numel()]
    fused = next((pair for pair in base if all(map(_fits, pair))), None) if need_dx and not own_masks else None
    dx, das = lora_linear.down_backward(ds, x, lora_as, dropouts, seeds, need_dx and fused is None, need_da)
    if fused is not None:
        a = lora_as[0] if len(lora_as) == 1 and _fits(lora_as[0]) else torch.cat(list(lora_as))
        dx = input_gradient(*fused, ds, a, dropouts[0], seeds)
    for pair in base if need_dx else ():
        if pair is not fused:
            dx.addmm_(*pair)
    return dx, das


def input_gradient(dy: Tensor, weight: Tensor, ds: Tensor, a: Tensor, dropout: float, seeds: Tensor | None) -> Tensor:
    """``mask ∘ (dS A) / (1 - p) + dY W``; dS and A may have no columns and rows."""
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    _extension().lora_linear_backward(
        *_rows(dy, weight, ds, a, dx), dy.shape[0], *weight.shape, a.shape[0], *_mask(dropout, seeds),
        DTYPES.index(dy.dtype), TILES.index(config(*dx.shape).tile), *_place(dy),
    )  # fmt: skip
    return dx


def unfit(name: str, t: Tensor) -> str | None:
    """Why TMA cannot read a matrix, or None: rows of adjacent elements that begin at multiples of 16 bytes."""
    if _fits(t):
        return None
    where = f"starts at element {t.storage_offset()} of its memory, {_past_16(t)} bytes past a multiple of 16"
    return f"{name} has strides {t.stride()} and {where}, expected (a multiple of 8, 1) and no byte past"


def _fits(t: Tensor) -> bool:
    row, element = t.stride()
    return element == 1 and row % 8 == 0 and row >= t.shape[1] and _past_16(t) == 0


def _past_16(t: Tensor) -> int | torch.SymInt:
    """Bytes from a multiple of 16 to where a matrix begins.

    Memory of another library may begin anywhere. While a graph is traced there is no address, so the place within the
    memory has to do; the launcher looks at the address and refuses it.
    """
    traced = torch.compiler.is_compiling() or type(t) not in (Tensor, torch.nn.Parameter)
    return (t.storage_offset() * t.element_size() if traced else t.data_ptr()) % 16


def _rows(*matrices: Tensor) -> list[int]:
    """Where each begins, and the elements from one row to the next."""
    return [number for t in matrices for number in (t.data_ptr(), t.stride(0))]


def _mask(dropout: float, seeds: Tensor | None) -> tuple[int, int, float]:
    dropped = threshold(dropout)
    return seeds.data_ptr() if dropped and seeds is not None else 0, dropped, inverse_keep(dropout)


def _start(bias: Tensor) -> int:
    """Of a vector of adjacent elements, which the caller keeps until the launch; 0 for none."""
    return bias.data_ptr() if bias.numel() else 0


def describe(x: Tensor, lora_as: Sequence[Tensor], weights: Sequence[Tensor | None] = (), *_) -> list[str]:
    """The kernels of a call, for ``fastpeft.explain``."""
    rows = x.numel() // max(1, x.shape[-1])
    outs = [weight.shape[0] for weight in weights if weight is not None]
    return [f"y [{rows}, {n}]: {config(rows, n, _inside)}; S, dS, dB and dA by the Triton kernels" for n in outs]


def _extension():
    import fastpeft._C

    _tape.unrecorded("the launchers of fastpeft._C")
    return fastpeft._C


def _place(x: Tensor) -> tuple[int, int]:
    """The device and its current stream."""
    return x.device.index, torch.cuda.current_stream(x.device).cuda_stream
