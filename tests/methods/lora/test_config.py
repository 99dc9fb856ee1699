"""The LoRA config: what it refuses, and how."""

import pytest
import torch

from fastpeft import Lora

BAD_CONFIGS = [
    ({"r": 0}, "Lora: r is 0, expected an integer of at least 1"),
    ({"r": 8.0}, "Lora: r is 8.0 .float., expected an integer"),
    ({"r": True}, "Lora: r is True"),
    ({"alpha": float("nan")}, "Lora: alpha is nan, expected a finite number"),
    ({"alpha": "16"}, "Lora: alpha is '16' .str., expected a finite number"),
    ({"dropout": 1}, r"Lora: dropout is 1, expected a number in \[0, 1\)"),
    ({"dropout": float("nan")}, "Lora: dropout is nan"),
    ({"bias": "some"}, "Lora: bias is 'some', expected one of none, all, lora_only"),
    ({"init": "pissa"}, "Lora: init is 'pissa', expected one of kaiming, gaussian, random"),
    ({"targets": []}, r"Lora: targets is \(\)"),
    ({"targets": ""}, "Lora: targets is ''"),
    ({"targets": "*proj"}, r"Lora: targets is '\*proj' \(str\), expected a regular expression"),
    ({"targets": [3]}, "Lora: targets has 3 .int., expected names"),
    ({"targets": 3}, "Lora: targets is 3 .int., expected a list of names"),
    ({"modules_to_save": "score"}, "Lora: modules_to_save is the string 'score', expected a list of names"),
    ({"rank_pattern": {"q": 0}}, r"Lora: rank_pattern\['q'\] is 0"),
    ({"rank_pattern": {"(": 2}}, "Lora: rank_pattern key '\\('"),
    ({"rank_pattern": [2]}, "Lora: rank_pattern is a list of 1, expected a dict"),
    ({"alpha_pattern": {"q": None}}, r"Lora: alpha_pattern\['q'\] is None"),
    ({"layers": [1]}, r"Lora: layers is \[1\] beside targets='all-linear', expected a list of targets"),
    ({"layers": [-1], "targets": ["q"]}, r"Lora: layers is \[-1\]"),
    ({"rslora": 1}, "Lora: rslora is 1 .int., expected True or False"),
    ({"dtype": torch.int8}, r"Lora: dtype is torch\.int8"),
    ({"dtype": "float32"}, "Lora: dtype is 'float32'"),
]


BAD_CONFIGS += [
    ({"targets": "all_linear"}, "Lora: targets is 'all_linear', expected \"all-linear\""),
    ({"targets": "All-Linear"}, "Lora: targets is 'All-Linear', expected \"all-linear\""),
    ({"targets": ["all-linear"]}, "Lora: targets is .'all-linear',., expected \"all-linear\", as a string of its own"),
    ({"alpha": torch.tensor([1.0, 2.0])}, r"Lora: alpha is a Tensor \[2\] of torch\.float32, expected a finite number"),
    ({"alpha": True}, "Lora: alpha is True, expected a finite number"),
    ({"layers": ["1"], "targets": ["q"]}, "Lora: layers has '1' .str., expected integers"),
]


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    config = Lora(
        r=numpy.int64(4), alpha=numpy.float32(2), dropout=numpy.float64(0.5), targets=["q"], layers=numpy.arange(2)
    )
    assert (config.r, config.alpha, config.dropout, config.layers) == (4, 2, 0.5, (0, 1))
    assert {type(value) for value in (config.r, config.alpha, *config.layers)} == {int}


@pytest.mark.parametrize(("settings", "message"), BAD_CONFIGS)
def test_bad_config(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Lora(**settings)
