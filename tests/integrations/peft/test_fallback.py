"""Which calls of PEFT's layers are fused and which are left to PEFT, with PEFT's exact output and the reason told."""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.nn.utils import parametrize, prune

import fastpeft
from fastpeft.integrations.peft import FastLoraLinear
from tests.support.peft_layers import IDS, assert_pefts, config, counted, peft_model, statuses, up

pytestmark = pytest.mark.oldest


class Special(nn.Linear):
    def forward(self, x):
        return -super().forward(x)


class Shout(nn.Module):
    def forward(self, x):
        return 2 * x


def _replace_forward(layer):
    layer.lora_A["default"].forward = lambda x: 3 * nn.functional.linear(x, layer.lora_A["default"].weight)


def _parametrise(module):
    parametrize.register_parametrization(module, "weight", Shout())


def _use_subclass(layer):
    layer.base_layer.__class__ = type("Quantised", (nn.Linear,), {})


def _bias_in_a(layer):
    layer.lora_A["default"].bias = nn.Parameter(torch.ones(4))


class Packed(torch.Tensor):
    """Stands for a quantised or sharded weight."""


def _packed(module):
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Packed), requires_grad=False)


def _vector_scaling(layer):
    layer.scaling["default"] = torch.linspace(0, 1, 20)


# What is done to a layer that is otherwise fused, and what the report says about it.
CHANGES = {
    "disabled": (lambda layer: layer.enable_adapters(False), "disabled"),
    "merged": (lambda layer: layer.merge(), "merged"),
    "no adapter": (lambda layer: layer.delete_adapter("default"), "no adapter"),
    "pre-hook on A": (lambda layer: layer.lora_A.default.register_forward_pre_hook(lambda m, x: 2 * x[0]), "hooks"),
    "hook on B": (lambda layer: layer.lora_B.default.register_forward_hook(lambda m, x, y: 2 * y), "hooks"),
    "hook on dropout": (lambda layer: layer.lora_dropout.default.register_forward_hook(lambda m, x, y: -y), "hooks"),
    "backward hook": (lambda layer: layer.lora_B.default.register_full_backward_hook(lambda m, gx, gy: None), "hooks"),
    "parametrised": (lambda layer: _parametrise(layer.lora_A.default), "Param"),
    "A is a subclass": (lambda layer: _packed(layer.lora_A.default), "Packed"),
    "B is a subclass": (lambda layer: _packed(layer.lora_B.default), "Packed"),
    "forward replaced": (_replace_forward, "replaced forward"),
    "pruned": (lambda layer: prune.l1_unstructured(layer.lora_A.default, "weight", 0.5), "hooks"),
    "dropout module": (lambda layer: layer.lora_dropout.update({"default": Shout()}), "lora_dropout is Shout"),
    "dropout of 1": (lambda layer: layer.lora_dropout.update({"default": nn.Dropout(1.0)}), "p=1.0"),
    "dropout in place": (lambda layer: layer.lora_dropout.update({"default": nn.Dropout(0.5, True)}), "inplace=True"),
    "bias in A": (_bias_in_a, "lora_A"),
    "scaling is a vector": (_vector_scaling, "scaling"),
    "A is no Linear": (lambda layer: setattr(layer.lora_A.default, "__class__", Special), "lora_B are Special"),
    "B is no Linear": (lambda layer: setattr(layer.lora_B.default, "__class__", Special), "and Special, not nn.Linear"),
    "narrow adapter": (lambda layer: layer.lora_A.to(torch.float16) and layer.lora_B.to(torch.float16), "float16"),
    "adapter dtypes differ": (lambda layer: layer.lora_B.to(torch.float64), "differ in dtype"),
}  # fmt: skip

# What is done to a base that is called for that reason, and the low-rank term added to what it gives.
BESIDE = {
    "hook on the base": (lambda layer: layer.base_layer.register_forward_hook(lambda m, x, y: 2 * y), "hooks"),
    "parametrised base": (lambda layer: _parametrise(layer.base_layer), "Param"),
    "hook of accelerate": (lambda layer: add_hook_to_module(layer.base_layer, ModelHook()), "replaced forward"),
    "weight is a subclass": (lambda layer: _packed(layer.base_layer), "base_layer.weight is Packed"),
    "base is a subclass": (_use_subclass, "base_layer is Quantised"),
}  # fmt: skip


def assert_same(ours, plain, x):
    """The same bits, or the same error where PEFT cannot serve the call either."""
    torch.manual_seed(0)
    try:
        expected = plain(x.clone())
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            ours(x.clone())
    else:
        torch.manual_seed(0)
        assert torch.equal(ours(x.clone()), expected)


@pytest.mark.parametrize("change", BESIDE)
def test_a_base_that_cannot_be_read_is_called(change, monkeypatch):
    apply, reason = BESIDE[change]
    plain = peft_model()
    ours = fastpeft.accelerate(copy.deepcopy(plain), strict=True)
    for model in (plain, ours):
        apply(up(model))
    x = torch.randn(3, 12)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    with counted(monkeypatch) as fused:
        found, wanted = up(ours)(leaves[0]), up(plain)(leaves[1])
    assert len(fused) == 1
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        *(torch.autograd.grad(y.sum(), leaf) for y, leaf in zip((found, wanted), leaves)), strict=True
    ):
        torch.testing.assert_close(one, other)
    assert statuses(ours)["up"].startswith("fused beside its base: ")
    assert reason in statuses(ours)["up"]


@pytest.mark.parametrize("change", CHANGES)
def test_falls_back_to_pefts_own_forward(change, monkeypatch):
    apply, reason = CHANGES[change]
    plain = peft_model()
    ours = fastpeft.accelerate(copy.deepcopy(plain))
    for model in (plain, ours):
        apply(up(model))
    with counted(monkeypatch) as fused:
        assert_same(up(ours), up(plain), torch.randn(3, 12))
    assert fused == []
    assert reason in statuses(ours)["up"]
    assert statuses(ours)["down"] == "fused"
    before = [type(module) for module in plain.modules()]
    with pytest.raises(ValueError, match=r"1 of 2 .*\n  base_model\.model\.up: .*" + reason):
        fastpeft.accelerate(plain, strict=True)
    assert [type(module) for module in plain.modules()] == before


def test_variants_and_other_layers_are_named(monkeypatch):
    plain = peft_model(target_modules=["embed", "conv", "up"])
    plain.add_adapter("dora", config(use_dora=True, target_modules=["up"]))
    ours = fastpeft.accelerate(copy.deepcopy(plain))
    assert_pefts(ours, plain, 1, monkeypatch)
    found = statuses(ours)
    assert found == {"embed": "fused", "up": "fused", "conv": "peft.tuners.lora.layer.Conv1d has no fused form"}
    for model in (ours, plain):
        model.set_adapter("dora")
    assert_pefts(ours, plain, 1, monkeypatch)
    assert statuses(ours)["up"] == "fused"
    with pytest.raises(ValueError, match="2 of 3") as error:
        fastpeft.accelerate(plain, strict=True)
    assert all(f"model.{name}: " in str(error.value) for name in ("embed", "conv"))


def test_an_unknown_variant_is_named():
    model = fastpeft.accelerate(peft_model())
    if not hasattr(up(model), "lora_variant"):
        pytest.skip("PEFT before 0.16 has no variants but DoRA")
    up(model).lora_variant["default"] = type("Another", (), {})
    assert statuses(model)["up"] == "adapter 'default' is the variant Another"


def test_mixed_batches_are_pefts(monkeypatch):
    plain = peft_model()
    plain.add_adapter("other", config(r=2))
    ours = fastpeft.accelerate(copy.deepcopy(plain)).eval()
    names = ["default", "other"]
    with counted(monkeypatch) as fused:
        assert torch.equal(ours(IDS, adapter_names=names), plain.eval()(IDS, adapter_names=names))
        assert fused == []
        ours(IDS)
        assert len(fused) == 2


@pytest.mark.parametrize("transform", ["func", "forward mode", "jit", "export", "strict export", "global hook"])
def test_transforms_see_pefts_forward(transform, monkeypatch):
    plain = up(peft_model(torch.float64)).eval()
    ours = copy.deepcopy(plain)
    ours.__class__ = FastLoraLinear
    x, v = torch.randn(2, 3, 12, dtype=torch.float64)

    def result(layer):
        if transform == "func":
            return torch.func.vmap(torch.func.grad(lambda row: layer(row).square().sum()))(x)
        if transform == "forward mode":
            with torch.autograd.forward_ad.dual_level():
                y = layer(torch.autograd.forward_ad.make_dual(x, v))
                return torch.autograd.forward_ad.unpack_dual(y).tangent
        if transform == "jit":
            return torch.jit.trace(layer, (x,), check_trace=False)(v)
        if "export" in transform:
            graph = torch.export.export(layer, (x,), strict="strict" in transform).module()
            assert "fastpeft" not in str(graph.graph)
            return graph(v)
        handle = nn.modules.module.register_module_forward_hook(lambda module, x, y: 2 * y)
        try:
            return layer(x)
        finally:
            handle.remove()

    with counted(monkeypatch) as fused:
        assert torch.equal(result(ours), result(plain))
        assert fused == []
        ours(x)
        assert fused == [1]


def test_inputs_that_do_not_fit_are_pefts(monkeypatch):
    plain = up(peft_model()).eval()
    ours, wide = copy.deepcopy(plain), copy.deepcopy(plain).double()
    ours.__class__ = FastLoraLinear
    wide_ours = copy.deepcopy(wide)
    wide_ours.__class__ = FastLoraLinear
    x = torch.randn(3, 12)
    with counted(monkeypatch) as fused:
        assert_same(ours, plain, x.as_subclass(Packed))
        assert_same(ours, plain, x.bfloat16())
        assert_same(ours, plain, x.to("meta"))
        assert_same(wide_ours, wide, x)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(wide_ours, wide, x)
        assert fused == []
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(wide_ours(x.double()), wide(x.double()))  # autocast leaves float64 alone
            ours(x.bfloat16())
    assert fused == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_disabled_casting_of_the_input_is_pefts(dtype):
    model = fastpeft.accelerate(peft_model(dtype))
    layer, x = up(model), torch.ones(3, 12, dtype=dtype)
    layer.cast_input_dtype_enabled = False
    layer.lora_A.float(), layer.lora_B.float()
    assert "fused" != statuses(model)["up"]
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)
    layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    assert statuses(model)["up"] == "fused"
    assert layer(x).dtype == dtype


def test_meta_device():
    model = fastpeft.accelerate(peft_model().to("meta"))
    assert model(IDS.to("meta")).shape == (2, 5, 6)
    assert statuses(model)["up"] == "device meta"


def test_parameters_held_as_attributes(monkeypatch):
    """As in DataParallel's replicas."""
    model = fastpeft.accelerate(peft_model())
    expected = model(IDS)
    for module in (up(model).base_layer, up(model).lora_A.default, up(model).lora_B.default):
        weight = module._parameters.pop("weight")
        module.__dict__["weight"] = weight.clone()
    with counted(monkeypatch) as fused:
        assert torch.equal(model(IDS), expected)
    assert len(fused) == 2


def _nested(x):
    return torch.nested.nested_tensor([x, x[:2]])


LAYOUTS = {
    "coo": torch.Tensor.to_sparse,
    "csr": torch.Tensor.to_sparse_csr,
    "csc": torch.Tensor.to_sparse_csc,
    "nested": _nested,
}


@pytest.mark.filterwarnings("ignore:Sparse.*beta:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_other_layouts_are_pefts(layout, monkeypatch):
    plain = peft_model()
    ours = fastpeft.accelerate(copy.deepcopy(plain))
    x = LAYOUTS[layout](torch.eye(3, 12))
    with counted(monkeypatch) as fused:
        y, expected = up(ours)(x), up(plain)(x)
    assert fused == []
    pairs = zip(y.unbind(), expected.unbind(), strict=True) if layout == "nested" else [(y, expected)]
    assert all(torch.equal(one, other) for one, other in pairs)
