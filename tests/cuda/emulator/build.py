"""Compiles CUDA sources of csrc/ for the emulator: g++ and CUDA's headers, no nvcc and no GPU."""

import functools
import os
import resource
import shutil
import subprocess
from pathlib import Path

from tests.support import session

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


def library(name: str) -> Path:
    """The launchers of ``csrc/<name>.cu`` as a shared library, built once a session."""

    def make(folder: Path) -> None:
        build(CSRC / f"{name}.cu", folder / f"{name}.so", "-shared", "-fPIC")

    return session.once(f"emulated-{name}", make) / f"{name}.so"


def run(program: Path, seconds: int = 120) -> subprocess.CompletedProcess:
    """Run what ``build`` made, for so many seconds of processor time at most, or ten times as long on a busy machine.

    ThreadSanitizer of older compilers cannot bear addresses as random as new kernels'.
    """

    def limited(*command: str) -> subprocess.CompletedProcess:
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_CPU, (seconds, seconds))
        return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, timeout=10 * seconds)

    done = limited(str(program))
    if "unexpected memory mapping" in done.stderr:
        done = limited("setarch", "--addr-no-randomize", str(program))
    return done
