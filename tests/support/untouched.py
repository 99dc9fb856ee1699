"""What a model is made of, so that a test can tell whether anything of it was changed."""

import torch


def snapshot(model):
    """Modules, hooks, values and flags of parameters, attributes of the model itself."""
    modules = {path: id(module) for path, module in model.named_modules()}
    hooks = [
        (path, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs))
        for path, m in model.named_modules()
    ]
    values = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    own = {key: value for key, value in model.__dict__.items() if not key.startswith("_")}
    return (modules, hooks, repr(model), own), values


def assert_untouched(model, before):
    """The model is what it was when ``before`` was taken of it, to the bit."""
    rest, values = snapshot(model)
    assert rest == before[0]
    assert values.keys() == before[1].keys()
    for name, (identity, flag, value) in values.items():
        assert (identity, flag) == before[1][name][:2], name
        assert torch.equal(value, before[1][name][2]), name
