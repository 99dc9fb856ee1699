"""fastpeft._C for the null GPU: csrc/ linked to the shared CUDA runtime, which the null GPU replaces.

The package's own extension has the runtime inside, which asks a driver for what only NVIDIA knows. Here no kernel ever
runs, so csrc/ is compiled to PTX alone.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build_extension(libraries: Path) -> Path:
    """The folder with ``_C``, made where csrc/ changed.

    Args:
        libraries: the null GPU's, as ``build()`` gives it.

    Raises:
        RuntimeError: there is no nvcc or no pybind11, or csrc/ does not compile.
    """
    sources = sorted(path for path in (ROOT / "csrc").iterdir() if path.suffix not in ("", ".md"))
    key = hashlib.sha256(b"".join(path.read_bytes() for path in (Path(__file__), *sources))).hexdigest()[:16]
    folder = libraries / f"extension-{key}"
    target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _build(folder, libraries, target)
    return folder


def show(folder: Path) -> None:
    """``fastpeft._C`` is the one in ``folder``, in this process.

    Raises:
        RuntimeError: one that was built for a GPU has been imported, and pybind11 loads a module of a name once.
    """
    import fastpeft
    from fastpeft import _backend

    if "fastpeft._C" in sys.modules:
        raise RuntimeError(f"nullgpu: {sys.modules['fastpeft._C'].__file__} was imported before the null GPU's own")
    fastpeft.__path__.insert(0, str(folder))
    _backend._import_error.cache_clear()  # which may know that there was none
    _backend._unusable.cache_clear()


def _build(folder: Path, libraries: Path, target: Path) -> None:
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        import pybind11
    except ImportError:
        raise RuntimeError("nullgpu: pybind11 does not import, expected where csrc/ is built") from None
    headers = [f"-I{place}" for place in (pybind11.get_include(), sysconfig.get_path("include"))]
    hidden = "-fPIC,-fvisibility=hidden"
    objects = []
    for source in sorted((ROOT / "csrc").glob("*.c[up]*")):
        if source.suffix not in (".cu", ".cpp"):
            continue
        objects.append(folder / f"{source.name}.o")
        flags = ["-std=c++17", "-O1", "--expt-relaxed-constexpr", f"-Xcompiler={hidden}", *headers]
        _run(nvcc, *flags, "-gencode=arch=compute_90a,code=compute_90a", "-c", source, "-o", objects[-1])
    partial = folder / "partial.so"
    _run(os.environ.get("CXX", "g++"), "-shared", *objects, libraries / "libcudart.so.13", "-o", partial)
    partial.rename(target)


def _run(*command: str | Path) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise RuntimeError(f"nullgpu: {command[0]} was not found, expected the CUDA toolkit's compiler") from None
    if done.returncode:
        raise RuntimeError(f"nullgpu: {done.stderr or done.stdout}")


if __name__ == "__main__":
    print(build_extension(Path(sys.argv[1])))
