"""The bottleneck config: what it refuses, and the widths that it means."""

import pytest

from fastpeft import Bottleneck
from tests.support.bottlenecks import attached

BAD_CONFIGS = [
    ({"preset": "pfeifer"}, "Bottleneck: preset is 'pfeifer', expected one of seq_bn, double_seq_bn, par_bn"),
    ({"size": 0}, "Bottleneck: size is 0, expected an integer of at least 1"),
    ({"size": 8, "reduction_factor": 2}, "size is 8 beside reduction_factor=2, expected one"),
    ({"reduction_factor": 0}, "reduction_factor is 0, expected a number above 0"),
    ({"reduction_factor": {"1": -2}}, r"reduction_factor\['1'\] is -2"),
    ({"reduction_factor": "16"}, "reduction_factor is '16' .str., expected a finite number"),
    ({"activation": "mish"}, "activation is 'mish', expected one of"),
    ({"scale": "big"}, "scale is 'big', expected one of learned, channel"),
    ({"scale": float("inf")}, "scale is inf"),
    ({"parallel": 1}, "parallel is 1 .int., expected True or False"),
    ({"gating": None}, "gating is None, expected True or False"),
    ({"norm": True}, "norm is True, expected one of None, layer, rms"),
    ({"residual_before_norm": "after"}, "residual_before_norm is 'after', expected one of True, False, post_add"),
    ({"places": ["ffn"]}, "places is 'ffn', expected one of attention, mlp, cross"),
    ({"places": []}, r"places is \(\), expected some of attention"),
    ({"leave_out": [-1]}, r"leave_out is \[-1\]"),
    ({"dropout": 1.0}, r"dropout is 1\.0"),
    ({"stochastic_depth": -1}, "stochastic_depth is -1"),
    ({"init": "kaiming"}, "init is 'kaiming', expected one of bert, mam, houlsby"),
    ({"targets": []}, "targets is empty, expected names, a pattern or a function"),
    ({"targets": 3}, "targets is 3 .int., expected a list of names"),
    ({"targets": "*"}, "targets is '\\*' .str., expected a regular expression"),
    ({"features": "8"}, "features is '8' .str."),
    ({"dtype": "float32"}, "dtype is 'float32'"),
    ({"original_norm_after": False}, "original_norm_after=False would lose the model's residual connection"),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), BAD_CONFIGS)
def test_bad_config(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Bottleneck(**settings)


def test_widths():
    """adapters' rule: rounded down, at least 1."""
    factors = {16: [1, 1, 3], 32: [1, 1, 1], 3: [5, 1, 17], 0.5: [32, 6, 104]}
    for factor, widths in factors.items():
        assert [Bottleneck(reduction_factor=factor).size_of(k, 0) for k in (16, 3, 52)] == widths
    assert Bottleneck(size=7).size_of(16, 0) == 7
    with pytest.raises(ValueError, match="reduction_factor has no entry for layer 3, expected one or 'default'"):
        Bottleneck(reduction_factor={"1": 2}).size_of(16, 3)


def test_every_width_has_a_reduction_factor():
    """AdapterHub has no widths, only factors, and divides by them in floating point."""
    from fastpeft.methods.formats.adapterhub_format import _factor

    for features in (16, 768, 1000):
        for size in range(1, features + 1):
            assert Bottleneck(reduction_factor=_factor(features, size)).size_of(features, 0) == size


def test_post_add_needs_a_norm_after():
    config = Bottleneck(residual_before_norm="post_add")
    attached("bert", config)
    with pytest.raises(ValueError, match=r"'post_add' asks for a norm after the sub-block, which model"):
        attached("llama", config)
