"""A selection as an object: tied weights, copies, groups, its table, one at a time."""

import copy

import pytest
import torch
from torch import nn

import fastpeft
from tests.support.selections import IDS, bert, changed, llama, loss_of, names, state, train


def test_tokens_of_a_tied_model_train_both_sides():
    model = llama(tied=True)
    reference = copy.deepcopy(model)
    selection = fastpeft.select(model, tokens=[3, 7])
    assert "lm_head is tied to model.embed_tokens" in str(selection)
    loss_of(model).backward()
    loss_of(reference).backward()
    (grad,) = (p.grad for p in selection.parameters())
    torch.testing.assert_close(grad, reference.model.embed_tokens.weight.grad[[3, 7]])
    train(model, selection)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    selection.revert()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, reference.lm_head.weight)


def test_a_tied_module_is_trained_once_and_said_to_be_tied():
    model = llama(tied=True)
    selection = fastpeft.select(model, modules=["lm_head"])
    assert names(selection) == {"model.embed_tokens.weight"}
    assert "model.embed_tokens.weight is tied to lm_head.weight" in str(selection)


def test_rows_of_a_tied_weight_are_refused():
    """The other side would go on using, and not training, the same rows."""
    with pytest.raises(ValueError, match="whose weight is also .*; use tokens"):
        fastpeft.select(llama(tied=True), rows={"lm_head": [1]})


def test_a_copy_of_a_selected_model_is_a_model_of_its_own():
    model = llama()
    fastpeft.select(model, layers="last:1", rows={"up_proj": [0]}, tokens=[3])
    other = copy.deepcopy(model)
    assert other.fastpeft_selection.model is other
    before = state(model)
    train(other, other.fastpeft_selection)
    assert changed(model, before) == set()
    other.fastpeft_selection.revert()
    assert model.fastpeft_selection._change.active


def test_param_groups():
    model = bert()
    selection = fastpeft.select(model, layers="last:1", modules=["embeddings.LayerNorm"], tokens=[3])
    groups = {g["name"]: g for g in selection.param_groups(1e-3, norm_lr=1e-4, bias_lr=1e-2, weight_decay=0.1)}
    assert {name: (g["lr"], g["weight_decay"], len(g["params"])) for name, g in groups.items()} == {
        "weights": (1e-3, 0.1, 6), "tokens": (1e-3, 0.0, 1), "biases": (1e-2, 0.0, 6), "norms": (1e-4, 0.0, 6)
    }  # fmt: skip


def test_the_table_counts():
    model = llama()
    selection = fastpeft.select(model, params="norm", rows={"layers.0.mlp.up_proj": [1, 2]})
    lines = {line.split()[0]: line.split()[1:] for line in str(selection).splitlines()}
    assert lines["norm"][:2] == ["13", "416"]
    assert lines["rows"][:2] == ["1", "64"]
    assert lines["total"][:2] == ["14", "480"]
    assert float(lines["total"][2]) == pytest.approx(100 * 480 / sum(p.numel() for p in llama().parameters()), abs=1e-3)


def test_rows_by_fraction_are_the_same_every_time():
    one, other = (fastpeft.select(llama(), rows={"up_proj": 0.25}) for _ in range(2))
    assert all(torch.equal(a.index, b.index) for a, b in zip(one.plan.slices, other.plan.slices, strict=True))
    assert {len(part.index) for part in one.plan.slices} == {16}
    assert not torch.equal(one.plan.slices[0].index, one.plan.slices[1].index)
    another = fastpeft.select(llama(), rows={"up_proj": 0.25}, seed=1)
    assert not torch.equal(one.plan.slices[0].index, another.plan.slices[0].index)
    least = fastpeft.select(llama(), columns={"layers.0.mlp.up_proj": 0.001})
    assert len(least.plan.slices[0].index) == 1


def test_one_selection_at_a_time():
    model = llama()
    selection = fastpeft.select(model, params="norm")
    with pytest.raises(ValueError, match="the model has a selection already; revert it first"):
        fastpeft.select(model, params="norm")
    selection.revert()
    with pytest.raises(ValueError, match="save after revert"):
        selection.save("/nowhere")
    fastpeft.attach(model, fastpeft.Lora(r=2))
    with pytest.raises(ValueError, match="has adapters; give fastpeft.Selective to attach instead"):
        fastpeft.select(model, params="norm")


INSIDE = {
    "adapters": lambda model: fastpeft.attach(model, fastpeft.Lora(r=2)),
    "a selection": lambda model: fastpeft.select(model, params="norm"),
}


@pytest.mark.parametrize("what", INSIDE)
def test_a_part_that_has_adapters_or_a_selection_is_refused(what):
    model = llama()
    INSIDE[what](model.model)
    with pytest.raises(ValueError, match=f"select: model has {what}"):
        fastpeft.select(model, params="norm")


@pytest.mark.parametrize("around", [False, True])
def test_adapters_that_were_attached_since_come_off_first(around):
    """To the model itself, or to one around it."""
    model = llama()
    before, flags = state(model), {name: p.requires_grad for name, p in model.named_parameters()}
    selection = fastpeft.select(model, params="norm", rows={"up_proj": [0]}, add_missing_bias=True)
    train(model, selection)
    outputs = model(input_ids=IDS).logits
    outer = nn.ModuleDict({"model": model}) if around else model
    fastpeft.attach(outer, fastpeft.Lora(r=2, targets=["q_proj"]) if around else fastpeft.PromptTuning(length=2))
    with pytest.raises(ValueError, match="Selection: revert, but adapters have been attached since; detach them first"):
        selection.revert()
    assert model.fastpeft_selection is selection
    fastpeft.detach(outer)
    assert torch.equal(model(input_ids=IDS).logits, outputs)
    model.extra = nn.Linear(1, 1)  # a parameter of the user's own
    selection.revert()
    del model.extra
    assert changed(model, before) == set()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
