"""Compiles every kernel that the launchers launch, for GPUs that are not here, and reads what the compiler made of it.

    python -m tests.support.aot                     a table: registers, stack, spills, shared memory, dot product
    python -m tests.support.aot --arch 90 --op multi_lora --json
                                                    one JSON object a line, for tests/tools/test_targets.py

The launchers run on meta tensors, and each launch is compiled as it stands (dtypes, constants, divisibility of
strides, warps, stages), so what is examined is what a GPU would be given. Needs no GPU; not under TRITON_INTERPRET.
"""

import argparse
import itertools
import json
import re
import tempfile

import torch
import triton

from bench.static import sass
from bench.static.launches import compiling
from tests.support.aot_bottleneck import BOTTLENECK, bottleneck
from tests.support.aot_dora import DORA_LINEAR, dora_linear
from tests.support.aot_embedding import LORA_EMBEDDING, lora_embedding
from tests.support.aot_experts import EXPERTS, experts
from tests.support.aot_mlp import LORA_MLP, lora_mlp

ARCHITECTURES = (80, 89, 90, 100, 120)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# (x's dtype, the adapters', ranks of the branches, dropout, M, K, N): every BLOCK_R, and both gradients of B.
_LARGE = (8192, 4096, 4096)
LORA_LINEAR = (
    *(
        (BF16, dtype, ranks, dropout, *size)
        for dtype in (BF16, FP32)
        for ranks, dropout, size in (
            ((8,), 0.0, _LARGE),
            ((16,), 0.1, _LARGE),
            ((32,), 0.0, _LARGE),
            ((64,), 0.1, _LARGE),
            ((256,), 0.0, _LARGE),
            ((16, 16, 16), 0.1, _LARGE),  # q, k and v
            ((17,), 0.1, (127, 1001, 1003)),  # nothing divisible by anything
        )
    ),
    (FP16, FP16, (16,), 0.1, *_LARGE),
    (FP32, FP32, (16,), 0.1, *_LARGE),
    (FP32, FP32, (64,), 0.0, *_LARGE),
)
# (dtype, the adapters', ranks of the slices, dropout, tile, T, K, N): both tiles, one plane and several.
MULTI_LORA = (
    *(
        (BF16, dtype, ranks, dropout, tile, *size)
        for dtype in (BF16, FP32)
        for ranks, dropout, tile, size in (
            ((16,), 0.0, 16, (64, 4096, 4096)),
            ((8,), 0.0, 64, _LARGE),  # PEFT's default rank
            ((64,), 0.0, 16, (64, 14336, 4096)),
            ((16, 16, 16), 0.0, 16, (64, 4096, 1024)),
            ((256,), 0.0, 64, _LARGE),
            ((16, 16), 0.1, 64, _LARGE),
            ((17,), 0.1, 16, (127, 1001, 1003)),
        )
    ),
    (FP16, FP16, (16,), 0.0, 16, 64, 4096, 4096),
    (FP32, FP32, (16, 16, 16), 0.1, 16, 64, 768, 768),
    (FP32, FP32, (64,), 0.0, 64, *_LARGE),
)

# (x's dtype, the trained part's, (how many rows,), no dropout, M, K, N); columns too.
ROW_LINEAR = (
    *((BF16, dtype, (rows,), 0.0, *_LARGE) for dtype in (BF16, FP32) for rows in (16, 32, 204)),
    (BF16, BF16, (17,), 0.0, 127, 1001, 1003),
    (FP16, FP16, (204,), 0.0, *_LARGE),
    (FP32, FP32, (16,), 0.0, *_LARGE),
    (FP32, FP32, (204,), 0.0, *_LARGE),
)
# (the embeddings' dtype, the prompts', their lengths, no dropout, rows, tokens, D): ids and embeddings of each.
PROMPT_GATHER = (
    *((BF16, dtype, (20, 100), 0.0, 64, 2048, 4096) for dtype in (BF16, FP32)),
    (FP16, FP16, (20,), 0.0, 32, 512, 768),
    (FP32, FP32, (7, 3), 0.0, 5, 127, 1001),
    (FP32, FP32, (20,), 0.0, 32, 128, 384),
)
# (W's dtype, no adapters, elements that share a scale, no dropout, 0 or nested scales, N, K)
DEQUANTISE = (
    *(
        (dtype, FP32, (block,), 0.0, nested, 4096, 4096)
        for dtype in (BF16, FP32)
        for block in (64, 4096)
        for nested in (0, 1)
    ),
    (BF16, FP32, (32,), 0.0, 1, 127, 1001),
)


def lora_linear(x_dtype, dtype, ranks, dropout, m, k, n) -> None:
    """Launch all that a forward and backward of ``lora_linear`` launches."""
    from fastpeft.kernels import lora_linear as kernels

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    lora_as = [new(r, k) for r in ranks]
    seeds = new(len(ranks), dtype=torch.int64) if dropout else new(0, dtype=x_dtype)
    dropouts = [dropout] * len(ranks)
    x, dy = new(m, k, dtype=x_dtype), new(m, n, dtype=x_dtype)
    s = kernels.down(x, lora_as, [2.0] * len(ranks), dropouts, seeds)
    s_0 = s.split(list(ranks), 1)[0]
    kernels.up(s_0, new(n, ranks[0]), new(n, dtype=x_dtype), x_dtype)
    kernels.up_backward(dy, s_0, new(n, ranks[0]), 2.0, torch.empty_like(s).split(list(ranks), 1)[0], True)
    kernels.down_backward(s, x, lora_as, dropouts, seeds, True, True)


def multi_lora(x_dtype, dtype, ranks, dropout, tile, tokens, k, n) -> None:
    """Launch all that routing, and a forward and backward of ``multi_lora_shared``, launches."""
    from fastpeft.kernels import multi_lora as kernels
    from fastpeft.kernels import routing

    from fastpeft.reference import Routing, Slots

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    slots, p = 32, len(ranks)
    tables = routing.forward(new(tokens, dtype=torch.int32), slots, tile, 40)
    dropouts = (new(slots, dtype=torch.int32), new(p, slots, dtype=torch.int64)) if dropout else (None, None)
    slot = Slots(new(slots, dtype=FP32), new(p, slots, dtype=torch.int32), *dropouts)
    routing = Routing(*tables, slots, tile)
    x, dys = new(tokens, k, dtype=x_dtype), [new(tokens, n, dtype=x_dtype) for _ in ranks]
    lora_as, lora_bs = [new(slots, r, k) for r in ranks], [new(slots, n, r) for r in ranks]
    s = kernels.shrink(x, lora_as, routing, slot)
    kernels.expand_(dys, s, lora_bs, routing, slot)
    kernels.backward(dys, x, s, lora_as, lora_bs, routing, slot, True, True, True)


def row_linear(x_dtype, dtype, rows, dropout, m, k, n) -> None:
    """Launch the gradients of so many rows, and of so many columns."""
    from fastpeft.kernels import row_linear as kernels

    (count,) = rows
    x, dy = (torch.empty(m, size, dtype=x_dtype, device="meta") for size in (k, n))
    kernels.backward(dy, x, torch.empty(count, dtype=torch.int64, device="meta"), dtype)
    kernels.backward(dy, torch.empty(m, count, dtype=x_dtype, device="meta"), None, dtype)


def prompt_gather(x_dtype, dtype, lengths, dropout, rows, tokens, columns) -> None:
    """Launch all that a forward and backward of ``prompt_gather`` launches, with ids and with embeddings."""
    from fastpeft.kernels import prompt_gather as kernels

    def new(*shape, dtype=x_dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    prompts, which = new(sum(lengths), columns, dtype=dtype), new(rows, dtype=torch.int64)
    ids, mask, labels, positions = (new(rows, tokens, dtype=torch.int64) for _ in range(4))
    width = tokens + max(lengths)
    kernels.forward(prompts, lengths, which, new(32000, columns), ids, mask, labels, positions, width, True, -100)
    x = new(rows, tokens, columns)
    y, *_, spans = kernels.forward(prompts, lengths, which, x, None, None, None, None, width, False, -100)
    kernels.prompt_backward(y, spans, lengths, dtype)
    kernels.source_backward(y, spans, lengths, tokens)


def dequantise(dtype, _, blocks, dropout, nested, n, k) -> None:
    """Launch what writes out a weight in 4 bits and one in 8."""
    from fastpeft.kernels import dequantise as kernels

    def new(*shape, dtype=FP32):
        return torch.empty(shape, dtype=dtype, device="meta")

    out, absent, (block,) = new(n, k, dtype=dtype), new(0), blocks
    absmax = new(-(-n * k // block), dtype=torch.uint8 if nested else FP32)
    tables = (new(len(absmax) // 256 + 1), new(256), new(1)) if nested else (absent, absent, absent)
    kernels.write(out, new(-(-n * k // 2), dtype=torch.uint8), absmax, new(16), *tables, block, 256)
    kernels.write(out, new(n, k, dtype=torch.int8), new(n), absent, absent, absent, absent, k, 1)


def examine(kernel) -> dict:
    """What ptxas made of a compiled kernel: registers, stack and spill instructions, shared memory, dot instruction."""
    found = sass.code(kernel)
    dots = re.findall(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync)\b", kernel.asm["ptx"])
    return {
        "registers": found.registers,
        "stack": found.stack,
        "spills": found.spills,
        "shared": found.shared,
        "dot": dots[0] if dots else "",
    }


OPS = {
    "lora_linear": (lora_linear, LORA_LINEAR),
    "dequantise": (dequantise, DEQUANTISE),
    "multi_lora": (multi_lora, MULTI_LORA),
    "row_linear": (row_linear, ROW_LINEAR),
    "prompt_gather": (prompt_gather, PROMPT_GATHER),
    "bottleneck": (bottleneck, BOTTLENECK),
    "experts": (experts, EXPERTS),
    "lora_mlp": (lora_mlp, LORA_MLP),
    "dora_linear": (dora_linear, DORA_LINEAR),
    "lora_embedding": (lora_embedding, LORA_EMBEDDING),
}


def rows(architecture: int, name: str):
    """One dict for each distinct kernel that the cases of an op launch, as soon as it is compiled."""
    seen, found, case = set(), [], ()

    def record(launch):
        if launch.kernel.hash not in seen:
            seen.add(launch.kernel.hash)
            numbers = {"seconds": round(launch.seconds, 2), **examine(launch.kernel)}
            found.append({"arch": architecture, "kernel": launch.name, "case": case, **numbers})

    op, cases = OPS[name]
    with compiling(architecture, record):
        for x_dtype, dtype, ranks, dropout, *sizes in cases:
            dtypes = dict.fromkeys(str(d).removeprefix("torch.") for d in (x_dtype, dtype))
            case = (*dtypes, name, "r=" + "+".join(map(str, ranks)), f"p={dropout}", f"{sizes}")
            op(x_dtype, dtype, ranks, dropout, *sizes)
            yield from found
            found.clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", help="e.g. 90; may be repeated (default: all)")
    parser.add_argument("--op", choices=OPS, action="append", help="may be repeated (default: all)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    for architecture, name in itertools.product(options.arch or ARCHITECTURES, options.op or OPS):
        for row in rows(architecture, name):
            if options.json:
                print(json.dumps(row), flush=True)
                continue
            numbers = (f"{name} {row[name]:<6}" for name in ("registers", "stack", "spills", "shared"))
            print(
                f"sm_{architecture:<4} {row['kernel']:20} {' '.join(row['case']):46}", *numbers, row["dot"], flush=True
            )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        main()
