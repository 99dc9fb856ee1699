"""Prompt tuning on whole models: beside PEFT, by row, in generate, in training, attached and detached."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch

import fastpeft
from fastpeft import PromptTuning, attach
from tests.support.models import VOCAB, bert, bert_tokens, gpt2, llama, llama_classifier, prompts, roberta, t5

peft = pytest.importorskip("peft", reason="PEFT is not installed")

CAUSAL = {"llama": llama, "gpt2": gpt2}
each_causal = pytest.mark.parametrize("family", CAUSAL)


def with_prompts(model, **lengths):
    """Adapters that differ, all of them active ones' equals in size."""
    torch.manual_seed(1)
    for name, length in lengths.items():
        attach(model, PromptTuning(length=length, init="vocabulary"), name=name)
    return model


def in_peft(model, length=4, task="CAUSAL_LM"):
    torch.manual_seed(2)
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=length, num_transformer_submodules=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(copy.deepcopy(model), config).eval()


def weight(wrapped):
    return wrapped.prompt_encoder["default"].embedding.weight


def padded(rows=3):
    """Ids, a mask with padding on the left and a hole, and labels."""
    ids, mask = prompts(rows), torch.ones(rows, 7, dtype=torch.int64)
    mask[0, :3] = 0
    mask[1, 2] = 0
    return ids, mask, torch.where(mask == 1, ids, -100)


@each_causal
def test_equals_peft(family, tmp_path):
    """Loaded from what PEFT wrote: outputs and gradients; generated tokens."""
    model = CAUSAL[family]()
    theirs, ids = in_peft(model), prompts(3)
    mask = torch.ones_like(ids)
    theirs.save_pretrained(tmp_path)
    fastpeft.load(model, tmp_path)
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
    again = fastpeft.load(llama(), tmp_path, "a")
    train(again, "a", 2)
    assert torch.equal(again.fastpeft_prompt.prompts["a"], through.fastpeft_prompt.prompts["a"])
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)


def rows_alone(model, ids, mask, rows):
    for i, name in enumerate(rows):
        on = mask[i].nonzero()[:, 0]
        span = slice(int(on[0]), int(on[-1]) + 1)
        with fastpeft.per_row(model, [name]):
            yield i, span, ids[i : i + 1, span], mask[i : i + 1, span]


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "PromptTuning: length is 0"),
        ({"init": "zero"}, "PromptTuning: init is 'zero', expected one of random, vocabulary, text"),
        ({"init": "text"}, "PromptTuning: text is None, expected token ids"),
        ({"text": [1]}, "PromptTuning: text is .*, expected None without init='text'"),
        ({"init": "text", "text": "hello"}, "PromptTuning: text is 'hello', expected token ids"),
        ({"init": "text", "text": []}, "PromptTuning: text is empty"),
        ({"dtype": torch.int64}, "PromptTuning: dtype is torch.int64"),
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
        ("a", "adapter_names is 'a', expected a name or None for each row"),
        ([], "adapter_names has 0 items"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            model(ids, adapter_names=names)
    with pytest.raises(ValueError, match="per_row: names holds 'b', expected None or one of 'a'"):
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
        ({"num_virtual_tokens": 3}, r"prompt_embeddings has shape \[4, 32\], expected \[3, 32\]"),
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
