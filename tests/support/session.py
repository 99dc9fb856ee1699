"""Folders that one session of tests makes once, whichever of its processes asks first."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

_VARIABLE = "FASTPEFT_TEST_SESSION"  # where the folders are; the workers of xdist inherit it


def begin() -> None:
    """Called by the process that starts the others, before it does."""
    os.environ[_VARIABLE] = tempfile.mkdtemp(prefix="fastpeft-tests-")


def end() -> None:
    shutil.rmtree(os.environ.pop(_VARIABLE), ignore_errors=True)


def once(name: str, make: Callable[[Path], object]) -> Path:
    """The folder called ``name``, which ``make(folder)`` has filled in this process or in another.

    Who asks meanwhile waits. Where ``make`` raises, the next one that asks tries again.
    """
    folder = Path(os.environ[_VARIABLE], name)
    complete = folder.with_name(f"{name}.complete")
    with FileLock(folder.with_name(f"{name}.lock")):
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            complete.touch()
    return folder
