"""The mask that the extension draws on a CPU is the definition's, bit for bit."""

import pytest
import torch

from fastpeft.reference.dropout import drawn_mask, keep_mask
from tests.support import host_extension


@pytest.fixture(autouse=True, scope="module")
def _extension():
    host_extension.loaded()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 5), (7, 64), (300, 129)])
@pytest.mark.parametrize("dropout", [2**-16, 0.1, 0.5, 1 - 2**-16])
def test_bits(dtype, shape, dropout):
    for seed in (0, 7, -1, 2**62 + 12345, -(2**63)):
        seed = torch.tensor([seed])
        assert torch.equal(drawn_mask(seed, dropout, *shape, dtype), keep_mask(seed, dropout, *shape, dtype))


def test_the_extension_draws_it(monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["fastpeft.reference.dropout"], "keep_mask", None)
    assert drawn_mask(torch.tensor([3]), 0.5, 4, 6, torch.float32).shape == (4, 6)
    with pytest.raises(RuntimeError, match="keep_mask: seed is Int"):
        drawn_mask(torch.tensor([3], dtype=torch.int32), 0.5, 4, 6, torch.float32)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(
            drawn_mask(torch.tensor([3]), 0.3, 2000, 70, torch.float32),
            keep_mask(torch.tensor([3]), 0.3, 2000, 70, torch.float32),
        )
    finally:
        torch.set_num_threads(before)
