"""The table of error ratios: what stands in which column, and the largest of each."""

import torch

from fastpeft.testing import Ratios
from tests.support import ratios

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def test_the_column_is_that_of_the_weights():
    pairs = [(BF16, BF16), (BF16, FP32), (FP16, FP16), (FP16, FP32), (FP32, FP32)]
    assert tuple(ratios.column(x, [x, weights]) for x, weights in pairs) == ratios.COLUMNS


def test_the_largest_of_each(monkeypatch):
    lines = []
    found = {("op", "forward", "float32"): [Ratios(1.5, 0.1), Ratios(0.2, 1.1)], ("op", "backward", "float16"): []}
    monkeypatch.setattr(ratios, "FOUND", found)
    reporter = type("Reporter", (), {"line": staticmethod(lines.append)})
    ratios.pytest_terminal_summary(reporter)
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert lines[2:] == ["| `op` | forward |  |  |  |  | 1.50, 1.10 |", "| `op` | backward |  |  |  |  |  |"]
