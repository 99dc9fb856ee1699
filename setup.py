"""Maps kernels/ to the import name fastpeft.kernels; builds fastpeft._C from csrc/ where a CUDA toolkit is.

csrc/host goes into wheels as source: it is compiled against the torch it will run with, by `fastpeft build`.

The build takes nvcc, a C++ compiler, pybind11 and ninja; neither torch nor a GPU nor its driver. Without a toolkit, or
with FASTPEFT_NO_CUDA=1, the package is pure Python, and a note in it lets ``fastpeft env`` say why.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from shlex import quote

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

OLDEST = (12, 8)  # the first nvcc that knows sm_100 and sm_120
SETUPTOOLS = 77  # as pyproject.toml asks
NOTE = "fastpeft/without_C.txt"

_PORTABLE = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in (80, 90, 100, 120)]
# Machine code for each architecture that a file is written for. wgmma exists on sm_90a and nowhere else; everything
# else also ships PTX, for devices that do not exist yet.
TARGETS = {
    "lora_linear.cu": ["-gencode=arch=compute_90a,code=sm_90a"],
    "multi_lora.cu": [*_PORTABLE, "-gencode=arch=compute_80,code=compute_80"],
}

# Registers that do not fit are a build error: the kernels were sized not to spill. ptxas only informs of wgmma that it
# had to serialise (C7508, C7510), so the rule below reads what it says.
NINJA = r"""
rule cuda
  command = $nvcc $flags -MD -MF $out.d -c $in -o $out > $out.log 2>&1 $
      && ! grep -E 'C7508|C7510' $out.log || { cat $out.log; rm -f $out; exit 1; }
  depfile = $out.d
  deps = gcc
  description = nvcc $in
rule cxx
  command = $cxx $flags -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = $cxx $in
rule link
  command = $cxx -shared $in -o $out $flags
  description = $cxx $out
"""
STRICT = ["-Xptxas=--warn-on-spills", "-Xptxas=--warning-as-error"]
# Only libc and its friends at run time: the C++ runtime and cudart inside, and none of their symbols shown to others.
LINK = ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]
SHOWN = "{ global: PyInit__C; local: *; };\n"


class CannotBuild(Exception):
    """Why there will be no extension; the package is then pure Python."""


def toolkit() -> Path:
    """The CUDA toolkit: where variables say, the usual place, nvcc's own word, NVIDIA's wheels.

    nvcc on the path may be a script that calls another, so its own place says nothing; what it would run does.
    """
    named = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    wheels = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("cu[0-9]*"), reverse=True)
    for root in (*filter(None, named), "/usr/local/cuda", *_from_nvcc(), *wheels):
        if Path(root, "bin/nvcc").is_file() and Path(root, "include/cuda_runtime.h").is_file():
            return Path(root)
    given = "".join(f"; {name}={os.environ[name]}" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name))
    raise CannotBuild(f"no CUDA toolkit with nvcc and headers was found (CUDA_HOME says where one is{given})")


def _from_nvcc() -> list[Path]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return []
    command = [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    return [Path(top).resolve() for top in re.findall(r"TOP=(\S+)", said)]


def compilers() -> tuple[Path, Path, str, str]:
    """Toolkit, folder of the static runtime, C++ compiler and ninja, or CannotBuild with what is missing."""
    if os.environ.get("FASTPEFT_NO_CUDA", "0") not in ("", "0"):
        raise CannotBuild("FASTPEFT_NO_CUDA was set when fastpeft was installed")
    if not sys.platform.startswith("linux"):
        raise CannotBuild(f"the CUDA kernels are built on Linux only, this is {sys.platform}")
    cuda = toolkit()
    said = subprocess.run([cuda / "bin/nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    version = tuple(map(int, re.findall(r"release (\d+)\.(\d+)", said)[0])) if "release" in said else (0, 0)
    if version < OLDEST:
        raise CannotBuild(f"{cuda}/bin/nvcc is {'.'.join(map(str, version))}, expected {'.'.join(map(str, OLDEST))}")
    folders = [cuda / "lib64", cuda / "lib", *cuda.glob("targets/*/lib")]
    static = next((folder for folder in folders if (folder / "libcudart_static.a").is_file()), None)
    if static is None:
        raise CannotBuild(f"{cuda} has no libcudart_static.a")
    cxx = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not cxx:
        raise CannotBuild("no C++ compiler was found (g++, or CXX)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise CannotBuild(f"{sysconfig.get_path('include')} has no Python.h (Debian: python3-dev)")
    for module in ("pybind11", "ninja"):
        try:
            __import__(module)
        except ImportError:
            raise CannotBuild(f"{module} does not import where fastpeft was built") from None
    import ninja

    return cuda, static, cxx, str(Path(ninja.BIN_DIR, "ninja"))


class BuildCuda(build_ext):
    """csrc/ with nvcc, ninja and the host's compiler; links neither torch nor the CUDA driver."""

    def build_extension(self, ext):
        import pybind11

        cuda, static, cxx, ninja = compilers()
        work = Path(self.build_temp).resolve()
        work.mkdir(parents=True, exist_ok=True)
        headers = (cuda / "include", pybind11.get_include(), sysconfig.get_path("include"))
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "-Icsrc", *(f"-isystem {quote(str(folder))}" for folder in headers)]
        host = ["-fPIC", "-fvisibility=hidden"]
        device = [*STRICT, "--expt-relaxed-constexpr", "-lineinfo", "--threads=2", f"-Xcompiler={','.join(host)}"]
        lines = [f"nvcc = {quote(str(cuda / 'bin/nvcc'))} -ccbin={quote(cxx)}", f"cxx = {quote(cxx)}", NINJA]
        objects = []
        for source in map(Path, ext.sources):
            rule, own = ("cuda", [*device, *TARGETS[source.name]]) if source.suffix == ".cu" else ("cxx", host)
            objects.append(_ninja_path(work / f"{source.name}.o"))
            lines += [f"build {objects[-1]}: {rule} {source}", f"  flags = {' '.join([*flags, *own])}"]
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        lines += [f"build {_ninja_path(target)}: link {' '.join(objects)}"]
        (work / "shown.map").write_text(SHOWN)
        lines += [f"  flags = -L{quote(str(static))} {' '.join(LINK)} -Wl,--version-script={work / 'shown.map'}", ""]
        (work / "build.ninja").write_text("\n".join(lines))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        done = subprocess.run([ninja, "-f", work / "build.ninja", "-j", jobs], check=False)
        if done.returncode:
            raise SystemExit("fastpeft: csrc/ did not build (see above); FASTPEFT_NO_CUDA=1 installs without it")


def _ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildPy(build_py):
    """Leaves a note in a package without the extension. In an editable install the checkout itself shows it."""

    def run(self):
        super().run()
        if WHY_NOT and not self.editable_mode:
            note = Path(self.build_lib, NOTE)
            note.parent.mkdir(parents=True, exist_ok=True)
            note.write_text(WHY_NOT + "\n")


def extensions() -> tuple[list[Extension], str | None]:
    """fastpeft._C, or [] and why not."""
    try:
        compilers()
    except CannotBuild as error:
        print(f"fastpeft: pure Python, without CUDA kernels: {error}", file=sys.stderr)
        return [], str(error)
    sources = ["csrc/bindings.cpp", *(f"csrc/{name}" for name in TARGETS)]
    return [Extension("fastpeft._C", sources=sources)], None


# Where pip is told not to bring setuptools of its own, its own words would be of a license that is not valid.
if Path("pyproject.toml").is_file() and int(setuptools.__version__.split(".")[0]) < SETUPTOOLS:
    given = f"setuptools is {setuptools.__version__}, expected {SETUPTOOLS}"
    raise SystemExit(f"fastpeft: {given}; pip brings a newer one unless it is given --no-build-isolation")
EXTENSIONS, WHY_NOT = extensions()
PACKAGES = find_packages(include=["fastpeft", "fastpeft.*"])
# An editable install is the checkout's folder on the path, which type checkers and editors follow; with a mapping it
# would be an import hook, which they do not. fastpeft/_bridge.py shows kernels/ there. A strict one is a tree of links.
EDITABLE = "editable_wheel" in sys.argv and "strict" not in sys.argv
setup(
    packages=PACKAGES if EDITABLE else [*PACKAGES, "fastpeft.kernels", "fastpeft.csrc"],
    package_dir={"": "."} if EDITABLE else {"fastpeft.kernels": "kernels", "fastpeft.csrc": "csrc/host"},
    package_data={"fastpeft": ["py.typed"], "fastpeft.csrc": ["*.cpp", "*.h"]},  # for `fastpeft build`
    ext_modules=EXTENSIONS,
    cmdclass={"build_ext": BuildCuda, "build_py": BuildPy},
)
