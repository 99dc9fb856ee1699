"""row_linear: exact on integers, no less accurate than PyTorch, exact gradients."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastpeft
from fastpeft import reference
from fastpeft.testing import RowProblem, assert_no_worse
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, FP64, TRAINING, served
from tests.support.exactness import assert_exact

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_form = pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])


def integers(shape=(37, 30), out=45, chosen=7, dtype=FP32, columns=False, **options) -> RowProblem:
    return RowProblem.make(shape, out, chosen, dtype, None, DEVICE, columns, integers=True, **options)


@each_form
@pytest.mark.parametrize(("backend", "dtype", "trained"), served())
def test_integers_are_exact(columns, backend, dtype, trained):
    """No rounding anywhere, so a wrong index, mask or bound cannot pass for a rounding error."""
    shape = (21, 38) if dtype == BF16 else (2, 37, 150)  # bfloat16 counts to 256
    assert_exact(RowProblem.make(shape, 141, 17, dtype, trained, DEVICE, columns, integers=True), backend)


@each_form
@pytest.mark.parametrize("least", [1, 2])  # 2: the last part is shorter
def test_integers_are_exact_where_sums_are_split(columns, least, monkeypatch):
    kernels = pytest.importorskip("fastpeft.kernels.row_linear", reason="Triton is not installed")
    monkeypatch.setattr(kernels, "split", functools.partial(kernels.split, least=least))
    assert_exact(integers((165, 70), columns=columns), "triton")


@each_form
@pytest.mark.parametrize(("backend", "dtype", "trained"), served(*TRAINING))
def test_no_less_accurate_than_pytorch(columns, backend, dtype, trained, record_property):
    problem = RowProblem.make((2, 67, 448), 141, 24, dtype, trained, DEVICE, columns)
    fused, eager, exact = problem.fused(backend), problem.eager(), problem.exact()
    ratios = {name: assert_no_worse(fused[name], eager[name], exact[name], name) for name in exact}
    worst = {kind: max(getattr(r, kind) for r in ratios.values()) for kind in ("max", "rms")}
    record_property("ratio", f"{worst['max']:.2f} max  {worst['rms']:.2f} rms")


@each_form
@pytest.mark.parametrize(("backend", "dtype", "trained"), served((FP64, FP64)))
def test_gradcheck(columns, backend, dtype, trained):
    """The weight is filled as the op demands, so that a change of ``trained`` is seen in the output."""
    p = RowProblem.make((2, 3, 7), 5, 3, dtype, trained, DEVICE, columns)

    def call(x, part, bias):
        weight = p.weight.index_copy(int(columns), p.index, part.detach())
        return fastpeft.ops.row_linear(x, weight, part, p.index, bias, columns, backend)

    leaves = [t.clone().requires_grad_() for t in (p.x, p.trained, p.bias)]
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@each_form
def test_the_definition_is_the_formula(columns):
    p = RowProblem.make((2, 5, 7), 6, 3, FP64, columns=columns)
    new = torch.randn_like(p.trained)
    weight = p.weight.clone()
    weight[(slice(None), p.index) if columns else p.index] = new
    wanted = torch.einsum("...k,nk->...n", p.x, weight) + p.bias
    torch.testing.assert_close(reference.row_linear(p.x, p.weight, new, p.index, p.bias, columns), wanted)


@each_form
@each_backend
@pytest.mark.parametrize(
    "shape", [(0, 20), (1, 20), (127, 20), (4097, 20), (1, 1), (6, 0, 9), (10,), (2, 1, 3, 9)], ids=str
)
def test_shapes(columns, backend, shape):
    problem = integers(shape, columns=columns)
    assert problem.fused(backend)["y"].shape == (*shape[:-1], 45)
    assert_exact(problem, backend)


@each_form
@each_backend
@pytest.mark.parametrize("chosen", [1, 16, 17, 64, 65, 150])
def test_how_many_are_chosen(columns, backend, chosen):
    assert_exact(integers((37, 150), 150, chosen, columns=columns), backend)


@each_form
@each_backend
@pytest.mark.parametrize("asked", ["x", "trained", "bias", "x trained", "trained bias", "x bias"])
def test_what_is_trained(columns, backend, asked):
    p = integers(columns=columns)
    leaves = {"x": p.x.clone(), "trained": p.trained.clone(), "bias": p.bias.clone()}
    for name in asked.split():
        leaves[name].requires_grad_()
    y = fastpeft.ops.row_linear(leaves["x"], p.weight, leaves["trained"], p.index, leaves["bias"], columns, backend)
    y.backward(p.dy)
    wanted = p.exact()
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in asked.split())
        assert leaf.grad is None or torch.equal(leaf.grad.double(), wanted[f"d{name}"]), name


@each_backend
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_shapes(backend, data):
    lead = data.draw(st.lists(st.integers(0, 9), max_size=2), "leading dimensions")
    k, out = data.draw(st.integers(1, 140), "K"), data.draw(st.integers(1, 140), "N")
    columns = data.draw(st.booleans(), "columns")
    chosen = data.draw(st.integers(1, k if columns else out), "chosen")
    assert_exact(integers((*lead, k), out, chosen, columns=columns), backend)


@each_form
@pytest.mark.parametrize(("backend", "dtype", "trained"), served((FP16, FP32), (BF16, FP32)))
def test_fp32_masters_get_fp32_gradients(columns, backend, dtype, trained):
    """Far better than 16 bits can hold."""
    p = RowProblem.make((65, 96), 48, 8, dtype, trained, DEVICE, columns)
    found, exact = p.fused(backend)["dtrained"], p.exact()["dtrained"]
    assert found.dtype == FP32
    error = (found - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.05 * torch.finfo(dtype).eps


@each_form
@pytest.mark.parametrize(("backend", "dtype", "trained"), served((FP32, FP32)))
@pytest.mark.parametrize("to", [BF16, FP16], ids=str)
def test_autocast_is_the_same_as_casting_by_hand(columns, backend, dtype, trained, to):
    p = RowProblem.make((9, 20), 12, 4, dtype, trained, DEVICE, columns)

    def run(x, weight, bias):
        part = p.trained.clone().requires_grad_()
        x.requires_grad_()
        y = fastpeft.ops.row_linear(x, weight, part, p.index, bias, columns, backend)
        return y, *torch.autograd.grad(y, (x, part), p.dy.to(y.dtype))

    with torch.autocast(DEVICE.type, dtype=to):
        found = run(p.x.clone(), p.weight, p.bias)
    wanted = run(p.x.to(to), p.weight.to(to), p.bias.to(to))
    assert found[0].dtype == to
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other.to(one.dtype))


# memory
