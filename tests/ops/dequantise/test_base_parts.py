"""Parts of weights that are written out: which, in how large a scratch, how often."""

import pytest
import torch

from fastpeft import ops
from fastpeft.ops.base import parts
from fastpeft.ops.base_parts import ALL, Parts
from fastpeft.ops.base_scratch import Scratch
from tests.support.backends import BACKENDS, DEVICE
from tests.support.quantised import by_hand, eight_bit, four_bit

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def on_device(base):
    return ops.Base(*(part.to(DEVICE) if isinstance(part, torch.Tensor) else part for part in base))


def taken(weights, backend):
    return Parts(torch.empty(0, device=DEVICE), *parts(weights), backend)


@each_backend
def test_parts_of_weights(backend):
    """Of a dense weight and of int8 any; of 4 bits where blocks begin with the rows, and end with the columns."""
    dense = torch.randn(48, 64, device=DEVICE)
    bases = [
        on_device(b)
        for b in (four_bit(48, 64, 16, True), four_bit(48, 60, 32), four_bit(48, 64, 64), eight_bit(48, 64))
    ]
    with taken([dense, *bases], backend) as given:
        assert [len(given.cut(p, 48, 20)) for p in range(5)] == [3, 3, 1, 3, 3]
        assert [len(given.cut(p, given.part(p).shape[1], 32, columns=True)) for p in range(5)] == [2, 2, 1, 1, 2]
        assert [len(given.cut(p, 60, 24, columns=True)) for p in range(5)] == [3, 1, 1, 1, 3]
        assert given.cut(0, 48, 20) == [slice(0, 20), slice(20, 40), slice(40, 48)]
        assert given.cut(0, 48, 48) == given.cut(0, 48, 99) == [slice(0, 48)]
        for p, whole in enumerate((dense, *map(by_hand, bases))):
            assert torch.equal(given.part(p), whole)
            for part in given.cut(p, 48, 20):
                assert torch.equal(given.part(p, part), whole[part])
            for part in given.cut(p, whole.shape[1], 32, columns=True):
                assert torch.equal(given.part(p, ALL, part), whole[:, part])


def test_the_scratch_is_as_large_as_it_has_to_be():
    for backend in BACKENDS:
        scratch = Scratch(torch.empty(0, dtype=torch.float16), backend)
        first = scratch.take(4, 6)
        assert scratch.take(2, 12).data_ptr() == first.data_ptr()
        assert scratch.take(1 << 12, 3).shape == (1 << 12, 3)
        assert scratch.take(2, 2).dtype == torch.float16
        scratch.done()
        assert scratch.memory is None


def test_a_weight_of_another_library_is_asked_for_once():
    asked, weight = [], torch.randn(6, 4)
    base = ops.written_by(lambda: (asked.append(None), weight)[1], (6, 4), "cpu")
    with Parts(torch.empty(0), *parts([base, base]), "reference") as given:
        assert given.cut(0, 6, 2) == [slice(0, 6)]
        for part in (slice(0, 3), slice(3, 6)):
            assert torch.equal(given.part(0, part), weight[part])
        assert len(asked) == 1
        given.part(1)
        assert len(asked) == 2
