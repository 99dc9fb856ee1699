"""Layers in other libraries' formats: written out by the library's function in forward and backward, and not kept."""

import copy
import gc
import sys
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastpeft
from fastpeft import ops
from fastpeft.nn import LoraLinear, dequantisers
from fastpeft.testing import assert_no_worse

BF16, FP32 = torch.bfloat16, torch.float32
K, N, ROWS = 64, 96, 40


class Halved(nn.Module):
    """A format of our own: int8 codes in steps of 1/64, and nothing called weight."""

    in_features, out_features = K, N

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randint(-8, 9, (N, K), dtype=torch.int8))
        self.bias = nn.Parameter(torch.randn(N), requires_grad=False)
        self.asked = 0

    def written(self):
        self.asked += 1
        return self.codes.float() / 64

    def forward(self, x):
        return nn.functional.linear(x, (self.codes.float() / 64).to(x.dtype), self.bias.to(x.dtype))


@pytest.fixture
def halved(monkeypatch):
    monkeypatch.setattr(dequantisers, "_KINDS", dict(dequantisers._KINDS))
    fastpeft.register_dequantiser(Halved, Halved.written)
    torch.manual_seed(0)
    yield Halved()
    dequantisers._of_class.cache_clear()


def gptq():
    """The attributes and the function of GPTQModel's TorchLinear, with values that are drawn."""
    codes, scales = torch.randint(16, (K, N)), torch.rand(1, N).half() / 64

    class TorchLinear(nn.Module):
        in_features, out_features, bias = K, N, None

        def __init__(self):
            super().__init__()
            self.register_buffer("qweight", codes.int())

        def dequantize_weight(self, num_itr=1):
            return scales * (self.qweight - 8)

        def forward(self, x):
            return x @ self.dequantize_weight().to(x.dtype)

    TorchLinear.__module__, TorchLinear.__qualname__ = "gptqmodel.nn_modules.qlinear.torch", "TorchLinear"
    return TorchLinear(), (scales * (codes.int() - 8)).T


def awq(monkeypatch):
    """The same of AutoAWQ's WQLinear_GEMM, whose function is the module's that it comes from."""
    weight = torch.randn(K, N).half()

    class WQLinear_GEMM(nn.Module):
        in_features, out_features, w_bit, group_size, bias = K, N, 4, 32, None

        def __init__(self):
            super().__init__()
            for name in ("qweight", "qzeros", "scales"):
                self.register_buffer(name, torch.zeros(1))

        def forward(self, x):
            return x @ weight.to(x.dtype)

    module = types.ModuleType("awq.utils.packing_utils")
    module.dequantize_gemm = lambda qweight, qzeros, scales, bits, group_size: weight
    for name in ("awq", "awq.utils"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "awq.utils.packing_utils", module)
    WQLinear_GEMM.__module__, WQLinear_GEMM.__qualname__ = "awq.modules.linear.gemm", "WQLinear_GEMM"
    return WQLinear_GEMM(), weight.T


def fp8():
    """transformers' own layer, and its own function."""
    finegrained = pytest.importorskip(
        "transformers.integrations.finegrained_fp8", reason="transformers has no FP8Linear"
    )
    if not hasattr(finegrained, "Fp8Dequantize"):
        pytest.skip("this transformers has no Fp8Dequantize")
    layer = finegrained.FP8Linear(K, N, (32, 32))
    layer.weight.data = (torch.randn(N, K) * 50).to(torch.float8_e4m3fn)
    layer.weight_scale_inv.data = torch.rand(N // 32, K // 32) / 400
    scales = layer.weight_scale_inv.repeat_interleave(32, 0).repeat_interleave(32, 1)
    return layer.requires_grad_(False), layer.weight.float() * scales


def torchao():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = nn.Sequential(nn.Linear(K, N).to(BF16)).requires_grad_(False)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    return model[0], model[0].weight.dequantize()


def hqq():
    quantize = pytest.importorskip("hqq.core.quantize", reason="HQQ is not installed")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    layer = quantize.HQQLinear(nn.Linear(K, N), config, compute_dtype=BF16, device="cpu")
    return layer, layer.dequantize()


FORMATS = {"gptq": gptq, "awq": awq, "fp8": fp8, "torchao": torchao, "hqq": hqq}


def made(name, monkeypatch):
    torch.manual_seed(0)
    return FORMATS[name](monkeypatch) if name == "awq" else FORMATS[name]()


@pytest.mark.parametrize("name", FORMATS)
def test_the_weight_is_the_librarys(name, monkeypatch):
    layer, weight = made(name, monkeypatch)
    base = dequantisers.base_of(layer)
    assert dequantisers.base_of(layer) is base
    assert base.shape == (N, K)
    assert torch.equal(ops.dequantise(base, FP32), weight.float())


@pytest.mark.parametrize("name", FORMATS)
def test_the_op_around_it_is_the_dense_one(name, monkeypatch):
    """Bit for bit, gradients too, and without W among what is kept."""
    layer, weight = made(name, monkeypatch)
    base, weight = dequantisers.base_of(layer), weight.to(BF16)
    x, a, b = torch.randn(ROWS, K).to(BF16), torch.randn(8, K), torch.randn(N, 8)
    leaves = [t.requires_grad_() for t in (x, a, b)]
    wanted = torch.autograd.grad(ops.lora_linear(x, weight, a, b, None, 0.5, 0.25, 7).sum(), leaves)
    kept = []
    for _ in range(3):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = ops.lora_linear(x, base, a, b, None, 0.5, 0.25, 7)
        assert not [t for t in kept if t.shape == weight.shape]
        assert all(map(torch.equal, torch.autograd.grad(y.sum(), leaves), wanted))


class OneLayer(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x)


@pytest.mark.parametrize("name", ["torchao", "hqq", "fp8"])
def test_pefts_layers_are_fused(name, monkeypatch):
    layer, weight = made(name, monkeypatch)
    torch.manual_seed(1)
    config = LoraConfig(r=8, target_modules=["base"], init_lora_weights=False)
    model = get_peft_model(OneLayer(layer), config).train()
    lora = model.base_model.model.base
    x, dy = torch.randn(ROWS, K).to(BF16), torch.randn(ROWS, N).to(BF16)
    leaves = [lora.lora_A["default"].weight, lora.lora_B["default"].weight]

    def computed(call, x, dy):
        x = x.clone().requires_grad_()
        y = call(x)
        return y.detach(), *torch.autograd.grad(y, [x, *leaves], dy)

    def plain(dtype):
        bias = None if layer.bias is None else layer.bias.to(dtype or BF16)
        w = weight.to(dtype or BF16)

        def call(x):
            term = x.to(dtype or FP32) @ leaves[0].T.to(dtype or FP32) @ leaves[1].T.to(dtype or FP32)
            return nn.functional.linear(x, w, bias) + (lora.scaling["default"] * term).to(x.dtype)

        return computed(call, x.to(dtype or BF16), dy.to(dtype or BF16))

    eager, truth = plain(None), plain(torch.float64)
    fastpeft.accelerate(model, strict=True)
    (status,) = {row.status for row in fastpeft.report(model).layers if row.kind == "LoRA layers"}
    assert status == "fused"
    for _ in range(3):
        for what, one, other, right in zip(("y", "dx", "dA", "dB"), computed(model, x, dy), eager, truth, strict=True):
            assert_no_worse(one, other, right, what)


def test_a_format_that_is_registered(halved):
    layer = LoraLinear(nn.Linear(K, N), init="random")
    layer.base_layer = halved
    assert layer.fastpeft_report() == "fused"
    x = torch.randn(ROWS, K, requires_grad=True)
    dense = nn.functional.linear(x, halved.codes / 64, halved.bias) + x @ layer.delta("default")[0].T
    wanted = torch.autograd.grad(dense.sum(), x)[0]
    for _ in range(3):
        halved.asked = 0
        y = layer(x)
        torch.testing.assert_close(y, dense)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], wanted)
        assert halved.asked == 2  # in forward and in backward
    halved.asked = 0
    few = layer(x[:5])
    assert halved.asked == 0, "the library's own kernel is for few rows"
    torch.testing.assert_close(few, dense[:5])


def test_values_are_read_anew(halved):
    base, x = dequantisers.base_of(halved), torch.randn(ROWS, K)
    a, b = torch.zeros(4, K), torch.zeros(N, 4)
    before = ops.lora_linear(x, base, a, b)
    halved.codes += 1
    assert not torch.equal(ops.lora_linear(x, base, a, b), before)
    assert dequantisers.base_of(copy.deepcopy(halved)) is not base


def test_what_cannot_be_read_says_so(halved):
    assert dequantisers.base_of(nn.Linear(3, 3)) is None
    base = dequantisers.base_of(halved)
    halved.codes = halved.codes[:3]
    with pytest.raises(ValueError, match=r"written out as \[3, 64\] in torch.float32, expected \[96, 64\]"):
        ops.dequantise(base)
    gone = dequantisers.base_of(Halved())
    gc.collect()
    with pytest.raises((RuntimeError, AttributeError)):
        ops.dequantise(gone)
    assert dequantisers.base_of(halved.to("meta")) == "is offloaded or on the meta device"


class Overridden(Halved):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_with_a_forward_of_its_own_is_called(halved):
    assert dequantisers.reads(halved)
    assert not dequantisers.reads(Overridden())


def test_merged_where_it_can_be(monkeypatch):
    layer, weight = made("fp8", monkeypatch)
    model = OneLayer(layer)
    fastpeft.attach(model, fastpeft.Lora(r=4, targets=["base"], init="random"))
    delta = model.base.delta("default")[0]
    with pytest.raises(
        ValueError, match="merge: base: a FP8Linear cannot be quantised again, expected dequantise=True"
    ):
        fastpeft.merge(model)
    fastpeft.merge(model, dequantise=True)
    assert type(model.base.base_layer) is nn.Linear
    merged = model.base.base_layer.weight
    assert torch.equal(merged, (weight + delta).to(merged.dtype))
    fastpeft.unmerge(model)
    assert model.base.base_layer is layer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, Halved.written), "kind is 3"),
        ((Halved, "written"), "function is 'written'"),
        ((Halved, Halved.written, torch.int8), "dtype is torch.int8"),
    ],
)
def test_bad_registrations(arguments, message):
    with pytest.raises(TypeError, match=f"^register_dequantiser: {message}"):
        fastpeft.register_dequantiser(*arguments)
