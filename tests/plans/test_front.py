"""A layer's call where nothing but x is new passes the layer's Python by; where anything else is, it does not."""

import sys
from contextlib import nullcontext

import peft
import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

import fastpeft
from fastpeft import _host
from tests.support import host_extension


@pytest.fixture(autouse=True, scope="module", params=host_extension.WAYS)
def _way(request):
    with host_extension.serves(request.param):
        yield


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.between = lambda x: None

    def forward(self, x):
        q = self.q_proj(x)
        self.between(x)
        return self.o_proj(q + self.k_proj(x) * self.v_proj(x))


NAMES = ["q_proj", "k_proj", "v_proj", "o_proj"]


def model(kind, dropout=0.0):
    torch.manual_seed(0)
    base = nn.ModuleDict({"attn": Siblings()})
    if kind == "attached":
        fastpeft.attach(base, fastpeft.Lora(r=2, dropout=dropout, targets=NAMES, init="random"))
        return base.train()["attn"]
    config = peft.LoraConfig(r=2, target_modules=NAMES, lora_dropout=dropout, init_lora_weights=False)
    return fastpeft.accelerate(peft.get_peft_model(base, config)).train().base_model.model["attn"]


def without_fronts(patch):
    for module in ("front", "sharing"):
        patch.setattr(f"fastpeft.nn.{module}.bound", lambda *_: None)


def step(net, x, backward=True):
    """The output and the adapters' gradients, with the masks of one seed."""
    torch.manual_seed(1)
    y = net(x)
    if not (backward and y.requires_grad):
        return [y]
    return [y, *torch.autograd.grad(y.square().sum(), [p for p in net.parameters() if p.requires_grad])]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def entered(call):
    """The Python functions of the package that a call enters."""
    names = []

    def note(frame, event, argument):
        file = frame.f_code.co_filename
        if (
            event == "call"
            and "fastpeft/" in file
            and not any(other in file for other in ("/tests/", "/_host_python/"))
        ):
            names.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize("kind", ["attached", "accelerated"])
def test_the_layers_own_python_is_passed_by(kind):
    net, x = model(kind), torch.randn(5, 8)
    for _ in range(4):
        step(net, x)
    # Per layer its forward, which asks; the siblings' leader, and the hooks around their call.
    usual = ["begin", *["forward", "computed"] * 4, "_lead", "outputs", "end"]
    assert sorted(entered(lambda: net(x))) == sorted(usual)
    with torch.autocast("cpu", torch.bfloat16):  # casts every tensor
        assert "_call" in entered(lambda: net(x))


def replaced(net):
    net.k_proj.base_layer.weight = nn.Parameter(net.k_proj.base_layer.weight.detach() * 2, requires_grad=False)


def written(net):
    with torch.no_grad():
        net.v_proj.base_layer.weight.mul_(2)


def hooked(net):
    net.k_proj.base_layer.register_forward_hook(lambda module, inputs, output: output * 2)


CHANGES = {
    "nothing": lambda net, x: None,
    "a weight replaced": lambda net, x: replaced(net),
    "a weight written": lambda net, x: written(net),
    "a hook": lambda net, x: hooked(net),
    "x written": lambda net, x: x.mul_(2),
    "evaluation": lambda net, x: net.eval(),
    "no sharing": lambda net, x: setattr(net.v_proj, "fastpeft_shared", None),
}


@pytest.mark.parametrize("kind", ["attached", "accelerated"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("inside", [False, True], ids=["between calls", "between siblings"])
def test_whatever_else_changes_is_seen(kind, dropout, change, inside, monkeypatch):
    found = []
    for served in (True, False):
        if not served:
            without_fronts(monkeypatch)
        net, x = model(kind, dropout), torch.ones(5, 8)
        for _ in range(4):
            step(net, x)

        def once(x, net=net):
            net.between = lambda x: None
            CHANGES[change](net, x)

        if inside:
            net.between = once
        else:
            once(x)
        # What was written between siblings is what backward would have needed.
        found.append([step(net, x, backward=not inside), step(net, x)])
    for ours, plain in zip(*found, strict=True):
        assert same(ours, plain)


@pytest.mark.parametrize("kind", ["attached", "accelerated"])
@pytest.mark.parametrize(
    "within", [nullcontext, torch.no_grad, torch.inference_mode, save_on_cpu], ids=lambda mode: mode.__name__
)
def test_modes(kind, within, monkeypatch):
    found = []
    for served in (True, False):
        if not served:
            without_fronts(monkeypatch)
        net, x = model(kind, 0.5), torch.ones(5, 8)
        for _ in range(4):
            step(net, x)
        with within():
            found.append([step(net, x) for _ in range(4)])
    for ours, plain in zip(*found, strict=True):
        assert same(ours, plain)


def test_a_replica_and_other_inputs_are_not_served():
    net, x = model("attached"), torch.randn(5, 8)
    step(net, x)
    layer = net.o_proj
    *_, front = layer.__dict__["fastpeft_kept"]
    assert isinstance(front, _host.serving().Front)
    assert torch.equal(front(layer, x), layer(x))
    assert [front(net.q_proj, x), front(layer, x.double()), front(layer, None)] == [None, None, None]
    with pytest.raises((RuntimeError, TypeError), match="argument"):
        front(layer)
