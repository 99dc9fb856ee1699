"""A prefix for each row, several that follow one another, and generation."""

import pytest
import torch

import fastpeft
from fastpeft import PrefixTuning, attach
from tests.support.models import bert_tokens, gpt2, llama, prompts, roberta
from tests.support.prefixed import FAMILIES, copy_weights, each_causal, in_peft, padded, with_prefixes

peft = pytest.importorskip("peft", reason="PEFT is not installed")


@each_causal
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}], ids=str)
def test_generate(family, how):
    """As PEFT does; and by row, padded on the left, as every row does alone."""
    model, ids = FAMILIES[family](), prompts(3)
    theirs = in_peft(model, family)
    with_prefixes(model, a=4, b=9)
    copy_weights(theirs, model.fastpeft_prefix.adapters["a"])
    mask, how = torch.ones_like(ids), {"max_new_tokens": 6, "do_sample": False, **how}
    if how.get("use_cache", True):
        wanted = theirs.generate(input_ids=ids, attention_mask=mask, **how)
        assert torch.equal(model.generate(ids, attention_mask=mask, **how), wanted)
    mask[0, :3] = 0
    rows = ["b", None, "a"]
    with fastpeft.per_row(model, rows):
        together = model.generate(ids, attention_mask=mask, **how)
    for i, name in enumerate(rows):
        row = ids[i : i + 1, 7 - int(mask[i].sum()) :]
        with fastpeft.per_row(model, [name]):
            alone = model.generate(row, **how)
        assert torch.equal(together[i, 7:], alone[0, row.shape[1] :])


@pytest.mark.parametrize("make", [llama, gpt2, bert_tokens, roberta])
def test_rows_equal_separate_runs(make):
    """Outputs, and each prefix's gradient the sum of those of its rows."""
    model, (ids, mask) = with_prefixes(make(), a=3, b=5), padded(4)
    fastpeft.set_adapter(model, ["a", "b"])
    if make is roberta:
        ids[0, 5:] = model.config.pad_token_id
    rows = ["b", None, "a", "b"]
    out = model(ids, attention_mask=mask, adapter_names=rows).logits
    torch.manual_seed(3)
    grad = torch.randn_like(out) * mask[..., None]
    out.backward(grad)
    together = [p.grad.clone() for p in model.fastpeft_prefix.parameters()]
    model.zero_grad()
    for i, name in enumerate(rows):
        count = int(mask[i].sum())
        with fastpeft.per_row(model, [name]):
            alone = model(ids[i : i + 1, :count]).logits
        torch.testing.assert_close(out[i, :count], alone[0], rtol=1e-4, atol=1e-5)
        if name is not None:
            alone.backward(grad[i : i + 1, :count])
    for one, p in zip(together, model.fastpeft_prefix.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad, rtol=1e-4, atol=1e-4)


@each_causal
def test_starts_as_a_text_in_front(family):
    """Also beside a prefix that is there already, which must not get into the text's keys and values."""
    model, ids, text = FAMILIES[family](), prompts(3), [5, 9, 2, 7]
    wanted = model(torch.cat([torch.tensor([text]).expand(3, -1), ids], 1)).logits[:, 4:]
    attach(model, PrefixTuning(length=2), name="other")
    attach(model, PrefixTuning(length=4, init="text", text=text), name="a")
    fastpeft.set_adapter(model, "a")
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-5)
    with fastpeft.per_row(model, ["a", "a", None]):
        torch.testing.assert_close(model(ids).logits[:2], wanted[:2], rtol=1e-4, atol=1e-5)


def test_several_active_prefixes_follow_one_another():
    model, ids = with_prefixes(llama(), a=3, b=2), prompts(2)
    other = with_prefixes(llama(), c=5)
    fastpeft.set_adapter(model, ["b", "a"])
    adapters = model.fastpeft_prefix.adapters
    with torch.no_grad():
        joined = torch.cat([adapters["b"].embedding, adapters["a"].embedding])
        other.fastpeft_prefix.adapters["c"].embedding.copy_(joined)
    torch.testing.assert_close(model(ids).logits, other(ids).logits)


def test_beside_prompts_by_row():
    """Names of one method's adapters are no error to the other."""
    model, ids = llama(), prompts(3)
    attach(model, fastpeft.PromptTuning(length=2), name="prompt")
    with_prefixes(model, prefix=3)
    rows = ["prompt", "prefix", None]
    with fastpeft.per_row(model, rows):
        inside = model(ids).logits
    for out in (inside, model(ids, adapter_names=rows).logits):
        for i, name in enumerate(rows):
            alone = model(ids[i : i + 1], adapter_names=[name]).logits
            torch.testing.assert_close(out[i, -alone.shape[1] :], alone[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="adapter_names holds 'lora', expected None or one of 'prompt', 'prefix'"):
        model(ids, adapter_names=["prompt", "lora", None])
