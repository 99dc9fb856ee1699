"""lora_linear among PyTorch's machinery: opcheck, torch.compile, a fresh process, Triton absent, double backward."""

import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing

import fastpeft
from fastpeft.testing import LoraProblem
from tests.support.backends import BACKENDS, DEVICE, FP32

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def leaves_of(problem, trained=("x", "lora_as", "lora_bs")):
    names = ("x", "weights", "lora_as", "lora_bs", "biases")
    groups = [[problem.x], *(list(getattr(problem, name)) for name in names[1:])]
    return [[t.clone().requires_grad_(name in trained) for t in g] for name, g in zip(names, groups, strict=True)]


@each_backend
@pytest.mark.parametrize("ranks", [(4,), (4, 3), (70,)], ids=str)  # 70: dB takes another way than small ranks do
@pytest.mark.parametrize("trained", ["x lora_as lora_bs", "lora_bs", "lora_as", "x weights lora_as lora_bs biases"])
def test_opcheck(backend, ranks, trained):
    problem = LoraProblem.make((9, 12), (7, 5)[: len(ranks)], ranks, FP32, device=DEVICE)
    (x,), *lists = leaves_of(problem, trained.split())
    seeds = torch.tensor(problem.seeds, device=DEVICE)
    scales, dropouts = list(problem.scales), [0.25] * len(ranks)
    rest = scales, dropouts, seeds
    torch.library.opcheck(torch.ops.fastpeft.lora_linear.default, (x, lists[0], [], *lists[1:], *rest, [], backend))
    s = torch.randn(9, sum(ranks), device=DEVICE)
    weights, lora_as, lora_bs, _ = ([t.detach() for t in group] for group in lists)
    needs = [name in trained for name in ("x", "weights", "lora_as", "lora_bs", "biases")]
    args = (list(problem.dys), x.detach(), s, weights, [], lora_as, lora_bs, *rest, needs, [], backend)
    torch.library.opcheck(torch.ops.fastpeft.lora_linear_backward.default, args)


@each_backend
@pytest.mark.parametrize("form", ["lora_linear", "lora_linear_shared"])
def test_compiled_gradients_are_the_eager_ones(backend, form):
    """One graph for every number of rows; the op around it is compiled as any other."""
    torch._dynamo.reset()
    count = 1 if form == "lora_linear" else 2

    def function(x, weights, lora_as, lora_bs, biases):
        if form == "lora_linear":
            one = (group[0] for group in (weights, lora_as, lora_bs, biases))
            return fastpeft.ops.lora_linear(x.sin(), *one, 0.5, 0.25, 3, backend).tanh().sum()
        args = (weights, lora_as, lora_bs, biases, [0.5, 2.0], [0.25, 0.0], [3, 4], backend)
        return sum(y.tanh().sum() for y in fastpeft.ops.lora_linear_shared(x.sin(), *args))

    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    for rows in ((9,), (17,), (40,)):
        problem = LoraProblem.make((*rows, 12), (7, 5)[:count], (4, 3)[:count], FP32, device=DEVICE)
        one, other = leaves_of(problem), leaves_of(problem)
        function(one[0][0], *one[1:]).backward()
        compiled(other[0][0], *other[1:]).backward()
        for group, wanted in zip(other, one, strict=True):
            for t, want in zip(group, wanted, strict=True):
                assert (t.grad is None) == (want.grad is None)
                assert t.grad is None or torch.equal(t.grad, want.grad)
    assert graphs.frame_count == 1


FIRST_CALL = """
import torch
from fastpeft.ops import lora_linear

def function(x, weight, a, b):
    return lora_linear(x, weight, a, b, scale=2.0, dropout=0.25, seed=3).square().mean()

torch.manual_seed(0)
tensors = [torch.randn(size, device=DEVICE) for size in ((9, 12), (7, 12), (4, 12), (7, 4))]
one, other = ([t.clone().requires_grad_(i != 1) for i, t in enumerate(tensors)] for _ in range(2))
torch.compile(function, fullgraph=True, dynamic=True)(*one).backward()
function(*other).backward()
for t, want in zip(one, other):
    assert (t.grad is None) == (want.grad is None)
    if t.grad is not None:
        torch.testing.assert_close(t.grad, want.grad)
"""


def run(source: str) -> None:
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_compiled_as_the_first_call_of_a_process():
    run(f"DEVICE = {DEVICE.type!r}\n" + FIRST_CALL)


def test_works_with_triton_absent():
    """Automatic choice falls to the reference; an explicit request says what is missing; compiling works too."""
    run(
        "import sys\nsys.modules['triton'] = None\nDEVICE = 'cpu'\n"
        + FIRST_CALL.replace("fullgraph=True", "backend='aot_eager', fullgraph=True")
        + """
import fastpeft
detached = [t.detach() for t in tensors]
assert fastpeft.explain("lora_linear", *detached).backend == "reference"
try:
    lora_linear(*detached, backend="triton")
except ValueError as error:
    assert "Triton does not import" in str(error), error
else:
    raise SystemExit("no error")
"""
    )


@each_backend
def test_inference_mode(backend):
    p = LoraProblem.make((3, 4), (2,), (2,), device=DEVICE, dropout=0.5)
    with torch.inference_mode():
        y = fastpeft.ops.lora_linear(p.x, p.weights[0], p.lora_as[0], p.lora_bs[0], None, 1.0, 0.5, 3, backend)
    x = p.x.clone().requires_grad_()
    z = fastpeft.ops.lora_linear(x, p.weights[0], p.lora_as[0], p.lora_bs[0], None, 1.0, 0.5, 3, backend)
    assert torch.equal(y, z)
    z.sum().backward()  # what inference left behind (the branch table) serves training too
