"""A PEFT layer keeps what it found out about itself, and looks again when anything of it has changed."""

import copy
import gc
import pickle
import weakref

import peft
import pytest
import torch
from torch import nn

import fastpeft
from tests.support import host_extension


@pytest.fixture(autouse=True, scope="module", params=host_extension.WAYS)
def _way(request):
    with host_extension.serves(request.param):
        yield


def model(adapters=("default",), dropout=0.1, bias=False):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 8, bias=bias))
    config = peft.LoraConfig(r=2, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False)
    found = peft.get_peft_model(base, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        found.add_adapter(name, config)
    return fastpeft.accelerate(found)


def layer_of(net):
    return net.base_model.model[0]


def kept(layer, x=None):
    """Whether the layer would take what it kept."""
    found = layer.__dict__.get("fastpeft_kept")
    return found is not None and found[0] is layer and found[1](x)


def replaced_weight(layer):
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.detach() * 2)


def recast(layer):
    layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data.double()


CHANGES = {
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "scaled": lambda layer: layer.set_scale("default", 7.0),
    "another adapter": lambda layer: layer.set_adapter("other"),
    "two adapters": lambda layer: layer.set_adapter(["default", "other"]),
    "deleted": lambda layer: layer.delete_adapter("default"),
    "evaluation": lambda layer: layer.eval(),
    "dropout": lambda layer: setattr(layer.lora_dropout["default"], "p", 0.5),
    "other dropout": lambda layer: layer.lora_dropout.update({"default": nn.Identity()}),
    "hook on the base": lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
    "hook before A": lambda layer: layer.lora_A["default"].register_forward_pre_hook(lambda *_: None),
    "backward hook on B": lambda layer: layer.lora_B["default"].register_full_backward_hook(lambda *_: None),
    "forward of the base": lambda layer: setattr(layer.base_layer, "forward", lambda x: x),
    "weight": replaced_weight,
    "dtype of A": recast,
    "B": lambda layer: layer.lora_B.update({"default": nn.Linear(2, 8, bias=False)}),
    "DoRA": lambda layer: layer.use_dora.update({"default": True}),
    "variant": lambda layer: layer.lora_variant.update({"default": object()}),
    "base of another class": lambda layer: setattr(layer.base_layer, "__class__", type("Own", (nn.Linear,), {})),
    "parametrised": lambda layer: nn.utils.parametrizations.weight_norm(layer.base_layer),
    "swapped weight": lambda layer: torch.utils.swap_tensors(
        layer.lora_A["default"].weight, nn.Parameter(layer.lora_A["default"].weight.detach().double())
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name):
    layer, x = layer_of(model(("default", "other"))), torch.ones(3, 8)
    layer(x)
    assert kept(layer, x)
    assert kept(layer)
    CHANGES[name](layer)
    assert not kept(layer, x)
    assert not kept(layer)


def test_inputs_and_modes_are_seen():
    layer, x = layer_of(model()), torch.ones(3, 8)
    layer(x)
    assert all(kept(layer, like) for like in (x.detach().clone(), torch.ones(2, 5, 8)))
    assert not any(kept(layer, other) for other in (x.double(), x.to_sparse()))
    with torch.autocast("cpu", torch.bfloat16):
        assert not kept(layer, x)
    with torch.autograd.forward_ad.dual_level():
        assert not kept(layer, x)
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not kept(layer, x)
    hook.remove()
    assert kept(layer, x)


def test_copies_look_for_themselves():
    net = model()
    layer, x = layer_of(net), torch.ones(3, 8)
    layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        assert not kept(copied, x)
    assert "fastpeft_kept" not in layer_of(copy.deepcopy(net)).__dict__
    fastpeft.restore(net)
    assert "fastpeft_kept" not in layer.__dict__


def test_what_is_kept_keeps_no_layer_alive():
    net = model()
    layer_of(net)(torch.ones(3, 8)).sum().backward()
    gone = [weakref.ref(part) for part in (layer_of(net), layer_of(net).base_layer, layer_of(net).base_layer.weight)]
    del net
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
