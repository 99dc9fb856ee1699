"""``resize_token_embeddings`` while adapters are attached: done, or refused before anything is changed."""

import copy
import pickle

import pytest
import torch
import transformers

import fastpeft
from fastpeft import Lora, PromptTuning, Selective
from tests.support.untouched import assert_untouched, snapshot

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}
IN_THE_WAY = {
    "token rows": Selective(tokens=[3]),
    "LoRA on the head": Lora(r=2, targets=["lm_head"]),
    "LoRA on the embedding": Lora(r=2, targets=["embed_tokens"]),
    "a copy": Lora(r=2, targets=["q_proj"], modules_to_save=["embed_tokens"]),
}
ELSEWHERE = {
    "LoRA": Lora(r=2, targets=["q_proj"]),
    "a prompt": PromptTuning(length=2),
    "norms": Selective(params="norm"),
}


def llama(tie):
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tie))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("config", IN_THE_WAY)
def test_adapters_in_the_way_are_named(config, tie):
    model = llama(tie)
    before = snapshot(model)
    fastpeft.attach(model, IN_THE_WAY[config])
    attached = snapshot(model)
    for each in (model, model.model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        if each is model.model and config == "LoRA on the head":
            continue  # which is not the backbone's
        with pytest.raises(ValueError, match=r"resize_token_embeddings: .*has an adapter \(.* expected a"):
            each.resize_token_embeddings(70)
    assert_untouched(model, attached)
    fastpeft.detach(model)
    assert_untouched(model, before)
    assert model.resize_token_embeddings(70).weight.shape == (70, 32)


@pytest.mark.parametrize("config", ELSEWHERE)
def test_others_do_not_mind(config):
    model = fastpeft.attach(llama(False), ELSEWHERE[config])
    model.resize_token_embeddings(70)
    assert model(torch.tensor([[68, 3]])).logits.shape[-1] == 70
    with fastpeft.disable_adapter(model):
        model(torch.tensor([[68]]))
    fastpeft.detach(model)
    assert model(torch.tensor([[68]])).logits.shape == (1, 1, 70)
    assert not any("resize_token_embeddings" in module.__dict__ for module in model.modules())
