"""Where prefixes come in, what a window makes of them, and the models that they are refused for."""

import copy

import pytest
import torch

import fastpeft
from fastpeft import PrefixTuning, attach
from tests.support.decoder_checks import attached, in_peft
from tests.support.decoders import build as decoder
from tests.support.models import build, close, llama, prompts, qwen2_vl, transformers
from tests.support.prefixed import FAMILIES, each_family, with_prefixes

SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@each_family
def test_every_way_in_sees_the_prefix(family):
    model, ids = with_prefixes(FAMILIES[family](), a=3), prompts(2)
    assert torch.equal(model.forward(ids)[0], model(ids)[0])
    plain = FAMILIES[family]()
    if model.base_model is not model:
        hidden = model.base_model.forward(ids).last_hidden_state
        assert torch.equal(model.get_output_embeddings()(hidden), model(ids).logits)
        assert not close(hidden, plain.base_model(ids).last_hidden_state)
    with fastpeft.disable_adapter(model):
        assert torch.equal(model.base_model(ids)[0], plain.base_model(ids)[0])


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3_text", "gpt_oss", "cohere2"])
def test_in_a_window(family):
    """PEFT's meaning: a prefix moves out of sight. Logits of every position, and gradients."""
    model = decoder(family)
    ours, ids = attached(model, "prefix"), prompts(2, 12)
    theirs = in_peft(model, "prefix", ours)
    outs = ours(ids).logits, theirs(input_ids=ids).logits
    assert close(*outs)
    torch.manual_seed(3)
    grad = torch.randn_like(outs[0])
    outs[0].backward(grad), outs[1].backward(grad)
    one, two = ours.fastpeft_prefix.adapters["default"].embedding, theirs.prompt_encoder["default"].embedding.weight
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5 * two.grad.abs().max().item())
    with fastpeft.disable_adapter(ours):
        assert torch.equal(ours(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["mistral", "gpt_oss"])
def test_rows_in_a_window(family):
    """Padded on the left, with prefixes of different lengths, each row has what it has alone."""
    model, ids = with_prefixes(decoder(family), a=3, b=6), prompts(3, 12)
    mask, rows = torch.ones_like(ids), ["b", None, "a"]
    mask[0, :5] = 0
    together = model(ids, attention_mask=mask, adapter_names=rows).logits
    for i, name in enumerate(rows):
        row = ids[i : i + 1, int((mask[i] == 0).sum()) :]
        alone = model(row, adapter_names=[name]).logits[0]
        assert close(together[i, -len(alone) :], alone)


def test_positions_of_three_rows():
    """Qwen2-VL's, beside an image: a prefix of a text's keys and values is that text in front."""
    model, given = qwen2_vl()
    text = torch.tensor([[11, 12, 13]])
    front = {
        **given,
        "input_ids": torch.cat([text, given["input_ids"]], 1),
        "mm_token_type_ids": torch.cat([torch.zeros_like(text), given["mm_token_type_ids"]], 1),
        "attention_mask": torch.ones(1, 3 + given["input_ids"].shape[1], dtype=torch.int64),
    }
    wanted = copy.deepcopy(model)(**front).logits[:, 3:]
    attach(model, PrefixTuning(length=3, init="text", text=text[0].tolist()))
    assert close(model(**given).logits, wanted)


def test_offloaded_models():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model, ids = llama(), prompts(2)
    accelerate.cpu_offload(model, torch.device("cpu"))
    attach(model, PrefixTuning(length=2))
    model(ids, labels=ids).loss.backward()
    embedding = model.fastpeft_prefix.adapters["default"].embedding
    assert embedding.device.type == embedding.grad.device.type == "cpu"


ENCODERS = {
    "Albert": ("past_key_values", {"embedding_size": 32, "intermediate_size": 48}),
    "DistilBert": ("past_key_values", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "Deberta": ("past_key_values|keyword arguments|attention functions", {"intermediate_size": 48}),
    "ModernBert": ("past_key_values", {"intermediate_size": 48, "pad_token_id": 0, "global_attn_every_n_layers": 1}),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_without_a_cache(kind):
    """A prefix is what a cache holds before the first token."""
    reason, settings = ENCODERS[kind]
    sizes = {name: value for name, value in SMALL.items() if kind != "DistilBert" or name == "vocab_size"}
    config = getattr(transformers, f"{kind}Config")(**sizes, **settings)
    model = getattr(transformers, f"{kind}Model")(config)
    with pytest.raises(TypeError, match=f"attach: PrefixTuning does not serve {kind}.*({reason})"):
        attach(model, PrefixTuning(length=2))
    assert "forward" not in vars(model)


@pytest.mark.parametrize("make", ["vit", "clip"])
def test_models_without_tokens(make):
    if make == "vit":
        model = build("vit")
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        config = transformers.CLIPConfig(
            text_config={**sizes, "vocab_size": 96}, vision_config={**sizes, "image_size": 8, "patch_size": 4}
        )
        model = transformers.CLIPModel(config)
    with pytest.raises(TypeError, match="PrefixTuning"):
        attach(model, PrefixTuning(length=2))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("deepseek_v3", "latent vector"),
        ("llama4_text", "chunked_attention"),
        ("gemma4_text", "differ in their heads"),
        ("mimo_v2_flash", "layer 1 has heads of another number"),
        ("diffllama", "goes on to change keys"),
        ("stablelm", "StableLmDecoderLayer does not hand keyword arguments on"),
        ("nemotron", "does not hand keyword arguments on"),
        ("bamba", "layers 0 of 2 do not attend"),
        ("mamba", "past_key_values"),
    ],
)
def test_refused_by_name(family, reason):
    model = decoder(family)
    before = model.config.to_dict()
    with pytest.raises(TypeError, match=f"attach: PrefixTuning does not serve {type(model).__name__}: .*{reason}"):
        attach(model, PrefixTuning(length=3))
    assert "forward" not in vars(model)
    assert model.config.to_dict() == before
