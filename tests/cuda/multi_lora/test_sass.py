"""csrc/multi_lora.cu as it is compiled: what is in the machine code of every architecture, read without a GPU."""

import re

import pytest

from tests.support import cuda_extension

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cuda_extension.missing() is not None, reason=f"{cuda_extension.missing()}"),
]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
# A kernel and its template arguments -> registers, at most, so that two blocks of 256 threads share a multiprocessor.
REGISTERS = 128
# Instructions that mean what the source says, and the names that cuobjdump has for them.
BULK, ASYNC, MMA, PREFETCH = r"UBLKCP\b", r"LDGSTS", r"HMMA\.16816", r"UBLKPF"
STREAM = r"LDG\.E\.NA\.128\.CONSTANT"  # A, 16 bytes a lane, past the L1 cache
TF32, WAIT, LAUNCH, CLUSTER = r"HMMA\.1688\.F32\.TF32", r"ACQBULK", r"PREEXIT", r"UCGABAR_(ARV|WAIT)"


def kernels(text: str) -> dict[tuple[str, str, str], str]:
    """By kernel, dtype and blocks of columns at a time ("" where it has no such argument)."""
    found = {}
    for name, body in cuda_extension.functions(text).items():
        parts = re.fullmatch(r"_ZN10multi_lora\d+multi_lora_(\w+?)I(6__half|13__nv_bfloat16)(?:Li(\d)E)?E.*", name)
        if parts:
            found[parts[1], {"6__half": "fp16"}.get(parts[2], "bf16"), parts[3] or ""] = body
    return found


@pytest.fixture(scope="module", params=ARCHITECTURES)
def compiled(request):
    usage = kernels(cuda_extension.cuobjdump("--dump-resource-usage", "-arch", request.param))
    return request.param, usage, kernels(cuda_extension.cuobjdump("-sass", "-arch", request.param))


def test_every_kernel_is_there(compiled):
    _, usage, sass = compiled
    dtypes = ("bf16", "fp16")
    wanted = {(name, dtype, blocks) for name in ("cluster", "shrink") for dtype in dtypes for blocks in "12"}
    assert set(usage) == set(sass) == wanted | {("expand", dtype, "") for dtype in dtypes}


def test_registers_leave_room_for_two_blocks(compiled):
    _, usage, _ = compiled
    for name, text in usage.items():
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
        assert registers <= REGISTERS, name
        assert stack == 0, name


def test_one_launch_does_what_it_says(compiled):
    """Bulk copies of B, prefetches of A, tensor cores for both products, two cluster barriers, dependent launch."""
    architecture, _, sass = compiled
    for name, text in sass.items():
        if name[0] != "cluster":
            continue
        if architecture == "sm_80":
            assert not re.search(MMA, text)  # a trap, and nothing else
            continue
        assert all(re.search(what, text) for what in (BULK, PREFETCH, ASYNC, MMA, TF32, WAIT, LAUNCH)), name
        assert len(re.findall(CLUSTER, text)) >= 4, name
        waits = text.index(re.search(WAIT, text)[0])
        assert re.search(BULK, text[:waits]), name  # B is fetched before the wait, x is not multiplied before it
        assert not re.search(MMA, text[:waits]), name
        assert re.search(STREAM, text), name


def test_two_launches_need_nothing_newer_than_sm_80(compiled):
    _, _, sass = compiled
    for (name, *_), text in sass.items():
        if name == "shrink":
            assert re.search(MMA, text)
        if name == "expand":
            assert re.search(TF32, text)
            assert re.search(ASYNC, text)
        if name != "cluster":
            assert not any(re.search(what, text) for what in (BULK, CLUSTER, WAIT))


@pytest.mark.parametrize(("blocks", "loads"), [("1", 16), ("2", 12)])
@pytest.mark.parametrize("kernel", ["cluster", "shrink"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_steps_of_shrink_are_loaded_together(compiled, kernel, dtype, blocks, loads):
    """Four steps with two rows of x and two of A, or two with half as many more: no product waits between them."""
    architecture, _, sass = compiled
    if architecture == "sm_80" and kernel == "cluster":
        pytest.skip("a trap, and nothing else")
    events = re.findall(r"\b(LDG\.E\S*\.128|HMMA\.16816)", sass[kernel, dtype, blocks])
    bursts = re.findall("L+", "".join(event[0] for event in events))
    assert max(map(len, bursts)) >= loads


def test_the_cluster_kernel_is_small_and_waits_for_one_fence(compiled):
    """Code is fetched like data before it runs for the first time; found: 3,480 to 3,864 instructions."""
    architecture, _, sass = compiled
    for (kernel, *_), text in sass.items():
        if kernel == "cluster" and architecture != "sm_80":
            assert len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", text, flags=re.MULTILINE)) <= 4000
            assert len(re.findall(r"MEMBAR\.\w+\.GPU", text)) == 1
