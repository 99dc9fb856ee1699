"""The extension of fastpeft/_host.py for this torch, compiled where it is not there; a skip where nothing compiles."""

import functools
import shutil
from pathlib import Path

import pytest
from filelock import FileLock

import fastpeft
from fastpeft import _host


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
