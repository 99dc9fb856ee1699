"""What accelerate does to PEFT's layers: which calls are fused, which are PEFT's, and the whole life of a model."""

import contextlib
import copy
import subprocess
import sys

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn.utils import parametrize, prune

import fastpeft
from fastpeft.integrations import _fusable
from fastpeft.integrations.peft import FastLoraLinear

pytestmark = pytest.mark.oldest


class Model(nn.Module):
    """Two linear layers, an embedding and a convolution."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(16, 12)
        self.conv = nn.Conv1d(12, 12, 1)
        self.up = nn.Linear(12, 20)
        self.down = nn.Linear(20, 6, bias=False)

    def forward(self, ids):
        x = self.conv(self.embed(ids).mT).mT
        return self.down(self.up(x).relu())


IDS = torch.arange(10).view(2, 5)


def config(**settings):
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["up", "down"], **settings}
    )


def peft_model(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    return get_peft_model(Model().to(dtype), config(**settings))


def up(model):
    """The layer that a case changes."""
    return model.base_model.model.up


def statuses(model):
    return {layer.path.rpartition(".")[2]: layer.status for layer in fastpeft.report(model)}


@contextlib.contextmanager
def counted(monkeypatch):
    """The number of calls that the fused op serves."""
    calls = []
    run = _fusable.run
    with monkeypatch.context() as patch:
        patch.setattr(_fusable, "run", lambda x, branches: calls.append(len(branches)) or run(x, branches))
        yield calls


def assert_pefts(model, plain, calls=2, monkeypatch=None, tolerance=1e-6):
    """Same output, and so many calls were fused."""
    with counted(monkeypatch) as fused:
        torch.testing.assert_close(model(IDS), plain(IDS), rtol=tolerance, atol=tolerance)
    assert len(fused) == calls


class Special(nn.Linear):
    """Stands for a quantised layer: a subclass of nn.Linear that PEFT or its user has another layer for."""


class Shout(nn.Module):
    def forward(self, x):
        return 2 * x


def _replace_forward(layer):
    layer.lora_A["default"].forward = lambda x: 3 * nn.functional.linear(x, layer.lora_A["default"].weight)


def _parametrise(module):
    parametrize.register_parametrization(module, "weight", Shout())


def _use_subclass(layer):
    layer.base_layer.__class__ = type("Quantised", (nn.Linear,), {})


def _bias_in_a(layer):
    layer.lora_A["default"].bias = nn.Parameter(torch.ones(4))


def _vector_scaling(layer):
    layer.scaling["default"] = torch.linspace(0, 1, 20)


# What is done to a layer that is otherwise fused, and what the report says about it.
CHANGES = {
    "disabled": (lambda layer: layer.enable_adapters(False), "disabled"),
    "merged": (lambda layer: layer.merge(), "merged"),
    "no adapter": (lambda layer: layer.delete_adapter("default"), "no adapter"),
    "hook on the base": (lambda layer: layer.base_layer.register_forward_hook(lambda m, x, y: 2 * y), "hooks"),
    "pre-hook on A": (lambda layer: layer.lora_A.default.register_forward_pre_hook(lambda m, x: 2 * x[0]), "hooks"),
    "hook on B": (lambda layer: layer.lora_B.default.register_forward_hook(lambda m, x, y: 2 * y), "hooks"),
    "hook on dropout": (lambda layer: layer.lora_dropout.default.register_forward_hook(lambda m, x, y: -y), "hooks"),
    "backward hook": (lambda layer: layer.lora_B.default.register_full_backward_hook(lambda m, gx, gy: None), "hooks"),
    "forward replaced": (_replace_forward, "replaced forward"),
    "parametrised": (lambda layer: _parametrise(layer.lora_A.default), "Param"),
    "parametrised base": (lambda layer: _parametrise(layer.base_layer), "Param"),
    "pruned": (lambda layer: prune.l1_unstructured(layer.lora_A.default, "weight", 0.5), "hooks"),
    "base is a subclass": (_use_subclass, "base_layer is Quantised"),
    "dropout module": (lambda layer: layer.lora_dropout.update({"default": Shout()}), "lora_dropout is Shout"),
    "dropout of 1": (lambda layer: layer.lora_dropout.update({"default": nn.Dropout(1.0)}), "p=1.0"),
    "bias in A": (_bias_in_a, "lora_A"),
    "scaling is a vector": (_vector_scaling, "scaling"),
    "A is no Linear": (lambda layer: setattr(layer.lora_A.default, "__class__", Special), "lora_A"),
    "narrow adapter": (lambda layer: layer.lora_A.to(torch.float16) and layer.lora_B.to(torch.float16), "float16"),
    "adapter dtypes differ": (lambda layer: layer.lora_B.to(torch.float64), "differ in dtype"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_falls_back_to_pefts_own_forward(change, monkeypatch):
    apply, reason = CHANGES[change]
    plain = peft_model()
    ours = fastpeft.accelerate(copy.deepcopy(plain))
    for model in (plain, ours):
        apply(up(model))
    with counted(monkeypatch) as fused:
        try:
            expected = up(plain)(torch.ones(3, 12))
        except RuntimeError as error:  # PEFT cannot either
            with pytest.raises(RuntimeError, match=str(error)[:20]):
                up(ours)(torch.ones(3, 12))
        else:
            assert torch.equal(up(ours)(torch.ones(3, 12)), expected)
    assert fused == []
    assert reason in statuses(ours)["up"]
    assert statuses(ours)["down"] == "fused"
    before = [type(module) for module in plain.modules()]
    with pytest.raises(ValueError, match=r"1 of 2 .*\n  base_model\.model\.up: .*" + reason):
        fastpeft.accelerate(plain, strict=True)
    assert [type(module) for module in plain.modules()] == before


def test_variants_and_other_layers_are_named(monkeypatch):
    plain = peft_model(use_dora=True, target_modules=["embed", "conv", "up"])
    ours = fastpeft.accelerate(copy.deepcopy(plain))
    assert_pefts(ours, plain, 0, monkeypatch, tolerance=0)
    found = statuses(ours)
    assert found.keys() == {"embed", "conv", "up"}
    assert "DoRA" in found["up"] or "Dora" in found["up"]
    assert not {"fused"} & set(found.values())
    with pytest.raises(ValueError, match="3 of 3") as error:
        fastpeft.accelerate(plain, strict=True)
    assert all(f"model.{name}: " in str(error.value) for name in found)


def test_mixed_batches_are_pefts(monkeypatch):
    plain = peft_model()
    plain.add_adapter("other", config(r=2))
    ours = fastpeft.accelerate(copy.deepcopy(plain)).eval()
    names = ["default", "other"]
    with counted(monkeypatch) as fused:
        assert torch.equal(ours(IDS, adapter_names=names), plain.eval()(IDS, adapter_names=names))
        assert fused == []
        ours(IDS)
        assert len(fused) == 2


@pytest.mark.parametrize("transform", ["func", "forward mode", "jit", "export", "global hook"])
def test_transforms_see_pefts_forward(transform, monkeypatch):
    plain = up(peft_model(torch.float64)).eval()
    ours = copy.deepcopy(plain)
    ours.__class__ = FastLoraLinear
    x, v = torch.randn(2, 3, 12, dtype=torch.float64)

    def result(layer):
        if transform == "func":
            return torch.func.vmap(torch.func.grad(lambda row: layer(row).square().sum()))(x)
        if transform == "forward mode":
            with torch.autograd.forward_ad.dual_level():
                y = layer(torch.autograd.forward_ad.make_dual(x, v))
                return torch.autograd.forward_ad.unpack_dual(y).tangent
        if transform == "jit":
            return torch.jit.trace(layer, (x,), check_trace=False)(v)
        if transform == "export":
            graph = torch.export.export(layer, (x,)).module()
            assert "fastpeft" not in str(graph.graph)
            return graph(v)
        handle = nn.modules.module.register_module_forward_hook(lambda module, x, y: 2 * y)
        try:
            return layer(x)
        finally:
            handle.remove()

    with counted(monkeypatch) as fused:
        assert torch.equal(result(ours), result(plain))
        assert fused == []
        ours(x)
        assert fused == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_disabled_casting_of_the_input_is_pefts(dtype):
    model = fastpeft.accelerate(peft_model(dtype))
    layer, x = up(model), torch.ones(3, 12, dtype=dtype)
    layer.cast_input_dtype_enabled = False
    layer.lora_A.float(), layer.lora_B.float()
    assert "fused" != statuses(model)["up"]
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)
    layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    assert statuses(model)["up"] == "fused"
    assert layer(x).dtype == dtype


def test_meta_device():
    model = fastpeft.accelerate(peft_model().to("meta"))
    assert model(IDS.to("meta")).shape == (2, 5, 6)
    assert statuses(model)["up"] == "device meta"


def test_settings_changed_after_accelerate_hold(monkeypatch):
    """Scales, dropout and adapters are read at every call."""
    plain = peft_model(lora_dropout=0.5)
    ours = fastpeft.accelerate(copy.deepcopy(plain))

    def both(act, calls=2):
        for model in (plain, ours):
            act(model)
        assert_pefts(ours, plain, calls, monkeypatch)

    both(lambda model: model.eval())
    both(lambda model: up(model).set_scale("default", 3.0))
    both(lambda model: up(model).scale_layer(0.25))
    both(lambda model: up(model).unscale_layer())
    both(lambda model: up(model).scaling.update(default=torch.tensor(1.5)))
    (
        torch.manual_seed(1),
        both(lambda model: torch.manual_seed(1) and model.add_adapter("b", config(r=3, use_rslora=True))),
    )
    both(lambda model: model.base_model.set_adapter(["default", "b"]))
    both(lambda model: model.set_adapter("b"))
    both(lambda model: model.merge_adapter(), 0)
    both(lambda model: model.unmerge_adapter())
    with ours.disable_adapter(), plain.disable_adapter():
        assert_pefts(ours, plain, 0, monkeypatch)
    both(lambda model: model.delete_adapter("b"))
    both(lambda model: model.set_adapter("default"))
    both(lambda model: up(model).lora_dropout.update({"default": nn.Identity()}))
    both(lambda model: model.train() and setattr(model.base_model.model.down.lora_dropout["default"], "p", 0.0))
    merged, expected = ours.merge_and_unload(), plain.merge_and_unload()
    assert type(merged.up) is nn.Linear
    torch.testing.assert_close(merged(IDS), expected(IDS))


@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("tensor_scaling", [False, True])
def test_several_adapters_and_their_gradients(lora_bias, tensor_scaling):
    if lora_bias and peft.__version__ < "0.15":
        pytest.skip("PEFT has no lora_bias")
    plain = peft_model(torch.float64, lora_bias=lora_bias, target_modules=["up"])
    plain.add_adapter("b", config(r=3, lora_alpha=5, lora_bias=lora_bias, target_modules=["up"]))
    plain.base_model.set_adapter(["default", "b"])
    if tensor_scaling:
        up(plain).scaling = {name: torch.tensor(value) for name, value in up(plain).scaling.items()}
    ours = fastpeft.accelerate(copy.deepcopy(plain), strict=True)
    for model in (ours, plain):
        model(IDS).square().sum().backward()
    for (name, mine), theirs in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-12, atol=1e-12)


def test_dropout_masks_are_pefts_in_distribution():
    """Mean and variance over draws agree with PEFT's; the mean is the output without dropout."""
    plain = up(peft_model(torch.float64, lora_dropout=0.3))
    ours = copy.deepcopy(plain)
    ours.__class__ = FastLoraLinear
    draws = 4000
    x = torch.randn(1, 12, dtype=torch.float64).expand(draws, 12)
    mean = plain.eval()(x[:1])
    plain.train(), ours.train()
    with torch.no_grad():
        a, b = ours(x), plain(x)
    deviation = b.std(0)
    assert ((a.mean(0) - mean).abs() < 5 * deviation / draws**0.5).all()
    assert ((a.std(0) / deviation - 1).abs() < 5 * draws**-0.5).all()


def test_dropout_gradients_belong_to_the_forwards_mask():
    """For a fixed seed y is linear in x, in A and in B: a finite step changes it by the gradient times the step."""
    layer = up(peft_model(torch.float64, lora_dropout=0.3)).train()
    layer.__class__ = FastLoraLinear
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(7, 20, dtype=torch.float64)

    def loss():
        torch.manual_seed(3)
        return (layer(x) * dy).sum()

    start = loss()
    start.backward()
    for tensor in (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        move = torch.randn_like(tensor)
        with torch.no_grad():
            tensor += move
            torch.testing.assert_close(loss() - start.detach(), (tensor.grad * move).sum(), rtol=1e-10, atol=1e-10)
            tensor -= move


def test_hot_swap(tmp_path):
    """PEFT's hot-swap of an adapter of another rank and alpha, prepared for compilation: padded, tensor scaling."""
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    first, second = peft_model(), peft_model(r=2, lora_alpha=7)
    nn.init.normal_(up(second).lora_B["default"].weight)
    second.save_pretrained(tmp_path)
    ours = fastpeft.accelerate(first.eval(), strict=True)
    prepare_model_for_compiled_hotswap(ours, target_rank=8)
    assert isinstance(up(ours).scaling["default"], torch.Tensor)
    assert set(statuses(ours).values()) == {"fused"}
    hotswap_adapter(ours, str(tmp_path), adapter_name="default", torch_device="cpu")
    torch.testing.assert_close(ours(IDS), second.eval()(IDS))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_compiles_without_a_graph_break(dropout):
    model = fastpeft.accelerate(peft_model(torch.float64, lora_dropout=dropout), strict=True)
    layer = up(model)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 9):
        x = torch.randn(2, rows, 12, dtype=torch.float64)
        layer.zero_grad()
        torch.manual_seed(0)
        y = compiled(x)
        y.square().sum().backward()
        grad = layer.lora_A["default"].weight.grad
        if dropout == 0:
            layer.zero_grad()
            expected = layer(x)
            expected.square().sum().backward()
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(grad, layer.lora_A["default"].weight.grad)
        assert grad.abs().sum() > 0


def test_output_may_be_modified_in_place():
    """ReLU(inplace=True) and the like, as behind PEFT's own layer."""
    layer = up(fastpeft.accelerate(peft_model()))
    for x in (torch.ones(3, 12), torch.ones(2, 3, 12)):
        layer(x).relu_().sum().backward()
        y = layer(x)
        y += 1
        y.sum().backward()


def test_accelerate_again_and_copies():
    model = fastpeft.accelerate(fastpeft.accelerate(peft_model()))
    assert [type(m) for m in model.modules()].count(FastLoraLinear) == 2
    copied = copy.deepcopy(model)
    assert torch.equal(copied(IDS), model(IDS))
    fastpeft.restore(copied)
    assert [type(m) for m in copied.modules()].count(Linear) == 2
    assert set(statuses(model).values()) == {"fused"}
    assert all("accelerate" in status for status in statuses(copied).values())


def test_restore_refuses_a_wrapped_class():
    model = fastpeft.accelerate(peft_model())
    up(model).__class__ = type("FSDPFastLoraLinear", (FastLoraLinear,), {})
    with pytest.raises(
        ValueError, match=r"restore: base_model\.model\.up is FSDPFastLoraLinear, expected FastLoraLinear"
    ):
        fastpeft.restore(model)
    assert type(model.base_model.model.down) is FastLoraLinear


@pytest.mark.parametrize("function", [fastpeft.accelerate, fastpeft.restore])
def test_wrong_models_are_refused(function):
    with pytest.raises(TypeError, match="model is str, expected"):
        function("model")
    with pytest.raises(ValueError, match="no LoRA layer"):
        function(Model())


class SpecialLora(Linear):
    pass


def test_register_declines_what_is_not_exactly_linear():
    torch.manual_seed(0)
    base = Model()
    base.down.__class__ = Special
    own = config(target_modules=["embed", "conv", "up", "down"])
    own._register_custom_module({Special: SpecialLora})
    model = get_peft_model(base, fastpeft.register(fastpeft.register(own)))
    kinds = {name: type(getattr(model.base_model.model, name)).__name__ for name in ("embed", "conv", "up", "down")}
    assert kinds == {"embed": "Embedding", "conv": "Conv1d", "up": "FastLoraLinear", "down": "SpecialLora"}
    assert fastpeft.restore(model) is model
    assert type(up(model)) is Linear


def test_register_survives_a_copy_and_is_not_saved(tmp_path):
    registered = fastpeft.register(config())
    model = get_peft_model(Model(), copy.deepcopy(registered))
    assert set(statuses(model).values()) == {"fused"}
    model.save_pretrained(tmp_path)
    assert type(up(PeftModel.from_pretrained(Model(), tmp_path))) is Linear


def test_register_refuses():
    with pytest.raises(TypeError, match=r"lora_config is dict, expected peft\.LoraConfig"):
        fastpeft.register({})
    taken = config()
    taken._register_custom_module({nn.Linear: SpecialLora})
    with pytest.raises(ValueError, match=r"maps Linear to .*SpecialLora"):
        fastpeft.register(taken)


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("sys.modules['peft'] = None", "peft does not import, expected peft>=0.15"),
        ("import peft; peft.__version__ = '0.14.1'", "peft has version 0.14.1, expected >=0.15"),
    ],
)
def test_missing_or_old_peft_is_said(setup, message):
    code = f"import sys, fastpeft\n{setup}\nfastpeft.accelerate"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
