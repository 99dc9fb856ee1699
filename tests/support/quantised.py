"""Quantised weights made without their library, so that the ops are tested where it is not installed."""

import torch
from torch import Tensor

from fastpeft import ops

# NF4: the quantiles of a normal distribution, with a 0 (Dettmers et al., 2023, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def four_bit(
    n: int, k: int, block: int = 64, nested: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0
) -> ops.Base:
    """Codes and scales that were drawn, of a weight whose elements are about 1 / sqrt(K) large."""
    g, blocks = torch.Generator().manual_seed(seed), -(-n * k // block)
    codes = torch.randint(256, (-(-n * k // 2),), dtype=torch.uint8, generator=g)
    tables = torch.tensor(NF4)
    size = 2 * k**-0.5
    if not nested:
        return ops.four_bit(codes, size * (0.5 + torch.rand(blocks, generator=g)), tables, (n, k), block, dtype)
    absmax = torch.randint(256, (blocks,), dtype=torch.uint8, generator=g)
    absmax2 = size * (0.1 + 0.1 * torch.rand(-(-blocks // 256), generator=g))
    code2 = torch.linspace(-1, 1, 256)
    return ops.four_bit(codes, absmax, tables, (n, k), block, dtype, (absmax2, code2, torch.tensor(size), 256))


def eight_bit(n: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> ops.Base:
    """The same in int8, with a scale for each row."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g)
    return ops.eight_bit(codes, k**-0.5 * (0.5 + torch.rand(n, generator=g)), dtype)


def by_hand(base: ops.Base) -> Tensor:
    """The weight in float32, element by element as the format has it."""
    n, k = base.shape
    if not base.code.numel():
        return base.codes.float() * (base.absmax * (1.0 / 127.0))[:, None]
    absmax = base.absmax
    if base.absmax2.numel():
        scale = base.absmax2[torch.arange(len(absmax), device=base.device) // base.block2]
        absmax = base.code2[absmax.long()] * scale
        absmax = absmax + base.offset
    i = torch.arange(n * k, device=base.device)
    byte = base.codes.long()[i // 2]
    nibble = torch.where(i % 2 == 0, byte // 16, byte % 16)
    return (base.code[nibble] * absmax[i // base.block]).view(n, k)
