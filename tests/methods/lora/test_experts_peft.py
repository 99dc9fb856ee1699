"""attach on experts beside PEFT's target_parameters: the same numbers on every family, and one checkpoint for both."""

import copy
import json

import pytest
import torch

import fastpeft
from fastpeft import Lora
from fastpeft.methods.formats.conversion import convert
from fastpeft.methods.formats.inspection import inspect_checkpoints
from tests.support.expert_models import IDS, close, curve_of, gradients_of, loss_of, parameters_of
from tests.support.models import MOE_FAMILIES, build

peft = pytest.importorskip("peft", reason="PEFT is not installed")
if not hasattr(peft.tuners.lora.layer, "ParamWrapper"):
    pytest.skip("PEFT before 0.17 has no LoRA on parameters", allow_module_level=True)

# PEFT takes gate_proj, up_proj and down_proj of shared experts for those of experts, so they are not among the targets.
SETTINGS = {"r": 3, "alpha": 5, "init": "random", "targets": ["q_proj", "o_proj"], "alpha_pattern": {"down_proj": 7}}


def ours(family, **settings):
    torch.manual_seed(1)
    return fastpeft.attach(build(family), Lora(**{**SETTINGS, "experts": parameters_of(family), **settings}))


def pair(family, folder, **settings):
    """An attached model, and PEFT's of its checkpoint."""
    model = ours(family, **settings)
    fastpeft.save(model, folder)
    return model, peft.PeftModel.from_pretrained(build(family), folder, is_trainable=True)


@pytest.fixture(scope="module", params=MOE_FAMILIES)
def both(request, tmp_path_factory):
    """The family, its checkpoint, and the two models, which tests leave as they are."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, folder, *pair(request.param, folder)


def test_outputs_and_gradients_of_every_family(both):
    _, _, model, theirs = both
    assert all(row.fused for row in fastpeft.report(model)), fastpeft.report(model)
    assert close(model(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    loss_of(model).backward(), loss_of(theirs).backward()
    found = gradients_of(model)
    wanted = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys()
    assert any(".experts.base_layer." in key for key in found)
    for key, grad in wanted.items():
        assert close(found[key], grad), key


def test_checkpoints_of_every_family_both_ways(both, tmp_path):
    family, folder, model, theirs = both
    theirs.save_pretrained(tmp_path)
    for written in (folder, tmp_path):
        loaded = fastpeft.load(build(family), written)
        found, wanted = fastpeft.methods.adapter_state_dict(loaded), fastpeft.methods.adapter_state_dict(model)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
        assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_ten_steps_of_every_family(both):
    curves = [curve_of(copy.deepcopy(model).train()) for model in both[2:]]
    assert curves[1][-1] < curves[1][0]
    # Adam divides by the gradient's size: rounding moves a step by its own share of eps, ten times.
    torch.testing.assert_close(*curves, rtol=1e-4, atol=1e-4)


def test_the_expert_is_the_fast_index_of_b(tmp_path):
    """Expert 2 alone has a B that is not zero, in PEFT's own layer: only its tokens change in ours."""
    config = peft.LoraConfig(
        r=3, target_modules=[], target_parameters=parameters_of("qwen3_moe"), init_lora_weights=False
    )
    theirs = peft.get_peft_model(build("qwen3_moe"), config)
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data.view(len(parameter), -1, 6)[..., [0, 1, 3, 4, 5]] = 0
    theirs.save_pretrained(tmp_path)
    model = fastpeft.load(build("qwen3_moe"), tmp_path)
    layer, x, weights = model.model.layers[0].mlp.experts, torch.randn(6, 32), torch.ones(6, 1)
    for expert in range(6):
        index = torch.full((6, 1), expert)
        changed = not torch.equal(layer(x, index, weights), layer.base_layer(x, index, weights))
        assert changed == (expert == 2)


def test_biases_and_the_router(tmp_path):
    """Parameters of two dimensions: PEFT's term is one matrix for all experts."""
    names = [*parameters_of("gpt_oss"), "experts.gate_up_proj_bias", "experts.down_proj_bias", "mlp.router.weight"]
    model, theirs = pair("gpt_oss", tmp_path, experts=names, dropout=0.0)
    assert close(model(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    loss_of(model).backward(), loss_of(theirs).backward()
    found = gradients_of(model)
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            assert close(found[name.replace(".default", "")], parameter.grad), name
    rows = {row.path.rpartition(".")[2]: row for row in fastpeft.report(model)}
    assert rows["experts"].fused
    assert "W + scale · B A is made at every call" in rows["router"].status
    fastpeft.merge(model)
    assert close(model(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_pefts_names_of_a_models_experts(family, tmp_path):
    assert fastpeft.expert_parameters(build(family)) == sorted(parameters_of(family))
    model = ours(
        family, experts=True, targets=[name.rpartition(".")[2] for name in parameters_of(family)][1:] + ["q_proj"]
    )
    fastpeft.save(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["target_parameters"] == ["experts.down_proj"]


def test_layers_by_number_are_written_as_paths(tmp_path):
    model = ours("qwen3_moe", experts=True, targets=["q_proj", "experts"], layers=[1])
    fastpeft.save(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    paths = ["model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"]
    assert fields["target_parameters"] == paths
    theirs = peft.PeftModel.from_pretrained(build("qwen3_moe"), tmp_path)
    assert close(model(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_dropout_is_not_written(tmp_path):
    """PEFT refuses it beside parameters; what is trained on may have it."""
    model, theirs = pair("mixtral", tmp_path, dropout=0.25)
    assert all(
        layer.adapters["default"]["down_proj"].dropout == 0.25 for layer in model.modules() if hasattr(layer, "adapted")
    )
    assert theirs.peft_config["default"].lora_dropout == 0


def test_a_config_of_pefts():
    settings = {"r": 3, "target_modules": ["q_proj"], "target_parameters": parameters_of("olmoe")}
    model = fastpeft.attach(build("olmoe"), peft.LoraConfig(**settings))
    rows = fastpeft.report(model)
    assert rows.fused == len(rows) == 4
    model = fastpeft.attach(build("olmoe"), peft.LoraConfig(**{**settings, "target_modules": None}))
    assert len(fastpeft.report(model)) == 2


def test_a_checkpoint_without_target_parameters_leaves_experts(tmp_path):
    peft.get_peft_model(build("gpt_oss"), peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path)
    rows = fastpeft.report(fastpeft.load(build("gpt_oss"), tmp_path))
    assert [row.kind for row in rows] == ["LoRA layers"] * 2 + ["experts"] * 2


def test_inspect_and_convert(tmp_path):
    from safetensors.torch import load_file

    model, source = ours("qwen3_moe"), tmp_path / "adapter"
    fastpeft.save(model, source)
    (found,) = inspect_checkpoints(source)
    assert not found.problems
    assert found.method.endswith(", on parameters experts.down_proj, experts.gate_up_proj")
    assert found.served.endswith("lora_linear and multi_lora, and experts")
    path = source / "adapter_model.safetensors"
    torch.save(load_file(path), source / "adapter_model.bin")
    path.unlink()
    convert(source, tmp_path / "whole", "peft")
    loaded = fastpeft.load(build("qwen3_moe"), tmp_path / "whole")
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    with pytest.raises(ValueError, match="AdapterHub's LoRA has no form for"):
        convert(tmp_path / "whole", tmp_path / "hub", "adapters")


BROKEN = {
    "A of another rank": (
        "lora_A",
        lambda t: t[:-1],
        "lora_A .17, 32. of .*experts.* is not of rank 3 for each expert",
    ),
    "B of another rank": ("lora_B", lambda t: t[:, :-1], "lora_B .* is not of rank 3 for each expert"),
    "fewer experts": ("lora_", lambda t: t[:-3] if t.shape[0] == 18 else t[:, :-3], "checkpoint for another model"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_checkpoints(what, tmp_path):
    from safetensors.torch import load_file, save_file

    half, change, message = BROKEN[what]
    fastpeft.save(ours("qwen3_moe"), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(
        {k: change(t).contiguous() if half in k and "experts.base_layer" in k else t for k, t in tensors.items()}, path
    )
    model = build("qwen3_moe")
    with pytest.raises(ValueError, match=message):
        fastpeft.load(model, tmp_path)
    assert not hasattr(model, "fastpeft_attachment")
