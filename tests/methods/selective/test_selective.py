"""fastpeft.select: exactly the chosen parts train, backward ends at the lowest, and all of it can be taken back."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from fastpeft.methods.selective import change
from fastpeft.nn import RowSparseLinear
from tests.support.models import t5
from tests.support.selections import IDS, WHAT, bert, changed, gpt2, llama, loss_of, state, train


def names(selection):
    return {name for name, _ in selection.named_parameters()}


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


# where backward ends


def nodes(tensor) -> set:
    found, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return found


def leaves(tensor) -> set[int]:
    return {id(node.variable) for node in nodes(tensor) if hasattr(node, "variable")}


def saved_bytes(model) -> int:
    parameters, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = loss_of(model)
    del loss
    return sum(kept.values())


CHECKPOINTS = {"none": None, "not reentrant": False, "reentrant": True}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reentrant", CHECKPOINTS.values(), ids=CHECKPOINTS)
@pytest.mark.parametrize("make", [llama, bert])
def test_no_node_below_the_first_trained_block(make, reentrant):
    """The trunk does not take part in backward: its blocks are not even called again."""
    model = make()
    model.train()
    if reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    selection = fastpeft.select(model, layers="last:2")
    calls = []
    stack = model.model.layers if hasattr(model, "model") else model.encoder.layer
    for block in stack[:-2]:
        inner = next(module for module in block.modules() if isinstance(module, nn.Linear))
        inner.register_forward_hook(lambda *_: calls.append(1))
    loss = loss_of(model)
    called = len(calls)
    assert called == len(stack) - 2
    if reentrant is None:
        assert leaves(loss) == {id(p) for p in selection.parameters()}
    loss.backward()
    assert len(calls) == called, "a frozen block was computed again in backward"
    grads = {name: p.grad for name, p in selection.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    plain = make()
    fastpeft.select(plain, layers="last:2")
    loss_of(plain).backward()
    for name, p in plain.fastpeft_selection.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)


@pytest.mark.filterwarnings("ignore")
def test_what_checkpoints_ask_of_the_embedding_is_taken_back_and_restored():
    """transformers makes the embedding's output require a gradient; that alone would keep the whole trunk."""
    model = llama()
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model.model.embed_tokens.requires_grad_(False)  # so that nothing but what was asked makes its output require one
    assert model.model.embed_tokens(IDS).requires_grad
    selection = fastpeft.select(model, layers="last:1")
    trunk = []
    model.model.layers[4].register_forward_hook(
        lambda m, a, out: trunk.append(out[0] if isinstance(out, tuple) else out)
    )
    loss_of(model).backward()
    assert not trunk[0].requires_grad
    selection.revert()
    assert model.model.embed_tokens(IDS).requires_grad, "revert must give the user's setting back"


def test_saved_bytes_are_those_of_the_trained_blocks():
    model = llama()
    everything = saved_bytes(model)
    fastpeft.select(model, layers="last:2")
    assert saved_bytes(model) < 0.5 * everything  # two of six blocks, and the head


def test_plain_checkpoints_that_are_not_reentrant():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])

        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    model = Model()
    fastpeft.select(model, layers="last:1")
    loss = model(torch.ones(2, 4)).sum()
    assert leaves(loss) <= {id(p) for p in model.blocks[2].parameters()}
    loss.backward()
    assert model.blocks[2][0].weight.grad is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_reentrant_checkpoints_of_two_stacks(stack):
    """Each stack has a first block of its own."""

    def gradients(checkpointed):
        model = t5(num_layers=3).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        selection = fastpeft.select(model, layers="last:2", blocks=f"{stack}.block")
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: p.grad for name, p in selection.named_parameters()}

    found, wanted = gradients(True), gradients(False)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, msg=name)


class Handed(nn.Module):
    """Hands its blocks to a checkpoint function, as models of older versions of transformers do."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)])
        self._gradient_checkpointing_func = function

    def forward(self, x):
        for block in self.blocks:
            x = self._gradient_checkpointing_func(block.__call__, x)
        return x


REENTRANT = {"said": partial(checkpoint, use_reentrant=True), "left to PyTorch": partial(checkpoint)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", REENTRANT.values(), ids=REENTRANT)
def test_blocks_that_are_handed_to_a_reentrant_checkpoint(function):
    calls = []

    def wrapped(block, *args):
        calls.append((block.__self__, args[0].requires_grad))
        return function(block, *args)

    wrapped.keywords = function.keywords
    model = Handed(wrapped)
    selection = fastpeft.select(model, layers="last:2")
    loss = model(torch.ones(2, 4)).sum()
    loss.backward()
    assert calls == list(zip(model.blocks, [False, False, True, True], strict=True))
    plain = Handed(lambda block, *args: block(*args))
    plain(torch.ones(2, 4)).sum().backward()
    for name, parameter in selection.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.get_parameter(name).grad)
    selection.revert()
    assert model._gradient_checkpointing_func is wrapped


# tied weights, copies, groups, the table


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


BAD = [
    ({}, ValueError, "nothing is selected"),
    ({"layers": "last:7"}, ValueError, "layers is 'last:7', expected 1 to 6 blocks"),
    ({"layers": 6}, ValueError, "layers has 6, which is none of 6 blocks"),
    ({"layers": "layers.9"}, ValueError, "layers has 'layers.9', which is none of 6 blocks; near: model.layers.5"),
    ({"layers": 1.5}, TypeError, "'float' object is not iterable"),
    ({"layers": [True]}, TypeError, "layers has True"),
    ({"layers": 0, "blocks": "model.layer"}, ValueError, r"blocks is 'model.layer', .*\(model.layers\)"),
    ({"params": ["bias"]}, ValueError, "params has 'bias', which is no parameter"),
    ({"params": ["q_prj.weight"]}, ValueError, "which is no parameter; near: .*q_proj.weight"),
    ({"params": [1]}, TypeError, "params is .*, expected names"),
    ({"modules": ["lm_hed"]}, ValueError, "modules has 'lm_hed', which is no module; near: lm_head"),
    ({"modules": ["act_fn"]}, ValueError, "modules has 'act_fn', which has no parameters"),
    ({"tokens": [96]}, ValueError, r"tokens has 96, expected integers in \[0, 96\)"),
    ({"tokens": [1.5]}, TypeError, "tokens is .*, expected integers"),
    ({"tokens": {"lm_head": [1]}}, TypeError, "tokens names lm_head, which is a Linear"),
    ({"rows": {"up_prj": 0.1}}, ValueError, "rows has 'up_prj', which is no linear layer; near: .*up_proj"),
    ({"rows": {"norm": 0.1}}, TypeError, "rows names model.norm, which is a LlamaRMSNorm"),
    ({"rows": {"up_proj": 1.5}}, ValueError, "is 1.5, expected a fraction"),
    ({"rows": {"up_proj": [64]}}, ValueError, r"rows\['up_proj'\] has 64"),
    ({"rows": [1]}, TypeError, "rows is list, expected a dict"),
    ({"rows": {"up_proj": 0.1}, "columns": {"up_proj": 0.1}}, ValueError, "mean the same weight"),
    ({"rows": {"lm_head": [1]}, "modules": ["lm_head"]}, ValueError, "mean the same weight"),
    ({"add_missing_bias": ["lm_hed"]}, ValueError, "is no linear layer; near: lm_head"),
]


@pytest.mark.parametrize(("what", "error", "message"), BAD)
def test_bad_input_changes_nothing(what, error, message):
    model = llama()
    before, flags = state(model), [p.requires_grad for p in model.parameters()]
    modules = dict(model.named_modules())
    with pytest.raises(error, match=message):
        fastpeft.select(model, **what)
    assert changed(model, before) == set()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert dict(model.named_modules()) == modules
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


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
