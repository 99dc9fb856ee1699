"""Instructions of a compiled kernel by kind, inside and outside of its loops, read with the tools that Triton ships."""

import functools
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What belongs to a kind: by the name in front of the first dot. What is in no kind is counted under its own name.
KINDS = {
    "FP32": "FFMA FADD FMUL",
    "ALU": "IADD3 LOP3 SHF LEA ISETP SEL PRMT IABS IMNMX SGXT BMSK PLOP3 VIADD VIMNMX P2R R2P FSEL FSETP FMNMX F2FP",
    "MOV": "MOV CS2R",
    "XU": "MUFU S2R POPC FLO BREV F2F F2I I2F I2FP FRND I2I",
    "HALF2": "HFMA2 HADD2 HMUL2",
    "BARRIER": "BAR WARPSYNC DEPBAR LDGDEPBAR BSYNC BSSY WARPGROUP SYNCS FENCE MEMBAR ERRBAR CCTL",
    "BRANCH": "BRA EXIT CALL RET BRX JMP",
    "SHFL": "SHFL REDUX VOTE MATCH",
    "LDC": "LDC ULDC",
}
_KIND = {name: kind for kind, names in KINDS.items() for name in names.split()}
_MEMORY = {"LDGSTS", "LDG", "STG", "LDS", "STS", "LDL", "STL"}
_CHEAP_IMAD = ("IMAD.MOV", "IMAD.IADD", "IMAD.SHL", "IMAD.U32", "IMAD.X")  # at the full rate
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.x]*)\s*(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")


@dataclass(frozen=True)
class Loop:
    """A loop: how deep it is nested, and its own instructions, those of loops inside it aside."""

    depth: int
    counts: Counter


@dataclass(frozen=True)
class Code:
    """What ptxas made of a kernel.

    Attributes:
        registers: of a thread.
        stack: bytes of a thread.
        spills: loads and stores of spilled registers.
        shared: bytes of shared memory of a program.
        warps: of a program.
        outside: instructions outside of loops, by kind.
        loops: in the order of their addresses.
    """

    registers: int
    stack: int
    spills: int
    shared: int
    warps: int
    outside: Counter
    loops: tuple[Loop, ...]

    @property
    def main(self) -> Counter:
        """The longest loop, or all that there is."""
        return max((loop.counts for loop in self.loops), key=lambda c: c.total(), default=self.outside)


def kind(name: str) -> str:
    """The kind of an instruction: memory's with its width in bits, tensor cores' with the operands' format."""
    base, *suffixes = name.split(".")
    if base in _MEMORY:
        wide = next((s for s in suffixes if s in ("128", "64")), "16" if {"U16", "S16"} & set(suffixes) else "32")
        return base if base in ("LDL", "STL") else f"{base}.{wide}"
    if base in ("HMMA", "HGMMA", "IMMA", "QGMMA", "DMMA"):
        shape = re.search(r"64x\d+x\d+|16816|1688|1684", name)
        return base + (".TF32" if "TF32" in name else "") + (f".{shape[0]}" if shape else "")
    if base == "IMAD":
        return "IMAD.cheap" if name.startswith(_CHEAP_IMAD) else "IMAD"
    if base.startswith("U") or base == "R2UR":
        return "UNIFORM"
    return _KIND.get(base, base)


def code(kernel) -> Code:
    """What is in a kernel that Triton compiled."""
    return _code(kernel.asm["cubin"], kernel.metadata.shared, kernel.metadata.num_warps)


@functools.cache
def _code(cubin: bytes, shared: int, warps: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        text = _tool("nvdisasm", "-c", file.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    names, loops, end = parse(text)
    owner = [None] * len(names)
    for index in sorted(range(len(loops)), key=lambda i: loops[i][0] - loops[i][1]):  # inner loops last
        first, last = loops[index]
        owner[first : last + 1] = [index] * (last + 1 - first)
    counts = [Counter() for _ in range(len(loops) + 1)]
    for i, name in enumerate(names[:end]):
        if name != "NOP":
            counts[-1 if owner[i] is None else owner[i]][kind(name)] += 1
    depths = [sum(a <= first and last <= b for a, b in loops) - 1 for first, last in loops]
    found = tuple(Loop(depth, count) for depth, count in zip(depths, counts))
    spills = sum(count["LDL"] + count["STL"] for count in counts)
    return Code(registers, stack, spills, shared, warps, counts[-1], found)


def parse(text: str) -> tuple[list[str], list[tuple[int, int]], int]:
    """Names of the instructions, the loops as (first, last), and where the code ends in a branch to itself."""
    names, labels, waiting, branches = [], {}, [], []
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            waiting.append(label[1])
        elif found := _INSTRUCTION.search(line):
            labels |= dict.fromkeys(waiting, len(names))
            waiting.clear()
            if found[2].split(".")[0] == "BRA" and (target := re.search(r"`\((\.L_x_\d+)\)", found[3])):
                branches.append((target[1], len(names)))
            names.append(found[2])
    jumps = [(labels[target], at) for target, at in branches if labels.get(target, at + 1) <= at]
    end = min((at for first, at in jumps if first == at), default=len(names))
    return names, sorted(((a, b) for a, b in jumps if a < b), key=lambda loop: (loop[0], -loop[1])), end


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout
