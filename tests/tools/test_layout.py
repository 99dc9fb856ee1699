"""The layout law, read from the source: who may import whom, int64 program ids, no bare assert, no kernels/__init__.py.

Only text is read, so the pre-commit hook runs this where torch is not installed.
"""

import ast
import sys
from pathlib import Path

import pytest

from tests.support.imports import CALL, CHECK, FILES, ROOT, circles, edges, imports, module_name

_OPS = {"ops", "_check", "_library", "_backend", "_plan"}
# A layer (a folder or a file of fastpeft/) and the layers it may import. "" is fastpeft/__init__.py.
MAY_IMPORT = {
    "": {"_bridge"},
    "_bridge": set(),
    "_check": set(),
    "_device": set(),
    "_mask": set(),
    "_host": {"_host_python"},
    "_host_python": {"_host_python"},
    "_tape": set(),
    "_plan": {"_host", "_tape"},
    "_library": {"_check", "_plan"},
    "_backend": {"_check", "_device", "_host", "reference", "kernels", "cuda", "_C"},
    "reference": {"reference", "_mask", "_host"},
    "kernels": {"kernels", "_mask", "_device", "_tape"},
    "cuda": {
        "cuda",
        "kernels",
        "_backend",
        "_mask",
        "_tape",
        "_C",
    },  # steps without a CUDA kernel are the Triton kernels'
    "ops": {*_OPS, "_device", "_mask", "reference", "kernels", "cuda", "_C"},
    "nn": {"nn", "ops", "_check", "_device", "_host"},
    "testing": {"testing", *_OPS, "reference"},
    "methods": {"methods", "nn", "ops", "_check", "_host"},
    "serving": {"serving", "methods", "nn", "ops", "_check"},  # reads the checkpoints that methods write
    "integrations": {"integrations", "methods", "serving", "nn", "ops", "_check", "_host"},
    "cli": {"_host", "methods", "serving", "integrations", "nn", "ops", "testing", "_backend", "_C"},
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
# The front door shows checkers what it hands out at run time.
SHOWN = {"": {"integrations", "methods", "nn", "ops", "reference", "serving", "testing"}}
# Inside a layer: its folders and files, and those of the same layer that each may import. "" is its __init__.py.
INSIDE = {
    "serving": {
        "": {"bank", "engine", "errors"},
        "errors": set(),
        "bank": {"bank", "errors"},
        "engine": {"engine", "bank", "errors"},
        "http": {"http", "engine", "bank", "errors"},
    },
}
# Imports inside functions that would close a circle if they stood above.
LATE = {
    ("fastpeft.integrations.vllm", "fastpeft"),  # the version; the package names its integrations to checkers
}


def layer(module: str) -> str:
    return (module.split(".") + [""])[1]


def part(module: str) -> str:
    """The folder or file inside the layer; "" is the layer's ``__init__.py``."""
    return (module.split(".") + ["", ""])[2]


def broken_imports(path: Path, source: str) -> list[str]:
    own, found = layer(module_name(path)), []
    others = {"torch", *OTHERS.get(own, ())} | ({path.stem} if own == "integrations" else set())
    if own not in MAY_IMPORT:
        return [f"{path}: the law has no layer {own!r}"]
    for line, module, when in imports(path, ast.parse(source)):
        top, target = module.split(".")[0], layer(module)
        if top == "fastpeft":
            allowed = target in MAY_IMPORT[own] or target.startswith("__")
            allowed |= when == CHECK and target in SHOWN.get(own, ())
            package = target
        else:
            allowed = top in sys.stdlib_module_names or top in others
            package = top
        if not allowed:
            found.append(f"{path}:{line}: {own or 'fastpeft'} may not import {module}")
        elif package in ON_FIRST_USE | ALSO_ON_FIRST_USE.get(own, set()) and own != "kernels" and when != CALL:
            found.append(f"{path}:{line}: {module} is imported on first use, inside a function")
    return found


def broken_parts(path: Path, source: str) -> list[str]:
    own = layer(module_name(path))
    law = INSIDE.get(own)
    if law is None:
        return []
    here, found = part(module_name(path)), []
    if here not in law:
        return [f"{path}: the law of {own} has no {here!r}"]
    for line, module, _ in imports(path, ast.parse(source)):
        if module.startswith(f"fastpeft.{own}.") and part(module) not in law[here]:
            found.append(f"{path}:{line}: {own}/{here or '__init__'} may not import {own}/{part(module)}")
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


RULES = [broken_imports, broken_parts, narrow_program_ids, bare_asserts, misnamed]


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
        (
            broken_imports,
            "fastpeft/ops/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import nn",
        ),
        (broken_imports, "fastpeft/testing.py", "from tests import conftest"),
        (broken_imports, "fastpeft/cli.py", "from bench.harness import run"),
        (broken_imports, "fastpeft/cli.py", "import examples.finetune"),
        (broken_imports, "fastpeft/drawer/a.py", "import torch"),
        (broken_parts, "fastpeft/serving/bank/a.py", "def f():\n    from ..engine.batcher import Batcher"),
        (broken_parts, "fastpeft/serving/engine/a.py", "from ..http import service"),
        (broken_parts, "fastpeft/serving/errors.py", "from .bank.bank import AdapterBank"),
        (broken_parts, "fastpeft/serving/bank/a.py", "from fastpeft.serving.http.api import ApiError"),
        (broken_parts, "fastpeft/serving/drawer/a.py", ""),
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
        ("fastpeft/__init__.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .ops import explain"),
        ("fastpeft/serving/http/a.py", "from .. import errors\nfrom ..bank import bank\nfrom . import api"),
    ],
)
def test_law_can_pass(path, source):
    assert [line for rule in RULES for line in rule(Path(path), source)] == []


def test_law_no_circle():
    """Nor one that an import under TYPE_CHECKING or in a function would close, but for those of LATE."""
    whole, late = edges({path: (ROOT / path).read_text() for path in FILES})
    assert circles(whole | (late - LATE)) == []
    assert [edge for edge in LATE if edge not in late or circles(whole | late - (LATE - {edge})) == []] == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("from .b import x", "from . import a"),
        ("from .b import x", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import y"),
        ("from . import b", "def f():\n    from .a import y"),
        ("import fastpeft.nn.b", "import importlib\nimportlib.import_module('fastpeft.nn.a')"),
    ],
)
def test_law_a_circle_is_found(first, second):
    files = {Path("fastpeft/nn/a.py"): first, Path("fastpeft/nn/b.py"): second, Path("fastpeft/nn/__init__.py"): ""}
    whole, late = edges(files)
    assert circles(whole | late) == [["fastpeft.nn.a", "fastpeft.nn.b"]]
    assert circles(edges({**files, Path("fastpeft/nn/b.py"): "import math"})[0]) == []


def test_law_every_kernel_has_its_reference():
    """``<op>.py``, or ``<op>_<part>.py`` of an op whose kernels fill more than a page."""
    kernels = {path.stem for path in FILES if path.parts[0] == "kernels" and "@triton.jit" in (ROOT / path).read_text()}
    ops = {path.stem for path in FILES if path.parts[:2] == ("fastpeft", "reference")}
    shared = {"partials", "planes"}  # of any op: sums of what is cut in parts, products with float32 matrices
    of_ops = {name for name in kernels if name in ops or name.startswith(tuple(f"{op}_" for op in ops))}
    assert kernels - of_ops == shared
