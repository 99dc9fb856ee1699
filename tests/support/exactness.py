"""Results that are to be equal bit for bit: an op's and the definition's on integers, or those of two runs."""

import torch


def assert_exact(problem, backend: str, *tile: int | None) -> None:
    """On a problem of ``fastpeft.testing`` whose arithmetic is exact, the op gives what the definition does."""
    fused, exact = problem.fused(backend, *tile), problem.exact()
    for name, value in exact.items():
        found = fused[name]
        assert found.shape == value.shape, name
        assert torch.equal(value.to(found.dtype).double(), value), f"{name}: the inputs do not make it exact"
        assert torch.equal(found.double(), value), name


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Every result of one run is the other's; float64 holds the values of every dtype."""
    for name, value in one.items():
        assert torch.equal(value.double(), other[name].double()), name
