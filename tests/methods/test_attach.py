"""attach and detach: the layers that are meant, nothing half done, all restored."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import Lora
from fastpeft.nn import LoraLinear, TrainedCopy
from tests.support.small_net import TOLERANCE, Net, X, attached, build, train
from tests.support.untouched import assert_untouched, snapshot

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
        assert found["layers.0.q_proj"] == (3, 8)
        assert found["layers.1.q_proj"] == (2, 5)
        assert found["layers.1.out"] == (4, 5)
        assert found["layers.2.out"] == (4, 7)
        assert model.layers[1].q_proj.adapters["default"].scale == 5 / 2**0.5

    def test_other_linear_classes_are_left_alone(self):
        model = build()
        model.attention = nn.MultiheadAttention(8, 2).double()  # its out_proj is a subclass, read past the module
        before = snapshot(model)
        for name, kind in (("out_proj", "NonDynamicallyQuantizableLinear"), ("norm", "LayerNorm")):
            with pytest.raises(TypeError, match=f"targets names .*{name}, which is a {kind}"):
                fastpeft.attach(model, Lora(targets=[name]))
        assert_untouched(model, before)
        attached(model=model)
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
