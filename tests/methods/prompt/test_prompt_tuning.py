"""Prompt tuning on whole models: beside PEFT, in training, attached and detached."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch

import fastpeft
from fastpeft import PromptTuning, attach
from tests.support.models import bert, bert_tokens, gpt2, llama, prompts, t5
from tests.support.prompted import CAUSAL, each_causal, padded, with_prompts

peft = pytest.importorskip("peft", reason="PEFT is not installed")


def in_peft(model, length=4, task="CAUSAL_LM"):
    torch.manual_seed(2)
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=length, num_transformer_submodules=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(model), config).eval()


def weight(wrapped):
    return wrapped.prompt_encoder["default"].embedding.weight


@each_causal
def test_equals_peft(family, tmp_path):
    """Loaded from what PEFT wrote: outputs and gradients; generated tokens."""
    model = CAUSAL[family]()
    theirs, ids = in_peft(model), prompts(3)
    mask = torch.ones_like(ids)
    theirs.save_pretrained(tmp_path)
    fastpeft.load(model, tmp_path, is_trainable=True)
    ours = model.fastpeft_prompt.prompts["default"]
    assert torch.equal(ours, weight(theirs))
    for step in (model, theirs):
        step(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    torch.testing.assert_close(model(ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad, weight(theirs).grad, rtol=1e-4, atol=1e-7)
    how = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(ids, **how), theirs.generate(input_ids=ids, **how))


@pytest.mark.parametrize("make", [llama, gpt2, bert, bert_tokens, t5])
def test_peft_reads_what_we_write(make, tmp_path):
    model, ids = with_prompts(make(), one=5), prompts(2)
    fastpeft.save(model, tmp_path, "one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given |= {"decoder_input_ids": prompts(2, seed=1)} if make is t5 else {}
    torch.testing.assert_close(model(**given).logits, theirs(**given).logits, rtol=1e-5, atol=1e-6)


def test_training_goes_on_where_it_stopped(tmp_path):
    """PEFT refuses to train a prompt that it has loaded."""
    ids = prompts(4)

    def train(model, name, steps):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(steps):
            optimizer.zero_grad()
            model(ids, labels=ids).loss.backward()
            optimizer.step()

    through = with_prompts(llama(), a=4)
    train(through, "a", 2)
    fastpeft.save(through, tmp_path, "a")
    train(through, "a", 2)
    again = fastpeft.load(llama(), tmp_path, "a", is_trainable=True)
    train(again, "a", 2)
    assert torch.equal(again.fastpeft_prompt.prompts["a"], through.fastpeft_prompt.prompts["a"])
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)


def test_peft_gives_every_row_the_active_prompt(tmp_path):
    """Named for what it guards against: PEFT takes adapter_names and does not look at them."""
    model, ids = with_prompts(llama(), one=4, two=4), prompts(2)
    for name in ("one", "two"):
        fastpeft.save(model, tmp_path / name, name)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path / "one", adapter_name="one").eval()
    theirs.load_adapter(tmp_path / "two", adapter_name="two")
    with torch.no_grad():
        wrong = theirs(input_ids=ids, adapter_names=["one", "two"]).logits
        assert torch.equal(wrong, theirs(input_ids=ids).logits)  # the active one's, in both rows
        right = model(ids, adapter_names=["one", "two"]).logits
        theirs.set_adapter("two")
        torch.testing.assert_close(right[0], wrong[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(right[1], theirs(input_ids=ids).logits[1], rtol=1e-5, atol=1e-6)
        assert (right[1] - wrong[1]).abs().max() > 0.1


def test_several_active_prompts_follow_one_another():
    model, ids = with_prompts(llama(), a=3, b=2), prompts(2)
    fastpeft.set_adapter(model, ["b", "a"])
    table = torch.cat([model.fastpeft_prompt.prompts[n] for n in ("b", "a")])
    x = torch.cat([table.expand(2, -1, -1), model.get_input_embeddings()(ids)], 1)
    wanted = llama()(inputs_embeds=x).logits
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-5, atol=1e-6)
    given = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-6)


@each_causal
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family, reentrant):
    model, (ids, mask, labels) = with_prompts(CAUSAL[family](), a=3), padded()
    model.train()
    parameter = model.fastpeft_prompt.prompts["a"]
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(ids, attention_mask=mask, labels=labels).loss.backward()
        grads.append(parameter.grad.clone())
        parameter.grad = None
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


def test_autocast_and_half_weights():
    model, (ids, mask, labels) = with_prompts(llama().bfloat16(), a=3), padded()
    parameter = model.fastpeft_prompt.prompts["a"]
    assert parameter.dtype == torch.float32
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


def test_transformers_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, ids = with_prompts(llama(), a=4), prompts(8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    options = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, report_to=[], save_strategy="no", use_cpu=True,
        learning_rate=0.1, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, options, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fastpeft_prompt.prompts.a"}


def test_positions_that_are_given():
    model, ids = with_prompts(llama(), a=3), prompts(2)
    given = torch.arange(7).expand(2, -1)
    torch.testing.assert_close(model(ids, position_ids=given).logits, model(ids).logits)


@pytest.mark.parametrize("make", [llama, t5])
def test_detach_leaves_the_model_as_it_was(make):
    model = make()
    keys, modules = list(model.state_dict()), dict(model.named_modules())
    flags = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    with_prompts(model, a=3, b=4)
    assert "fastpeft_prompt.prompts.b" in model.state_dict()
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["fastpeft_prompt.prompts.a"]
    fastpeft.detach(model)
    assert list(model.state_dict()) == keys
    assert dict(model.named_modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks


def test_disabled_and_copied():
    model, ids = with_prompts(llama(), a=3), prompts(2)
    prompted, plain = model(ids).logits, llama()(ids).logits
    with fastpeft.disable_adapter(model):
        assert torch.equal(model(ids).logits, plain)
        assert torch.equal(model(ids, adapter_names=["a", None]).logits, plain)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.fastpeft_prompt.prompts["a"].zero_()
    assert not torch.equal(other(ids).logits, prompted)
    assert torch.equal(model(ids).logits, prompted)
    fastpeft.detach(other)
    assert torch.equal(other(ids).logits, plain)
    assert torch.equal(model(ids).logits, prompted)
    assert "1 of 1 prompts fused" in str(fastpeft.report(model))


def test_beside_lora():
    """One adapter of two methods; a second one of prompts alone."""
    model, ids = llama(), prompts(2)
    attach(model, [fastpeft.Lora(r=2, init="random"), PromptTuning(length=3)], name="both")
    out = model(ids, labels=ids)
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert out.logits.shape[1] == 10
    with pytest.raises(ValueError, match="adapter 'both' is LoRA, which acts on all rows alike"):
        fastpeft.per_row(model, ["both"]).__enter__()


def test_a_trained_embedding_and_one_with_hooks():
    """Read directly only where reading is all that it does."""
    model, ids = with_prompts(llama(), a=3), prompts(2)
    embedding, wanted = model.get_input_embeddings(), model(ids).logits
    doubled = embedding.register_forward_hook(lambda module, args, out: 2 * out)
    assert not torch.allclose(model(ids).logits, wanted)
    doubled.remove()
    embedding.weight.requires_grad_()
    model(ids).logits.sum().backward()
    assert embedding.weight.grad[ids.unique()].abs().sum() > 0


def test_initial_values():
    model = llama()
    table = model.get_input_embeddings().weight
    attach(model, PromptTuning(length=5, init="text", text=[7, 9]), name="text")
    attach(model, PromptTuning(length=5, init="vocabulary"), name="vocabulary")
    attach(model, PromptTuning(length=400), name="random")
    found = model.fastpeft_prompt.prompts
    assert torch.equal(found["text"], table[[7, 9, 7, 9, 7]])
    assert all((row == table).all(1).any() for row in found["vocabulary"])
    assert abs(found["random"].std() / table.std() - 1) < 0.1
