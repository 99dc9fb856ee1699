"""attach, detach and what lies between: nothing half done, all restored, several adapters, merging, reporting."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import Lora
from fastpeft.nn import LoraLinear, TrainedCopy

# float64 sums of some hundred products in another order.
TOLERANCE = 2**10 * torch.finfo(torch.float64).eps


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        h = self.norm(x)
        return x + self.out(self.q_proj(h) * self.k_proj(h).tanh() + self.v_proj(h))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.score = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h)
        return self.score(h)


X = torch.arange(22).view(2, 11) % 11


def build():
    torch.manual_seed(0)
    net = Net().double()
    net.layers[0].norm.weight.requires_grad_(False)
    return net


def attached(name="default", model=None, **settings):
    model = model or build()
    torch.manual_seed(1)
    return fastpeft.attach(model, Lora(**{"r": 4, "init": "random", **settings}), name)


def train(model, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()


def snapshot(model):
    modules = {path: id(module) for path, module in model.named_modules()}
    values = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    return modules, values, repr(model), {k: v for k, v in model.__dict__.items() if not k.startswith("_")}


def assert_untouched(model, before):
    modules, values, text, attributes = snapshot(model)
    assert modules == before[0]
    assert text == before[2]
    assert attributes == before[3]
    assert values.keys() == before[1].keys()
    for name, (identity, flag, value) in values.items():
        assert (identity, flag) == before[1][name][:2], name
        assert torch.equal(value, before[1][name][2]), name


EVERYTHING = {"bias": "all", "modules_to_save": ["score"], "lora_bias": True, "dropout": 0.1}


class TestAttachAndDetach:
    @pytest.mark.parametrize("settings", [{}, EVERYTHING, {"bias": "lora_only"}, {"share_inputs": False}])
    def test_detach_restores_everything_after_training(self, settings):
        model = build()
        before, expected = snapshot(model), model(X)
        assert attached(model=model, **settings) is model
        train(model)
        assert not torch.equal(model(X), expected)
        assert fastpeft.detach(model) is model
        assert_untouched(model, before)
        assert torch.equal(model(X), expected)
        attached(model=model)  # and again

    def test_detach_restores_a_merged_model(self):
        model = build()
        before = snapshot(model)
        attached(model=model, bias="all", lora_bias=True, targets=["q_proj", "out"])
        train(model)
        fastpeft.merge(model)
        fastpeft.detach(model)
        assert_untouched(model, before)

    def test_detach_can_keep_what_was_merged(self):
        model = attached(modules_to_save=["score"], bias="all")
        train(model)
        expected = model(X)
        with pytest.raises(ValueError, match="keep_merged on a model that is not merged"):
            fastpeft.detach(model, keep_merged=True)
        fastpeft.merge(model)
        fastpeft.detach(model, keep_merged=True)
        assert [type(m) for m in model.modules()] == [type(m) for m in build().modules()]
        assert (model(X) - expected).abs().max() <= TOLERANCE * expected.abs().max()

    def test_what_is_trained(self):
        def trained(**settings):
            return {name for name, p in attached(**settings).named_parameters() if p.requires_grad}

        lora = {f"layers.1.q_proj.adapters.default.lora_{x}" for x in "AB"}
        q = {"targets": ["layers.1.q_proj"]}
        assert trained(**q) == lora
        assert trained(**q, bias="lora_only") == lora | {"layers.1.q_proj.base_layer.bias"}
        biases = {name for name, _ in build().named_parameters() if name.endswith("bias")}
        biases = biases - {"layers.1.q_proj.bias"} | {"layers.1.q_proj.base_layer.bias"}
        assert trained(**q, bias="all") == lora | biases
        copies = {f"score.copies.default.{i}.{name}" for i in (0, 2) for name in ("weight", "bias")}
        assert trained(**q, modules_to_save=["score"]) == lora | copies
        assert trained(**q, modules_to_save=["score"], bias="all") == lora | copies | {
            name for name in biases if not name.startswith("score.")
        }

    @pytest.mark.parametrize(
        ("settings", "paths"),
        [
            ({"targets": ["q_proj"]}, ["layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj"]),
            ({"targets": ["1.q_proj", "score.0"]}, ["layers.1.q_proj", "score.0"]),
            ({"targets": r"layers\.[02]\.(q|v)_proj"}, [f"layers.{i}.{n}_proj" for i in (0, 2) for n in "qv"]),
            (
                {"targets": ["q_proj", "out"], "layers": [1], "layers_pattern": "layers", "exclude": ["out"]},
                ["layers.1.q_proj"],
            ),
            ({"targets": ["q_proj"], "layers": 2, "layers_pattern": ["layers"]}, ["layers.2.q_proj"]),
            ({"exclude": r".*_proj|.*out"}, ["score.0", "score.2"]),
            (
                {"modules_to_save": ["score", "embed"], "exclude": r".*[12]\..*|.*(k|v)_proj"},
                ["layers.0.q_proj", "layers.0.out"],
            ),
        ],
    )
    def test_targets(self, settings, paths):
        model = attached(**settings)
        assert [path for path, m in model.named_modules() if isinstance(m, LoraLinear)] == paths

    def test_all_linear_leaves_the_head(self):
        class WithHead(Net):
            def get_output_embeddings(self):
                return self.score[2]

        model = fastpeft.attach(WithHead(), Lora())
        assert type(model.score[2]) is nn.Linear
        assert isinstance(model.score[0], LoraLinear)

        class Classifier(Net):
            def get_output_embeddings(self):
                return None

        model = fastpeft.attach(Classifier(), Lora())
        assert not any(isinstance(m, LoraLinear) for m in model.score.modules())

    def test_patterns(self):
        model = attached(
            rank_pattern={r"1\.q_proj": 2, "q_proj": 3}, alpha_pattern={"layers.1.*": 5, "out": 7}, rslora=True
        )
        found = {
            path: (layer.adapters["default"].r, layer.adapters["default"].alpha)
            for path, layer in model.named_modules()
            if isinstance(layer, LoraLinear)
        }
        assert found["layers.0.q_proj"] == (3, 16)
        assert found["layers.1.q_proj"] == (2, 5)
        assert found["layers.1.out"] == (4, 5)
        assert found["layers.2.out"] == (4, 7)
        assert model.layers[1].q_proj.adapters["default"].scale == 5 / 2**0.5

    def test_other_linear_classes_are_left_alone(self):
        class Quantised(nn.Linear):
            pass

        model = build()
        model.layers[0].q_proj = Quantised(8, 8).double()
        model.attention = nn.MultiheadAttention(8, 2).double()  # its out_proj is a subclass, read past the module
        before = snapshot(model)
        for name, kind in (
            ("q_proj", "Quantised"),
            ("out_proj", "NonDynamicallyQuantizableLinear"),
            ("norm", "LayerNorm"),
        ):
            with pytest.raises(TypeError, match=f"targets names .*{name}, which is a {kind}"):
                fastpeft.attach(model, Lora(targets=[name]))
        assert_untouched(model, before)
        attached(model=model)
        assert type(model.layers[0].q_proj) is Quantised
        assert not any(isinstance(m, LoraLinear) for m in model.attention.modules())

    def test_pytorch_s_fused_encoder_does_not_bypass_the_adapters(self):
        """In inference nn.TransformerEncoderLayer hands linear1.weight to a fused kernel, without calling linear1."""
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, 2).double().eval()
        x = torch.randn(3, 5, 8, dtype=torch.float64)
        padding = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2])
        before = [(m.activation_relu_or_gelu) for m in model.layers], model.use_nested_tensor
        plain = copy.deepcopy(model)
        fastpeft.attach(model, Lora(targets=["linear1", "linear2"], init="random"))
        with torch.no_grad():
            for path in model.fastpeft_attachment.linears:
                plain.get_submodule(path).weight += model.get_submodule(path).delta(["default"])[0]
        expected = plain(x, src_key_padding_mask=padding)[~padding]
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                actual = model(x, src_key_padding_mask=padding)[~padding]
            assert (actual - expected).abs().max() <= TOLERANCE * expected.abs().max()
        fastpeft.detach(model)
        assert ([m.activation_relu_or_gelu for m in model.layers], model.use_nested_tensor) == before

    def test_training_mode_is_the_model_s(self):
        model = build().eval()
        attached(model=model, dropout=0.5, modules_to_save=["score"])
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(X), model(X))

    def test_meta_device(self):
        with torch.device("meta"):
            model = Net()
        fastpeft.attach(model, Lora(r=4, modules_to_save=["score"]))
        assert all(p.is_meta for p in model.parameters())
        assert model(X.to("meta")).shape == (2, 11, 3)

    def test_copies(self):
        model = attached(**EVERYTHING)
        train(model)
        model.eval()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(X), model(X))
            assert other.layers[0].q_proj.fastpeft_shared.members[0] is other.layers[0].q_proj
            fastpeft.detach(other)
            assert torch.equal(other(X), build()(X))
        assert fastpeft.report(model).fused > 0

    def test_inside_a_wrapper(self):
        model = attached()
        wrapper = nn.DataParallel(model)
        with fastpeft.disable_adapter(wrapper):
            assert torch.equal(wrapper(X), build()(X))
        fastpeft.detach(wrapper)
        assert torch.equal(model(X), build()(X))


class TestSeveralAdapters:
    def both(self):
        model = attached(modules_to_save=["score"], exclude=["k_proj"])
        return attached("b", model, r=2, targets=["q_proj", "k_proj"])

    def delta(self, model, path, name):
        layer = model.get_submodule(path)
        adapter = layer.adapters[name]
        return adapter.scale * adapter.lora_B @ adapter.lora_A

    def test_second_is_inactive_until_set(self):
        model, alone = self.both(), attached(modules_to_save=["score"], exclude=["k_proj"])
        assert torch.equal(model(X), alone(X))
        assert not any(p.requires_grad for name, p in model.named_parameters() if ".b." in name)

    def test_second_leaves_the_others_as_they_are(self):
        model = attached(targets=["q_proj"])
        fastpeft.set_adapter(model, "default", trainable=False)
        attached("b", model, targets=["layers.1.q_proj", "out"], modules_to_save=["score"])
        assert not any(p.requires_grad for p in model.parameters())
        fastpeft.set_adapter(model, [])
        attached("c", model, targets=["q_proj"])
        assert torch.equal(model(X), build()(X))

    def test_many_layers_with_numbers(self):
        """layers.1 is no beginning of layers.10."""
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(12)))
        fastpeft.attach(model, Lora(targets=["1"]))
        model[10] = LoraLinear(model[10], r=2)
        with pytest.raises(ValueError, match="10 has adapters of its own"):
            fastpeft.attach(model, Lora(targets=["2"]), "b")

    def test_deltas_add_up(self):
        model = self.both()
        fastpeft.set_adapter(model, ["default", "b"])
        plain = build()
        with torch.no_grad():
            for path, layer in model.named_modules():
                if isinstance(layer, LoraLinear):
                    for name in layer.active:
                        plain.get_submodule(path).weight += self.delta(model, path, name)
        assert (model(X) - plain(X)).abs().max() <= TOLERANCE * plain(X).abs().max()
        assert model.layers[0].q_proj.active == ("default", "b")
        assert model.layers[0].k_proj.active == ("b",)
        assert model.layers[0].v_proj.active == ("default",)

    def test_switching(self):
        model = self.both()
        first = model(X)
        fastpeft.set_adapter(model, "b")
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {name for name, _ in model.named_parameters() if ".b." in name}
        assert model.score.active is None
        second = model(X)
        assert not torch.equal(first, second)
        fastpeft.set_adapter(model, "default")
        assert torch.equal(model(X), first)
        fastpeft.set_adapter(model, [])
        assert torch.equal(model(X), build()(X))
        fastpeft.set_adapter(model, "b", trainable=False)
        assert torch.equal(model(X), second)
        assert not any(p.requires_grad for p in model.parameters())

    def test_each_has_its_copy_of_a_module(self):
        model = attached("b", attached(modules_to_save=["score"]), modules_to_save=["score"])
        train(model)
        assert set(model.score.copies) == {"default", "b"}
        assert torch.equal(model.score.copies["b"][0].weight, build().score[0].weight)
        with pytest.raises(ValueError, match=r"\['default', 'b'\] all have a copy of score"):
            fastpeft.set_adapter(model, ["default", "b"])
        fastpeft.set_adapter(model, "b")
        assert model.score.current() is model.score.copies["b"]

    def test_detach_takes_all(self):
        model = build()
        before = snapshot(model)
        attached("b", attached(model=model, exclude=["k_proj"]), targets=["k_proj"])
        fastpeft.detach(model)
        assert_untouched(model, before)

    def test_what_does_not_go_together(self):
        for first, second in (("all", "none"), ("none", "lora_only")):
            model = attached(bias=first)
            before = snapshot(model)
            with pytest.raises(ValueError, match="trains the model's biases, expected bias='none'"):
                attached("b", model, bias=second)
            assert_untouched(model, before)
        with pytest.raises(ValueError, match="attach: adapter 'default' is attached already"):
            attached(model=model)
        with pytest.raises(ValueError, match=r"modules_to_save names layers\.0, but layers\.0\.q_proj has an adapter"):
            attached("b", attached(), modules_to_save=["layers.0"])


class TestDisableAndMerge:
    @pytest.mark.parametrize("merged", [False, True])
    def test_disabled_is_the_original_to_the_bit(self, merged):
        model, expected = attached(bias="all", modules_to_save=["score"]), build()(X)
        train(model)
        if merged:
            fastpeft.merge(model)
        trained = model(X)
        with fastpeft.disable_adapter(model) as inside:
            assert inside is model
            assert torch.equal(model(X), expected)
            with fastpeft.disable_adapter(model):
                assert torch.equal(model(X), expected)
            assert torch.equal(model(X), expected)
        assert torch.equal(model(X), trained)
        with pytest.raises(RuntimeError, match="inside"), fastpeft.disable_adapter(model):
            raise RuntimeError("inside")
        assert torch.equal(model(X), trained)

    def test_merge_and_unmerge(self):
        model = attached(lora_bias=True, targets=["q_proj", "v_proj", "out"], rslora=True)
        attached("b", model, targets=["q_proj", "k_proj"])
        fastpeft.set_adapter(model, ["default", "b"])
        train(model)
        before, expected = snapshot(model), model(X)
        fastpeft.merge(model)
        assert (model(X) - expected).abs().max() <= TOLERANCE * expected.abs().max()
        assert all(row.status == "merged" for row in fastpeft.report(model))
        for refused in (fastpeft.merge, lambda m: fastpeft.set_adapter(m, "b"), lambda m: attached("c", m)):
            with pytest.raises(ValueError, match="adapters are merged; unmerge them first"):
                refused(model)
        fastpeft.unmerge(model)
        assert_untouched(model, before)
        assert torch.equal(model(X), expected)
        with pytest.raises(ValueError, match="not merged"):
            fastpeft.unmerge(model)

    def test_merge_refuses_and_changes_nothing(self):
        def refused(model, message):
            before = snapshot(model)
            with pytest.raises(ValueError, match=message):
                fastpeft.merge(model)
            assert_untouched(model, before)

        model = attached()
        with torch.no_grad():
            model.score[2].adapters["default"].lora_A.fill_(float("inf"))
        before = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
        with pytest.raises(ValueError, match=r"merge: score\.2: the merged weights are not all finite"):
            fastpeft.merge(model)
        assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
        refused(attached(lora_bias=True), "k_proj: lora_bias cannot be merged into a base layer without bias")
        model = build()
        model.decode = nn.Linear(8, 11).double()
        model.decode.weight = model.embed.weight
        refused(attached(model=model, targets=["decode"]), r"the weight of decode is also embed\.weight")
        model = attached()
        fastpeft.set_adapter(model, [])
        refused(model, "no adapter is active")


class TestReport:
    def test_lines(self):
        model = attached(targets=["q_proj", "k_proj", "v_proj", "out"])
        report = fastpeft.report(model)
        assert report.fused == len(report) == 12
        row = next(iter(report))
        assert (row.path, row.status, row.backend) == ("layers.0.q_proj", "fused", "reference")
        assert row.shares_with == ("layers.0.k_proj", "layers.0.v_proj")
        assert "12 of 12 LoRA layers fused" in str(report)
        assert "layers.0.q_proj  fused (reference), reads x with k_proj, v_proj" in str(report)
        assert fastpeft.report(build()).layers == ()

    def test_reasons(self):
        model = attached()
        model.layers[0].out.base_layer.register_forward_hook(lambda *args: None)
        with fastpeft.disable_adapter(model):
            assert fastpeft.report(model).fused == 0
        report = fastpeft.report(model)
        assert report.fused == len(report) - 1
        assert "layers.0.out     not fused: its base layer has hooks" in str(report)
        fastpeft.set_adapter(model, [])
        assert {row.status for row in fastpeft.report(model)} == {"no active adapter"}

    def test_a_backend_that_cannot_serve(self, monkeypatch):
        monkeypatch.setenv("FASTPEFT_BACKEND", "cuda")
        assert "cannot serve" in next(iter(fastpeft.report(attached()))).backend

    def test_peft_s_layers(self):
        peft = pytest.importorskip("peft", reason="PEFT is not installed")
        model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"]))
        report = fastpeft.report(model)
        assert len(report) == 3
        assert report.fused == 0
        assert "not fused: Linear is PEFT's own layer; fastpeft.accelerate has not been called on it" in str(report)

    def test_peft_s_layers_without_a_fused_form(self):
        """The reason is the layer's kind, before and after accelerate."""
        peft = pytest.importorskip("peft", reason="PEFT is not installed")
        model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8))
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0", "1"]))
        kept = "peft.tuners.lora.layer.Embedding has no fused form"
        assert fastpeft.report(model).layers[0].status == kept
        assert [row.status for row in fastpeft.report(fastpeft.accelerate(model))] == [kept, "fused"]


BAD_CONFIGS = [
    ({"r": 0}, "Lora: r is 0, expected an integer of at least 1"),
    ({"r": 8.0}, r"Lora: r is 8.0 \(float\), expected an integer"),
    ({"r": True}, "Lora: r is True"),
    ({"alpha": float("nan")}, "Lora: alpha is nan, expected a finite number"),
    ({"alpha": "16"}, "Lora: alpha is '16' "),
    ({"dropout": 1}, r"Lora: dropout is 1, expected a number in \[0, 1\)"),
    ({"dropout": float("nan")}, "Lora: dropout is nan"),
    ({"bias": "some"}, "Lora: bias is 'some', expected one of none, all, lora_only"),
    ({"init": "pissa"}, "Lora: init is 'pissa', expected one of kaiming, gaussian, random"),
    ({"targets": []}, r"Lora: targets is \(\)"),
    ({"targets": ""}, "Lora: targets is ''"),
    ({"targets": "*proj"}, r"Lora: targets is '\*proj', expected a regular expression"),
    ({"targets": [3]}, r"Lora: targets is \[3\], expected names"),
    ({"targets": 3}, "Lora: targets is 3, expected names"),
    ({"modules_to_save": "score"}, "Lora: modules_to_save is the string 'score', expected a list of names"),
    ({"rank_pattern": {"q": 0}}, r"Lora: rank_pattern\['q'\] is 0"),
    ({"rank_pattern": {"(": 2}}, "Lora: rank_pattern key '\\('"),
    ({"rank_pattern": [2]}, "Lora: rank_pattern is list, expected a dict"),
    ({"alpha_pattern": {"q": None}}, r"Lora: alpha_pattern\['q'\] is None"),
    ({"layers": [1]}, r"Lora: layers is \[1\] beside targets='all-linear', expected a list of targets"),
    ({"layers": [-1], "targets": ["q"]}, r"Lora: layers is \[-1\]"),
    ({"rslora": 1}, "Lora: rslora is 1, expected True or False"),
    ({"dtype": torch.int8}, r"Lora: dtype is torch\.int8"),
    ({"dtype": "float32"}, "Lora: dtype is 'float32'"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_CONFIGS)
def test_bad_config(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Lora(**settings)


BAD_ATTACH = [
    ({"targets": ["nothing"]}, {}, r"targets=\['nothing'\] matches no module of Net, expected some of q_proj, k_proj"),
    ({"targets": r"q_proj"}, {}, "attach: targets='q_proj' matches no module of Net"),
    ({"exclude": r".*"}, {}, "attach: targets='all-linear' matches no module of Net"),
    ({"modules_to_save": ["heads"]}, {}, "modules_to_save names 'heads', which no path of the model ends with"),
    ({"modules_to_save": ["layers"]}, {}, "modules_to_save names layers, a ModuleList"),
    ({"rank_pattern": {"q_prj": 2}}, {}, "rank_pattern has 'q_prj', which matches no adapted layer"),
    ({}, {"name": "a.b"}, "attach: name is 'a.b'"),
    ({}, {"name": ""}, "attach: name is ''"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "arguments", "message"), BAD_ATTACH)
def test_bad_attach_touches_nothing(settings, arguments, message):
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fastpeft.attach(model, Lora(**settings), **arguments)
    assert_untouched(model, before)


def test_failing_half_way_touches_nothing(monkeypatch):
    """As when memory runs out while the adapters are made."""
    for model, name in ((build(), "default"), (attached(modules_to_save=["score"]), "b")):
        before = snapshot(model)
        count = iter(range(5))
        add = LoraLinear.add_adapter

        def failing(self, *args, count=count, add=add, **settings):
            if next(count) == 4:
                raise MemoryError("no more")
            return add(self, *args, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(LoraLinear, "add_adapter", failing)
            with pytest.raises(MemoryError):
                attached(name, model)
        assert_untouched(model, before)


def test_bad_models():
    with pytest.raises(TypeError, match=r"attach: model is dict, expected a torch\.nn\.Module"):
        fastpeft.attach({}, Lora())
    with pytest.raises(TypeError, match=r"attach: config is dict, expected fastpeft\.Lora"):
        fastpeft.attach(build(), {})
    with pytest.raises(ValueError, match="itself the layer to adapt"):
        fastpeft.attach(nn.Linear(2, 2), Lora(targets=r".*"))
    with pytest.raises(
        ValueError, match=r"matches no module of LayerNorm, expected some of an nn\.Linear, of which it has none"
    ):
        fastpeft.attach(nn.LayerNorm(2), Lora())
    model = build()
    for function in (fastpeft.detach, fastpeft.merge, fastpeft.unmerge, lambda m: fastpeft.set_adapter(m, "a")):
        with pytest.raises(ValueError, match="nothing is attached to this Net"):
            function(model)
    with pytest.raises(ValueError, match="nothing is attached"), fastpeft.disable_adapter(model):
        pass
    with pytest.raises(ValueError, match="set_adapter: no adapter 'x', expected one of default"):
        fastpeft.set_adapter(attached(), ["default", "x"])
    own = build()
    own.layers[0].q_proj = LoraLinear(own.layers[0].q_proj, r=2)
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj has adapters of its own"):
        attached(model=own)
    with pytest.raises(ValueError, match=r"0\.layers\.0\.q_proj has adapters of its own"):
        fastpeft.attach(nn.Sequential(attached()), Lora())
    pair = nn.Sequential(attached(), attached())
    with pytest.raises(ValueError, match="2 parts of this Sequential have adapters"):
        fastpeft.detach(pair)


def test_peft_models_are_refused():
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(
        ValueError, match=r"is a LoRA layer of PEFT, expected a plain model; for PEFT use fastpeft\.accelerate"
    ):
        fastpeft.attach(model, Lora())


def test_trained_copy_stands_for_its_module():
    wrapper = TrainedCopy(nn.Linear(3, 4))
    wrapper.add_copy("a")
    assert wrapper.weight is wrapper.original_module.weight
    wrapper.set_active("a")
    assert wrapper.weight is wrapper.copies["a"].weight
    assert wrapper.out_features == 4
    with pytest.raises(AttributeError):
        _ = wrapper.nonsense
    pickle.loads(pickle.dumps(wrapper))
