"""``fastpeft._host_<torch's version>_<its sources>``: C++ that runs calls that repeat without Python. See ``_plan.py``.

It is compiled against one version of torch and serves that one alone, so it comes in no wheel: ``fastpeft build``
compiles it where it will run, in about a minute, and several versions lie side by side. One that was compiled from
other sources, as those of an earlier release, is not found. Where none is, ``_host_python`` serves in its place.
"""

import functools
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import _host_python

_PACKAGE = Path(__file__).resolve().parent
_SOURCES = (_PACKAGE / "csrc", _PACKAGE.parent / "csrc/host")  # in an installed package; in a checkout
_FLAGS = ["-O3", "-ffp-contract=off"]  # multiply-adds are rounded twice, as in PyTorch's operators


@functools.cache
def name() -> str:
    """The extension's module for this torch and these sources, without the package."""
    sources = hashlib.sha256(repr(_FLAGS).encode())
    for path in sorted(p for p in _folder().glob("*") if p.suffix in (".cpp", ".h")):
        sources.update(path.name.encode() + path.read_bytes())
    return "_host_" + re.sub(r"\W", "_", f"{torch.__version__}_{sources.hexdigest()[:8]}")


def _folder() -> Path:
    """Where the sources are, or would be."""
    return next((folder for folder in _SOURCES if folder.is_dir()), _SOURCES[0])


@functools.cache
def missing() -> str | None:
    """None when the extension serves, else the reason."""
    if os.environ.get("FASTPEFT_HOST") in ("0", "python"):
        return f"left out by FASTPEFT_HOST={os.environ['FASTPEFT_HOST']}"
    if importlib.util.find_spec(f"fastpeft.{name()}") is None:
        return f"not built for torch {torch.__version__} (fastpeft build, which needs ninja and a C++ compiler)"
    try:
        importlib.import_module(f"fastpeft.{name()}")
    except ImportError as error:
        return f"built, but does not load: {error}"
    return None


@functools.cache
def load() -> ModuleType | None:
    """The extension, or None where it does not serve."""
    return importlib.import_module(f"fastpeft.{name()}") if missing() is None else None


@functools.cache
def serving() -> ModuleType | None:
    """The extension, or where it does not serve its form in Python; None under ``FASTPEFT_HOST=0``."""
    return None if os.environ.get("FASTPEFT_HOST") == "0" else load() or _host_python


def described() -> str:
    """What runs calls that repeat, and why nothing faster does."""
    if load() is not None:
        return "the extension"
    return f"{'plans in Python' if serving() else 'no plans'}, since the extension is {missing()}"


def guards() -> Any:
    """``Guards`` of nothing yet, or None where nothing serves."""
    found = serving()
    return None if found is None else found.Guards()


def build(verbose: bool = False) -> Path:
    """Compile the extension for the torch that is installed and return its file, in the package's folder.

    Args:
        verbose: whether to show what the compiler is told.

    Raises:
        RuntimeError: the sources, ninja or a C++ compiler are missing, or it does not compile; the error says which.
    """
    from torch.utils import cpp_extension

    sources = sorted(map(str, _folder().glob("*.cpp")))
    if not sources:
        raise RuntimeError(f"fastpeft build: no sources in {' or '.join(map(str, _SOURCES))}")
    target = _PACKAGE / f"{name()}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with tempfile.TemporaryDirectory() as folder:
        cpp_extension.load(
            name(),
            sources,
            build_directory=folder,
            extra_cflags=_FLAGS,
            with_cuda=False,
            is_python_module=False,
            verbose=verbose,
        )
        part = target.with_suffix(".part")
        shutil.copyfile(Path(folder, f"{name()}.so"), part)
        part.replace(target)  # whoever imports meanwhile finds the old one or the new one
    importlib.invalidate_caches()
    missing.cache_clear()
    load.cache_clear()
    serving.cache_clear()
    return target
