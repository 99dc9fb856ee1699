"""fastpeft.select: exactly the chosen parts train, and all of it can be taken back."""

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft.methods.selective import change
from fastpeft.nn import RowSparseLinear
from tests.support.selections import IDS, WHAT, bert, changed, gpt2, llama, loss_of, names, state, train


@pytest.mark.parametrize("what", WHAT.values(), ids=WHAT)
def test_trains_what_was_chosen_and_reverts_bit_for_bit(what):
    model = llama()
    model.model.layers[0].requires_grad_(False)
    before, flags = state(model), {name: p.requires_grad for name, p in model.named_parameters()}
    modules = dict(model.named_modules())
    outputs = model(input_ids=IDS).logits
    selection = fastpeft.select(model, **what)
    assert torch.equal(model(input_ids=IDS).logits, outputs), "selecting alone changed the outputs"
    asked = {id(p) for p in model.parameters() if p.requires_grad}
    assert asked == {id(p) for p in selection.parameters()}
    train(model, selection)
    found = changed(model, before)
    part = {".rows": ".weight", ".columns": ".weight", ".tokens": ".weight"}
    wanted = set()
    for name in names(selection):
        head, end = name.rsplit(".", 1)
        wanted.add(head + part[f".{end}"] if f".{end}" in part else name)
    assert found == wanted
    selection.revert()
    assert changed(model, before) == set()
    assert list(model.state_dict()) == list(before)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert dict(model.named_modules()) == modules
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_last_blocks_by_name_and_count():
    model = llama()
    by_count = names(fastpeft.select(model, layers="last:2"))
    assert len(by_count) == 2 * 9
    assert all(name.startswith(("model.layers.4.", "model.layers.5.")) for name in by_count)
    model.fastpeft_selection.revert()
    assert names(fastpeft.select(model, layers=["layers.4", 5])) == by_count


def test_only_the_chosen_rows_change():
    model = llama()
    before = state(model)
    train(model, fastpeft.select(model, rows={"layers.2.mlp.up_proj": [1, 30]}, tokens=[3, 63]))
    for name, rows in (("model.layers.2.mlp.up_proj.weight", [1, 30]), ("model.embed_tokens.weight", [3])):
        moved = (model.state_dict()[name] != before[name]).any(1).nonzero()[:, 0].tolist()
        assert moved == rows, name  # token 63 is not in the texts; AdamW without decay leaves it


@pytest.mark.parametrize("make", [bert, gpt2, llama])
def test_finds_the_stack_of_any_model(make):
    model = make()
    found = names(fastpeft.select(model, layers="last:1", params=["bias"], add_missing_bias=True))
    assert found
    assert all(".3." in name or ".5." in name for name in found)
    train(model, model.fastpeft_selection)
    model.fastpeft_selection.revert()


def test_a_plain_model_and_blocks_named_by_the_user():
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]), nn.Linear(4, 2))
    assert names(fastpeft.select(model, layers="last:1")) == {"1.2.weight", "1.2.bias"}
    model.fastpeft_selection.revert()
    two = nn.ModuleDict({name: nn.ModuleList([nn.Linear(4, 4) for _ in range(3)]) for name in ("encoder", "decoder")})
    with pytest.raises(ValueError, match="stacks of the same length: encoder, decoder; say which with blocks="):
        fastpeft.select(two, layers=0)
    assert names(fastpeft.select(two, layers=0, blocks="decoder")) == {"decoder.0.weight", "decoder.0.bias"}


@pytest.mark.parametrize(
    ("layers", "numbers"),
    [
        ("first:2", [0, 1]), ("last:2", [10, 11]), ("last:12", range(12)), ("1:3", [1, 2]), ("-2:", [10, 11]),
        (":1", [0]), (1, [1]), (-12, [0]), ("1", [1]), ("blocks.1", [1]), ([11, "first:1", 0], [0, 11]),
    ],
)  # fmt: skip
def test_exactly_the_blocks_that_were_named(layers, numbers):
    """Of twelve, so that block 1 is neither block 10 nor block 11."""
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(12)])})
    assert names(fastpeft.select(model, layers=layers)) == {f"blocks.{i}.weight" for i in numbers}


def test_the_stack_is_the_longest_list_of_like_blocks():
    """Not the experts inside the blocks, of which there are more, and no list of all sorts of modules."""

    def block():
        return nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(5)])})

    sorts = [nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2), nn.LayerNorm(2)]
    lists = {"blocks": [block() for _ in range(3)], "sorts": sorts, "two": [nn.Linear(2, 2), nn.Linear(2, 2)]}
    model = nn.ModuleDict({name: nn.ModuleList(modules) for name, modules in lists.items()})
    assert names(fastpeft.select(model, layers="last:1")) == {f"blocks.2.experts.{i}.weight" for i in range(5)}


def test_layers_say_where_the_other_selectors_apply():
    bounded = {"columns": {"down_proj": [0]}, "rows": {"up_proj": [0]}, "params": "norm", "add_missing_bias": True}
    found = names(fastpeft.select(llama(), layers=[4], **bounded))
    linears = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    assert found == {
        "model.layers.4.mlp.down_proj.columns", "model.layers.4.mlp.up_proj.rows",
        "model.layers.4.input_layernorm.weight", "model.layers.4.post_attention_layernorm.weight",
        *(f"model.layers.4.{path}.bias" for path in linears),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"rows has 'layers.0.mlp.up_proj', which is no linear layer"):
        fastpeft.select(llama(), layers=[4], rows={"layers.0.mlp.up_proj": [0]})
    path = "model.layers.0.mlp.up_proj"
    with pytest.raises(ValueError, match=rf"add_missing_bias has '{path}', which is not in layers=\(4,\)"):
        fastpeft.select(llama(), layers=[4], add_missing_bias=[path])


def test_missing_biases_are_those_of_all_linear_layers_but_the_head():
    model = llama(layers=2)
    linears = {path for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    wanted = {f"{path}.bias" for path in linears - {"lm_head"}}
    assert names(fastpeft.select(model, add_missing_bias=True)) == wanted
    model.fastpeft_selection.revert()
    assert names(fastpeft.select(model, add_missing_bias=["lm_head"])) == {"lm_head.bias"}
    with pytest.raises(ValueError, match="add_missing_bias has 'encoder.layer.0.output.dense', which has a bias"):
        fastpeft.select(bert(), add_missing_bias=["encoder.layer.0.output.dense"])


def test_biases_and_norms_by_their_looks():
    """A bias may be called in_proj_bias. What holds a norm is none, and what is no vector is no part of one."""

    class PreNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))
            self.norm = nn.LayerNorm(4)

    class NormedTable(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4))

    model = nn.ModuleDict({"mix": nn.MultiheadAttention(4, 1), "pre": PreNorm(), "table": NormedTable()})
    biases = {"mix.in_proj_bias", "mix.out_proj.bias", "pre.norm.bias"}
    assert names(fastpeft.select(model, params="bias")) == biases
    model.fastpeft_selection.revert()
    assert names(fastpeft.select(model, params="norm")) == {"pre.norm.weight", "pre.norm.bias"}


def test_rows_of_a_conv1d_are_output_features():
    """transformers' Conv1D stores the weight the other way round."""
    for part, chosen in (("rows", lambda w: w[:, [0, 127]].T), ("columns", lambda w: w[[0, 31]].T)):
        model, whole = gpt2(), gpt2()
        selection = fastpeft.select(model, **{part: {"h.0.mlp.c_fc": [0, -1]}})
        loss_of(model).backward()
        loss_of(whole).backward()
        ((name, parameter),) = selection.named_parameters()
        assert name == f"transformer.h.0.mlp.c_fc.{part}"
        torch.testing.assert_close(parameter.grad, chosen(whole.transformer.h[0].mlp.c_fc.weight.grad))
    with pytest.raises(ValueError, match=r"has 32, expected integers in \[0, 32\)"):
        fastpeft.select(gpt2(), columns={"h.0.mlp.c_fc": [32]})


def test_tokens_are_those_of_the_input_embedding():
    """As the model says; of the largest table where it does not."""
    model = nn.ModuleDict({"words": nn.Embedding(4, 2), "positions": nn.Embedding(9, 2)})
    assert names(fastpeft.select(model, tokens=[3])) == {"positions.tokens"}
    model.fastpeft_selection.revert()
    model.get_input_embeddings = lambda: model["words"]
    assert names(fastpeft.select(model, tokens=[3])) == {"words.tokens"}


def test_hooks_of_an_embedding_go_on_while_its_tokens_train():
    model, calls = llama(), []
    handle = model.model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    selection = fastpeft.select(model, tokens=[3])
    loss_of(model)
    assert len(calls) == 1
    handle.remove()
    selection.revert()
    loss_of(model)
    assert len(calls) == 1


def test_revert_leaves_no_gradients_and_the_mode_the_model_has():
    model = llama()
    selection = fastpeft.select(model, params="norm", rows={"up_proj": [0]}, tokens=[3])
    loss_of(model).backward()
    selection.revert()
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    selection = fastpeft.select(model, rows={"up_proj": [0]}, tokens=[3])
    assert not any(module.training for module in model.modules())
    model.train()
    selection.revert()
    assert all(module.training for module in model.modules())


def test_a_failure_in_the_middle_changes_nothing(monkeypatch):
    """Memory may run out while the second of two slices is made."""
    model, made = llama(), []

    def short_of_memory(*args, **kwargs):
        made.append(RowSparseLinear(*args, **kwargs)) if not made else 1 / 0
        return made[0]

    monkeypatch.setattr(change, "RowSparseLinear", short_of_memory)
    with pytest.raises(ZeroDivisionError):
        fastpeft.select(model, rows={"up_proj": [0]})
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    monkeypatch.undo()
    fastpeft.select(model, rows={"up_proj": [0]})
