"""The error of every op's kernels against float64 over that of plain PyTorch, as the table of docs/guarantees.md.

    python -m tests.support.ratios [op ...]      (default: every op, a quarter of an hour)

Runs the tests that hold the ratios, in Triton's interpreter where there is no GPU, and prints the largest of each kind.
"""

import argparse
import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpeft import ops, testing

ROOT = Path(__file__).resolve().parents[2]
TESTS = "triton and (less_accurate or no_worse or error_against_float64 or used_in_fp32 or trained_weights)"
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
COLUMNS = ("bfloat16", "bfloat16, float32 weights", "float16", "float16, float32 weights", "float32")
# By op, "forward" or "backward", and column.
FOUND: dict[tuple[str, str, str], list[testing.Ratios]] = collections.defaultdict(list)
_case: list[tuple[str, str]] = []
_original = testing.assert_no_worse


def column(dtype: torch.dtype, others: list[torch.dtype]) -> str:
    """The table's, for an x of this dtype beside weights of the others."""
    return NAMES[dtype] + (", float32 weights" if torch.float32 in others and dtype != torch.float32 else "")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    """What the ratios that follow belong to: the op, and the dtypes of x and of what is trained."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    dtype, form = parameters.get("dtype"), parameters.get("form")
    _case[:] = []
    if dtype in NAMES and parameters.get("backend") == "triton":
        op = form if form in ops.OPS else item.path.parent.name
        _case.append((op, column(dtype, [value for value in parameters.values() if value in NAMES])))


def _recording(fused, eager, exact, name="fused"):
    ratios = _original(fused, eager, exact, name)
    for op, where in _case:
        FOUND[op, "backward" if name.startswith("d") else "forward", where].append(ratios)
    return ratios


def pytest_configure(config):
    """Tests that are collected from here on take the function that records."""
    testing.assert_no_worse = _recording


def pytest_terminal_summary(terminalreporter):
    """The table."""
    line = terminalreporter.line
    line(f"| op | | {' | '.join(COLUMNS)} |")
    line("|---" * (2 + len(COLUMNS)) + "|")
    for op, kind in sorted({key[:2] for key in FOUND}, key=lambda key: (key[0], key[1] != "forward")):
        worst = [testing.accuracy.worst(FOUND[op, kind, c]) if FOUND.get((op, kind, c)) else None for c in COLUMNS]
        cells = ("" if found is None else f"{found.max:.2f}, {found.rms:.2f}" for found in worst)
        line(f"| `{op}` | {kind} | {' | '.join(cells)} |")


def main() -> None:
    folders = {path.parent.name: path.parent for path in sorted((ROOT / "tests/ops").glob("*/test_*.py"))}
    parser = argparse.ArgumentParser(prog="python -m tests.support.ratios", description=__doc__)
    parser.add_argument("op", nargs="*", help=f"folders of tests/ops: {', '.join(folders)} (default: all)")
    chosen = parser.parse_args().op or list(folders)
    for unknown in (op for op in chosen if op not in folders):
        parser.error(f"op is {unknown!r}, expected some of {', '.join(folders)}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.ratios", "-k", TESTS]
    command += [str(folders[op]) for op in chosen]
    sys.exit(subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode)


if __name__ == "__main__":
    main()
