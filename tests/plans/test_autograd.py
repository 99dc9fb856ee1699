"""A plan is one node of autograd: hooks, checkpoints, gradients of gradients, transforms and threads are as before."""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastpeft import ops
from tests.support import host_extension
from tests.support.planned_calls import RUNS, gradients, lora, new, planned, same, shared, warm


@pytest.fixture(autouse=True, scope="module", params=host_extension.WAYS)
def _way(request):
    with host_extension.serves(request.param):
        yield


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
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)])
def test_checkpointing(reentrant, shape):
    """What is computed again may be a plan where the first time was not, and keeps the same."""
    x, parts = new(*shape), lora()
    wanted = gradients(warm(x, parts), [x, *parts.values()])
    planned(ops.lora_linear).clear()
    for _ in range(RUNS):
        leaf, own = (
            x.detach().requires_grad_(),
            {name: t.detach().requires_grad_(t.requires_grad) for name, t in parts.items()},
        )
        y = checkpoint(lambda v, own=own: ops.lora_linear(v, **own), leaf, use_reentrant=reentrant)
        y.square().sum().backward()
        assert same(wanted, [leaf.grad, own["lora_a"].grad, own["lora_b"].grad])


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)])
def test_saved_tensors_pass_hooks_and_are_let_go(shape):
    x, parts, kept = new(*shape), lora(), []
    planned(ops.lora_linear).clear()
    for _ in range(RUNS):
        packed: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=packed: to.append(t) or t, lambda t: t):
            y = ops.lora_linear(x, **parts)
        kept.append([(t.shape, t.stride(), t.dtype) for t in packed])
    assert all(found == kept[0] for found in kept)
    assert len(kept[0]) == 6
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


def test_transforms_and_modes_go_through_python():
    x, parts = new(5, 24), lora()
    wanted = warm(x, parts)
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
