"""What is trained in the model's own parameters goes out for a while and comes back: bits, gradients, graphs, hooks."""

import copy

import pytest
import torch
from torch import nn

import fastpeft
from fastpeft import Bottleneck, Lora, Selective
from fastpeft.nn import TokenRows, TrainedCopy
from tests.support.models import close, gpt2, llama, logits
from tests.support.untouched import assert_untouched, snapshot

IN_PLACE = {
    "params": Selective(params=["q_proj.weight", "norm"]),
    "rows": Selective(rows={"up_proj": [0, 3]}, tokens=[3, 7]),
    "biases": Lora(r=2, targets=["q_proj"], bias="all", init="random"),
}
each = pytest.mark.parametrize("config", IN_PLACE.values(), ids=IN_PLACE)


def model_of(config, name="a"):
    torch.manual_seed(1)
    return fastpeft.attach(llama(attention_bias=True), config, name)


@torch.no_grad()
def move(model, by=0.5):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += by * torch.linspace(0.5, 1, parameter.numel()).view(parameter.shape)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@each
def test_gradients_stay_while_adapters_are_disabled(config):
    """As where a reference model is asked between two micro-batches."""
    model = model_of(config)
    move(model)
    logits(model).square().sum().backward()
    expected = gradients(model)
    assert expected
    with fastpeft.disable_adapter(model), torch.no_grad():
        logits(model)
    assert same(gradients(model), expected)
    fastpeft.attach(model, Selective(layers="last:1"), "b")
    assert same(gradients(model), expected)


@each
def test_a_backward_may_come_after_a_block_that_disables(config):
    """The policy's forward, the reference's, then the policy's backward."""
    model = model_of(config)
    move(model)
    logits(model).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    loss = logits(model).square().sum()
    with fastpeft.disable_adapter(model), torch.no_grad():
        logits(model)
    loss.backward()
    assert same(gradients(model), expected)


def test_a_backward_while_others_are_in_the_model_raises():
    model = model_of(IN_PLACE["params"])
    loss = logits(model).square().sum()
    with fastpeft.disable_adapter(model), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    fastpeft.attach(model, Selective(params="q_proj.weight"), "b")
    loss = logits(model).square().sum()
    fastpeft.set_adapter(model, "b")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@torch.no_grad()
@each
def test_switching_inside_a_block_that_disables(config):
    model = model_of(config)
    plain = logits(llama(attention_bias=True))
    move(model)
    first = logits(model)
    fastpeft.attach(model, Selective(layers="last:1"), "b")
    with fastpeft.disable_adapter(model):
        fastpeft.set_adapter(model, "b")
        assert torch.equal(logits(model), plain)
        with fastpeft.disable_adapter(model):
            assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), plain)  # a fresh b
    move(model)
    second = logits(model)
    with fastpeft.disable_adapter(model):
        fastpeft.set_adapter(model, "a")
    assert torch.equal(logits(model), first)
    fastpeft.set_adapter(model, "b")
    assert torch.equal(logits(model), second)


@torch.no_grad()
def test_a_bias_is_added_where_another_adapter_trains_rows():
    """Both act: the rows' layer has the bias, whichever came first, and gives it back."""
    rows, added = Selective(rows={"o_proj": [0, 1]}), Selective(add_missing_bias=True)
    outputs = []
    for first, second in ((rows, added), (added, rows)):
        model = fastpeft.attach(fastpeft.attach(llama(), first, "a"), second, "b")
        fastpeft.set_adapter(model, ["a", "b"])
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += 0.5 if name.endswith("bias") else 0.25
        outputs.append(logits(model))
        fastpeft.set_adapter(model, "a")
        fastpeft.set_adapter(model, ["b", "a"])
        assert torch.equal(logits(model), outputs[-1])
        fastpeft.detach(model)
        assert all(module.bias is None for module in model.modules() if isinstance(module, nn.Linear))
        assert torch.equal(logits(model), logits(llama()))
    assert torch.equal(*outputs)
    assert not close(outputs[0], logits(llama()))


@torch.no_grad()
@pytest.mark.parametrize("make", [llama, gpt2])
def test_rows_of_a_layer_that_lora_adapts(make, tmp_path):
    """They stand inside the LoRA layer, which calls them; each acts alone and both act together."""
    path = "c_fc" if make is gpt2 else "up_proj"
    configs = {"rows": Selective(rows={path: [0, 1]}), "lora": Lora(r=2, targets=[path], init="random")}
    found = {}
    for order in (("rows", "lora"), ("lora", "rows")):
        model = make()
        for name in order:
            torch.manual_seed(1)
            fastpeft.attach(model, configs[name], name)
        fastpeft.set_adapter(model, ["rows", "lora"])
        layers = [p for n, p in model.named_parameters() if n.endswith("trained") and p.requires_grad]
        assert len(layers) == 2
        with torch.enable_grad():
            logits(model).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)
        assert any("rows or columns" in str(row) for row in fastpeft.report(model))
        move(model)
        found[order] = logits(model)
        for name in order:
            fastpeft.save(model, tmp_path / order[0] / name, name)
        again = fastpeft.load(
            fastpeft.load(make(), tmp_path / order[0] / "rows", "rows"), tmp_path / order[0] / "lora", "b"
        )
        fastpeft.set_adapter(again, ["rows", "b"])
        assert close(logits(again), found[order])
        fastpeft.set_adapter(model, "lora")
        fastpeft.merge(model)
        fastpeft.unmerge(model)
        fastpeft.detach(model)
        assert torch.equal(logits(model), logits(make()))
    assert torch.equal(*found.values())


@torch.no_grad()
def test_tokens_of_an_embedding_that_another_adapter_copies():
    """The rows stand inside the copy's wrapper; the copy is made of the original."""
    model = fastpeft.attach(llama(), Selective(tokens=[3]), "a")
    move(model)
    fastpeft.attach(model, Lora(r=2, targets=["q_proj"], modules_to_save=["embed_tokens"]), "b")
    wrapper = model.model.embed_tokens
    assert isinstance(wrapper, TrainedCopy)
    assert isinstance(wrapper.original_module, TokenRows)
    assert torch.equal(wrapper.copies["b"].weight, llama().model.embed_tokens.weight)
    with pytest.raises(ValueError, match="'a' and 'b' both train model.embed_tokens.weight, expected one of them"):
        fastpeft.set_adapter(model, ["a", "b"])


@torch.no_grad()
def test_a_hook_stays_where_rows_come_and_go():
    """What follows a layer, and a hook of the user's, whether the rows are in the model or not."""
    model = fastpeft.attach(llama(), Selective(rows={"up_proj": [0]}), "rows")
    fastpeft.attach(model, Bottleneck(targets=["up_proj"]), "b")
    calls = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    fastpeft.set_adapter(model, "b")
    alone = fastpeft.attach(llama(), Bottleneck(targets=["up_proj"]), "b")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(alone.get_parameter(name))
    assert torch.equal(logits(model), logits(alone))
    fastpeft.set_adapter(model, ["rows", "b"])
    assert torch.equal(logits(model), logits(alone))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([Lora(r=2, bias="all"), Selective(params="bias")], "LoRA and fastpeft.Selective both train model"),
        ([Lora(r=2, targets=["q_proj"], modules_to_save=["lm_head"]), Selective(modules="lm_head")], "lm_head.weight"),
        ([Lora(r=2, targets=["q_proj"], modules_to_save=["embed_tokens"]), Selective(tokens=[1])], "embed_tokens"),
        ([Lora(r=2, targets=["q_proj"], modules_to_save=["mlp"]), Selective(rows={"up_proj": [0]})], "mlp.up_proj"),
        ([Lora(r=2, targets=["q_proj"], modules_to_save=["mlp"]), Selective(add_missing_bias=True)], "proj.bias"),
    ],
)
def test_one_adapter_trains_no_weight_twice(configs, message):
    model = llama(attention_bias=True)
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"both train .*|{message}") as error:
        fastpeft.attach(model, configs)
    assert message in str(error.value)
    assert_untouched(model, before)


@torch.no_grad()
def test_a_prompt_starts_at_the_model_s_own_embedding():
    expected = fastpeft.attach(llama(), fastpeft.PromptTuning(length=2, init="text", text=[3, 7]), "p")
    model = fastpeft.attach(llama(), Selective(modules="embed_tokens"), "a")
    move(model)
    fastpeft.attach(model, fastpeft.PromptTuning(length=2, init="text", text=[3, 7]), "p")
    assert torch.equal(model.fastpeft_prompt.parts["p"], expected.fastpeft_prompt.parts["p"])


@torch.no_grad()
def test_a_prefix_starts_at_what_the_model_itself_makes_of_a_text():
    expected = fastpeft.attach(llama(), fastpeft.PrefixTuning(length=2, init="text", text=[3, 7]), "p")
    model = fastpeft.attach(llama(), [Lora(r=2, init="random"), Selective(params="norm")], "a")
    move(model)
    fastpeft.attach(model, fastpeft.PrefixTuning(length=2, init="text", text=[3, 7]), "p")
    for one, other in zip(*(m.fastpeft_prefix.parts["p"].parameters() for m in (model, expected)), strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
@each
def test_a_resized_vocabulary_and_then_detach(config):
    """The model's own rows are its own again; those that were added stay."""
    model = model_of(Selective(modules=["embed_tokens", "lm_head"], params="norm"))
    own = llama(attention_bias=True)
    move(model)
    fastpeft.attach(model, config, "b")
    model.resize_token_embeddings(len(own.lm_head.weight) + 3, mean_resizing=False)
    with fastpeft.disable_adapter(model):
        assert torch.equal(logits(model)[..., :-3], logits(own))
    fastpeft.set_adapter(model, "b")
    fastpeft.detach(model)
    assert torch.equal(logits(model)[..., :-3], logits(own))


def test_lisa_and_adapters_do_not_train_one_model():
    model = fastpeft.attach(llama(), Selective(params="norm"))
    before = snapshot(model)
    with pytest.raises(ValueError, match="LisaSchedule: the model has adapters, expected a model without"):
        fastpeft.LisaSchedule(model, n_active=1)
    assert_untouched(model, before)
    model = llama()
    schedule = fastpeft.LisaSchedule(model, n_active=1)
    schedule.step()
    fastpeft.attach(model, Lora(r=2))
    for call in (schedule.step, schedule.close):
        with pytest.raises(ValueError, match="the model has adapters, expected a model without; detach them first"):
            call()
    fastpeft.detach(model)
    schedule.close()
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_selection_is_reverted_before_parts_of_the_model_are_attached():
    model = llama()
    selection = fastpeft.select(model, rows={"up_proj": [0]})
    for config, message in (
        (Selective(params="norm"), "has a selection of fastpeft.select; revert it first"),
        (Lora(r=2, targets=["q_proj"], modules_to_save=["mlp"]), "select trains rows of a layer inside"),
    ):
        with pytest.raises(ValueError, match=message):
            fastpeft.attach(model, config)
    selection.revert()
    fastpeft.attach(model, Selective(params="norm"))


@torch.no_grad()
@each
def test_a_copied_model_is_as_good(config):
    model = model_of(config)
    move(model)
    copied, expected = copy.deepcopy(model), logits(model)
    fastpeft.attach(copied, Selective(layers="last:1"), "b")
    assert torch.equal(logits(copied), expected)
    fastpeft.detach(copied)
    assert torch.equal(logits(copied), logits(llama(attention_bias=True)))
    assert torch.equal(logits(model), expected)
