"""route: tokens sorted by slot and cut into tiles, the same on every backend."""

import pytest
import torch

import fastpeft
from fastpeft.ops import route
from fastpeft.ops.routing import DECODE_TOKENS, TILES
from fastpeft.reference.routing import tile_count
from tests.support.backends import BACKENDS, DEVICE

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_tile = pytest.mark.parametrize("tile", TILES)
MAPPINGS = {
    "mixed": ([2, -1, 0, 2, 0, 2, -1, 4], 5),
    "nobody": ([-1, -1, -1], 3),
    "one token": ([1], 2),
    "one slot": ([0] * 150, 1),
    "no tokens": ([], 3),
    "last slot only": ([299] * 3, 300),
    "300 slots": ([(7 * t) % 301 - 1 for t in range(500)], 300),
    "skewed": ([0] + [1] * 200, 2),
    "distinct": (list(range(129))[::-1], 129),
}
each_mapping = pytest.mark.parametrize(("token_slots", "slots"), MAPPINGS.values(), ids=MAPPINGS)


def slots_of(values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@each_backend
@each_tile
@each_mapping
def test_is_a_stable_sort_cut_into_tiles(backend, tile, token_slots, slots):
    order, starts, tiles, *settings = route(slots_of(token_slots), slots, tile, backend)
    assert settings == [slots, tile]
    wanted = sorted(range(len(token_slots)), key=lambda t: token_slots[t] % (slots + 1))  # -1 comes last
    assert order.tolist() == wanted
    counts = [token_slots.count(slot) for slot in range(slots)]
    assert starts.tolist() == [sum(counts[:slot]) for slot in range(slots + 1)]
    cut = [(s, starts[s].item() + first) for s in range(slots) for first in range(0, counts[s], tile)]
    found = list(map(tuple, tiles.T.tolist()))
    assert found == cut + [(-1, -1)] * (len(found) - len(cut))
    assert all(t.dtype == torch.int32 for t in (order, starts, tiles))


@each_tile
def test_no_mapping_makes_more_tiles_than_there_is_room_for(tile):
    """The room depends on T and slots alone; the mapping that needs it all is every slot with one token too many."""
    for tokens in range(0, 200, 7):
        for slots in (1, 2, 5, 300):
            used = min(tokens, slots)
            most = max(
                (
                    sum(-(-n // tile) for n in [1] * (k - 1) + [tokens - k + 1])
                    for k in range(1, used + 1)
                    if tokens - k + 1 > 0
                ),
                default=0,
            )
            assert tile_count(tokens, slots, tile) >= most
    assert tile_count(3 * tile, 3, tile) == 3 + (3 * tile - 3) // tile


@each_backend
def test_any_integers_and_strides(backend):
    values = slots_of([3, 0, -1, 3, 2, 0, 1])
    wanted = route(values, 4, 16, backend)
    spread = torch.full((7, 3), 77, dtype=torch.int32, device=DEVICE)
    spread[:, 1] = values
    for same in (values.long(), spread[:, 1], values.view(7, 1)):
        found = route(same, 4, 16, backend)
        assert all(map(torch.equal, found[:3], wanted[:3]))


def test_few_tokens_take_small_tiles():
    few, many = (torch.zeros(n, dtype=torch.int32, device=DEVICE) for n in (DECODE_TOKENS, DECODE_TOKENS + 1))
    assert (route(few, 2).tile, route(many, 2).tile) == TILES


@each_backend
@pytest.mark.parametrize("wrong", [-2, 4, 2**31 - 1, -(2**31)])
def test_a_slot_that_does_not_exist(backend, wrong):
    """An error where it can be seen without waiting for a device, no adapter where not; never an access outside."""
    values = slots_of([1, wrong, 3])
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=rf"route: token_slots holds slot {wrong}, expected -1 \(none\) ... 3"):
            route(values, 4, 16, backend)
    else:
        assert route(values, 4, 16, backend).order.tolist() == [0, 2, 1]


@pytest.mark.parametrize("wrong", [-2, 4, 2**31 - 1, -(2**31)])
def test_kernels_take_it_for_none(wrong):
    kernels = pytest.importorskip("fastpeft.kernels.routing", reason="Triton is not installed")
    order, starts, tiles = kernels.forward(slots_of([1, wrong, 3]), 4, 16, 3)
    assert order.tolist() == [0, 2, 1]
    assert starts.tolist() == [0, 0, 1, 1, 2]
    assert tiles.tolist() == [[1, 3, -1], [0, 1, -1]]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([1, 2], 3), TypeError, "route: token_slots is a list of 2, expected a tensor of torch.int32 or"),
        ((torch.ones(2), 3), TypeError, "token_slots is torch.float32, expected a tensor of torch.int32"),
        ((torch.ones(2).int(), 0), ValueError, "slots is 0, expected an integer of at least 1"),
        ((torch.ones(2).int(), 2.0), ValueError, r"slots is 2.0 \(float\), expected an integer"),
        ((torch.ones(2).int(), 3, 32), ValueError, "tile is 32, expected one of 16, 64"),
        ((torch.ones(2).int(), 3, 16, "cutlass"), ValueError, "backend is 'cutlass', expected one of"),
    ],
)
def test_bad_calls(arguments, error, message):
    with pytest.raises(error, match=message):
        route(*arguments)


@each_backend
def test_opcheck_and_compile(backend):
    values = slots_of([2, -1, 0, 2])
    torch.library.opcheck(torch.ops.fastpeft.route.default, (values, 3, 16, backend))
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: route(t, 3, 16, backend), fullgraph=True, dynamic=True, backend="aot_eager")
    for mapping in (values, slots_of([1] * 20)):
        assert all(map(torch.equal, compiled(mapping)[:3], route(mapping, 3, 16, backend)[:3]))


def test_explain():
    assert str(fastpeft.explain("route", slots_of([0]))).startswith("route: served by")
