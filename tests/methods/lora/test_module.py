"""LoraLinear beside its definition: outputs, gradients, initial values, masks, merging."""

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.nn import LoraAdapter, LoraLinear
from tests.support.lora_layers import K, M, N, build, close, definition, gradients


@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d"])
@pytest.mark.parametrize("settings", [{}, {"rslora": True}, {"lora_bias": True}, {"alpha": 0.5, "r": 1}])
def test_output_and_gradients_equal_the_definition(kind, settings):
    layer = build(kind, **settings)
    assert settings.get("r", 3) == layer.adapters["default"].r
    if settings.get("lora_bias"):
        nn.init.normal_(layer.adapters["default"].lora_bias)
    x = torch.randn(2, M, K, dtype=torch.float64, requires_grad=True)
    close(layer(x), definition(layer, x))
    for ours, theirs in zip(gradients(layer(x), layer, x), gradients(definition(layer, x), layer, x), strict=True):
        close(ours, theirs)


def test_transformers_conv1d():
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed")
    torch.manual_seed(0)
    conv = pytorch_utils.Conv1D(N, K).double()
    layer = LoraLinear(conv, r=3, init="random")
    x = torch.randn(M, K, dtype=torch.float64)
    close(layer(x), definition(layer, x))
    assert (layer.in_features, layer.out_features) == (K, N)
    assert layer.weight is conv.weight
    assert layer.bias is conv.bias


@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d"])
def test_several_adapters_add_up(kind):
    layer = build(kind)
    layer.add_adapter("b", r=5, alpha=1, init="random", lora_bias=True)
    layer.add_adapter("c", r=2, init="random")
    nn.init.normal_(layer.adapters["b"].lora_bias)
    x = torch.randn(M, K, dtype=torch.float64, requires_grad=True)
    for names in (["default"], ["b"], ["default", "b"], ["c", "b", "default"]):
        layer.set_adapter(names)
        close(layer(x), definition(layer, x, names))
        for ours, theirs in zip(
            gradients(layer(x), layer, x), gradients(definition(layer, x, names), layer, x), strict=True
        ):
            close(ours, theirs)
        trained = {name.split(".")[1] for name, p in layer.named_parameters() if p.requires_grad}
        assert trained == set(names)
    layer.set_adapter(["b"], trainable=False)
    assert not any(p.requires_grad for p in layer.parameters())


def test_inactive_is_the_base_to_the_bit():
    layer = build()
    x = torch.randn(M, K, dtype=torch.float64)
    expected = layer.base_layer(x)
    assert not torch.equal(layer(x), expected)
    layer.disabled = True
    assert torch.equal(layer(x), expected)
    layer.disabled = False
    layer.set_adapter([])
    assert torch.equal(layer(x), expected)


def test_starts_as_the_base():
    for init in ("kaiming", "gaussian"):
        layer = build(init=init)
        x = torch.randn(M, K, dtype=torch.float64)
        assert torch.equal(layer(x), layer.base_layer(x))


def test_init():
    torch.manual_seed(0)
    kaiming, gaussian, random = (
        LoraAdapter(400, 300, r=16, init=init, lora_bias=True) for init in fastpeft.nn.adapter.INITS
    )
    # Uniform on (-1/sqrt(K), 1/sqrt(K)): standard deviation 1/sqrt(3 K). 6,400 draws: 3 % is five standard errors.
    for a, std in ((kaiming.lora_A, 1200**-0.5), (random.lora_A, 1200**-0.5), (gaussian.lora_A, 1 / 16)):
        assert abs(a.std().item() / std - 1) < 0.05
    assert kaiming.lora_A.abs().max() <= 400**-0.5
    assert not kaiming.lora_B.any()
    assert not gaussian.lora_B.any()
    assert random.lora_B.abs().min() > 0
    assert not any(adapter.lora_bias.any() for adapter in (kaiming, gaussian, random))


def test_dropout_is_the_reference_with_the_drawn_seed():
    layer = build(dropout=0.4)
    adapter = layer.adapters["default"]
    x = torch.randn(M, K, dtype=torch.float64)
    torch.manual_seed(7)
    seeds = [torch.randint(1 << 62, (1,)) for _ in range(2)]
    torch.manual_seed(7)
    for seed in seeds:
        expected = fastpeft.reference.lora_linear(
            x, layer.weight, adapter.lora_A, adapter.lora_B, layer.bias, adapter.scale, 0.4, seed
        )
        close(layer(x), expected)
        assert (expected - definition(layer, x)).abs().max() > 1e-3
    layer.eval()
    state = torch.get_rng_state()
    close(layer(x), definition(layer, x))
    assert torch.equal(torch.get_rng_state(), state)


def test_several_adapters_have_their_own_masks():
    layer = build(kind="no_bias", dropout=0.5)
    layer.add_adapter("b", r=3, alpha=6, dropout=0.5)
    layer.adapters["b"].load_state_dict(layer.adapters["default"].state_dict())
    layer.set_adapter(["default", "b"])
    x = torch.randn(M, K, dtype=torch.float64)
    torch.manual_seed(3)
    both = layer(x)
    torch.manual_seed(3)
    layer.set_adapter(["default"])
    one = layer(x) - layer.base_layer(x)
    assert (both - layer.base_layer(x) - 2 * one).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_merge_and_unmerge(kind):
    layer = build(kind, lora_bias=True)
    layer.add_adapter("b", r=2, init="random")
    layer.set_adapter(["default", "b"])
    nn.init.normal_(layer.adapters["default"].lora_bias)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    x = torch.randn(M, K, dtype=torch.float64)
    expected = layer(x)
    weight = layer.base_layer.weight
    layer.merge()
    close(layer(x), expected)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert layer.base_layer.weight is weight
    with pytest.raises(ValueError, match="merged"):
        layer.merge()
    with pytest.raises(ValueError, match="merged"):
        layer.set_adapter(["b"])
    layer.unmerge()
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())
    assert torch.equal(layer(x), expected)
    with pytest.raises(ValueError, match="not merged"):
        layer.unmerge()


def test_merge_refuses_and_changes_nothing():
    layer = build("no_bias", lora_bias=True)
    weight = layer.weight.clone()
    with pytest.raises(ValueError, match="without bias"):
        layer.merge()
    layer = build()
    with torch.no_grad():
        layer.adapters["default"].lora_B[0, 0] = float("nan")
    with pytest.raises(ValueError, match="finite"):
        layer.merge()
    layer.set_adapter([])
    with pytest.raises(ValueError, match="no active adapter"):
        layer.merge()
    assert torch.equal(layer.weight, weight)
    assert not layer.merged
