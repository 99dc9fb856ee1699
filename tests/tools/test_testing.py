"""The instruments can fail: each finds the fault it is made for, and passes what is right."""

import pytest
import torch

from fastpeft import ops
from fastpeft.testing import (
    LoraProblem,
    assert_no_worse,
    check_ops,
    error_vs_eager,
    guarded,
    integer_inputs,
    poisoned,
)
from fastpeft.testing import lora_linear as problems
from tests.support.backends import DEVICE, FP16, FP32


@pytest.fixture
def results():
    """An exact result, eager's at float16, and a float16 result as good as any."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(64, 96, generator=generator, dtype=torch.float64)
    eager = (exact.half() + exact.half()).div(2) * (1 + 2**-11 * torch.randn(exact.shape, generator=generator)).half()
    return exact, eager, exact.half()


def test_rounding_the_exact_result_passes(results):
    exact, eager, best = results
    assert assert_no_worse(best, eager, exact).rms < 1


def test_a_global_error_of_scale_is_found(results):
    exact, eager, best = results
    with pytest.raises(AssertionError, match=r"delta: the error is .* times eager's"):
        assert_no_worse(best * 1.01, eager, exact, "delta")


def test_one_bad_element_is_found_by_the_maximum(results):
    exact, eager, best = results
    best[3, 5] += 0.05
    ratios = error_vs_eager(best, eager, exact)
    assert ratios.max > 2
    assert ratios.rms < 1.2
    assert not ratios.ok


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nan_or_an_infinity_is_found(results, value):
    exact, eager, best = results
    best[3, 5] = value
    assert error_vs_eager(best, eager, exact) == (torch.inf, torch.inf)


def test_an_infinity_that_is_right_is_no_error(results):
    exact, eager, best = results
    for t in results:
        t[3, 5] = torch.inf
    assert assert_no_worse(best, eager, exact).ok


def test_where_eager_is_exact_only_rounding_is_forgiven():
    exact = torch.full((8, 8), 1.0 + 2**-13, dtype=torch.float64)
    one = torch.ones(8, 8, dtype=FP16)
    assert error_vs_eager(one, one, exact) == (1.0, 1.0)  # nobody can do better
    assert error_vs_eager(one, one, one.double()) == (0.0, 0.0)
    assert error_vs_eager(one + 2**-10, one, one.double()) == (torch.inf, torch.inf)


def test_shapes_and_dtypes_must_agree():
    one = torch.ones(2, 2)
    with pytest.raises(ValueError, match=r"^error_vs_eager: fused, eager and exact are"):
        error_vs_eager(one[:1], one, one)
    with pytest.raises(ValueError, match=r"^error_vs_eager: fused, eager and exact are"):
        error_vs_eager(one.half(), one, one)
    assert error_vs_eager(one[:0], one[:0], one[:0]).ok


def test_integer_inputs():
    one, two = integer_inputs((40, 50), (7,), dtype=FP16, device=DEVICE)
    assert one.dtype == FP16
    assert two.shape == (7,)
    assert one.device.type == DEVICE.type
    assert sorted(set(one.flatten().tolist())) == [-1, 0, 1]
    assert torch.equal(one, integer_inputs((40, 50), dtype=FP16, device=DEVICE)[0])
    assert not torch.equal(one, integer_inputs((40, 50), dtype=FP16, device=DEVICE, seed=1)[0])


@pytest.mark.parametrize("fill", [torch.nan, -77.0])
def test_guarded_sees_a_write_outside(fill):
    t = torch.arange(6.0, device=DEVICE).view(2, 3)
    view, check = guarded(t, 4, fill)
    assert torch.equal(view, t)
    assert view.stride() == (11, 1)
    view.fill_(5.0)
    check()  # inside is the caller's
    outside = view.as_strided((2, 4), view.stride(), view.storage_offset())
    if fill != fill:
        assert outside[:, 3].isnan().all()
    outside[1, 3] = 1.0
    with pytest.raises(AssertionError, match=r"guarded: 1 elements outside the tensor were written"):
        check()


def test_guarded_takes_floats():
    with pytest.raises(TypeError, match=r"^guarded: tensor has dtype torch.int64"):
        guarded(torch.ones(2, dtype=torch.int64))


ALLOCATE = {
    "empty": lambda like: torch.empty(like.shape, dtype=like.dtype, device=like.device),
    "empty_like": torch.empty_like,
    "empty_strided": lambda like: torch.empty_strided((2, 3), (1, 2), dtype=like.dtype, device=like.device),
    "new_empty": lambda like: like.new_empty(2, 3),
    "new_empty_strided": lambda like: like.new_empty_strided((2, 3), (1, 2)),
}


@pytest.mark.parametrize("allocate", ALLOCATE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_poisoned_memory(allocate, dtype):
    like = torch.ones(2, 3, dtype=dtype, device=DEVICE)
    with poisoned():
        found = ALLOCATE[allocate](like)
        assert found.shape == (2, 3)
        assert found.dtype == dtype
        assert (found != found).all() if dtype.is_floating_point else (found == torch.iinfo(dtype).min).all()
        found.fill_(1)
    assert torch.equal(found, like)


@pytest.mark.parametrize("where", [-1, 6, -poisoned.GUARD, 5 + poisoned.GUARD])
def test_poisoned_sees_a_write_outside(where):
    def write():
        found = torch.empty(2, 3, device=DEVICE)
        found.as_strided((1,), (1,), found.storage_offset() + where).fill_(1.0)

    with pytest.raises(AssertionError, match=r"poisoned: a write outside an allocation of 6 elements"), poisoned():
        write()


def test_poisoned_lets_the_first_error_through():
    def fail():
        with poisoned():
            found = torch.empty(3)
            found.as_strided((1,), (1,), found.storage_offset() - 1).fill_(1.0)
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_poisoned_reaches_backward():
    class Empty(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return torch.empty_like(dy)

    x = torch.ones(3, device=DEVICE, requires_grad=True)
    with poisoned():
        Empty.apply(x).sum().backward()
    assert x.grad.isnan().all()


def test_a_problem_compares_like_with_like():
    """Fused, eager and exact are the same function: at float64 they agree."""
    p = LoraProblem.make((2, 5, 7), (6, 4), (3, 2), torch.float64, dropout=0.3)
    fused, eager, exact = p.fused("reference"), p.eager(), p.exact()
    assert list(fused) == list(eager) == list(exact)
    assert set(exact) == {
        "y0",
        "y1",
        "dx",
        *(f"d{n}{p}" for n in ("weight", "lora_a", "lora_b", "bias") for p in (0, 1)),
    }
    for name in exact:
        torch.testing.assert_close(fused[name], exact[name])
        torch.testing.assert_close(eager[name], exact[name])


@pytest.fixture
def no_interpreter(monkeypatch):
    """As on a user's machine; the interpreter would take minutes."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr("fastpeft._backend.interpreting", lambda: False)


def test_check_ops_passes(no_interpreter):
    rows = list(check_ops(DEVICE))
    assert rows
    assert all(ok for *_, ok in rows), rows
    ops = {
        "bottleneck",
        "dora_linear",
        "dora_mlp",
        "experts",
        "lora_linear",
        "lora_linear_shared",
        "lora_mlp",
        "multi_lora",
        "multi_lora_shared",
        "prompt_gather",
        "row_linear",
    }
    assert {name.split()[0] for name, *_ in rows} == ops


def test_check_ops_fails_where_an_op_is_wrong(no_interpreter, monkeypatch):
    def wrong(x, weight, lora_a, lora_b, bias, scale, *rest):
        return ops.lora_linear(x, weight, lora_a, lora_b, bias, scale * 1.01, *rest)

    monkeypatch.setattr(problems, "ops", type("Ops", (), {"lora_linear": staticmethod(wrong)}))
    _, dtype, *ratios, ok = next(row for row in check_ops(DEVICE) if row[0].startswith("lora_linear"))
    assert dtype == FP32
    assert not ok
    assert max(ratios) > 1.2
