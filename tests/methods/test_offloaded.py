"""Bases whose weights are elsewhere until they are called: adapters are made where layers compute, or it is refused."""

import copy

import pytest
import torch
import transformers
from accelerate import cpu_offload, disk_offload, dispatch_model, init_empty_weights
from torch import nn

import fastpeft
from fastpeft import Bottleneck, Lora, PrefixTuning, PromptTuning, Selective
from fastpeft.methods.checkpoint import adapter_state_dict
from tests.support.untouched import snapshot

IDS = torch.arange(3, 17).view(2, 7)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2))


def offloaded(tmp_path, how="cpu"):
    model = llama()
    if how == "cpu":
        return cpu_offload(model, torch.device("cpu"))
    if how == "disk":
        return disk_offload(model, str(tmp_path / "offload"), torch.device("cpu"))
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {"model.layers.1": "disk", "lm_head": "disk"}
    return dispatch_model(model, places, "cpu", offload_dir=str(tmp_path / "parts"), force_hooks=True)


CONFIGS = {
    "lora": Lora(r=2, init="random"),
    "lora on the embedding": Lora(r=2, init="random", targets=["embed_tokens", "q_proj"]),
    "bottleneck": Bottleneck(),
    "prompt": PromptTuning(length=3),
    "prefix": PrefixTuning(length=3),
    "together": [Lora(r=2, init="random"), Bottleneck()],
}


@pytest.mark.parametrize("how", ["cpu", "disk", "parts"])
@pytest.mark.parametrize("config", CONFIGS)
def test_adapters_are_where_layers_compute_and_train(config, how, tmp_path):
    model, plain = offloaded(tmp_path, how), llama()
    for each in (model, plain):
        torch.manual_seed(1)
        fastpeft.attach(each, CONFIGS[config])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert {p.device.type for p in trained.values()} == {"cpu"}
    for step in range(2):
        outputs = [each(input_ids=IDS, labels=IDS).loss for each in (model, plain)]
        torch.testing.assert_close(*outputs)
        for each, loss in zip((model, plain), outputs, strict=True):
            each.zero_grad()
            loss.backward()
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                torch.testing.assert_close(trained[name].grad, parameter.grad)
                with torch.no_grad():
                    for one in (trained[name], parameter):
                        one -= 0.1 * parameter.grad
        assert step or any(p.grad.abs().max() > 0 for p in trained.values())
    fastpeft.save(model, tmp_path / "saved")
    fastpeft.detach(model)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, llama()(IDS).logits)
    fastpeft.load(model, tmp_path / "saved")
    torch.testing.assert_close(model(input_ids=IDS, labels=IDS).loss, plain(input_ids=IDS, labels=IDS).loss)


OFFLOADED = "weight is offloaded: it has values only while its layer computes, expected them in memory"
REFUSED = {
    "weights trained in place": (Selective(params="norm"), ValueError, OFFLOADED),
    "rows": (Selective(rows={"q_proj": [0]}), TypeError, "one that has its forward overridden on the instance"),
    "tokens": (Selective(tokens=[3]), TypeError, "an Embedding with another forward on the instance"),
    "a copy": (Lora(r=2, targets=["q_proj"], modules_to_save=["lm_head"]), ValueError, OFFLOADED),
}


@pytest.mark.parametrize("config", REFUSED)
def test_what_would_train_on_the_meta_device_is_refused(config, tmp_path):
    model = offloaded(tmp_path)
    before = snapshot(model)[0]
    refused, error, message = REFUSED[config]
    with pytest.raises(error, match=f"attach: .*{message}"):
        fastpeft.attach(model, refused)
    assert snapshot(model)[0] == before
    assert not hasattr(model, "fastpeft_attachment")


def test_merge_of_offloaded_weights_is_refused(tmp_path):
    model = fastpeft.attach(offloaded(tmp_path), Lora(r=2))
    with pytest.raises(ValueError, match="merge: the weight of .*q_proj is offloaded or on the meta device"):
        fastpeft.merge(model)
    model(IDS)


def test_a_hook_that_brings_a_whole_block_is_refused():
    model = cpu_offload(llama(), torch.device("cpu"), preload_module_classes=["LlamaDecoderLayer"])
    with pytest.raises(
        ValueError, match=r"q_proj.weight is brought by a hook of model.layers.0, .*preload_module_class"
    ):
        fastpeft.attach(model, Lora(r=2))
    model(IDS)


def test_a_model_that_is_filled_in_part_is_refused():
    model = llama()
    model.model.layers[1].to("meta")
    for config in (Lora(r=2), Bottleneck(), Selective(layers="last:1")):
        with pytest.raises(ValueError, match="layers.1.*is on the meta device, without values, and others are not"):
            fastpeft.attach(model, config)
    fastpeft.attach(model, Lora(r=2, layers=[0], targets=["q_proj"]))  # what is meant has values


def test_load_into_an_empty_model(tmp_path):
    model = fastpeft.attach(llama(), Lora(r=2, init="random", modules_to_save=["lm_head"]))
    fastpeft.save(model, tmp_path)
    with init_empty_weights():
        empty = transformers.LlamaForCausalLM(model.config)
    with pytest.raises(ValueError, match="is on the meta device, without values to start from"):
        fastpeft.attach(empty, Selective(params="norm"))
    fastpeft.load(empty, tmp_path)
    state = adapter_state_dict(empty)
    assert all(torch.equal(state[key], value) for key, value in adapter_state_dict(model).items())
    empty.load_state_dict(model.state_dict(), strict=False, assign=True)
    torch.testing.assert_close(empty(IDS).logits, model(IDS).logits)


def test_an_empty_model_is_adapted_before_it_is_filled():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    fastpeft.attach(model, Lora(r=2, targets=["0"]))
    model.to_empty(device="cpu")
    model[0].adapters["default"].reset_parameters()
    assert not copy.deepcopy(model)[0].adapters["default"].lora_B.any()
