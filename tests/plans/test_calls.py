"""A call that repeats runs as a plan, with the same bits as through Python; whatever changes between calls is seen."""

import gc
import threading
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastpeft import _plan, ops
from tests.support import host_extension

RUNS = 5  # through Python, recorded, then as a plan; backward is recorded a call later


@pytest.fixture(autouse=True, scope="module")
def _extension():
    host_extension.loaded()


def new(*shape, dtype=torch.float32, grad=True, seed=0):
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)
    return made.requires_grad_(grad)


def lora(k=24, n=40, r=4, dtype=torch.float32, **grads):
    """W, A, B and a bias; by name, whether each asks for a gradient."""
    shapes = {"weight": (n, k), "lora_a": (r, k), "lora_b": (n, r), "bias": (n,)}
    asks = {"weight": False, "lora_a": True, "lora_b": True, "bias": False} | grads
    return {name: new(*shape, dtype=dtype, grad=asks[name]) for name, shape in shapes.items()}


def linear(x, scale=0.5, **parts):
    return ops.lora_linear(x, **parts, scale=scale), [x, *parts.values()]


def shared(x, dropout=0.0):
    branches = [lora(n=n, r=r) for n, r in ((40, 4), (16, 2), (32, 8))]
    seeds = [torch.tensor([seed]) for seed in (3, 4, 5)]
    columns = {f"{name}s": [b[name] for b in branches] for name in ("weight", "lora_a", "lora_b")}
    biases = [branches[0]["bias"], None, branches[2]["bias"]]
    ys = ops.lora_linear_shared(
        x, **columns, biases=biases, scales=[0.5, 1.0, 2.0], dropouts=[dropout] * 3, seeds=seeds
    )
    return torch.cat(ys, -1), [x, *columns["lora_as"], *columns["lora_bs"]]


def mixed(x):
    slots = torch.tensor([0, 2, -1, 1, 2])
    a, b = new(3, 4, 24), new(3, 40, 4)
    return ops.multi_lora(x, a, b, slots, torch.tensor([0.5, 1.0, 2.0])), [x, a, b]


def bottleneck(x):
    down, up = new(6, 24), new(24, 6)
    return ops.bottleneck(x, down, new(6), up, new(24), residual=x, activation="relu", scale=0.7), [x, down, up]


def rows(x, columns=False):
    weight, index = new(40, 24, grad=False), torch.tensor([1, 5, 7])
    trained = new(40, 3) if columns else new(3, 24)
    return ops.row_linear(x, weight, trained, index, columns=columns), [x, trained]


CASES = {
    "lora_linear": lambda: linear(new(5, 24), **lora()),
    "of three dimensions": lambda: linear(new(2, 5, 24), **lora()),
    "frozen input": lambda: linear(new(5, 24, grad=False), **lora()),
    "frozen A": lambda: linear(new(5, 24), **lora(lora_a=False)),
    "frozen B": lambda: linear(new(5, 24), **lora(lora_b=False)),
    "trained weight and bias": lambda: linear(new(5, 24), **lora(weight=True, bias=True)),
    "no bias": lambda: linear(new(5, 24), **(lora() | {"bias": None})),
    "transposed weight": lambda: linear(new(5, 24), **(lora() | {"weight": new(24, 40, grad=False).T})),
    "x with other strides": lambda: linear(new(24, 5, grad=False).T.requires_grad_(), **lora()),
    "16 bits": lambda: linear(new(5, 24, dtype=torch.bfloat16), **lora(dtype=torch.bfloat16)),
    "shared": lambda: shared(new(2, 5, 24)),
    "multi_lora": lambda: mixed(new(5, 24)),
    "bottleneck": lambda: bottleneck(new(5, 24)),
    "rows": lambda: rows(new(5, 24)),
    "columns": lambda: rows(new(5, 24), columns=True),
}
THROUGH_PYTHON = {"multi_lora"}  # on a CPU: it reads where each slot's tokens begin


def gradients(y, inputs):
    asked = [t for t in inputs if t is not None and t.requires_grad]
    return torch.autograd.grad(y.square().sum(), asked)


def bits(tensors):
    return [tensor.detach().contiguous().flatten().view(torch.uint8).clone() for tensor in tensors]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_plan_has_the_bits_of_python(name):
    _plan.refusals.clear()
    results = []
    for _ in range(RUNS):
        y, inputs = CASES[name]()
        results.append([y, *gradients(y, inputs)])
    assert all(same(results[0], result) for result in results)
    assert all(a.stride() == b.stride() for result in results for a, b in zip(results[0], result, strict=True))
    assert bool(_plan.refusals) == (name in THROUGH_PYTHON), dict(_plan.refusals)


@pytest.mark.parametrize("name", CASES)
def test_without_gradients(name):
    with torch.no_grad():
        results = [CASES[name]()[0] for _ in range(RUNS)]
    assert all(same(results[:1], [result]) and not result.requires_grad for result in results)


def test_dropout_draws_as_python_does():
    def step():
        torch.manual_seed(7)
        x, parts = new(5, 24), lora()
        y = ops.lora_linear(x, **parts, dropout=0.5)
        return [y, *gradients(y, [x, *parts.values()])]

    results = [step() for _ in range(RUNS)]
    assert all(same(results[0], result) for result in results)
    results = [[shared(new(5, 24), dropout=0.5)[0]] for _ in range(RUNS)]
    assert all(same(results[0], result) for result in results)


def warm(x, parts, **settings):
    for _ in range(RUNS):
        y = ops.lora_linear(x, **parts, **settings)
        if y.requires_grad:
            gradients(y, [x, *parts.values()])
    return ops.lora_linear(x, **parts, **settings)


def test_the_second_call_of_a_kind_is_planned():
    plans = _planned().plans.plans
    x, parts = new(3, 24), lora(r=3)
    seen = []
    for _ in range(4):
        ops.lora_linear(x, **parts)
        seen.append(_planned().plans.plans - plans)
    assert seen == [0, 1, 1, 1]


def _planned():
    from fastpeft.ops.lora_linear import _planned as found

    return found


# What a call is after others, and whether it is as one without them.
CHANGES = {
    "values": lambda x, p: linear(x.detach() + 1, **p),
    "more rows": lambda x, p: linear(new(9, 24), **p),
    "another scale": lambda x, p: linear(x, scale=3.0, **p),
    "no bias": lambda x, p: linear(x, **(p | {"bias": None})),
    "another rank": lambda x, p: linear(x, **lora(r=7)),
    "strides": lambda x, p: linear(x.T.contiguous().T, **p),
    "a frozen A": lambda x, p: linear(x, **(p | {"lora_a": p["lora_a"].detach()})),
    "all double": lambda x, p: linear(x.double(), **{name: t.double() for name, t in p.items()}),
    "an unaligned x": lambda x, p: linear(
        torch.cat([x.detach().flatten()[:1], x.detach().flatten()])[1:].view(5, 24), **p
    ),
    "A for B": lambda x, p: linear(x, **(p | {"lora_b": p["lora_a"][:, :4].T.repeat(10, 1)[:40]})),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_two_calls_is_seen(name):
    x, parts = new(5, 24), lora()
    _planned().plans.clear()
    expected, inputs = CHANGES[name](x, parts)
    wanted = [expected, *gradients(expected, inputs)]
    warm(x, parts, scale=0.5)
    for _ in range(RUNS):
        found, inputs = CHANGES[name](x, parts)
        assert same(wanted, [found, *gradients(found, inputs)])
        warm(x, parts, scale=0.5)


def test_refusals_and_the_environment_are_seen(monkeypatch):
    x, parts = new(5, 24), lora()
    warm(x, parts)
    with pytest.raises(ValueError, match="lora_linear: lora_b has"):
        ops.lora_linear(x, **(parts | {"lora_b": new(41, 4)}))
    with pytest.raises(ValueError, match="backend='cuda' cannot serve"):
        ops.lora_linear(x, **parts, backend="cuda")
    monkeypatch.setenv("FASTPEFT_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="FASTPEFT_BACKEND"):
        ops.lora_linear(x, **parts)


def test_autocast_is_seen():
    x, parts = new(5, 24), lora()
    warm(x, parts)
    for _ in range(RUNS):
        with torch.autocast("cpu", torch.bfloat16):
            assert ops.lora_linear(x, **parts).dtype == torch.bfloat16
        assert ops.lora_linear(x, **parts).dtype == torch.float32


def test_x_may_not_be_changed_before_backward():
    x, parts = new(5, 24), lora()
    warm(x, parts)
    x = (x * 1).requires_grad_()
    held = x * 1
    y = ops.lora_linear(held, **parts)
    held.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_of_gradients_come_from_the_definition():
    x, parts = new(3, 24, dtype=torch.float64), lora(dtype=torch.float64)
    warm(x, parts)

    def op(x, a, b):
        return ops.lora_linear(x, parts["weight"], a, b)

    assert torch.autograd.gradgradcheck(op, (x, parts["lora_a"], parts["lora_b"]))
    (first,) = torch.autograd.grad(warm(x, parts).square().sum(), x, create_graph=True)
    assert first.requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant):
    x, parts = new(5, 24), lora()
    wanted = gradients(warm(x, parts), [x, *parts.values()])
    for _ in range(RUNS):
        leaf, own = (
            x.detach().requires_grad_(),
            {name: t.detach().requires_grad_(t.requires_grad) for name, t in parts.items()},
        )
        y = checkpoint(lambda v, own=own: ops.lora_linear(v, **own), leaf, use_reentrant=reentrant)
        y.square().sum().backward()
        assert same(wanted, [leaf.grad, own["lora_a"].grad, own["lora_b"].grad])


def test_saved_tensors_pass_hooks_and_are_let_go():
    x, parts, packed = new(5, 24), lora(), []
    warm(x, parts)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = ops.lora_linear(x, **parts)
    assert {tuple(t.shape) for t in packed} == {(5, 24), (5, 4), (40, 24), (4, 24), (40, 4)}
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_one_output_of_several():
    x = new(2, 5, 24)
    results = []
    for _ in range(RUNS):
        y, inputs = shared(x)
        results.append(torch.autograd.grad(y[..., 40:56].square().sum(), [x, inputs[2]]))
    assert all(same(results[0], result) for result in results)


def test_the_same_tensor_twice():
    x, a, b, w = new(5, 24), new(4, 24), new(40, 4), new(40, 24, grad=False)
    twice = [ops.lora_linear_shared(x, [w, w], [a, a], [b, b]) for _ in range(RUNS)]
    other = new(4, 24, seed=1)
    apart = [ops.lora_linear_shared(x, [w, w], [a, other], [b, b]) for _ in range(RUNS)]
    alone = [ops.lora_linear(x, w, own, b) for own in (a, other)]
    for ys in twice:
        assert torch.allclose(ys[1], alone[0])
    for ys in apart:
        torch.testing.assert_close(list(ys), alone)
    grads = [torch.autograd.grad(sum(y.sum() for y in ys), a) for ys in twice]
    assert all(same(grads[0], grad) for grad in grads)


def test_transforms_and_modes_go_through_python():
    x, parts = new(5, 24), lora()
    wanted = warm(x, parts)
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with counter:
        assert same([wanted], [ops.lora_linear(x, **parts)])
    assert counter.get_total_flops() > 0
    with pytest.raises(RuntimeError, match="setup_context|vmap|functorch"):
        torch.func.vmap(lambda v: ops.lora_linear(v, **parts))(x[None])


def test_many_threads():
    x, parts = new(5, 24), lora()
    wanted = warm(x, parts).detach()
    wrong = []

    def work():
        for _ in range(50):
            y = ops.lora_linear(x, **parts)
            gradients(y, [x, *parts.values()])
            if not torch.allclose(y, wanted, rtol=1e-5, atol=1e-5):  # a thread's first products may be cut otherwise
                wrong.append(y)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_plan_keeps_nothing_of_a_call():
    x, parts = new(5, 24), lora()
    warm(x, parts)
    y = ops.lora_linear(x, **parts)
    gone = [weakref.ref(t) for t in (x, y, *parts.values())]
    del x, y, parts
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
