"""What errors say of a value: with its type, and never more than fits a line."""

import pytest
import torch

from fastpeft._check import shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "None"),
        (True, "True"),
        (2, "2 (int)"),
        ("2.0", "'2.0' (str)"),
        (torch.tensor(2.0), "tensor(2.) (Tensor)"),
        (torch.ones(2, 3), "a Tensor [2, 3] of torch.float32"),
        ([0] * 1_000_000, "a list of 1000000"),
        ({"a": 1}, "a dict of 1"),
        (list, "<class 'list'> (type)"),
    ],
)
def test_a_value_is_shown_with_its_type(value, text):
    assert shown(value) == text


@pytest.mark.parametrize("value", ["x" * 10_000, b"x" * 10_000, type("Long", (), {"__repr__": lambda _: "y" * 999})()])
def test_nothing_is_shown_whole_that_is_long(value):
    assert len(shown(value)) < 100
