"""experts at its edges: who is chosen, sizes, ranks, what is trained, seeds, checkpointing, autocast, bad calls."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft.ops import experts
from fastpeft.ops.experts_arguments import MAX_RANK
from fastpeft.reference import ExpertLinear
from fastpeft.testing import ExpertsProblem
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, FP64

each_backend = pytest.mark.parametrize("backend", BACKENDS)


def integers(**settings):
    settings = {"tokens": 23, "hidden": 20, "inner": 10, "dropout": 0.5, "device": DEVICE, **settings}
    return ExpertsProblem.make(**settings, integers=True)


def assert_exact(problem, backend):
    fused, exact = problem.fused(backend), problem.exact()
    for name, value in exact.items():
        assert torch.equal(fused[name].double(), value), name
    return fused


CHOICES = {
    "all of one expert": torch.full((23, 1), 4),
    "the first and the last": torch.tensor([[0, 4]]).repeat(23, 1),
    "an expert twice": torch.tensor([[2, 2]]).repeat(23, 1),
    "top-1": torch.arange(23)[:, None] % 5,
    "all of them": torch.stack([torch.randperm(5, generator=torch.Generator().manual_seed(i)) for i in range(23)]),
    "some of no expert": torch.stack([torch.arange(23) % 6, torch.arange(23) % 7 - 1], 1),
    "none of an expert": torch.full((23, 2), 5),
    "no token": torch.empty(0, 2, dtype=torch.int64),
    "one token": torch.tensor([[3, 1]]),
    "int32": torch.tensor([[3, 1], [0, 5]], dtype=torch.int32),
}


@each_backend
@pytest.mark.parametrize("index", CHOICES.values(), ids=CHOICES)
def test_who_is_chosen(backend, index):
    fused = assert_exact(integers(index=index), backend)
    outside = ((index < 0) | (index >= 5)).all(1)
    assert (fused["y"][outside.to(DEVICE)] == 0).all()  # the sentinel of expert parallelism


@each_backend
@pytest.mark.parametrize("ranks", [(1, 1), (2, 17), (64, 3), (8, 8)])
def test_ranks(backend, ranks):
    assert_exact(integers(ranks=ranks, tokens=9), backend)


@each_backend
@pytest.mark.parametrize(("hidden", "inner"), [(1, 1), (7, 3), (130, 5), (4, 67)])
def test_sizes(backend, hidden, inner):
    assert_exact(integers(hidden=hidden, inner=inner, tokens=9, ranks=(3, 2)), backend)


@each_backend
def test_many_experts_and_only_some_used(backend):
    index = torch.tensor([[511, 3], [3, 300], [511, 0]])
    assert_exact(integers(experts=512, index=index, hidden=8, inner=4, ranks=(2, 1)), backend)


@each_backend
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_trained(backend, bias):
    """A gradient where one is asked for, the same whoever else asks."""
    p = integers(bias=bias)
    whole = p.fused(backend)
    leaves = p.leaves()
    for name in leaves:
        given = {other: t.clone().requires_grad_(other == name) for other, t in leaves.items()}
        up, down = (
            getattr(p, side)._replace(**{n.partition(".")[2]: t for n, t in given.items() if n.startswith(f"{side}.")})
            for side in ("up", "down")
        )
        y = experts(given["x"], p.top_k_index, given["top_k_weights"], up, down, p.activation, p.seeds, backend)
        y.backward(p.dy)
        assert torch.equal(given[name].grad, whole[f"d{name}"]), name
        assert all(t.grad is None for other, t in given.items() if other != name)


@each_backend
def test_scale_0_is_no_adapter(backend):
    p = integers(dropout=0.0)
    still = replace(p, up=p.up._replace(scale=0.0), down=p.down._replace(scale=0.0))
    absent = replace(p, up=ExpertLinear(*p.up[:2]), down=ExpertLinear(*p.down[:2]))
    one, other = still.fused(backend), absent.fused(backend)
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert not one["dup.lora_a"].any()
    assert not one["ddown.lora_b"].any()


def test_an_expert_s_nan_stays_its_own():
    p = ExpertsProblem.make(dtype=FP32, device=DEVICE)
    clean = p.fused()
    p.up.lora_a[0].fill_(torch.nan)
    found = p.fused()
    untouched = (p.top_k_index != 0).all(1)
    assert untouched.any()
    assert torch.equal(found["y"][untouched], clean["y"][untouched])
    for name in ("dup.lora_a", "ddown.lora_b", "dup.weight"):
        assert torch.equal(found[name][1:], clean[name][1:]), name


@each_backend
def test_an_activation_that_trains(backend):
    """Its own parameters get their gradients; what it computes is then kept."""
    p = integers(dropout=0.0)
    slope = torch.tensor(2.0, device=DEVICE, requires_grad=True)

    def activation(u):
        return u[:, :10] * slope + u[:, 10:]

    y = experts(p.x, p.top_k_index, p.top_k_weights, p.up, p.down, activation, None, backend)
    (found,) = torch.autograd.grad(y, slope, p.dy)
    y = fastpeft.reference.experts(*map(_double, (p.x, p.top_k_index, p.top_k_weights, p.up, p.down)), activation)
    (wanted,) = torch.autograd.grad(y, slope, p.dy.double())
    assert torch.equal(found, wanted)


def _double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    return value._make(map(_double, value)) if isinstance(value, ExpertLinear) else value


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(reentrant):
    p = ExpertsProblem.make(dropout=0.4, device=DEVICE)
    found = []
    for call in (lambda f, *args: f(*args), lambda f, *args: checkpoint(f, *args, use_reentrant=reentrant)):
        torch.manual_seed(3)
        leaves = {name: t.clone().requires_grad_() for name, t in p.leaves().items()}

        def layer(x, weights, a, b, leaves=leaves):
            up, down = p.up._replace(lora_a=a, lora_b=b), p.down._replace(lora_b=leaves["down.lora_b"])
            return experts(x, p.top_k_index, weights, up, down, p.activation)

        names = ("x", "top_k_weights", "up.lora_a", "up.lora_b")
        y = call(layer, *(leaves[name] for name in names))
        y.backward(p.dy)
        found.append([y, *(leaves[name].grad for name in (*names, "down.lora_b"))])
    assert all(map(torch.equal, *found))


def test_seeds_are_drawn_where_none_are_given():
    p = ExpertsProblem.make(dropout=0.4, device=DEVICE)

    def run():
        return experts(p.x, p.top_k_index, p.top_k_weights, p.up, p.down, p.activation)

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)
    for side in ("up", "down"):  # each has masks of its own
        quiet = replace(p, **{side: getattr(p, side)._replace(dropout=0.0)})
        assert not torch.equal(quiet.fused()["y"], p.fused()["y"])


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_autocast_leaves_the_products_in_the_weights_dtype(dtype):
    """As transformers' own experts: grouped_mm is no op of autocast's."""
    p = ExpertsProblem.make(dtype=dtype, adapter_dtype=FP32, device=DEVICE)
    x = p.x.float()  # a norm's output under autocast
    plain = replace(p, x=x).fused()
    with torch.autocast(DEVICE.type, BF16):
        cast = replace(p, x=x, dy=p.dy.float()).fused()
    assert plain["y"].dtype == FP32
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


def arguments(**changes):
    p = ExpertsProblem.make(6, 8, 5, 3, 2, (4, 4), device=DEVICE)
    found = {"x": p.x, "top_k_index": p.top_k_index, "top_k_weights": p.top_k_weights, "up": p.up, "down": p.down}
    for name, value in changes.items():
        side, _, part = name.partition("__")
        found[side] = found[side]._replace(**{part: value}) if part else value
    return {"activation": p.activation, **found}


def t(*shape, dtype=FP32):
    return torch.ones(shape, dtype=dtype, device=DEVICE)


CASES = {
    "x is a list": ("x", [1.0], TypeError, r"x is a list of 1, expected a floating-point tensor \[T, H\]"),
    "x has three dimensions": ("x", t(2, 3, 8), TypeError, r"x is a Tensor \[2, 3, 8\] of torch.float32, expected"),
    "a float index": (
        "top_k_index",
        t(6, 2),
        TypeError,
        r"top_k_index is a Tensor \[6, 2\] of torch.float32, expected",
    ),
    "too few tokens": ("top_k_index", t(5, 2, dtype=torch.int64), ValueError, r"top_k_index has shape \[5, 2\]"),
    "weights of another k": ("top_k_weights", t(6, 3), ValueError, "top_k_weights has k=3, expected k=2"),
    "up's K": ("up__weight", t(3, 10, 9), ValueError, "up.weight has K=9, expected K=8"),
    "no expert": ("up__weight", t(0, 10, 8), ValueError, r"up.weight has shape \[0, 10, 8\], expected at least one"),
    "down's E": ("down__weight", t(4, 8, 5), ValueError, "down.weight has E=4, expected E=3"),
    "down's N": ("down__weight", t(3, 9, 5), ValueError, "down.weight has N=9, expected N=8"),
    "down's dtype": (
        "down__weight",
        t(3, 8, 5, dtype=FP16),
        TypeError,
        "down.weight has dtype torch.float16, expected",
    ),
    "a bias's size": ("up__bias", t(3, 9), ValueError, "up.bias has N=9, expected N=10"),
    "a bias's dtype": ("up__bias", t(3, 10, dtype=FP64), TypeError, "up.bias has dtype torch.float64, expected"),
    "half an adapter": ("up__lora_b", None, ValueError, "up.lora_a and up.lora_b: one is None, expected both"),
    "lora_a's experts": ("up__lora_a", t(4, 4, 8), ValueError, "up.lora_a has E=4, expected E=3"),
    "lora_b's rank": ("down__lora_b", t(3, 8, 3), ValueError, "down.lora_b has R=3, expected R=4"),
    "lora_a's dtype": ("up__lora_a", t(3, 4, 8, dtype=FP16), TypeError, "up.lora_a has dtype torch.float16"),
    "a scale that is none": ("up__scale", float("inf"), ValueError, "up.scale is inf, expected a finite number"),
    "dropout 1": ("down__dropout", 1.0, ValueError, r"down.dropout is 1.0, expected a number in \[0, 1\)"),
    "the activation's shape": ("activation", lambda u: u, ValueError, r"activation returns shape \[12, 10\], expected"),
    "no such backend": ("backend", "cutlass", ValueError, "backend is 'cutlass', expected one of"),
}


@pytest.mark.parametrize(("name", "value", "error", "message"), CASES.values(), ids=CASES)
def test_bad_calls(name, value, error, message):
    with pytest.raises(error, match=f"experts: {message}"):
        experts(**arguments(**{name: value}))


def test_seeds_of_the_wrong_shape():
    with pytest.raises(
        ValueError, match=r"experts: seeds is a Tensor \[3\] of torch.int64, expected torch.int64 \[2, 3\]"
    ):
        experts(**arguments(up__dropout=0.5), seeds=torch.arange(3, device=DEVICE))


def test_what_triton_cannot_serve():
    pytest.importorskip("triton", reason="Triton is not installed")
    wide = {"up__lora_a": t(3, MAX_RANK + 1, 8), "up__lora_b": t(3, 10, MAX_RANK + 1)}
    with pytest.raises(ValueError, match=f"backend='triton' cannot serve this call: rank {MAX_RANK + 1} > {MAX_RANK}"):
        experts(**arguments(**wide), backend="triton")
    with pytest.raises(ValueError, match="experts: backend='cuda' cannot serve this call: csrc/ has no kernel for it"):
        experts(**arguments(), backend="cuda")


def test_explain():
    said = fastpeft.explain("experts", **arguments())
    assert said.backend in BACKENDS
    assert {said.backend, *said.reasons} == {"cuda", "triton", "reference"}


@pytest.mark.parametrize("of", ["x", "the router's weights"])
def test_gradients_of_gradients_are_refused(of):
    p = ExpertsProblem.make(device=DEVICE)
    x, weights = p.x.clone(), p.top_k_weights.clone()
    leaf = (x if of == "x" else weights).requires_grad_()
    y = experts(x, p.top_k_index, weights, p.up, p.down, p.activation)
    with pytest.raises(RuntimeError, match="experts: gradients of gradients are not served"):
        torch.autograd.grad(y.sum(), leaf, create_graph=True)


def test_gradients_of_gradients_are_refused_where_the_activation_is_trained():
    """There the registered op comes last, and what it got from above needs no gradient."""
    p = ExpertsProblem.make(device=DEVICE)
    slope = torch.ones((), device=DEVICE, dtype=p.x.dtype, requires_grad=True)
    y = experts(p.x, p.top_k_index, p.top_k_weights, p.up, p.down, lambda u: slope * p.activation(u))
    with pytest.raises(RuntimeError, match="experts: gradients of gradients are not served"):
        torch.autograd.grad(y.sum(), slope, create_graph=True)
