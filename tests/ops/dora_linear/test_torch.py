"""dora_linear among PyTorch's machinery: opcheck, torch.compile, autocast, inference mode, bad calls."""

import pytest
import torch
import torch._dynamo.testing

from fastpeft import ops
from fastpeft.testing import DoraProblem
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, FP64, served
from tests.support.quantised import four_bit

each_backend = pytest.mark.parametrize("backend", BACKENDS)
NAMES = ("x", "lora_a", "lora_b", "magnitude", "bias")


def make(dtype=FP32, adapter=None, rows=19, dropout=0.25):
    return DoraProblem.make((rows, 12), 10, 3, dtype, adapter, DEVICE, dropout)


@each_backend
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("trained", ["x lora_a lora_b magnitude", "lora_b", "magnitude bias"])
def test_opcheck(backend, trained, dropout):
    p = make(dropout=dropout)
    x, a, b, magnitude, bias = (getattr(p, name).clone().requires_grad_(name in trained.split()) for name in NAMES)
    absent, keeps = torch.empty(0, device=DEVICE), "magnitude" in trained
    seeds = torch.tensor([p.seed], device=DEVICE) if dropout else absent
    args = x, p.weight, [], a, b, magnitude, bias, absent, p.scale, dropout, seeds, [], keeps, backend
    torch.library.opcheck(torch.ops.fastpeft.dora_linear.default, args)
    with torch.no_grad():
        _, (s, u, gain, norm) = torch.ops.fastpeft.dora_linear(*args)
    a, b, magnitude = (t.detach() for t in (a, b, magnitude))
    needs = [name in trained.split() for name in NAMES]
    args = p.dy, p.x, s, u, gain, norm, p.weight, [], a, b, magnitude, p.scale, dropout, seeds, needs, [], backend
    torch.library.opcheck(torch.ops.fastpeft.dora_linear_backward.default, args)


@each_backend
def test_compiled_gradients_are_the_eager_ones(backend):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x, weight, *rest):
        return ops.dora_linear(x.sin(), weight, *rest, 0.5, 0.25, 7, backend=backend).tanh().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    compilations = set()
    for rows in (9, 17, 40):
        p, found = make(rows=rows), []
        for call in (function, compiled):
            leaves = [getattr(p, name).clone().requires_grad_() for name in NAMES]
            call(leaves[0], p.weight, *leaves[1:]).backward()
            found.append([t.grad for t in leaves])
        assert all(map(torch.equal, *found))
        compilations.add(graphs.frame_count)
    assert len(compilations) == 1, "another number of rows was compiled anew"


def test_compiled_around_a_quantised_weight():
    torch._dynamo.reset()
    p, base = DoraProblem.make((9, 64), 10, 3, dropout=0.25), four_bit(10, 64)

    def function(x, *rest):
        return ops.dora_linear(x, base, *rest, 0.5, 0.25, 7).square().sum()

    found = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [getattr(p, name).clone().requires_grad_() for name in NAMES]
        call(*leaves).backward()
        found.append([t.grad for t in leaves])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (BF16, FP32), (FP16, FP32)))
@pytest.mark.parametrize("to", [BF16, FP16], ids=str)
def test_autocast_is_the_same_as_casting_by_hand(backend, dtype, adapter, to):
    """x, weight and bias take autocast's dtype; float32 adapters and magnitudes stay float32."""
    if backend == "triton" and to == BF16 and DEVICE.type == "cpu":
        to = FP16  # the interpreter has no bfloat16
    p = make(dtype, adapter)
    kept = {"x": to, "weight": to, "bias": to}
    results = []
    for cast in (False, True):
        tensors = [getattr(p, name).detach() for name in ("x", "weight", *NAMES[1:])]
        if cast:
            names = ("x", "weight", *NAMES[1:])
            tensors = [t.to(kept.get(name, FP32)) for name, t in zip(names, tensors, strict=True)]
        leaves = [t.requires_grad_(i != 1) for i, t in enumerate(tensors)]
        with torch.autocast(DEVICE.type, dtype=to, enabled=not cast):
            y = ops.dora_linear(*leaves, p.scale, p.dropout, p.seed, backend=backend)
        assert y.dtype == to
        asked = [t for i, t in enumerate(leaves) if i != 1]
        results.append([y.detach(), *torch.autograd.grad(y.sum(), asked)])
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(*results, strict=True))


@each_backend
def test_inference_mode(backend):
    p = make()
    operands = p.weight, p.lora_a, p.lora_b, p.magnitude, p.bias, p.scale, p.dropout, p.seed
    with torch.inference_mode():
        y = ops.dora_linear(p.x, *operands, backend=backend)
    x = p.x.clone().requires_grad_()
    z = ops.dora_linear(x, *operands, backend=backend)
    assert torch.equal(y, z)
    z.sum().backward()


def t(*shape, dtype=FP32):
    return torch.ones(shape, dtype=dtype, device=DEVICE)


CASES = {
    # argument: (value, error, what the message says)
    "weight's K": ("weight", t(4, 5), ValueError, "weight has K=5, expected K=6"),
    "A's K": ("lora_a", t(2, 5), ValueError, "lora_a has K=5, expected K=6"),
    "B's rank": ("lora_b", t(4, 3), ValueError, "lora_b has r=3, expected r=2"),
    "B's N": ("lora_b", t(3, 2), ValueError, "lora_b has N=3, expected N=4"),
    "magnitude's N": ("magnitude", t(3), ValueError, "magnitude has N=3, expected N=4"),
    "magnitude's dtype": ("magnitude", t(4, dtype=FP64), TypeError, "magnitude has dtype torch.float64"),
    "norm's N": ("norm", t(3), ValueError, "norm has N=3, expected N=4"),
    "norm's dtype": ("norm", t(4, dtype=FP16), TypeError, "norm has dtype torch.float16, expected torch.float32"),
    "bias": ("bias", t(3), ValueError, "bias has N=3, expected N=4"),
    "scale": ("scale", float("nan"), ValueError, "scale is nan, expected a finite number"),
    "dropout": ("dropout", 1.0, ValueError, r"dropout is 1.0, expected a number in \[0, 1\)"),
    "cuda": ("backend", "cuda", ValueError, "backend='cuda' cannot serve this call: "),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_calls_name_what_is_wrong(case):
    name, value, error, said = CASES[case]
    good = {"x": t(5, 6), "weight": t(4, 6), "lora_a": t(2, 6), "lora_b": t(4, 2), "magnitude": t(4)}
    ops.dora_linear(**good)
    with pytest.raises(error, match=f"dora_linear: {said}"):
        ops.dora_linear(**(good | {name: value}))
