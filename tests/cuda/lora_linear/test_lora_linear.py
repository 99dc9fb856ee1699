"""csrc/lora_linear.cu on the emulated GPU: the launchers and kernels as they are, against PyTorch.

Integers first: every product and sum is exact, so the results must be equal bit for bit, whatever the tiling.
"""

import pytest
import torch
import torch.nn.functional as F

from fastpeft.reference import inverse_keep, keep_mask
from fastpeft.reference.dropout import threshold
from fastpeft.reference.lora_linear import down, down_backward
from fastpeft.testing import assert_no_worse, integer_inputs
from tests.cuda.emulator import build
from tests.cuda.emulator.lora_linear import Launchers

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"nothing to emulate with: {build.missing()}")
BF16, FP16 = torch.bfloat16, torch.float16
WIDE, NARROW = 0, 1


@pytest.fixture
def gpu():
    return Launchers()


def random_inputs(*shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64).mul_(s[-1] ** -0.5).to(dtype) for s in shapes]


def forward(x, w, s, b, bias, dtype=None):
    """The definition, in float64 or in the inputs' dtype."""
    x, w, s, b = (t.to(dtype or t.dtype) for t in (x, w, s, b))
    return F.linear(x, w, None if bias is None else bias.to(x.dtype)) + s @ b.T


def backward(dy, w, ds, a, seed, dropout, dtype=None):
    dy, w, ds, a = (t.to(dtype or t.dtype) for t in (dy, w, ds, a))
    low, _ = down_backward(ds, dy, [a], [dropout], seed, need_dx=True, need_da=False)
    return low + dy @ w


# (M, N, K, R): one tile; every edge ragged; more tiles than clusters; ranks of 1 to 4 steps, of 1 to 4 tiles, and none.
SHAPES = [
    (128, 256, 64, 16),
    (1, 1, 8, 1),
    (200, 328, 136, 24),
    (300, 520, 72, 72),
    (129, 257, 64, 0),
    (70, 40, 128, 12),
    (70, 40, 320, 33),
    (257, 24, 520, 64),
    (40, 96, 200, 256),
]
KINDS = [(BF16, WIDE), (FP16, NARROW)]
CASES = [(shape, *kind) for shape in SHAPES for kind in KINDS]
CASES += [(SHAPES[0], FP16, WIDE), (SHAPES[0], BF16, NARROW)]  # the other two of the four


@pytest.mark.parametrize(("shape", "dtype", "config"), CASES, ids=str)
def test_forward_exact(gpu, shape, dtype, config):
    M, N, K, R = shape
    *operands, bias = integer_inputs((M, K), (N, K), (M, R), (N, R), (N,), dtype=dtype)
    bias = bias if config == WIDE or R == 72 else None
    assert torch.equal(gpu.forward(*operands, bias, config), forward(*operands, bias, torch.float64).to(dtype))


@pytest.mark.parametrize(("shape", "dtype", "config"), CASES, ids=str)
def test_backward_exact(gpu, shape, dtype, config):
    M, K, N, R = shape
    operands = integer_inputs((M, N), (N, K), (M, R), (R, K), dtype=dtype)
    dx = gpu.backward(*operands, config=config)
    assert torch.equal(dx, backward(*operands, None, 0.0, torch.float64).to(dtype))


def mask_arguments(dropout, seed=77):
    mask = {"threshold": threshold(dropout), "inverse_keep": inverse_keep(dropout)}
    return torch.tensor([seed], dtype=torch.int64), mask


@pytest.mark.parametrize("config", [WIDE, NARROW])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[3] in (1, 24, 72, 256)], ids=str)
def test_backward_dropout_exact(gpu, shape, config):
    M, K, N, R = shape
    operands = integer_inputs((M, N), (N, K), (M, R), (R, K), dtype=FP16)
    seed, mask = mask_arguments(0.5)
    dx = gpu.backward(*operands, seed, **mask, config=config)
    assert torch.equal(dx, backward(*operands, seed, 0.5, torch.float64).to(FP16))


@pytest.mark.parametrize(
    ("dropout", "seed"), [(1e-5, 2**63 - 1), (0.1, 0), (0.5, -1), (0.999, 123456789), (1 - 1e-9, 3)]
)
def test_backward_mask(gpu, seed, dropout):
    """The bits of the mask itself: the low-rank term is one everywhere, the base term nought."""
    M, K = 140, 300
    ones, noughts = torch.ones, torch.zeros
    seed, mask = mask_arguments(dropout, seed)
    mask["inverse_keep"] = 1.0
    dx = gpu.backward(noughts(M, 8, dtype=BF16), noughts(8, K, dtype=BF16), ones(M, 1, dtype=BF16),
                      ones(1, K, dtype=BF16), seed, **mask)  # fmt: skip
    assert torch.equal(dx, keep_mask(seed, dropout, M, K, BF16))


@pytest.mark.parametrize("column", [4, 5])
def test_an_element_at_the_threshold_is_kept(gpu, column):
    """Drop as much as leaves one element just kept; one more of the 65,536 values, and it is dropped."""
    seed = torch.tensor([5], dtype=torch.int64)
    kept = [t for t in range(0, 65536, 16) if keep_mask(seed, t / 65536, 4, 8)[3, column]]
    most = max(t for t in range(kept[-1], kept[-1] + 16) if keep_mask(seed, t / 65536, 4, 8)[3, column])
    ones, noughts = torch.ones(8, 8, dtype=BF16), torch.zeros(8, 8, dtype=BF16)
    for drop, expected in ((most, 1), (most + 1, 0)):
        dx = gpu.backward(noughts[:4], noughts, ones[:4, :1], ones[:1], seed, drop)
        assert dx[3, column] == expected


@pytest.mark.parametrize(("dtype", "dropout"), [(BF16, 0.0), (FP16, 0.5)])
@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 < s[3] <= 64], ids=str)
def test_down_exact(gpu, shape, dtype, dropout):
    """S computed inside, on a workspace that is used again."""
    M, N, K, R = shape
    x, w, a, b, bias = integer_inputs((M, K), (N, K), (R, K), (N, R), (N,), dtype=dtype)
    a[:, 24:] = 0  # |S| stays small enough for S Bᵀ to be exact in the dtype that S is rounded to
    workspace = gpu.workspace(M)
    for order in (1, 2):
        gpu.set(seed=order)
        seed, mask = mask_arguments(dropout, seed=order)
        y, s = gpu.down(x, w, a, b, workspace, bias, 0.5, seed, **mask)
        exact = down(x.double(), [a.double()], [0.5], [dropout], seed)
        assert torch.equal(s, exact.to(dtype))
        assert torch.equal(y, forward(x, w, exact, b, bias, torch.float64).to(dtype))
        assert not workspace.any()


def test_down_mask(gpu):
    """The bits of x's mask: each rank sees one column of x."""
    M, K, R = 100, 264, 64
    seed, mask = mask_arguments(0.3)
    mask["inverse_keep"] = 1.0
    zeros = torch.zeros(8, K, dtype=BF16), torch.zeros(8, R, dtype=BF16)
    for first in range(0, K, R):
        columns = torch.arange(first, first + R).clamp_(max=K - 1)
        a = F.one_hot(columns, K).to(BF16)
        _, s = gpu.down(torch.ones(M, K, dtype=BF16), zeros[0], a, zeros[1], gpu.workspace(M), None, 1.0, seed, **mask)
        assert torch.equal(s, keep_mask(seed, 0.3, M, K, BF16)[:, columns])


@pytest.mark.parametrize(("dtype", "config"), KINDS)
def test_accuracy(gpu, dtype, config):
    M, N, K, R = 200, 264, 448, 24
    *operands, bias = random_inputs((M, K), (N, K), (M, R), (N, R), (N,), dtype=dtype)
    exact, eager = forward(*operands, bias, torch.float64), forward(*operands, bias)
    assert_no_worse(gpu.forward(*operands, bias, config), eager, exact, "y")
    operands = random_inputs((M, N), (N, K), (M, R), (R, K), dtype=dtype)
    seed, mask = mask_arguments(0.1)
    exact, eager = (backward(*operands, seed, 0.1, at) for at in (torch.float64, None))
    assert_no_worse(gpu.backward(*operands, seed, **mask, config=config), eager, exact, "dx")


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("rank", [16, 40])
def test_down_accuracy(gpu, dtype, rank):
    M, N, K = 200, 264, 448
    x, w, a, b = random_inputs((M, K), (N, K), (rank, K), (N, rank), dtype=dtype)
    seed, mask = mask_arguments(0.1)
    y, s = gpu.down(x, w, a, b, gpu.workspace(M), None, 2.0, seed, **mask)
    exact, eager = (down(t, [u], [2.0], [0.1], seed) for t, u in ((x.double(), a.double()), (x, a)))
    assert_no_worse(s, eager, exact, "s")
    assert_no_worse(y, forward(x, w, eager, b, None), forward(x, w, exact, b, None, torch.float64), "y")
