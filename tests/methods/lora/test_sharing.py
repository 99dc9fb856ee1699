"""Siblings that share their input: the same outputs, gradients and masks as without, memory, threads."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn

from fastpeft.nn import LoraLinear, SharedInput, share_inputs, siblings, unshare_inputs
from tests.support.siblings import NAMES, TOLERANCE, K, M, alone_is, assert_same, build, calling, input_, step


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("settings", [{}, {"lora_bias": True}, {"rslora": True}])
def test_shared_equals_alone(calls, dropout, settings):
    models = [build(shared, dropout=dropout, **settings) for shared in (False, True)]
    for layer in (getattr(model, name) for model in models for name in NAMES if settings.get("lora_bias")):
        nn.init.constant_(layer.adapters["default"].lora_bias, 0.5)
    for i in range(2):
        expected = step(models[0], input_(seed=i))
        assert calls == [3] * i
        assert_same(step(models[1], input_(seed=i)), expected)
        assert calls == [3] * (i + 1)
    for model in models:
        model.eval()
    with torch.no_grad():
        assert_same([models[1](input_())], [models[0](input_())])
    assert calls == [3] * 3
    assert models[1].group.rounds == 3


def test_siblings_have_their_own_masks():
    model = build(dropout=0.5)
    q, v = model.q_proj, model.v_proj
    v.base_layer = q.base_layer
    v.adapters = copy.deepcopy(q.adapters)
    x = input_()
    assert not torch.equal(q(x), v(x))
    model.eval()
    assert torch.equal(q(x), v(x))


@pytest.mark.parametrize("names", siblings.SIBLINGS)
def test_every_name_in_the_table(names, calls):
    parent = nn.Module()
    for name in names:
        parent.add_module(name, LoraLinear(nn.Linear(K, 4), r=2))
    model = nn.ModuleDict({"self_attn": parent})
    (group,) = share_inputs(model, lambda module: isinstance(module, LoraLinear))
    x = torch.randn(M, K)
    with calling(group):
        for name in names:
            getattr(parent, name)(x)
    assert calls == [len(names)]
    assert group.partners(getattr(parent, names[0])) == [getattr(parent, name) for name in names[1:]]
    unshare_inputs(model)
    assert getattr(parent, names[0]).fastpeft_shared is None


@pytest.mark.parametrize("path", ["encoder_attn", "crossattention", "EncDecAttention", "cross_attn", "attn2"])
def test_names_that_tell_cross_attention(path, calls):
    model = nn.ModuleDict({path: build(shared=False)})
    share_inputs(model, lambda module: isinstance(module, LoraLinear))
    x, other = input_(seed=1), input_(seed=2)
    expected = step(build(shared=False), x, other)
    assert_same(step(model[path], x, other), expected)
    assert calls == [2]


class TestWrongGuess:
    def test_cross_attention_is_learned(self, calls):
        alone, model = build(shared=False), build()
        x, other = input_(seed=1), input_(3, seed=2).detach()[:1].expand(M, K).clone().requires_grad_()
        for i in range(4):
            assert_same(step(model, x, other), step(alone, x, other))
            # The first query computes all three, the first key finds out; from then on key and value share.
            assert calls == [3, 2] + [2] * i
        assert model.group.partners(model.q_proj) == []
        assert model.group.partners(model.k_proj) == [model.v_proj]

    def test_is_learned_whichever_comes_first(self, calls):
        """k and v get their tensor before q gets another."""
        model, x, other = build(), input_(seed=1), input_(seed=2)
        for _ in range(3):
            with calling(model.group):
                model.k_proj(other), model.v_proj(other), model.q_proj(x)
        assert calls == [3, 2, 2]
        assert model.group.partners(model.k_proj) == [model.v_proj]

    def test_one_exception_teaches_nothing(self, calls):
        model, x = build(), input_()
        with pytest.raises(RuntimeError), calling(model.group):
            model.q_proj(x)
            raise RuntimeError("something else")
        for i in range(3):
            step(model, input_(seed=i))
        assert calls == [3] * 4

    def test_a_sibling_always_called_on_its_own(self, calls):
        model = build()
        for i in range(5):
            with calling(model.group):
                model.q_proj(input_(seed=i))
        assert calls == [3, 3]
        assert model.group.partners(model.q_proj) == []

    def test_same_sibling_twice_with_one_tensor(self, calls):
        model, x = build(), input_()
        with calling(model.group):
            one, two = model.q_proj(x), model.q_proj(x)
            assert torch.equal(one, two) or (one - two).abs().max() <= TOLERANCE
            model.k_proj(x), model.v_proj(x)
        assert calls == [3]


def test_compiled_siblings_compute_alone(calls):
    torch._dynamo.reset()
    model, plain = build(), build(shared=False)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (4, 7):
        assert_same(step(model, input_(rows), run=compiled), step(plain, input_(rows)))
    assert calls == []
    assert model.group.rounds == 0


class TestMemory:
    def test_nothing_is_kept_after_use(self):
        model = build()
        x = input_().detach()
        with calling(model.group):
            q, k, v = model.q_proj(x), model.k_proj(x), model.v_proj(x)
            refs = [weakref.ref(t) for t in (x, q, k, v)]
            del x, q, k, v
            gc.collect()
            assert [ref() for ref in refs] == [None] * 4

    @pytest.mark.parametrize("ended", [False, True])
    def test_what_nobody_asked_for_goes_with_the_next_tensor_or_the_end(self, ended):
        model = build()
        x = input_().detach()
        ref = weakref.ref(x)
        with calling(model.group):
            model.q_proj(x)
            del x
            if not ended:
                model.q_proj(input_(seed=2))
                gc.collect()
                assert ref() is None
        gc.collect()
        assert ref() is None

    def test_copies_and_pickles_leave_it_behind(self, calls):
        model, x = build(), input_().detach()
        with calling(model.group):
            model.q_proj(x)
            others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        for other in others:
            assert other.group is other.k_proj.fastpeft_shared is not model.group
            assert other.group.members == (other.q_proj, other.k_proj, other.v_proj)
            assert vars(other.group._thread) == {}
            calls.clear()
            with calling(other.group):
                expected = [alone_is(model, name, x) for name in NAMES]
                assert_same([getattr(other, name)(x) for name in NAMES], expected)
            assert calls == [3]
            step(other, input_())
            assert calls == [3, 3]  # the copy's hooks are the copy's


def test_threads_do_not_see_each_other():
    model, failures = build(), []
    model.eval()
    plain = build(shared=False).eval()

    def work(seed):
        for i in range(30):
            x = input_(seed=100 * seed + i).detach()
            if (model(x) - plain(x)).abs().max() > TOLERANCE:
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert failures == []
    assert model.group.rounds > 0


def test_gradient_accumulates_over_two_forwards():
    model, plain = build(), build(False)
    run = lambda module: lambda x, other: module(x) + module(other)  # noqa: E731
    assert_same(
        step(model, input_(seed=1), input_(seed=2), run=run(model)),
        step(plain, input_(seed=1), input_(seed=2), run=run(plain)),
    )


def test_second_backward_through_one_graph():
    model, x = build(), input_()
    y = model(x).sum()
    y.backward(retain_graph=True)
    first = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * first)


def test_group_of_your_own():
    """The protocol alone, without the table of names."""
    layers = [LoraLinear(nn.Linear(K, 4), r=2, init="random") for _ in range(2)]
    group = SharedInput(layers)
    x = torch.randn(M, K)
    assert group.forward(layers[0], x) is None
    with calling(group):
        assert torch.allclose(group.forward(layers[0], x), layers[0](x), atol=1e-5)
        assert group.forward(LoraLinear(nn.Linear(K, 4), r=2), x) is None
        assert torch.allclose(group.forward(layers[1], x), layers[1](x), atol=1e-5)
    assert group.rounds == 1


def test_the_hooks_are_on_whoever_calls_the_siblings():
    """Their parent, or where that is a mere container what is around it; they go with the groups."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.ModuleDict({name: LoraLinear(nn.Linear(K, 4), r=2) for name in NAMES})

        def forward(self, x):
            return sum(layer(x) for layer in self.proj.values())

    model = nn.ModuleDict({"inner": build(shared=False).float(), "outer": Outer()})
    groups = share_inputs(model, lambda module: isinstance(module, LoraLinear))
    hooked = {path for path, module in model.named_modules() if module._forward_hooks or module._forward_pre_hooks}
    assert hooked == {"inner", "outer"}
    for path in hooked:
        model[path](torch.randn(M, K))
    assert [group.rounds for group in groups] == [1, 1]
    unshare_inputs(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in model.modules())
