"""What an editor and a type checker see of the package: a user's program without an error, and their mistakes found."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastpeft

pytest.importorskip("mypy", reason="mypy is not installed: pip install 'fastpeft[test]'")
ROOT = Path(__file__).resolve().parents[2]

USER = """
from pathlib import Path

import torch
from torch import nn

import fastpeft


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(x).relu())


def main(folder: Path) -> float:
    model = fastpeft.attach(Model(), fastpeft.Lora(r=4, alpha=8, dropout=0.1))
    fastpeft.attach(model, [fastpeft.Bottleneck("seq_bn"), fastpeft.PromptTuning(length=2)], name="second")
    fastpeft.set_adapter(model, "default")
    with fastpeft.disable_adapter(model):
        frozen: torch.Tensor = model(torch.ones(2, 8))
    x, w, a, b = torch.ones(2, 3), torch.ones(4, 3), torch.ones(1, 3), torch.ones(4, 1)
    y: torch.Tensor = fastpeft.ops.lora_linear(x, w, a, b, scale=2.0)
    report = fastpeft.report(model)
    print(report, report.fused, fastpeft.explain("lora_linear", x, w, a, b))
    fastpeft.accelerate(model, strict=True)
    layer = fastpeft.nn.LoraLinear(nn.Linear(8, 8), r=4)
    bank = fastpeft.serving.AdapterBank(model, slots=8, max_rank=64)
    fastpeft.save(model, folder)
    return (y.sum() + frozen.sum() + layer(x).sum()).item() + bank.slots
"""
# A line of a program, and the checker's rule that it breaks.
MISTAKES = {
    "fastpeft.Lora(rank=16)": "call-arg",
    "fastpeft.Lora(r='16')": "arg-type",
    "fastpeft.atach": "attr-defined",
    "fastpeft.attach('model', fastpeft.Lora())": "arg-type",
    "fastpeft.select(nn.Linear(1, 1), layer='last:2')": "call-arg",
    "fastpeft.nn.LoraLinear(nn.Linear(1, 1), rank=4)": "call-arg",
    "fastpeft.integrations.transformers.nonsense": "attr-defined",
    "fastpeft.ops.lora_linear(1, 2, 3, 4)": "arg-type",
}


def check(folder: Path, source: str) -> dict[int, set[str]]:
    """The rules broken on each line of a program in a folder of its own, as its user's checker would see it."""
    (folder / "program.py").write_text(source)
    # With the package's own settings and cache, so that what the package's check has read is not read again.
    options = ["--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache", "--no-pretty"]
    command = [sys.executable, "-m", "mypy", *options, "program.py"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, "MYPYPATH": str(ROOT)}
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found: dict[int, set[str]] = {}
    for line, rule in re.findall(r"^program\.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.M):
        found.setdefault(int(line), set()).add(rule)
    return found


@pytest.mark.slow
def test_a_user_s_program(tmp_path):
    """One program without an error and one of errors alone, in one run of the checker."""
    last = USER.count("\n")
    found = check(tmp_path, USER + "".join(f"{line}\n" for line in MISTAKES))
    assert {line: rules for line, rules in found.items() if line <= last} == {}
    assert {line: found.get(last + 1 + i) for i, line in enumerate(MISTAKES)} == {k: {v} for k, v in MISTAKES.items()}


def test_checkers_see_the_names_that_there_are():
    """The imports under TYPE_CHECKING and the table of what is loaded on first use are one list."""
    tree = ast.parse((ROOT / "fastpeft" / "__init__.py").read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    seen = {}
    for node in guarded.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "only `import a as a` shows a name to those who import the package"
            seen[alias.name] = node.module
    assert seen == {**dict.fromkeys(fastpeft._MODULES), **fastpeft._HOME}
    assert list(fastpeft._HOME) == sorted(fastpeft._HOME)
