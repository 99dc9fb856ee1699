"""Bottleneck adapters in 16 bits, compiled, copied, in a Trainer, in threads."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import Bottleneck, Lora
from tests.support.bottlenecks import PRESETS, attached, holders, move
from tests.support.models import build, close, logits
from tests.support.untouched import assert_untouched, snapshot


class TestOtherSettings:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision(self, dtype):
        model = attached("llama", model=build("llama").to(dtype))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        out = logits(move(model))
        assert out.dtype == dtype
        out.float().sum().backward()
        model = attached("llama", Bottleneck(dtype=dtype), model=build("llama").to(dtype))
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {dtype}
        logits(model)

    @pytest.mark.parametrize("name", ["llama", "bert", "t5"])
    @pytest.mark.parametrize("preset", PRESETS)
    def test_autocast(self, name, preset):
        model = move(attached(name, Bottleneck(preset, reduction_factor=4)))
        with torch.no_grad():
            expected = logits(model)
        with torch.autocast("cpu", torch.bfloat16):
            out = logits(model)
        out.float().square().sum().backward()
        # bfloat16 has 8 bits; the layers' roundings add up.
        assert (out.float() - expected).abs().max() <= 0.1 * expected.abs().max()

    def test_copies(self):
        model = move(attached("bert", Bottleneck("double_seq_bn", original_norm_before=True)))
        with torch.no_grad():
            for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
                assert torch.equal(logits(other), logits(model))
                fastpeft.set_adapter(other, [])
                assert not torch.equal(logits(other), logits(model))
                fastpeft.detach(other)
                assert not holders(other)
            assert holders(model)

    def test_a_norm_that_is_copied_for_training(self):
        """LoRA's modules_to_save replaces the norm whose input the adapters tap, and the module they follow."""
        for name, ends in (
            ("llama", ["post_attention_layernorm", "0.mlp"]),
            ("bert", ["1.output.LayerNorm"]),
        ):
            model = move(attached(name))
            with torch.no_grad():
                expected = logits(model)
                fastpeft.attach(model, Lora(targets=["q_proj", "query"], modules_to_save=ends), "b")
                assert torch.equal(logits(model), expected)
                fastpeft.set_adapter(model, ["default", "b"])
                assert close(logits(model), expected)
                fastpeft.detach(model)
                assert torch.equal(logits(model), logits(build(name)))

    def test_a_copy_with_a_site_inside(self):
        copied = Lora(targets=["query"], modules_to_save=["0.output"])
        model = attached("bert")
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"modules_to_save names .*0\.output, but an adapter was added"):
            fastpeft.attach(model, copied, "b")
        assert_untouched(model, before)
        model = build("bert")
        before = snapshot(model)
        with pytest.raises(ValueError, match="is inside a module of modules_to_save"):
            fastpeft.attach(model, [copied, Bottleneck()])
        assert_untouched(model, before)

    def test_trainer(self, tmp_path):
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        model = attached("llama", [Lora(r=2), Bottleneck(reduction_factor=4)])
        rows = [{"input_ids": [i, 1, 2, 3], "labels": [i, 1, 2, 3]} for i in range(8)]
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, learning_rate=0.1,
            gradient_checkpointing=True, save_strategy="steps", save_steps=2, disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(model, arguments, train_dataset=rows).train()
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, start[name]) != parameter.requires_grad, name
        decayed = transformers.Trainer(model, arguments, train_dataset=rows).get_decay_parameter_names(model)
        trained = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith("weight")]
        assert set(trained) <= set(decayed)

    @pytest.mark.parametrize("name", ["bert", "llama"])
    def test_compiled(self, name):
        """One graph, hooks and taps inside."""
        model = move(attached(name, Bottleneck("seq_bn", reduction_factor=4)))
        expected = logits(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        actual = compiled(input_ids=torch.arange(10).view(2, 5)).logits
        assert close(actual, expected)
        actual.sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    def test_generation_with_a_cache(self):
        model = move(attached("llama", Bottleneck("double_seq_bn", reduction_factor=4, original_norm_before=True)))
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        ids = torch.arange(10).view(2, 5)
        assert torch.equal(
            model.generate(ids, use_cache=True, **settings), model.generate(ids, use_cache=False, **settings)
        )

    def test_in_a_data_parallel_wrapper(self):
        model = attached("bert")
        wrapper = nn.DataParallel(model)
        with torch.no_grad(), fastpeft.disable_adapter(wrapper):
            assert torch.equal(wrapper(torch.arange(10).view(2, 5)).logits, logits(build("bert")))

    def test_threads_have_their_own_stream(self):
        from concurrent.futures import ThreadPoolExecutor

        model = move(attached("llama"))
        inputs = [torch.arange(i, i + 4).view(1, 4) for i in range(8)]

        def run(ids):
            with torch.no_grad():
                return model(ids).logits

        expected = [run(ids) for ids in inputs]
        with ThreadPoolExecutor(4) as pool:
            for actual, wanted in zip(pool.map(run, inputs * 4), expected * 4, strict=True):
                assert torch.equal(actual, wanted)
