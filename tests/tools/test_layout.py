"""The layout law, read from the source: who may import whom, int64 program ids, no bare assert, no kernels/__init__.py.

The tests named "law" read text only, so the pre-commit hook runs them where torch is not installed.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.relative_to(ROOT) for folder in ("fastpeft", "kernels") for path in (ROOT / folder).rglob("*.py"))

_OPS = {"ops", "_check", "_library", "_backend"}
# A layer (a folder or a file of fastpeft/) and the layers it may import. "" is fastpeft/__init__.py.
MAY_IMPORT = {
    "": {"_bridge"},
    "_bridge": set(),
    "_check": set(),
    "_library": {"_check"},
    "_backend": {"_check", "reference", "kernels", "cuda", "_C"},
    "reference": {"reference"},
    "kernels": {"kernels"},
    "cuda": {"cuda", "kernels", "_backend", "_C"},  # steps without a CUDA kernel are the Triton kernels'
    "ops": {*_OPS, "reference", "kernels", "cuda", "_C"},
    "nn": {"nn", "ops", "_check"},
    "testing": {"testing", *_OPS, "reference"},
    "methods": {"methods", "nn", "ops", "_check"},
    "serving": {"serving", "methods", "nn", "ops", "_check"},  # reads the checkpoints that methods write
    "integrations": {"integrations", "methods", "serving", "nn", "ops", "_check"},
    "cli": {"methods", "serving", "integrations", "nn", "ops", "testing", "_backend", "_C"},
}
# Packages that are not ours, beside torch. An integration may also import the package it is named after.
OTHERS = {
    "kernels": {"triton"},
    "_backend": {"triton"},
    "methods": {"safetensors", "transformers"},  # the latter to register the attention function of prefix tuning
    "serving": {"fastapi", "prometheus_client", "pydantic", "starlette", "transformers", "uvicorn"},
    "integrations": {"transformers"},
}
# Imported on first use only, inside a function, except where the layer is made of it.
ON_FIRST_USE = {"triton", "kernels", "_C", "safetensors"}
ALSO_ON_FIRST_USE = {"methods": {"transformers"}}


def module_name(path: Path) -> str:
    """kernels/a.py -> fastpeft.kernels.a; fastpeft/ops/__init__.py -> fastpeft.ops."""
    parts = path.with_suffix("").parts
    parts = ("fastpeft", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> str:
    return (module.split(".") + [""])[1]


def imports(path: Path, tree: ast.Module):
    """(line, module, whether inside a function) of every import, with relative names resolved."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    if path == Path("fastpeft/__init__.py"):  # names for type checkers; at run time they are loaded on first use
        tree.body = [n for n in tree.body if not (isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")]
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.Lambda) for n in ast.walk(f)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "fastpeft" else [base]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        for name in names:
            yield node.lineno, name, id(node) in inside


def broken_imports(path: Path, source: str) -> list[str]:
    own, found = layer(module_name(path)), []
    others = {"torch", *OTHERS.get(own, ())} | ({path.stem} if own == "integrations" else set())
    if own not in MAY_IMPORT:
        return [f"{path}: the law has no layer {own!r}"]
    for line, module, inside in imports(path, ast.parse(source)):
        top, target = module.split(".")[0], layer(module)
        if top == "fastpeft":
            allowed = target in MAY_IMPORT[own] or target.startswith("__")
            package = target
        else:
            allowed = top in sys.stdlib_module_names or top in others
            package = top
        if not allowed:
            found.append(f"{path}:{line}: {own or 'fastpeft'} may not import {module}")
        elif package in ON_FIRST_USE | ALSO_ON_FIRST_USE.get(own, set()) and own != "kernels" and not inside:
            found.append(f"{path}:{line}: {module} is imported on first use, inside a function")
    return found


def narrow_program_ids(path: Path, source: str) -> list[str]:
    tree, wide, ids = ast.parse(source), set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr == "program_id":
                ids[id(node)] = node.lineno
            elif node.func.attr == "to" and [ast.unparse(a) for a in node.args] == ["tl.int64"]:
                wide.add(id(node.func.value))
    return [f"{path}:{line}: tl.program_id without .to(tl.int64)" for key, line in ids.items() if key not in wide]


def bare_asserts(path: Path, source: str) -> list[str]:
    lines = [node.lineno for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assert)]
    return [f"{path}:{line}: bare assert; raise an error that names the argument" for line in lines]


def misnamed(path: Path, source: str) -> list[str]:
    if path.parts[0] == "kernels" and path.name == "__init__.py":
        return [f"{path}: transformers would import this folder as the package called kernels"]
    if path.stem in {"utils", "common", "helpers", "misc"}:
        return [f"{path}: a drawer; name the file after what it holds"]
    return []


RULES = [broken_imports, narrow_program_ids, bare_asserts, misnamed]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_law(rule):
    assert FILES, "nothing was read"
    assert [line for path in FILES for line in rule(path, (ROOT / path).read_text())] == []


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (broken_imports, "kernels/a.py", "from fastpeft.reference import a"),
        (broken_imports, "kernels/a.py", "from ..reference.a import keep_mask"),
        (broken_imports, "kernels/a.py", "import numpy"),
        (broken_imports, "fastpeft/reference/a.py", "def f():\n    from .. import ops"),
        (broken_imports, "fastpeft/reference/a.py", "import importlib\nimportlib.import_module('fastpeft.kernels.a')"),
        (broken_imports, "fastpeft/reference/a.py", "import triton"),
        (broken_imports, "fastpeft/ops/a.py", "from fastpeft.kernels import a"),
        (broken_imports, "fastpeft/ops/a.py", "from .. import nn"),
        (broken_imports, "fastpeft/ops/a.py", "import triton"),
        (broken_imports, "fastpeft/_backend.py", "import triton"),
        (broken_imports, "fastpeft/nn/a.py", "from fastpeft.methods.lora.config import Lora"),
        (broken_imports, "fastpeft/methods/a.py", "def f():\n    import peft"),
        (broken_imports, "fastpeft/methods/a.py", "from safetensors.torch import save_file"),
        (broken_imports, "fastpeft/methods/a.py", "from transformers import AttentionInterface"),
        (broken_imports, "fastpeft/methods/a.py", "from ..integrations import peft"),
        (broken_imports, "fastpeft/methods/a.py", "from ..serving import AdapterBank"),
        (broken_imports, "fastpeft/integrations/peft.py", "import vllm"),
        (broken_imports, "fastpeft/__init__.py", "from .ops import lora_linear"),
        (broken_imports, "fastpeft/testing.py", "from tests import conftest"),
        (broken_imports, "fastpeft/cli.py", "from bench.harness import run"),
        (broken_imports, "fastpeft/cli.py", "import examples.finetune"),
        (broken_imports, "fastpeft/drawer/a.py", "import torch"),
        (narrow_program_ids, "kernels/a.py", "pid = tl.program_id(0)"),
        (narrow_program_ids, "kernels/a.py", "pid = tl.program_id(0).to(tl.int32)"),
        (narrow_program_ids, "kernels/a.py", "m = tl.program_id(0) * 8 + tl.program_id(1).to(tl.int64)"),
        (bare_asserts, "fastpeft/ops/a.py", "def f(x):\n    assert x.is_contiguous()"),
        (misnamed, "kernels/__init__.py", ""),
        (misnamed, "fastpeft/utils.py", ""),
    ],
)
def test_law_can_fail(rule, path, source):
    assert len(rule(Path(path), source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/a.py", "import triton.language as tl\nfrom . import b\npid = tl.program_id(0).to(tl.int64)"),
        ("fastpeft/ops/a.py", "import math\nfrom .. import _check\ndef f():\n    from ..kernels import a"),
        ("fastpeft/integrations/peft.py", "import peft\nfrom peft.tuners import lora\nfrom ..nn import LoraLinear"),
        ("fastpeft/cli.py", "from . import __version__\nimport torch"),
    ],
)
def test_law_can_pass(path, source):
    assert [line for rule in RULES for line in rule(Path(path), source)] == []


def test_law_every_kernel_has_its_reference():
    """``<op>.py``, or ``<op>_<part>.py`` of an op whose kernels fill more than a page."""
    kernels = {path.stem for path in FILES if path.parts[0] == "kernels" and "@triton.jit" in (ROOT / path).read_text()}
    ops = {path.stem for path in FILES if path.parts[:2] == ("fastpeft", "reference")}
    assert [name for name in kernels if name not in ops and not name.startswith(tuple(f"{op}_" for op in ops))] == []


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
