"""Chosen rows and tokens follow their parameter, however it, the weight or the layer were changed between two calls.

No version counter moves where somebody writes through ``.data`` or into the memory; a copy, a pickle and a parameter
that is put in another's place have counters of their own, which may show any number.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fastpeft
from fastpeft.nn import RowSparseLinear, TokenRows
from tests.support.models import llama, logits

ROWS = [1, 4]


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.table = TokenRows(nn.Embedding(6, 4, dtype=dtype), ROWS)
        self.lin = RowSparseLinear(nn.Linear(4, 6, dtype=dtype), columns=[0, 3])

    def forward(self, ids):
        return self.lin(self.table(ids))


IDS = torch.arange(6)


@torch.no_grad()
def right(model) -> bool:
    """Whether the model computes with what its parameters hold."""
    table, lin = model.table._parameters["weight"].clone(), model.lin._parameters["weight"].clone()
    table[ROWS] = model.table.trained.to(table.dtype)
    lin[:, [0, 3]] = model.lin.trained.to(lin.dtype)
    return torch.equal(model(IDS), nn.functional.linear(table[IDS], lin, model.lin.bias))


def slices(model):
    return model.table.trained, model.lin.trained


def through_data(model):
    for t in slices(model):
        t.data.add_(1)


def new_data(model):
    for t in slices(model):
        t.data = t.data + 1


def into_the_memory(model):
    for t in slices(model):
        t.detach().numpy()[...] += 1


def counted(model):
    with torch.no_grad():
        for t in slices(model):
            t.add_(1)


def replaced(model):
    for layer in (model.table, model.lin):
        layer.trained = nn.Parameter(layer.trained.detach() + 1)


def swapped(model):
    for layer in (model.table, model.lin):
        torch.utils.swap_tensors(layer.trained, nn.Parameter(layer.trained.detach() + 1))


def assigned(model):
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def applied(model):
    model._apply(lambda t: t + 1 if t.is_floating_point() else t)


def applied_to_new_parameters(model):
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        applied(model)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


WRITES = [through_data, new_data, into_the_memory, counted, replaced, swapped, assigned, applied]
each_write = pytest.mark.parametrize("write", [*WRITES, applied_to_new_parameters], ids=lambda write: write.__name__)


@each_write
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_follow(write, training, dtype):
    model = Net(dtype).train(training)
    for _ in range(2):
        before = model(IDS).detach()
        write(model)
        assert right(model)
        assert not torch.equal(model(IDS), before)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(_saved(model), weights_only=False),
    "AveragedModel": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


def _saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@each_write
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_rows_of_a_copy_follow(write, make, steps):
    """Whatever number its counter shows; the original stays what it is."""
    model = Net().eval()
    for _ in range(steps):
        counted(model)
        model(IDS)
    copied, before = make(model), model(IDS).detach()
    assert torch.equal(copied(IDS), before)
    write(copied)
    assert right(copied)
    assert torch.equal(model(IDS), before)
    write(model)
    assert right(model)
    assert right(copied)


def test_an_average_of_a_training_run():
    model = fastpeft.attach(llama(), fastpeft.Selective(tokens=[3, 7], rows={"up_proj": [0]}))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    plain, values = llama(), {}
    for _ in range(3):
        logits(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
        for name, value in model.state_dict().items():
            values[name] = value.clone() if name not in values else values[name].lerp(value, 0.5)
    plain.load_state_dict(values)
    with torch.no_grad():
        torch.testing.assert_close(logits(averaged.module), logits(plain))


@torch.no_grad()
def test_a_functional_call_leaves_the_layer_as_it_was():
    model = Net().eval()
    before = model(IDS)
    other = {name: value + 1 for name, value in model.named_parameters()}
    functional_call(model, other, (IDS,))
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("write", [assigned, applied_to_new_parameters, swapped], ids=lambda write: write.__name__)
def test_the_layers_come_out_with_the_parameters_that_the_model_has(write):
    """Others than went in, where loading or moving has put new ones in their place."""
    model = nn.Module()
    torch.manual_seed(0)
    model.table, model.lin = nn.Embedding(6, 4), nn.Linear(4, 6)
    rows = fastpeft.Selective(tokens={"table": ROWS}, columns={"lin": [0, 3]})
    fastpeft.attach(model, rows, "a")
    originals = model.fastpeft_attachment.records["selective"].changes.of["a"].rows
    write(model)
    parameters = [model.table.stored, model.lin.stored, model.lin.bias]
    fastpeft.detach(model)
    assert all(a is b for a, b in zip(parameters, [model.table.weight, model.lin.weight, model.lin.bias], strict=True))
    assert torch.equal(model.table.weight[ROWS], originals["table"])
    assert torch.equal(model.lin.weight[:, [0, 3]], originals["lin"])


def test_a_weight_that_is_assigned_to_a_model_without_memory():
    with torch.device("meta"):
        layer = RowSparseLinear(nn.Linear(4, 6), rows=ROWS)
    layer.index = torch.tensor(ROWS)
    weight = torch.randn(6, 4)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(6)}, assign=True)
    assert torch.equal(layer.trained, weight[ROWS])
    with torch.no_grad():
        layer.trained.add_(1)
    assert torch.equal(layer.weight[ROWS], layer.trained)
