"""What prompt tuning refuses, leaving the model as it was."""

import pytest
import torch

import fastpeft
from fastpeft import PromptTuning, attach
from tests.support.models import VOCAB, llama, prompts
from tests.support.prompted import with_prompts

peft = pytest.importorskip("peft", reason="PEFT is not installed")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "PromptTuning: length is 0"),
        ({"init": "zero"}, "PromptTuning: init is 'zero', expected one of random, vocabulary, text"),
        ({"init": "text"}, "PromptTuning: text is None, expected token ids"),
        ({"text": [1]}, "PromptTuning: text is .*, expected None without init='text'"),
        ({"init": "text", "text": "hello"}, "PromptTuning: text is 'hello' .str., expected integers"),
        ({"init": "text", "text": []}, "PromptTuning: text is empty"),
        ({"dtype": torch.int64}, "PromptTuning: dtype is torch.int64"),
        ({"dtype": "float32"}, "PromptTuning: dtype is 'float32' .str., expected a floating-point torch.dtype or None"),
        ({"padding_side": "top"}, "PromptTuning: padding_side is 'top'"),
    ],
)
def test_bad_configs(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        PromptTuning(**settings)


def test_bad_calls_change_nothing():
    model = llama()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="text holds a token outside of the vocabulary"):
        attach(model, PromptTuning(init="text", text=[VOCAB]))
    with pytest.raises(TypeError, match="Linear does not take inputs_embeds"):
        attach(torch.nn.Linear(2, 2), PromptTuning())
    assert list(model.state_dict()) == keys
    with_prompts(model, a=3)
    ids = prompts(2)
    for names, message in (
        (["a", "b"], "PromptTuning: adapter_names holds 'b', expected None or one of 'a'"),
        (["a", "a", "a"], "adapter_names has 3 items, expected one for each of 2 rows"),
        ("a", "adapter_names is 'a' .str., expected a name or None for each row"),
        ([], "adapter_names has 0 items"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            model(ids, adapter_names=names)
    with pytest.raises(ValueError, match="per_row: adapter_names holds 'b', expected None or one of 'a'"):
        fastpeft.per_row(model, ["b"]).__enter__()
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 1, 7, 7\], expected \[B, T\]"):
        model(ids, attention_mask=torch.ones(2, 1, 7, 7))
    with pytest.raises(ValueError, match="padding_side is 'left', expected None as the prompts before it"):
        attach(model, PromptTuning(padding_side="left"), name="b")
    assert model.fastpeft_prompt.names == ("a",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules=2, expected 1"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* which is not served"),
        ({"num_virtual_tokens": 3}, r"prompt_embeddings is \[4, 32\], the config says 3 virtual"),
    ],
)
def test_checkpoints_that_cannot_be_read(change, message, tmp_path):
    import json

    fastpeft.save(with_prompts(llama(), a=4), tmp_path, "a")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = llama()
    with pytest.raises(ValueError, match=message):
        fastpeft.load(model, tmp_path)
    assert not hasattr(model, "fastpeft_prompt")
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"adapter_model.bin, which would be unpickled|num_virtual|not served|submodules"
    ):
        fastpeft.load(model, tmp_path)
