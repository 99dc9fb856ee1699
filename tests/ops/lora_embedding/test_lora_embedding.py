"""lora_embedding: exact on integers, no less accurate than PyTorch, exact gradients, in the batch's tokens alone."""

import pytest
import torch
import torch.nn.functional as F

from fastpeft import ops, reference
from fastpeft.testing import assert_no_worse, guarded, poisoned
from tests.support.backends import BACKENDS, BF16, DEVICE, FP16, FP32, FP64, TRAINING

V, D, R, ROWS = 41, 150, 5, (3, 23)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
tabled = pytest.mark.parametrize("tabled", [True, False], ids=["table", "no table"])


def served(*dtypes):
    found = []
    for backend in BACKENDS:
        for dtype, adapter in dtypes or ((FP64, FP64), *TRAINING):
            if backend == "reference" or DEVICE.type == "cpu" or FP64 not in (dtype, adapter):
                found.append(pytest.param(backend, dtype, adapter, id=f"{backend}-{dtype}-{adapter}"))
    return found


def operands(dtype=FP32, adapter=None, rank=R, rows=ROWS, integers=False):
    g, adapter = torch.Generator().manual_seed(0), adapter or dtype

    def draw(*shape, kind):
        values = torch.randint(-1, 2, shape, generator=g) if integers else torch.randn(shape, generator=g)
        return values.to(DEVICE, kind)

    ids = torch.randint(V // 2, rows, generator=g).to(DEVICE)  # so that ids repeat, and many are not there
    table, a, b = draw(V, D, kind=dtype), draw(rank, V, kind=adapter), draw(D, rank, kind=adapter)
    return ids, table, a.requires_grad_(), b.requires_grad_(), draw(*rows, D, kind=dtype)


def computed(function, ids, table, a, b, dy, *rest):
    y = function(ids, table, a, b, *rest)
    return y.detach(), *torch.autograd.grad(y, [a, b], dy.to(y.dtype))


@tabled
@pytest.mark.parametrize("rank", [1, R, 40])
@pytest.mark.parametrize(("backend", "dtype", "adapter"), served())
def test_integers_are_exact(backend, dtype, adapter, rank, tabled):
    ids, table, a, b, dy = operands(dtype, adapter, rank, integers=True)
    table = table if tabled else None
    found = computed(ops.lora_embedding, ids, table, a, b, dy, 0.5, 3, backend)
    exact = [None if t is None else t.double().detach() for t in (table, a, b, dy)]
    leaves = [t.requires_grad_() for t in exact[1:3]]
    wanted = computed(reference.lora_embedding, ids, exact[0], *leaves, exact[3], 0.5, 3)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other.to(one.dtype))
        assert one.is_contiguous()
    assert found[0].dtype == (dtype if tabled else adapter)


@pytest.mark.parametrize(("backend", "dtype", "adapter"), served(*TRAINING))
def test_no_less_accurate_than_pytorch(backend, dtype, adapter):
    """Than PEFT's formula at the same dtypes."""

    def eager(ids, table, a, b, scale, padding):
        low = (F.embedding(ids, a.T, padding) @ b.T) * scale
        return (F.embedding(ids, table) + low).to(table.dtype)

    given = operands(dtype, adapter)
    truth = [given[0], *(t.detach().double() for t in given[1:])]
    truth = [t.requires_grad_() if i in (2, 3) else t for i, t in enumerate(truth)]
    found = computed(ops.lora_embedding, *given, 0.7, 3, backend)
    for name, one, other, right in zip(
        ("y", "dA", "dB"), found, computed(eager, *given, 0.7, 3), computed(eager, *truth, 0.7, 3), strict=True
    ):
        assert_no_worse(one, other, right, name)


@each_backend
@tabled
def test_gradcheck(backend, tabled):
    if DEVICE.type == "cuda" and backend == "triton":
        pytest.skip("float64 is for the interpreter")
    ids, table, a, b, _ = operands(FP64, rows=(7,))
    table = table if tabled else None

    def call(a, b):
        return ops.lora_embedding(ids, table, a, b, 0.7, None, backend)

    assert torch.autograd.gradcheck(call, [a, b], fast_mode=True)
    assert torch.autograd.gradgradcheck(call, [a, b], fast_mode=True)


@each_backend
def test_da_is_in_the_tokens_of_the_batch(backend):
    ids, table, a, b, dy = operands()
    y = ops.lora_embedding(ids, table, a, b, 1.0, int(ids[0, 0]), backend)
    (da,) = torch.autograd.grad(y, a, dy)
    there = torch.zeros(V, dtype=torch.bool, device=DEVICE)
    there[ids.unique()] = True
    there[ids[0, 0]] = False  # the padding's gets none
    assert (da[:, there] != 0).all()
    assert (da[:, ~there] == 0).all()


@each_backend
@pytest.mark.parametrize("frozen", ["a", "b"])
def test_one_of_the_two_is_trained(backend, frozen):
    ids, table, a, b, dy = operands(integers=True)
    wanted = dict(zip("ab", torch.autograd.grad(ops.lora_embedding(ids, table, a, b), [a, b], dy), strict=True))
    left = {"a": a, "b": b}
    left.pop(frozen)
    operand = {"a": a, "b": b, frozen: {"a": a, "b": b}[frozen].detach()}
    y = ops.lora_embedding(ids, table, operand["a"], operand["b"], backend=backend)
    ((name, leaf),) = left.items()
    assert torch.equal(torch.autograd.grad(y, leaf, dy)[0], wanted[name])


@each_backend
def test_nothing_is_read_or_written_outside(backend):
    ids, *rest = operands(integers=True)
    wanted, checks, inside = computed(ops.lora_embedding, ids, *rest, 0.5, None, "reference"), [], []
    for tensor in (t.detach() for t in rest):
        view, check = guarded(tensor)
        inside.append(view)
        checks.append(check)
    table, a, b, dy = inside
    with poisoned():
        found = computed(ops.lora_embedding, ids, table, a.requires_grad_(), b.requires_grad_(), dy, 0.5, None, backend)
    for check in checks:
        check()
    assert all(map(torch.equal, found, wanted))


@each_backend
@pytest.mark.parametrize("which", range(4))
def test_any_strides_and_the_same_bits(backend, which):
    given = list(operands(FP16, FP32))
    wanted = computed(ops.lora_embedding, *given, 0.5, None, backend)
    t = given[which].detach()
    wide = torch.empty(*(2 * n + 1 for n in t.shape), dtype=t.dtype, device=DEVICE)
    view = wide[tuple(slice(0, 2 * n, 2) for n in t.shape)].copy_(t)
    given[which] = view.requires_grad_(which in (2, 3))
    for _ in range(3):
        assert all(map(torch.equal, computed(ops.lora_embedding, *given, 0.5, None, backend), wanted))


@each_backend
def test_no_tokens_and_narrow_ids(backend):
    ids, table, a, b, _ = operands()
    empty = ops.lora_embedding(ids[:0], table, a, b, backend=backend)
    assert empty.shape == (0, ROWS[1], D)
    assert not any(g.any() for g in torch.autograd.grad(empty.sum(), [a, b]))
    narrow = ops.lora_embedding(ids.int(), table, a, b, backend=backend)
    assert torch.equal(narrow, ops.lora_embedding(ids, table, a, b, backend=backend))


@each_backend
def test_opcheck_and_compiled(backend):
    ids, table, a, b, _ = operands(rows=(9,))
    torch.library.opcheck(torch.ops.fastpeft.lora_embedding.default, (ids, table, a, b, 0.5, 3, backend))

    def function(a, b):
        return ops.lora_embedding(ids, table, a, b, 0.5, 3, backend).tanh().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    wanted = torch.autograd.grad(function(a, b), [a, b])
    assert all(map(torch.equal, torch.autograd.grad(compiled(a, b), [a, b]), wanted))


def test_only_ids_and_s_are_kept():
    ids, table, a, b, _ = operands(BF16, FP32)
    known, kept = {t.untyped_storage().data_ptr() for t in (ids, table, a, b)}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = ops.lora_embedding(ids, table, a, b)
    assert y.requires_grad
    assert sum(kept.values()) == ids.numel() * R


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids": [1, 2]}, TypeError, "ids is a list of 2"),
        ({"ids": torch.ones(2)}, TypeError, "ids is torch.float32"),
        ({"lora_b": torch.ones(D, R + 1)}, ValueError, f"lora_b has r={R + 1}, expected r={R}"),
        ({"table": torch.ones(V + 1, D)}, ValueError, f"table has V={V + 1}, expected V={V}"),
        ({"table": torch.ones(V, D, requires_grad=True)}, ValueError, "table requires a gradient"),
        ({"table": torch.ones(V, D, dtype=FP64)}, TypeError, "lora_a has dtype torch.float32"),
        ({"padding_idx": V}, ValueError, f"padding_idx is {V}, expected 0 ... {V - 1}"),
        ({"lora_a": torch.ones(0, V), "lora_b": torch.ones(D, 0)}, ValueError, "lora_a has r=0"),
    ],
)
def test_bad_calls(change, error, message):
    change = {name: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for name, t in change.items()}
    if "table" in change and change["table"].requires_grad:
        change["table"] = change["table"].detach().requires_grad_()
    ids, table, a, b, _ = operands()
    with pytest.raises(error, match=f"^lora_embedding: {message}"):
        ops.lora_embedding(**{"ids": ids, "table": table, "lora_a": a.detach(), "lora_b": b.detach(), **change})
