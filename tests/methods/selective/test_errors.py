"""What cannot be selected: the error says why, and the model is as it was."""

import pytest

import fastpeft
from tests.support.selections import changed, llama, state

BAD = [
    ({}, ValueError, "nothing is selected"),
    ({"layers": "last:7"}, ValueError, "layers is 'last:7', expected 1 to 6 blocks"),
    ({"layers": 6}, ValueError, "layers has 6, which is none of 6 blocks"),
    ({"layers": "layers.9"}, ValueError, "layers has 'layers.9', which is none of 6 blocks; near: model.layers.5"),
    ({"layers": 1.5}, ValueError, "layers is 1.5 .float., expected numbers, names"),
    ({"layers": [True]}, ValueError, "layers is True, expected numbers, names"),
    ({"layers": 0, "blocks": "model.layer"}, ValueError, r"blocks is 'model.layer', .*\(model.layers\)"),
    ({"params": ["bias"]}, ValueError, "params has 'bias', but no parameter is one: add_missing_bias=True gives"),
    ({"params": ["bias"], "layers": 0}, ValueError, r"but no parameter in layers=0 is one: add_missing_bias=True"),
    ({"params": ["biases"]}, ValueError, "params has 'biases', which is no parameter; near: bias"),
    ({"params": "norms"}, ValueError, "params has 'norms', which is no parameter; near: norm"),
    ({"rows": {"up_proj": 1}}, ValueError, "is 1 .int., expected a fraction in .0, 1., or numbers in a list"),
    ({"params": ["q_prj.weight"]}, ValueError, "which is no parameter; near: .*q_proj.weight"),
    ({"params": [1]}, TypeError, "params has 1 .int., expected names"),
    ({"modules": ["lm_hed"]}, ValueError, "modules has 'lm_hed', which is no module; near: lm_head"),
    ({"modules": ["act_fn"]}, ValueError, "modules has 'act_fn', which has no parameters"),
    ({"tokens": [96]}, ValueError, r"tokens has 96, expected integers in \[0, 96\)"),
    ({"tokens": [1.5]}, TypeError, "tokens has 1.5 .float., expected integers"),
    ({"tokens": {"lm_head": [1]}}, TypeError, "tokens names lm_head, which is a Linear"),
    ({"rows": {"up_prj": 0.1}}, ValueError, "rows has 'up_prj', which is no linear layer; near: .*up_proj"),
    ({"rows": {"norm": 0.1}}, TypeError, "rows names model.norm, which is a LlamaRMSNorm"),
    ({"rows": {"up_proj": 1.5}}, ValueError, "is 1.5 .float., expected a fraction"),
    ({"rows": {"up_proj": [64]}}, ValueError, r"rows\['up_proj'\] has 64"),
    ({"rows": [1]}, TypeError, "rows is a list of 1, expected a dict"),
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
