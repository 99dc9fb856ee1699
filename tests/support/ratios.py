"""The error of every op's kernels against float64 over that of plain PyTorch, dtype by dtype, as one table.

    python -m tests.support.ratios [tests ...]      (default: the accuracy tests of all ops)

Runs the tests that hold the ratios, in Triton's interpreter where there is no GPU, and prints the largest of each kind.
"""

import collections
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastpeft import testing

ROOT = Path(__file__).resolve().parents[2]
FOUND: dict[tuple[str, str], dict[str, list]] = collections.defaultdict(lambda: collections.defaultdict(list))
NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_case: list[tuple[str, str]] = []
_original = testing.assert_no_worse


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item):
    """What the ratios that follow belong to: the op, and the dtypes of x and of what is trained."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    op, dtype = item.path.parent.name, parameters.get("dtype")
    _case[:] = []
    if dtype in NAMES and parameters.get("backend") == "triton":
        others = [value for name, value in parameters.items() if name != "dtype" and value in list(NAMES)]
        wide = bool(parameters.get("wide")) or torch.float32 in others
        trained = ", float32 weights" if wide and dtype != torch.float32 else ""
        _case.append((op, NAMES[dtype] + trained))


def _recording(fused, eager, exact, name="fused"):
    ratios = _original(fused, eager, exact, name)
    if _case:
        FOUND[_case[0]]["backward" if name.startswith("d") else "forward"].append(ratios)
    return ratios


def pytest_configure(config):
    """Tests that are collected from here on take the function that records."""
    testing.assert_no_worse = _recording


def pytest_terminal_summary(terminalreporter):
    """The table."""
    line = terminalreporter.line
    line("| op | dtype | forward, max | rms | backward, max | rms |")
    line("|---|---|---|---|---|---|")
    for (op, dtype), kinds in sorted(FOUND.items()):
        cells = []
        for kind in ("forward", "backward"):
            found = kinds[kind]
            cells += [f"{max(getattr(r, part) for r in found):.2f}" if found else "" for part in ("max", "rms")]
        line(f"| `{op}` | {dtype} | {' | '.join(cells)} |")


def main() -> None:
    tests = sys.argv[1:] or sorted(str(path) for path in (ROOT / "tests/ops").glob("*/test_*.py"))
    chosen = "triton and (no_less_accurate or no_worse or float64)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.support.ratios", "-k", chosen, *tests]
    sys.exit(subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode)


if __name__ == "__main__":
    main()
