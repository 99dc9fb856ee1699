"""Bottleneck adapters in every known family: placed, identical to nothing at first, reversible."""

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import Bottleneck
from tests.support.bottlenecks import PRESETS, attached, holders, move
from tests.support.models import FAMILIES, build, close, logits
from tests.support.untouched import assert_untouched, snapshot

# Layers with an MLP, attentions without cross-attention, cross-attentions.
COUNTS = dict.fromkeys(FAMILIES, (2, 2, 0)) | {"t5": (4, 4, 2)}


@pytest.mark.parametrize("name", FAMILIES)
class TestFamilies:
    @pytest.mark.oldest
    @pytest.mark.parametrize("preset", PRESETS)
    def test_forward_backward_and_back_again(self, name, preset):
        model = build(name)
        with torch.no_grad():
            before, expected = snapshot(model), logits(model)
        attached(name, Bottleneck(preset, reduction_factor=4), model=model)
        mlps, attentions, _ = COUNTS[name]
        assert len(holders(model)) == mlps + attentions * (preset == "double_seq_bn")
        start = logits(model)
        if preset in ("par_bn", "scaled_par_bn"):
            assert close(start, expected)  # U starts at 0
        else:
            assert (start - expected).abs().max() < 0.1 * expected.abs().max()
        move(model).train()
        logits(model).square().sum().backward()
        trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
        assert all(".fastpeft_bottleneck.adapters.default." in path for path in trained)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        model.eval()
        with torch.no_grad():
            assert not close(logits(model), expected)
            with fastpeft.disable_adapter(model):
                assert torch.equal(logits(model), expected)
            fastpeft.detach(model)
            assert torch.equal(logits(model), expected)
        assert_untouched(model, before)

    def test_all_places(self, name):
        model = attached(name, Bottleneck("double_seq_bn", places=["cross", "mlp", "attention"], size=3))
        assert len(holders(model)) == sum(COUNTS[name])
        assert {h.adapters["default"].bottleneck for h in holders(model)} == {3}

    def test_leave_out_and_widths_by_layer(self, name):
        layers = COUNTS[name][0]
        model = attached(name, Bottleneck(leave_out=[0], reduction_factor={"1": 2, "default": 16}))
        assert [h.site.layer for h in holders(model)] == list(range(1, layers))
        assert [h.adapters["default"].bottleneck for h in holders(model)] == [16] + [2] * (layers - 2)
        with pytest.raises(ValueError, match=f"leave_out has 9, expected layer numbers below {layers}"):
            attached(name, Bottleneck(leave_out=[9]))

    @torch.no_grad()
    def test_two_adapters(self, name):
        model = move(attached(name))
        first = logits(model)
        attached(name, Bottleneck("par_bn"), "b", model)
        assert torch.equal(logits(model), first)
        assert not any(p.requires_grad for path, p in model.named_parameters() if ".b." in path)
        fastpeft.set_adapter(model, "b")
        assert {path.split(".adapters.")[1][0] for path, p in model.named_parameters() if p.requires_grad} == {"b"}
        second = logits(move(model, 4))
        assert not close(first, second)
        fastpeft.set_adapter(model, ["default", "b"])
        both = logits(model)
        assert not close(both, first)
        assert not close(both, second)
        fastpeft.set_adapter(model, "default", trainable=False)
        assert torch.equal(logits(model), first)
        assert not any(p.requires_grad for p in model.parameters())
        fastpeft.set_adapter(model, [])
        assert torch.equal(logits(model), logits(build(name)))
        assert {row.status for row in fastpeft.report(model)} == {"no active adapter"}

    @torch.no_grad()
    @pytest.mark.parametrize(
        "config",
        [
            Bottleneck(reduction_factor=4),
            Bottleneck("double_seq_bn", size=3, norm="layer", norm_after=True, gating=True, scale="learned"),
            Bottleneck("par_bn", dropout=0.1, norm="rms"),
            Bottleneck("adapter_plus", reduction_factor={"0": 2, "default": 4}),
        ],
        ids=lambda config: config.preset,
    )
    def test_save_and_load(self, name, config, tmp_path):
        model = move(attached(name, config))
        fastpeft.save(model, tmp_path)
        new = fastpeft.load(build(name), tmp_path)
        assert torch.equal(logits(new), logits(model))
        other = attached(name, config, "mine").eval()
        fastpeft.load(other, tmp_path, "mine")
        assert torch.equal(logits(other), logits(model))
        fastpeft.save(new, tmp_path / "again")
        assert torch.equal(logits(fastpeft.load(build(name), tmp_path / "again")), logits(model))

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, name, reentrant):
        model = move(attached(name, Bottleneck("double_seq_bn", reduction_factor=4, original_norm_before=True))).train()

        def gradients():
            model.zero_grad()
            torch.manual_seed(7)  # recomputation draws the same dropout
            logits(model).square().sum().backward()
            return {path: p.grad.clone() for path, p in model.named_parameters() if p.grad is not None}

        expected = gradients()
        if reentrant and name != "vit":  # reentrant checkpointing needs an input that requires a gradient
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant and name != "vit"})
        actual = gradients()
        assert actual.keys() == expected.keys()
        largest = max(gradient.abs().max() for gradient in expected.values())
        for path, gradient in expected.items():
            assert (actual[path] - gradient).abs().max() <= 64 * torch.finfo(torch.float32).eps * largest


@torch.no_grad()
def test_formula_where_norms_come_before():
    """Llama: h + u(h + X) after the MLP, u(X) beside it, by hand."""
    for preset in ("seq_bn", "par_bn", "adapter_plus"):
        model = move(attached("llama", Bottleneck(preset, reduction_factor=4, places=["mlp"])))
        layer = model.model.layers[0]
        adapter = layer.mlp.fastpeft_bottleneck.adapters["default"]
        x = torch.randn(2, 3, 32)
        h = layer.mlp.forward(layer.post_attention_layernorm(x))
        z = x if preset == "par_bn" else h + x
        hidden = nn.functional.linear(z, adapter.down_weight, adapter.down_bias)
        hidden = nn.functional.gelu(hidden) if preset == "adapter_plus" else hidden.relu()
        u = adapter.scale * nn.functional.linear(hidden, adapter.up_weight, adapter.up_bias)
        assert close(layer.mlp(layer.post_attention_layernorm(x)), h + u)


@torch.no_grad()
def test_formula_where_norms_come_after():
    """BERT: LN(h + X + u(LN(h + X))), LN(h + X + u(h)), LN(h + X + u(X)), z + u(z)."""
    for preset, what in (("seq_bn", "z"), ("double_seq_bn", "h"), ("par_bn", "x"), ("adapter_plus", "z")):
        model = move(attached("bert", Bottleneck(preset, reduction_factor=4)))
        output = model.bert.encoder.layer[0].output
        adapter = next(h for h in holders(output)).adapters["default"]
        x, wide = torch.randn(2, 3, 32), torch.randn(2, 3, 64)
        h = output.dense(wide)
        z = output.LayerNorm.forward(h + x)
        u = adapter({"z": z, "h": h, "x": x}[what], torch.zeros_like(x))
        expected = z + u if preset == "adapter_plus" else output.LayerNorm.forward(h + x + u)
        assert close(output(wide, x), expected)
        assert close(output(wide, input_tensor=x), expected)
