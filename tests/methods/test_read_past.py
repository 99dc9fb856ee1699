"""Layers whose weight another module reads past their forward: left out, refused by name, never called fused."""

import subprocess
import sys

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastpeft
from fastpeft import Bottleneck, Lora, Selective
from fastpeft.nn.read_past import read_past
from tests.support.untouched import assert_untouched, snapshot

X = torch.linspace(-1, 1, 12).view(3, 4)


def by_hand(layer, x):
    return F.linear(x, layer.weight, layer.bias)


class Reader(nn.Module):
    """``a`` is called; what becomes of ``b`` and ``more`` is up to the subclass."""

    slices = 1

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.more = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x):
        return self.read(self.a(x))


class InForward(Reader):
    def forward(self, x):
        return F.linear(self.a(x), self.b.weight, self.b.bias)


class InMethod(Reader):
    def read(self, x):
        return x @ self.b.weight


class InFunction(Reader):
    def read(self, x):
        return by_hand(self.b, x)


class ByOtherName(Reader):
    def read(this, x):
        layer = this.b
        return x @ getattr(layer, "weight")  # noqa: B009


class InProperty(Reader):
    @property
    def matrix(self):
        return self.b.weight.T

    def read(self, x):
        return x @ self.matrix


class InEvaluation(Reader):
    def read(self, x):
        if self.training:
            return self.b(x)
        if x.dim() > 1 and x.requires_grad:
            return self.b(x)
        return x @ self.b.weight


class OfBase(InForward):
    def forward(self, x):
        return super().forward(x) + 1


class OfList(Reader):
    def read(self, x):
        return self.b(x @ torch.cat([layer.weight for layer in self.more]).T)


class OfOneOfList(Reader):
    def read(self, x):
        return self.b(self.more[1](x @ self.more[0].weight))


class InPlace(Reader):
    def read(self, x):
        with torch.no_grad():
            self.b.weight.mul_(1.0)
        return self.b(x)


class Asking(Reader):
    """Asks about a weight, and takes it where neither the settings nor the arguments' defaults lead."""

    def read(self, x, fused=False, other=None):
        if isinstance(self.b.weight, nn.Parameter) and self.b.weight is not None:
            x = x.to(self.b.weight.dtype)
        if self.slices > 1 or fused:
            return x @ self.b.weight.T
        if other is not None:
            return other @ self.b.weight.T
        if self.slices == 1:
            return self.b(x) if not fused else x @ self.b.weight
        return x @ self.b.weight


READERS = [InForward, InMethod, InFunction, ByOtherName, InProperty, InEvaluation, OfBase, InPlace]


@pytest.mark.parametrize("kind", READERS, ids=lambda kind: kind.__name__)
def test_a_layer_that_is_passed_by_is_left_out_and_refused_by_name(kind):
    model = nn.Sequential(kind())
    before = snapshot(model)
    how = "changes its weight in place" if kind is InPlace else "computes with its weight itself"
    reason = rf"names 0.b, which is read past its forward, since {kind.__name__} {how}, expected"
    for config in (Lora(targets=["b"]), Selective(rows={"b": [0]}), Selective(columns={"0.b": [1]})):
        with pytest.raises(TypeError, match=reason):
            fastpeft.attach(model, config)
    with pytest.raises(ValueError, match=reason):
        fastpeft.attach(model, Bottleneck(targets=["b"]))
    assert_untouched(model, before)
    fastpeft.attach(model, Lora(r=2, exclude=["more.0", "more.1"], init="random"))
    assert model.fastpeft_attachment.linears == ["0.a"]
    model(X).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert fastpeft.report(model).fused == 1
    fastpeft.detach(model)
    assert read_past(model).keys() == {"0.b"}


@pytest.mark.parametrize(
    ("kind", "found"), [(OfList, {"more.0", "more.1"}), (OfOneOfList, {"more.0"}), (Asking, set())]
)
def test_which_are_passed_by(kind, found):
    assert read_past(kind()).keys() == found


def test_a_setting_can_open_the_path():
    model = Asking()
    model.slices = 2
    assert read_past(model).keys() == {"b"}
    model.slices = 1
    fastpeft.attach(model, Lora(targets=["b"]))  # and after attach a second one finds the same
    assert read_past(model) == {}


def test_a_forward_on_the_instance_is_the_one_that_is_read():
    model = Asking()
    model.forward = InForward.forward.__get__(model)
    assert read_past(model).keys() == {"b"}


def test_classes_without_source():
    """What a shell defines has byte code alone."""
    code = (
        "import torch, torch.nn.functional as F; from torch import nn; from fastpeft.nn.read_past import read_past\n"
        "class Net(nn.Module):\n"
        "    def __init__(s): super().__init__(); s.a, s.b = nn.Linear(2, 2), nn.Linear(2, 2)\n"
        "    def forward(s, x): return s.b(F.linear(x, s.a.weight).to(s.b.weight.dtype))\n"
        "print(sorted(read_past(Net())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['a']"


def test_attention_of_pytorch():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    layer.self_attn.out_proj = nn.Linear(8, 8)  # as some checkpoints' code has it
    model = nn.TransformerEncoder(layer, 2)
    with pytest.raises(TypeError, match="out_proj, which is read past its forward, since MultiheadAttention"):
        fastpeft.attach(model, Lora(targets=["out_proj"]))
    fastpeft.attach(model, Lora())
    assert {path.rpartition(".")[2] for path in model.fastpeft_attachment.linears} == {"linear1", "linear2"}


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrised_layers(wrap):
    model = Asking()
    wrap(model.b)
    with pytest.raises(TypeError, match="targets names b, which is a ParametrizedLinear, expected nn.Linear"):
        fastpeft.attach(model, Lora(targets=["b"]))
    fastpeft.attach(model, Lora(exclude=["more.0", "more.1"]))
    assert model.fastpeft_attachment.linears == ["a"]


def test_token_rows_and_added_biases():
    class Tied(Reader):
        def __init__(self):
            super().__init__()
            self.embed, self.b = nn.Embedding(5, 4), nn.Linear(4, 4, bias=False)

        def read(self, ids):
            return self.embed(ids) @ self.b.weight @ self.embed.weight.T

    model = Tied()
    before = snapshot(model)
    with pytest.raises(TypeError, match="tokens names embed, which is read past its forward, since Tied"):
        fastpeft.attach(model, Selective(tokens=[1]))
    with pytest.raises(ValueError, match="add_missing_bias has 'b', which is read past its forward"):
        fastpeft.attach(model, Selective(add_missing_bias=["b"]))
    assert_untouched(model, before)
    fastpeft.attach(model, Selective(add_missing_bias=True, params="bias"))
    assert model.b.bias is None


def test_peft_s_layers_are_not_called_fused_there(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["a", "b"], init_lora_weights=False)
    model = fastpeft.accelerate(peft.get_peft_model(InForward(), config))
    reason = "its weight is read past its forward, since InForward computes with its weight itself"
    assert {row.path.rpartition(".")[2]: row.status for row in fastpeft.report(model)} == {"a": "fused", "b": reason}
    with pytest.raises(ValueError, match=f"strict, but 1 of 2 LoRA layers would not be fused\n .*b: {reason}"):
        fastpeft.accelerate(model, strict=True)
    # A checkpoint of such a model has as little effect there as PEFT gives it.
    model.save_pretrained(tmp_path)
    loaded = fastpeft.load(InForward(), tmp_path)
    torch.testing.assert_close(loaded(X), model(X))
    assert [row.fused for row in fastpeft.report(loaded)] == [True, False]


def test_a_report_after_backward_says_which_adapters_got_no_gradient():
    model = Asking()  # which calls neither of ``more``
    fastpeft.attach(model, Lora(r=2))
    assert fastpeft.report(model).fused == 4
    model(X).square().sum().backward()
    rows = {row.path: row for row in fastpeft.report(model)}
    assert {path for path, row in rows.items() if row.fused} == {"a", "b"}
    text = "its adapter got no gradient in the last backward, so nothing was computed with it"
    assert rows["more.0"].status == rows["more.1"].status == text
    assert rows["more.0"].backend is None
    model.zero_grad()
    assert fastpeft.report(model).fused == 4
    with fastpeft.disable_adapter(model):
        assert {row.status for row in fastpeft.report(model)} == {"disabled"}
