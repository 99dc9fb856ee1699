"""The null GPU itself: what it must count is counted, what it must refuse is refused, and memory costs nothing."""

import ctypes
import subprocess
import sys
import threading

import pytest
import torch
import triton

from bench import nullgpu
from bench.nullgpu import counted, counters

UNSUPPORTED_IN_CAPTURE, NOT_SUPPORTED = 900, 801  # cudaErrorStreamCaptureUnsupported, cudaErrorNotSupported


@pytest.fixture
def x():
    found = torch.zeros(64, 64, device="cuda")
    for _ in range(2):  # what the first call of an op sets up is not the op's
        found + 1, found @ found
    return found


@triton.jit
def _nothing(x_ptr):
    pass


def runtime() -> ctypes.CDLL:
    return ctypes.CDLL(nullgpu.LOADED)


def test_shape_of_the_device():
    assert torch.cuda.get_device_capability() == (9, 0)
    assert torch.cuda.get_device_properties(0).multi_processor_count == 132
    assert torch.cuda.mem_get_info()[1] == 4 << 40


def test_launches_are_counted(x):
    assert counted(lambda: x.add_(1)).launches == 1
    assert counted(lambda: x @ x).launches == 1  # cuBLAS
    assert counted(lambda: x.bfloat16() @ x.bfloat16()).launches == 3
    _nothing[(1,)](x)
    assert counted(lambda: _nothing[(1,)](x)).launches == 1  # through the driver
    quiet = counted(lambda: x.add_(1))
    assert (quiet.syncs, quiet.copies, quiet.pageable, quiet.refused, quiet.stray, quiet.missing) == (0,) * 6


def test_copies_and_waits_are_counted(x):
    pageable = counted(lambda: torch.ones(3).to("cuda"))
    assert (pageable.copies, pageable.pageable, pageable.syncs) == (1, 1, 1)
    pinned = torch.ones(3).pin_memory()
    assert counted(lambda: pinned.to("cuda", non_blocking=True)).copies == 1
    assert counted(lambda: pinned.to("cuda", non_blocking=True)).pageable == 0
    assert counted(lambda: pinned.to("cuda", non_blocking=True)).syncs == 0
    assert counted(lambda: x[0, 0].item()).syncs >= 1
    assert counted(torch.cuda.synchronize).syncs == 1
    assert counted(torch.cuda.current_stream().synchronize).syncs == 1
    event = torch.cuda.Event()
    event.record()
    assert counted(event.synchronize).syncs == 1
    assert counted(lambda: x.clone()).syncs == 0


def test_values_cross_between_host_and_device():
    values = torch.arange(1000.0)
    assert torch.equal(values.cuda().cpu(), values)


def test_the_host_can_read_zeros():
    values = torch.arange(1, 10.0).cuda()
    with nullgpu.reads_zero():
        assert values.tolist() == [0.0] * 9
    assert values.tolist() != [0.0] * 9


def test_memory_is_counted_and_costs_nothing():
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1])
    torch.cuda.reset_peak_memory_stats()
    large = torch.zeros(60 << 30, dtype=torch.uint8, device="cuda")
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1]) - before
    assert torch.cuda.max_memory_allocated() >= 60 << 30
    assert pages * 4096 < 64 << 20
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(4 << 40, dtype=torch.uint8, device="cuda")
    del large
    torch.cuda.empty_cache()


def test_a_capture_holds_launches_and_a_replay_launches_once(x):
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x + 1
        y @ y
    graph.replay()
    replay = counted(graph.replay)
    assert replay.graph_launches == 1
    assert replay.launches == 0
    empty = torch.cuda.CUDAGraph()
    with pytest.warns(UserWarning, match="empty"), torch.cuda.graph(empty):
        pass


FORBIDDEN = {
    "wait for the device": lambda x: torch.cuda.synchronize(),
    "wait for the stream": lambda x: torch.cuda.current_stream().synchronize(),
    "wait for another stream": lambda x: torch.cuda.Stream().synchronize(),
    "value on the host": lambda x: x[0, 0].item(),
    "pageable copy": lambda x: x.copy_(torch.ones(64, 64), non_blocking=True),
    "shape from values": lambda x: x.nonzero(),
    "dependency on work before": lambda x: torch.cuda.current_stream().wait_event(BEFORE[0]),
    "allocation by another thread": lambda x: in_thread(lambda: check(runtime().cudaMalloc(ctypes.byref(VOID), 8))),
    "work that is not joined": lambda x: fork(x),
}
BEFORE, VOID = [], ctypes.c_void_p()


def check(error: int) -> None:
    if error:
        raise RuntimeError(f"CUDA error {error}")


def in_thread(function) -> None:
    raised = []

    def run():
        try:
            function()
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def fork(x) -> None:
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        x.add_(1)


@pytest.mark.parametrize("call", FORBIDDEN.values(), ids=FORBIDDEN)
def test_what_a_capture_forbids_is_refused(x, call):
    BEFORE[:] = [torch.cuda.Event()]
    BEFORE[0].record()
    with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.add_(1)
        call(x)
    torch.cuda.synchronize()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):  # and the next capture is as good as the first
        x.add_(1)


def test_refusals_are_counted_and_end_the_capture(x):
    """PyTorch forbids some calls itself; these go past it."""
    host = (ctypes.c_char * 8)()
    calls = {
        "cudaDeviceSynchronize": (),
        "cudaMalloc": (ctypes.byref(VOID), ctypes.c_size_t(8)),
        "cudaMemcpy": (ctypes.c_void_p(x.data_ptr()), host, ctypes.c_size_t(8), 1),
        "cudaMemcpyAsync": (ctypes.c_void_p(x.data_ptr()), host, ctypes.c_size_t(8), 1),
    }
    for name, arguments in calls.items():
        before = counters().refused
        with pytest.raises(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
            stream = (ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),) if name.endswith("Async") else ()
            assert getattr(runtime(), name)(*arguments, *stream) == UNSUPPORTED_IN_CAPTURE
        assert counters().refused == before + 1, name


def test_a_joined_fork_is_captured(x):
    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            other = torch.cuda.Stream()
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                x.add_(1)
            torch.cuda.current_stream().wait_stream(other)
            x.add_(1)

    found = counted(capture)
    assert (found.refused, found.stray) == (0, 0)


def test_work_outside_of_a_capture_is_counted(x):
    other = torch.cuda.Stream()

    def capture():
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="relaxed"):
            x.add_(1)
            with torch.cuda.stream(other):  # not joined: a replay would lack it
                _nothing[(1,)](x)

    _nothing[(1,)](x)
    assert counted(capture).stray == 1


def test_what_is_not_implemented_says_so():
    handle = (ctypes.c_char * 64)()
    before = counters().missing
    assert runtime().cudaIpcGetMemHandle(handle, VOID) == NOT_SUPPORTED
    assert counters().missing == before + 1


def test_children_are_on_it_too():
    code = "import torch; print(torch.zeros(2, device='cuda').device, torch.cuda.get_device_name())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("cuda:0 null GPU")
