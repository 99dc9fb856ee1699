"""Adapters under reentrant gradient checkpoints, where transformers lets no gradient enter by itself."""

import copy

import pytest
import torch
import transformers

import fastpeft
from fastpeft import Bottleneck, Lora, Selective
from tests.support.untouched import assert_untouched, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.:FutureWarning")

TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
IMAGE = TEXT | {"image_size": 16, "patch_size": 8}
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 16, "patch_size": 2, "window_size": 2}
WHISPER = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
WHISPER |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 64, "num_mel_bins": 8}
WHISPER |= {"max_source_positions": 10, "max_target_positions": 20, "pad_token_id": 0, "bos_token_id": 1}
WHISPER |= {"eos_token_id": 2, "decoder_start_token_id": 1, "dropout": 0.0}

IDS = torch.arange(3, 17).view(2, 7)
PIXELS = {
    "pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16),
    "labels": torch.tensor([0, 1]),
}
SOUND = {"input_features": torch.linspace(-1, 1, 320).cos().view(2, 8, 20), "labels": IDS}
FAMILIES = {
    "ViTForImageClassification": (IMAGE, PIXELS),
    "SwinForImageClassification": (SWIN, PIXELS),
    "WhisperForConditionalGeneration": (WHISPER, SOUND),
    "LlamaForCausalLM": (TEXT | {"num_key_value_heads": 2, "vocab_size": 64}, {"input_ids": IDS, "labels": IDS}),
}


def built(name):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(**FAMILIES[name][0])).train()


def gradients(model, name):
    model.zero_grad()
    torch.manual_seed(2)
    model(**FAMILIES[name][1]).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_get_the_gradients_without_checkpoints(name):
    model = built(name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    functions = [module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()]
    before = snapshot(model)
    fastpeft.attach(model, Lora(r=2, init="random"))
    plain = built(name)
    fastpeft.attach(plain, Lora(r=2, init="random"))
    plain.load_state_dict(model.state_dict())
    for each in (model, copy.deepcopy(model)):
        found, expected = gradients(each, name), gradients(plain, name)
        for key, gradient in expected.items():
            torch.testing.assert_close(found[key], gradient)
    fastpeft.detach(model)
    assert_untouched(model, before)
    assert [module.__dict__.get("_gradient_checkpointing_func") for module in model.modules()] == functions


def test_checkpoints_turned_on_afterwards_and_other_methods():
    model = built("ViTForImageClassification")
    fastpeft.attach(model, [Lora(r=2, init="random"), Bottleneck()])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    for _ in range(3):  # nothing is wrapped twice
        assert all(grad is not None for grad in gradients(model, "ViTForImageClassification").values())
    fastpeft.attach(model, Selective(params="norm"), "norms")
    fastpeft.set_adapter(model, ["default", "norms"])
    for _ in range(3):
        assert all(grad is not None for grad in gradients(model, "ViTForImageClassification").values())
    functions = {m.__dict__.get("_gradient_checkpointing_func") for m in model.modules()} - {None}
    assert all(not hasattr(function.function, "function") for function in functions)
    model.gradient_checkpointing_disable()
    fastpeft.detach(model)


def test_nothing_enters_where_nothing_trains():
    model = built("ViTForImageClassification")
    fastpeft.attach(model, Lora(r=2, init="random", targets=[r"layers.1.attention.q_proj"]))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    layers = model.vit.layers
    asked = []
    for layer in layers:
        layer.register_forward_hook(lambda module, args, y: asked.append(y.requires_grad) or None)
    assert all(grad is not None for grad in gradients(model, "ViTForImageClassification").values())
    assert asked[:2] == [False, True]
