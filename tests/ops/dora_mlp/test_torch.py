"""dora_mlp among PyTorch's machinery: opcheck, torch.compile, autocast, inference mode, second gradients, bad calls."""

import pytest
import torch
import torch._dynamo.testing

from fastpeft import ops
from fastpeft.testing import DoraMlpProblem
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, FP64, served

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dropout = pytest.mark.parametrize("dropout", [0.0, 0.25])
TRAINED = ("lora_as", "lora_bs", "magnitudes", "biases")


@pytest.fixture(autouse=True)
def _chunks(cut):
    cut(8)


def make(dtype=FP32, adapter=None, rows=19, dropout=0.25):
    return DoraMlpProblem.make((rows, 12), 10, 6, (3, 2, 4), dtype, adapter, DEVICE, dropout)


@each_backend
@each_dropout
@pytest.mark.parametrize("trained", ["x lora_as lora_bs magnitudes", "lora_bs", "x magnitudes biases"])
def test_opcheck(backend, trained, dropout):
    p, flags = make(dropout=dropout), trained.split()
    x = p.x.clone().requires_grad_("x" in flags)
    lists = [[t.clone().requires_grad_(name in flags) for t in getattr(p, name)] for name in TRAINED]
    seeds = torch.tensor(p.seeds, device=DEVICE) if dropout else torch.empty(0, device=DEVICE)
    settings, absent = (list(p.scales), list(p.dropouts), seeds), [torch.empty(0, device=DEVICE) for _ in range(3)]
    keeps = ["magnitudes" in flags] * 3
    args = x, list(p.weights), [], *lists, absent, *settings, [], keeps, "gelu", backend
    torch.library.opcheck(torch.ops.fastpeft.dora_mlp.default, args)
    with torch.no_grad():
        _, (s, s_down, *kept) = torch.ops.fastpeft.dora_mlp(*args)
    lists = [[t.detach() for t in ts] for ts in (p.weights, [], *lists)]
    needs = [name in flags for name in ("x", *TRAINED)]
    args = p.dy, p.x, s, s_down, kept, *lists, *settings, needs, [], "gelu", backend
    torch.library.opcheck(torch.ops.fastpeft.dora_mlp_backward.default, args)


@each_backend
@each_dropout
def test_compiled_gradients_are_the_eager_ones(backend, dropout):
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x, weights, *flat):
        lists = [flat[i : i + 3] for i in range(0, 12, 3)]
        options = {"dropouts": [dropout] * 3, "seeds": [1, 2, 3], "backend": backend}
        return ops.dora_mlp(x.sin(), weights, *lists, **options).tanh().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    compilations = set()
    for rows in (9, 17, 40):
        p, found = make(rows=rows), []
        for call in (function, compiled):
            leaves = [t.clone().requires_grad_() for t in (p.x, *(t for name in TRAINED for t in getattr(p, name)))]
            call(leaves[0], p.weights, *leaves[1:]).backward()
            found.append([t.grad for t in leaves])
        assert all(map(torch.equal, *found))
        compilations.add(graphs.frame_count)
    assert len(compilations) == 1, "another number of rows was compiled anew"


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP32, FP32), (BF16, FP32), (FP16, FP32)))
@pytest.mark.parametrize("to", [BF16, FP16], ids=str)
def test_autocast_is_the_same_as_casting_by_hand(backend, dtype, adapter, to):
    """x, weights and biases take autocast's dtype; float32 adapters and magnitudes stay float32."""
    if backend == "triton" and to == BF16 and DEVICE.type == "cpu":
        to = FP16  # the interpreter has no bfloat16
    p, results = make(dtype, adapter), []
    groups = [[p.x], p.weights, p.lora_as, p.lora_bs, p.magnitudes, p.biases]
    kept = [to, to, FP32, FP32, FP32, to]
    for cast in (False, True):
        (x,), *lists = [
            [t.to(own if cast else t.dtype).detach().requires_grad_(i != 1) for t in group]
            for i, (group, own) in enumerate(zip(groups, kept, strict=True))
        ]
        with torch.autocast(DEVICE.type, dtype=to, enabled=not cast):
            y = ops.dora_mlp(x, *lists, p.scales, p.dropouts, p.seeds, backend=backend)
        assert y.dtype == to
        results.append([y.detach(), *torch.autograd.grad(y.sum(), [x, *(t for ts in lists[1:] for t in ts)])])
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(*results, strict=True))


@each_backend
def test_inference_mode(backend):
    p = make()
    lists = p.weights, p.lora_as, p.lora_bs, p.magnitudes, p.biases, p.scales, p.dropouts, p.seeds
    with torch.inference_mode():
        y = ops.dora_mlp(p.x, *lists, backend=backend)
    x = p.x.clone().requires_grad_()
    z = ops.dora_mlp(x, *lists, backend=backend)
    torch.testing.assert_close(y, z)
    z.sum().backward()  # what inference left behind (the seeds' offsets) serves training too


def t(*shape, dtype=FP32):
    return torch.ones(shape, dtype=dtype, device=DEVICE)


CASES = {
    # argument: (value, error, what the message says)
    "two weights": ("weights", [t(4, 6), t(4, 6)], ValueError, "weights has 2 items, expected 3"),
    "two magnitudes": ("magnitudes", [t(4), t(4)], ValueError, "magnitudes has 2 items, expected 3"),
    "four norms": ("norms", [None] * 4, ValueError, "norms has 4 items, expected 3"),
    "up's I": ("weights", [t(4, 6), t(5, 6), t(3, 4)], ValueError, r"weights\[1\] has I=5, expected I=4"),
    "A's K": ("lora_as", [t(2, 6), t(2, 6), t(2, 6)], ValueError, r"lora_as\[2\] has I=6, expected I=4"),
    "B's rank": ("lora_bs", [t(4, 2), t(4, 3), t(3, 2)], ValueError, r"lora_bs\[1\] has r=3, expected r=2"),
    "magnitude": ("magnitudes", [t(4), None, t(4)], ValueError, r"magnitudes\[2\] has N=4, expected N=3"),
    "magnitude's dtype": (
        "magnitudes", [t(4), t(4, dtype=FP64), t(3)], TypeError, r"magnitudes\[1\] has dtype torch.float64",
    ),
    "norm": ("norms", [t(3), None, None], ValueError, r"norms\[0\] has I=3, expected I=4"),
    "norm's dtype": ("norms", [None, t(4, dtype=FP16), None], TypeError, r"norms\[1\] has dtype torch.float16"),
    "bias": ("biases", [t(4), None, t(4)], ValueError, r"biases\[2\] has N=4, expected N=3"),
    "a trained weight": (
        "weights", [t(4, 6), t(4, 6).requires_grad_(), t(3, 4)], ValueError, r"weights\[1\] asks for a gradient",
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
        "lora_bs": [t(4, 2), t(4, 2), t(3, 2)], "magnitudes": [t(4), t(4), t(3)],
    }  # fmt: skip
    ops.dora_mlp(**good)
    with pytest.raises(error, match=f"dora_mlp: {said}"):
        ops.dora_mlp(**(good | {name: value}))


def test_a_norm_without_a_magnitude():
    lists = [t(4, 6), t(4, 6), t(3, 4)], [t(2, 6), t(2, 6), t(2, 4)], [t(4, 2), t(4, 2), t(3, 2)], [None, t(4), t(3)]
    with pytest.raises(ValueError, match=r"dora_mlp: norms\[0\] is given, expected None where magnitudes\[0\] is None"):
        ops.dora_mlp(t(5, 6), *lists, norms=[t(4), None, None])
