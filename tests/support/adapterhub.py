"""Adapters of AdapterHub's library, which has an environment of its own, on small models."""

import pytest
import torch

from tests.support.models import FAMILIES, build, close, logits

adapters = pytest.importorskip("adapters", reason="adapters is not installed: make test-adapters")

__all__ = ["ALL", "CASES", "PRESETS", "adapters", "bottleneck", "build", "close", "loaded", "logits", "theirs"]

PRESETS = {
    "seq_bn": lambda: adapters.SeqBnConfig(reduction_factor=4),
    "double_seq_bn": lambda: adapters.DoubleSeqBnConfig(reduction_factor=4),
    "par_bn": lambda: adapters.ParBnConfig(),
}


def bottleneck(**settings):
    """A config with adapters after attention and MLP."""
    common = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 4, "non_linearity": "relu"}
    return adapters.BnConfig(**{**common, **settings})


FORMS = {
    "norms and gate": lambda: bottleneck(ln_before=True, ln_after=True, use_gating=True, scaling="learned"),
    "norm after the residual": lambda: bottleneck(
        ln_after=True, adapter_residual_before_ln=True, scaling="channel", original_ln_before=True
    ),
    "residual after the norm": lambda: bottleneck(residual_before_ln=False, original_ln_before=True),
    "residual between": lambda: bottleneck(residual_before_ln="post_add", original_ln_before=True),
    "parallel with norms": lambda: bottleneck(
        is_parallel=True, ln_after=True, ln_before=True, scaling=2.0, use_gating=True
    ),
    "without the norm after": lambda: bottleneck(
        original_ln_after=False, original_ln_before=True, residual_before_ln=False, scaling="channel"
    ),
    "its own norm after instead": lambda: bottleneck(
        original_ln_after=False,
        original_ln_before=True,
        residual_before_ln=False,
        ln_after=True,
        adapter_residual_before_ln=True,
    ),
    "cross and left out": lambda: bottleneck(cross_adapter=True, leave_out=[1], non_linearity="gelu_new"),
    "widths by layer": lambda: bottleneck(reduction_factor={"1": 3, "default": 8}, non_linearity="leakyrelu"),
}
# What the library itself cannot do: it has no residual between where norms come before, and Qwen2 is hooked.
IMPOSSIBLE = {(name, "residual between") for name in FAMILIES if name not in ("bert", "roberta")} | {
    ("qwen2", "without the norm after"),
    ("qwen2", "its own norm after instead"),
}
ALL = {**PRESETS, **FORMS}
CASES = [(name, form) for name in FAMILIES for form in ALL if (name, form) not in IMPOSSIBLE]


def theirs(name: str, config) -> torch.nn.Module:
    """A model of the library whose adapter "a" acts, every parameter of it moved."""
    model = build(name)
    adapters.init(model)
    model.add_adapter("a", config=config)
    model.train_adapter("a")
    torch.manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if "adapters.a." in path:
                parameter.add_(torch.randn(parameter.shape) / 3)
    return model.eval()


def loaded(name, folder, **settings):
    """The library's model with the adapter from a folder active."""
    model = build(name)
    adapters.init(model)
    adapter = model.load_adapter(str(folder), **settings)
    model.set_active_adapters(adapter)
    return model.eval()
