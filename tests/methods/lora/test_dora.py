"""DoRA attached: PEFT's numbers, PEFT's checkpoints both ways, merging; what cannot be says so and changes nothing."""

import copy

import peft
import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.methods.formats.inspection import inspect_checkpoints
from fastpeft.nn import LoraLinear
from fastpeft.testing import assert_no_worse
from tests.support.peft_layers import IDS, Model
from tests.support.quantised_models import ids, load

BF16, FP32 = torch.bfloat16, torch.float32
TARGETS = ["up", "down"]


def fresh(dtype=FP32):
    torch.manual_seed(0)
    return Model().to(dtype)


def trained_by_peft(folder, dtype=FP32, **settings):
    """A checkpoint of PEFT's, and the model with it."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "use_dora": True, **settings}
    model = peft.get_peft_model(fresh(dtype), peft.LoraConfig(**settings, init_lora_weights=False))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def gradients(model, find):
    """By PEFT's names."""
    model(IDS).square().sum().backward()
    return {name: p.grad for name, p in find(model) if p.grad is not None}


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"rank_pattern": {"up": 7}, "alpha_pattern": {"up": 3}}]
)
def test_a_checkpoint_of_pefts_has_pefts_numbers(tmp_path, settings):
    theirs = trained_by_peft(tmp_path, **settings)
    ours = fresh()
    fastpeft.load(ours, tmp_path, is_trainable=True)
    assert ours.up.adapters["default"].lora_magnitude is not None
    assert {row.status for row in fastpeft.report(ours).layers if row.kind == "LoRA layers"} == {"fused"}
    for _ in range(3):
        torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=1e-5, atol=1e-5)
    wanted = gradients(theirs, lambda m: m.base_model.model.named_parameters())
    found = gradients(ours, lambda m: m.named_parameters())
    assert len(found) == len(wanted) == 6
    for name, value in wanted.items():
        name = name.replace(".lora_magnitude_vector.default.weight", ".adapters.default.lora_magnitude")
        name = name.replace("lora_A.default.weight", "adapters.default.lora_A")
        name = name.replace("lora_B.default.weight", "adapters.default.lora_B")
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_peft_loads_what_was_trained_here(tmp_path):
    ours = fresh()
    fastpeft.attach(ours, fastpeft.Lora(r=3, alpha=5, dropout=0.1, targets=TARGETS, dora=True, init="random"))
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        ours(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    fastpeft.save(ours.eval(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path).eval()
    assert theirs.peft_config["default"].use_dora
    torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=1e-5, atol=1e-5)
    again = fresh()
    fastpeft.load(again, tmp_path)
    assert torch.equal(again.eval()(IDS), ours(IDS))


@pytest.mark.parametrize("init", ["kaiming", "random"])
def test_it_begins_as_lora(init):
    """The magnitudes are the norms that the rows have, as in PEFT."""
    torch.manual_seed(2)
    layer = LoraLinear(nn.Linear(20, 12), r=4, init=init, dora=True)
    plain = LoraLinear(copy.deepcopy(layer.base_layer), r=4, init=init)
    plain.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(7, 20)
    torch.testing.assert_close(layer(x), plain(x))
    assert "dora=True" in repr(layer)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_merging_is_pefts(tmp_path, dtype):
    theirs, ours = trained_by_peft(tmp_path, dtype), fresh(dtype)
    fastpeft.load(ours, tmp_path)
    before, weight = ours(IDS), ours.up.base_layer.weight.clone()
    delta, _ = ours.up.delta("default")
    fastpeft.merge(ours)
    theirs.merge_adapter()
    eps = torch.finfo(dtype).eps
    wanted = theirs.base_model.model.up.base_layer.weight
    torch.testing.assert_close(ours.up.base_layer.weight, wanted, rtol=2 * eps, atol=2 * eps)
    torch.testing.assert_close(ours(IDS), before, rtol=40 * eps, atol=40 * eps)
    torch.testing.assert_close((weight + delta).to(dtype), wanted, rtol=2 * eps, atol=2 * eps)
    with pytest.raises(ValueError, match="delta of a merged layer with DoRA; unmerge it first"):
        ours.up.delta("default")
    fastpeft.unmerge(ours)
    assert torch.equal(ours.up.base_layer.weight, weight)
    assert torch.equal(ours(IDS), before)


def test_adapters_are_switched_disabled_and_taken_off(tmp_path):
    ours, bare = fresh(), fresh()(IDS)
    fastpeft.attach(ours, fastpeft.Lora(r=3, targets=TARGETS, dora=True, init="random"), name="dora")
    fastpeft.attach(ours, fastpeft.Lora(r=3, targets=["up"], init="random"), name="lora")
    outputs = {}
    for name in ("dora", "lora"):
        fastpeft.set_adapter(ours, [name])
        outputs[name] = ours(IDS)
        with fastpeft.disable_adapter(ours):
            torch.testing.assert_close(ours(IDS), bare)
    assert not torch.equal(outputs["dora"], outputs["lora"])
    with pytest.raises(ValueError, match="set_adapter: .'dora', 'lora'. all adapt up and one is DoRA"):
        fastpeft.set_adapter(ours, ["dora", "lora"])
    assert torch.equal(ours(IDS), outputs["lora"])
    fastpeft.set_adapter(ours, ["dora"])
    assert torch.equal(copy.deepcopy(ours)(IDS), outputs["dora"])
    fastpeft.detach(ours)
    torch.testing.assert_close(ours(IDS), bare)


def test_dropout_acts():
    torch.manual_seed(2)
    layer = LoraLinear(nn.Linear(20, 12), r=4, dropout=0.5, init="random", dora=True)
    layer.adapters["default"].lora_magnitude.data.mul_(1.5)
    x = torch.randn(7, 20)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


REFUSED = {
    "a bias of B": (lambda: fastpeft.Lora(dora=True, lora_bias=True), "dora is True beside lora_bias=True"),
    "no flag": (lambda: fastpeft.Lora(dora="yes"), "dora is 'yes'"),
    "an embedding": (
        lambda: fastpeft.attach(fresh(), fastpeft.Lora(targets=["embed"], dora=True)),
        "attach: dora is True, expected False beside the embedding embed",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused(case):
    make, message = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_checkpoint_without_magnitudes_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    trained_by_peft(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: t for key, t in tensors.items() if "up.lora_magnitude" not in key}, file)
    with pytest.raises(ValueError, match="up has no lora_magnitude_vector, but the config says use_dora"):
        fastpeft.load(fresh(), tmp_path)
    assert any("no lora_magnitude_vector" in problem for problem in inspect_checkpoints(tmp_path)[0].problems)


def test_whatever_surrounds_the_layer():
    """A hook on the base, a transform of torch.func, a compiled call: the same numbers."""
    torch.manual_seed(3)
    layer = LoraLinear(nn.Linear(20, 12), r=4, init="random", dora=True)
    layer.adapters["default"].lora_magnitude.data.mul_(1.3)
    x, called = torch.randn(40, 20), []
    wanted = layer(x)
    torch.testing.assert_close(torch.func.vmap(layer)(x), wanted)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), wanted)
    handle = layer.base_layer.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(layer(x), wanted)
    assert called
    assert layer.fastpeft_report() == "its adapter is DoRA, and its base has hooks"
    with torch.autocast("cpu", BF16):
        beside = layer(x)  # in plain PyTorch
        handle.remove()
        found = layer(x)
    assert_no_worse(found, beside, copy.deepcopy(layer).double()(x.double()))


@pytest.mark.parametrize("bits", ["nf4 nested", "int8"])
def test_a_quantised_model_is_pefts(bits):
    x, losses = ids(), []
    for ours in (True, False):
        model = load("llama", bits).train()
        torch.manual_seed(1)
        settings = {"use_dora": True, "r": 4, "target_modules": ["q_proj", "down_proj"]}
        config = peft.LoraConfig(**settings)
        model = fastpeft.attach(model, config) if ours else peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(2)
        for name, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0].partition("layers")[2]):
            if "lora_B" in name or "magnitude" in name:
                parameter.data.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        losses.append(model(x, labels=x).loss)
    torch.testing.assert_close(*losses, rtol=0.01, atol=0)
