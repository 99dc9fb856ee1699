"""The tests' correction of Triton's interpreter: its bfloat16 is PyTorch's, bit for bit, whatever is done with it."""

import numpy as np
import pytest
import torch

from tests.support import interpreter

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language

pytestmark = [
    pytest.mark.oldest,
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible, so nothing is interpreted"),
]
BF16 = torch.bfloat16


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16)


def every() -> torch.Tensor:
    """All 65,536 bfloat16 numbers."""
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(BF16)


def drawn(count: int = 1 << 18) -> torch.Tensor:
    """float32 of any bit pattern; and every tie, and what lies beside it."""
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    return torch.cat([any_bits, *(upper | lower for lower in (0x7FFF, 0x8000, 0x8001))]).view(torch.float32)


def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bit for bit, but for a NaN's payload."""
    nan = wanted.isnan()
    return torch.equal(found.isnan(), nan) and torch.equal(bits(found)[~nan], bits(wanted)[~nan])


def test_widening_is_exact():
    values = every()
    found = torch.from_numpy(interpreter.widened(bits(values).numpy().view(np.uint16)))
    assert torch.equal(found.view(torch.int32), values.float().view(torch.int32))


def test_rounding_is_to_the_nearest_and_to_even():
    values = drawn()
    found = torch.from_numpy(interpreter.rounded(values.numpy()).view(np.int16)).view(BF16)
    assert same(found, values.to(BF16))


@triton.jit
def _cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@pytest.mark.parametrize("other", [torch.float32, torch.float16, torch.int32, torch.float64], ids=str)
def test_casts_both_ways(other):
    generator = torch.Generator().manual_seed(1)
    x = (torch.randn(1024, generator=generator) * 300).to(BF16)
    y = torch.empty(1024, dtype=other)
    _cast_kernel[(1,)](x, y, 1024)
    assert torch.equal(y, x.to(other))
    wide = (torch.randn(1024, generator=generator) * 300).to(other)
    back = torch.empty(1024, dtype=BF16)
    _cast_kernel[(1,)](wide, back, 1024)
    assert torch.equal(back, wide.float().to(BF16))


@triton.jit
def _arithmetic_kernel(
    x_ptr, y_ptr, sum_ptr, product_ptr, scaled_ptr, larger_ptr, where_ptr, less_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(sum_ptr + i, x - y + x)
    tl.store(product_ptr + i, -x * y)
    tl.store(scaled_ptr + i, x * 0.3)
    tl.store(larger_ptr + i, tl.maximum(x, y))
    tl.store(where_ptr + i, tl.where(x < y, x, 0.0))
    tl.store(less_ptr + i, (x < y).to(tl.int8))


def test_arithmetic_rounds_once_an_operation():
    generator = torch.Generator().manual_seed(2)
    x, y = ((torch.randn(1024, generator=generator) * 4).to(BF16) for _ in range(2))
    found = [torch.empty_like(x) for _ in range(5)]
    less = torch.empty(1024, dtype=torch.int8)
    _arithmetic_kernel[(1,)](x, y, *found, less, 1024)
    wanted = [(x - y) + x, -x * y, x * torch.tensor(0.3, dtype=BF16), torch.maximum(x, y), x.where(x < y, 0)]
    assert all(map(same, found, wanted))
    assert torch.equal(less.bool(), x < y)


@triton.jit
def _dot_kernel(x_ptr, y_ptr, z_ptr, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x, y = tl.load(x_ptr + i * BLOCK + j), tl.load(y_ptr + i * BLOCK + j)
    tl.store(z_ptr + i * BLOCK + j, tl.dot(x, tl.trans(y)))


def test_products_are_exact_and_summed_in_float32():
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(64, 64, generator=generator).to(BF16) for _ in range(2))
    z = torch.empty(64, 64)
    _dot_kernel[(1,)](x, y, z, 64)
    wanted = x.double() @ y.double().T
    assert (z - wanted).abs().max() <= 64 * 2**-24 * (x.double().abs() @ y.double().abs().T).max()


@triton.jit
def _reduce_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), 0))


def test_what_is_not_covered_raises():
    with pytest.raises(Exception, match="a reduction of bfloat16"):
        _reduce_kernel[(1,)](torch.ones(16, dtype=BF16), torch.empty(1, dtype=BF16), 16)
