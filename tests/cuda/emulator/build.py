"""Compiles CUDA sources of csrc/ for the emulator: g++ and CUDA's headers, no nvcc and no GPU."""

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc"


def cuda_home() -> Path | None:
    """Where CUDA's headers are: CUDA_HOME, the usual place, or what nvcc says (it may be a wrapper)."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    if shutil.which("nvcc"):
        said = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        homes += [line.partition("=")[2].strip() for line in said.splitlines() if "TOP=" in line]
    return next((Path(home) for home in homes if home and (Path(home) / "include" / "cuda.h").exists()), None)


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    if not shutil.which("g++"):
        return "no g++"
    return None if cuda_home() else "no CUDA headers"


def build(source: Path, output: Path, *flags: str) -> Path:
    """Compile one source; ``flags`` say what comes out: ``-shared -fPIC``, ``-fsanitize=thread``, nothing."""
    include = cuda_home() / "include"
    command = ["g++", "-std=c++20", "-O2", "-x", "c++", "-DFASTPEFT_EMULATOR", f"-I{CSRC}", f"-I{HERE}"]
    command += ["-isystem", str(include), "-isystem", str(include / "cccl")]
    command += ["-include", str(HERE / "exports.h")]  # before any CUDA header
    done = subprocess.run([*command, *flags, str(source), "-o", str(output)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ {source.name}:\n{done.stderr[:4000]}")
    return output


@functools.cache
def library(name: str) -> Path:
    """The launchers of ``csrc/<name>.cu`` as a shared library, built once for each process."""
    folder = tempfile.mkdtemp(prefix="fastpeft-emulated-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build(CSRC / f"{name}.cu", Path(folder) / f"{name}.so", "-shared", "-fPIC")


def run(program: Path, seconds: int = 120) -> subprocess.CompletedProcess:
    """Run what ``build`` made. ThreadSanitizer of older compilers cannot bear addresses as random as new kernels'."""
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=seconds)
    if "unexpected memory mapping" in done.stderr:
        command = ["setarch", "--addr-no-randomize", str(program)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    return done
