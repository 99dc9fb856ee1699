"""Everything public that has code for a GPU runs on one: every op in every dtype, forward and backward, every module
and method. Values are nothing here; what raises on the null GPU would raise on the first real one."""

import pytest
import torch
from torch import nn

import fastpeft
from bench.nullgpu import counted, reads_zero
from bench.nullgpu.build import build
from bench.nullgpu.extension import build_extension, show
from fastpeft import ops


@pytest.fixture(autouse=True)
def _zeros():
    """What the host reads is zero, rather than what lay in the memory before."""
    with reads_zero():
        yield


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SLOTS, RANK, WIDE, OUT, ROWS = 3, 8, 64, 48, 32


def tensor(*sizes, dtype=torch.float32, grad=True):
    return torch.zeros(*sizes, dtype=dtype, device="cuda", requires_grad=grad)


def ids(*sizes):
    return torch.zeros(*sizes, dtype=torch.long, device="cuda")


def backward(*ys):
    torch.autograd.backward([y for y in ys if y.requires_grad], [torch.zeros_like(y) for y in ys if y.requires_grad])


def adapters_of(dtype):
    """Adapters are of the base's dtype, or float32 beside a base of 16 bits."""
    return [dtype, torch.float32] if dtype.itemsize == 2 else [dtype]


PAIRS = [(dtype, adapters) for dtype in DTYPES for adapters in adapters_of(dtype)]
each_pair = pytest.mark.parametrize(("dtype", "adapters"), PAIRS, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_autocast = pytest.mark.parametrize("autocast", [False, True])


@each_pair
@each_autocast
def test_lora_linear(dtype, adapters, autocast):
    x, w, bias = tensor(ROWS, WIDE, dtype=dtype), tensor(OUT, WIDE, dtype=dtype, grad=False), tensor(OUT, dtype=dtype)
    a, b = tensor(RANK, WIDE, dtype=adapters), tensor(OUT, RANK, dtype=adapters)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        for dropout in (0.0, 0.1):
            backward(ops.lora_linear(x, w, a, b, bias, 2.0, dropout))
            backward(*ops.lora_linear_shared(x, [w, w, None], [a] * 3, [b] * 3, dropouts=[dropout, 0.0, dropout]))


@each_pair
def test_multi_lora(dtype, adapters):
    x, y = tensor(ROWS, WIDE, dtype=dtype), tensor(ROWS, OUT, dtype=dtype)
    a, b = tensor(SLOTS, RANK, WIDE, dtype=adapters), tensor(SLOTS, OUT, RANK, dtype=adapters)
    slots = torch.arange(ROWS, device="cuda") % (SLOTS + 1) - 1
    scales = tensor(SLOTS, dtype=torch.promote_types(dtype, torch.float32), grad=False)
    ranks = torch.full((SLOTS,), RANK, dtype=torch.int32, device="cuda")
    for routing in (slots, ops.route(slots, SLOTS), ops.route(slots, SLOTS, tile=64)):
        backward(ops.multi_lora(x, a, b, routing, scales, ranks, y))
        backward(ops.multi_lora(x, a, b, routing, scales, dropouts=[0.1, 0.0, 0.5]))
        backward(*ops.multi_lora_shared(x, [a, a], [b, b], routing, scales, ranks))
        with torch.no_grad():
            ops.multi_lora_(y.detach(), x, a, b, routing, scales, ranks)


@each_pair
@pytest.mark.parametrize(("norm", "activation"), [(None, "relu"), ("layer", "gelu"), ("rms", "silu")])
def test_bottleneck(dtype, adapters, norm, activation):
    x, residual = tensor(ROWS, WIDE, dtype=dtype), tensor(ROWS, WIDE, dtype=dtype)
    for lead, slots in (((), None), ((SLOTS,), torch.arange(ROWS, device="cuda") % SLOTS)):
        down, d = tensor(*lead, RANK, WIDE, dtype=adapters), tensor(*lead, RANK, dtype=adapters)
        up, u = tensor(*lead, WIDE, RANK, dtype=adapters), tensor(*lead, WIDE, dtype=adapters)
        weight = None if norm is None else tensor(*lead, WIDE, dtype=adapters)
        settings = {"norm_weight": weight, "norm": norm or "layer", "slots": slots}
        backward(ops.bottleneck(x, down, d, up, u, residual, activation, 0.5, dropout=0.1, **settings))
        backward(ops.bottleneck(x, down, None, up, None, None, **settings))


@each_pair
def test_row_linear(dtype, adapters):
    x, w, bias = tensor(ROWS, WIDE, dtype=dtype), tensor(OUT, WIDE, dtype=dtype, grad=False), tensor(OUT, dtype=dtype)
    index = torch.arange(5, device="cuda")
    backward(ops.row_linear(x, w, tensor(5, WIDE, dtype=adapters), index, bias))
    backward(ops.row_linear(x, w, tensor(OUT, 5, dtype=adapters), index, columns=True))


@each_pair
def test_prompt_gather(dtype, adapters):
    prompts, mask = [tensor(4, WIDE, dtype=adapters), tensor(2, WIDE, dtype=adapters)], ids(3, 6) + 1
    embedding = tensor(10, WIDE, dtype=dtype, grad=False)
    for which in ([0, 1, None], torch.tensor([0, 1, 0], device="cuda")):
        found = ops.prompt_gather(prompts, which, ids(3, 6), embedding, attention_mask=mask, labels=ids(3, 6))
        backward(found.inputs_embeds if hasattr(found, "inputs_embeds") else found[0])


@each_pair
def test_experts(dtype, adapters):
    x, index, weights = tensor(ROWS, WIDE, dtype=dtype), ids(ROWS, 2), tensor(ROWS, 2)
    a = [tensor(SLOTS, RANK, WIDE, dtype=adapters), tensor(SLOTS, RANK, OUT, dtype=adapters)]
    b = [tensor(SLOTS, 2 * OUT, RANK, dtype=adapters), tensor(SLOTS, WIDE, RANK, dtype=adapters)]
    up, down = tensor(SLOTS, 2 * OUT, WIDE, dtype=dtype), tensor(SLOTS, WIDE, OUT, dtype=dtype)
    for dropout in (0.0, 0.1):
        first = ops.ExpertLinear(up, tensor(SLOTS, 2 * OUT, dtype=dtype), a[0], b[0], 0.5, dropout)
        second = ops.ExpertLinear(down, None, a[1], b[1], 0.5, dropout)
        backward(ops.experts(x, index, weights, first, second, lambda u: nn.functional.glu(u)))


METHODS = {
    "lora": fastpeft.Lora(r=RANK, dropout=0.1),
    "bottleneck": fastpeft.Bottleneck(),
    "prompt": fastpeft.PromptTuning(length=4),
    "prefix": fastpeft.PrefixTuning(length=4),
    "selective": fastpeft.Selective(layers="last:1", params=["norm"]),
}


def llama(dtype):
    from tests.support.models import llama

    return llama(layers=2).to("cuda", dtype)


@each_dtype
@pytest.mark.parametrize("method", METHODS)
def test_methods(method, dtype):
    """A training step, under autocast too and with checkpoints, and two of decoding; a loop would not see its end."""
    model = llama(dtype)
    fastpeft.attach(model, METHODS[method])
    model.train()
    batch = {"input_ids": ids(2, 8), "attention_mask": ids(2, 8) + 1, "labels": ids(2, 8)}
    model(**batch).loss.backward()
    with torch.autocast("cuda", torch.bfloat16):
        model(**batch).loss.backward()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**batch).loss.backward()
    model.eval()
    with torch.no_grad():
        cache = model(ids(2, 4), use_cache=True).past_key_values
        model(ids(2, 1), past_key_values=cache, use_cache=True)


@each_dtype
def test_modules(dtype):
    linear = nn.Linear(WIDE, OUT, device="cuda", dtype=dtype)
    x = tensor(2, ROWS, WIDE, dtype=dtype)
    lora = fastpeft.nn.LoraLinear(linear, r=RANK, dropout=0.1)
    backward(lora(x))
    lora.merge((linear.weight.clone(), None))  # merged_tensors asks whether nothing's values are finite
    backward(lora(x))
    lora.unmerge()
    backward(fastpeft.nn.RowSparseLinear(nn.Linear(WIDE, OUT, device="cuda", dtype=dtype), rows=[1, 5])(x))
    backward(fastpeft.nn.TokenRows(nn.Embedding(10, WIDE, device="cuda", dtype=dtype), [1, 2])(ids(2, 3)))


@pytest.fixture(scope="module")
def extension():
    """fastpeft._C as the null GPU can run it."""
    try:
        show(build_extension(build()))
    except RuntimeError as error:
        pytest.skip(str(error))
    from fastpeft import _C

    assert _C.devices() == (1, "")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_cuda_kernels_are_launched(extension, dtype):
    x, w = tensor(256, 512, dtype=dtype), tensor(384, 512, dtype=dtype, grad=False)
    a, b = tensor(16, 512, dtype=dtype), tensor(384, 16, dtype=dtype)
    backward(ops.lora_linear(x, w, a, b, dropout=0.1, backend="cuda"))
    slots = torch.arange(ROWS, device="cuda") % SLOTS
    a, b = tensor(SLOTS, 16, 512, dtype=dtype, grad=False), tensor(SLOTS, 384, 16, dtype=dtype, grad=False)
    y, scales = tensor(ROWS, 384, dtype=dtype, grad=False), tensor(SLOTS, grad=False)

    def step():
        ops.multi_lora_(y, x[:ROWS].detach(), a, b, ops.route(slots, SLOTS), scales, backend="cuda")

    step()
    asked = counted(step)
    assert (asked.syncs, asked.pageable, asked.missing) == (0, 0, 0)
