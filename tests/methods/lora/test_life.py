"""LoraLinear copied, pickled, on the meta device, compiled; bases that are more than their weight; bad arguments."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastpeft.nn import LoraLinear
from tests.support.lora_layers import K, M, N, base, build, close, definition, gradients


class TestBaseOnItsOwnPath:
    """A base that is more than its weight and bias is called, whatever it does."""

    def check(self, layer, expected_of_base, word):
        layer.adapters["default"].requires_grad_(True)
        adapter = layer.adapters["default"]
        x = torch.randn(M, K, dtype=torch.float64, requires_grad=True)
        expected = expected_of_base(x) + adapter.scale * x @ adapter.lora_A.T @ adapter.lora_B.T
        close(layer(x), expected)
        for ours, theirs in zip(gradients(layer(x), layer, x), gradients(expected, layer, x), strict=True):
            close(ours, theirs)
        assert word in layer.fastpeft_report()
        assert word in layer.fastpeft_branch()

    def test_hooks(self):
        layer = build()
        calls = []
        plain = copy.deepcopy(layer.base_layer)
        assert layer.fastpeft_report() == "fused"
        handle = layer.base_layer.register_forward_hook(lambda module, args, y: (calls.append(1), 2 * y)[1])
        self.check(layer, lambda x: 2 * plain(x), "hooks")
        assert calls
        handle.remove()
        assert layer.fastpeft_report() == "fused"

    def test_forward_on_the_instance(self):
        layer = build()
        plain = copy.deepcopy(layer.base_layer)
        layer.base_layer.forward = lambda x: plain(x) + 1
        self.check(layer, lambda x: plain(x) + 1, "overridden")

    def test_parametrised(self):
        class Twice(nn.Module):
            def forward(self, weight):
                return 2 * weight

        layer = build()
        plain = copy.deepcopy(layer.base_layer)
        nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Twice())
        self.check(layer, lambda x: F.linear(x, 2 * plain.weight, plain.bias), "parametrised")

    def test_several_adapters(self):
        layer = build()
        layer.add_adapter("b", r=2, init="random", lora_bias=True)
        nn.init.normal_(layer.adapters["b"].lora_bias)
        layer.set_adapter(["default", "b"])
        x = torch.randn(M, K, dtype=torch.float64)
        expected = definition(layer, x, ["default", "b"])
        layer.base_layer.register_forward_hook(lambda module, args, y: 3 * y)
        close(layer(x), expected + 2 * F.linear(x, layer.weight, layer.bias))


def test_copy_and_pickle():
    layer = build(dropout=0.1)
    layer.add_adapter("b", r=2)
    layer.eval()
    x = torch.randn(M, K, dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), layer(x))
        assert other.adapters["default"].lora_A is not layer.adapters["default"].lora_A
        assert repr(other) == repr(layer)
        with torch.no_grad():
            other.adapters["default"].lora_A.zero_()
        assert not torch.equal(other(x), layer(x))


def test_state_dict():
    layer = build(lora_bias=True)
    layer.add_adapter("b", r=2)
    names = ["base_layer.weight", "base_layer.bias"]
    names += [
        f"adapters.{name}" for name in ("default.lora_A", "default.lora_B", "default.lora_bias", "b.lora_A", "b.lora_B")
    ]
    assert list(layer.state_dict()) == names
    other = LoraLinear(nn.Linear(K, N).double(), r=3, alpha=6, lora_bias=True)
    other.add_adapter("b", r=2)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(M, K, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))


def test_meta_device():
    with torch.device("meta"):
        layer = LoraLinear(nn.Linear(K, N), r=3)
    assert all(p.is_meta for p in layer.parameters())
    assert layer(torch.empty(M, K, device="meta")).shape == (M, N)
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    x = torch.randn(M, K)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.adapters["default"].lora_A.any()


def test_follows_the_base():
    assert not LoraLinear(base().eval(), r=2).training
    layer = build()
    assert not layer.base_layer.weight.requires_grad
    assert layer.half().adapters["default"].lora_A.dtype == torch.float16


def test_repr():
    layer = build(dropout=0.25, rslora=True, lora_bias=True)
    assert "in_features=12, out_features=7, active=['default']" in repr(layer)
    assert "r=3, alpha=6, dropout=0.25, rslora=True, lora_bias=True" in repr(layer)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph_dynamic(backend):
    torch._dynamo.reset()
    layer = build(dtype=torch.float32)
    layer.add_adapter("b", r=2, init="random", lora_bias=True)
    layer.set_adapter(["default", "b"])
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    for rows in (4, 9):
        x = torch.randn(rows, K, requires_grad=True)
        expected = layer(x)
        for ours, theirs in zip(gradients(compiled(x), layer, x), gradients(expected, layer, x), strict=True):
            assert (ours - theirs).abs().max() <= 64 * torch.finfo(torch.float32).eps * (1 + theirs.abs().max())
        assert (compiled(x) - expected).abs().max() <= 64 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "LoraAdapter: r is 0, expected an integer of at least 1"),
        ({"r": 2.0}, "r is 2.0"),
        ({"alpha": float("nan")}, "alpha is nan, expected a finite number"),
        ({"dropout": 1.0}, r"dropout is 1.0, expected a number in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"init": "pissa"}, "init is 'pissa', expected one of kaiming"),
        ({"name": "a.b"}, "name is 'a.b'"),
        ({"name": ""}, "name is ''"),
        ({"name": "keys"}, "name is 'keys'"),
        ({"name": "training"}, "name is 'training'"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LoraLinear(nn.Linear(K, N), **settings)


def test_bad_use():
    inside = nn.MultiheadAttention(4, 2).out_proj  # read past its forward
    for module in (nn.LayerNorm(3), nn.Bilinear(2, 2, 2), inside):
        with pytest.raises(TypeError, match=f"base_layer is a {type(module).__name__}"):
            LoraLinear(module)
    integer = nn.Linear(3, 3)
    integer.weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"torch\.int8 weight"):
        LoraLinear(integer)
    layer = build()
    with pytest.raises(ValueError, match="exists already"):
        layer.add_adapter("default")
    with pytest.raises(ValueError, match="no adapter 'x', expected one of default"):
        layer.set_adapter(["x"])
    with pytest.raises(ValueError, match="no adapter 'other', expected one of default"):
        layer.set_adapter("other")
    layer.add_adapter("other")
    layer.set_adapter("other")
    assert layer.active == ("other",)
    assert torch.equal(layer.delta("other")[0], layer.delta(["other"])[0])
    with pytest.raises(TypeError, match="names is 3 .int., expected a list of names"):
        layer.set_adapter(3)
    with pytest.raises(TypeError, match="dtype is 'float32' .str., expected a floating-point"):
        layer.add_adapter("c", dtype="float32")
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'"):
        layer.add_adapter("c", rank=3)
    with pytest.raises(ValueError, match="weight has K=12, expected K=3"):
        layer(torch.randn(2, 3, dtype=torch.float64))
