"""Prefix tuning on whole models: beside PEFT, under checkpointing, in training, attached and detached."""

import copy
import warnings

import pytest
import torch

import fastpeft
from fastpeft import PrefixTuning, attach
from fastpeft.methods.prefix.files import RAW
from fastpeft.methods.prefix.method import ATTENTION
from tests.support.models import gpt2, llama, prompts
from tests.support.prefixed import (
    FAMILIES,
    copy_weights,
    each_causal,
    each_family,
    each_kind,
    in_peft,
    padded,
    with_prefixes,
)

peft = pytest.importorskip("peft", reason="PEFT is not installed")


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
    again = fastpeft.load(llama(), tmp_path, "a", is_trainable=True)
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
    assert model.config._attn_implementation == ATTENTION[before]
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
