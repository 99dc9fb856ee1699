"""A call that repeats runs as a plan, with the same bits as through Python; whatever changes between calls is seen."""

import gc
import weakref

import pytest
import torch

from fastpeft import _plan, _tape, ops
from tests.support import host_extension
from tests.support.planned_calls import (
    RUNS,
    bottleneck,
    dora,
    dora_mlp,
    experts,
    gradients,
    linear,
    lora,
    mixed,
    mlp,
    new,
    planned,
    rows,
    same,
    shared,
    warm,
)


@pytest.fixture(autouse=True, scope="module", params=host_extension.WAYS)
def _way(request):
    with host_extension.serves(request.param):
        yield


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
    "gated MLP": lambda: mlp(new(5, 24)),
    "gated MLP with DoRA": lambda: dora_mlp(new(2, 75, 24)),
    "gated MLP with DoRA, dropout": lambda: dora_mlp(new(150, 24), 0.5),
    "gated MLP in chunks": lambda: mlp(new(2, 75, 24)),
    "gated MLP in chunks, dropout, 16 bits": lambda: mlp(new(150, 24, dtype=torch.bfloat16), 0.5, torch.bfloat16),
    "DoRA": lambda: dora(new(5, 24)),
    "DoRA, trained bias, frozen A": lambda: dora(new(2, 5, 24), bias=True, lora_a=False),
    "DoRA, its norm given": lambda: dora(new(5, 24), norm=new(40, grad=False).abs()),
    "DoRA, dropout, 16 bits": lambda: dora(new(5, 24, dtype=torch.bfloat16), 0.5, torch.bfloat16),
    "multi_lora": lambda: mixed(new(5, 24)),
    "bottleneck": lambda: bottleneck(new(5, 24)),
    "rows": lambda: rows(new(5, 24)),
    "experts": lambda: experts(new(5, 24)),
    "experts, dropout": lambda: experts(new(5, 24), 0.5),
    "columns": lambda: rows(new(5, 24), columns=True),
}
THROUGH_PYTHON = {
    "multi_lora",
    "experts",
    "experts, dropout",
}  # on a CPU: the routing reads where each slot's tokens begin


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


def test_the_second_call_of_a_kind_is_planned():
    plans = planned(ops.lora_linear).plans
    x, parts = new(3, 24), lora(r=3)
    seen = []
    for _ in range(4):
        ops.lora_linear(x, **parts)
        seen.append(planned(ops.lora_linear).plans - plans)
    assert seen == [0, 1, 1, 1]


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
    planned(ops.lora_linear).clear()
    expected, inputs = CHANGES[name](x, parts)
    wanted = [expected, *gradients(expected, inputs)]
    warm(x, parts, scale=0.5)
    for _ in range(RUNS):
        found, inputs = CHANGES[name](x, parts)
        assert same(wanted, [found, *gradients(found, inputs)])
        warm(x, parts, scale=0.5)


def test_values_that_are_read_are_seen():
    """multi_lora on a CPU cuts its loops by the slots of the tokens, which are values."""
    x, a, b, scales = new(5, 24), new(3, 4, 24), new(3, 40, 4), torch.ones(3)
    for slots in ([0, 0, 1, 2, -1], [2, 1, 1, 0, 0], [-1, -1, -1, 2, 2]) * RUNS:
        y = ops.multi_lora(x, a, b, torch.tensor(slots), scales)
        alone = [torch.zeros(40) if s < 0 else x[t] @ a[s].T @ b[s].T for t, s in enumerate(slots)]
        torch.testing.assert_close(y, torch.stack(alone))


def test_reads_of_values_are_refused():
    x = torch.ones(3)
    past_the_dispatcher = lambda: x.tolist(), lambda: x.numpy()
    of_one = lambda: x.sum().item(), lambda: bool(x[0]), lambda: int(x[0])
    as_shapes = lambda: x[x > 0], lambda: x.nonzero(), lambda: x.unique(), lambda: x.masked_select(x > 0)
    for read in (*past_the_dispatcher, *of_one, *as_shapes):
        with _tape.Tape([x]) as tape:
            read()
        assert "read" in tape.refused


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


def test_a_plan_keeps_nothing_of_a_call():
    x, parts = new(5, 24), lora()
    warm(x, parts)
    y = ops.lora_linear(x, **parts)
    gone = [weakref.ref(t) for t in (x, y, *parts.values())]
    del x, y, parts
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
