"""Prefix tuning on whole models: beside PEFT, under checkpointing, by row, in generate, attached and detached."""

import copy
import json
import warnings

import pytest
import torch

import fastpeft
from fastpeft import PrefixTuning, attach
from fastpeft.methods.prefix.method import ATTENTION, RAW
from tests.support.models import bert, bert_tokens, gpt2, llama, prompts, roberta, t5

peft = pytest.importorskip("peft", reason="PEFT is not installed")


def bert_encoder():
    return bert().bert


def roberta_encoder():
    return roberta().roberta


FAMILIES = {"llama": llama, "gpt2": gpt2, "bert": bert_encoder, "roberta": roberta_encoder}
each_family = pytest.mark.parametrize("family", FAMILIES)
each_causal = pytest.mark.parametrize("family", ["llama", "gpt2"])
each_kind = pytest.mark.parametrize("projection", [None, 6], ids=["plain", "projection"])


def with_prefixes(model, projection=None, **lengths):
    torch.manual_seed(1)
    for name, length in lengths.items():
        attach(model, PrefixTuning(length=length, projection=projection), name=name)
        for parameter in model.fastpeft_prefix.adapters[name].parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def in_peft(model, family, **settings):
    torch.manual_seed(2)
    task = "FEATURE_EXTRACTION" if "bert" in family else "CAUSAL_LM"
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(model), config).eval()


def padded(rows=3):
    ids, mask = prompts(rows), torch.ones(rows, 7, dtype=torch.int64)
    mask[0, 5:] = 0
    return ids, mask


def copy_weights(theirs, ours):
    """Into PEFT's modules."""
    encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        encoder.embedding.weight.copy_(ours.embedding)
        if ours.transform is not None:
            encoder.transform.load_state_dict(ours.transform.state_dict())
    trained = [encoder.embedding.weight]
    return trained + (list(encoder.transform.parameters()) if ours.transform is not None else [])


@each_kind
@each_family
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_equals_peft(family, projection, implementation):
    """Outputs, and the gradient of every parameter."""
    model, (ids, mask) = FAMILIES[family](), padded()
    model.set_attn_implementation(implementation)
    settings = {} if projection is None else {"prefix_projection": True, "encoder_hidden_size": projection}
    theirs = in_peft(model, family, **settings)
    adapter = with_prefixes(model, projection, a=4).fastpeft_prefix.adapters["a"]
    trained = copy_weights(theirs, adapter)
    ours = model(input_ids=ids, attention_mask=mask)[0]
    wanted = theirs(input_ids=ids, attention_mask=mask)[0]
    keep = mask.bool()
    torch.testing.assert_close(ours[keep], wanted[keep], rtol=1e-5, atol=1e-5)
    torch.manual_seed(3)
    grad = torch.randn_like(ours) * keep[..., None]
    ours.backward(grad)
    wanted.backward(grad)
    for one, two in zip(adapter.parameters(), trained, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4 * two.grad.abs().max().item())


@each_kind
@each_family
def test_checkpoints_both_ways(family, projection, tmp_path):
    """What PEFT writes we read, and the reverse; of a projection PEFT keeps the result alone."""
    model, (ids, mask) = FAMILIES[family](), padded()
    settings = {} if projection is None else {"prefix_projection": True, "encoder_hidden_size": projection}
    theirs = in_peft(model, family, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    fastpeft.load(model, tmp_path / "theirs")
    given, keep = {"input_ids": ids, "attention_mask": mask}, mask.bool()
    torch.testing.assert_close(model(**given)[0][keep], theirs(**given)[0][keep], rtol=1e-5, atol=1e-5)
    ours = with_prefixes(FAMILIES[family](), projection, one=5)
    fastpeft.save(ours, tmp_path / "ours", "one")
    assert (tmp_path / "ours" / RAW).is_file() == (projection is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(FAMILIES[family](), tmp_path / "ours").eval()
    torch.testing.assert_close(ours(**given)[0][keep], theirs(**given)[0][keep], rtol=1e-5, atol=1e-5)


@each_kind
def test_training_goes_on_where_it_stopped(projection, tmp_path):
    """The projection's own weights are kept, so that its training can go on too."""
    ids = prompts(4)

    def train(model, steps):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()

    through = with_prefixes(llama(), projection, a=4)
    train(through, 2)
    fastpeft.save(through, tmp_path, "a")
    train(through, 2)
    again = fastpeft.load(llama(), tmp_path, "a")
    train(again, 2)
    ours, wanted = (m.fastpeft_prefix.adapters["a"].state_dict() for m in (again, through))
    assert list(ours) == list(wanted)
    assert all(torch.equal(ours[key], wanted[key]) for key in ours)
    plain = with_prefixes(llama(), None, a=4)
    fastpeft.save(plain, tmp_path, "a")
    assert not (tmp_path / RAW).exists()  # nor does a projection of before come back


@each_kind
@each_causal
def test_gradient_checkpointing_where_peft_raises(family, projection):
    model, (ids, mask) = with_prefixes(FAMILIES[family](), projection, a=3, b=4).train(), padded()
    fastpeft.set_adapter(model, ["a", "b"])
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [
            model(ids, attention_mask=mask, labels=ids, adapter_names=rows).loss for rows in (None, ["a", "b", None])
        ]
        losses.append(model(ids.flip(1), labels=ids).loss)  # recomputed with what they were given, not with the latest
        sum(losses).backward()
        grads.append([p.grad.clone() for p in model.fastpeft_prefix.parameters()])
        model.zero_grad()
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)
    plain = FAMILIES[family]().train()
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="does not work with gradient checkpointing"):
        in_peft(plain, family)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="gradient checkpointing is reentrant, expected"):
        model(ids)


def test_the_projection_is_evaluated_once_a_forward():
    model, ids = with_prefixes(llama(), 6, a=3), prompts(5)
    calls = []
    adapter = model.fastpeft_prefix.adapters["a"]
    adapter.transform.register_forward_hook(lambda module, args, out: calls.append(args[0].shape))
    model(ids)
    assert calls == [(3, 16)]  # P rows, where PEFT has B times P


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [fastpeft.PromptTuning(length=3), PrefixTuning(length=3)], ids=lambda c: type(c).__name__
)
def test_torch_compile(config):
    """The hooks are part of the graph."""
    model, (ids, mask) = attach(llama(), config), padded()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    grads = []
    for step in (model, compiled):
        loss = step(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        grads += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
        model.zero_grad()
    for one, two in zip(grads[: len(grads) // 2], grads[len(grads) // 2 :], strict=True):
        torch.testing.assert_close(one, two)


def test_16_bit_model_and_dropout():
    model, (ids, mask) = with_prefixes(llama().bfloat16(), a=3), padded()
    adapter = model.fastpeft_prefix.adapters["a"]
    assert adapter.embedding.dtype == torch.float32
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert adapter.embedding.grad.isfinite().all()
    assert adapter.embedding.grad.dtype == torch.float32
    model = with_prefixes(gpt2(), a=3).train()
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.5
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_transformers_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, ids = with_prefixes(llama(), 4, a=4), prompts(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True,
        learning_rate=0.1, disable_tqdm=True, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    Trainer(model, options, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("fastpeft_prefix.adapters.a.")}
    assert len(changed) == 5


@each_family
def test_detach_leaves_the_model_as_it_was(family):
    model, ids = FAMILIES[family](), prompts(2)
    wanted, keys = model(ids)[0], list(model.state_dict())
    config, flags = model.config.to_dict(), [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    before = model.config._attn_implementation
    with_prefixes(model, a=3, b=4)
    assert model.config._attn_implementation == ATTENTION
    assert "fastpeft_prefix.adapters.b.embedding" in model.state_dict()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["fastpeft_prefix.adapters.a.embedding"]
    with fastpeft.disable_adapter(model):
        assert torch.equal(model(ids)[0], wanted)
    other = copy.deepcopy(model)
    fastpeft.detach(model)
    assert model.config._attn_implementation == before
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
    assert torch.equal(model(ids)[0], wanted)
    assert not torch.equal(other(ids)[0], wanted)
    fastpeft.detach(other)
    assert torch.equal(other(ids)[0], wanted)


def test_a_model_that_shares_the_config_is_left_alone():
    model, ids = llama(), prompts(2)
    other = type(model)(model.config).eval()
    wanted = other(ids).logits
    with_prefixes(model, a=3)
    assert torch.equal(other(ids).logits, wanted)


def test_zero_keys_and_values():
    model = llama()
    for name, projection in (("plain", None), ("made", 5)):
        attach(model, PrefixTuning(length=3, init="zero", projection=projection), name=name)
        assert (model.fastpeft_prefix.adapters[name].values() == 0).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "PrefixTuning: length is 0"),
        ({"projection": 0}, "PrefixTuning: projection is 0"),
        ({"init": "vocabulary"}, "PrefixTuning: init is 'vocabulary', expected one of random, zero, text"),
        ({"init": "text"}, "PrefixTuning: text is None, expected token ids"),
        ({"text": [1]}, "PrefixTuning: text is .*, expected None without init='text'"),
        ({"init": "text", "text": "hello"}, "PrefixTuning: text is 'hello', expected token ids"),
        ({"init": "text", "text": [1]}, "PrefixTuning: text has 1 tokens, expected length=20"),
        ({"init": "text", "text": [1], "length": 1, "projection": 4}, "init='text' with a projection"),
        ({"dtype": torch.int64}, "PrefixTuning: dtype is torch.int64"),
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
        ({"num_virtual_tokens": 3}, r"prompt_embeddings has shape \[4, 64\], expected \[3, 64\]"),
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
