"""Bottleneck adapters beside LoRA: in one adapter, or one after the other."""

import pytest
import torch

import fastpeft
from fastpeft import Bottleneck, Lora
from tests.support.bottlenecks import attached, holders, move
from tests.support.models import build, close, logits
from tests.support.untouched import assert_untouched, snapshot


class TestTogether:
    """Several methods in one adapter, or beside one another."""

    BOTH = (Lora(r=2, init="random"), Bottleneck(reduction_factor=4))

    @pytest.mark.parametrize("name", ["llama", "bert"])
    @pytest.mark.parametrize("order", ["together", "lora first", "bottleneck first"])
    def test_lora_and_bottleneck(self, name, order, tmp_path):
        model = build(name)
        with torch.no_grad():
            before, expected = snapshot(model), logits(model)
        if order == "together":
            fastpeft.attach(model, self.BOTH)
            saved = ["default"]
        else:
            for i, config in enumerate(self.BOTH if order == "lora first" else self.BOTH[::-1]):
                fastpeft.attach(model, config, "ab"[i])
            saved = ["a", "b"]
            fastpeft.set_adapter(model, saved)
        linears = [m for m in model.modules() if isinstance(m, fastpeft.nn.LoraLinear)]
        assert not any("fastpeft_bottleneck" in path for path in model.fastpeft_attachment.linears)
        assert len(linears) == len(model.fastpeft_attachment.linears) >= 12
        report = fastpeft.report(move(model))
        mlps = sum(row.kind == "gated MLPs" for row in report)
        assert report.fused == len(report) == len(linears) + mlps + 2
        assert f"{len(linears)} of {len(linears)} LoRA layers fused" in str(report)
        assert "2 of 2 bottleneck adapters fused" in str(report)
        with torch.no_grad():
            moved = logits(model)
            with fastpeft.disable_adapter(model):
                assert torch.equal(logits(model), expected)
            assert torch.equal(logits(model), moved)
            new = build(name)
            for adapter in saved:
                fastpeft.save(model, tmp_path / adapter, adapter)
                fastpeft.load(new, tmp_path / adapter, adapter)
            fastpeft.set_adapter(new, saved)
            assert torch.equal(logits(new), moved)
            if order == "together":
                assert sorted(p.name for p in (tmp_path / "default").iterdir()) == ["bottleneck", "lora"]
            fastpeft.detach(model)
        assert_untouched(model, before)

    def test_merging_names_what_cannot_be(self):
        model = attached("llama", self.BOTH)
        before = snapshot(model)
        with pytest.raises(
            ValueError, match="adapter 'default' is a bottleneck adapter, which cannot be: it is not linear"
        ):
            fastpeft.merge(model)
        assert_untouched(model, before)
        model = attached("llama", Bottleneck(), "b", attached("llama", Lora(init="random")))
        with torch.no_grad():
            expected = logits(model)
            fastpeft.merge(model)  # the bottleneck adapter is not active
            assert close(logits(model), expected)
            fastpeft.detach(model, keep_merged=True)
            assert close(logits(model), expected)
        assert not holders(model)

    def test_nothing_half_attached(self, monkeypatch):
        """LoRA has been applied when the bottleneck adapters run out of memory."""
        from fastpeft.methods.bottleneck import method

        def failing(*args):
            raise MemoryError("no more")

        for model, name in (
            (build("llama"), "default"),
            (attached("llama", Lora()), "b"),
            (attached("llama", Bottleneck(), model=attached("llama", Lora(), "x")), "b"),
        ):
            before = snapshot(model)
            with monkeypatch.context() as patch:
                patch.setattr(method, "_build", failing)
                with pytest.raises(MemoryError):
                    fastpeft.attach(model, self.BOTH, name)
            assert_untouched(model, before)
            logits(model)

    def test_bad_lists(self):
        model = build("llama")
        before = snapshot(model)
        for config, error, message in (
            ([], ValueError, "config is an empty list"),
            ([Lora(), Lora()], ValueError, "config has LoRA twice, expected a name for each"),
            ([Lora(), "seq_bn"], TypeError, r"config is str, expected fastpeft\.Lora, .*fastpeft\.Bottleneck"),
            ([Bottleneck(), Lora(targets=["nothing"])], ValueError, "matches no module"),
            ([Lora(), Bottleneck(leave_out=[0, 1])], ValueError, "matches nothing in LlamaForCausalLM, which has"),
        ):
            with pytest.raises(error, match=message):
                fastpeft.attach(model, config)
            assert_untouched(model, before)

    def test_a_checkpoint_of_another_method(self, tmp_path):
        fastpeft.save(attached("llama", Lora()), tmp_path)
        model = attached("llama")
        before = snapshot(model)
        with pytest.raises(ValueError, match="adapter 'default' is a bottleneck adapter, the checkpoint LoRA; load it"):
            fastpeft.load(model, tmp_path)
        assert_untouched(model, before)
