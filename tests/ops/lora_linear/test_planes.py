"""Float32 matrices as bfloat16 planes: these are the number, and their products as exact as promised."""

import pytest
import torch

from tests.support.backends import BF16, DEVICE, FP16, FP32, FP64

triton = pytest.importorskip("triton", reason="Triton is not installed")
tl = triton.language

from fastpeft.kernels import planes  # noqa: E402


@triton.jit
def _split_kernel(a_ptr, high_ptr, middle_ptr, low_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    high, middle, low = planes.split_planes(tl.load(a_ptr + i))
    tl.store(high_ptr + i, high)
    tl.store(middle_ptr + i, middle)
    tl.store(low_ptr + i, low)


def test_three_planes_are_the_number():
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-100, 120, (4096,), generator=generator)  # below, the low plane has no bits left
    a = torch.ldexp(torch.randn(4096, generator=generator), exponents).to(DEVICE)
    parts = [torch.empty_like(a, dtype=BF16) for _ in range(3)]
    _split_kernel[(1,)](a, *parts, 4096)
    assert torch.equal(sum(part.double() for part in parts), a.double())
    high, middle, low = (part.double().abs() for part in parts)
    assert (middle <= high * 2**-7).all()
    assert (low <= high * 2**-15).all()


@triton.jit
def _dot_kernel(x_ptr, a_ptr, y_ptr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    x, a = tl.load(x_ptr + i * BLOCK + j), tl.load(a_ptr + i * BLOCK + j)
    tl.store(y_ptr + i * BLOCK + j, planes.dot(x, a, tl.zeros((BLOCK, BLOCK), tl.float32), PRECISION))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_products(dtype):
    """Beside bfloat16 only the sum's rounding is left; of two float32 operands a term errs by 2**-13 at most."""
    generator = torch.Generator().manual_seed(1)
    x, a = (torch.randn(64, 64, generator=generator).to(DEVICE, d) for d in (dtype, FP32))
    y = torch.empty(64, 64, device=DEVICE)
    precision = planes.products(x, a, BF16 if dtype == FP32 else FP32).precision
    _dot_kernel[(1,)](x, a, y, precision, 64)
    terms = x.double().abs() @ a.double().abs()
    allowed = 3 * 64 * 2**-24 + (2**-13 if dtype == FP32 else 0)
    error = (y.double() - x.double() @ a.double()).abs() / terms
    assert error.max() <= allowed
    # Two planes beside bfloat16, or one of each, would err by more than that of the smallest of three.
    assert error.max() <= (2**-15 if dtype == FP32 else 2**-20)


@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP32, BF16)], ids=str)
def test_halves(dtypes):
    """Two planes of whichever is float32: a term errs by 2**-15 at most; one plane would err by 2**-7."""
    generator = torch.Generator().manual_seed(2)
    x, a = (torch.randn(64, 64, generator=generator).to(DEVICE, d) for d in dtypes)
    y = torch.empty(64, 64, device=DEVICE)
    _dot_kernel[(1,)](x, a, y, planes.products(x, a, BF16).precision, 64)
    error = (y.double() - x.double() @ a.double()).abs() / (x.double().abs() @ a.double().abs())
    assert error.max() <= 3 * 64 * 2**-24 + 2**-15


def test_which_products_are_taken():
    def precision(x, a, out):
        return planes.products(torch.empty(1, dtype=x), torch.empty(1, dtype=a), out).precision

    assert precision(BF16, FP32, FP32) == "planes"
    assert precision(FP32, FP32, BF16) == "pairs"
    assert precision(FP32, BF16, BF16) == precision(BF16, FP32, BF16) == "halves"
    assert precision(FP32, FP32, FP32) == "ieee"  # a float32 model
    assert precision(FP32, FP32, FP16) == precision(FP16, FP32, FP32) == "tf32x3"
    assert precision(BF16, BF16, BF16) == precision(FP16, FP16, FP16) == precision(FP64, FP64, FP64) == "ieee"
