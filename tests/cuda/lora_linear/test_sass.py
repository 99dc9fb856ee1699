"""csrc/lora_linear.cu as it is compiled, for sm_90a: every kernel that we ship, read without a GPU."""

import re

import pytest

from tests.support import cuda_extension

KERNELS = {  # template arguments of the kernel -> columns of a tile
    **{
        (dtype, 256, form, ranks): 256
        for dtype in ("bf16", "fp16")
        for form, ranks in ((0, 0), (0, 16), (0, 64), (1, 0))
    },
    **{(dtype, 128, form, 0): 128 for dtype in ("bf16", "fp16") for form in (0, 1)},
}
LOOP = 90  # instructions, at most, that feed four wgmma of 64 x N x 16; found: 64 to 78
MASK = 90  # more, at most, that draw eight bits of the next tile's mask; found: 76


pytestmark = pytest.mark.skipif(cuda_extension.missing() is not None, reason=f"{cuda_extension.missing()}")


@pytest.fixture(scope="module")
def compiled():
    """Each kernel's instructions as (address, text)."""
    kernels = {}
    for name, body in cuda_extension.functions(cuda_extension.cuobjdump("-sass", "-arch", "sm_90a")).items():
        if arguments := template_arguments(name):
            code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", body)
            kernels[arguments] = [(int(at, 16), text.strip()) for at, text in code]
    return kernels


def template_arguments(name: str):
    found = re.match(r".*kernelI(6__half|13__nv_bfloat16).*TileSizesILi(\d+)ELi\d+EE.*FormE(\d)ELi(\d+)E", name)
    if found is None:
        return None
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
    assert set(compiled) == set(KERNELS)


def test_compiler_has_no_complaint():
    """No wgmma is serialised (C7508, C7510), or waits where we did not say so (C7519)."""
    assert re.findall(r"C75\d\d.*|warning.*", cuda_extension.built().said["lora_linear.cu"]) == []


def test_registers_and_stack(compiled):
    """168 are what setmaxnreg deals out: with another number for each thread, (40 + 2 x 232) would not be 3 of them."""
    usage = cuda_extension.functions(cuda_extension.cuobjdump("--dump-resource-usage", "-arch", "sm_90a"))
    pattern = re.compile(r"REG:(\d+) STACK:(\d+)")
    found = {template_arguments(name): pattern.search(text).groups() for name, text in usage.items()}
    assert {found[name] for name in compiled} == {("168", "0")}


@pytest.mark.parametrize("name", KERNELS, ids=str)
def test_instructions(compiled, name):
    code, (_, columns, form, ranks) = compiled[name], name
    assert count(code, "HGMMA") == count(code, f"HGMMA.64x{columns}x16.F32") > 0
    assert count(code, "tnspB") == (count(code, "HGMMA") if form else 0)  # backward's B is MN-major
    assert count(code, "UTMALDG.2D.MULTICAST") == (columns // 128 if form else 1)  # w; a box is 64 columns in backward
    assert count(code, "UTMALDG.2D") - count(code, "UTMALDG.2D.MULTICAST") == 1  # x
    assert count(code, "UTMASTG") == columns // 64  # a chunk of the output each
    assert count(code, "USETMAXREG") == (0 if ranks else 2)  # where S is computed, its warps keep what they have
    assert (count(code, "HMMA.16816") > 0) == (ranks > 0)  # S, by the idle warps
    assert count(code, "STL") == count(code, "LDL") == 0


@pytest.mark.parametrize("name", KERNELS, ids=str)
def test_main_loop(compiled, name):
    """Backward's low-rank tiles have a loop of their own, and so have the steps in which the next mask is drawn."""
    loops = sorted(main_loops(compiled[name]), key=len)
    assert len(loops) == (3 if name[2] else 1)
    for body in loops:
        assert count(body, "HGMMA") == 4
        assert len(body) <= LOOP + (MASK if body is loops[-1] and name[2] else 0)
        assert count(body, "BAR.SYNC") == count(body, "MEMBAR") == 0
        assert [text for _, text in body if "WARPGROUP.DEPBAR" in text] == ["WARPGROUP.DEPBAR.LE gsb0, 0x1"]


@pytest.mark.parametrize("name", [name for name in KERNELS if name[2] == 1], ids=str)
def test_the_mask_is_there_before_it_is_needed(compiled, name):
    """Between the low-rank product and the base's, while tensor cores idle: a choice and a product an element."""
    texts = [text for _, text in compiled[name]]
    first = next(i for i, text in enumerate(texts) if "gsb0, 0x0" in text)
    idle = texts[first : next(i for i, text in enumerate(texts) if i > first and "HGMMA" in text)]
    assert len(idle) <= 3 * name[1] // 2
    assert not any("LDG" in text for text in idle)


@pytest.mark.parametrize("name", [name for name in KERNELS if name[2] == 0], ids=str)
def test_bias_arrives_under_the_products(compiled, name):
    """Nothing is loaded between the last product and the last store."""
    texts = [text for _, text in compiled[name]]
    last = max(i for i, text in enumerate(texts) if "gsb0, 0x0" in text)
    stored = max(i for i, text in enumerate(texts) if "UTMASTG" in text)
    assert not any("LDG" in text for text in texts[last:stored])
    assert sum("LDG.E.U16" in text for text in texts[:last]) == name[1] // 32  # a lane's columns of the tile


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("ranks", "loads"), [(16, 24), (64, 27)])
def test_loads_for_s_are_in_flight_together(compiled, dtype, ranks, loads):
    """Eight steps of x and two rows of A each, or three with eight rows: none of them waits behind a branch."""
    events = [re.search("LDG.E.128|BRA|HMMA", text) for _, text in compiled[dtype, 256, 0, ranks]]
    bursts = re.findall("L+", "".join(event[0][0] for event in events if event))
    assert max(map(len, bursts)) >= loads
