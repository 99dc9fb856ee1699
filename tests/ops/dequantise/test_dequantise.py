"""dequantise: the bits that the format and bitsandbytes give, whatever the shape; what a Base refuses."""

import random

import pytest
import torch

from fastpeft import _backend, ops, reference
from fastpeft.ops.dequantise import REASONS
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, FP64
from tests.support.quantised import NF4, by_hand, eight_bit, four_bit

each_backend = pytest.mark.parametrize("backend", BACKENDS)
SHAPES = [(1, 1), (1, 2), (3, 5), (7, 64), (32, 33), (64, 96), (65, 130), (16, 4096)]


def defined(base):
    """By the definition, which is not what serves a CPU where the host extension is."""
    return reference.dequantise(*base[:6], base.shape, base.block, base.block2, FP32)


def on_device(base):
    return ops.Base(*(part.to(DEVICE) if isinstance(part, torch.Tensor) else part for part in base))


@each_backend
@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("block", [32, 64, 4096])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_four_bits_are_the_formats(backend, shape, block, nested):
    base = four_bit(*shape, block, nested)
    assert torch.equal(ops.dequantise(on_device(base), backend=backend).cpu(), by_hand(base))
    assert torch.equal(defined(base), by_hand(base))


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
def test_more_elements_than_a_step(nested):
    base = four_bit(521, 1100, 4096, nested)
    assert torch.equal(ops.dequantise(base, backend="reference"), by_hand(base))
    assert torch.equal(defined(base), by_hand(base))


@each_backend
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eight_bits_are_the_formats(backend, shape):
    base = eight_bit(*shape)
    assert torch.equal(ops.dequantise(on_device(base), backend=backend).cpu(), by_hand(base))
    assert torch.equal(defined(base), by_hand(base))


@each_backend
@pytest.mark.parametrize(
    "make", [lambda: four_bit(48, 64, 16), lambda: four_bit(48, 64, 16, True), lambda: eight_bit(48, 64)]
)
def test_parts_are_those_of_the_whole(backend, make):
    """Rows, and columns, between other things; some of both."""
    base, impl = on_device(make()), _backend.load("dequantise", backend)
    whole, tables = by_hand(base), (*base[:6], base.block, base.block2)
    for rows, columns in ((slice(0, 7), slice(0, 64)), (slice(40, 48), slice(0, 64)), (slice(5, 48), slice(16, 48))):
        wanted = whole[rows, columns]
        for write in (impl.write, getattr(impl, "define", impl.write)):
            out = torch.full((wanted.numel() + 2,), 3.0, device=DEVICE)
            write(out[1:-1].view(wanted.shape), *tables, rows.start * 64 + columns.start, 64)
            assert torch.equal(out[1:-1].view(wanted.shape), wanted)
            assert out[0] == out[-1] == 3


@each_backend
@pytest.mark.parametrize("columns", [2048, 2080])
def test_rows_of_a_part_that_are_no_multiple_of_what_a_program_writes(backend, columns):
    base, impl = on_device(four_bit(3, 2176, 32, True)), _backend.load("dequantise", backend)
    out = torch.empty(3, columns, device=DEVICE)
    impl.write(out, *base[:6], base.block, base.block2, 96, 2176)
    assert torch.equal(out, by_hand(base)[:, 96 : 96 + columns])


@each_backend
@pytest.mark.parametrize("dtype", [FP16, BF16, FP64], ids=str)
@pytest.mark.parametrize("make", [four_bit, eight_bit], ids=["4 bits", "8 bits"])
def test_one_rounding_to_the_dtype_asked_for(backend, dtype, make):
    base = on_device(make(33, 70))
    reason = REASONS[backend](base.codes, dtype)
    if reason is not None:
        with pytest.raises(ValueError, match="bfloat16"):
            ops.dequantise(base, dtype, backend)
        return
    assert torch.equal(ops.dequantise(base, dtype, backend), by_hand(base).to(dtype))


@each_backend
def test_nothing_is_written_outside(backend):
    impl = _backend.load("dequantise", backend)
    for base in (four_bit(5, 77, 32), four_bit(5, 77, 32, nested=True), eight_bit(5, 77)):
        base = on_device(base)
        before = [part.clone() for part in base[:6]]
        buffer = torch.full((5 * 77 + 128,), 7.0, device=DEVICE)
        out = buffer[64:-64].view(5, 77)
        impl.write(out, *base[:6], base.block, base.block2)
        assert torch.equal(out, by_hand(base))
        assert (buffer[:64] == 7).all()
        assert (buffer[-64:] == 7).all()
        assert all(map(torch.equal, before, base[:6]))


@pytest.mark.parametrize("seed", range(8))
def test_bits_are_those_of_bitsandbytes(seed):
    """Its CPU kernels take blocks row by row, so that those that cross rows are its own generic code's."""
    functional = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed").functional
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute as generic

    drawn = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(8):
        n, k = drawn.choice([1, 3, 32, 33, 100]), drawn.choice([4, 33, 64, 96, 256, 512])
        block, kind = drawn.choice([32, 64, 256, 1024, 4096]), drawn.choice(["nf4", "fp4"])
        dtype, storage = drawn.choice([BF16, FP16, FP32]), drawn.choice([torch.uint8, BF16, FP16, FP32])
        storage = torch.uint8 if -(-n * k // 2) % storage.itemsize else storage
        w = torch.randn(n, k).to(dtype) * drawn.choice([0.02, 1, 50])
        codes, state = functional.quantize_4bit(
            w, blocksize=block, compress_statistics=drawn.random() < 0.5, quant_type=kind, quant_storage=storage
        )
        absmax, nested = state.absmax, None
        if state.nested:
            nested = state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize
            absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        base = ops.four_bit(codes, state.absmax, state.code, state.shape, block, dtype, nested)
        wanted = generic(codes.view(torch.uint8).view(-1), absmax, state.code, block, (n, k), dtype)
        assert torch.equal(ops.dequantise(base), wanted), (n, k, block, kind, dtype, storage)
        if k % block == 0 and codes.numel() > 1:
            assert torch.equal(wanted, functional.dequantize_4bit(codes, state)), (n, k, block, kind, dtype, storage)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"block": 48}, ValueError),
        ({"codes": torch.zeros(15, dtype=torch.uint8)}, ValueError),
        ({"codes": torch.zeros(32, dtype=torch.uint8)[::2]}, ValueError),
        ({"absmax": torch.ones(2)}, ValueError),
        ({"absmax": torch.ones(1, dtype=BF16)}, TypeError),
        ({"code": torch.ones(15)}, ValueError),
        ({"nested": (torch.ones(1), torch.ones(256), torch.ones(1), 256)}, TypeError),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_bases(change, error):
    good = {"codes": torch.zeros(16, dtype=torch.uint8), "absmax": torch.ones(1), "code": torch.tensor(NF4)}
    ops.four_bit(**good, shape=(4, 8))
    with pytest.raises(error, match=r"^(Base|four_bit): "):
        ops.four_bit(**{**good, "shape": (4, 8), **change})


def test_bad_calls():
    with pytest.raises(TypeError, match="base is a Tensor"):
        ops.dequantise(torch.ones(3, 3))
    with pytest.raises(TypeError, match="dtype"):
        ops.dequantise(four_bit(2, 2), torch.int8)
    with pytest.raises(ValueError, match="eight_bit"):
        ops.eight_bit(torch.ones(3, dtype=torch.int8), torch.ones(3))


@each_backend
def test_opcheck(backend):
    for base in (four_bit(4, 9, 32, nested=True), eight_bit(4, 9)):
        *tensors, shape, block, block2, dtype = on_device(base)
        args = *tensors, list(shape), block, block2, dtype, backend
        torch.library.opcheck(torch.ops.fastpeft.dequantise.default, args)
