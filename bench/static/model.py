"""A launch's time on an H100 SXM, **predicted** from its machine code: the slowest of what it must do, and a start.

What is certain is counted: instructions, registers, programs, bytes. The rest is assumed, and no GPU has confirmed it:

- device memory gives 3.0 TB/s and the L2 5.5; a byte that one launch reads twice is read twice from the L2;
- a scheduler issues 0.28 instructions a clock for each warp it holds, 0.85 at most, of 1.755 GHz;
- loads take 0.8 us under load, and a program has (stages - 1) tiles of them on their way;
- a kernel costs 2 us beside its work: the gap before it, its ramp and its tail;
- bank conflicts, the L1's hits and clocks under a power cap are not modelled.
"""

import math
from collections import Counter
from dataclasses import dataclass

from .launches import Launch, Other
from .sass import Code, code
from .traffic import Work, work

SMS, CLOCK = 132, 1.755e9
DRAM, L2, LATENCY, START = 3.0e12, 5.5e12, 0.8e-6, 2.0e-6
ELEMENTWISE = 2.6e12  # what PyTorch's own kernels reach
WARPS, REGISTERS, SHARED = 64, 65536, 227 << 10  # of a multiprocessor


@dataclass(frozen=True)
class Prediction:
    """What a launch would take.

    Attributes:
        seconds: predicted, its start included.
        limit: what decides it.
        parts: seconds of each thing that could.
        issue: seconds at one instruction a clock, which no GPU undercuts.
        fit: programs that a multiprocessor has room for.
        resident: and how many it would be given.
        moved: bytes, from and to device memory.
        code: the kernel's.
    """

    seconds: float
    limit: str
    parts: dict[str, float]
    issue: float
    fit: int
    resident: int
    moved: int
    code: Code


def fitting(found: Code) -> int:
    """Programs that fit on a multiprocessor at once."""
    registers = -(-found.registers // 8) * 8 * 32 * found.warps
    return min(REGISTERS // registers, SHARED // (found.shared + 1024), WARPS // found.warps, 32)


def pipes(counts: Counter) -> dict[str, float]:
    """Clocks of one warp's instructions in each unit of a quarter of a multiprocessor; shared memory's of the whole."""
    take = Counter()
    for name, count in counts.items():
        kind, _, rest = name.partition(".")
        if kind in ("ALU", "IMAD") and name != "IMAD.cheap":
            take["alu" if kind == "ALU" else "fma"] += 2 * count
        elif kind == "MOV":
            take["alu"] += count
        elif name in ("FP32", "HALF2", "IMAD.cheap"):
            take["fma"] += count
        elif kind == "XU":
            take["xu"] += 8 * count
        elif kind == "HMMA":
            take["tensor"] += count * (8 if "TF32" in rest or "16816" in rest else 4)
        elif kind == "HGMMA":
            _, columns, depth = map(int, rest.removeprefix("TF32.").split("x"))
            take["tensor"] += count * max(16, columns * depth / 32)
        elif kind in ("LDSM", "STSM"):
            take["smem"] += 4 * count
        elif kind in ("LDS", "STS", "LDG", "STG", "LDGSTS"):
            take["smem"] += count * max(1, int(rest) // 32)
        elif kind == "SHFL":
            take["smem"] += count
    return take


def predict(launch: Launch) -> Prediction:
    """The time of a launch of a Triton kernel."""
    found, does, programs = code(launch.kernel), work(launch), math.prod(launch.grid)
    fit = max(1, fitting(found))
    resident = min(fit, -(-programs // SMS))
    waves = programs / (SMS * resident)
    # The last wave is as long as the others: exactly so for few of them, hardly so for many.
    uneven = math.ceil(waves) / waves if waves < 4 else 1.0
    total = executed(found, does)
    quarters = programs * found.warps * uneven / (SMS * 4 * CLOCK)
    busy = {name: clocks * quarters for name, clocks in pipes(total).items()}
    issue = total.total() * quarters
    parts = {
        "dram": does.moved / DRAM,
        "l2": does.read / L2,
        "issue": issue / min(0.85, 0.28 * resident * found.warps / 4),
        **busy,
        "smem": 4 * busy.get("smem", 0.0),
    }
    stages = max(1, launch.constants.get("num_stages", 2) - 1)
    if does.tile and found.loops:
        parts["bytes in flight"] = does.read * LATENCY / (resident * stages * does.tile * min(SMS, programs))
    parts["chain"] = math.ceil(waves) * does.chain * LATENCY
    limit = max(parts, key=parts.get)
    return Prediction(parts[limit] + START, limit, parts, issue / uneven, fit, resident, does.moved, found)


def executed(found: Code, does: Work) -> Counter:
    """Instructions that a warp executes, by kind."""
    total, seen = Counter(found.outside), -1
    for loop in found.loops:
        seen += loop.depth == 0
        times = does.trips[min(seen, len(does.trips) - 1)] * does.inner**loop.depth
        for name, count in loop.counts.items():
            total[name] += count * times
    return total


def instructions(launch: Launch) -> float:
    """Instructions that all warps of a launch execute."""
    found = code(launch.kernel)
    return executed(found, work(launch)).total() * found.warps * math.prod(launch.grid)


def seconds(found: Launch | Other) -> float:
    """The predicted time of any launch."""
    return predict(found).seconds if isinstance(found, Launch) else found.bytes / ELEMENTWISE + START
