"""pytest plugin: our forward in every bottleneck adapter that AdapterHub's tests add, every call compared with theirs.

FASTPEFT_SUITE is vanilla (nothing of ours) or accelerate (after every added adapter). FASTPEFT_SUITE_OUT is the folder
that is written to.
"""

import copy
import os

import torch
from comparison import WRONG, Comparisons
from outcomes import pytest_runtest_logreport, stand_in, write_outcomes

_MODE = os.environ["FASTPEFT_SUITE"]
_COMPARED = Comparisons()

__all__ = ["pytest_runtest_logreport"]


def pytest_configure(config):
    stand_in("datasets")
    if _MODE != "vanilla":
        _fuse_everywhere()


def pytest_sessionfinish(session):
    _COMPARED.write()
    write_outcomes(session)


def _fuse_everywhere():
    from adapters.methods.modeling import Adapter
    from adapters.model_mixin import ModelAdaptersMixin

    import fastpeft
    from fastpeft.integrations import adapters as integration

    add, load = ModelAdaptersMixin.add_adapter, ModelAdaptersMixin.load_adapter
    plan, forward = integration.plan, integration._Fused.forward

    def accelerated(method):
        def called(self, *args, **kwargs):
            done = method(self, *args, **kwargs)
            if any(isinstance(module, Adapter) for module in self.modules()):
                fastpeft.accelerate(self)
            return done

        return called

    def compared(self, x, residual_input, output_gating=False):
        y = forward(self, x, residual_input, output_gating=output_gating)
        if _COMPARED.busy or output_gating:
            return y
        reason = plan(self, x)
        _COMPARED.counts["fused" if reason is None else reason] += 1
        if reason is None and x.numel() and (self.training is False or not _draws(self)):
            _COMPARED.busy = True
            try:
                _compare(self, x, residual_input, forward)
            finally:
                _COMPARED.busy = False
        return y

    ModelAdaptersMixin.add_adapter, ModelAdaptersMixin.load_adapter = accelerated(add), accelerated(load)
    integration._Fused.forward = compared


def _draws(layer):
    return layer.dropout.p > 0 or hasattr(layer, "DropPath")


def _compare(layer, x, residual, forward):
    """With what is trained made random where it is zero."""
    theirs = next(kind for kind in type(layer).__mro__ if kind.__module__ == "adapters.methods.modeling")
    names = [name for name, _ in layer.named_parameters()]
    generator = torch.Generator().manual_seed(1)
    values = [p.detach() for p in layer.parameters()]
    values = [v if v.any() else (torch.randn(v.shape, generator=generator) / 4).to(v) for v in values]
    length = max(max(v.shape) for v in values if v.dim()) * 2 + x.numel() // x.shape[-1]

    def run(module, call, factor=1.0):
        class Called(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = module

            def forward(self, x, residual):
                return call(self.inner, x, residual)[0]

        called = Called()

        def computed(leaves):
            given = dict(zip([f"inner.{name}" for name in names], leaves[2:], strict=True))
            given["inner.adapter_up.weight"] = given["inner.adapter_up.weight"] * factor
            return torch.func.functional_call(called, given, (leaves[0], leaves[1]))

        return computed

    wide = copy.deepcopy(layer).double()
    wide.__class__ = theirs
    fused, own = run(layer, forward, WRONG), run(layer, theirs.forward)
    what = os.environ.get("PYTEST_CURRENT_TEST", "")
    _COMPARED.compare(what, fused, own, [x, residual, *values], length, truth=run(wide, theirs.forward))
