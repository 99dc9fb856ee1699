"""Bottleneck adapters attached to every known family and by rule: placed, identical to nothing at first, reversible."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import Bottleneck, Lora
from fastpeft.methods.bottleneck.holder import Bottlenecks
from tests.support.models import FAMILIES, build, close, logits

PRESETS = ["seq_bn", "double_seq_bn", "par_bn", "scaled_par_bn", "adapter_plus"]
# Layers with an MLP, attentions without cross-attention, cross-attentions.
COUNTS = dict.fromkeys(FAMILIES, (2, 2, 0)) | {"t5": (4, 4, 2)}


def attached(name, config=None, adapter="default", model=None):
    torch.manual_seed(1)
    return fastpeft.attach(model or build(name), config or Bottleneck(reduction_factor=4), adapter)


def move(model, seed=3):
    """Every trained parameter by a third of a standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) / 3)
    return model.eval()


def snapshot(model):
    hooks = [
        (path, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs))
        for path, m in model.named_modules()
    ]
    values = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    own = {key: value for key, value in model.__dict__.items() if not key.startswith("_")}
    return hooks, values, repr(model), own


def assert_untouched(model, before):
    hooks, values, text, own = snapshot(model)
    assert (hooks, text, own) == (before[0], before[2], before[3])
    assert values.keys() == before[1].keys()
    for name, (identity, flag, value) in values.items():
        assert (identity, flag) == before[1][name][:2], name
        assert torch.equal(value, before[1][name][2]), name


def holders(model):
    return [module for module in model.modules() if isinstance(module, Bottlenecks)]


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


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)) for _ in range(3))
        self.norm, self.score = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, ids):
        h = self.embed(ids)
        for layer in self.layers:
            h = h + layer(h)
        return self.score(self.norm(h))


X = torch.arange(22).view(2, 11) % 11


def net():
    torch.manual_seed(0)
    return Net().eval()


class TestByRule:
    @pytest.mark.parametrize(
        ("targets", "paths"),
        [
            (["layers.1", "norm"], ["layers.1", "norm"]),
            (["2"], ["layers.0.2", "layers.1.2", "layers.2", "layers.2.2"]),
            (r"layers\.[02]", ["layers.0", "layers.2"]),
            (lambda path, module: isinstance(module, nn.LayerNorm), ["norm"]),
            (["score", "embed"], ["embed", "score"]),
        ],
    )
    def test_targets(self, targets, paths, tmp_path):
        model = net()
        with torch.no_grad():
            before, expected = snapshot(model), model(X)
        fastpeft.attach(model, Bottleneck(targets=targets, size=2, init="houlsby"))
        assert sorted(h.site.path for h in holders(model)) == sorted(paths)
        move(model)(X).sum().backward()
        with torch.no_grad():
            moved = model(X)
            assert not close(moved, expected)
            fastpeft.save(model, tmp_path)
            assert torch.equal(fastpeft.load(net(), tmp_path)(X), moved)
            fastpeft.detach(model)
        assert_untouched(model, before)

    @torch.no_grad()
    def test_follows_or_stands_beside(self):
        for parallel in (False, True):
            model = fastpeft.attach(net(), Bottleneck(targets=["layers.1"], size=2, parallel=parallel))
            move(model)
            layer = model.layers[1]
            adapter = layer.fastpeft_bottleneck.adapters["default"]
            x = torch.randn(4, 8)
            h = net().layers[1](x)
            assert close(layer(x), h + adapter(x if parallel else h, torch.zeros_like(h)))

    def test_pytorch_s_fused_encoder_does_not_bypass_the_adapters(self):
        torch.manual_seed(0)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2).eval()
        x = torch.randn(3, 5, 8)
        padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
        model = move(fastpeft.attach(encoder, Bottleneck(targets=["linear2"], size=2)))
        with torch.no_grad():
            found = model(x, src_key_padding_mask=padding)[~padding]
        assert close(found, model(x, src_key_padding_mask=padding)[~padding])

    def test_bad_rules(self):
        model = net()
        before = snapshot(model)
        for settings, message in (
            ({"targets": ["mlp"]}, r"targets=\['mlp'\] matches no module, expected some of embed, layers, norm, score"),
            ({"targets": r"layer"}, "targets='layer' matches no module"),
            ({"targets": lambda path, module: False}, "targets=a function matches no module"),
            ({"targets": ["layers.0.1"]}, r"the width of layers\.0\.1, a Tanh, cannot be read off; give features"),
            ({"targets": ["layers"]}, "targets names layers, a ModuleList, which is never called"),
            ({}, "Net has no layers built like those of Llama, BERT, GPT-2, T5 or ViT; say which"),
        ):
            with pytest.raises(ValueError, match=message):
                fastpeft.attach(model, Bottleneck(**settings))
        assert_untouched(model, before)
        fastpeft.attach(model, Bottleneck(targets=["layers.0.1"], features=12, size=2))
        model(X)

    def test_a_module_that_returns_no_tensor(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(3, 3)

            def forward(self, x):
                return {"y": self.inner(x)}

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.odd = Odd()

            def forward(self, x):
                return self.odd(x)["y"]

        model = fastpeft.attach(Outer(), Bottleneck(targets=["odd"]))
        with pytest.raises(TypeError, match="bottleneck: odd returns dict, expected a tensor"):
            model(torch.ones(1, 3))


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
        assert report.fused == len(report) == len(linears) + 2
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


BAD_CONFIGS = [
    ({"preset": "pfeifer"}, "Bottleneck: preset is 'pfeifer', expected one of seq_bn, double_seq_bn, par_bn"),
    ({"size": 0}, "Bottleneck: size is 0, expected an integer of at least 1"),
    ({"size": 8, "reduction_factor": 2}, "size is 8 beside reduction_factor=2, expected one"),
    ({"reduction_factor": 0}, "reduction_factor is 0, expected a number above 0"),
    ({"reduction_factor": {"1": -2}}, r"reduction_factor\['1'\] is -2"),
    ({"reduction_factor": "16"}, r"reduction_factor is '16' \(str\), expected a finite number"),
    ({"activation": "mish"}, "activation is 'mish', expected one of"),
    ({"scale": "big"}, "scale is 'big', expected one of learned, channel"),
    ({"scale": float("inf")}, "scale is inf"),
    ({"parallel": 1}, r"parallel is 1 \(int\), expected True or False"),
    ({"gating": None}, "gating is None, expected True or False"),
    ({"norm": True}, "norm is True, expected one of None, layer, rms"),
    ({"residual_before_norm": "after"}, "residual_before_norm is 'after', expected one of True, False, post_add"),
    ({"places": ["ffn"]}, "places is 'ffn', expected one of attention, mlp, cross"),
    ({"places": []}, r"places is \(\), expected some of attention"),
    ({"leave_out": [-1]}, r"leave_out is \[-1\]"),
    ({"dropout": 1.0}, r"dropout is 1\.0"),
    ({"stochastic_depth": -1}, "stochastic_depth is -1"),
    ({"init": "kaiming"}, "init is 'kaiming', expected one of bert, mam, houlsby"),
    ({"targets": []}, r"targets is \[\], expected names, a pattern or a function"),
    ({"targets": 3}, "targets is 3, expected names"),
    ({"targets": "*"}, "targets is '\\*', expected a regular expression"),
    ({"features": "8"}, "features is '8'"),
    ({"dtype": "float32"}, "dtype is 'float32'"),
    ({"original_norm_after": False}, "original_norm_after=False would lose the model's residual connection"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), BAD_CONFIGS)
def test_bad_config(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Bottleneck(**settings)


def test_widths():
    """adapters' rule: rounded down, at least 1."""
    factors = {16: [1, 1, 3], 32: [1, 1, 1], 3: [5, 1, 17], 0.5: [32, 6, 104]}
    for factor, widths in factors.items():
        assert [Bottleneck(reduction_factor=factor).size_of(k, 0) for k in (16, 3, 52)] == widths
    assert Bottleneck(size=7).size_of(16, 0) == 7
    with pytest.raises(ValueError, match="reduction_factor has no entry for layer 3, expected one or 'default'"):
        Bottleneck(reduction_factor={"1": 2}).size_of(16, 3)


def test_every_width_has_a_reduction_factor():
    """AdapterHub has no widths, only factors, and divides by them in floating point."""
    from fastpeft.methods.formats.adapterhub_format import _factor

    for features in (16, 768, 1000):
        for size in range(1, features + 1):
            assert Bottleneck(reduction_factor=_factor(features, size)).size_of(features, 0) == size


def test_post_add_needs_a_norm_after():
    config = Bottleneck(residual_before_norm="post_add")
    attached("bert", config)
    with pytest.raises(ValueError, match=r"'post_add' asks for a norm after the sub-block, which model"):
        attached("llama", config)
