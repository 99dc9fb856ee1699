"""Times steps beside each other: interleaved, in a new order each round, every call on another argument set.

CPU: host clock, garbage collector off. CUDA: device events around the call, which is queued behind a short sleep of the
device, so that gaps between launches do not show in the device's time; what the host took to launch is kept beside it.
"""

import contextlib
import gc
import random
import signal
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

SEED = 20
LONGEST_SLEEP_US = 5000.0


@dataclass
class Times:
    """Microseconds of one step, one value a round: on the device, and until the host could go on."""

    device: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def rounds(self) -> int:
        return len(self.device)

    def quantile(self, q: float) -> float:
        return _quantile(self.device, q)

    @property
    def median_host(self) -> float:
        return _quantile(self.host, 0.5)


class HostClock:
    """Times a call on the CPU: ``(microseconds, the same)``."""

    def __call__(self, step: Callable, sleep_us: float = 0.0) -> tuple[float, float]:
        start = time.perf_counter()
        result = step()
        spent = 1e6 * (time.perf_counter() - start)
        del result  # held until here: what a caller would keep is not freed on the clock
        return spent, spent


class CudaClock:
    """Times a call on a CUDA device that has slept ``sleep_us`` in front of it: ``(device, host)`` microseconds."""

    def __init__(self, device: torch.device):
        self.device = device
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cycles = 2_000_000
        self(lambda: torch.cuda._sleep(cycles))
        self.cycles_per_us = cycles / self(lambda: torch.cuda._sleep(cycles))[0]

    def __call__(self, step: Callable, sleep_us: float = 0.0) -> tuple[float, float]:
        torch.cuda.synchronize(self.device)
        if sleep_us:
            torch.cuda._sleep(int(sleep_us * self.cycles_per_us))
        start = time.perf_counter()
        self.start.record()
        result = step()
        self.end.record()
        host = 1e6 * (time.perf_counter() - start)
        torch.cuda.synchronize(self.device)
        del result
        return 1e3 * self.start.elapsed_time(self.end), host


def interleave(
    steps: Mapping[Hashable, Sequence[Callable]],
    device: torch.device,
    rounds: int,
    limit_s: float = float("inf"),
    warmup: int = 2,
) -> dict[Hashable, Times]:
    """Time every step ``rounds`` times, or fewer (but 5) when ``limit_s`` seconds are over.

    Args:
        steps: for each name the same work on each argument set. Consecutive calls never use the same set.
        warmup: rounds over all sets that are not counted; what is to be compiled is compiled there.
    """
    clock = CudaClock(device) if device.type == "cuda" else HostClock()
    order, generator, position = list(steps), random.Random(SEED), 0
    times, launch_us = {name: Times() for name in order}, dict.fromkeys(order, 0.0)
    for _ in range(warmup):
        for name in order:
            for step in steps[name]:
                launch_us[name] = clock(step)[1]
    end = time.perf_counter() + limit_s
    with _no_garbage_collection():
        for turn in range(rounds):
            if turn >= 5 and time.perf_counter() > end:
                break
            generator.shuffle(order)
            for name in order:
                position += 1
                step = steps[name][position % len(steps[name])]
                device_us, host_us = clock(step, min(1.5 * launch_us[name] + 20.0, LONGEST_SLEEP_US))
                times[name].device.append(device_us)
                times[name].host.append(host_us)
    return times


@contextlib.contextmanager
def at_most(seconds: float):
    """TimeoutError in what takes longer: in the main thread, where signals arrive, and between two calls of C."""
    if seconds == float("inf") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_):
        raise TimeoutError(f"longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _no_garbage_collection():
    gc.collect()
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _quantile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]
