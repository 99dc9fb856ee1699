"""Importing the package: light, in any order, with torch alone, and every public name is there."""

import subprocess
import sys

import pytest

from tests.support.imports import ROOT


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_is_light():
    run("import sys, fastpeft; assert 'torch' not in sys.modules, 'fastpeft imported torch'")


# Each module is the first import of a process of its own, forked after torch was imported once for all.
IMPORT_FIRST = """
import importlib, os, sys, torch
for name in %r:
    child = os.fork()
    if child:
        if os.waitpid(child, 0)[1]:
            sys.exit(f"fastpeft.{name} as the first import failed")
        continue
    importlib.import_module(f"fastpeft.{name}")
    heavy = {"triton", "transformers", "peft", "safetensors", "torch._dynamo", "fastpeft._C"} & set(sys.modules)
    assert not heavy or name in ("kernels.lora_linear", "integrations.peft"), heavy
    assert not torch.cuda.is_initialized(), "CUDA was initialised"
    from fastpeft import methods, nn, ops, testing
    os._exit(0)
"""


def test_import_order_is_free():
    """Whichever module comes first; only a kernel and an integration import the package that they are made for."""
    run(
        IMPORT_FIRST
        % (
            [
                "ops",
                "nn",
                "methods",
                "serving",
                "reference",
                "testing",
                "cli",
                "kernels.lora_linear",
                "integrations.peft",
            ],
        )
    )


def test_works_with_torch_alone():
    blocked = ("triton", "peft", "transformers", "accelerate", "safetensors", "numpy")
    run(f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))  # None: importing it raises ImportError
import torch, fastpeft
x, w, a, b = (torch.ones(s) for s in ((2, 3), (4, 3), (1, 3), (4, 1)))
assert torch.equal(fastpeft.ops.lora_linear(x, w, a, b), torch.full((2, 4), 6.0))
layer = torch.nn.Sequential(torch.nn.Linear(3, 4))
fastpeft.attach(layer, fastpeft.Lora(r=2))
layer(x).sum().backward()
""")


def test_public_names_resolve():
    import fastpeft

    assert {name for name in fastpeft.__all__ if getattr(fastpeft, name, None) is None} == set()
    assert set(fastpeft.__all__) <= set(dir(fastpeft))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fastpeft.nonsense
