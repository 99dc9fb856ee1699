"""Where the backward of a selection ends: at the lowest part that trains, under every kind of checkpointing."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from tests.support.models import t5
from tests.support.selections import IDS, bert, llama, loss_of


def nodes(tensor) -> set:
    found, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return found


def leaves(tensor) -> set[int]:
    return {id(node.variable) for node in nodes(tensor) if hasattr(node, "variable")}


def saved_bytes(model) -> int:
    parameters, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(model)
    del loss
    return sum(kept.values())


CHECKPOINTS = {"none": None, "not reentrant": False, "reentrant": True}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("make", [llama, bert])
def test_no_node_below_the_first_trained_block(make, reentrant):
    """The trunk does not take part in backward: its blocks are not even called again."""
    model = make()
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    selection = fastpeft.select(model, layers="last:2")
    calls = []
    stack = model.model.layers if hasattr(model, "model") else model.encoder.layer
    for block in stack[:-2]:
        inner = next(module for module in block.modules() if isinstance(module, nn.Linear))
        inner.register_forward_hook(lambda *_: calls.append(1))
    loss = loss_of(model)
    called = len(calls)
    assert called == len(stack) - 2
    if reentrant is None:
        assert leaves(loss) == {id(p) for p in selection.parameters()}
    loss.backward()
    assert len(calls) == called, "a frozen block was computed again in backward"
    grads = {name: p.grad for name, p in selection.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    plain = make()
    fastpeft.select(plain, layers="last:2")
    loss_of(plain).backward()
    for name, p in plain.fastpeft_selection.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)


@pytest.mark.filterwarnings("ignore")
def test_what_checkpoints_ask_of_the_embedding_is_taken_back_and_restored():
    """transformers makes the embedding's output require a gradient; that alone would keep the whole trunk."""
    model = llama()
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.model.embed_tokens.requires_grad_(False)  # so that nothing but what was asked makes its output require one
    assert model.model.embed_tokens(IDS).requires_grad
    selection = fastpeft.select(model, layers="last:1")
    trunk = []
    model.model.layers[4].register_forward_hook(
        lambda m, a, out: trunk.append(out[0] if isinstance(out, tuple) else out)
    )
    loss_of(model).backward()
    assert not trunk[0].requires_grad
    selection.revert()
    assert model.model.embed_tokens(IDS).requires_grad, "revert must give the user's setting back"


def test_saved_bytes_are_those_of_the_trained_blocks():
    model = llama()
    everything = saved_bytes(model)
    fastpeft.select(model, layers="last:2")
    assert saved_bytes(model) < 0.5 * everything  # two of six blocks, and the head


def test_plain_checkpoints_that_are_not_reentrant():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model = Model()
    fastpeft.select(model, layers="last:1")
    loss = model(torch.ones(2, 4)).sum()
    assert leaves(loss) <= {id(p) for p in model.blocks[2].parameters()}
    loss.backward()
    assert model.blocks[2][0].weight.grad is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_reentrant_checkpoints_of_two_stacks(stack):
    """Each stack has a first block of its own."""

    def gradients(checkpointed):
        model = t5(num_layers=3).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        selection = fastpeft.select(model, layers="last:2", blocks=f"{stack}.block")
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in selection.named_parameters()}

    found, wanted = gradients(True), gradients(False)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, msg=name)


class Handed(nn.Module):
    """Hands its blocks to a checkpoint function, as models of older versions of transformers do."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)])
        self._gradient_checkpointing_func = function

    def forward(self, x):
        for block in self.blocks:
            x = self._gradient_checkpointing_func(block.__call__, x)
        return x


REENTRANT = {"said": partial(checkpoint, use_reentrant=True), "left to PyTorch": partial(checkpoint)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", REENTRANT.values(), ids=REENTRANT)
def test_blocks_that_are_handed_to_a_reentrant_checkpoint(function):
    calls = []

    def wrapped(block, *args):
        calls.append((block.__self__, args[0].requires_grad))
        return function(block, *args)

    wrapped.keywords = function.keywords
    model = Handed(wrapped)
    selection = fastpeft.select(model, layers="last:2")
    loss = model(torch.ones(2, 4)).sum()
    loss.backward()
    assert calls == list(zip(model.blocks, [False, False, True, True], strict=True))
    plain = Handed(lambda block, *args: block(*args))
    plain(torch.ones(2, 4)).sum().backward()
    for name, parameter in selection.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)
    selection.revert()
    assert model._gradient_checkpointing_func is wrapped
