"""multi_lora at its edges: slots, ranks, batches; what a token's bits depend on; in place; autocast."""

from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastpeft.ops import multi_lora, multi_lora_, multi_lora_shared, route
from fastpeft.ops.routing import TILES
from fastpeft.testing import MultiLoraProblem
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, served
from tests.support.exactness import assert_exact

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_tile = pytest.mark.parametrize("tile", TILES)


def integers(tokens=41, k=38, outs=(45,), ranks=(12,), slots=4, **options):
    return MultiLoraProblem.make(tokens, k, outs, ranks, slots, FP32, device=DEVICE, integers=True, **options)


def with_slots(problem, token_slots):
    return replace(problem, token_slots=torch.tensor(token_slots, dtype=torch.int32, device=DEVICE))


@each_backend
@each_tile
@pytest.mark.parametrize(
    "token_slots",
    [[-1] * 9, [3] * 9, [3] + [-1] * 8, [0] * 9, [-1, 3, -1, 0, 0, 0, 3, -1, -1], [0] * 5 + [2] * 3 + [3]],
    ids=["all -1", "last slot", "one token", "first slot", "two of four", "last slot with fewest"],
)
def test_who_is_in_the_batch(backend, tile, token_slots):
    assert_exact(with_slots(integers(tokens=9), token_slots), backend, tile)


@each_backend
@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_a_batch(backend, tokens):
    problem = integers(tokens=tokens)
    assert_exact(with_slots(problem, [2] * tokens), backend)
    assert_exact(with_slots(problem, [-1] * tokens), backend)


@each_backend
def test_300_slots_and_only_some_used(backend):
    problem = integers(tokens=20, k=18, outs=(10,), ranks=(4,), slots=300)
    assert_exact(with_slots(problem, [299, 0, -1, 150, 299] * 4), backend)


@each_backend
@each_tile
@pytest.mark.parametrize("ranks", [(1,), (17,), (64,), (128,), (1, 128, 17), (64, 64, 64, 64)], ids=str)
def test_ranks(backend, tile, ranks):
    """Blocks of columns within a slice, across slices, and slices that share a block."""
    assert_exact(integers(tokens=19, k=20, outs=(24, 9, 70, 33)[: len(ranks)], ranks=ranks, slots=3), backend, tile)


@each_backend
def test_true_ranks_from_0_to_all(backend):
    """Mixed 0 ... 128 in one bank; a rank that the bank does not have, or a negative one, is not believed."""
    problem = integers(tokens=30, k=16, outs=(12,), ranks=(128,), slots=6)
    lora_a, lora_b = (t[0].nan_to_num() for t in (problem.lora_as, problem.lora_bs))
    ranks = torch.tensor([0, 1, 16, 65, 128, 9], dtype=torch.int32, device=DEVICE)
    assert_exact(replace(problem, lora_as=(lora_a,), lora_bs=(lora_b,), ranks=ranks), backend)
    claimed = torch.tensor([-5, 1, 16, 65, 4096, 9], dtype=torch.int32, device=DEVICE)
    args = problem.x, lora_a, lora_b, problem.token_slots, problem.scales
    assert torch.equal(multi_lora(*args, claimed, backend=backend), multi_lora(*args, ranks, backend=backend))


@each_backend
def test_no_ranks_means_all_of_them(backend):
    problem = integers()
    full = {name: tuple(t.nan_to_num() for t in getattr(problem, name)) for name in ("lora_as", "lora_bs")}
    assert_exact(replace(problem, ranks=None, **full), backend)


@each_backend
def test_the_last_slot_has_the_fewest_tokens(backend):
    """All of one rank, and no token without an adapter: what pads the last slot must not lie past the batch."""
    p = with_slots(integers(tokens=9), [0] * 5 + [2] * 3 + [3])
    full = {name: tuple(t.nan_to_num() for t in getattr(p, name)) for name in ("lora_as", "lora_bs")}
    assert_exact(replace(p, ranks=None, **full), backend)


@each_backend
def test_what_an_unused_slot_holds_does_not_leak(backend):
    """NaN and infinity in slots without tokens, and a NaN scale."""
    problem = with_slots(integers(tokens=20), [0, 2, -1, 2] * 5)
    wanted = problem.fused(backend)
    dirty = [problem.lora_as[0].clone(), problem.lora_bs[0].clone(), problem.scales.clone()]
    for t, value in zip(dirty, (torch.nan, torch.inf, torch.nan), strict=True):
        t[1], t[3] = value, value
    lora_a, lora_b, scales = dirty
    found = replace(problem, lora_as=(lora_a,), lora_bs=(lora_b,), scales=scales).fused(backend)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@each_backend
@each_tile
def test_shared_and_separate_tables_agree(backend, tile):
    """[slots] for every slice, or [P, slots]."""
    p = integers(outs=(45, 30), ranks=(12, 12))
    lists = [t.nan_to_num() for t in p.lora_as], [t.nan_to_num() for t in p.lora_bs]
    routing = route(p.token_slots, 4, tile, backend)
    scales, ranks = p.scales[1], p.ranks[1]
    one = multi_lora_shared(p.x, *lists, routing, scales, ranks, p.ys, backend)
    both = multi_lora_shared(p.x, *lists, routing, scales.repeat(2, 1), ranks.repeat(2, 1), p.ys, backend)
    alone = [multi_lora(p.x, a, b, routing, scales, ranks, y, backend) for a, b, y in zip(*lists, p.ys, strict=True)]
    assert all(map(torch.equal, one, both))
    assert all(map(torch.equal, one, alone))


@each_tile
@pytest.mark.parametrize(
    ("backend", "dtype", "adapter"),
    [case for case in served((FP32, FP32), (FP16, FP16), (BF16, BF16)) if case.values[0] != "reference"],
)
def test_a_token_does_not_depend_on_the_batch(tile, backend, dtype, adapter):
    """Row i alone is row i in any batch, bit for bit, on one kernel path, NaN and infinity in other rows included.

    A promise of the kernels: the reference's sums are the library's, which picks them by the number of rows.
    """
    p = MultiLoraProblem.make(150, 300, (45, 30), (12, 17), 3, dtype, adapter, DEVICE)
    args = p.lora_as, p.lora_bs

    def rows(index):
        routing = route(p.token_slots[index], 3, tile, backend)
        ys = [y[index] for y in p.ys]
        return multi_lora_shared(x[index], *args, routing, p.scales, p.ranks, ys, backend)

    x = p.x
    whole = rows(slice(None))
    for i in (0, 70, 149):
        assert all(torch.equal(alone[0], all_rows[i]) for alone, all_rows in zip(rows([i]), whole, strict=True))
    some = [149, 3, 70, 8]
    assert all(torch.equal(few, all_rows[some]) for few, all_rows in zip(rows(some), whole, strict=True))
    x = p.x.clone()
    x[:70], x[71:] = torch.nan, torch.inf
    assert all(torch.equal(dirty[70], all_rows[70]) for dirty, all_rows in zip(rows(slice(None)), whole, strict=True))


@each_backend
@each_tile
def test_nan_of_one_adapter_harms_no_other(backend, tile):
    """NaN in the inputs and gradients of slot 0's tokens: the other slots' gradients keep their bits."""
    p = integers(tokens=40, slots=3)
    p = with_slots(p, [0] + [2, 1, 0, -1] * 9 + [1] * 3)  # the padding of a tile must not be token 0
    mine = (p.token_slots == 0)[:, None]
    dirty = replace(p, x=p.x.masked_fill(mine, torch.nan), dys=(p.dys[0].masked_fill(mine, torch.inf),))
    clean, found = p.fused(backend, tile), dirty.fused(backend, tile)
    for name in ("dlora_a0", "dlora_b0"):
        assert torch.equal(clean[name][1:], found[name][1:])
    for name in ("y0", "dx"):
        assert torch.equal(clean[name][~mine[:, 0]], found[name][~mine[:, 0]])


@each_backend
def test_a_changed_mapping_between_calls(backend):
    """The same tensor of slots with new values: nothing of the last call is remembered."""
    problem, slots = integers(tokens=20), torch.empty(20, dtype=torch.int32, device=DEVICE)
    for mapping in ([0] * 20, [3, -1] * 10, [1] * 19 + [2]):
        slots.copy_(torch.tensor(mapping))
        assert_exact(replace(problem, token_slots=slots), backend)


@each_backend
def test_leading_dimensions_and_one_routing_for_all_layers(backend):
    p = integers(tokens=42)
    args = p.lora_as[0], p.lora_bs[0], p.token_slots, p.scales, p.ranks
    flat = multi_lora(p.x, *args, p.ys[0], backend)
    args = *args[:2], p.token_slots.view(2, 3, 7), *args[3:]
    cube = multi_lora(p.x.view(2, 3, 7, 38), *args, p.ys[0].view(2, 3, 7, 45), backend)
    assert torch.equal(cube.view(42, 45), flat)
    routing = route(p.token_slots, 4, backend=backend)
    assert torch.equal(multi_lora(p.x, *args[:2], routing, *args[3:], p.ys[0], backend), flat)


@each_backend
def test_in_place(backend):
    """Into views of one wide y, as engines lay out q, k and v; untouched tokens keep their bits."""
    p = integers(outs=(45, 30), ranks=(12, 9))
    wanted = [p.fused(backend)[name] for name in ("y0", "y1")]
    wide = torch.full((41, 100), torch.nan, device=DEVICE)
    views = [wide[:, 3:48], wide[:, 60:90]]
    for view, y in zip(views, p.ys, strict=True):
        view.copy_(y)
    args = p.x, list(p.lora_as), list(p.lora_bs), p.token_slots, p.scales, p.ranks
    assert multi_lora_(views, *args, backend) is views
    assert all(map(torch.equal, views, wanted))
    assert wide.isnan().sum() == 41 * 25
    y = p.ys[0].clone().view(1, 41, 45)
    one = p.x.view(1, 41, 38), p.lora_as[0], p.lora_bs[0], p.token_slots, p.scales[0], p.ranks[0]
    assert multi_lora_(y, *one, backend) is y
    assert torch.equal(y[0], wanted[0])


@each_backend
def test_y_absent_is_0(backend):
    p = integers()
    args = p.x, p.lora_as[0], p.lora_bs[0], p.token_slots, p.scales, p.ranks
    assert torch.equal(multi_lora(*args, None, backend), multi_lora(*args, torch.zeros_like(p.ys[0]), backend))


@each_backend
@pytest.mark.parametrize("trained", ["x", "lora_a", "lora_b", "y", "x lora_b", "lora_a lora_b"])
def test_what_is_trained(backend, trained):
    p = integers(dropout=0.5)
    wanted = p.fused(backend)
    leaves = {"x": p.x, "lora_a": p.lora_as[0], "lora_b": p.lora_bs[0], "y": p.ys[0]}
    leaves = {name: t.clone().requires_grad_(name in trained.split()) for name, t in leaves.items()}
    x, a, b, y = leaves.values()
    out = multi_lora(x, a, b, p.token_slots, p.scales, p.ranks, y, backend, dropouts=p.dropouts, seeds=p.seeds)
    out.backward(p.dys[0])
    names = {"x": "dx", "lora_a": "dlora_a0", "lora_b": "dlora_b0", "y": "dy0"}
    for name, t in leaves.items():
        assert (t.grad is not None) == (name in trained.split())
        assert t.grad is None or torch.equal(t.grad, wanted[names[name]]), name


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32)))
@pytest.mark.parametrize("low", [BF16, FP16], ids=str)
def test_autocast_is_the_same_as_casting_by_hand(backend, dtype, adapter, low):
    p = MultiLoraProblem.make(dtype=dtype, device=DEVICE)
    args = p.lora_as[0], p.lora_bs[0], p.token_slots, p.scales, p.ranks
    with torch.autocast(DEVICE.type, low):
        inside = multi_lora(p.x, *args, p.ys[0], backend)
    assert torch.equal(inside, multi_lora(p.x.to(low), *args, p.ys[0].to(low), backend))


@each_backend
def test_seeds_are_drawn_where_none_are_given(backend):
    p = MultiLoraProblem.make(device=DEVICE, outs=(45, 45), ranks=(12, 12), dropout=0.5)
    args = p.x, [p.lora_as[0]] * 2, [p.lora_bs[0]] * 2, p.token_slots, p.scales[0], p.ranks[0]

    def draw(seed):
        torch.manual_seed(seed)
        return multi_lora_shared(*args, None, backend, dropouts=(0.5,) * 4)

    assert all(map(torch.equal, draw(1), draw(1)))
    assert not torch.equal(draw(1)[0], draw(2)[0])
    assert not torch.equal(*draw(1))  # every slice has its own mask


@pytest.mark.slow
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_problem(data):
    tokens, slots = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 9))
    count = data.draw(st.integers(1, 4))
    outs = data.draw(st.lists(st.integers(1, 140), min_size=count, max_size=count))
    ranks = data.draw(st.lists(st.integers(1, 70), min_size=count, max_size=count))
    k, dropout = data.draw(st.integers(1, 150)), data.draw(st.sampled_from([0.0, 0.5]))
    problem = integers(tokens, k, tuple(outs), tuple(ranks), slots, dropout=dropout)
    mapping = data.draw(st.lists(st.integers(-1, slots - 1), min_size=tokens, max_size=tokens))
    backend = data.draw(st.sampled_from(BACKENDS))
    assert_exact(with_slots(problem, mapping), backend, data.draw(st.sampled_from(TILES)))
