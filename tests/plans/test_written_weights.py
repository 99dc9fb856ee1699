"""Quantised weights that the extension writes out on a CPU: the definition's bits, at any width of its loops."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpeft import _plan, ops
from fastpeft.reference.dequantise import define, write
from fastpeft.reference.dropout import drawn_mask, keep_mask
from tests.support import host_extension
from tests.support.quantised import eight_bit, four_bit

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def _extension():
    host_extension.loaded()


def both(base, dtype, shape=None, *part):
    """The weight, or a part of it, as the extension writes it, and by the definition."""
    found, wanted = (torch.full(shape or base.shape, 7, dtype=dtype) for _ in range(2))
    write(found, *base[:6], base.block, base.block2, *part)
    define(wanted, *base[:6], base.block, base.block2, *part)
    return found, wanted


def part_of(base, drawn):
    """How many rows and columns a part has, its first element, and the columns of W; each row of it begins a block."""
    (n, k), step = base.shape, base.block if base.code.numel() else 1
    if k % step:
        return base.shape, 0, k
    top, left = drawn.randrange(n), drawn.randrange(k // step) * step
    return (drawn.randint(1, n - top), drawn.randint(1, (k - left) // step) * step), top * k + left, k


def check_bits(count, seed):
    """Weights that are drawn, with all the edges that a block, a register and a byte have."""
    drawn = random.Random(seed)
    for i in range(count):
        n, k = drawn.choice([1, 2, 3, 33, 100]), drawn.choice([1, 4, 33, 64, 96, 100, 512])
        block, nested = drawn.choice([2, 4, 16, 32, 64, 128, 1024, 4096]), drawn.random() < 0.5
        base = eight_bit(n, k, seed=i) if i % 5 == 0 else four_bit(n, k, block, nested, seed=i)
        base = base._replace(absmax=base.absmax * drawn.choice([1, 1e-6, 1e6])) if not nested else base
        for dtype in DTYPES:
            if not all(torch.equal(*both(base, dtype, *part)) for part in ((), part_of(base, drawn))):
                raise AssertionError(f"{n}, {k}, block {base.block}, nested {nested}, {dtype}")
    for dtype in DTYPES:
        seed = torch.tensor([count])
        if not torch.equal(drawn_mask(seed, 0.3, 7, 129, dtype), keep_mask(seed, 0.3, 7, 129, dtype)):
            raise AssertionError(f"mask, {dtype}")


@pytest.mark.parametrize("seed", range(4))
def test_bits(seed):
    check_bits(60, seed)


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_bits_at_every_width(capability):
    """What the CPU has not PyTorch leaves out, and so do we."""
    code = "from tests.plans import test_written_weights as t; t.host_extension.loaded(); t.check_bits(60, 9)"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, check=True, timeout=300)


def test_the_extension_writes_them(monkeypatch):
    monkeypatch.setattr(sys.modules[define.__module__], "define", None)
    base = four_bit(4, 6, 32)
    write(torch.empty(4, 6), *base[:6], base.block, base.block2)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads, nested):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for base in (four_bit(521, 1100, 64, nested), four_bit(300, 700, 4096, nested), eight_bit(300, 700)):
            assert torch.equal(*both(base, torch.bfloat16))
    finally:
        torch.set_num_threads(before)


def test_scales_that_are_not_numbers():
    base = four_bit(2, 64, 32)
    base.absmax[0], base.absmax[1] = float("nan"), float("inf")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        torch.testing.assert_close(*both(base, dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("place", "tensor", "name"),
    [
        (0, torch.zeros(11, dtype=torch.uint8), "codes"),
        (0, torch.zeros(24, dtype=torch.uint8)[::2], "codes"),
        (1, torch.zeros(0), "absmax"),
        (1, torch.zeros(1, dtype=torch.uint8), "absmax"),
        (2, torch.zeros(15), "code"),
        (3, torch.zeros(1), "absmax"),
    ],
)
def test_bad_tensors(place, tensor, name):
    base = list(four_bit(4, 6, 32)[:6])
    base[place] = tensor
    with pytest.raises(RuntimeError, match=f"dequantise_: {name} is"):
        torch.ops.fastpeft.dequantise_(torch.empty(4, 6), *base, 32, 1)


def test_bad_parts():
    dequantise_ = torch.ops.fastpeft.dequantise_
    for base in (four_bit(4, 64, 32), four_bit(4, 64, 32, True), eight_bit(4, 64)):
        tables = *base[:6], base.block, base.block2
        dequantise_(torch.empty(1, 32), *tables, 3 * 64 + 32, 64)
        with pytest.raises(RuntimeError, match="dequantise_: codes is"):
            dequantise_(torch.empty(2, 32), *tables, 3 * 64 + 32, 64)
        with pytest.raises(RuntimeError, match="dequantise_: element 0 of 16 columns"):
            dequantise_(torch.empty(1, 32), *tables, 0, 16)
        with pytest.raises(RuntimeError, match="dequantise_: element -32 of 64 columns"):
            dequantise_(torch.empty(1, 32), *tables, -32, 64)
    with pytest.raises(RuntimeError, match="dequantise_: rows begin no blocks"):
        dequantise_(torch.empty(1, 32), *four_bit(4, 64, 32)[:6], 32, 1, 16, 64)


def test_memory_is_given_again_once_it_is_let_go():
    scratch = torch.ops.fastpeft.scratch
    first = scratch(1000, torch.float32)
    address = first.data_ptr()
    other = scratch(10, torch.float64)
    assert first.shape == (1000,)
    assert other.dtype == torch.float64
    assert other.data_ptr() != address
    del first, other
    again = scratch(2000, torch.bfloat16)
    assert again.data_ptr() == address
    assert not again.requires_grad
    assert len(scratch(0, torch.float32)) == 0
    with pytest.raises(RuntimeError, match="scratch: count is -1"):
        scratch(-1, torch.float32)


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_calls_that_repeat_are_planned(nested):
    """Scales that are not nested have one absent tensor for three."""
    torch.manual_seed(0)
    base, x = four_bit(32, 64, 32, nested), torch.randn(40, 64, requires_grad=True)
    a, b = (torch.randn(size, requires_grad=True) for size in ((4, 64), (32, 4)))
    before, results = _plan.refusals.copy(), []
    with host_extension.serves("C++"):
        for _ in range(4):
            y = ops.lora_linear(x, base, a, b, None, 0.5, 0.25, 3)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, a, b])])
        assert ops.lora_linear.__globals__["_planned"].plans.plans == 1
    assert _plan.refusals == before
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))
