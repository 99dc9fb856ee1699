"""A prompt for each row: in training, in generate, with a cache, on other heads."""

import pytest
import torch

import fastpeft
from tests.support.models import bert, bert_tokens, llama_classifier, prompts, roberta, t5
from tests.support.prompted import CAUSAL, each_causal, padded, rows_alone, with_prompts

peft = pytest.importorskip("peft", reason="PEFT is not installed")


@each_causal
@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_equal_separate_runs(family, side):
    """Outputs, and each prompt's gradient the sum of those of its rows."""
    model, (ids, mask, labels) = with_prompts(CAUSAL[family](), a=3, b=9), padded(4)
    rows = ["b", None, "a", "b"]
    fastpeft.set_adapter(model, ["a", "b"])
    config = model.fastpeft_prompt
    config.padding_side = side
    out = model(ids, attention_mask=mask, labels=labels, adapter_names=rows)
    out.loss.backward()
    together = {name: p.grad.clone() for name, p in config.prompts.items()}
    for p in config.prompts.values():
        p.grad = None
    losses = []
    for i, span, row, on in rows_alone(model, ids, mask, rows):
        alone = model(row, attention_mask=on)
        length = alone.logits.shape[1]
        mine = out.logits[i, -length:] if side == "left" else out.logits[i, :length]
        torch.testing.assert_close(mine, alone.logits[0], rtol=1e-4, atol=1e-5)
        wanted = torch.full((length,), -100)
        wanted[length - row.shape[1] :] = labels[i, span]
        losses.append(torch.nn.functional.cross_entropy(alone.logits[0, :-1], wanted[1:], reduction="sum"))
    loss = sum(losses) / counted_labels(labels, mask, rows)
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
    loss.backward()
    for name, p in config.prompts.items():
        torch.testing.assert_close(together[name], p.grad, rtol=1e-4, atol=1e-6)


def counted_labels(labels, mask, rows):
    """Targets that a shifted loss sees: a row's first token too where a prompt stands before it."""
    count = 0
    for i, name in enumerate(rows):
        on = mask[i].nonzero()[:, 0]
        span = labels[i, int(on[0]) : int(on[-1]) + 1]
        count += int((span[(0 if name else 1) :] != -100).sum())
    return count


@each_causal
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}], ids=str
)
def test_generate_by_row(family, how):
    """Prompts of different lengths, padded on the left: what every row generates alone."""
    model, ids = with_prompts(CAUSAL[family](), a=3, b=9), prompts(3)
    mask, rows = torch.ones_like(ids), ["b", None, "a"]
    mask[0, :3] = 0
    how = {"max_new_tokens": 6, "do_sample": False, **how}
    times = how.get("num_return_sequences", 1)
    with fastpeft.per_row(model, rows):
        together = model.generate(ids, attention_mask=mask, **how)
        if how.get("use_cache", True):  # nor does the cache change anything
            assert torch.equal(model.generate(ids, attention_mask=mask, **how, use_cache=False), together)
    for i, _, row, on in rows_alone(model, ids, mask, rows):
        alone = model.generate(row, attention_mask=on, **how)
        assert torch.equal(together[i * times : (i + 1) * times, 7:], alone[:, row.shape[1] :])


@each_causal
def test_a_cache_that_goes_on(family):
    """By hand, also in chunks, padded on the right, and without a mask."""
    model, (ids, _, _) = with_prompts(CAUSAL[family](), a=3, b=5), padded(2)
    rows = ["a", "b"]
    more = torch.tensor([[5, 6], [7, 8]])
    for mask in (None, torch.tensor([[1] * 5 + [0] * 2, [1] * 7])):
        wide = None if mask is None else torch.cat([mask, torch.ones_like(more)], 1)
        with torch.no_grad():
            first = model(ids, attention_mask=mask, adapter_names=rows, use_cache=True)
            for i in range(2):
                on = None if wide is None else wide[:, : 7 + i + 1]
                step = model(more[:, i : i + 1], attention_mask=on, past_key_values=first.past_key_values)
            for b in range(2):
                count = 7 if mask is None else int(mask[b].sum())
                row = torch.cat([ids[b : b + 1, :count], more[b : b + 1]], 1)
                alone = model(row, adapter_names=[rows[b]])
                torch.testing.assert_close(step.logits[b, -1], alone.logits[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [bert, bert_tokens, roberta, llama_classifier])
def test_other_heads_by_row(make):
    """Labels for each token, for each row; positions that only the model can number; decoders that read the end."""
    model, ids = with_prompts(make(), a=3, b=6), prompts(3)
    mask, rows = torch.ones_like(ids), ["a", None, "b"]
    mask[0, 5:] = 0
    kinds = {"token_type_ids": torch.randint(2, ids.shape)} if make is bert else {}
    labels = torch.tensor([0, 1, 2]) if make in (bert, llama_classifier) else torch.randint(3, ids.shape)
    out = model(input_ids=ids, attention_mask=mask, labels=labels, adapter_names=rows, **kinds)
    assert out.loss.isfinite()
    for i, span, row, on in rows_alone(model, ids, mask, rows):
        one = {name: value[i : i + 1, span] for name, value in kinds.items()}
        alone = model(input_ids=row, attention_mask=on, **one).logits[0]
        mine = out.logits[i] if alone.dim() == 1 else out.logits[i, : len(alone)]
        torch.testing.assert_close(mine, alone, rtol=1e-4, atol=1e-5)


def test_encoder_decoder_by_row():
    model, (ids, mask, _) = with_prompts(t5(), a=3, b=6), padded()
    rows, target = ["a", None, "b"], prompts(3, 4, seed=1)
    out = model(input_ids=ids, attention_mask=mask, labels=target, adapter_names=rows)
    with fastpeft.per_row(model, rows):
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=5, num_beams=2)
    for i, _, row, on in rows_alone(model, ids, mask, rows):
        alone = model(input_ids=row, attention_mask=on, labels=target[i : i + 1])
        torch.testing.assert_close(out.logits[i], alone.logits[0], rtol=1e-4, atol=1e-4)
        single = model.generate(row, attention_mask=on, max_new_tokens=5, num_beams=2)
        assert torch.equal(tokens[i, : single.shape[1]], single[0])
