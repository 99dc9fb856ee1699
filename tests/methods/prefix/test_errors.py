"""What prefix tuning refuses, leaving the model as it was."""

import json

import pytest
import torch

import fastpeft
from fastpeft import PrefixTuning, attach
from tests.support.models import llama, prompts, t5
from tests.support.prefixed import bert_encoder, with_prefixes

peft = pytest.importorskip("peft", reason="PEFT is not installed")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "PrefixTuning: length is 0"),
        ({"projection": 0}, "PrefixTuning: projection is 0"),
        ({"init": "vocabulary"}, "PrefixTuning: init is 'vocabulary', expected one of random, zero, text"),
        ({"init": "text"}, "PrefixTuning: text is None, expected token ids"),
        ({"text": [1]}, "PrefixTuning: text is .*, expected None without init='text'"),
        ({"init": "text", "text": "hello"}, "PrefixTuning: text is 'hello' .str., expected integers"),
        ({"init": "text", "text": [1]}, "PrefixTuning: text has 1 tokens, expected length=20"),
        ({"init": "text", "text": [1], "length": 1, "projection": 4}, "init='text' with a projection"),
        ({"dtype": torch.int64}, "PrefixTuning: dtype is torch.int64"),
        ({"dtype": "float32"}, "PrefixTuning: dtype is 'float32' .str., expected a floating-point torch.dtype or None"),
    ],
)
def test_bad_configs(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        PrefixTuning(**settings)


def test_bad_calls_change_nothing(tmp_path):
    with pytest.raises(TypeError, match="expected for PrefixTuning a transformers model .*, not Linear"):
        attach(torch.nn.Linear(2, 2), PrefixTuning())
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder"):
        attach(t5(), PrefixTuning())
    with pytest.raises(ValueError, match="init='text' on BertModel, expected a model that generates"):
        attach(bert_encoder(), PrefixTuning(length=1, init="text", text=[3]))
    model = llama()
    with pytest.raises(ValueError, match="text holds a token outside of the vocabulary of 96"):
        attach(model, PrefixTuning(length=1, init="text", text=[96]))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention is 'flash_attention_2', expected 'sdpa' or 'eager'"):
        attach(model, PrefixTuning())
    model.config._attn_implementation = "sdpa"
    assert not hasattr(model, "fastpeft_prefix")
    fastpeft.save(with_prefixes(llama(), a=4), tmp_path, "a")
    path = tmp_path / "adapter_config.json"
    good = json.loads(path.read_text())
    for change, message in (
        ({"num_virtual_tokens": 3}, r"prompt_embeddings is \[4, 64\], the config says 3 virtual"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules=2, expected 1"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            fastpeft.load(model, tmp_path)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model, "fastpeft_prefix")


def test_a_model_that_does_not_hand_its_arguments_on():
    """An error, not a prefix that nobody attends to."""
    model, ids = with_prefixes(llama(), a=3), prompts(2)
    inner = model.model.forward
    model.model.forward = lambda *args, fastpeft_prefix=None, **kwargs: inner(*args, **kwargs)
    with pytest.raises(RuntimeError, match=r"layers \[0, 1\] of LlamaForCausalLM did not attend to their prefix"):
        model(ids)
