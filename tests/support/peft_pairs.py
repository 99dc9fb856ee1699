"""A model that we attach adapters to beside the same one that PEFT wraps, with the same weights."""

import pytest
import torch
from torch import nn

import fastpeft
from tests.support.models import VOCAB, bert, t5

peft = pytest.importorskip("peft", reason="PEFT is not installed")

# float64: two orders of summation differ by some 1e-15, which layers and steps let grow by a few orders of magnitude;
# any real difference (a scale, a mask, a layer left out) is above 1e-4.
TOLERANCE = 1e-10
# Ours, and what PEFT calls it.
FIELDS = {
    "targets": "target_modules",
    "exclude": "exclude_modules",
    "layers": "layers_to_transform",
    "rslora": "use_rslora",
}


def gated_t5(**extra):
    return t5(feed_forward_proj="gated-gelu", **extra)


def mlp():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Sequential(nn.Linear(16, 16), nn.Tanh()), nn.Linear(16, 3))


def build(kind, dtype=torch.float64, **extra):
    torch.manual_seed(0)
    return kind(**extra).to(dtype).train()


def loss_of(model, kind, seed=1):
    generator = torch.Generator().manual_seed(seed)
    if kind is mlp:
        dtype = next(model.parameters()).dtype
        x, y = torch.randn(5, 8, generator=generator).to(dtype), torch.randn(5, 3, generator=generator).to(dtype)
        return (model(x) - y).square().mean()
    ids = torch.randint(VOCAB, (2, 7), generator=generator)
    labels = torch.tensor([0, 1]) if kind is bert else ids
    return model(input_ids=ids, labels=labels).loss


def peft_name(name):
    """Our name of a parameter for one of PEFT's."""
    name = name.removeprefix("base_model.model.")
    for theirs, ours in (
        ("lora_A.default.weight", "adapters.default.lora_A"),
        ("lora_B.default.weight", "adapters.default.lora_B"),
        ("lora_B.default.bias", "adapters.default.lora_bias"),
        ("modules_to_save.default.", "copies.default."),
    ):
        name = name.replace(theirs, ours)
    return name


def pair(kind, settings, dtype=torch.float64, **extra):
    """The same model attached to by us and wrapped by PEFT, with the same random adapters."""
    ours, base = build(kind, dtype, **extra), build(kind, dtype, **extra)
    fastpeft.attach(ours, fastpeft.Lora(r=4, alpha=6, **settings))
    theirs = {FIELDS.get(name, name): value for name, value in {"targets": "all-linear", **settings}.items()}
    config = peft.LoraConfig(r=4, lora_alpha=6, **theirs)
    wrapped = peft.get_peft_model(base, config).train()
    names = {peft_name(name): p for name, p in wrapped.named_parameters()}
    own = dict(ours.named_parameters())
    assert names.keys() == own.keys()
    assert {n for n, p in names.items() if p.requires_grad} == {n for n, p in own.items() if p.requires_grad}
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.requires_grad and ".lora_" in name:
                names[name].copy_(torch.randn(parameter.shape, dtype=parameter.dtype) / 8)
            parameter.copy_(names[name])
            assert parameter.dtype == names[name].dtype
    return ours, wrapped, names


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert (actual - expected).abs().max() <= tolerance * max(1, expected.abs().max())
