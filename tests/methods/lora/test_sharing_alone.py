"""When siblings do not share: nothing stale is handed out, and who computes alone."""

import copy

import pytest
import torch
from torch import nn

from fastpeft.nn.branch import branch_of
from tests.support.siblings import TOLERANCE, K, M, alone_is, assert_same, build, calling, input_, step


class TestNothingStale:
    def check(self, model, name, x, change):
        with calling(model.group):
            model.q_proj(x)
            change()
            y = getattr(model, name)(x)
            expected = alone_is(model, name, x)
        assert (y - expected).abs().max() <= TOLERANCE * expected.abs().max()
        return y

    def test_input_modified_in_place(self):
        x = input_().detach()
        self.check(build(), "k_proj", x, lambda: x.mul_(2))

    @pytest.mark.parametrize("name", ["base_layer.weight", "base_layer.bias", "adapters.default.lora_A"])
    def test_parameters_modified_in_place(self, name):
        model = build()
        with torch.no_grad():
            self.check(model, "k_proj", input_(), lambda: model.k_proj.get_parameter(name).mul_(2))

    def test_parameters_replaced(self):
        model = build()
        new = nn.Parameter(torch.randn(2, K, dtype=torch.float64))
        self.check(model, "k_proj", input_(), lambda: setattr(model.k_proj.adapters["default"], "lora_A", new))

    def test_settings_changed(self):
        model = build()
        self.check(model, "k_proj", input_(), lambda: setattr(model.k_proj.adapters["default"], "scale", 9.0))
        model.k_proj.add_adapter("b", r=2, init="random")
        self.check(model, "k_proj", input_(), lambda: model.k_proj.set_adapter(["b"]))
        self.check(model, "k_proj", input_(), lambda: model.k_proj.set_adapter(["b", "default"]))
        self.check(model, "v_proj", input_(), lambda: setattr(model.v_proj, "disabled", True))

    def test_grad_mode_changed(self):
        model, x = build(), input_()
        with calling(model.group):
            with torch.no_grad():
                model.q_proj(x)
            assert model.k_proj(x).requires_grad
        model, x = build(), input_()
        with calling(model.group):
            model.q_proj(x)
            with torch.no_grad():
                assert not model.k_proj(x).requires_grad

    def test_autocast_changed(self):
        model, x = build().float(), input_().detach().float()
        with calling(model.group):
            model.q_proj(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert model.k_proj(x).dtype == torch.bfloat16
                model.v_proj(x)
            assert model.v_proj(x).dtype == torch.float32

    def test_equal_tensors_are_not_the_same(self, calls):
        model, x = build(), input_()
        with calling(model.group):
            model.q_proj(x), model.k_proj(x.view_as(x)), model.v_proj(x.view_as(x))
        assert calls[0] == 3
        assert len(calls) > 1


def _data(tensor):
    tensor.data.mul_(2)


def _memory(tensor):
    tensor.detach().numpy()[...] *= 2


def _swap(tensor):
    torch.utils.swap_tensors(tensor, nn.Parameter(2 * tensor.detach()))


class TestBetweenTwoCalls:
    """What no version counter shows: nothing is kept for a sibling that is called from elsewhere, or next time."""

    PARTS = ("base_layer.weight", "base_layer.bias", "adapters.default.lora_A", "adapters.default.lora_B")

    @pytest.mark.parametrize("grad", [False, True])
    @pytest.mark.parametrize("write", [_data, _memory, _swap])
    @pytest.mark.parametrize("name", PARTS)
    def test_a_parameter_is_written(self, name, write, grad):
        model, x = build(), input_()
        with torch.set_grad_enabled(grad):
            model(x)
            model.q_proj(x)
            write(model.k_proj.get_parameter(name))
            assert_same([model.k_proj(x)], [alone_is(model, "k_proj", x)])
            write(model.k_proj.get_parameter(name))
            assert_same([model(x)], [copy.deepcopy(model)(x)])

    @pytest.mark.parametrize("grad", [False, True])
    def test_the_input_is_written(self, grad):
        model, x = build(), input_()
        with torch.set_grad_enabled(grad):
            model.q_proj(x)
            x.data.mul_(2)
            assert_same([model.k_proj(x)], [alone_is(model, "k_proj", x)])

    @pytest.mark.parametrize("grad", [False, True])
    def test_a_call_that_ends_early(self, grad):
        """Its leftovers are none of the next call's."""
        model, x = build(), input_()

        def stop(module, args, output):
            raise RuntimeError("stop")

        handle = model.q_proj.base_layer.register_forward_hook(stop)
        other = model.k_proj.register_forward_pre_hook(lambda *_: None)
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                with pytest.raises(RuntimeError, match="stop"):
                    model(x)
                _data(model.v_proj.base_layer.weight)
                assert_same([model.v_proj(x)], [alone_is(model, "v_proj", x)])
            handle.remove(), other.remove()
            assert_same([model(x)], [copy.deepcopy(model)(x)])

    def test_copies_of_one_another(self):
        model, x = build(), input_()
        model.q_proj(x)
        other = copy.deepcopy(model)
        other.q_proj(x)
        for one in (model, other):
            _data(one.k_proj.base_layer.weight)
            assert_same([one.k_proj(x)], [alone_is(one, "k_proj", x)])
            _data(one.k_proj.adapters["default"].lora_A)
        assert_same([model(x)], [other(x)])


class TestAlone:
    """Reasons for which one sibling computes alone, while the other two go on sharing."""

    def check(self, change, calls, word, expected=None):
        model, plain = build(), build(shared=False)
        change(model), change(plain)
        x = input_()
        assert_same(step(model, x), step(plain, x))
        assert 3 not in calls
        branch = branch_of(model.k_proj)
        assert word in (branch if isinstance(branch, str) else word)
        assert model.group.partners(model.k_proj) == []
        assert model.group.partners(model.q_proj) == [model.v_proj]

    @pytest.mark.parametrize(
        "hook", ["forward_pre_hook", "forward_hook", "full_backward_hook", "full_backward_pre_hook"]
    )
    def test_hooks(self, calls, hook):
        self.check(lambda m: getattr(m.k_proj, f"register_{hook}")(lambda *args: None), calls, "hooks")
        self.check(lambda m: getattr(m.k_proj.base_layer, f"register_{hook}")(lambda *args: None), calls, "hooks")

    def test_forward_on_the_instance(self, calls):
        def override(model):
            forward = model.k_proj.forward
            model.k_proj.forward = lambda x: 2 * forward(x)

        self.check(override, calls, "overridden")

    def test_states(self, calls):
        self.check(lambda m: setattr(m.k_proj, "disabled", True), calls, "disabled")
        self.check(lambda m: m.k_proj.merge(), calls, "merged")
        self.check(lambda m: m.k_proj.set_adapter([]), calls, "0 active")

    def test_two_active_adapters(self, calls):
        def activate(model):
            torch.manual_seed(8)
            model.k_proj.add_adapter("b", r=2, init="random")
            model.k_proj.set_adapter(["default", "b"])

        model, plain = build(), build(shared=False)
        activate(model), activate(plain)
        assert_same(step(model, input_()), step(plain, input_()))
        assert model.group.rounds == 1
        assert model.group.partners(model.k_proj) == []

    def test_other_adapter_dtype(self, calls):
        model = build()
        model.k_proj.adapters.float()
        model(input_())
        assert calls == [2]

    def test_parametrised(self, calls):
        class Twice(nn.Module):
            def forward(self, weight):
                return 2 * weight

        register = nn.utils.parametrize.register_parametrization
        self.check(lambda m: register(m.k_proj.base_layer, "weight", Twice()), calls, "parametrised")
        self.check(lambda m: register(m.k_proj.adapters["default"], "lora_A", Twice()), calls, "parametrised")

    def test_other_device(self, calls):
        model = build()
        model.q_proj.adapters.to("meta")
        with pytest.raises(ValueError, match="is on meta, expected cpu"):
            model.q_proj(input_())
        assert calls == []

    def test_replica(self, calls):
        """What DataParallel makes of every module: a shallow copy whose group is the original's."""
        model, x = build(), input_()
        replica = model.k_proj._replicate_for_data_parallel()
        replica.base_layer, replica.adapters = model.k_proj.base_layer, model.k_proj.adapters
        with calling(model.group):
            expected = model.k_proj(x)
            assert calls == [3]
            assert (replica(x) - expected).abs().max() <= TOLERANCE
        assert calls == [3]

    def test_tensor_subclass_and_inference(self, calls):
        class Own(torch.Tensor):
            pass

        model = build(shared=True)
        with torch.inference_mode():
            model(torch.ones(M, K, dtype=torch.float64))
        assert model.group.forward(model.q_proj, torch.ones(M, K, dtype=torch.float64).as_subclass(Own)) is None
        assert calls == []
        for tensor in (model.k_proj.weight, model.v_proj.adapters["default"].lora_B):
            before = model.group.partners(model.q_proj)
            tensor.__class__ = Own  # as DTensor and quantised tensors are
            assert "a parameter is a Own" in map(branch_of, before)
            assert len(model.group.partners(model.q_proj)) == len(before) - 1
