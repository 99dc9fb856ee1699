"""attach on a model with experts: what a config means, and the layer's life, beside the definition of the op."""

import copy
import pickle

import pytest
import torch

import fastpeft
from fastpeft import Lora
from fastpeft.nn import LoraExperts
from fastpeft.reference.experts import experts as definition
from tests.support.expert_models import IDS, close, layers_of, loss_of, parameters_of
from tests.support.models import MOE_FAMILIES, build, llama

UP, DOWN = "gate_up_proj", "down_proj"
PATH = "model.layers.0.mlp.experts"


def attached(family="qwen3_moe", **settings):
    torch.manual_seed(1)
    return fastpeft.attach(
        build(family), Lora(**{"r": 3, "init": "random", "targets": ["q_proj", "experts"], **settings})
    )


def adapted(model):
    """Each adapted parameter of experts in the first layer, and its rank."""
    layer = model.get_submodule(PATH)
    if not isinstance(layer, LoraExperts):
        return {}
    return {name: pair.r for name, pair in layer.adapters["default"].items()}


NAMED = [
    ({}, {UP: 8, DOWN: 8}),  # "all-linear"
    ({"targets": ["q_proj"]}, {}),
    ({"targets": [DOWN]}, {DOWN: 8}),
    ({"targets": ["gate_proj", "up_proj"]}, {UP: 8}),  # what they were before they were stacked
    ({"targets": ["experts"]}, {UP: 8, DOWN: 8}),
    ({"targets": r".*\.experts\.\d+\.(gate|up|down)_proj|.*q_proj"}, {UP: 8}),  # as one wrote it then
    ({"targets": r".*\.(q_proj|down_proj)"}, {DOWN: 8}),
    ({"targets": ["q_proj", "experts"], "layers": [1]}, {}),
    ({"exclude": ["experts"]}, {}),
    ({"exclude": [DOWN]}, {UP: 8}),
    ({"exclude": r".*experts\.gate.*"}, {DOWN: 8}),
    ({"targets": [], "experts": [f"experts.{UP}"]}, {UP: 8}),
    ({"targets": ["q_proj"], "experts": [f"layers.0.mlp.experts.{DOWN}"]}, {DOWN: 8}),
    ({"rank_pattern": {rf"experts\.{DOWN}": 2}}, {UP: 8, DOWN: 2}),
    ({"experts": False}, {}),
]


@pytest.mark.parametrize(("settings", "wanted"), NAMED, ids=[str(settings) for settings, _ in NAMED])
def test_what_targets_mean(settings, wanted):
    assert adapted(fastpeft.attach(build("qwen3_moe"), Lora(**settings))) == wanted


def test_alpha_patterns_and_rslora():
    model = attached(alpha_pattern={rf"experts\.{UP}": 12}, rslora=True)
    pairs = model.get_submodule(PATH).adapters["default"]
    assert pairs[UP].scale == 12 / 3**0.5
    assert pairs[DOWN].scale == 8 / 3**0.5


REFUSED = [
    ({"experts": ["experts.w1"]}, ValueError, "experts names 'experts.w1', which no parameter of the model ends with"),
    ({"experts": ["input_layernorm.weight"]}, TypeError, "input_layernorm.weight, which is of 1 dimensions"),
    ({"lora_bias": True}, ValueError, "lora_bias is True, expected False beside experts"),
    (
        {"experts": ["gate.weight"], "dropout": 0.1},
        TypeError,
        "adapted without dropout alone, since Qwen3MoeTopKRouter",
    ),
    ({"rank_pattern": {"nowhere": 2}}, ValueError, "matches no adapted layer"),
]


@pytest.mark.parametrize(("settings", "kind", "message"), REFUSED)
def test_refused(settings, kind, message):
    model = build("qwen3_moe")
    modules = list(model.modules())
    with pytest.raises(kind, match=message):
        fastpeft.attach(model, Lora(**settings))
    assert list(model.modules()) == modules


def test_bad_experts():
    with pytest.raises(TypeError, match="Lora: experts is the string 'experts', expected a list of names"):
        Lora(experts="experts")
    with pytest.raises(ValueError, match=r"Lora: targets is \(\)"):
        Lora(targets=[])


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_all_linear_means_the_experts_of_every_family(family):
    model = build(family)
    paths = [path for path, module in model.named_modules() if path.endswith("experts") and "shared" not in path]
    fastpeft.attach(model, Lora(r=2))
    rows = {row.path: row for row in fastpeft.report(model)}
    assert all(rows[path].fused for path in paths)
    assert all(row.fused for row in rows.values()), fastpeft.report(model)


def test_the_report_names_experts_that_stay_frozen():
    model = build("qwen3_moe")
    before = model(input_ids=IDS).logits
    fastpeft.attach(model, Lora(r=2, experts=False))
    rows = [row for row in fastpeft.report(model) if row.kind == "experts"]
    assert [row.path for row in rows] == [PATH, PATH.replace("0", "1")]
    assert all(row.status == "its weights are left frozen: experts is False" for row in rows)
    assert "0 of 2 experts fused" in str(fastpeft.report(model))
    assert torch.equal(model(input_ids=IDS).logits, before)  # a new adapter is none
    model = attached(targets=["q_proj"])
    rows = [row for row in fastpeft.report(model) if row.kind == "experts"]
    assert "no adapter's targets or experts name them" in rows[0].status


def test_experts_that_cannot_be_adapted_stay_frozen():
    model = build("mixtral")
    for layer in model.model.layers:
        layer.mlp.experts.down_proj.data = layer.mlp.experts.down_proj.data.to(torch.float8_e4m3fn)
        layer.mlp.experts.gate_up_proj.data = layer.mlp.experts.gate_up_proj.data.to(torch.float8_e4m3fn)
    fastpeft.attach(model, Lora(r=2))
    rows = [row for row in fastpeft.report(model) if row.kind == "experts"]
    assert [row.status for row in rows] == [
        "its weights are left frozen: they are a Parameter of torch.float8_e4m3fn"
    ] * 2


def test_a_model_without_experts_has_no_such_row():
    model = fastpeft.attach(llama(), Lora(r=2))
    assert {row.kind for row in fastpeft.report(model)} == {"LoRA layers", "gated MLPs"}
    assert fastpeft.expert_parameters(llama()) == []


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4"])
def test_disabled_merged_and_detached(family):
    model = build(family)
    before, modules = model(input_ids=IDS).logits, list(model.modules())
    names = parameters_of(family)
    fastpeft.attach(model, Lora(r=3, init="random", experts=names))
    fastpeft.attach(model, Lora(r=2, init="random", targets=["q_proj"], experts=names[1:]), name="other")
    first = model(input_ids=IDS).logits
    assert not torch.equal(first, before)
    with fastpeft.disable_adapter(model):
        assert torch.equal(model(input_ids=IDS).logits, before)
    fastpeft.set_adapter(model, ["default", "other"])
    both = model(input_ids=IDS).logits
    assert not close(both, first)
    fastpeft.merge(model)
    assert "merged" in fastpeft.report(model).layers[-1].status
    assert close(model(input_ids=IDS).logits, both)
    fastpeft.unmerge(model)
    assert torch.equal(model(input_ids=IDS).logits, both)
    fastpeft.delete_adapter(model, "other")
    assert torch.equal(model(input_ids=IDS).logits, first)
    fastpeft.detach(model)
    assert list(model.modules()) == modules
    assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4", "nemotron_h"])
def test_merged_is_the_sum(family):
    """Of a layer alone: W + delta, expert by expert, in the parameter's own layout."""
    layer = next(iter(layers_of(attached(family, targets=["experts"]))))
    before = {name: getattr(layer.base_layer, name).clone() for name in layer.adapted(["default"])}
    delta = layer.delta("default")
    layer.merge()
    for name, weight in before.items():
        merged = getattr(layer.base_layer, name)
        assert torch.equal(merged, weight + delta[name])
        pair = layer.adapters["default"][name]
        b, a = pair.lora_B.view(len(pair.lora_B), -1, len(weight))[..., 2], pair.lora_A.view(len(weight), 3, -1)[2]
        turned = getattr(layer.base_layer, "is_transposed", False)
        assert close(delta[name][2], pair.scale * (b @ a).T if turned else pair.scale * b @ a)


def tokens_of(layer, count=7):
    torch.manual_seed(3)
    index = torch.randint(6, (count, 2))
    return torch.randn(count, 32, requires_grad=True), index, torch.rand(count, 2)


def test_dropout_is_the_definitions():
    layer = attached(dropout=0.25).get_submodule(PATH)
    x, index, weights = tokens_of(layer)
    assert torch.equal(layer.eval()(x, index, weights), layer(x, index, weights))
    layer.train()
    call = layer._call()
    assert (call.up.dropout, call.down.dropout) == (0.25, 0.25)
    torch.manual_seed(5)
    found = layer(x, index, weights)
    torch.manual_seed(5)
    seeds = torch.randint(1 << 62, (2, 6), dtype=torch.int64)  # as the op draws them
    assert close(found, definition(x, index, weights, call.up, call.down, call.activation, seeds))
    assert not close(found, layer.eval()(x, index, weights))


def test_experts_on_their_own_path():
    """A base with hooks is called with W + scale · B A for its weights; gradients reach the adapters all the same."""
    for family in ("qwen3_moe", "gpt_oss"):
        layer = attached(family).get_submodule(PATH)
        x, index, weights = tokens_of(layer)
        fused = layer(x, index, weights)
        wanted = torch.autograd.grad(fused.sum(), [p for p in layer.parameters() if p.requires_grad])
        layer.base_layer.register_forward_hook(lambda module, args, y: 2 * y)
        found = layer(x, index, weights)
        assert close(found, 2 * fused)
        grads = torch.autograd.grad(found.sum(), [p for p in layer.parameters() if p.requires_grad])
        assert all(close(one, 2 * other) for one, other in zip(grads, wanted, strict=True))
        assert "hooks" in layer.fastpeft_report()
    layer.adapters["default"][UP].dropout = 0.5
    with pytest.raises(RuntimeError, match="dropout beside experts that are not fused"):
        layer.train()(x, index, weights)


def test_arguments_by_name():
    layer = attached().get_submodule(PATH)
    x, index, weights = tokens_of(layer)
    assert torch.equal(layer(x, top_k_index=index, top_k_weights=weights), layer(x, index, weights))


def test_dtypes():
    """Beside 16 bits the adapter is float32, as in PEFT; what the op does not take is cast."""
    model = fastpeft.attach(build("qwen3_moe").bfloat16(), Lora(r=3))
    assert {p.dtype for p in layers_of(model)[0].adapters.parameters()} == {torch.float32}
    model = attached(dtype=torch.bfloat16)
    loss_of(model).backward()
    assert {p.grad.dtype for p in layers_of(model)[0].adapters.parameters()} == {torch.bfloat16}
    assert layers_of(model)[0].fastpeft_report() == "fused"


def test_copy_and_pickle():
    model = attached()
    expected = model(input_ids=IDS).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(input_ids=IDS).logits, expected)
        other.get_submodule(PATH).adapters["default"][UP].lora_B.data.zero_()
    assert torch.equal(model(input_ids=IDS).logits, expected)


def test_what_is_no_experts_module():
    with pytest.raises(TypeError, match="Linear is no experts module of transformers"):
        LoraExperts(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="expected 0, since Linear is no experts module"):
        LoraExperts(torch.nn.Linear(4, 4), parameters=["weight"], dropout=0.1)
    with pytest.raises(TypeError, match="parameter bias of base_layer is of 1 dimensions"):
        LoraExperts(torch.nn.Linear(4, 4), parameters=["bias"])
