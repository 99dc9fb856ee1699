"""The dropout mask: its bits, its statistics, and that forward, backward and every backend draw it alike."""

import math

import pytest
import torch

from fastpeft import ops
from fastpeft.reference import inverse_keep, keep_mask
from fastpeft.reference.dropout import threshold
from tests.support.backends import BACKENDS, DEVICE, FP32

MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


def keep_by_hand(seed: int, dropout: float, m: int, k: int) -> bool:
    """The documented formula in Python's integers, which do not wrap by themselves."""
    z = (seed + (m + 1) * 0x9E3779B97F4A7C15) & MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
    z ^= z >> 31
    lo, hi = z & MASK32, z >> 32
    w = ((((k // 2) * 0x9E3779B1) & MASK32) ^ lo) * 0x85EBCA6B & MASK32
    w = ((w ^ (w >> 15)) + hi) * 0xC2B2AE35 & MASK32
    w ^= w >> 16
    lane = (w & 0xFFFF) if k % 2 == 0 else w >> 16
    lane -= (lane >> 15) << 16
    return lane >= round(dropout * 65536) - 32768


def mask(seed, dropout, rows, columns, **options):
    return keep_mask(torch.tensor(seed, device=DEVICE), dropout, rows, columns, **options)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 12345, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.97])
def test_bits_are_those_of_the_formula(seed, dropout):
    found = mask(seed, dropout, 40, 51).tolist()
    assert found == [[keep_by_hand(seed, dropout, m, k) for k in range(51)] for m in range(40)]


def test_golden_bits():
    """Written down, so that a change of the formula in both places is seen: checkpoints would not reproduce."""
    words = [int("".join("01"[b] for b in row), 2) for row in mask(1234, 0.5, 3, 32).tolist()]
    assert words == [0xDE29BCDE, 0x229BFCD2, 0x484E9F80]


def backend_mask(backend, seed, dropout, rows, columns):
    """The mask an op drew in its forward and in its backward, read off x = 1, A = I and B = I."""
    eye = torch.eye(columns, device=DEVICE)
    x = torch.ones(rows, columns, device=DEVICE, requires_grad=True)
    a = eye.clone().requires_grad_()
    y = ops.lora_linear(x, torch.zeros_like(eye), a, eye, None, 1.0, dropout, seed, backend)
    dx, da = torch.autograd.grad(y.sum(), (x, a))
    return y.detach(), dx, da


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("element", [(0, 0), (3, 7), (20, 33)], ids=str)
def test_an_element_at_the_threshold_is_kept(backend, element):
    """The probability at which this element is kept for the last time; one lane value further it is dropped."""
    m, k = element
    lane = next(t for t in range(65536) if not keep_by_hand(8, (t + 1) / 65536, m, k))
    for drop, wanted in ((lane, True), (lane + 1, False)):
        y, *_ = backend_mask(backend, 8, drop / 65536, m + 1, k + 1)
        assert (y[m, k] != 0).item() == wanted


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout", [0.1, 0.9, 0.999999])  # 6553.6 lane values: rounded up; 65535.9: one is kept
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (70, 33), (33, 130), (65, 64)])
def test_every_backend_draws_the_reference_mask(backend, dropout, rows, columns):
    wanted = mask(77, dropout, rows, columns, dtype=FP32) * inverse_keep(dropout)
    y, dx, da = backend_mask(backend, 77, dropout, rows, columns)
    assert torch.equal(y, wanted)  # the mask in forward
    assert torch.equal(dx, wanted)  # in dX
    torch.testing.assert_close(da, wanted.sum(0).expand_as(da))  # and in dA


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_seed_has_its_mask_in_the_shared_form(backend):
    """Two projections with one seed have one mask; another seed, another mask; a probability of 0, none."""
    eye, zero = torch.eye(40, device=DEVICE), torch.zeros(40, 40, device=DEVICE)
    x = torch.ones(30, 40, device=DEVICE)
    lists = [[zero] * 4, [eye] * 4, [eye] * 4, None, [1.0] * 4]
    one, two, three, four = ops.lora_linear_shared(x, *lists, [0.5, 0.5, 0.5, 0.0], [5, 6, 5, 6], backend)
    assert torch.equal(one, three)
    assert torch.equal(one, mask(5, 0.5, 30, 40, dtype=FP32) * 2)
    assert torch.equal(two, mask(6, 0.5, 30, 40, dtype=FP32) * 2)
    assert torch.equal(four, x)


@pytest.mark.parametrize("dropout", [2**-16, 0.001, 0.05, 0.5, 0.9, 0.999, 1 - 2**-16])
def test_mean(dropout):
    """The share of kept elements is within 5 sigma, in all, in even and in odd columns."""
    keep = mask(3, dropout, 1000, 1001, dtype=torch.float64)
    p = threshold(dropout) / 65536
    for part in (keep, keep[:, ::2], keep[:, 1::2]):
        sigma = math.sqrt(p * (1 - p) / part.numel())
        assert abs(part.mean().item() - (1 - p)) < 5 * sigma


@pytest.mark.parametrize("dropout", [0.0, 1e-6, 2**-18])
def test_no_dropout(dropout):
    """Below half a step of 2**-16 nothing is dropped and nothing scaled, and no seed is drawn."""
    assert threshold(dropout) == 0
    assert inverse_keep(dropout) == 1.0
    assert mask(3, dropout, 50, 51).all()
    before = torch.get_rng_state()
    x = torch.randn(4, 8, device=DEVICE)
    state = torch.get_rng_state() if DEVICE.type == "cpu" else torch.cuda.get_rng_state()
    ops.lora_linear(x, torch.ones(3, 8, device=DEVICE), x[:2], torch.ones(3, 2, device=DEVICE), dropout=dropout)
    after = torch.get_rng_state() if DEVICE.type == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(state, after)
    torch.set_rng_state(before)


@pytest.mark.parametrize("dropout", [1 - 2**-16, 1 - 2**-20, math.nextafter(1.0, 0.0)])
def test_dropout_near_1_keeps_one_lane_value(dropout):
    assert threshold(dropout) == 65535
    assert inverse_keep(dropout) == 65536
    assert 0 < mask(3, dropout, 2000, 2000).sum() < 200


def correlation(a, b) -> float:
    """In units of its standard deviation under independence."""
    a, b = (t.double() - t.double().mean() for t in (a, b))
    return ((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt()).item() * math.sqrt(a.numel())


@pytest.mark.parametrize("dropout", [0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 123456789])
def test_neighbours_are_independent(dropout, seed):
    keep = mask(seed, dropout, 1024, 1024)
    assert abs(correlation(keep[:, ::2], keep[:, 1::2])) < 5  # the two lanes of a word
    for step in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512):
        assert abs(correlation(keep[:, step:], keep[:, :-step])) < 5, f"columns {step} apart"
        assert abs(correlation(keep[step:], keep[:-step])) < 5, f"rows {step} apart"
        assert abs(correlation(keep[step:, step:], keep[:-step, :-step])) < 5, f"diagonals {step} apart"


def test_rows_and_columns_are_binomial():
    """The variance of row sums and of column sums: a bad key makes whole rows alike, a bad word whole columns."""
    keep = mask(9, 0.5, 1024, 1024, dtype=torch.float64)
    for dim in (0, 1):
        variance = keep.sum(dim).var().item() / 256
        assert abs(variance - 1) < 5 * math.sqrt(2 / 1023)


@pytest.mark.parametrize("other", [1, 2, 3, 1 << 32, 0x9E3779B97F4A7C15 - (1 << 64), -1])
def test_seeds_are_independent(other):
    one, two = mask(0, 0.5, 512, 512), mask(other, 0.5, 512, 512)
    assert not torch.equal(one, two)
    # The seed and the row share one counter: seeds that differ by its increment are the same mask a row apart.
    shifted = other == 0x9E3779B97F4A7C15 - (1 << 64)
    assert torch.equal(one[1:], two[:-1]) == shifted
    assert abs(correlation(one, two)) < 5


def test_odd_columns_are_a_cut_of_even_ones():
    assert torch.equal(mask(4, 0.3, 20, 31), mask(4, 0.3, 20, 32)[:, :31])
    assert torch.equal(mask(4, 0.3, 19, 32), mask(4, 0.3, 20, 32)[:19])
    assert mask(4, 0.3, 0, 5).shape == (0, 5)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8]
)
def test_dtype(dtype):
    found = mask(4, 0.3, 20, 31, dtype=dtype)
    assert found.dtype == dtype
    assert torch.equal(found.bool(), mask(4, 0.3, 20, 31))
    assert torch.equal(found.double(), mask(4, 0.3, 20, 31).double())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_is_an_integer_a_tensor_or_drawn(backend):
    x, w, a, b = (torch.randn(size, device=DEVICE) for size in ((9, 16), (5, 16), (4, 16), (5, 4)))

    def y(seed):
        return ops.lora_linear(x, w, a, b, None, 1.0, 0.5, seed, backend)

    assert torch.equal(y(12), y(torch.tensor(12, device=DEVICE)))
    assert torch.equal(y(12), y(torch.tensor([[12]], device=DEVICE)))
    torch.manual_seed(1)
    one, two = y(None), y(None)
    torch.manual_seed(1)
    assert torch.equal(one, y(None))  # manual_seed decides
    assert not torch.equal(one, two)  # every call draws anew
