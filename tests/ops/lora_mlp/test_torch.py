"""lora_mlp among PyTorch's machinery: opcheck, torch.compile, autocast, inference mode, bad calls, explain."""

import pytest
import torch
import torch._dynamo.testing

import fastpeft
from fastpeft import _backend, ops
from fastpeft.testing import MlpProblem
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, FP64, served

each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _chunks(monkeypatch):
    for backend in BACKENDS:
        monkeypatch.setattr(_backend.load("lora_mlp", backend), "chunk_rows", lambda *_: 8)


def make(dtype=FP32, adapter=None, rows=19):
    return MlpProblem.make((rows, 12), 10, 6, (3, 2, 4), dtype, adapter, DEVICE, 0.25)


@each_backend
@pytest.mark.parametrize("trained", ["x lora_as lora_bs", "lora_bs", "x weights lora_as lora_bs biases"])
def test_opcheck(backend, trained):
    p = make()
    names, flags = ("x", "weights", "lora_as", "lora_bs", "biases"), trained.split()
    x, *lists = [
        [t.clone().requires_grad_(name in flags) for t in ([p.x] if name == "x" else getattr(p, name))]
        for name in names
    ]
    settings = list(p.scales), list(p.dropouts), torch.tensor(p.seeds, device=DEVICE)
    lists.insert(1, [])
    torch.library.opcheck(torch.ops.fastpeft.lora_mlp.default, (*x, *lists, *settings, [], "gelu", backend))
    with torch.no_grad():
        _, kept = torch.ops.fastpeft.lora_mlp(*x, *lists, *settings, [], "gelu", backend)
    wanted = "test_schema", "test_autograd_registration", "test_faketensor"  # the stand-in has no values to compare
    promise = torch.ops.fastpeft.lora_mlp_promise.default
    torch.library.opcheck(promise, (*x, *lists, *settings, [], "gelu", backend), test_utils=wanted)
    lists = [[t.detach() for t in ts] for ts in lists]
    needs = [name in flags for name in names]
    s, s_down, gate, up = kept
    args = (p.dy, p.x, s, s_down, gate, up, *lists, *settings, needs, [], "gelu", backend)
    torch.library.opcheck(torch.ops.fastpeft.lora_mlp_backward.default, args)


@each_backend
def test_compiled_gradients_are_the_eager_ones(backend):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x, weights, *flat):
        options = {"dropouts": [0.25] * 3, "seeds": [1, 2, 3], "backend": backend}
        return ops.lora_mlp(x.sin(), weights, flat[:3], flat[3:], **options).tanh().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    compilations = set()
    for rows in (9, 17, 40):
        p, found = make(rows=rows), []
        for call in (function, compiled):
            leaves = [t.clone().requires_grad_() for t in (p.x, *p.lora_as, *p.lora_bs)]
            call(leaves[0], p.weights, *leaves[1:]).backward()
            found.append([t.grad for t in leaves])
        assert all(map(torch.equal, *found))
        compilations.add(graphs.frame_count)
    assert len(compilations) == 1, "another number of rows was compiled anew"


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (BF16, FP32), (FP16, FP32)))
@pytest.mark.parametrize("to", [BF16, FP16], ids=str)
def test_autocast_is_the_same_as_casting_by_hand(backend, dtype, adapter, to):
    """x, weights and biases take autocast's dtype; float32 adapters stay float32."""
    if backend == "triton" and to == BF16 and DEVICE.type == "cpu":
        to = FP16  # the interpreter has no bfloat16
    p = make(dtype, adapter)
    groups = [[p.x], p.weights, p.lora_as, p.lora_bs, p.biases]
    kept = [to, to, FP32, FP32, to]
    results = []
    for cast in (False, True):
        leaves = [
            [t.to(own if cast else t.dtype).detach().requires_grad_(i in (0, 2, 3)) for t in group]
            for i, (group, own) in enumerate(zip(groups, kept, strict=True))
        ]
        (x,), *lists = leaves
        with torch.autocast(DEVICE.type, dtype=to, enabled=not cast):
            y = ops.lora_mlp(x, *lists, p.scales, p.dropouts, p.seeds, backend=backend)
        assert y.dtype == to
        results.append([y.detach(), *torch.autograd.grad(y.sum(), [x, *lists[1], *lists[2]])])
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(*results, strict=True))


@each_backend
def test_inference_mode(backend):
    p = make()
    lists = p.weights, p.lora_as, p.lora_bs, p.biases, p.scales, p.dropouts, p.seeds
    with torch.inference_mode():
        y = ops.lora_mlp(p.x, *lists, backend=backend)
    x = p.x.clone().requires_grad_()
    z = ops.lora_mlp(x, *lists, backend=backend)
    assert torch.equal(y, z)
    z.sum().backward()  # what inference left behind (the seeds' offsets) serves training too


def t(*shape, dtype=FP32):
    return torch.ones(shape, dtype=dtype, device=DEVICE)


CASES = {
    # argument: (value, error, what the message says)
    "two weights": ("weights", [t(4, 6), t(4, 6)], ValueError, "weights has 2 items, expected 3"),
    "four adapters": ("lora_as", [t(2, 6)] * 4, ValueError, "lora_as has 4 items, expected 3"),
    "gate's K": ("weights", [t(4, 5), t(4, 6), t(3, 4)], ValueError, r"weights\[0\] has K=5, expected K=6"),
    "up's I": ("weights", [t(4, 6), t(5, 6), t(3, 4)], ValueError, r"weights\[1\] has I=5, expected I=4"),
    "down's I": ("weights", [t(4, 6), t(4, 6), t(3, 5)], ValueError, r"weights\[2\] has I=5, expected I=4"),
    "A's K": ("lora_as", [t(2, 6), t(2, 6), t(2, 6)], ValueError, r"lora_as\[2\] has I=6, expected I=4"),
    "B's rank": ("lora_bs", [t(4, 2), t(4, 3), t(3, 2)], ValueError, r"lora_bs\[1\] has r=3, expected r=2"),
    "no rank": ("lora_as", [t(2, 6), t(0, 6), t(2, 4)], ValueError, r"lora_bs\[1\] has r=2, expected r=0"),
    "bias": ("biases", [t(4), None, t(4)], ValueError, r"biases\[2\] has N=4, expected N=3"),
    "weight's dtype": (
        "weights", [t(4, 6), t(4, 6, dtype=FP64), t(3, 4)], TypeError, r"weights\[1\] has dtype torch.float64",
    ),
    "adapters differ": (
        "lora_as", [t(2, 6), t(2, 6, dtype=FP64), t(2, 4)], TypeError, r"lora_as\[1\] has dtype torch.float64",
    ),
    "activation": ("activation", "relu", ValueError, "activation is 'relu', expected one of silu, gelu, gelu_tanh"),
    "scale": ("scales", [1.0, float("nan"), 1.0], ValueError, r"scales\[1\] is nan, expected a finite number"),
    "dropout": ("dropouts", [0.0, 0.0, 1.0], ValueError, r"dropouts\[2\] is 1.0, expected a number in \[0, 1\)"),
    "cuda": ("backend", "cuda", ValueError, "backend='cuda' cannot serve this call: "),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_calls_name_what_is_wrong(case):
    name, value, error, said = CASES[case]
    good = {
        "x": t(5, 6), "weights": [t(4, 6), t(4, 6), t(3, 4)], "lora_as": [t(2, 6), t(2, 6), t(2, 4)],
        "lora_bs": [t(4, 2), t(4, 2), t(3, 2)],
    }  # fmt: skip
    ops.lora_mlp(**good)
    with pytest.raises(error, match=f"lora_mlp: {said}"):
        ops.lora_mlp(**(good | {name: value}))


def test_explain():
    p = make()
    found = fastpeft.explain("lora_mlp", p.x, p.weights, p.lora_as, p.lora_bs)
    assert found.backend in BACKENDS
    assert "cuda" in found.reasons
    kernels = pytest.importorskip("fastpeft.kernels.lora_mlp", reason="Triton is not installed")
    assert "rows at a time" in kernels.describe(p.x, p.lora_as, p.weights)[0]
