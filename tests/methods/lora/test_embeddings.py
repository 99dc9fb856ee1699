"""LoRA on token embeddings in training: attached and PEFT's accelerated, beside PEFT's own; tied, scaled, in 4 bits."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fastpeft
from tests.support import models
from tests.support.models import close
from tests.support.quantised_models import ids as token_ids
from tests.support.quantised_models import load

TARGETS = ["embed_tokens", "q_proj"]


def adapted(model, **settings):
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False, **settings)
    return get_peft_model(model, config).train()


def gradients(model, ids):
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def tied():
    return models.llama(tied=True)


@pytest.mark.parametrize("build", [models.llama, tied, models.gpt2])
def test_accelerated_and_attached_train_as_peft_does(build, tmp_path, monkeypatch):
    targets = ["wte", "c_attn"] if build is models.gpt2 else TARGETS
    monkeypatch.setitem(globals(), "TARGETS", targets)
    base = build().double()
    theirs, ids = adapted(copy.deepcopy(base)), torch.randint(50, (2, 9))
    logits, wanted = theirs(ids).logits.detach(), gradients(theirs, ids)
    assert any("lora_embedding_A" in name for name in wanted)
    theirs.save_pretrained(tmp_path)
    ours = fastpeft.accelerate(copy.deepcopy(theirs), strict=True)
    assert {row.status for row in fastpeft.report(ours).layers if row.kind == "LoRA layers"} == {"fused"}
    for _ in range(3):
        assert close(ours(ids).logits, logits)
        found = gradients(ours, ids)
        assert found.keys() == wanted.keys()
        assert all(close(found[name], wanted[name]) for name in wanted)
    assert {type(m) for m in fastpeft.restore(ours).modules()} == {type(m) for m in theirs.modules()}
    fastpeft.load(base, tmp_path, is_trainable=True)
    assert {row.status for row in fastpeft.report(base).layers if row.kind == "LoRA layers"} == {"fused"}
    assert close(base.train()(ids).logits, logits)
    assert all(close(a, b) for a, b in zip(gradients(base, ids).values(), wanted.values(), strict=True))


def test_other_calls_are_pefts():
    model, ids = adapted(models.llama()), torch.randint(50, (2, 9))
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    ours = fastpeft.accelerate(copy.deepcopy(model)).eval()
    model.eval()
    names = ["default", "other"]
    assert close(ours(ids, adapter_names=names).logits, model(ids, adapter_names=names).logits)
    for active in (["other"], names):
        for each in (model, ours):
            each.base_model.set_adapter(active)
        assert close(ours(ids).logits, model(ids).logits)
    with model.disable_adapter(), ours.disable_adapter():
        assert close(ours(ids).logits, model(ids).logits)
    for each in (model, ours):
        each.base_model.set_adapter(["default"])
        each.merge_adapter()
    assert close(ours(ids).logits, model(ids).logits)


class Scaled(nn.Embedding):
    """Gemma's, which multiplies its rows."""

    embed_scale = torch.tensor(3.0)

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


def test_a_scaled_embedding_is_called_and_scales_the_term():
    torch.manual_seed(0)
    base = nn.Sequential(Scaled(9, 8, padding_idx=2), nn.Linear(8, 8))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    ids = torch.tensor([[1, 2, 5]])
    wanted = model(ids)
    ours = fastpeft.accelerate(copy.deepcopy(model), strict=True)
    assert [row.status for row in fastpeft.report(ours)] == ["fused beside its base: base_layer is a Scaled"]
    torch.testing.assert_close(ours(ids), wanted)


def test_in_a_model_in_4_bits_the_head_stays_dense():
    model, ids = load("llama", "nf4"), token_ids()
    theirs = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    fastpeft.attach(model, fastpeft.Lora(r=4, targets=["embed_tokens", "q_proj"], init="random"))
    assert type(model.lm_head) is type(theirs.base_model.model.lm_head) is nn.Linear
    assert {row.status for row in fastpeft.report(model).layers if row.kind == "LoRA layers"} == {"fused"}
    found = gradients(model.train(), ids)
    da = next(g for name, g in found.items() if "embed_tokens" in name and name.endswith("lora_A"))
    absent = torch.ones(da.shape[1], dtype=torch.bool)
    absent[ids.unique()] = False
    assert (da[:, absent] == 0).all()
    assert da.any()


def test_merging_a_tied_embedding_is_refused_by_name():
    model = models.llama(tied=True)
    fastpeft.attach(model, fastpeft.Lora(r=4, targets=["embed_tokens"], init="random"))
    with pytest.raises(ValueError, match=r"merge: the weight of model.embed_tokens is also lm_head.weight"):
        fastpeft.merge(model)
