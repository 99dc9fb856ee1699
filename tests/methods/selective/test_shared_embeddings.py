"""Token rows where the table is shared by several embeddings, scaled, or has one module at two paths."""

import copy

import peft
import pytest
import torch
import transformers
from torch import nn

import fastpeft
from fastpeft import Selective
from tests.support.untouched import assert_untouched, snapshot

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "num_attention_heads": 4}
LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART = LAYERS | {"d_model": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "scale_embedding": True}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
GEMMA = SIZES | {"num_key_value_heads": 2, "head_dim": 8}

FAMILIES = {
    "T5ForConditionalGeneration": T5,
    "BartForConditionalGeneration": BART,
    "MBartForConditionalGeneration": BART,
    "M2M100ForConditionalGeneration": BART,
    "PegasusForConditionalGeneration": BART,
    "Gemma3ForCausalLM": GEMMA,
    "Gemma2ForCausalLM": GEMMA,
    "BertForMaskedLM": SIZES,
}
TOKENS = [5, 9]
CHANGE = torch.linspace(-1, 1, 64, dtype=torch.float64).square().view(2, 32)
IDS = torch.tensor([[5, 3, 9, 4, 5, 7], [8, 9, 9, 6, 12, 3]])


def built(name):
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    return kind(kind.config_class(vocab_size=64, **FAMILIES[name], **SPECIAL)).double().eval()


def loss(model):
    return model(input_ids=IDS, labels=IDS).loss


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, tmp_path):
    model, plain = built(name), built(name)
    before, at_start = snapshot(model), loss(model).item()
    fastpeft.attach(model, Selective(tokens=TOKENS))
    (trained,) = [p for p in model.parameters() if p.requires_grad]
    for each in (model, plain):
        loss(each).backward()
    whole = plain.get_input_embeddings().weight
    # The same sums of some hundred products, in another order.
    bound = 2**10 * torch.finfo(torch.float64).eps * whole.grad.abs().max()
    assert (trained.grad - whole.grad[TOKENS]).abs().max() <= bound
    with torch.no_grad():
        trained.add_(CHANGE)
        whole[TOKENS] += CHANGE
    assert abs(loss(model) - loss(plain)) <= 2**10 * torch.finfo(torch.float64).eps * abs(loss(plain))
    assert loss(model).item() != at_start
    fastpeft.save(model, tmp_path)
    fastpeft.detach(model)
    assert_untouched(model, before)
    assert loss(model).item() == at_start
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    fastpeft.load(model, tmp_path)
    for each in (model, theirs):
        assert abs(loss(each) - loss(plain)) <= 2**10 * torch.finfo(torch.float64).eps * abs(loss(plain))


def test_any_name_of_a_shared_table_means_it():
    model = built("T5ForConditionalGeneration")
    fastpeft.attach(model, Selective(tokens={"embed_tokens": TOKENS}))
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["shared.trained"]
    assert all(type(m.embed_tokens).__name__ == "TokenRows" for m in (model.encoder, model.decoder))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.inner = nn.Embedding(8, 4).double(), nn.Module()
        self.inner.embed = self.shared

    def forward(self, ids):
        return self.shared(ids) * self.inner.embed(ids + 1)


def test_one_module_at_two_paths():
    model, plain = Twice(), Twice()
    ids = torch.arange(6)
    fastpeft.attach(model, Selective(tokens={"shared": [1, 2]}))
    assert model.inner.embed is model.shared
    for each in (model, plain):
        each(ids).square().sum().backward()
    assert torch.equal(model.shared.trained.grad, plain.shared.weight.grad[[1, 2]])
    fastpeft.detach(model)
    assert model.inner.embed is model.shared
    assert type(model.shared) is nn.Embedding


class Noisy(nn.Embedding):
    embed_scale = 2.0

    def forward(self, ids):
        return super().forward(ids) + 1


def test_an_embedding_that_does_more_is_refused():
    model = nn.Sequential(Noisy(8, 4), nn.Linear(4, 4))
    before = snapshot(model)
    with pytest.raises(TypeError, match="tokens names 0, which is a Noisy, expected a plain nn.Embedding"):
        fastpeft.attach(model, Selective(tokens={"0": [1]}))
    tied = nn.Sequential(nn.Embedding(8, 4), Noisy(8, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(TypeError, match="1 is tied to 0, expected a plain nn.Linear or nn.Embedding"):
        fastpeft.attach(tied, Selective(tokens={"0": [1]}))
    assert_untouched(model, before)


def test_a_stack_of_one_block():
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES | {"num_hidden_layers": 1}, num_key_value_heads=2, vocab_size=64)
    )
    fastpeft.attach(model, Selective(layers="last:1"))
    assert {n.partition(".self")[0].partition(".mlp")[0] for n, p in model.named_parameters() if p.requires_grad} >= {
        "model.layers.0"
    }
    assert not model.model.embed_tokens.weight.requires_grad
    short = built("T5ForConditionalGeneration")
    with pytest.raises(ValueError, match="stacks of the same length: encoder.block, decoder.block; say which"):
        fastpeft.attach(short, Selective(layers="last:1"))
    wrapped = nn.ModuleDict(
        {"all": nn.ModuleList([nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in "ab")})])}
    )
    fastpeft.attach(wrapped, Selective(layers="all.0.layers.1"))  # a list of one that wraps is no stack
