"""csrc/lora_linear.cu compiled for sm_90a, and what the compiler made of it: no GPU, but every kernel we ship."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cuda.emulator.build import CSRC, cuda_home

KERNELS = {  # template arguments of the kernel -> columns of a tile
    **{
        (dtype, 256, form, ranks): 256
        for dtype in ("bf16", "fp16")
        for form, ranks in ((0, 0), (0, 16), (0, 64), (1, 0))
    },
    **{(dtype, 128, form, 0): 128 for dtype in ("bf16", "fp16") for form in (0, 1)},
}
LOOP = 90  # instructions, at most, that feed four wgmma of 64 x N x 16; found: 68 to 82


def cuobjdump() -> str | None:
    beside = [cuda_home() / "bin" / "cuobjdump"] if cuda_home() else []
    try:
        import triton

        beside.append(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    except ImportError:
        pass
    return next((str(path) for path in beside if os.access(path, os.X_OK)), shutil.which("cuobjdump"))


pytestmark = [
    pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc to compile with"),
    pytest.mark.skipif(not cuobjdump(), reason="no cuobjdump to read machine code with"),
]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What ptxas said, and each kernel's instructions as (address, text)."""
    cubin = tmp_path_factory.mktemp("sm_90a") / "lora_linear.cubin"
    strict = ["-Xptxas=--warn-on-spills", "-Xptxas=--warning-as-error", "-Xptxas=-v", "-DNDEBUG"]
    command = ["nvcc", "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-cubin", *strict]
    done = subprocess.run([*command, str(CSRC / "lora_linear.cu"), "-o", str(cubin)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sass = subprocess.run([cuobjdump(), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for function in sass.split("Function : ")[1:]:
        code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", function)
        kernels[template_arguments(function.split()[0])] = [(int(at, 16), text.strip()) for at, text in code]
    return done.stderr, kernels


def template_arguments(name: str):
    found = re.match(r".*kernelI(6__half|13__nv_bfloat16).*TileSizesILi(\d+)ELi\d+EE.*FormE(\d)ELi(\d+)E", name)
    dtype, columns, form, ranks = found.groups()
    return {"6__half": "fp16", "13__nv_bfloat16": "bf16"}[dtype], int(columns), int(form), int(ranks)


def count(code, word):
    return sum(word in text for _, text in code)


def main_loops(code):
    """Bodies of the loops over k: they multiply, and do not store, as the loop over tiles around them does."""
    jumps = [(int(to[-1], 16), at) for at, text in code if (to := re.findall(r"BRA\S* .*?(0x[0-9a-f]+)", text))]
    loops = [[line for line in code if to <= line[0] <= at] for to, at in jumps if to < at]
    return [body for body in loops if count(body, "HGMMA") and not count(body, "UTMASTG")]


def test_every_kernel_is_there(compiled):
    assert set(compiled[1]) == set(KERNELS)


def test_compiler_has_no_complaint(compiled):
    """Nothing is spilled, and no wgmma is serialised (C7508, C7510) or waits where we did not say so (C7519)."""
    said, kernels = compiled
    assert said.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(kernels)
    assert re.findall(r"C75\d\d.*|warning.*", said) == []


@pytest.mark.parametrize("name", KERNELS, ids=str)
def test_instructions(compiled, name):
    code, (_, columns, form, ranks) = compiled[1][name], name
    assert count(code, "HGMMA") == count(code, f"HGMMA.64x{columns}x16.F32") > 0
    assert count(code, "tnspB") == (count(code, "HGMMA") if form else 0)  # backward's B is MN-major
    assert count(code, "UTMALDG.2D.MULTICAST") == (columns // 128 if form else 1)  # w; a box is 64 columns in backward
    assert count(code, "UTMALDG.2D") - count(code, "UTMALDG.2D.MULTICAST") == 1  # x
    assert count(code, "UTMASTG") == columns // 64  # a chunk of the output each
    assert count(code, "USETMAXREG") == 2
    assert (count(code, "HMMA.16816") > 0) == (ranks > 0)  # S, by the idle warps
    assert count(code, "STL") == count(code, "LDL") == 0


@pytest.mark.parametrize("name", KERNELS, ids=str)
def test_main_loop(compiled, name):
    loops = main_loops(compiled[1][name])
    assert len(loops) == (2 if name[2] else 1)  # backward's low-rank tiles have their own
    for body in loops:
        assert count(body, "HGMMA") == 4
        assert len(body) <= LOOP
        assert count(body, "BAR.SYNC") == count(body, "MEMBAR") == 0
        assert [text for _, text in body if "WARPGROUP.DEPBAR" in text] == ["WARPGROUP.DEPBAR.LE gsb0, 0x1"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("ranks", "loads"), [(16, 12), (64, 9)])
def test_loads_for_s_are_in_flight_together(compiled, dtype, ranks, loads):
    """Four steps of x and two rows of A each, or one step with eight rows: none of them waits behind a branch."""
    events = [re.search("LDG.E.128|BRA|HMMA", text) for _, text in compiled[1][dtype, 256, 0, ranks]]
    bursts = re.findall("L+", "".join(event[0][0] for event in events if event))
    assert max(map(len, bursts)) >= loads
