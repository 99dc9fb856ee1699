"""What every launcher needs: configurations, launch options, and how a loop is cut for more programs."""

from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .. import _device, _tape

# Enough programs to fill a large GPU twice. A constant, not the device's count: bits must not depend on the board.
TARGET_PROGRAMS = 264

WARPGROUPS = (90, 100)  # where tensor cores read shared memory themselves, so that tiles take no registers


def cdiv(size: int, block: int) -> int:
    """``size / block``, rounded up. Triton's own is made for kernels, and takes 2 us where these are plain numbers."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of 2 that is at least ``size``."""
    return 1 << max(size - 1, 0).bit_length()


def alignment(*sizes: int) -> int:
    """The largest power of 2 up to 16 that divides every size; 1 where one is 1, which is a constant in a kernel."""
    return gcd(16, *sizes)


def split(size: int, block: int, programs: int, least: int = 4, full: bool = False) -> tuple[int, int]:
    """Cut a loop over ``size`` in steps of ``block`` so that ``programs`` times the parts fills the device.

    With ``full`` twice so, for kernels that compute more than they wait, as those that draw a mask. Returns the number
    of parts, each of at least ``least`` steps, and the span of one, a multiple of ``block``.
    """
    steps = max(1, cdiv(size, block))
    parts = max(1, min((TARGET_PROGRAMS << full) // max(programs, 1), steps // least))
    span = cdiv(steps, parts)
    return cdiv(steps, span), span * block


@dataclass(frozen=True)
class Config:
    """Tile sizes (rows, columns, rank) and launch options of one kernel."""

    block_m: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a tile, and launch options, of a kernel that multiplies no matrices."""

    block_m: int
    block_k: int
    num_warps: int = 4

    @property
    def options(self) -> dict:
        """No pipeline: there is no product to hide loads behind. Fusion is stated since its default differs."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_K": self.block_k}
        return {**blocks, "num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


class Math(NamedTuple):
    """How products are taken and sums are kept, as torch and Triton name it."""

    torch: torch.dtype
    triton: tl.dtype
    precision: str


def math(x: Tensor, a: Tensor) -> Math:
    """Sums in float32 (float64 for gradcheck); 16-bit times float32 takes three TF32 terms, as exact as float32."""
    if a.dtype == torch.float64:
        return Math(torch.float64, tl.float64, "ieee")
    return Math(torch.float32, tl.float32, "ieee" if x.dtype == a.dtype else "tf32x3")


def capability(tensor: Tensor) -> int:
    """Compute capability of the tensor's device, 80, 90, ...; 0 in the interpreter."""
    return _device.capability(tensor.device)


def launch(kernel, grid: tuple[int, ...], config, acc: Math, *args, **constants) -> None:
    """Launch on the tensors' device, which need not be the current one. An empty grid launches nothing."""
    if 0 in grid:
        return
    # Contracted multiply-adds, stated because Triton's default differs between versions and changes bits.
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True}
    blocks = {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k, "BLOCK_R": config.block_r}
    run(kernel, grid, *args, ACC=acc.triton, PRECISION=acc.precision, **blocks, **constants, **options)


def run(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """Launch on the first argument's device, which need not be the current one; every launch goes through here."""
    index = args[0].device.index if args[0].is_cuda else None
    if index is None or index == torch.cuda.current_device():
        compiled = kernel[grid](*args, **constants)
    else:
        with torch.cuda.device(index):
            compiled = kernel[grid](*args, **constants)
    _tape.launched(kernel, compiled, grid, args)
