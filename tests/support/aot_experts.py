"""The launches of experts that aot.py compiles: both projections, forward and backward, and the sum of rows."""

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# (the weights' dtype, the adapters', ranks of up and down, dropout, tokens, H, the inner size): as Qwen3-30B-A3B.
EXPERTS = (
    *((BF16, dtype, (16, 16), dropout, 2048, 2048, 768) for dtype in (BF16, FP32) for dropout in (0.0, 0.1)),
    (FP16, FP16, (8, 64), 0.0, 512, 768, 384),
    (FP32, FP32, (16, 7), 0.1, 127, 1001, 333),
)


def experts(x_dtype, dtype, ranks, dropout, tokens, hidden, inner) -> None:
    """Launch all that a forward and backward of ``experts`` launches beside PyTorch's products."""
    from fastpeft.kernels import experts as kernels

    from fastpeft.ops.experts_arguments import default_tile
    from fastpeft.reference import Routing
    from fastpeft.reference.experts import ExpertRouting
    from fastpeft.reference.routing import tile_count

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    count, choices, tile = 32, 8, default_tile(x_dtype, dropout) or 64
    rows = tokens * choices
    tables = (new(size, dtype=torch.int32) for size in (rows, count + 1))
    routing = Routing(*tables, new(2, tile_count(rows, count, tile), dtype=torch.int32), count, tile)
    routing = ExpertRouting(new(rows, dtype=torch.int32), new(tokens, choices, dtype=torch.int32), routing)
    seeds = new(count, dtype=torch.int64)
    for rank, k, n, gather in ((ranks[0], hidden, 2 * inner, True), (ranks[1], inner, hidden, False)):
        a, b, x, d = new(count, rank, k), new(count, n, rank), new(rows, k, dtype=x_dtype), new(rows, n, dtype=x_dtype)
        s = kernels.shrink(x, a, routing.rows, 2.0, dropout, seeds)
        kernels.expand_(d, s, b, routing.rows, 0.0, None)
        ds = kernels.shrink(d, b.mT, routing.rows, 2.0, 0.0, None)
        kernels.expand_(x, ds, a.mT, routing.rows, dropout, seeds)
        kernels.dlora_a(ds, new(tokens, k, dtype=x_dtype) if gather else x, routing, gather, dropout, seeds, dtype)
        kernels.dlora_b(d, s, routing, dtype)
        kernels.combine(x if gather else d, None if gather else new(tokens, choices), routing, x_dtype)
