"""The extension of fastpeft/_host.py for this torch, compiled where it is not there; a skip where nothing compiles.

And its form in Python in its place.
"""

import functools
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from filelock import FileLock

import fastpeft
from fastpeft import _host, _host_python, _plan

WAYS = ("C++", "Python")


@contextmanager
def serves(way):
    """One of WAYS behind every op's plans and every layer's guards."""
    found = loaded() if way == "C++" else _host_python
    modules = [module for name, module in sys.modules.items() if name.startswith("fastpeft.ops")]
    calls = {id(f): f for module in modules for f in vars(module).values() if hasattr(f, "plans")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_host, "serving", lambda: found)
        for call in calls.values():
            patch.setattr(call, "plans", _plan.table(call.__wrapped__, found))
        yield


@functools.cache
def loaded():
    """The extension's module."""
    if shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    with FileLock(Path(fastpeft.__file__).with_name("_host.lock")):
        if (_host.missing() or "").startswith("not built"):
            _host.build()
    reason = _host.missing()
    if reason is not None:
        pytest.fail(f"fastpeft's host extension does not serve: {reason}")
    return _host.load()
