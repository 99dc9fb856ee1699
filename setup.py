"""Maps kernels/ to the import name fastpeft.kernels; builds fastpeft._C where nvcc and CUDA sources are."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

# SASS for every architecture with tensor-core kernels, and PTX so that newer devices can still run.
ARCHS = ("80", "90a", "100", "120")


class BuildCuda(build_ext):
    """Each .cu with nvcc, the bindings with nvcc's host compiler; links neither torch nor the CUDA driver."""

    def build_extension(self, ext):
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        include = ["-I", "csrc", "-I", pybind11.get_include(), "-I", sysconfig.get_path("include")]
        gencode = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
        gencode.append("-gencode=arch=compute_80,code=compute_80")
        # A spilled register is a build error: the kernels were sized not to spill.
        strict = ["-Xptxas=--warn-on-spills", "-Xptxas=--warning-as-error"]
        flags = ["-O3", "-DNDEBUG", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=0"]
        command = ["nvcc", "-shared", "-cudart=static", *flags, *strict, *gencode, *include]
        subprocess.run([*command, *ext.sources, "-o", str(target)], check=True)


def cuda_extensions():
    """[] without a CUDA toolkit or without kernels: the package is then pure Python."""
    kernels = sorted(str(path) for path in Path("csrc").glob("*.cu"))
    if not kernels or shutil.which("nvcc") is None:
        return []
    return [Extension("fastpeft._C", sources=[*kernels, "csrc/bindings.cpp"])]


setup(
    packages=[*find_packages(include=["fastpeft", "fastpeft.*"]), "fastpeft.kernels"],
    package_dir={"fastpeft.kernels": "kernels"},
    ext_modules=cuda_extensions(),
    cmdclass={"build_ext": BuildCuda},
)
