"""PEFT's LoRA on experts, served by the fused op: PEFT's numbers on every family, and when PEFT serves itself."""

import copy
import pickle

import pytest
import torch

import fastpeft
from tests.support.models import MOE_FAMILIES, VOCAB, build

peft = pytest.importorskip("peft", reason="PEFT is not installed")
if not hasattr(peft.tuners.lora.layer, "ParamWrapper"):
    pytest.skip("PEFT before 0.17 has no LoRA on parameters", allow_module_level=True)

from fastpeft.integrations import _experts as integration  # noqa: E402
from fastpeft.integrations.peft import FastParamWrapper, ParamWrapper  # noqa: E402

IDS = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def parameters_of(family):
    return ["experts.up_proj", "experts.down_proj"] if family == "nemotron_h" else BOTH


def peft_model(family="qwen3_moe", targets=None, dtype=torch.float32, implementation=None, **settings):
    """A model in which A and B of every expert are drawn, so that a wrong expert shows."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": [], "init_lora_weights": False, **settings}
    config["target_parameters"] = parameters_of(family) if targets is None else targets
    model = build(family).to(dtype)
    if implementation is not None:
        model.set_experts_implementation(implementation)
    torch.manual_seed(1)
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def pair(*args, **settings):
    """The model as PEFT serves it, and a copy accelerated."""
    theirs = peft_model(*args, **settings)
    return theirs, fastpeft.accelerate(copy.deepcopy(theirs))


def wrappers(model):
    return [module for module in model.modules() if isinstance(module, ParamWrapper)]


@pytest.fixture
def calls(monkeypatch):
    """One entry for each call that the fused op serves."""
    served, run = [], integration.run
    monkeypatch.setattr(integration, "run", lambda *args: served.append(args[0]) or run(*args))
    return served


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss


def close(found, wanted, terms=1 << 10):
    """As many products as a value of these models is a sum of, in float32 and in another order."""
    limit = terms**0.5 * torch.finfo(torch.float32).eps * max(1.0, wanted.abs().max().item())
    return (found - wanted).abs().max() <= 4 * limit


def assert_same(theirs, ours, calls, count=None):
    """Output and gradients; every layer of experts went through the op."""
    found, wanted = ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits
    assert len(calls) == (len(layers_of(ours)) if count is None else count)
    assert close(found, wanted)
    calls.clear()
    loss_of(ours).backward(), loss_of(theirs).backward()
    theirs = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert close(parameter.grad, theirs[name].grad), name


def layers_of(model):
    """The outermost wrapper of each layer."""
    inner = {module.base_layer for module in wrappers(model)}
    return [module for module in wrappers(model) if module not in inner]


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_every_family_is_pefts(family, calls):
    theirs, ours = pair(family)
    rows = [row for row in fastpeft.report(ours) if row.path.endswith(("experts", "base_layer"))]
    assert rows
    assert all(row.fused for row in rows), fastpeft.report(ours)
    assert_same(theirs, ours, calls)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_ten_steps_of_every_family_are_pefts(family):
    curves = []
    for model in pair(family):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
        curve = []
        for step in range(10):
            torch.manual_seed(step)  # Phi's router is noisy
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.detach())
        curves.append(torch.stack(curve))
    theirs, ours = curves
    assert theirs[-1] < theirs[0]
    # Adam divides by the gradient's size: rounding moves a step by its own share of eps, ten times.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation(implementation, calls):
    assert_same(*pair(implementation=implementation), calls)


@pytest.mark.parametrize("targets", [BOTH[:1], BOTH[1:], [*BOTH, "mlp.gate.weight"]], ids=["up", "down", "router too"])
def test_any_of_the_parameters(targets, calls):
    theirs, ours = pair(targets=targets)
    routers = [row for row in fastpeft.report(ours) if row.path.endswith("gate")]
    assert not any(row.fused for row in routers)
    assert_same(theirs, ours, calls, count=2)


def test_biases_of_experts(calls):
    """Parameters of two dimensions: PEFT's term is one matrix for all experts."""
    theirs, ours = pair("gpt_oss", targets=[*BOTH, "experts.gate_up_proj_bias", "experts.down_proj_bias"])
    assert_same(theirs, ours, calls)


def test_two_active_adapters(calls):
    theirs = peft_model()
    theirs.add_adapter("other", peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=[], target_parameters=BOTH, init_lora_weights=False
    ))  # fmt: skip
    theirs.base_model.set_adapter(["default", "other"])
    ours = fastpeft.accelerate(copy.deepcopy(theirs))
    assert_same(theirs, ours, calls)


def test_an_adapter_that_is_added_later(calls):
    """PEFT adds it to the wrappers that are there, which it knows by their name."""
    settings = {"r": 3, "target_modules": [], "target_parameters": BOTH, "init_lora_weights": False}
    theirs, ours = pair()
    count = len(wrappers(ours))
    for model in (theirs, ours):
        torch.manual_seed(2)
        model.add_adapter("other", peft.LoraConfig(**settings))
        model.set_adapter("other")
    assert len(wrappers(ours)) == count
    assert [type(module).__name__ for module in wrappers(ours)] == ["ParamWrapper"] * count
    assert_same(theirs, ours, calls)
    again = pickle.loads(pickle.dumps(ours))
    assert torch.equal(again(input_ids=IDS).logits, ours(input_ids=IDS).logits)


def test_rank_patterns_and_linear_layers_beside(calls):
    theirs, ours = pair(target_modules=["q_proj"], rank_pattern={"experts.gate_up_proj": 2}, use_rslora=True)
    assert_same(theirs, ours, calls)
    assert fastpeft.report(ours).fused == len(fastpeft.report(ours))


def test_an_expert_has_its_own_columns_of_b():
    """B's fast index is the expert: with one expert's B alone not zero, only its tokens change."""
    model = peft_model()
    for wrapper in wrappers(model):
        b = wrapper.lora_B["default"].weight.data.view(wrapper.out_features, -1, wrapper.num_experts)
        b[..., torch.arange(wrapper.num_experts) != 2] = 0
    layer = fastpeft.accelerate(model).base_model.model.model.layers[0].mlp.experts
    x, weights = torch.randn(6, 32), torch.ones(6, 1)
    for expert in range(6):
        index = torch.full((6, 1), expert)
        changed = not torch.equal(layer(x, index, weights), integration.innermost(layer)(x, index, weights))
        assert changed == (expert == 2)


def test_restore_gives_pefts_own():
    theirs, ours = pair()
    assert all(type(module) is FastParamWrapper for module in wrappers(ours))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    fastpeft.restore(ours)
    assert all(type(module) is ParamWrapper for module in wrappers(ours))
    assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def hooked(model):
    layers_of(model)[0].base_layer.register_forward_hook(lambda *_: None)


def experts_hooked(model):
    integration.innermost(layers_of(model)[0]).register_forward_hook(lambda *_: None)


def disabled(model):
    model.base_model.disable_adapter_layers()


def merged(model):
    model.base_model.merge_adapter()


def elsewhere(model):
    integration.innermost(layers_of(model)[0]).config._experts_implementation = "deepgemm"


REASONS = {
    hooked: "an inner wrapper has hooks",
    experts_hooked: "the experts module has hooks",
    disabled: "its adapters are disabled",
    merged: "its adapters are merged",
}


@pytest.mark.parametrize(("change", "reason"), REASONS.items(), ids=lambda v: getattr(v, "__name__", ""))
def test_what_peft_serves_itself(change, reason):
    theirs, ours = pair()
    change(theirs), change(ours)
    row = fastpeft.report(ours).layers[0]
    assert reason in row.status
    assert close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_strict_names_what_is_not_fused():
    model = peft_model()
    elsewhere(model)
    with pytest.raises(ValueError, match="experts: the experts' implementation is 'deepgemm'"):
        fastpeft.accelerate(model, strict=True)
    assert all(type(module) is ParamWrapper for module in wrappers(model))
    model = peft_model(targets=["mlp.gate.weight"])
    with pytest.raises(ValueError, match="Qwen3MoeTopKRouter is no experts module of transformers"):
        fastpeft.accelerate(model, strict=True)


def test_sentinels_of_expert_parallelism_give_zero():
    theirs, ours = pair()
    one, other = (model.base_model.model.model.layers[0].mlp.experts for model in (theirs, ours))
    for model in (theirs, ours):
        integration.innermost(layers_of(model)[0])._is_expert_parallel = True
    x, index = torch.randn(5, 32), torch.tensor([[0, 6], [6, 6], [3, 1], [6, 2], [5, 4]])
    weights = torch.rand(5, 2).masked_fill(index == 6, 0)
    assert close(other(x, index, weights), one(x, index, weights))
    assert not other(x, index, weights)[1].any()


@pytest.mark.parametrize("adapter", ["bfloat16", "float32"])
def test_16_bit_weights(adapter, calls):
    """PEFT rounds W + s B A to 16 bits; beside the weights the low-rank term keeps its own."""
    theirs, ours = pair(dtype=torch.bfloat16, implementation="eager")
    for module in wrappers(ours):
        module.lora_A.to(getattr(torch, adapter)), module.lora_B.to(getattr(torch, adapter))
    exact = copy.deepcopy(theirs).double()(input_ids=IDS).logits
    errors = [(model(input_ids=IDS).logits.double() - exact).square().mean() for model in (theirs, ours)]
    assert len(calls) == 2
    assert errors[1] <= 1.2**2 * errors[0]
