"""row_linear among PyTorch's machinery: opcheck, torch.compile, inference mode, double backward; and bad calls."""

import pytest
import torch
import torch._dynamo.testing

import fastpeft
from fastpeft.testing import RowProblem
from tests.support.backends import BACKENDS, DEVICE, FP16, FP32, FP64

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_form = pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])


@each_form
@each_backend
@pytest.mark.parametrize("trained", ["x trained bias", "trained", "trained bias"])
def test_opcheck(columns, backend, trained):
    p = RowProblem.make((9, 12), 7, 3, FP32, device=DEVICE, columns=columns)
    x, part, bias = (getattr(p, n).clone().requires_grad_(n in trained.split()) for n in ("x", "trained", "bias"))
    torch.library.opcheck(torch.ops.fastpeft.row_linear.default, (x, p.weight, part, p.index, bias, columns, backend))
    kept = p.x.index_select(1, p.index) if columns else p.x
    needs = [name in trained.split() for name in ("x", "trained", "bias")]
    args = (p.dy, kept, p.weight, p.trained, p.index, needs, columns, backend)
    torch.library.opcheck(torch.ops.fastpeft.row_linear_backward.default, args)


@each_form
@each_backend
def test_compiled_gradients_are_the_eager_ones(columns, backend):
    torch._dynamo.reset()

    def function(x, weight, part, index, bias):
        return fastpeft.ops.row_linear(x.sin(), weight, part, index, bias, columns, backend).tanh().sum()

    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    for rows in (9, 17, 40):
        p = RowProblem.make((rows, 12), 7, 3, FP32, device=DEVICE, columns=columns)
        leaves = [[t.clone().requires_grad_() for t in (p.x, p.trained, p.bias)] for _ in range(2)]
        for call, (x, part, bias) in zip((function, compiled), leaves, strict=True):
            call(x, p.weight, part, p.index, bias).backward()
        for one, other in zip(*leaves, strict=True):
            assert torch.equal(one.grad, other.grad)
    assert graphs.frame_count == 1


@each_backend
def test_inference_mode(backend):
    p = RowProblem.make((3, 4), 5, 2, device=DEVICE)
    part = p.trained.clone().requires_grad_()
    with torch.inference_mode():
        y = fastpeft.ops.row_linear(p.x, p.weight, part, p.index, backend=backend)
    assert torch.equal(y, fastpeft.ops.row_linear(p.x, p.weight, part, p.index, backend=backend))


def test_a_step_between_forward_and_backward_is_noticed():
    p = RowProblem.make((3, 4), 5, 2)
    part = p.trained.clone().requires_grad_()
    y = fastpeft.ops.row_linear(p.x, p.weight, part, p.index)
    with torch.no_grad():
        part.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": 1.0}, TypeError, r"x is 1.0 \(float\), expected a tensor"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x has dtype torch.int64"),
        ({"x": torch.ones(3, 5)}, ValueError, "weight has K=4, expected K=5"),
        ({"weight": torch.ones(5)}, ValueError, r"weight has shape \[5\], expected \[N, K\]"),
        ({"weight": torch.ones(5, 4, dtype=FP16)}, TypeError, "weight has dtype torch.float16, expected torch.float32"),
        ({"weight": torch.ones(5, 4, requires_grad=True)}, ValueError, "weight requires a gradient"),
        ({"trained": torch.ones(2, 3)}, ValueError, "trained has K=3, expected K=4"),
        ({"trained": torch.ones(2, 4, dtype=FP64)}, TypeError, "trained has dtype torch.float64"),
        ({"index": [1, 2]}, TypeError, "index is a list of 2, expected an int64 tensor"),
        ({"index": torch.tensor([1.0, 2.0])}, TypeError, r"index is torch.float32 \[2\]"),
        ({"index": torch.tensor([1])}, ValueError, "index has n=1, expected n=2"),
        ({"bias": torch.ones(4)}, ValueError, "bias has N=4, expected N=5"),
        ({"columns": 1}, TypeError, r"columns is 1 \(int\), expected True or False"),
        ({"columns": True}, ValueError, "trained has N=2, expected N=5"),
        ({"backend": "cuda"}, ValueError, "backend='cuda' cannot serve this call"),
    ],
)
def test_bad_calls(changed, error, message):
    call = {"x": torch.ones(3, 4), "weight": torch.ones(5, 4), "trained": torch.ones(2, 4)}
    call |= {"index": torch.tensor([4, 0]), "bias": torch.ones(5)}
    with pytest.raises(error, match=f"row_linear: {message}"):
        fastpeft.ops.row_linear(**(call | changed))


def test_explain_says_who_serves():
    p = RowProblem.make((3, 4), 5, 2, device=DEVICE)
    serves = "triton" if DEVICE.type == "cuda" else "reference"
    assert fastpeft.explain("row_linear", p.x, p.weight, p.trained, p.index).backend == serves
    (line,) = fastpeft.explain("row_linear", p.x, p.weight, p.trained, p.index, backend="triton").configuration
    assert line.startswith("gradient: Config(")
