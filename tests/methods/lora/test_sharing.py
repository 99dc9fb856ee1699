"""Siblings that share their input: the same outputs, gradients and masks as without, and when they do not share."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft.nn import LoraLinear, SharedInput, share_inputs, sharing, unshare_inputs

M, K = 6, 16
NAMES = ("q_proj", "k_proj", "v_proj")
# float64 results of two orders of summation over some hundred products, in values of order 1.
TOLERANCE = 2**10 * torch.finfo(torch.float64).eps


class Attention(nn.Module):
    """q of x, k and v of another tensor where there is one; then something that mixes all three."""

    def __init__(self, dropout=0.0, noise=0.0, **settings):
        super().__init__()
        for name, n, r in zip(NAMES, (K, 8, K), (3, 2, 4), strict=True):
            layer = LoraLinear(nn.Linear(K, n).double(), r=r, init="random", dropout=dropout, **settings)
            setattr(self, name, layer)
        self.noise = noise

    def forward(self, x, other=None):
        other = x if other is None else other
        q = self.q_proj(x)
        if self.noise:
            q = nn.functional.dropout(q, self.noise)  # draws between two siblings
        k, v = self.k_proj(other), self.v_proj(other)
        return torch.cat([q * v, k], -1).tanh()

    @property
    def group(self):
        return self.q_proj.fastpeft_shared


def build(shared=True, **settings):
    torch.manual_seed(0)
    model = Attention(**settings)
    if shared:
        assert len(share_inputs(model, lambda module: isinstance(module, LoraLinear))) == 1
    return model


def input_(rows=M, seed=1):
    return torch.randn(rows, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def step(model, *tensors, run=None, seed=5):
    """Outputs and all gradients of one step."""
    torch.manual_seed(seed)
    model.zero_grad()
    for tensor in tensors:
        tensor.grad = None
    y = (model if run is None else run)(*tensors)
    y.square().sum().backward()
    gradients = [t.grad for t in (*tensors, *model.parameters())]
    return [y.detach(), *(grad for grad in gradients if grad is not None)]


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= TOLERANCE * max(1, e.abs().max())


@pytest.fixture
def calls(monkeypatch):
    """The number of projections of every call of the shared op."""
    counts = []
    op = fastpeft.ops.lora_linear_shared

    def counted(x, weights, *args, **kwargs):
        counts.append(len(weights))
        return op(x, weights, *args, **kwargs)

    monkeypatch.setattr(fastpeft.ops, "lora_linear_shared", counted)
    return counts


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


@pytest.mark.parametrize("names", sharing.SIBLINGS)
def test_every_name_in_the_table(names, calls):
    parent = nn.Module()
    for name in names:
        parent.add_module(name, LoraLinear(nn.Linear(K, 4), r=2))
    model = nn.ModuleDict({"self_attn": parent})
    (group,) = share_inputs(model, lambda module: isinstance(module, LoraLinear))
    x = torch.randn(M, K)
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
            model.k_proj(other), model.v_proj(other), model.q_proj(x)
        assert calls == [3, 2, 2]
        assert model.group.partners(model.k_proj) == [model.v_proj]

    def test_one_exception_teaches_nothing(self, calls):
        model, x = build(), input_()
        model.q_proj(x)  # and then something raised
        for i in range(3):
            step(model, input_(seed=i))
        assert calls == [3] * 4

    def test_a_sibling_always_called_on_its_own(self, calls):
        model = build()
        for i in range(5):
            model.q_proj(input_(seed=i))
        assert calls == [3, 3]
        assert model.group.partners(model.q_proj) == []

    def test_same_sibling_twice_with_one_tensor(self, calls):
        model, x = build(), input_()
        one, two = model.q_proj(x), model.q_proj(x)
        assert torch.equal(one, two) or (one - two).abs().max() <= TOLERANCE
        model.k_proj(x), model.v_proj(x)
        assert calls == [3]


def alone_is(model, name, x):
    """The sibling's output without a group."""
    layer = copy.deepcopy(getattr(model, name))
    layer.__dict__.pop("fastpeft_shared", None)
    return layer(x)


class TestNothingStale:
    def check(self, model, name, x, change):
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
        with torch.no_grad():
            model.q_proj(x)
        assert model.k_proj(x).requires_grad
        model, x = build(), input_()
        model.q_proj(x)
        with torch.no_grad():
            assert not model.k_proj(x).requires_grad

    def test_autocast_changed(self):
        model, x = build().float(), input_().detach().float()
        model.q_proj(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert model.k_proj(x).dtype == torch.bfloat16
            model.v_proj(x)
        assert model.v_proj(x).dtype == torch.float32

    def test_equal_tensors_are_not_the_same(self, calls):
        model, x = build(), input_()
        model.q_proj(x), model.k_proj(x.view_as(x)), model.v_proj(x.view_as(x))
        assert calls[0] == 3
        assert len(calls) > 1


class TestAlone:
    """Reasons for which one sibling computes alone, while the other two go on sharing."""

    def check(self, change, calls, word, expected=None):
        model, plain = build(), build(shared=False)
        change(model), change(plain)
        x = input_()
        assert_same(step(model, x), step(plain, x))
        assert 3 not in calls
        branch = sharing.branch_of(model.k_proj)
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
            assert "a parameter is a Own" in map(sharing.branch_of, before)
            assert len(model.group.partners(model.q_proj)) == len(before) - 1


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
        q, k, v = model.q_proj(x), model.k_proj(x), model.v_proj(x)
        refs = [weakref.ref(t) for t in (x, q, k, v)]
        del x, q, k, v
        gc.collect()
        assert [ref() for ref in refs] == [None] * 4

    def test_what_nobody_asked_for_goes_with_the_next_tensor(self):
        model = build()
        x = input_().detach()
        ref = weakref.ref(x)
        model.q_proj(x)
        del x
        model.q_proj(input_(seed=2))
        gc.collect()
        assert ref() is None

    def test_copies_and_pickles_leave_it_behind(self, calls):
        model, x = build(), input_().detach()
        model.q_proj(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.group is other.k_proj.fastpeft_shared is not model.group
            assert other.group.members == (other.q_proj, other.k_proj, other.v_proj)
            assert vars(other.group._thread) == {}
            calls.clear()
            expected = [alone_is(model, name, x) for name in NAMES]
            assert_same([getattr(other, name)(x) for name in NAMES], expected)
            assert calls == [3]


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


def recomputed(model, reentrant, *args):
    return checkpoint(model, *args, use_reentrant=reentrant)


class TestCheckpointing:
    """Recomputation draws the same masks and saves the same tensors, whatever has been learned in between."""

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize(
        ("dropout", "noise", "cross"),  # with dropout and one of the others, masks are drawn at another time: see below
        [(0.0, 0.0, False), (0.0, 0.5, False), (0.0, 0.0, True), (0.0, 0.5, True), (0.4, 0.0, False)],
    )
    def test_gradients_are_those_without(self, reentrant, dropout, noise, cross):
        model, plain = build(dropout=dropout, noise=noise), build(False, dropout=dropout, noise=noise)
        tensors = [input_(seed=1), input_(seed=2)][: 1 + cross]
        for i in range(3):
            expected = step(plain, *tensors, seed=i)
            assert_same(step(model, *tensors, seed=i, run=lambda *args: recomputed(model, reentrant, *args)), expected)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("cross", [False, True])
    def test_gradient_is_that_of_the_output(self, reentrant, cross):
        """By finite differences: with a seed held, the step is a function; its gradient must be its derivative."""
        model = build(dropout=0.4, noise=0.3)
        tensors = [input_(seed=1), input_(seed=2)][: 1 + cross]

        def loss(*args):
            torch.manual_seed(3)
            return recomputed(model, reentrant, *args).square().sum()

        loss(*tensors).backward()  # wrong guesses are made here
        for _ in range(2):
            for tensor in tensors:
                tensor.grad = None
            loss(*tensors).backward()
            for tensor in tensors:
                direction = torch.randn_like(tensor)
                h = 1e-6
                with torch.no_grad():
                    shifted = [[t + s * h * direction if t is tensor else t for t in tensors] for s in (1, -1)]
                plus, minus = (loss(*(t.detach().requires_grad_() for t in ts)).item() for ts in shifted)
                slope = (tensor.grad * direction).sum().item()
                # Truncation h², rounding eps / h: both are below 1e-8 relative to the loss.
                assert abs((plus - minus) / (2 * h) - slope) <= 1e-6 * max(1, abs(slope))

    def test_shares_inside_a_checkpoint(self, calls):
        model = build(dropout=0.4)
        step(model, input_(), run=lambda x: checkpoint(model, x, use_reentrant=False))
        assert calls == [3, 3]  # forward and recomputation

    def test_a_wrong_guess_stays_while_it_can_be_replayed(self, calls):
        model, tensors = build(), (input_(seed=1), input_(seed=2))
        run = lambda *args: checkpoint(model, *args, use_reentrant=False)  # noqa: E731
        losses = [run(*tensors).sum() for _ in range(2)]  # two forwards, then two backwards
        sum(losses).backward()
        assert set(calls) == {3}
        for reentrant in (False, True):
            expected = step(build(False), *tensors)
            assert_same(step(model, *tensors, run=lambda *a, r=reentrant: recomputed(model, r, *a)), expected)

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_siblings_in_different_checkpoints(self, reentrant, dropout):
        """One sibling's output must not come from another's checkpoint: its own recomputation would lack it."""
        model, plain = build(dropout=dropout), build(False, dropout=dropout)

        def run(module):
            def forward(x):
                q = checkpoint(module.q_proj, x, use_reentrant=reentrant)
                k = checkpoint(lambda x: module.k_proj(x).tanh(), x, use_reentrant=reentrant)
                return torch.cat([q * module.v_proj(x), k], -1).tanh()

            return forward

        for i in range(2):
            actual = step(model, input_(), run=run(model), seed=i)
            if not dropout:
                assert_same(actual, step(plain, input_(), run=run(plain), seed=i))
        x, h = input_(), 1e-6
        direction = torch.randn_like(x)

        def loss(x):
            torch.manual_seed(3)
            return run(model)(x).square().sum()

        loss(x), loss(input_(seed=2))  # wrong guesses are made here
        loss(x).backward()
        plus, minus = (loss((x.detach() + s * h * direction).requires_grad_()).item() for s in (1, -1))
        slope = (x.grad * direction).sum().item()
        assert abs((plus - minus) / (2 * h) - slope) <= 1e-6 * max(1, abs(slope))

    def test_offloading_hooks(self):
        model, plain = build(dropout=0.2), build(False, dropout=0.2)

        def run(module):
            def forward(x):
                with torch.autograd.graph.save_on_cpu():
                    return module(x)

            return forward

        assert_same(step(model, input_(), run=run(model)), step(plain, input_(), run=run(plain)))


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
    assert torch.allclose(group.forward(layers[0], x), layers[0](x), atol=1e-5)
    assert group.forward(LoraLinear(nn.Linear(K, 4), r=2), x) is None
    assert torch.allclose(group.forward(layers[1], x), layers[1](x), atol=1e-5)
    assert group.rounds == 1
