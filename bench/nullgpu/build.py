"""Builds the four libraries of the null GPU for one installation of PyTorch; again where a source changed.

Every symbol that the real library shows is shown: what src/ does not implement counts as missing and gives an error.
The driver's names come from its header, since a machine without a GPU has no driver.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
LIBRARIES = {
    "libcudart.so.13": ["state", "memory", "streams", "capture", "runtime"],
    "libcublas.so.13": ["cublas"],
    "libcublasLt.so.13": ["cublaslt"],
    "libcuda.so.1": ["driver"],
}
FLAGS = ["-O2", "-fPIC", "-fvisibility=hidden", "-fno-builtin", "-Wall", "-Werror", "-std=gnu17"]
# No kernel runs, so none is assembled: Triton compiles down to PTX, and gets a file for its cubin.
ASSEMBLER = """#!/bin/sh
if [ "$1" = --version ]; then exec '{ptxas}' --version; fi
while [ $# -gt 1 ]; do
  if [ "$1" = -o ]; then echo none >"$2"; fi
  shift
done
"""
MISSING = '__attribute__((visibility("default"))) int {0}(void) {{ return nullgpu_missing("{0}"); }}\n'


def toolkit() -> Path:
    """The folder of NVIDIA's wheels that PyTorch's CUDA build brings: headers, and the libraries to replace."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place, "cu13") for place in (spec.submodule_search_locations if spec else ())]
    found = next((folder for folder in folders if (folder / "lib/libcudart.so.13").is_file()), None)
    if found is None:
        raise RuntimeError("nullgpu: no nvidia/cu13/lib, expected PyTorch's build for CUDA 13")
    if not (found / "include/crt/host_defines.h").is_file():
        raise RuntimeError(f"nullgpu: {found}/include has no crt/, expected NVIDIA's wheel nvidia-cuda-crt")
    return found


def build() -> Path:
    """The folder of the libraries, made where it is not there yet."""
    cuda = toolkit()
    sources = [Path(__file__), *sorted(SOURCES.iterdir())]
    key = hashlib.sha256(b"".join([str(cuda).encode(), *(path.read_bytes() for path in sources)])).hexdigest()[:16]
    place = Path(__file__).parents[2] / "build" / "nullgpu"
    place.mkdir(parents=True, exist_ok=True)
    with (place / "lock").open("w") as lock:  # several processes may start at once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / key / "ready").is_file():
            shutil.rmtree(place / key, ignore_errors=True)
            _build(cuda, place / key)
            (place / key / "ready").touch()
    return place / key


def _build(cuda: Path, out: Path) -> None:
    out.mkdir()
    runtime = out / "libcudart.so.13"  # the first: the others link to it
    for library, names in LIBRARIES.items():
        objects = [_compile(cuda, out, SOURCES / f"{name}.c") for name in names]
        shown = _from_header(cuda) if library == "libcuda.so.1" else _exports(cuda / "lib" / library)
        rest = out / f"{library}.c"
        absent = sorted(shown - set().union(*map(_defined, objects)))
        rest.write_text("extern int nullgpu_missing(const char *);\n" + "".join(map(MISSING.format, absent)))
        version = out / f"{library}.map"  # PyTorch asks for symbols of the version named after the library
        version.write_text(f"{library} {{ *; }};\n")
        own = [] if library == runtime.name else [runtime]
        _run("-shared", *objects, _compile(cuda, out, rest), *own, "-lpthread", "-ldl", f"-Wl,-soname,{library}",
             f"-Wl,--version-script={version}", "-o", out / library)  # fmt: skip
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        ptxas = out / "ptxas"
        ptxas.write_text(ASSEMBLER.format(ptxas=Path(triton.origin).parent / "backends/nvidia/bin/ptxas"))
        ptxas.chmod(0o755)
    os.link(out / "libcuda.so.1", out / "libcuda.so")  # what Triton's launchers are linked to


def _compile(cuda: Path, out: Path, source: Path) -> Path:
    target = out / f"{source.name}.o"
    _run(*FLAGS, "-Wno-unused-parameter", f"-I{cuda / 'include'}", f"-I{SOURCES}", "-c", source, "-o", target)
    return target


def _run(*arguments: str | Path) -> None:
    done = subprocess.run([os.environ.get("CC", "gcc"), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nullgpu: {done.stderr}")


def _symbols(*arguments: str | Path) -> set[str]:
    listed = subprocess.run(["nm", *arguments], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    return {name for name in names if re.match(r"_*cu", name)}


def _exports(library: Path) -> set[str]:
    return _symbols("-D", "--defined-only", library)


def _defined(compiled: Path) -> set[str]:
    return _symbols("--defined-only", "--extern-only", compiled)


def _from_header(cuda: Path) -> set[str]:
    header = (cuda / "include/cuda.h").read_text()
    declared, renamed = r"\b(cu[A-Z]\w*)\s*\(", r"#define\s+cu[A-Z]\w*\s+(cu[A-Z]\w*)"
    return {*re.findall(declared, header), *re.findall(renamed, header)}
