"""lora_mlp under gradient checkpoints: no product runs in vain, and masks and bits are those without."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from fastpeft import ops
from fastpeft.ops import lora_mlp_promise
from tests.support import host_extension
from tests.support.quantised_mlps import problem


class Products(TorchDispatchMode):
    """Counts those with a dense weight."""

    def __init__(self, weights: tuple[Tensor, ...]):
        super().__init__()
        self.places, self.count = {w.untyped_storage().data_ptr() for w in weights}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)]
        self.count += func.name().startswith(("aten::mm", "aten::addmm")) and any(g in self.places for g in given)
        return func(*args, **(kwargs or {}))


def net(p, after, before=None):
    """A block that ends in its MLP, or in what ``after`` is."""
    a, b = ([t.clone().requires_grad_() for t in ts] for ts in (p.lora_as, p.lora_bs))

    def call(x):
        inside = x.sin() if before is None else before(x)
        return after(ops.lora_mlp(inside, p.weights, a, b, p.biases, p.scales, p.dropouts, backend="reference"))

    return call, [*a, *b]


@pytest.mark.parametrize(
    ("way", "forward", "backward"),
    [
        ({"use_reentrant": False}, 3, 0 + 2 + 3),
        ({"use_reentrant": True}, 3, 3 + 3),
        (None, 3, 3),
    ],
    ids=["not reentrant", "reentrant", "none"],
)
@pytest.mark.parametrize("saves", [False, True])
def test_products_that_run(way, forward, backward, saves, cut):
    """The MLP is not computed in the recomputation where nothing after it is kept."""
    p = problem(dropout=0.5)
    call, _ = net(p, torch.cos if saves else torch.neg)
    x = p.x.clone().requires_grad_()
    with Products(p.weights) as products:
        y = call(x) if way is None else checkpoint(call, x, **way)
        assert products.count == forward
        y.sum().backward()
    again = 3 if saves and way == {"use_reentrant": False} else 0
    assert products.count == forward + backward + again


@pytest.mark.parametrize("host", host_extension.WAYS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("after", [torch.neg, torch.cos], ids=lambda f: f.__name__)
@pytest.mark.parametrize("stop", [True, False])
def test_checkpoints_draw_the_same_masks(host, reentrant, after, stop, cut):
    """Of several blocks, so that recomputation runs as a plan too; the same bits as without a checkpoint."""
    p, results = problem(dropout=0.5, sizes=(32, 64, 32)), []
    with host_extension.serves(host), set_checkpoint_early_stop(stop):
        blocks = [net(p, after) for _ in range(3)]
        for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)) * 3:
            torch.manual_seed(11)
            leaf = p.x.clone().requires_grad_()
            y = leaf
            for block, _ in blocks:
                y = run(block, y)
            y.sum().backward()
            parameters = [t for _, own in blocks for t in own]
            results.append([y.detach(), leaf.grad, *(t.grad for t in parameters)])
            for t in parameters:
                t.grad = None
    for result in results[1:]:
        assert all(map(torch.equal, results[0], result))


def test_when_it_pays():
    """Under the hooks of a checkpoint, unless it is reentrant, and of offloading; others see what is kept without."""
    seen = []

    def look(x):
        seen.append((torch.is_grad_enabled(), lora_mlp_promise.pays()))
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    assert not lora_mlp_promise.pays()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert not lora_mlp_promise.pays()
    with torch.autograd.graph.save_on_cpu():
        assert lora_mlp_promise.pays()
    for reentrant, wanted in ((False, [(True, True)] * 2), (True, [(False, False), (True, False)])):
        checkpoint(look, x, use_reentrant=reentrant).sum().backward()
        assert seen == wanted
        seen.clear()
