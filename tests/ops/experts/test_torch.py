"""experts among PyTorch's machinery: opcheck and torch.compile."""

import pytest
import torch
import torch._dynamo.testing

from fastpeft.ops import experts
from fastpeft.ops.experts import _operands
from fastpeft.ops.experts_arguments import routing
from fastpeft.testing import ExpertsProblem
from tests.support.backends import BACKENDS, DEVICE

each_backend = pytest.mark.parametrize("backend", BACKENDS)


@each_backend
@pytest.mark.parametrize("up", [True, False])
@pytest.mark.parametrize("adapted", [True, False])
def test_opcheck(backend, up, adapted):
    # Every row has an expert: rows without hold anything, and opcheck compares them.
    index = torch.tensor([[0, 2], [1, 2], [2, 0]])
    p = ExpertsProblem.make(
        3, 6, 4, 3, 2, (3, 2) if adapted else (None, None), dropout=0.25, index=index, device=DEVICE
    )
    linear, weights = (p.up, p.x.new_empty(0)) if up else (p.down, p.top_k_weights)
    x = p.x if up else torch.randn(6, 4, device=DEVICE)
    tokens, places, rows = routing(p.top_k_index, 3, 16, backend)
    operands = _operands(x, linear, weights, p.seeds[0 if up else 1], [tokens, places, *rows[:3]], 16)
    *tensors, seeds, tables, scale, dropout, tile = operands
    leaves = [t.clone().requires_grad_(bool(t.numel())) for t in tensors]
    settings = scale, dropout, tile, up, backend
    torch.library.opcheck(torch.ops.fastpeft.expert_linear.default, (*leaves, seeds, tables, *settings))
    needs = [bool(t.numel()) for t in tensors]
    dy = torch.randn(6 if up else 3, linear.weight.shape[1], device=DEVICE)
    s = torch.randn(6, linear.lora_a.shape[1], device=DEVICE) if adapted else x.new_empty(0)
    args = dy, x, s, *tensors[1:], seeds, tables, needs, *settings
    torch.library.opcheck(torch.ops.fastpeft.expert_linear_backward.default, args)


@each_backend
def test_compiled_gradients_are_the_eager_ones(backend):
    """One graph for every number of tokens of one path; routing and activation are part of it."""
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def function(x, index, weights, up, down, activation, seeds):
        return experts(x.sin(), index, weights, up, down, activation, seeds, backend, tile=16).tanh()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=graphs)
    for tokens in (9, 17, 40):
        p = ExpertsProblem.make(tokens, 12, 6, 4, 2, (4, 3), dropout=0.25, device=DEVICE)
        eager, found = (
            p.differentiate(lambda *args, f=f, p=p: f(*args, p.activation, p.seeds)) for f in (function, compiled)
        )
        assert all(torch.equal(eager[name], found[name]) for name in eager)
    assert len([graph for graph in graphs.graphs if len(graph.graph.nodes)]) == 1
