"""fastpeft._C as an isolated installation builds it, once a session: pip's hooks, and nothing else to import."""

import functools
import importlib.util
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.support import session

ROOT = Path(__file__).resolve().parents[2]
BUILD_REQUIRES = ("setuptools", "pybind11", "ninja")  # and no torch: the `requires` of pyproject.toml


class Built(NamedTuple):
    """The wheel, unpacked; its extension; seconds of processor time; and what nvcc said of each file of csrc/."""

    site: Path
    extension: Path
    seconds: float
    said: dict[str, str]


def missing() -> str | None:
    """Why nothing can be built here, or None."""
    if not shutil.which("nvcc") and not Path("/usr/local/cuda/bin/nvcc").is_file():
        return "no nvcc"
    absent = [name for name in BUILD_REQUIRES if importlib.util.find_spec(name) is None]
    return f"{absent[0]} is not installed" if absent else None


def checkout(to: Path) -> Path:
    """A copy of what a build needs."""
    for name in ("fastpeft", "kernels", "csrc"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    return to


def isolated(to: Path) -> Path:
    """A folder with the build's requirements alone, as pip makes one."""
    to.mkdir()
    for name in (*BUILD_REQUIRES, "_distutils_hack"):  # the last is setuptools' own
        origin = Path(importlib.util.find_spec(name).origin).parent
        (to / name).symlink_to(origin)
        for info in origin.parent.glob(f"{name}-*.dist-info"):
            (to / info.name).symlink_to(info)
    return to


def wheel(source: Path, out: Path, requirements: Path, **variables: str) -> tuple[Path, str]:
    """The wheel that pip would build, and what was said meanwhile; RuntimeError where there is none."""
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(out)!r}))"
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "CUDA_"))}
    env |= {"PYTHONPATH": str(requirements)} | variables
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=source, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return out / done.stdout.splitlines()[-1], done.stdout + done.stderr


def _build(folder: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    path, _ = wheel(checkout(folder / "source"), folder, isolated(folder / "requirements"))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    shutil.unpack_archive(path, folder / "site", "zip")
    (folder / "seconds").write_text(str(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))


@functools.cache
def built() -> Built:
    """Build it, once a session."""
    folder = session.once("cuda-extension", _build)
    (extension,) = (folder / "site" / "fastpeft").glob("_C.*.so")
    said = {log.name.removesuffix(".o.log"): log.read_text() for log in (folder / "source" / "build").rglob("*.log")}
    return Built(folder / "site", extension, float((folder / "seconds").read_text()), said)


def cuobjdump(*arguments: str) -> str:
    """Of the one that Triton brings along."""
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments, built().extension], capture_output=True, text=True, check=True).stdout


def functions(text: str) -> dict[str, str]:
    """What cuobjdump says of each function, by its mangled name."""
    parts = re.split(r"^\s*Function\s*:?\s+(\w+):?\s*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))
