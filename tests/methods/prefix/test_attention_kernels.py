"""The kernels behind attention to a prefix: which one serves a call, and that it is given and read as it demands.

Where there is no GPU, stand-ins take the place of PyTorch's kernels for CUDA devices. With a GPU the same tests call
the kernels themselves.
"""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastpeft.nn import prefix_attention_kernels as kernels
from fastpeft.nn.prefix_attention import _PrefixAttention, prefix_attention
from fastpeft.testing import assert_no_worse
from tests.support import attention_kernels
from tests.support.attention_kernels import INF
from tests.support.backends import BF16, DEVICE, FP16, FP32, FP64
from tests.support.prefix_attention import ALL, APART, MASKS, SOME, exactly, in_front, operands, solve


@pytest.fixture
def served(monkeypatch):
    """Names of the kernels that served, in order; stand-ins where there is no GPU."""
    names = []
    if DEVICE.type != "cuda":
        monkeypatch.setattr(kernels, "_no_gpu", lambda device: None)
        for name in ("flash", "flash_backward", "efficient", "efficient_backward"):
            monkeypatch.setattr(kernels, f"_{name.upper()}", getattr(attention_kernels, name))
    choose = kernels.choose

    def noted(*call):
        kernel = choose(*call)
        names.append(kernel.name)
        return kernel

    monkeypatch.setattr(kernels, "choose", noted)
    return names


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("who", [ALL, SOME, APART])
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_float32_equals_a_prefix_in_front(served, heads, who, mask):
    args = operands(FP32, heads, 6 if mask == "causal" else 7, who, mask)
    grad = torch.randn_like(args[0])
    exact = exactly(args, grad)
    for found, wanted in zip(solve(prefix_attention, args, grad), exact, strict=True):
        torch.testing.assert_close(found, wanted.float(), atol=2e-5, rtol=2e-5)
    assert set(served) == {"efficient"}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("who", "heads"), [(ALL, 1), (ALL, 4), (APART, 2)])
@pytest.mark.parametrize("dtype", [FP16, BF16])
def test_error_of_16_bits_against_float64(served, dtype, who, heads, mask, record_property):
    """Eager rounds scores and weights too. Fused attention to copies rounds once where two parts and their merged O are
    rounded: next to that the error is 1.35 times as large (rms), whatever the kernels do inside."""
    args = operands(dtype, heads, 48, who, mask, T=48, D=64)
    grad = torch.randn_like(args[0])
    exact = exactly(args, grad)
    eager, found = solve(in_front, args, grad), solve(prefix_attention, args, grad)
    own = "flash" if mask in ("none", "causal") else "efficient"
    assert served == 2 * [own, *["flash"] * len(args[3])]
    names = ("out", "dq", "dk", "dv", *len(args[3]) * ("dprefix k", "dprefix v"))
    for name, *three in zip(names, found, eager, exact, strict=True):
        ratios = assert_no_worse(*three, name)
        record_property("ratio", f"{ratios.max:5.2f} {ratios.rms:5.2f}  {name}")


@pytest.fixture(params=["GPU", "CPU flash", "scores"])
def way(request, monkeypatch):
    if request.param == "GPU":
        request.getfixturevalue("served")
    else:
        kept = kernels.KERNELS[-1:] if request.param == "scores" or DEVICE.type == "cuda" else kernels.KERNELS[-2:]
        monkeypatch.setattr(kernels, "KERNELS", kept)
    return request.param


@pytest.mark.parametrize("dtype", [FP32, FP16])
@pytest.mark.parametrize("keys", [4, 9, 40])
def test_causal_is_from_the_first_key_on(way, keys, dtype):
    """Query t sees keys up to t, also where there are more or fewer keys; flash attention would align the last."""
    args = (*operands(dtype, keys=keys)[:5], True, 0.3)
    grad = torch.randn_like(args[0])
    for found, wanted in zip(solve(prefix_attention, args, grad), solve(in_front, args, grad), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5 if dtype == FP32 else 1e-2, rtol=1e-2)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16])
@pytest.mark.parametrize("lowest", [False, True], ids=["-inf", "finfo.min"])
@pytest.mark.parametrize("who", [ALL, SOME])
def test_queries_that_see_nothing(way, who, lowest, dtype):
    """Of their own keys nothing reaches them; where they have no prefix either they are 0, and no NaN comes back."""
    q, k, v, prefixes, _, causal, scale = operands(dtype, who=who)
    sees = torch.ones(len(q), 1, q.shape[2], k.shape[2], dtype=torch.bool, device=DEVICE)
    sees[0, 0, 1] = sees[1, 0, 2:4] = False  # row 1 has no prefix where who is SOME
    low = torch.finfo(dtype).min if lowest else -INF
    mask = torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, low)
    grad = torch.randn_like(q)
    found = solve(prefix_attention, (q, k, v, prefixes, mask, causal, scale), grad)
    assert all(t.isfinite().all() for t in found)
    if who == SOME and not lowest:
        assert not any(t[1, :, 2:4].any() for t in found[:2])
    if who == SOME:
        # The rule for such queries without a prefix is each kernel's own: look at the others.
        grad = grad.clone()
        grad[1, :, 2:4] = 0
        mask = mask.clone()
        mask[1, 0, 2:4] = 0
        found = solve(prefix_attention, (q, k, v, prefixes, mask, causal, scale), grad)
    wanted = solve(in_front, (q, k, v, prefixes, mask, causal, scale), grad)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 if dtype == FP32 else 4e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_any_strides_and_offsets(served, mask, dtype):
    """Of inputs, mask and gradient; none is modified."""
    q, k, v, prefixes, seen, *rest = operands(dtype, mask=mask, keys=16)  # of 16 keys a mask need not be padded

    def odd(x):
        apart = x.new_empty(*x.shape[:-1], x.shape[-1] + 5)[..., 3:-2]
        return apart.copy_(x.detach())

    turned = v.detach().mT.contiguous().mT
    inputs = [odd(q), odd(k), turned]
    pairs = [(odd(key), value.detach().mT.contiguous().mT, which) for key, value, which in prefixes]
    leaves = [*inputs, *(t for pair in pairs for t in pair[:2])]
    grad = torch.randn((), device=DEVICE, dtype=dtype).expand(q.shape)
    before = [t.clone() for t in leaves]
    for leaf in leaves:
        leaf.requires_grad_()
    found = solve(prefix_attention, (*inputs, pairs, None if seen is None else odd(seen), *rest), grad)
    for one, other in zip(found, solve(in_front, (q, k, v, prefixes, seen, *rest), grad), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 if dtype == FP32 else 4e-2, rtol=2e-2)
    assert all(torch.equal(a, b) for a, b in zip(before, leaves, strict=True))


@pytest.mark.parametrize("shape", [(3, 1, 1, 7), (1, 1, 6, 7), (1, 4, 6, 1), (3, 1, 6, 7)])
def test_masks_are_broadcast(served, shape):
    args = operands(FP32)
    sees = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.4
    whole = sees.to(DEVICE).expand(3, 4, 6, 7)
    found = prefix_attention(*args[:4], sees.to(DEVICE), *args[5:])
    for h in range(4):  # the definition has one mask for all heads
        wanted = in_front(*args[:4], whole[:, h : h + 1], *args[5:])
        torch.testing.assert_close(found[:, h], wanted[:, h], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("sizes", [(0, 6, 7), (3, 0, 7), (3, 6, 0)], ids=["rows", "queries", "keys"])
def test_none_of(way, sizes):
    rows, queries, keys = sizes
    q, k, v, prefixes, *rest = operands(FP32)
    q, k, v = (t.detach()[:rows, :, :n].requires_grad_() for t, n in ((q, queries), (k, keys), (v, keys)))
    grad = torch.randn_like(q)
    found = solve(prefix_attention, (q, k, v, prefixes, *rest), grad)
    if rows:
        for one, other in zip(found, solve(in_front, (q, k, v, prefixes, *rest), grad), strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-5)
    else:
        assert [t.shape for t in found] == [t.shape for t in (q, q, k, v, *prefixes[0][:2])]
        assert not any(t.any() for t in found)


CALLS = {  # what differs from 16 bits, causal, 6 queries and keys, heads of 64 on sm_80: the kernel
    "as it is": ({}, "flash"),
    "sm_90": ({"capability": (9, 0)}, "flash"),
    "sm_75": ({"capability": (7, 5)}, "explicit scores"),
    "float32": ({"dtype": FP32}, "efficient"),
    "float64": ({"dtype": FP64}, "explicit scores"),
    "more keys": ({"keys": 7}, "efficient"),
    "more keys, not causal": ({"keys": 7, "causal": False}, "flash"),
    "head size 256": ({"d": 256}, "flash"),
    "head size 192": ({"d": 192}, "flash"),
    "head size 208, which some devices have no backward of": ({"d": 208}, "efficient"),
    "head size 264": ({"d": 264}, "efficient"),
    "head size 4": ({"d": 4}, "explicit scores"),
    "head size 4, float32": ({"d": 4, "dtype": FP32}, "efficient"),
    "other head size of values": ({"dv": 32}, "explicit scores"),
    "other dtype of values": ({"dtype_v": FP32}, "explicit scores"),
    "a mask": ({"mask": torch.bool, "causal": False}, "efficient"),
    "a mask of that dtype": ({"mask": BF16, "causal": False}, "efficient"),
    "a wider mask": ({"mask": FP32, "causal": False}, "explicit scores"),
    "no keys": ({"keys": 0, "causal": False}, "explicit scores"),
    "a CPU": ({"device": "cpu"}, "CPU flash"),
}


@pytest.mark.parametrize("name", CALLS)
def test_choice(name, monkeypatch):
    call = {"dtype": BF16, "d": 64, "keys": 6, "causal": True, "mask": None, "capability": (8, 0), "device": "cuda"}
    call.update(CALLS[name][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: call["capability"])
    with FakeTensorMode():
        made = {"device": call["device"], "dtype": call["dtype"]}
        q = torch.empty(2, 4, 6, call["d"], **made)
        k = torch.empty(2, 2, call["keys"], call["d"], **made)
        v = torch.empty(2, 2, call["keys"], call.get("dv", call["d"]), device=call["device"])
        v = v.to(call.get("dtype_v", call["dtype"]))
        mask = None if call["mask"] is None else torch.empty(2, 1, 6, call["keys"], device="cuda", dtype=call["mask"])
        kernel = kernels.choose(q, k, v, mask, call["causal"])
    assert kernel.name == CALLS[name][1]
    for before in kernels.KERNELS[: kernels.KERNELS.index(kernel)]:
        assert isinstance(before.reason(q, k, v, mask, call["causal"]), str)


def dispatched(monkeypatch):
    """Two methods as operators: before it dispatches, a CPU build's Python wants a guard for the CUDA device."""
    aten = torch.ops.aten

    def contiguous(x):
        return x if x.is_contiguous() else aten.clone(x, memory_format=torch.contiguous_format)

    monkeypatch.setattr(torch.Tensor, "contiguous", contiguous)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, dtype: x if x.dtype == dtype else aten._to_copy(x, dtype=dtype))


class Called(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "attention" in str(function):
            self.names.append(str(function).removeprefix("aten._scaled_dot_product_").removesuffix(".default"))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("who", [ALL, SOME])
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "added"])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32])
def test_the_calls_fit_the_operators(dtype, mask, who, monkeypatch):
    """On fake CUDA tensors: PyTorch checks every argument, and says which shapes and dtypes come back."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    dispatched(monkeypatch)
    ctx = SimpleNamespace()
    ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
    b, h, heads, t, s, d, p = 3, 4, 2, 37, 37 if mask == "causal" else 41, 64, 5
    with FakeTensorMode(), Called() as called:
        made = {"device": "cuda", "dtype": dtype}
        q, k, v = (torch.empty(b, n, x, d, **made) for n, x in ((h, t), (heads, s), (heads, s)))
        key, value = (torch.empty(heads, p, d, **made) for _ in range(2))
        rows = None if who == ALL else torch.empty(2, dtype=torch.int64, device="cuda")
        mask_ = {"bool": torch.bool, "added": dtype}.get(mask)
        mask_ = None if mask_ is None else torch.empty(b, 1, t, s, device="cuda", dtype=mask_)
        # Autograd itself wants a CUDA build for tensors of CUDA devices.
        out = _PrefixAttention.forward(ctx, q, k, v, mask_, mask == "causal", 0.3, [rows], key, value)
        with torch.no_grad():  # as where no gradient of a gradient is asked for
            grads = _PrefixAttention.backward(ctx, torch.empty_like(out))
    own = "flash" if dtype != FP32 and mask in ("none", "causal") else "efficient"
    prefix = "flash" if dtype != FP32 else "efficient"
    assert called.names == [f"{n}_attention{way}" for way in ("", "_backward") for n in (own, prefix)]
    for found, like in zip((out, *grads[:3], *grads[7:]), (q, q, k, v, key, value), strict=True):
        assert (found.shape, found.dtype, found.device) == (like.shape, dtype, like.device)


@pytest.mark.gpu
def test_what_the_efficient_kernel_leaves():
    """What its stand-in takes for granted, and kernels._efficient corrects."""
    q, k, v = (torch.randn(2, 4, 37, 64, device=DEVICE) for _ in range(3))
    sees = torch.ones(2, 1, 37, 37, dtype=torch.bool, device=DEVICE)
    sees[1, 0, 3] = False
    bias = kernels._bias(sees, q, k)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, False, scale=0.1)
    assert lse.shape == (2, 4, 64)
    assert lse[..., 37:].eq(INF).all()
    assert not lse[1, :, 3].any()
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["causal", "bool"])
@pytest.mark.parametrize("d", [64, 80, 128, 256])
def test_long_rows_on_a_gpu(d, mask):
    args = operands(BF16, 2, 1000, ALL, mask, T=1000, D=d)
    grad = torch.randn_like(args[0])
    exact = exactly(args, grad)
    for three in zip(solve(prefix_attention, args, grad), solve(in_front, args, grad), exact, strict=True):
        assert_no_worse(*three)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_the_same_bits_where_they_are_asked_for(dtype):
    args = operands(dtype, 2, 1000, ALL, "causal", T=1000, D=64)
    grad = torch.randn_like(args[0])
    torch.use_deterministic_algorithms(True)
    try:
        first = solve(prefix_attention, args, grad)
        for _ in range(20):
            assert all(torch.equal(a, b) for a, b in zip(first, solve(prefix_attention, args, grad), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
