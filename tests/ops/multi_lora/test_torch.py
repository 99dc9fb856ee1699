"""multi_lora among PyTorch's machinery: opcheck, torch.compile, bad calls, which backend serves."""

from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing

import fastpeft
from fastpeft.ops import multi_lora, multi_lora_, multi_lora_shared, route
from fastpeft.ops.multi_lora import MAX_RANK
from fastpeft.testing import MultiLoraProblem
from tests.support.backends import BACKENDS, DEVICE, FP16, FP32, FP64

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def tables_of(p, dropout, backend, tile=16):
    routing = route(p.token_slots, 3, tile, backend)
    thresholds = torch.tensor([0, 1 << 14, 0], dtype=torch.int32, device=DEVICE)
    absent = torch.empty(0, device=DEVICE)
    dropouts = (thresholds, p.seeds) if dropout else (absent, absent)
    return (*routing[:3], p.scales, p.ranks, *dropouts)


@each_backend
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("trained", ["x lora_as lora_bs ys", "lora_bs", "lora_as", "x"])
def test_opcheck(backend, dropout, trained):
    # Every token has an adapter of full rank: S, an output for autograd alone, is not written elsewhere.
    k = 300 if trained == "x lora_as lora_bs ys" else 30  # cut into several planes, and one
    p = MultiLoraProblem.make(9, k, (7, 5), (4, 3), 3, device=DEVICE)
    full = torch.tensor([[4] * 3, [3] * 3], dtype=torch.int32, device=DEVICE)
    p = replace(p, token_slots=p.token_slots.abs(), ranks=full)
    lists = [[t.nan_to_num() for t in group] for group in (p.lora_as, p.lora_bs, p.ys)]
    tables = tables_of(p, dropout, backend)
    needs = [name in trained for name in ("x", "lora_as", "lora_bs", "ys")]
    leaves = [
        [t.clone().requires_grad_(need) for t in group] for need, group in zip(needs, ([p.x], *lists), strict=True)
    ]
    torch.library.opcheck(torch.ops.fastpeft.multi_lora.default, (leaves[0][0], *leaves[1:], *tables, 16, backend))
    s = torch.randn(1, 9, 7, device=DEVICE)
    args = (list(p.dys), p.x, s, *lists[:2], *tables, needs, 16, backend)
    torch.library.opcheck(torch.ops.fastpeft.multi_lora_backward.default, args)
    inplace = ([t.clone() for t in p.ys], p.x, *lists[:2], *tables[:5], 16, backend)
    torch.library.opcheck(torch.ops.fastpeft.multi_lora_.default, inplace)


@each_backend
def test_compiled_gradients_are_the_eager_ones(backend):
    """One graph for every number of tokens of one path; routing is part of it."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x, lora_as, lora_bs, token_slots, scales, ranks, seeds):
        routing = route(token_slots, 3, 16, backend)
        args = routing, scales, ranks, None, backend
        ys = multi_lora_shared(x.sin(), lora_as, lora_bs, *args, dropouts=(0.25, 0.0, 0.5), seeds=seeds)
        return sum(y.tanh().sum() for y in ys)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    for tokens in (9, 17, 40):
        p = MultiLoraProblem.make(tokens, 12, (7, 5), (4, 3), 3, device=DEVICE)
        found = []
        for call in (function, compiled):
            lists = [[t.nan_to_num().requires_grad_() for t in group] for group in ((p.x,), p.lora_as, p.lora_bs)]
            call(lists[0][0], *lists[1:], p.token_slots, p.scales, p.ranks, p.seeds).backward()
            found.append([t.grad for group in lists for t in group])
        assert all(map(torch.equal, *found))
    assert graphs.frame_count == 1


@each_backend
def test_compiled_in_place(backend):
    torch._dynamo.reset()
    p = MultiLoraProblem.make(9, 12, (7,), (4,), 3, device=DEVICE)
    args = p.x, p.lora_as[0], p.lora_bs[0], p.token_slots, p.scales, p.ranks, backend

    def function(y, *rest):
        return multi_lora_(y * 2, *rest) + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(p.ys[0], *args), function(p.ys[0], *args))


def arguments(**changes):
    p = MultiLoraProblem.make(6, 8, (5,), (4,), 3, device=DEVICE)
    found = {
        "x": p.x, "lora_a": p.lora_as[0], "lora_b": p.lora_bs[0], "token_slots": p.token_slots, "scales": p.scales,
        "ranks": p.ranks, "y": p.ys[0],
    }  # fmt: skip
    return {**found, **changes}


def t(*shape, dtype=FP32):
    return torch.ones(shape, dtype=dtype, device=DEVICE)


INT32 = torch.int32
CASES = {
    # argument: (value, error, what the message says)
    "x is a list": ("x", [1.0], TypeError, r"x is a list of 1, expected a tensor \[..., K\]"),
    "x is a scalar": ("x", torch.tensor(1.0), TypeError, "x is a scalar, expected a tensor"),
    "x is of integers": ("x", t(6, 8, dtype=INT32), TypeError, "x has dtype torch.int32"),
    "lora_a's K": ("lora_a", t(3, 4, 9), ValueError, "lora_a has K=9, expected K=8"),
    "lora_a's dimensions": ("lora_a", t(4, 8), ValueError, r"lora_a has shape \[4, 8\], expected \[slots, R, K\]"),
    "lora_a's dtype": ("lora_a", t(3, 4, 8, dtype=FP16), TypeError, "lora_a has dtype torch.float16, expected"),
    "no rank": ("lora_a", t(3, 0, 8), ValueError, "lora_b has R=4, expected R=0"),
    "lora_b's slots": ("lora_b", t(4, 5, 4), ValueError, "lora_b has slots=4, expected slots=3"),
    "lora_b's rank": ("lora_b", t(3, 5, 6), ValueError, "lora_b has R=6, expected R=4"),
    "lora_b is None": ("lora_b", None, TypeError, "lora_b is None, expected a tensor"),
    "lora_b's dtype": ("lora_b", t(3, 5, 4, dtype=FP64), TypeError, "lora_b has dtype torch.float64, expected"),
    "a list of slots": ("token_slots", [0] * 6, ValueError, "token_slots is a list of 6, expected one slot for each"),
    "too few slots": ("token_slots", t(5, dtype=INT32), ValueError, r"token_slots is \[5\], expected one slot for"),
    "float slots": ("token_slots", t(6), TypeError, "token_slots is torch.float32, expected a tensor of torch.int32"),
    "scales is a number": ("scales", 2.0, TypeError, r"scales is 2.0 \(float\), expected torch.float32 on"),
    "scales' size": ("scales", t(4), ValueError, r"scales has shape \[4\], expected \[3\]"),
    "scales' dtype": ("scales", t(3, dtype=FP16), TypeError, "scales is torch.float16 on .*, expected torch.float32"),
    "ranks' dtype": ("ranks", t(3), TypeError, "ranks is torch.float32 on .*, expected torch.int32"),
    "ranks' size": ("ranks", t(2, 3, dtype=INT32), ValueError, r"ranks has shape \[2, 3\], expected \[3\]"),
    "y's N": ("y", t(6, 4), ValueError, "y has N=4, expected N=5"),
    "y's tokens": ("y", t(5, 5), ValueError, r"y is \[5, 5\], expected \[6, 5\]"),
    "y's dtype": ("y", t(6, 5, dtype=FP16), TypeError, "y has dtype torch.float16, expected torch.float32"),
    "dropouts' size": ("dropouts", [0.1], ValueError, "dropouts has 1 items, expected 3"),
    "dropout 1": ("dropouts", [0.1, 1.0, 0.0], ValueError, r"dropouts\[1\] is 1.0, expected a number in \[0, 1\)"),
    "no such backend": ("backend", "cutlass", ValueError, "backend is 'cutlass', expected one of cuda, triton, ref"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "message"), CASES.values(), ids=CASES)
def test_bad_calls(name, value, error, message):
    with pytest.raises(error, match=f"(multi_lora|route): {message}"):
        multi_lora(**arguments(**{name: value}))


def test_seeds_of_the_wrong_shape():
    with pytest.raises(ValueError, match=r"seeds is torch.int64 \[2\], expected torch.int64 \[3\]"):
        multi_lora(**arguments(), dropouts=[0.5] * 3, seeds=torch.arange(2, device=DEVICE))


def test_a_bad_call_in_place_writes_nothing():
    good = arguments()
    y = good.pop("y").clone()
    before = y.clone()
    for change in ({"lora_b": t(3, 5, 6)}, {"scales": t(4)}, {"token_slots": t(5, dtype=INT32)}):
        with pytest.raises(ValueError, match="multi_lora_: "):
            multi_lora_(y, **good | change)
    with pytest.raises(ValueError, match="an operand requires a gradient, expected none"):
        multi_lora_(y, **good | {"lora_a": good["lora_a"].clone().requires_grad_()})
    with pytest.raises(ValueError, match=r"expected \[T, N\] or a contiguous tensor"):
        multi_lora_(t(2, 5, 3).mT, **good | {"x": good["x"].view(2, 3, 8)})
    assert torch.equal(y, before)


def test_a_routing_of_another_batch():
    good = arguments()
    for wrong in (route(t(5, dtype=INT32), 3), route(t(6, dtype=INT32), 4)):
        with pytest.raises(ValueError, match="token_slots was routed for . rows, . slots on .*, expected 6 rows, 3"):
            multi_lora(**good | {"token_slots": wrong})


@pytest.mark.parametrize("count", [0, 5])
def test_up_to_4_slices(count):
    good = arguments()
    with pytest.raises(ValueError, match=f"multi_lora_shared: lora_as has {count} items, expected 1 ... 4"):
        multi_lora_shared(
            good["x"], [good["lora_a"]] * count, [good["lora_b"]] * count, good["token_slots"], good["scales"]
        )


def test_slices_that_do_not_match():
    good = arguments()
    with pytest.raises(ValueError, match="multi_lora_shared: lora_bs has 1 items, expected 2"):
        multi_lora_shared(good["x"], [good["lora_a"]] * 2, [good["lora_b"]], good["token_slots"], good["scales"])


def test_what_triton_cannot_serve():
    pytest.importorskip("triton", reason="Triton is not installed")
    wide = {"lora_a": t(3, MAX_RANK + 1, 8), "lora_b": t(3, 5, MAX_RANK + 1)}
    with pytest.raises(ValueError, match=f"backend='triton' cannot serve this call: rank {MAX_RANK + 1} > {MAX_RANK}"):
        multi_lora(**arguments(**wide), backend="triton")
    with pytest.raises(ValueError, match="multi_lora: backend='cuda' cannot serve this call: .*fastpeft._C"):
        multi_lora(**arguments(), backend="cuda")


def test_explain():
    good = arguments()
    said = fastpeft.explain("multi_lora", *(good[name] for name in ("x", "lora_a", "lora_b", "token_slots")))
    assert str(said).startswith("multi_lora: served by")
    assert "triton" in str(said)
