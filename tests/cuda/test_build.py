"""fastpeft._C: built without torch, depends on libc alone, imports without a driver; and installations without it."""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from tests.support import cuda_extension

pytestmark = pytest.mark.slow
needs_nvcc = pytest.mark.skipif(cuda_extension.missing() is not None, reason=f"{cuda_extension.missing()}")
ROOT = cuda_extension.ROOT


@pytest.fixture(scope="module")
def built():
    return cuda_extension.built()


@needs_nvcc
def test_two_minutes_on_two_cores(built):
    """Processor time, so that other work on the machine does not count; torch could not be imported."""
    assert built.seconds < 2 * 120
    assert not (built.site.parent / "requirements" / "torch").exists()


@needs_nvcc
def test_depends_on_libc_alone(built):
    needed = subprocess.run(["ldd", built.extension], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].rpartition("/")[2] for line in needed.splitlines()}
    usual = r"linux-vdso\.so\.1|ld-linux-.*|lib(c|m|dl|rt|pthread)\.so\.\d"
    assert [name for name in names if not re.fullmatch(usual, name)] == []


@needs_nvcc
def test_shows_others_no_symbol_but_its_own(built):
    """cudart and the C++ runtime are inside: their symbols must not take the place of torch's, or the reverse."""
    done = subprocess.run(["nm", "-D", "--defined-only", built.extension], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in done.stdout.splitlines()] == ["PyInit__C"]


IMPORT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_C", {path!r})
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
print(_C.devices())
try:
    _C.multi_lora(0, 8, 8, 0, 0, 0, 0, 0, 16, [], 0, 0, 0, 0, 0, False, 0, 0)
except RuntimeError as error:
    print(error)
"""


@needs_nvcc
@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_imports_without_a_driver_and_without_torch(built):
    """And says what is missing when it is called."""
    command = [sys.executable, "-S", "-I", "-c", IMPORT.format(path=str(built.extension))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    devices, error = done.stdout.splitlines()
    assert devices.startswith("(0, 'CUDA driver") or devices.startswith("(0, 'no CUDA-capable")
    assert error.startswith("fastpeft._C: device: ")


@needs_nvcc
def test_machine_code_for_the_architectures_that_a_file_is_for(built):
    """wgmma exists on sm_90a alone; whatever else there will be gets PTX of the portable files."""
    found = re.findall(r"(\w+)\.(sm_\w+)\.cubin", cuda_extension.cuobjdump("--list-elf"))
    assert sorted(found) == sorted(
        [("lora_linear", "sm_90a"), *(("multi_lora", f"sm_{cc}") for cc in (80, 90, 100, 120))]
    )
    assert re.findall(r"(\w+)\.(sm_\w+)\.ptx", cuda_extension.cuobjdump("--list-ptx")) == [("multi_lora", "sm_80")]


@needs_nvcc
def test_nothing_spills(built):
    """Any architecture, any kernel: no register on the stack."""
    usage = cuda_extension.functions(cuda_extension.cuobjdump("--dump-resource-usage"))
    assert len(usage) > 10
    stacks = {name: re.search(r"STACK:(\d+)", text)[1] for name, text in usage.items()}
    assert {name: stack for name, stack in stacks.items() if stack != "0"} == {}


@needs_nvcc
def test_env_tells_of_it(built):
    done = env_of(built.site)
    assert "built for CUDA " in done["fastpeft._C"]
    assert str(built.extension) in done["fastpeft._C"]


def env_of(site: Path) -> dict[str, str]:
    """``fastpeft env`` of an unpacked wheel. Without site, whose .pth files would add an editable install's modules."""
    path = os.pathsep.join([str(site), sysconfig.get_path("purelib")])
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": path}
    command = [sys.executable, "-S", "-m", "fastpeft.cli", "env"]
    done = subprocess.run(command, cwd="/", env=variables, capture_output=True, text=True, check=True)
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in done.stdout.splitlines())


SPILLS = """
extern "C" __global__ void __launch_bounds__(1024, 2) spills(float* x) {
  float v[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = v[i] * v[63 - i];
}
"""


@pytest.fixture
def source(tmp_path):
    """A checkout whose sources of the extension are empty, and what pip would give its build."""
    copy = cuda_extension.checkout(tmp_path / "source")
    for path in (*(copy / "csrc").glob("*.cu"), copy / "csrc" / "bindings.cpp"):
        path.write_text("")
    return copy, tmp_path, cuda_extension.isolated(tmp_path / "requirements")


@needs_nvcc
@pytest.mark.parametrize("name", ["lora_linear.cu", "multi_lora.cu"])
def test_a_spill_is_a_build_error(source, name):
    (source[0] / "csrc" / name).write_text(SPILLS)
    with pytest.raises(RuntimeError, match=r"(?s)spilled.*csrc/ did not build .*FASTPEFT_NO_CUDA=1 installs without"):
        cuda_extension.wheel(*source)


@needs_nvcc
@pytest.mark.parametrize("code", ["C7508", "C7510"])
def test_a_serialised_wgmma_is_a_build_error(source, code, tmp_path):
    """ptxas only informs of it, and nvcc succeeds."""
    home = toolkit_with(tmp_path, f'{real_nvcc()} "$@" && echo "ptxas info : ({code}) Potential Performance Loss"')
    with pytest.raises(RuntimeError, match=f"(?s){code}.*csrc/ did not build"):
        cuda_extension.wheel(*source, CUDA_HOME=str(home))


def real_nvcc() -> Path:
    found = setup_py()["toolkit"]()
    return found / "bin" / "nvcc"


def toolkit_with(folder: Path, script: str) -> Path:
    """A toolkit whose nvcc is a shell script."""
    home, real = folder / "toolkit", real_nvcc().parents[1] if cuda_extension.missing() is None else None
    (home / "bin").mkdir(parents=True)
    (home / "bin" / "nvcc").write_text(f"#!/bin/sh\n{script}\n")
    (home / "bin" / "nvcc").chmod(0o755)
    if real is None:
        (home / "include").mkdir()
        (home / "include" / "cuda_runtime.h").write_text("")
    else:
        (home / "include").symlink_to(real / "include")
        (home / "lib64").symlink_to(next(f for f in (real / "lib64", real / "lib") if f.is_dir()))
    return home


def setup_py() -> dict:
    """What setup.py defines, without a build."""
    setuptools = pytest.importorskip("setuptools")
    real, setuptools.setup = setuptools.setup, lambda **_: None
    before = os.getcwd()
    try:
        os.chdir(ROOT)
        return runpy.run_path(str(ROOT / "setup.py"))
    finally:
        setuptools.setup = real
        os.chdir(before)


def test_variables_name_the_toolkit(tmp_path, monkeypatch):
    home = toolkit_with(tmp_path, "echo release 13.0")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.setenv(name, str(home))
        assert setup_py()["toolkit"]() == home


@needs_nvcc
def test_a_variable_that_names_no_toolkit_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert (setup_py()["toolkit"]() / "bin" / "nvcc").is_file()


def test_nvcc_on_the_path_may_be_a_script(tmp_path, monkeypatch):
    """Its own place says nothing; what it would run does."""
    script = tmp_path / "nvcc"
    script.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/real/bin/..' >&2\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert setup_py()["_from_nvcc"]() == [tmp_path / "real"]


def test_an_old_nvcc_builds_nothing_and_says_so(tmp_path, monkeypatch):
    home = toolkit_with(tmp_path, "echo Cuda compilation tools, release 11.8, V11.8.89")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert setup_py()["WHY_NOT"] == f"{home}/bin/nvcc is 11.8, expected 12.8"


def test_without_pythons_headers_it_builds_nothing_and_says_so(tmp_path, monkeypatch):
    """Debian has them in a package of their own; an installation must not fail for want of them."""
    home = toolkit_with(tmp_path, "echo release 13.0")
    if cuda_extension.missing() is not None:
        (home / "lib64").mkdir()
        (home / "lib64" / "libcudart_static.a").write_text("")
    monkeypatch.setenv("CUDA_HOME", str(home))
    monkeypatch.setenv("CXX", "g++")
    paths = sysconfig.get_paths() | {"include": str(tmp_path)}
    monkeypatch.setattr(sysconfig, "get_path", lambda name, *_, **__: paths[name])
    assert setup_py()["WHY_NOT"] == f"{tmp_path} has no Python.h (Debian: python3-dev)"


def test_setuptools_that_cannot_read_the_metadata_are_named(monkeypatch):
    """With --no-build-isolation; pip would show a page about a license that is not valid."""
    monkeypatch.setattr("setuptools.__version__", "75.8.0")
    with pytest.raises(SystemExit, match="fastpeft: setuptools is 75.8.0, expected 77"):
        setup_py()


def test_the_oldest_setuptools_is_what_pyproject_asks_for():
    assert f'"setuptools>={setup_py()["SETUPTOOLS"]}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(importlib.util.find_spec("ninja") is None, reason="ninja is not installed")
def test_without_cuda_it_is_pure_python_and_env_says_why(source, tmp_path):
    wheel, said = cuda_extension.wheel(*source, FASTPEFT_NO_CUDA="1")
    assert wheel.name.endswith("py3-none-any.whl")
    assert "pure Python, without CUDA kernels" in said
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    rows = env_of(tmp_path / "site")
    assert rows["fastpeft._C"] == "not built: FASTPEFT_NO_CUDA was set when fastpeft was installed"
