"""RowSparseLinear and TokenRows: they train as the whole weight would, and the weight always holds what was trained."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastpeft.nn import RowSparseLinear, TokenRows
from tests.support.backends import DEVICE

ROWS = [1, 4, 9]
each_form = pytest.mark.parametrize("form", ["rows", "columns"])


def layer(form, **options) -> RowSparseLinear:
    torch.manual_seed(0)
    return RowSparseLinear(nn.Linear(10, 12, device=DEVICE), **{form: ROWS}, **options)


def chosen(weight, form):
    return weight[ROWS] if form == "rows" else weight[:, ROWS]


def whole_weight_training(form, optimizer, steps, batches=1):
    """The same by hand: the gradient of the whole weight, zero where it is not chosen."""
    torch.manual_seed(0)
    linear = nn.Linear(10, 12, device=DEVICE)
    mask = torch.zeros_like(linear.weight)
    chosen_mask = mask[ROWS] if form == "rows" else mask[:, ROWS]
    mask.index_copy_(0 if form == "rows" else 1, torch.tensor(ROWS, device=DEVICE), chosen_mask + 1)
    linear.weight.register_hook(lambda grad: grad * mask)
    linear.bias.requires_grad_(False)
    return train(linear, optimizer([linear.weight]), steps, batches), linear


def train(model, optimizer, steps, batches=1):
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(batches):
            loss = model(torch.randn(7, 10, device=DEVICE)).square().mean()
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.9)


class ThroughData(torch.optim.Optimizer):
    """Writes as some optimizers outside PyTorch do: no version counter moves."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.data.add_(parameter.grad.data, alpha=-0.5)


OPTIMIZERS = {
    "sgd": sgd,
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0, fused=True),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0, foreach=True),
    "through .data": ThroughData,
}


@each_form
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("batches", [1, 3])  # gradients accumulated over three
def test_trains_as_the_whole_weight_would(form, optimizer, batches):
    ours, optimizer = layer(form), OPTIMIZERS[optimizer]
    found = train(ours, optimizer([ours.trained]), 5, batches)
    wanted, linear = whole_weight_training(form, optimizer, 5, batches)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ours.weight, linear.weight)
    assert not torch.equal(ours.weight, layer(form).weight)


@each_form
def test_everybody_sees_the_trained_weight(form):
    """After a step and before the next forward: the attribute, the state dict, a copy, evaluation."""
    ours = layer(form)
    before = ours.weight.clone()
    train(ours, ThroughData([ours.trained]), 1)
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    assert list(state) == ["weight", "bias"]
    with torch.no_grad():
        ours.trained.data.add_(0)
    copied = copy.deepcopy(ours)
    for weight in (state["weight"], ours.weight, copied.weight):
        assert torch.equal(chosen(weight, form), ours.trained)
        assert (weight != before).sum() <= ours.trained.numel()
        assert not torch.equal(weight, before)
    ours.eval()
    x = torch.randn(3, 10, device=DEVICE)
    with torch.no_grad():
        assert torch.equal(ours(x), nn.functional.linear(x, state["weight"], ours.bias))
    copied.trained.data.zero_()
    assert not torch.equal(copied.trained, ours.trained), "the copy shares its parameter"


@each_form
def test_the_state_dict_is_the_base_layers(form):
    ours, other = layer(form), nn.Linear(10, 12, device=DEVICE)
    ours.load_state_dict(other.state_dict())
    assert torch.equal(ours.trained, chosen(other.weight, form))
    other.load_state_dict(layer(form).state_dict())
    half = RowSparseLinear(nn.Linear(10, 12, dtype=torch.bfloat16), **{form: ROWS})
    assert half.trained.dtype == torch.float32
    with torch.no_grad():
        half.trained.add_(1e-3)
    again = RowSparseLinear(nn.Linear(10, 12, dtype=torch.bfloat16), **{form: ROWS})
    again.load_state_dict(half.state_dict())
    assert torch.equal(again.trained, half.trained), "a float32 master lost bits"
    assert torch.equal(again.weight, half.weight)


def test_micro_batches_may_interleave():
    """Forward 1, forward 2, backward 1, forward 3, backward 2, backward 3, as a pipeline does."""
    ours = layer("rows")
    x = [torch.randn(4, 10, device=DEVICE, requires_grad=True) for _ in range(3)]
    one, two = ours(x[0]).sum(), ours(x[1]).sum()
    one.backward()
    three = ours(x[2]).sum()
    two.backward()
    three.backward()
    assert torch.allclose(ours.trained.grad, sum(t.detach().sum(0) for t in x).expand(3, 10))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    """Two uses of one layer in a checkpoint: the same gradients, and the weight stays."""
    grads = []
    for run in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        ours = layer("rows", dtype=torch.float64)
        ours = RowSparseLinear(nn.Linear(10, 10, device=DEVICE), rows=ROWS)
        with torch.no_grad():
            ours._parameters["weight"].copy_(torch.arange(100.0).view(10, 10) / 100)
            ours.trained.copy_(ours._parameters["weight"][ROWS])
        x = torch.ones(4, 10, device=DEVICE, requires_grad=True)
        run(lambda t, ours=ours: ours(ours(t).tanh()), x).sum().backward()
        grads.append((ours.trained.grad, x.grad))
    for one, other in zip(*grads, strict=True):
        assert torch.equal(one, other)


def test_compiled_training_is_the_eager_one():
    torch._dynamo.reset()
    ours, compiled = layer("rows"), layer("rows")
    function = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    found = train(function, torch.optim.SGD([compiled.trained], lr=0.5), 3)
    assert found == train(ours, torch.optim.SGD([ours.trained], lr=0.5), 3)
    assert torch.equal(compiled.weight, ours.weight)


def test_conv1d():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    for form in ("rows", "columns"):
        torch.manual_seed(0)
        conv = Conv1D(12, 10).to(DEVICE)
        linear = nn.Linear(10, 12, device=DEVICE)
        linear.weight.data, linear.bias.data = conv.weight.data.T.clone(), conv.bias.data.clone()
        ours, theirs = RowSparseLinear(conv, **{form: ROWS}), RowSparseLinear(linear, **{form: ROWS})
        assert train(ours, sgd([ours.trained]), 3) == pytest.approx(train(theirs, sgd([theirs.trained]), 3))
        torch.testing.assert_close(ours.weight, theirs.weight.T)


# tokens

TOKENS = [3, 0, 7]


def test_token_rows_get_the_gradient_of_the_whole_table():
    torch.manual_seed(0)
    table = nn.Embedding(9, 5, device=DEVICE)
    ours = TokenRows(copy.deepcopy(table), TOKENS)
    ids = torch.randint(9, (4, 11), device=DEVICE)
    dy = torch.randn(4, 11, 5, device=DEVICE)
    y = ours(ids)
    assert torch.equal(y, table(ids))
    y.backward(dy)
    table(ids).backward(dy)
    torch.testing.assert_close(ours.trained.grad, table.weight.grad[sorted(TOKENS)])
    assert ours.weight.grad is None


def test_token_rows_absent_from_the_batch_and_empty_batches():
    ours = TokenRows(nn.Embedding(9, 5, device=DEVICE), [8])
    for ids in (torch.tensor([[1, 2]], device=DEVICE), torch.empty(0, 3, dtype=torch.long, device=DEVICE)):
        ours.trained.grad = None
        ours(ids).sum().backward()
        assert not ours.trained.grad.any()


def test_token_rows_tied_to_the_output_layer():
    """Both sides' gradients, and both see what was trained."""

    def model(tie):
        torch.manual_seed(0)
        table, head = nn.Embedding(9, 5, device=DEVICE), nn.Linear(5, 9, bias=False, device=DEVICE)
        head.weight = table.weight
        if not tie:
            return table, head, [table.weight]
        rows = TokenRows(table, TOKENS)
        return rows, RowSparseLinear(head, rows=TOKENS, trained=rows.trained), [rows.trained]

    ids = torch.tensor([[3, 1, 7, 7]], device=DEVICE)
    weights = []
    for tie in (True, False):
        table, head, parameters = model(tie)
        if not tie:
            keep = torch.zeros(9, 1, device=DEVICE).index_fill_(0, torch.tensor(TOKENS, device=DEVICE), 1)
            table.weight.register_hook(lambda grad, keep=keep: grad * keep)
        optimizer = torch.optim.SGD(parameters, lr=0.3)
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(table(ids).tanh())[0], ids[0]).backward()
            optimizer.step()
        weights.append(table.weight.detach().clone())
    torch.testing.assert_close(*weights)


def test_token_rows_of_a_16_bit_table_have_float32_masters():
    ours = TokenRows(nn.Embedding(9, 5, dtype=torch.bfloat16, device=DEVICE), TOKENS)
    ours(torch.full((1000,), 3, device=DEVICE)).float().sum().backward()
    assert (ours.trained.grad[1] == 1000).all()  # bfloat16 counts to 256
    with torch.no_grad():
        ours.trained.add_(1e-5)
    assert torch.equal(ours(torch.tensor([3], device=DEVICE))[0], ours.trained[1].bfloat16())


def test_token_rows_compile():
    torch._dynamo.reset()
    ours = TokenRows(nn.Embedding(9, 5, device=DEVICE), TOKENS)
    ids = torch.tensor([[3, 1, 7, 7]], device=DEVICE)
    torch.compile(ours, fullgraph=True, backend="aot_eager")(ids).sum().backward()
    assert ours.trained.grad.sum(1).tolist() == [0, 5, 10]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: RowSparseLinear(nn.Conv1d(1, 1, 1), rows=[0]), TypeError, "base_layer is a Conv1d"),
        (lambda: RowSparseLinear(nn.Linear(2, 3)), ValueError, "expected either rows or columns"),
        (lambda: RowSparseLinear(nn.Linear(2, 3), rows=[0], columns=[0]), ValueError, "expected either"),
        (lambda: RowSparseLinear(nn.Linear(2, 3), rows=[3]), ValueError, r"rows has 3, expected integers in \[0, 3\)"),
        (lambda: RowSparseLinear(nn.Linear(2, 3), columns=[2]), ValueError, "columns has 2"),
        (lambda: RowSparseLinear(nn.Linear(2, 3), rows=[0, -3]), ValueError, "rows has 2 numbers of which 1 differ"),
        (lambda: RowSparseLinear(nn.Linear(2, 3), rows=[]), ValueError, "rows has 0 numbers"),
        (lambda: RowSparseLinear(nn.Linear(2, 3), rows=[True]), TypeError, "rows has True"),
        (lambda: TokenRows(nn.Linear(2, 3), [0]), TypeError, "base_layer is a Linear"),
        (lambda: TokenRows(nn.Embedding(4, 2, max_norm=1.0), [0]), TypeError, "max_norm"),
        (lambda: TokenRows(nn.Embedding(4, 2, padding_idx=1), [0, 1]), ValueError, "the padding"),
        (lambda: TokenRows(nn.Embedding(4, 2), [4]), ValueError, "tokens has 4"),
    ],
)
def test_bad_calls(make, error, message):
    with pytest.raises(error, match=message):
        make()
