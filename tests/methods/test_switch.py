"""Several adapters, which of them act, merging, and what cannot be done."""

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import Lora
from fastpeft.nn import LoraLinear
from tests.support.small_net import TOLERANCE, X, attached, build, train
from tests.support.untouched import assert_untouched, snapshot


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


class TestDelete:
    def two(self, **settings):
        return attached("b", attached(**settings), r=2, targets=["q_proj", "k_proj"])

    def test_the_others_stay_as_they_are(self):
        model, alone = self.two(exclude=["k_proj"]), attached(exclude=["k_proj"])
        before = snapshot(attached(model=alone, name="c", targets=["out"]))
        attached("c", model, targets=["out"])
        fastpeft.delete_adapter(model, "b")
        assert fastpeft.active_adapters(model) == ("default",)
        assert list(snapshot(model)[1]) == list(before[1])  # k_proj, which b alone adapted, is itself again
        assert repr(model) == repr(alone)
        assert torch.equal(model(X), alone(X))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, p in alone.named_parameters() if p.requires_grad
        }
        attached("b", model, targets=["q_proj"])  # and the name is free

    def test_of_the_active_ones(self):
        model = self.two()
        fastpeft.set_adapter(model, ["b", "default"], trainable=False)
        fastpeft.delete_adapter(model, "default")
        assert fastpeft.active_adapters(model) == ("b",)
        assert not any(p.requires_grad for p in model.parameters())
        attached("c", model, targets=["out"])
        fastpeft.delete_adapter(model, "b")
        assert fastpeft.active_adapters(model) == ()
        assert torch.equal(model(X), build()(X))

    @pytest.mark.parametrize("settings", [{}, {"bias": "all", "modules_to_save": ["score"]}])
    def test_the_last_one_is_detach(self, settings):
        model = build()
        before = snapshot(model)
        attached(model=model, **settings)
        train(model)
        fastpeft.delete_adapter(model, "default")
        assert_untouched(model, before)

    def test_trained_biases_and_copies_go_with_theirs(self):
        model = attached(bias="all", modules_to_save=["score"])
        train(model)
        fastpeft.attach(model, fastpeft.Bottleneck(targets=["layers.1.out"], size=2), "b")
        fastpeft.delete_adapter(model, "default")
        for name, value in build().named_parameters():
            assert torch.equal(model.get_parameter(name), value), name
        assert torch.equal(model(X), build()(X))
        fastpeft.set_adapter(model, "b")
        assert not torch.equal(model(X), build()(X))

    def test_a_selection_gives_its_values_back(self):
        model = fastpeft.attach(build(), fastpeft.Selective(params="norm", layers="last:1"), "s")
        train(model)
        attached("b", model, targets=["q_proj"])
        fastpeft.set_adapter(model, ["s", "b"])
        fastpeft.delete_adapter(model, "s")
        assert torch.equal(model.layers[2].norm.weight, build().layers[2].norm.weight)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained == {n for n, _ in model.named_parameters() if ".b." in n}

    def test_refusals_change_nothing(self):
        model = self.two()
        before = snapshot(model)
        with pytest.raises(ValueError, match="delete_adapter: no adapter 'x', expected one of default, b"):
            fastpeft.delete_adapter(model, "x")
        with pytest.raises(ValueError, match=r"delete_adapter: no adapter a list of 1, expected"):
            fastpeft.delete_adapter(model, ["b"])
        assert_untouched(model, before)
        fastpeft.merge(model)
        with pytest.raises(ValueError, match="delete_adapter: the adapters are merged; unmerge them first"):
            fastpeft.delete_adapter(model, "b")
        for function in (fastpeft.active_adapters, lambda m: fastpeft.delete_adapter(m, "b")):
            with pytest.raises(ValueError, match="nothing is attached to this Net"):
                function(build())


def test_active_adapters():
    model = attached("b", attached())
    assert fastpeft.active_adapters(model) == ("default",)
    fastpeft.set_adapter(nn.DataParallel(model), ("b", "default", "b"))
    assert fastpeft.active_adapters(nn.DataParallel(model)) == ("b", "default")
    fastpeft.set_adapter(model, [])
    assert fastpeft.active_adapters(model) == ()


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
    with pytest.raises(TypeError, match="set_adapter: names has 3 .int., expected names"):
        fastpeft.set_adapter(attached(), ["default", 3])
    with pytest.raises(TypeError, match="set_adapter: names is 3 .int., expected a list of names"):
        fastpeft.set_adapter(attached(), 3)
    with pytest.raises(TypeError, match=r"attach: config is the class Lora, expected fastpeft\.Lora"):
        fastpeft.attach(model, Lora)
    own = build()
    own.layers[0].q_proj = LoraLinear(own.layers[0].q_proj, r=2)
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj has adapters of its own"):
        attached(model=own)
    with pytest.raises(ValueError, match=r"0\.layers\.0\.q_proj has adapters of its own"):
        fastpeft.attach(nn.Sequential(attached()), Lora())
    pair = nn.Sequential(attached(), attached())
    with pytest.raises(ValueError, match="2 parts of this Sequential have adapters"):
        fastpeft.detach(pair)
