"""Compares variants of one op, and gives no number to a variant that computes something else.

1. Gate: every output and gradient of a variant against float64, by the rule of ``fastpeft.testing``: the error is at
   most 2x (max) and 1.2x (rms) that of the same computation in plain PyTorch at the same dtypes.
2. Time (clock.py): all variants and both passes interleaved in one run, a GPU's cache cold; median, p20-p80.
3. Rows: one JSON object for each variant and pass, with the least bytes and operations of what the variant computes,
   the time below which they cannot be done (``floor_us``), what is saved for backward, and the machine.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import machine
import torch
from clock import SEED, Times, interleave
from torch import Tensor

from fastpeft.testing import Ratios, error_vs_eager

FROZEN, PEER = "frozen linear", "PEFT"  # the variants that the ratios of a row refer to
FORWARD, BOTH = "fwd", "fwd+bwd"
PASSES = (FORWARD, BOTH)
CASE = ("op", "shape", "rows", "dtype", "rank", "dropout", "adapters")  # the columns that tell cases apart


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


@dataclass(frozen=True)
class Case:
    """Variants of one op on one shape; ``fields`` are columns of every row, of those in CASE what the op has.

    ``calls`` is how many times a variant's step does the op, so that a row holds the time of one.
    """

    fields: dict
    variants: Sequence[Variant]
    sets: int
    device: torch.device
    dtype: torch.dtype
    passes: Sequence[str] = PASSES
    calls: int = 1


def gate(variant: Variant) -> tuple[Ratios | None, str | None]:
    """The worst error ratios on argument set 0, and why the variant gets no number, or None."""
    try:
        call = variant.bind(0)
        torch.manual_seed(SEED)
        ys = list(call.forward())
        found = [*ys, *(torch.autograd.grad(ys, call.wrt, call.grads) if call.wrt else ())]
        pairs = zip(found, variant.plain(None), variant.plain(torch.float64), strict=True)
        ratios = [error_vs_eager(*three) for three in pairs]
    except Exception as error:  # a variant that cannot run is a row that says so, not the end of the run
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    worst = Ratios(max(r.max for r in ratios), max(r.rms for r in ratios))
    return worst, None if worst.ok else f"error {worst.max:.2f} (max) and {worst.rms:.2f} (rms) times eager's"


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


def measure(case: Case, rounds: int, limit_s: float, gate_only: bool = False) -> list[dict]:
    """One case: a row for each variant and pass. A refused variant is not timed, and its row has no numbers."""
    checked = {variant.name: gate(variant) for variant in case.variants}
    sound = [] if gate_only else [v for v in case.variants if checked[v.name][1] is None]
    calls = {v.name: [v.bind(i) for i in range(case.sets)] for v in sound}
    steps = {(name, which): [c.step(which) for c in bound] for name, bound in calls.items() for which in case.passes}
    times = interleave(steps, case.device, rounds, limit_s) if steps else {}
    trained = BOTH in case.passes
    memory = {name: (saved_bytes(b[0]), peak_bytes(b[0], case.device)) for name, b in calls.items() if trained}
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
) -> list[dict]:
    """Make and measure every case; its rows are written at once, so that a run cut short keeps what it had.

    Args:
        limit_s: seconds for the timing of one case; total_s: seconds after which no further case is begun.
    """
    rows, facts, end = [], None, time.monotonic() + total_s
    for number, make in enumerate(_progress(cases)):
        if time.monotonic() > end:
            print(f"time is over: {len(cases) - number} of {len(cases)} cases not run", file=sys.stderr)
            break
        case = make()
        facts = facts or machine.facts(case.device)
        found = [{**row, **facts} for row in measure(case, rounds, limit_s, gate_only)]
        rows += found
        if out is not None:
            with out.open("a") as file:
                file.writelines(json.dumps(row) + "\n" for row in found)
    return rows


def table(rows: Sequence[dict]) -> str:
    """The rows for people: a block for each case, a line for each variant."""
    columns = "".join(
        f"{which + ' us':>11} {'p20-p80':>17} {'xfloor':>6} {'xfrozen':>7} {'xPEFT':>6}" for which in PASSES
    )
    lines = []
    for facts, block in groupby(rows, _case):
        settings = [f"{name}={value}" for name, value in zip(CASE[2:], facts[2:], strict=True) if value is not None]
        lines += ["", "  ".join([*facts[:2], *settings])]
        lines.append(f"  {'variant':22}{columns} {'saved MB':>9} {'err max':>8} {'rms':>5}")
        for name, of_variant in groupby(block, lambda row: row["variant"]):
            of_variant = list(of_variant)
            lines.append(f"  {name:22}{''.join(map(_cells, of_variant))} {_memory(of_variant[0])}")
    return "\n".join(lines)


def summary(rows: Sequence[dict]) -> str:
    """Time over the frozen linear, of the longest pass: a line for each case, a column for each variant."""
    longest = BOTH if any(row["pass"] == BOTH for row in rows) else FORWARD
    timed = {(_case(row), row["variant"]): row["ratio_frozen"] for row in rows if row["pass"] == longest}
    names = [name for name in dict.fromkeys(name for _, name in timed) if name != FROZEN]
    widths = [max(8, len(name)) for name in names]
    lines = [f"Time over the frozen linear's, {longest}", " " * 44 + "  ".join(map(str.rjust, names, widths))]
    for facts in dict.fromkeys(facts for facts, _ in timed):
        shape, count, dtype, rank, dropout, adapters = facts[1:]
        cells = [timed.get((facts, name)) for name in names]
        cells = ["-" if ratio is None else f"{ratio:.3f}" for ratio in cells]
        label = f"{shape} rows={count} {dtype} r={rank} " + (f"p={dropout}" if adapters is None else adapters)
        lines.append(f"{label:44}" + "  ".join(map(str.rjust, cells, widths)))
    return "\n".join(lines)


def _case(row: dict) -> tuple:
    return tuple(row.get(key) for key in CASE)


def _cells(row: dict) -> str:
    if row["median_us"] is None:
        return f"{'refused' if row['refused'] else 'not timed':>11}" + " " * 40
    spread = f"{row['p20_us']:.0f}-{row['p80_us']:.0f}"
    ratios = [row["median_us"] / row["floor_us"], row["ratio_frozen"], row["ratio_peft"]]
    cells = ["-" if ratio is None else f"{ratio:.3f}" for ratio in ratios]
    return f"{row['median_us']:11.1f} {spread:>17} {cells[0]:>6} {cells[1]:>7} {cells[2]:>6}"


def _memory(row: dict) -> str:
    saved = "-" if row["saved_bytes"] is None else f"{row['saved_bytes'] / 1e6:.2f}"
    errors = [" -" if row[e] is None else f"{row[e]:.2f}" for e in ("error_max", "error_rms")]
    return f"{saved:>9} {errors[0]:>8} {errors[1]:>5}  {row['refused'] or ''}".rstrip()


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
