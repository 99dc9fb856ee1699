"""csrc/multi_lora.cu on the emulated GPU: its launcher and kernels as they are, in one launch and in two.

Integers first: every product and sum is exact, so the results must be equal bit for bit, whatever the order.
"""

import ctypes
import mmap
import os
from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastpeft.cuda import multi_lora as cuda
from fastpeft.reference.multi_lora import Slots
from fastpeft.reference.routing import route
from fastpeft.testing import MultiLoraProblem, assert_no_worse, eager_multi_lora, guarded
from tests.cuda.emulator import build
from tests.cuda.emulator.multi_lora_problems import (
    BF16,
    CLUSTER,
    FP16,
    PLANES,
    assert_exact,
    each_path,
    forward,
    integers,
    run,
    with_slots,
)

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=f"nothing to emulate with: {build.missing()}")
each_dtype = pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)


# (tokens, K, N of each slice, R of each slice): one token with an adapter and one without, every warp of every block;
# ragged everywhere; 1, 2 and 4 blocks of columns at a time; more of B than two stages hold; more columns than shrink
# takes at a time; slices of different ranks.
SHAPES = [
    (2, 2048, (128,), (8,)),
    (64, 72, (40,), (16,)),
    (41, 38, (45,), (12,)),
    (7, 1, (1,), (1,)),
    (19, 520, (264,), (32,)),
    (17, 300, (1030,), (64,)),
    (20, 264, (600,), (128,)),
    (33, 136, (96, 40, 24), (64, 16, 8)),
    (9, 96, (56, 23), (33, 128)),
]


@each_path
@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_are_exact(gpu, dtype, shape):
    """True ranks differ between slots and slices, and what lies beyond them is NaN; scales are negative too."""
    assert_exact(integers(*shape, dtype))


@each_path
@pytest.mark.parametrize("shape", [(24, 512, (320,), (16,)), (33, 300, (200, 70), (64, 24))], ids=str)
@each_dtype
def test_no_worse_than_pytorch(gpu, dtype, shape, record_property):
    p = MultiLoraProblem.make(*shape, 4, dtype)
    for found, eager, exact in zip(run(p), forward(p, eager_multi_lora, dtype), forward(p), strict=True):
        assert_no_worse(found, eager, exact, record_property)


def test_s_keeps_float(gpu):
    """x and A multiply to 2^12 + 2^-6, which 16 bits do not hold, and B takes the difference of two such."""
    x, a = torch.tensor([[64.0, 0.125]]), torch.tensor([[[64.0, 0.125], [64.0, 0.0]]])
    p = integers(1, 2, (1,), (2,), slots=1)
    p = replace(p, x=x.to(BF16), lora_as=(a.to(BF16),), lora_bs=(torch.tensor([[[1.0, -1.0]]], dtype=BF16),))
    p = replace(with_slots(p, [0]), ranks=None, scales=torch.ones(1), ys=(torch.zeros(1, 1, dtype=BF16),))
    assert run(p)[0].item() == 2**-6


@each_path
@pytest.mark.parametrize(
    "token_slots",
    [[-1] * 9, [3] * 9, [3] + [-1] * 8, [-1, 3, -1, 0, 0, 0, 3, -1, -1]],
    ids=["all -1", "last slot", "one token", "two of four"],
)
def test_who_is_in_the_batch(gpu, token_slots):
    p = with_slots(integers(9, 40, (24,), (16,)), token_slots)
    assert_exact(p)
    nobody = torch.tensor(token_slots) < 0
    assert torch.equal(run(p)[0][nobody], p.ys[0][nobody])


@each_path
def test_true_ranks_from_0_to_all(gpu):
    """Mixed 0 ... 128 in one bank; a rank that the bank does not have, or a negative one, is not believed."""
    p = integers(12, 48, (40,), (128,), slots=6)
    p = replace(p, lora_as=(p.lora_as[0].nan_to_num(),), lora_bs=(p.lora_bs[0].nan_to_num(),))
    ranks = torch.tensor([0, 1, 16, 65, 128, 8], dtype=torch.int32)
    assert_exact(replace(p, ranks=ranks))
    assert_exact(replace(p, ranks=None))
    claimed = torch.tensor([-5, 1, 16, 65, 4096, 8], dtype=torch.int32)
    assert torch.equal(run(p, ranks=claimed)[0], run(p, ranks=ranks)[0])


@each_path
def test_a_bank_full_to_its_ranks(gpu):
    """All true ranks are R: B comes in one piece, or row by row where R is no multiple of 16."""
    for rank, n in ((16, 200), (24, 200), (128, 1100)):  # the last: three pieces through two stages
        p = integers(9, 64, (n,), (rank,), slots=2)
        full = {name: (getattr(p, name)[0].nan_to_num(),) for name in ("lora_as", "lora_bs")}
        assert_exact(replace(p, ranks=None, **full))


@each_path
@pytest.mark.parametrize("tile", [16, 64])
def test_tiles_of_any_size(gpu, tile):
    assert_exact(integers(70, 40, (24,), (8,), slots=2), tile)


@each_path
def test_a_token_does_not_depend_on_the_batch(gpu):
    """Row i alone is row i in any batch, bit for bit, NaN and infinity in other rows included."""
    p = MultiLoraProblem.make(40, 300, (45, 30), (12, 17), 3, BF16)

    def rows(index, x=p.x):
        part = {"x": x[index], "token_slots": p.token_slots[index], "ys": tuple(y[index] for y in p.ys)}
        return run(p, **part)

    whole = rows(slice(None))
    for i in (0, 17, 39):
        assert all(torch.equal(alone[0], all_rows[i]) for alone, all_rows in zip(rows([i]), whole, strict=True))
    some = [39, 3, 17, 8]
    assert all(torch.equal(few, all_rows[some]) for few, all_rows in zip(rows(some), whole, strict=True))
    dirty = p.x.clone()
    dirty[:17], dirty[18:] = torch.nan, torch.inf
    found = rows(slice(None), dirty)
    assert all(torch.equal(y[17], all_rows[17]) for y, all_rows in zip(found, whole, strict=True))


@each_dtype
def test_both_paths_and_every_order_of_events_give_the_same_bits(gpu, monkeypatch, dtype):
    p = MultiLoraProblem.make(21, 700, (150, 33), (64, 16), 2, dtype)
    wanted = run(p)
    for seed, capability in ((2, CLUSTER), (3, CLUSTER), (1, PLANES), (2, PLANES)):
        gpu.seed = seed
        monkeypatch.setattr(cuda, "_capability", lambda x, capability=capability: capability)
        assert all(map(torch.equal, run(p), wanted))
    assert [path for _, path, _ in gpu.calls] == [0, 0, 0, 1, 1]


@each_path
@pytest.mark.parametrize("k", [64, 61])
def test_nothing_is_read_or_written_outside(gpu, k):
    """Operands are views in the middle of NaN, y in the middle of NaN that must stay."""
    p = integers(20, k, (50, 31), (16, 12))
    wanted = forward(p)
    inputs = [guarded(t) for t in (p.x, *p.lora_as, *p.lora_bs)]
    x, *weights = (view for view, _ in inputs)
    before = [t.clone() for t in (x, *weights)]
    ys, checks = zip(*(guarded(y) for y in p.ys), strict=True)
    routing = route(p.token_slots, 4, 16)
    cuda.add_(ys, x, weights[:2], weights[2:], routing, Slots(p.scales, p.ranks))
    for check in (*checks, *(check for _, check in inputs)):
        check()
    assert all(torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in zip(before, (x, *weights), strict=True))
    assert all(torch.equal(y, exact.to(BF16)) for y, exact in zip(ys, wanted, strict=True))


def before_a_wall(t):
    """A copy whose last element is the last of its page; the next page cannot be read."""
    page, size = mmap.PAGESIZE, t.numel() * t.element_size()
    room = -(-size // page) * page
    memory = mmap.mmap(-1, room + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + room), ctypes.c_size_t(page), 0) == 0
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=room - size).view(t.shape).copy_(t)


@each_path
@pytest.mark.parametrize(("k", "rank"), [(64, 8), (64, 12), (61, 12)])
def test_nothing_is_read_past_the_last_row_and_rank(gpu, k, rank):
    """In a child process: a read past the end of x, A or B would end it."""
    p = integers(5, k, (40,), (rank,), slots=1)
    full = {name: (before_a_wall(getattr(p, name)[0].nan_to_num()),) for name in ("lora_as", "lora_bs")}
    p = replace(with_slots(p, [0, 0, -1, 0, 0]), x=before_a_wall(p.x), ranks=None, **full)
    child = os.fork()
    if not child:
        code = 1
        try:
            assert_exact(p)
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@each_path
def test_an_infinite_s_is_no_nan(gpu):
    p = integers(3, 16, (8,), (4,), slots=1)
    x = p.x.clone()
    x[1] = 0
    x[1, 0] = torch.inf
    ones = {"lora_as": (torch.ones_like(p.lora_as[0]),), "lora_bs": (torch.ones_like(p.lora_bs[0]),)}
    p = replace(with_slots(p, [0, 0, 0]), x=x, scales=torch.ones(1), **ones)
    found = run(p)[0]
    assert (found[1] == torch.inf).all()
    assert found[[0, 2]].isfinite().all()


def test_an_infinite_scale_stays_with_its_slot(gpu):
    """Between a true rank of 12 and the next multiple of 16, S is 0 whatever the scale."""
    p = with_slots(integers(6, 32, (24,), (12,), slots=2), [0, 1, 0, 1, -1, 1])
    ones = {name: (torch.ones_like(getattr(p, name)[0]),) for name in ("lora_as", "lora_bs")}
    p = replace(p, x=torch.ones_like(p.x), ranks=None, scales=torch.ones(2), **ones)
    found, wanted = run(p, scales=torch.tensor([torch.inf, 1.0]))[0], run(p)[0]
    assert torch.equal(found[[1, 3, 4, 5]], wanted[[1, 3, 4, 5]])
    assert (found[[0, 2]] == torch.inf).all()


# ---- programmatic dependent launch -----------------------------------------------------------------------------------


def test_what_the_kernel_ahead_writes_is_waited_for(gpu):
    """x, y and the scales arrive as late as the kernel ahead may write them."""
    p = integers(20, 64, (40,), (16,))
    wanted = run(p)[0]
    late = {"x": p.x, "ys": p.ys, "scales": p.scales}
    x, y, scales = (torch.full_like(t, torch.nan) for t in (p.x, p.ys[0], p.scales))
    gpu.ahead = [(x, late["x"]), (y, late["ys"][0]), (scales, late["scales"])]
    routing = route(p.token_slots, 4, 16)
    with cuda.reading_ahead():
        cuda.add_([y], x, p.lora_as, p.lora_bs, routing, Slots(scales, p.ranks))
    assert gpu.calls[-1][2] is True
    assert torch.equal(y, wanted)


def test_weights_are_read_ahead_and_that_is_the_hazard(gpu):
    """What ``reading_ahead`` demands: of a slot that the kernel ahead loads, at least some is read too early."""
    p = integers(4, 64, (512,), (16,), slots=1)
    p = replace(with_slots(p, [0] * 4), ranks=None, lora_as=(p.lora_as[0].nan_to_num(),))
    old, new = torch.ones(1, 512, 16, dtype=BF16), torch.zeros(1, 512, 16, dtype=BF16)
    gpu.ahead, found = [(b := old.clone(), new)], []
    for gpu.seed in range(1, 5):
        b.copy_(old)
        found.append(run(p, lora_bs=(b,))[0])
        assert torch.equal(b, new)
    wanted = p.ys[0]  # the new B is 0
    assert not all(torch.equal(y, wanted) for y in found)


@pytest.mark.parametrize("token_slots", [[-1] * 5, [0] * 5], ids=["nobody", "one slot"])
def test_every_grid_waits_for_the_kernel_ahead(gpu, token_slots):
    """Also one without work: the kernel after it waits for this grid only."""
    p = with_slots(integers(5, 32, (16,), (8,)), token_slots)
    flag = torch.zeros(1)
    gpu.ahead = [(flag, torch.ones(1))]
    run(p)
    assert flag.item() == 1


@hypothesis.settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(data=st.data())
def test_any_problem(gpu, data):
    tokens, slots, count = (data.draw(st.integers(*range_)) for range_ in ((1, 40), (1, 4), (1, 3)))
    outs = data.draw(st.lists(st.integers(1, 300), min_size=count, max_size=count))
    ranks = data.draw(st.lists(st.integers(1, 70), min_size=count, max_size=count))
    p = integers(tokens, data.draw(st.integers(1, 400)), tuple(outs), tuple(ranks), FP16, slots)
    mapping = data.draw(st.lists(st.integers(-1, slots - 1), min_size=tokens, max_size=tokens))
    gpu.seed = data.draw(st.integers(1, 99))
    assert_exact(with_slots(p, mapping))


@pytest.mark.slow
def test_races(tmp_path):
    """Both paths once under ThreadSanitizer."""
    program = build.build(build.HERE / "race_multi_lora.cpp", tmp_path / "race", "-g1", "-O1", "-fsanitize=thread")
    done = build.run(program)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
