"""The rule of accuracy, and inputs on which arithmetic is exact."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

MAX_RATIO = 2.0
RMS_RATIO = 1.2
# What training uses: the operands' dtype and the trained weights', which may be float32 beside 16 bits.
_FLOATS = torch.float32, torch.float16, torch.bfloat16
TRAINING = (*((dtype, dtype) for dtype in _FLOATS), *((dtype, torch.float32) for dtype in _FLOATS[1:]))


class Ratios(NamedTuple):
    """The fused op's error over eager's.

    Attributes:
        max: the ratio of the largest errors.
        rms: the ratio of the root mean square errors.
    """

    max: float
    rms: float

    @property
    def ok(self) -> bool:
        return self.max <= MAX_RATIO and self.rms <= RMS_RATIO


def worst(found: Iterable[Ratios]) -> Ratios:
    """The largest of each ratio."""
    ratios = list(found)
    return Ratios(max(r.max for r in ratios), max(r.rms for r in ratios))


def error_vs_eager(fused: Tensor, eager: Tensor, exact: Tensor) -> Ratios:
    """How far ``fused`` is from ``exact``, as multiples of how far ``eager`` is.

    Nobody can do better than round the exact result to the dtype, so eager's error counts as at least that of the
    rounded exact result; where even that is 0, the ratio is 0 if ``fused`` is exact too and infinite if not. A NaN, or
    an infinity where exact has none, is an infinite error. Ratios are statistics: they need some hundreds of elements
    to mean something.

    Args:
        fused: what is judged.
        eager: the same computed by plain PyTorch, of the same dtype.
        exact: the result in float64 of the same inputs.
    """
    if not fused.shape == eager.shape == exact.shape or fused.dtype != eager.dtype:
        given = ", ".join(f"{list(t.shape)} {t.dtype}" for t in (fused, eager, exact))
        raise ValueError(f"error_vs_eager: fused, eager and exact are {given}, expected one shape and one dtype")
    exact = exact.detach().double()
    ours, theirs, best = (_errors(t, exact) for t in (fused, eager, exact.to(fused.dtype)))
    return Ratios(*(_ratio(o, max(t, b)) for o, t, b in zip(ours, theirs, best, strict=True)))


def assert_no_worse(fused: Tensor, eager: Tensor, exact: Tensor, name: str = "fused") -> Ratios:
    """Raise AssertionError unless ``error_vs_eager`` is within the rule; return the ratios.

    Args:
        fused: what is judged.
        eager: the same computed by plain PyTorch, of the same dtype.
        exact: the result in float64 of the same inputs.
        name: what the message calls it.
    """
    ratios = error_vs_eager(fused, eager, exact)
    if not ratios.ok:
        raise AssertionError(
            f"{name}: the error is {ratios.max:.2f} (max) and {ratios.rms:.2f} (rms) times eager's, "
            f"expected at most {MAX_RATIO} and {RMS_RATIO}"
        )
    return ratios


def _errors(value: Tensor, exact: Tensor) -> tuple[float, float]:
    if not value.numel():
        return 0.0, 0.0
    value = value.detach().double()
    error = torch.where(value == exact, 0.0, value - exact).abs().nan_to_num(nan=torch.inf)
    return error.max().item(), error.square().mean().sqrt().item()


def _ratio(ours: float, theirs: float) -> float:
    if ours == 0.0:
        return 0.0
    return ours / theirs if 0.0 < theirs < torch.inf and ours < torch.inf else torch.inf


def integer_inputs(*shapes: tuple[int, ...], dtype: torch.dtype, device="cpu", seed: int = 0) -> list[Tensor]:
    """A tensor of -1, 0 and 1 for each shape, half of it zeros.

    With scales that are powers of two and sums below 2048 (float16) or 256 (bfloat16) every product and every sum is
    exact whatever its order, so a fused op must equal the reference bit for bit.

    Args:
        shapes: of the tensors.
        dtype: of them all.
        device: where the tensors lie.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(-2, 3, shape, generator=generator) for shape in shapes]
    return [(value.sign() * (value.abs() == 1)).to(device=device, dtype=dtype) for value in drawn]
