"""A model with fused PEFT layers through its life: changed settings, other adapters, compilation, restore, register."""

import copy
import subprocess
import sys

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import nn

import fastpeft
from fastpeft.integrations.peft import FastLoraLinear
from tests.support.peft_layers import IDS, Model, assert_pefts, config, peft_model, statuses, up

pytestmark = pytest.mark.oldest


def test_settings_changed_after_accelerate_hold(monkeypatch):
    """Scales, dropout and adapters are read at every call."""
    plain = peft_model(lora_dropout=0.5)
    ours = fastpeft.accelerate(copy.deepcopy(plain))

    def both(act, calls=2):
        for model in (plain, ours):
            act(model)
        assert_pefts(ours, plain, calls, monkeypatch)

    both(lambda model: model.eval())
    both(lambda model: up(model).set_scale("default", 3.0))
    both(lambda model: up(model).scale_layer(0.25))
    both(lambda model: up(model).unscale_layer())
    both(lambda model: up(model).scaling.update(default=torch.tensor(1.5)))
    both(lambda model: torch.manual_seed(1) and model.add_adapter("b", config(r=3, use_rslora=True)))
    both(lambda model: model.base_model.set_adapter(["default", "b"]))
    both(lambda model: model.set_adapter("b"))
    both(lambda model: model.merge_adapter(), 0)
    both(lambda model: model.unmerge_adapter())
    with ours.disable_adapter(), plain.disable_adapter():
        assert_pefts(ours, plain, 0, monkeypatch)
    both(lambda model: model.set_adapter("default"))
    both(lambda model: model.delete_adapter("b"))
    both(lambda model: up(model).lora_dropout.update({"default": nn.Identity()}))
    both(lambda model: model.train() and setattr(model.base_model.model.down.lora_dropout["default"], "p", 0.0))
    merged, expected = ours.merge_and_unload(), plain.merge_and_unload()
    assert type(merged.up) is nn.Linear
    torch.testing.assert_close(merged(IDS), expected(IDS))


@pytest.mark.parametrize("dropout", [0.0, 1e-6])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("tensor_scaling", [False, True])
def test_several_adapters_and_their_gradients(lora_bias, tensor_scaling, dropout):
    plain = peft_model(torch.float64, lora_bias=lora_bias, target_modules=["up"])
    plain.add_adapter("b", config(r=3, lora_alpha=5, lora_bias=lora_bias, target_modules=["up"]))
    plain.base_model.set_adapter(["default", "b"])
    if tensor_scaling:
        up(plain).scaling = {name: torch.tensor(value) for name, value in up(plain).scaling.items()}
    ours = fastpeft.accelerate(copy.deepcopy(plain), strict=True)
    for name in ("default", "b") if dropout else ():  # so small that no mask is drawn, but the way is that of dropout
        up(ours).lora_dropout[name] = nn.Dropout(dropout)
    for model in (ours, plain):
        model(IDS).square().sum().backward()
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_each_adapter_has_its_own_dropout():
    """One adapter drops and adds nothing, the other never drops: the output is the one without dropout."""
    model = peft_model(torch.float64, lora_dropout=0.5, target_modules=["up"])
    model.add_adapter("b", config(target_modules=["up"]))
    model.base_model.set_adapter(["default", "b"])
    nn.init.zeros_(up(model).lora_B["default"].weight)
    expected = model.eval()(IDS)
    torch.testing.assert_close(fastpeft.accelerate(model, strict=True).train()(IDS), expected)


def test_dropout_masks_are_pefts_in_distribution():
    """Mean and variance over draws agree with PEFT's; the mean is the output without dropout."""
    plain = up(peft_model(torch.float64, lora_dropout=0.3))
    ours = copy.deepcopy(plain)
    ours.__class__ = FastLoraLinear
    draws = 4000
    x = torch.randn(1, 12, dtype=torch.float64).expand(draws, 12)
    mean = plain.eval()(x[:1])
    plain.train(), ours.train()
    with torch.no_grad():
        a, b = ours(x), plain(x)
    deviation = b.std(0)
    assert ((a.mean(0) - mean).abs() < 5 * deviation / draws**0.5).all()
    assert ((a.std(0) / deviation - 1).abs() < 5 * draws**-0.5).all()


def test_dropout_gradients_belong_to_the_forwards_mask():
    """For a fixed seed y is linear in x, in A and in B: a finite step changes it by the gradient times the step."""
    layer = up(peft_model(torch.float64, lora_dropout=0.3)).train()
    layer.__class__ = FastLoraLinear
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(7, 20, dtype=torch.float64)

    def loss():
        torch.manual_seed(3)
        return (layer(x) * dy).sum()

    start = loss()
    start.backward()
    for tensor in (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        move = torch.randn_like(tensor)
        with torch.no_grad():
            tensor += move
            torch.testing.assert_close(loss() - start.detach(), (tensor.grad * move).sum(), rtol=1e-10, atol=1e-10)
            tensor -= move


def test_hot_swap(tmp_path):
    """PEFT's hot-swap of an adapter of another rank and alpha, prepared for compilation: padded, tensor scaling."""
    first, second = peft_model(), peft_model(r=2, lora_alpha=7)
    nn.init.normal_(up(second).lora_B["default"].weight)
    second.save_pretrained(tmp_path)
    ours = fastpeft.accelerate(first.eval(), strict=True)
    prepare_model_for_compiled_hotswap(ours, target_rank=8)
    assert isinstance(up(ours).scaling["default"], torch.Tensor)
    assert set(statuses(ours).values()) == {"fused"}
    hotswap_adapter(ours, str(tmp_path), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(ours(IDS), second.eval()(IDS))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles_without_a_graph_break(dropout):
    model = fastpeft.accelerate(peft_model(torch.float64, lora_dropout=dropout), strict=True)
    layer = up(model)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        x = torch.randn(2, rows, 12, dtype=torch.float64)
        layer.zero_grad()
        torch.manual_seed(0)
        y = compiled(x)
        y.square().sum().backward()
        grad = layer.lora_A["default"].weight.grad
        if dropout == 0:
            layer.zero_grad()
            expected = layer(x)
            expected.square().sum().backward()
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(grad, layer.lora_A["default"].weight.grad)
        assert grad.abs().sum() > 0


def test_output_may_be_modified_in_place():
    """ReLU(inplace=True) and the like, as behind PEFT's own layer."""
    layer = up(fastpeft.accelerate(peft_model()))
    for x in (torch.ones(3, 12), torch.ones(2, 3, 12)):
        layer(x).relu_().sum().backward()
        y = layer(x)
        y += 1
        y.sum().backward()


def test_accelerate_again_and_copies():
    model = fastpeft.accelerate(fastpeft.accelerate(peft_model()))
    assert [type(m) for m in model.modules()].count(FastLoraLinear) == 2
    copied = copy.deepcopy(model)
    assert torch.equal(copied(IDS), model(IDS))
    fastpeft.restore(copied)
    assert [type(m) for m in copied.modules()].count(Linear) == 2
    assert set(statuses(model).values()) == {"fused"}
    assert all("accelerate" in status for status in statuses(copied).values())


def test_restore_refuses_a_wrapped_class():
    model = fastpeft.accelerate(peft_model())
    up(model).__class__ = type("FSDPFastLoraLinear", (FastLoraLinear,), {})
    with pytest.raises(
        ValueError, match=r"restore: base_model\.model\.up is FSDPFastLoraLinear, expected FastLoraLinear"
    ):
        fastpeft.restore(model)
    assert type(model.base_model.model.down) is FastLoraLinear


@pytest.mark.parametrize("function", [fastpeft.accelerate, fastpeft.restore])
def test_wrong_models_are_refused(function):
    with pytest.raises(TypeError, match=r"model is 'model' \(str\), expected"):
        function("model")
    with pytest.raises(ValueError, match="no LoRA layer"):
        function(Model())


class Special(nn.Linear):
    """Stands for a quantised layer: a subclass of nn.Linear that PEFT or its user has another layer for."""


class SpecialLora(Linear):
    pass


def test_register_declines_what_is_not_exactly_linear():
    torch.manual_seed(0)
    base = Model()
    base.down.__class__ = Special
    own = config(target_modules=["embed", "conv", "up", "down"])
    own._register_custom_module({Special: SpecialLora})
    model = get_peft_model(base, fastpeft.register(fastpeft.register(own)))
    kinds = {name: type(getattr(model.base_model.model, name)).__name__ for name in ("embed", "conv", "up", "down")}
    assert kinds == {"embed": "Embedding", "conv": "Conv1d", "up": "FastLoraLinear", "down": "SpecialLora"}
    assert fastpeft.restore(model) is model
    assert type(up(model)) is Linear


def test_register_declines_quantised_weights_and_lone_parameters():
    """A weight that is a tensor subclass (torchao), and PEFT's target_parameters."""
    build = fastpeft.register(config())._custom_modules[nn.Linear]
    settings = dict.fromkeys(("r", "lora_alpha"), 4)
    linear = nn.Linear(4, 4)
    assert build(linear, "default", parameter_name="weight", config=config(), **settings) is None
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(type("Packed", (torch.Tensor,), {})))
    assert build(linear, "default", config=config(), **settings) is None


def test_register_survives_a_copy_and_is_not_saved(tmp_path):
    registered = fastpeft.register(config())
    model = get_peft_model(Model(), copy.deepcopy(registered))
    assert set(statuses(model).values()) == {"fused"}
    model.save_pretrained(tmp_path)
    assert type(up(PeftModel.from_pretrained(Model(), tmp_path))) is Linear


def test_register_refuses():
    with pytest.raises(TypeError, match=r"lora_config is a dict of 0, expected peft\.LoraConfig"):
        fastpeft.register({})
    taken = config()
    taken._register_custom_module({nn.Linear: SpecialLora})
    with pytest.raises(ValueError, match=r"maps Linear to .*SpecialLora"):
        fastpeft.register(taken)


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("sys.modules['peft'] = None", "peft does not import, expected peft>=0.15"),
        ("import peft; peft.__version__ = '0.14.1'", "peft has version 0.14.1, expected >=0.15"),
    ],
)
def test_missing_or_old_peft_is_said(setup, message):
    code = f"import sys, fastpeft, torch\n{setup}\nfastpeft.accelerate(torch.nn.Linear(1, 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
