"""DoRA in PEFT's layers: fused, as accurate as PEFT's own, whatever surrounds it; what is not served says so."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft import _check, ops, reference
from fastpeft.testing import assert_no_worse
from tests.support.peft_layers import IDS, Model, assert_pefts, peft_model, statuses, up
from tests.support.quantised_models import FORMATS, ids, load

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


class Masked(nn.Module):
    """Drops with our mask, whose seed is drawn as ours is."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        seed = _check.seed("dropout", "seed", None, x.device)
        mask = reference.keep_mask(seed, self.p, x[..., 0].numel(), x.shape[-1], x.dtype)
        return x * mask.view(x.shape) * reference.inverse_keep(self.p)


def spread(model, by=0.1):
    """Magnitudes as after some training: gains other than 1."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + by * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def dora(dtype=FP32, **settings):
    return spread(peft_model(dtype, use_dora=True, **settings))


class Wide(nn.Module):
    """Layers wide enough that errors are those of many sums."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(128, 160), nn.Linear(160, 96, bias=False)


def masked(model):
    """A copy whose dropout draws our masks."""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, drop in getattr(module, "lora_dropout", {}).items():
            if isinstance(drop, nn.Dropout):
                module.lora_dropout[name] = Masked(drop.p)
    return model


def computed(model, name, x):
    torch.manual_seed(3)
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = getattr(model.base_model.model, name)(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(4), dtype=FP64).to(y.dtype)
    y.backward(dy)
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "dx": x.grad} | grads


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("adapters", [FP32, None], ids=["float32 adapters", "the base's dtype"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_no_less_accurate_than_peft(dtype, adapters, dropout):
    """Outputs and every gradient; with dropout PEFT's second base product is in float32 beside float32 adapters."""
    torch.manual_seed(0)
    settings = {"r": 8, "lora_alpha": 4, "target_modules": ["up", "down"], "init_lora_weights": False}
    settings |= {"use_dora": True, "lora_dropout": dropout}
    plain = spread(get_peft_model(Wide().to(dtype), LoraConfig(**settings))).train()
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters or dtype)
    ours = fastpeft.accelerate(copy.deepcopy(plain))
    assert set(statuses(ours).values()) == {"fused"}
    for name, width in (("up", 128), ("down", 160)):
        x = torch.randn(200, width, generator=torch.Generator().manual_seed(5)).to(dtype)
        found, theirs = computed(ours, name, x), computed(masked(plain), name, x)
        exact = computed(masked(plain).double(), name, x.double())
        assert found.keys() == theirs.keys() == exact.keys()
        for key in exact:
            if "magnitude" in key and dropout and (dtype, adapters) == (BF16, FP32):
                error = (found[key].double() - exact[key]).abs().max() / exact[key].abs().max()
                assert error < torch.finfo(BF16).eps, key  # as without dropout
                continue
            assert_no_worse(found[key], theirs[key], exact[key], key)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_ten_steps_have_pefts_losses(dtype, dropout):
    def curve(model):
        torch.manual_seed(7)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for step in range(10):
            loss = (model(IDS + step % 3).float() - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return torch.tensor(losses)

    plain = dora(dtype, lora_dropout=dropout).train()
    ours = fastpeft.accelerate(copy.deepcopy(plain))
    found, wanted = curve(ours), curve(masked(plain))
    assert wanted[-1] < wanted[0]
    tolerance = {FP32: 1e-5, BF16: 2 * torch.finfo(BF16).eps}[dtype]
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=0)


def test_gpt2s_transposed_layers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    settings = LoraConfig(r=4, use_dora=True, init_lora_weights=False, target_modules=["c_attn", "c_fc"])
    plain = spread(get_peft_model(transformers.GPT2LMHeadModel(config), settings)).eval()
    ours = fastpeft.accelerate(copy.deepcopy(plain))
    assert set(statuses(ours).values()) == {"fused"}
    torch.testing.assert_close(ours(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"use_rslora": True}, {"rank_pattern": {"up": 7}, "alpha_pattern": {"up": 3}}])
def test_scales_and_patterns(settings, monkeypatch):
    plain = dora(**settings)
    assert_pefts(fastpeft.accelerate(copy.deepcopy(plain)), plain, 2, monkeypatch, tolerance=1e-5)


def test_adapters_are_switched_disabled_and_merged(monkeypatch):
    plain = dora()
    plain.add_adapter("lora", LoraConfig(r=3, target_modules=["up"], init_lora_weights=False))
    plain.add_adapter("other", LoraConfig(r=5, use_dora=True, target_modules=["down"], init_lora_weights=False))
    ours = fastpeft.accelerate(copy.deepcopy(plain))
    for name, fused in (("lora", 1), ("other", 1), ("default", 2)):
        for model in (ours, plain):
            model.set_adapter(name)
        for _ in range(3):
            assert_pefts(ours, plain, fused, monkeypatch, tolerance=1e-5)
    with ours.disable_adapter(), plain.disable_adapter():
        assert_pefts(ours, plain, 0, monkeypatch, tolerance=0)
    for model in (ours, plain):
        model.merge_adapter()
    assert_pefts(ours, plain, 0, monkeypatch, tolerance=0)
    for model in (ours, plain):
        model.unmerge_adapter()
    assert_pefts(ours, plain, 2, monkeypatch, tolerance=1e-5)
    assert statuses(fastpeft.restore(ours)) == statuses(plain)
    assert torch.equal(ours(IDS), plain(IDS))


def test_register_builds_fused_layers():
    config = fastpeft.register(LoraConfig(r=4, use_dora=True, target_modules=["up", "down"], init_lora_weights=False))
    torch.manual_seed(0)
    ours = spread(get_peft_model(Model(), config))
    assert set(statuses(ours).values()) == {"fused"}


REASONS = {
    "several": (
        lambda model: model.base_model.set_adapter(["default", "other"]),
        "several adapters are active, of which one is DoRA",
    ),
    "a hook": (
        lambda model: up(model).lora_magnitude_vector["default"].register_forward_hook(lambda *_: None),
        "adapter 'default' is DoRA, whose magnitude has hooks",
    ),
    "a trained base": (
        lambda model: up(model).base_layer.weight.requires_grad_(),
        "its adapter is DoRA, and base_layer.weight is trained",
    ),
    "a base that is called": (
        lambda model: up(model).base_layer.register_forward_hook(lambda *_: None),
        "its adapter is DoRA, and base_layer has hooks or a replaced forward",
    ),
    "another magnitude": (
        lambda model: up(model).lora_magnitude_vector["default"].to(FP64),
        "the magnitude is torch.float64, the input torch.float32",
    ),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_is_not_served_is_pefts(case, monkeypatch):
    change, reason = REASONS[case]
    plain = dora()
    plain.add_adapter("other", LoraConfig(r=3, target_modules=["up"], init_lora_weights=False))
    ours = fastpeft.accelerate(copy.deepcopy(plain))
    for _ in range(3):
        assert_pefts(ours, plain, 2, monkeypatch, tolerance=1e-5)
    for model in (plain, ours):
        change(model)
    assert_pefts(ours, plain, 1, monkeypatch, tolerance=1e-5)
    assert statuses(ours)["up"] == reason


def test_a_tensor_that_is_written_through_data_is_seen(monkeypatch):
    plain = dora()
    ours = fastpeft.accelerate(copy.deepcopy(plain))
    for _ in range(4):
        for model in (ours, plain):
            up(model).lora_B["default"].weight.data.mul_(1.5)
            up(model).base_layer.weight.data.mul_(0.9)
        assert_pefts(ours, plain, 2, monkeypatch, tolerance=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(reentrant):
    ours = fastpeft.accelerate(dora(lora_dropout=0.5)).train()
    results = []
    for way in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=reentrant)):
        for _ in range(3):
            torch.manual_seed(3)
            ours.zero_grad()
            x = torch.ones(4, 12, requires_grad=True)
            way(up(ours), x).sum().backward()
            results.append([x.grad, *(p.grad for p in up(ours).parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(results[0], result, strict=True))


def test_autocast_and_compile():
    plain = dora()
    ours, exact = fastpeft.accelerate(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    tokens = torch.arange(240).view(12, 20) % (IDS.max() + 1)
    with torch.autocast("cpu", BF16):
        found, wanted = ours(tokens), plain(tokens)
    assert found.dtype == wanted.dtype
    assert_no_worse(found, wanted, exact(tokens))
    torch._dynamo.reset()
    compiled = torch.compile(up(ours), backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 12)
    torch.testing.assert_close(compiled(x), up(plain)(x), rtol=1e-5, atol=1e-5)
    compiled(x).sum().backward()
    assert up(ours).lora_magnitude_vector["default"].weight.grad is not None


@pytest.mark.parametrize("bits", FORMATS)
@pytest.mark.parametrize("rows", [40, 4])
def test_a_quantised_base(bits, rows):
    """Whatever the number of rows: the norm needs the weight written out."""
    results, x = [], ids(1, rows)
    for change in (fastpeft.accelerate, lambda model: model):
        # Loaded for each: PEFT's second call of DoRA around bitsandbytes' int8 fails on a CPU.
        settings = {"r": 8, "use_dora": True, "target_modules": "all-linear", "init_lora_weights": False}
        model = load("llama", bits)
        torch.manual_seed(1)
        model = change(spread(get_peft_model(model, LoraConfig(**settings))).train())
        found = {row.status for row in fastpeft.report(model).layers if row.kind == "LoRA layers"}
        assert (found == {"fused"}) == (change is fastpeft.accelerate)
        loss = model(x, labels=x).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for found, wanted in zip(*results, strict=True):
        assert (found - wanted).float().norm() <= 0.1 * wanted.float().norm()


def test_the_norm_is_pefts():
    """Of what PEFT itself initialises: gains of 1, and DoRA as LoRA."""
    model = peft_model(use_dora=True)
    layer = up(model)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    norm = ops.dora_norm(layer.base_layer.weight, a, b, layer.scaling["default"])
    torch.testing.assert_close(norm, layer.lora_magnitude_vector["default"].weight.detach())
