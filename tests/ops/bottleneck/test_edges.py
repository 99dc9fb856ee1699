"""bottleneck at its edges: widths, rows, slots, dropout, mixed dtypes; what a row's bits depend on; autocast."""

from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastpeft import ops, reference
from fastpeft.ops.routing import TILES
from fastpeft.testing import BottleneckProblem
from tests.support import interpreter
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, served
from tests.support.exactness import assert_exact

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_tile = pytest.mark.parametrize("tile", TILES)


def integers(shape=(19, 24), hidden=9, **options):
    return BottleneckProblem.make(shape, hidden, dtype=FP32, device=DEVICE, integers=True, **options)


def with_slots(problem, slots):
    return replace(problem, slots=torch.tensor(slots, dtype=torch.int32, device=DEVICE))


def call(p, backend, **changes):
    operands = {"x": p.x, "residual": p.residual, "slots": p.slots} | p.weights | p.settings | changes
    return ops.bottleneck(backend=backend, **operands)


@each_backend
@pytest.mark.parametrize("hidden", [1, 4, 8, 12, 16, 17, 64, 130, 256, 300])
def test_widths(backend, hidden):
    assert_exact(integers((17, 20), hidden, residual="x"), backend)


@pytest.mark.parametrize("hidden", [1, 17, 64, 130, 256])
def test_widths_in_one_kernel(hidden, monkeypatch):
    kernels = pytest.importorskip("fastpeft.kernels.bottleneck", reason="Triton is not installed")
    monkeypatch.setattr(kernels, "FUSED_BLOCKS", 0)
    p = integers((17, 20), hidden, residual="x").map(lambda t: t.half())
    assert_exact(p, "triton")


@each_backend
@pytest.mark.parametrize("m", [0, 1, 127])
def test_rows(backend, m):
    assert_exact(integers((m, 24), residual="x"), backend)
    assert_exact(with_slots(integers((m, 24), slots=3), [2] * m), backend)


@each_backend
def test_sums_cut_along_k(backend):
    """Few rows of many columns: z is summed from parts, with a bias and an activation after the last; dh likewise."""
    assert_exact(integers((5, 1100), 9, out=30), backend)
    assert_exact(integers((5, 30), 9, out=1100), backend)
    assert_exact(integers((5, 1100), 9, out=30, slots=2), backend, 16)


@each_backend
@pytest.mark.parametrize("shape", [(2, 3, 7, 24), (42, 24), (1, 42, 24)])
def test_leading_dimensions(backend, shape):
    p = integers(shape, residual="x", slots=3)
    assert_exact(p, backend)
    assert call(p, backend, residual=p.x).shape == shape


@each_backend
@each_tile
@pytest.mark.parametrize(
    "slots",
    [[-1] * 9, [3] * 9, [3] + [-1] * 8, [0] * 9, [-1, 3, -1, 0, 0, 0, 3, -1, -1], [0] * 5 + [2] * 3 + [3]],
    ids=["all -1", "last slot", "one row", "first slot", "two of four", "last slot with fewest"],
)
@pytest.mark.parametrize("residual", ["x", "other", None])
def test_who_is_in_the_batch(backend, tile, slots, residual):
    assert_exact(with_slots(integers((9, 24), slots=4, residual=residual), slots), backend, tile)


@each_backend
def test_300_slots_and_only_some_used(backend):
    assert_exact(with_slots(integers((20, 12), 4, slots=300), [299, 0, -1, 150, 299] * 4), backend)


@each_backend
@each_tile
def test_what_an_unused_slot_holds_does_not_leak(backend, tile):
    p = BottleneckProblem.make((20, 24), 9, slots=4, norm="layer", scale="channel", dropout=0.5, device=DEVICE)
    p = with_slots(p, [0, 2, -1, 2] * 5)
    weights = {name: t.clone() for name, t in p.weights.items()}
    for t in weights.values():
        t[1], t[3] = torch.nan, torch.inf
    clean, dirty = p.fused(backend, tile), replace(p, weights=weights).fused(backend, tile)
    for name, value in clean.items():
        used = [0, 2] if name[1:] in weights else slice(None)
        assert torch.equal(value[used], dirty[name][used]), name


@each_backend
@each_tile
def test_nan_of_one_adapter_harms_no_other(backend, tile):
    p = integers((40, 24), slots=3, residual="x", dropout=0.5)
    p = with_slots(p, [0] + [2, 1, 0, -1] * 9 + [1] * 3)
    mine = (p.slots == 0)[:, None]
    dirty = replace(p, x=p.x.masked_fill(mine, torch.nan), dy=p.dy.masked_fill(mine, torch.inf))
    clean, found = p.fused(backend, tile), dirty.fused(backend, tile)
    for name in clean:
        used = slice(1, None) if name[1:] in p.weights else ~mine[:, 0]
        assert torch.equal(clean[name][used], found[name][used]), name


@each_tile
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize(
    ("backend", "dtype", "wide"),
    [case for case in served((FP32, FP32), (FP16, FP16), (BF16, BF16)) if case.values[0] != "reference"],
)
def test_a_row_does_not_depend_on_the_batch(tile, norm, backend, dtype, wide):
    """Row i alone is row i in any batch, bit for bit, on one kernel path, NaN in other rows included.

    A promise of the kernels: the reference's sums are the library's, which picks them by the number of rows.
    """
    p = BottleneckProblem.make((70, 300), 20, 45, dtype, wide, DEVICE, slots=3, norm=norm)

    def rows(x, index):
        slots = ops.route(p.slots[index], 3, tile, backend)
        changes = {"residual": p.residual[index]}
        with interpreter.rows_apart():
            return ops.bottleneck(x[index], slots=slots, backend=backend, **p.weights, **p.settings, **changes)

    whole = rows(p.x, slice(None))
    for index in ([0], [35], [69, 3, 35, 8]):
        assert torch.equal(rows(p.x, index), whole[index])
    dirty = p.x.clone()
    dirty[:35], dirty[36:] = torch.nan, torch.inf
    assert torch.equal(rows(dirty, slice(None))[35], whole[35])


@each_backend
def test_the_mask_is_the_projects(backend):
    """Kept elements are those of ``keep_mask``, scaled by what was kept; the residual is never dropped."""
    x, zeros = torch.ones(6, 5, device=DEVICE), torch.zeros(2, 5, device=DEVICE)
    up, bias = torch.zeros(7, 2, device=DEVICE), torch.ones(7, device=DEVICE)
    y = ops.bottleneck(x, zeros, None, up, bias, dropout=0.25, seed=11, backend=backend)
    keep = reference.keep_mask(torch.tensor(11, device=DEVICE), 0.25, 6, 7, FP32)
    assert torch.equal(y, keep * reference.inverse_keep(0.25))
    residual = torch.full((6, 7), 3.0, device=DEVICE)
    y = ops.bottleneck(x, zeros, None, up, None, residual, dropout=0.25, seed=11, backend=backend)
    assert torch.equal(y, residual)


@each_backend
@pytest.mark.parametrize("slots", [None, 3])
def test_seeds_are_drawn_where_none_are_given(backend, slots):
    p = BottleneckProblem.make((40, 24), 9, device=DEVICE, dropout=0.5, slots=slots)

    def draw(seed):
        torch.manual_seed(seed)
        return call(p, backend, seed=None)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


@each_backend
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_dropout_draws_the_same_mask(backend, reentrant):
    p = BottleneckProblem.make((30, 24), 9, device=DEVICE, dropout=0.5, residual="x", norm="layer")
    found = []
    for recompute in (False, True):
        leaves = [t.clone().requires_grad_() for t in (p.x, *p.weights.values())]

        def run(x, *weights):
            named = dict(zip(p.weights, weights, strict=True))
            return call(p, backend, x=x, residual=x, seed=None, **named)

        torch.manual_seed(3)
        y = checkpoint(run, *leaves, use_reentrant=reentrant) if recompute else run(*leaves)
        y.backward(p.dy)
        found.append([y, *(t.grad for t in leaves)])
    assert all(map(torch.equal, *found))


@each_backend
@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize(
    "trained",
    ["x", "residual", "down_weight", "down_bias", "up_weight", "up_bias", "scale", "norm_weight", "x up_bias"],
)
def test_what_is_trained(backend, norm, trained):
    p = BottleneckProblem.make((19, 24), 5, device=DEVICE, dropout=0.5, scale="channel", norm=norm)
    leaves = {"x": p.x, "residual": p.residual} | p.weights
    if not set(trained.split()) & set(leaves):
        return
    wanted = p.fused(backend)
    leaves = {name: t.clone().requires_grad_(name in trained.split()) for name, t in leaves.items()}
    ops.bottleneck(backend=backend, **leaves, **p.settings).backward(p.dy)
    for name, t in leaves.items():
        assert (t.grad is not None) == (name in trained.split())
        assert t.grad is None or torch.equal(t.grad, wanted[f"d{name}"]), name


@pytest.mark.parametrize(("backend", "dtype", "wide"), served((FP32, FP32)))
@pytest.mark.parametrize("low", [BF16, FP16], ids=str)
def test_autocast_is_the_same_as_casting_by_hand(backend, dtype, wide, low):
    """The residual keeps float32, and with it y, as in eager."""
    p = BottleneckProblem.make((19, 24), 5, dtype=dtype, device=DEVICE, norm="layer")
    with torch.autocast(DEVICE.type, low):
        inside, own = call(p, backend), call(p, backend, residual=p.x)
    assert inside.dtype == own.dtype == FP32
    by_hand = {"x": p.x.to(low), "backend": backend} | p.weights | p.settings
    assert torch.equal(inside, ops.bottleneck(residual=p.residual, **by_hand))
    assert torch.equal(own, ops.bottleneck(residual=p.x, **by_hand))


@pytest.mark.parametrize(("backend", "dtype", "wide"), served((FP16, FP16), (BF16, BF16)))
def test_a_wide_residual(backend, dtype, wide):
    """16-bit x beside a float32 residual: y and the gradients keep their own dtypes."""
    p = BottleneckProblem.make((19, 24), 5, dtype=dtype, device=DEVICE)
    p = replace(p, residual=p.residual.float(), dy=p.dy.float())
    found, exact = p.fused(backend), p.exact()
    assert found["y"].dtype == found["dresidual"].dtype == FP32
    assert found["dx"].dtype == dtype
    assert torch.equal(found["dresidual"], p.dy)
    branch = replace(p, residual=None, dy=p.dy.to(dtype)).fused(backend)
    torch.testing.assert_close(
        found["y"], p.residual + branch["y"].float(), rtol=0, atol=exact["y"].abs().max() * 2**-7
    )
    assert torch.equal(found["dx"], branch["dx"])


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_problem(data):
    m, k, hidden = (data.draw(st.integers(low, high)) for low, high in ((0, 70), (1, 140), (1, 70)))
    residual = data.draw(st.sampled_from(["x", "other", None]))
    out = k if residual == "x" else data.draw(st.integers(1, 140))
    slots = data.draw(st.sampled_from([None, 1, 5]))
    options = {
        "residual": residual,
        "activation": data.draw(st.sampled_from(["relu", "identity"])),
        "scale": data.draw(st.sampled_from([-2.0, 1.0, "learned", "channel"])),
        "bias": data.draw(st.booleans()),
        "dropout": data.draw(st.sampled_from([0.0, 0.5])),
        "slots": slots,
    }
    problem = integers((m, k), hidden, out=out, **options)
    if slots is not None:
        problem = with_slots(problem, data.draw(st.lists(st.integers(-1, slots - 1), min_size=m, max_size=m)))
    assert_exact(problem, data.draw(st.sampled_from(BACKENDS)), data.draw(st.sampled_from(TILES)))
