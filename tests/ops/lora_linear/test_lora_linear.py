"""lora_linear and lora_linear_shared: exact on integers, no less accurate than PyTorch, exact gradients."""

import functools
import importlib
import itertools

import pytest
import torch

import fastpeft
from fastpeft import reference
from fastpeft.testing import LoraProblem, assert_no_worse, eager_lora_linear, error_vs_eager
from tests.support.backends import BF16, DEVICE, FP16, FP32, FP64, TRAINING, served
from tests.support.exactness import assert_exact

FORMS = {"lora_linear": ((141,), (12,)), "lora_linear_shared": ((141, 30), (12, 17))}
form = pytest.mark.parametrize("form", FORMS)


@form
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served())
def test_integers_are_exact(form, backend, dtype, adapter, dropout):
    """No rounding anywhere, so a wrong index, mask, bound or branch cannot pass for a rounding error."""
    outs, ranks = FORMS[form]
    shape = (21, 38) if BF16 in (dtype, adapter) else (2, 37, 150)  # bfloat16 counts to 256
    assert_exact(LoraProblem.make(shape, outs, ranks, dtype, adapter, DEVICE, dropout, integers=True), backend)


def test_parts_cover_the_loop():
    """Every step of a split loop lies in exactly one part, and no part is empty."""
    launch = pytest.importorskip("fastpeft.kernels.launch", reason="Triton is not installed")
    sizes, programs_wanted = (0, 1, 32, 33, 448, 5000), (0, 1, 7, 300)
    for size, block, programs, least in itertools.product(sizes, (16, 32), programs_wanted, (1, 2, 4)):
        parts, span = launch.split(size, block, programs, least)
        assert span % block == 0
        assert (parts - 1) * span < max(size, 1) <= parts * span
        assert parts == 1 or span >= least * block
        assert parts == 1 or parts * programs <= launch.TARGET_PROGRAMS


@form
@pytest.mark.parametrize("least", [1, 2])  # 2: the last part is shorter
def test_integers_are_exact_where_sums_are_split(form, least, monkeypatch):
    """Every sum over rows or columns in as many parts as it has blocks, or half; by default only long sums are cut."""
    launch = pytest.importorskip("fastpeft.kernels.launch", reason="Triton is not installed")
    for name in ("lora_linear_products", "lora_linear_backward"):
        monkeypatch.setattr(f"fastpeft.kernels.{name}.split", functools.partial(launch.split, least=least))
    outs, ranks = FORMS[form]
    assert_exact(LoraProblem.make((150, 150), outs, ranks, FP32, FP32, DEVICE, 0.5, integers=True), "triton")


@form
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("rows", [0, 16, 33])  # none, one part, and a last part that is shorter
def test_integers_are_exact_where_a_cpu_casts_a_few_rows_at_a_time(form, rows, dropout, monkeypatch):
    module = importlib.import_module("fastpeft.reference.lora_linear")
    monkeypatch.setattr(module, "_BLOCK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    outs, ranks = FORMS[form]
    problem = LoraProblem.make((rows, 38), outs, ranks, BF16, FP32, torch.device("cpu"), dropout, integers=True)
    assert_exact(problem, "reference")


@form
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served(*TRAINING))
def test_no_less_accurate_than_pytorch(form, backend, dtype, adapter, record_property):
    outs, ranks = FORMS[form]
    problem = LoraProblem.make((2, 67, 448), outs, ranks, dtype, adapter, DEVICE, dropout=0.1)
    fused, eager, exact = problem.fused(backend), problem.eager(), problem.exact()
    ratios = {name: assert_no_worse(fused[name], eager[name], exact[name], name) for name in exact}
    worst = {kind: max(getattr(r, kind) for r in ratios.values()) for kind in ("max", "rms")}
    record_property("ratio", f"{worst['max']:.2f} max  {worst['rms']:.2f} rms")


@pytest.mark.parametrize("t", [0.1, 0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP16, FP32), (BF16, FP32)))
def test_error_by_the_size_of_the_low_rank_term(t, backend, dtype, adapter):
    """One 16-bit rounding of the term (rms t) and one of y, where eager rounds the base (rms 1) and y."""
    p = LoraProblem.make((134, 448), (141,), (12,), dtype, adapter, DEVICE)
    x, weight, a, b = p.x, p.weights[0], p.lora_as[0], p.lora_bs[0]
    base, term = x.double() @ weight.double().T, x.double() @ a.double().T @ b.double().T
    scale = (t * base.square().mean().sqrt() / term.square().mean().sqrt()).item()
    y = fastpeft.ops.lora_linear(x, weight, a, b, scale=scale, backend=backend)
    ratio = error_vs_eager(y, eager_lora_linear(x, weight, a, b, None, scale), base + scale * term).rms
    assert ratio < 1.03 * ((2 * t**2 + 1) / (t**2 + 2)) ** 0.5  # of 18,894 elements: 0.5 % is one sigma


@form
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served((FP64, FP64)))
def test_gradcheck(form, backend, dtype, adapter, dropout):
    outs, ranks = ((5,), (3,)) if form == "lora_linear" else ((5, 4), (3, 2))
    problem = LoraProblem.make((2, 3, 7), outs, ranks, dtype, adapter, DEVICE, dropout)
    count, seeds = len(outs), [11, 12]
    groups = (problem.weights, problem.lora_as, problem.lora_bs, problem.biases)
    leaves = [t.clone().requires_grad_() for t in (problem.x, *(t for group in groups for t in group))]

    def call(x, *flat):
        lists = [flat[i : i + count] for i in range(0, len(flat), count)]
        if form == "lora_linear":
            return fastpeft.ops.lora_linear(x, *flat, 0.5, dropout, seeds[0], backend)
        dropouts = [dropout, dropout / 2]
        return fastpeft.ops.lora_linear_shared(x, *lists, [0.5, 2.0], dropouts, seeds, backend)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("parts", ["weight and bias", "weight", "bias", "neither"])
def test_the_definition_is_the_formula(dropout, parts):
    """The reference against the same written with einsum and an explicit mask."""
    p = LoraProblem.make((2, 5, 7), (6,), (3,), FP64)
    weight = p.weights[0] if "weight" in parts else None
    bias = p.biases[0] if "bias" in parts else None
    seed = torch.tensor(5)
    y = reference.lora_linear(p.x, weight, p.lora_as[0], p.lora_bs[0], bias, 0.7, dropout, seed)
    keep = reference.keep_mask(seed, dropout, 10, 7).view(2, 5, 7)
    kept = 1 - round(dropout * 65536) / 65536
    wanted = 0.7 * torch.einsum("...k,rk,nr->...n", p.x * keep / kept, p.lora_as[0], p.lora_bs[0])
    if weight is not None:
        wanted = wanted + torch.einsum("...k,nk->...n", p.x, weight)
    if bias is not None:
        wanted = wanted + bias
    torch.testing.assert_close(y, wanted)
    eager = eager_lora_linear(p.x, weight, p.lora_as[0], p.lora_bs[0], bias, 0.7, dropout, 5)
    torch.testing.assert_close(eager, wanted)
