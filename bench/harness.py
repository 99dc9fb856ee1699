"""Compares variants of one op, and gives no number to a variant that computes something else.

1. Gate: every output and gradient of a variant against float64, by the rule of ``fastpeft.testing``: the error is at
   most 2x (max) and 1.2x (rms) that of the same computation in plain PyTorch at the same dtypes.
2. Time (clock.py): all variants and both passes interleaved in one run, a GPU's cache cold; median, p20-p80.
3. Rows: one JSON object for each variant and pass, with the least bytes and operations of what the variant computes,
   the time below which they cannot be done (``floor_us``), what is saved for backward, and the machine. report.py
   shows them.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastpeft.testing import Ratios, error_vs_eager

from . import machine
from .clock import SEED, Times, at_most, interleave

FROZEN, PEER = "frozen linear", "PEFT"  # the variants that the ratios of a row refer to
FORWARD, BOTH = "fwd", "fwd+bwd"
PASSES = (FORWARD, BOTH)
CASE = ("op", "shape", "rows", "dtype", "rank", "dropout", "adapters")  # the columns that tell cases apart


def columns(op: str, shape: str, rows: int, dtype: torch.dtype, **others) -> dict:
    """The columns that tell a case apart: these, and of CASE what else the op has."""
    return {"op": op, "shape": shape, "rows": rows, "dtype": str(dtype).removeprefix("torch."), **others}


@dataclass(frozen=True)
class Call:
    """A variant bound to one argument set: ``forward()`` gives the outputs.

    ``wrt`` are the leaves to differentiate, ``grads`` the incoming gradients, one for each output; ``parameters`` is
    everything that is no activation.
    """

    forward: Callable[[], Sequence[Tensor]]
    wrt: Sequence[Tensor]
    grads: Sequence[Tensor]
    parameters: Sequence[Tensor] = ()

    def both(self) -> Sequence[Tensor]:
        return torch.autograd.grad(self.forward(), self.wrt, self.grads)

    def step(self, which: str) -> Callable:
        return self.forward if which == FORWARD else self.both

    def memory(self, device: torch.device) -> tuple[int, int | None]:
        """What is kept for backward, and the most that is allocated; None where that is not known."""
        return saved_bytes(self), peak_bytes(self, device)


@dataclass(frozen=True)
class Variant:
    """One way of computing an op.

    ``bind(i)`` gives its call on argument set i. ``plain(dtype)`` gives the outputs, then the gradients, of set 0 in
    plain PyTorch: as a person would write it for None, exactly for float64. ``traffic(pass)`` gives the least (bytes,
    operations) of what it computes. A red gate of our ``own`` variants fails the run, a peer's does not.
    """

    name: str
    bind: Callable[[int], Call]
    plain: Callable[[torch.dtype | None], Sequence[Tensor]]
    traffic: Callable[[str], tuple[int, int]]
    fields: dict = field(default_factory=dict)
    own: bool = False


class Problem(Protocol):
    """One op on one shape, as each benchmark has its own; ``fields`` are ``columns``."""

    fields: dict
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Case:
    """Variants of one op on one shape; ``fields`` are columns of every row.

    ``calls`` is how many times a variant's step does the op, so that a row holds the time of one.
    """

    fields: dict
    variants: Sequence[Variant]
    sets: int
    device: torch.device
    dtype: torch.dtype
    passes: Sequence[str] = PASSES
    calls: int = 1

    @classmethod
    def of(cls, problem: Problem, variants: Sequence[Variant], sets: int) -> "Case":
        return cls({**problem.fields, "sets": sets}, variants, sets, problem.device, problem.dtype)

    def only(self, names: Sequence[str] | None) -> "Case":
        """With these variants alone; with all for None."""
        return self if names is None else replace(self, variants=[v for v in self.variants if v.name in names])


def gate(variant: Variant, limit_s: float = float("inf")) -> tuple[Ratios | None, str | None]:
    """The worst error ratios on argument set 0, and why the variant gets no number, or None.

    A variant that cannot run, or whose compilation does not end, is a row that says so, not the end of the run.
    """
    try:
        with at_most(limit_s):
            call = variant.bind(0)
            torch.manual_seed(SEED)
            ys = list(call.forward())
            found = [*ys, *(torch.autograd.grad(ys, call.wrt, call.grads) if call.wrt else ())]
            pairs = zip(found, variant.plain(None), variant.plain(torch.float64), strict=True)
            ratios = [error_vs_eager(*three) for three in pairs]
    except Exception as error:
        return None, _reason(error)
    worst = Ratios(max(r.max for r in ratios), max(r.rms for r in ratios))
    return worst, None if worst.ok else f"error {worst.max:.2f} (max) and {worst.rms:.2f} (rms) times eager's"


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def saved_bytes(call: Call) -> int:
    """Bytes that forward keeps alive for backward: each storage once, those of parameters not at all."""
    parameters = {t.untyped_storage().data_ptr() for t in call.parameters}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call.forward()
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """The most memory allocated in forward and backward beyond what was there before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call.both()
    return torch.cuda.max_memory_allocated(device) - before


def measure(
    case: Case, rounds: int, limit_s: float, gate_only: bool = False, gate_s: float = float("inf")
) -> list[dict]:
    """One case: a row for each variant and pass. A refused variant is not timed, and its row has no numbers."""
    checked = {variant.name: gate(variant, gate_s) for variant in case.variants}
    sound = [] if gate_only else [v for v in case.variants if checked[v.name][1] is None]
    calls = {v.name: [v.bind(i) for i in range(case.sets)] for v in sound}
    steps = {(name, which): [c.step(which) for c in bound] for name, bound in calls.items() for which in case.passes}
    times = interleave(steps, case.device, rounds, limit_s) if steps else {}
    trained = BOTH in case.passes
    memory = {name: bound[0].memory(case.device) for name, bound in calls.items() if trained}
    bandwidth, speed = machine.ceilings(case.device, case.dtype)
    rows = []
    for variant in case.variants:
        (ratios, refused), (saved, peak) = checked[variant.name], memory.get(variant.name, (None, None))
        for which in case.passes:
            moved, operations = variant.traffic(which)
            rows.append(
                {
                    **case.fields,
                    **{"variant": variant.name, "own": variant.own, **variant.fields, "pass": which},
                    **_timing(times, variant.name, which, case.calls),
                    **{"bytes": moved, "flops": operations},
                    "floor_us": round(1e6 * max(moved / bandwidth, operations / speed), 2),
                    "error_max": None if ratios is None else round(ratios.max, 3),
                    "error_rms": None if ratios is None else round(ratios.rms, 3),
                    **{"saved_bytes": saved, "peak_bytes": peak, "refused": refused},
                }
            )
    return rows


def _timing(times: dict[tuple[str, str], Times], name: str, which: str, calls: int) -> dict:
    columns = ("median_us", "p20_us", "p80_us", "host_us", "rounds", "ratio_frozen", "ratio_peft")
    mine = times.get((name, which))
    if mine is None:
        return dict.fromkeys(columns)
    median = mine.quantile(0.5)
    spent = [round(us / calls, 2) for us in (median, mine.quantile(0.2), mine.quantile(0.8), mine.median_host)]
    bases = [times.get((base, which)) for base in (FROZEN, PEER)]
    ratios = [None if base is None else round(median / base.quantile(0.5), 4) for base in bases]
    return dict(zip(columns, (*spent, mine.rounds, *ratios), strict=True))


def run(
    cases: Sequence[Callable[[], Case]],
    out: Path | None,
    rounds: int,
    limit_s: float,
    gate_only: bool = False,
    total_s: float = float("inf"),
) -> tuple[list[dict], list[str]]:
    """Make and measure every case; its rows are written at once, so that a run cut short keeps what it had.

    Args:
        limit_s: seconds for the timing of one case; total_s: seconds after which no further case is begun, and half of
            them are the most that one variant's gate may take.

    Returns:
        The rows, and of each case that failed which it was and why. SIGINT ends the run as such a failure.
    """
    rows, failed, facts, end = [], [], None, time.monotonic() + total_s
    for number, make in enumerate(_progress(cases)):
        if time.monotonic() > end:
            print(f"time is over: {len(cases) - number} of {len(cases)} cases not run", file=sys.stderr)
            break
        which = f"case {number + 1} of {len(cases)}"
        try:
            case = make()
            which += f", {' '.join(str(case.fields.get(name)) for name in CASE[:3])}"
            facts = facts or machine.facts(case.device)
            found = [{**row, **facts} for row in measure(case, rounds, limit_s, gate_only, total_s / 2)]
        except KeyboardInterrupt:
            failed.append(f"STOPPED in {which}")
            break
        except Exception as error:
            failed.append(f"FAILED {which}: {_reason(error)}")
            print(failed[-1], file=sys.stderr, flush=True)
            continue
        rows += found
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            with out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
    return rows, failed


def _progress(cases: Sequence) -> Iterable:
    try:
        from tqdm import tqdm
    except ImportError:
        return _lines(cases)
    return tqdm(cases, unit="case", file=sys.stderr)


def _lines(cases: Sequence) -> Iterable:
    for number, case in enumerate(cases, 1):
        print(f"case {number} of {len(cases)}", file=sys.stderr, flush=True)
        yield case
