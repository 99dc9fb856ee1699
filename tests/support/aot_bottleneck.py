"""The launches of bottleneck that aot.py compiles: every kernel, every tile size, and what takes registers."""

import torch

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
_LARGE = (8448, 4096, 4096)  # as many blocks of rows as one kernel wants; fewer rows go through two
# (x's dtype, the weights', H, dropout, form, M, K, N)
BOTTLENECK = (
    *(
        (BF16, dtype, (hidden,), dropout, form, *size)
        for dtype in (BF16, FP32)
        for hidden, dropout, form, size in (
            (16, 0.0, "relu", _LARGE),
            (64, 0.1, "gelu layer channel own", _LARGE),
            (128, 0.1, "silu rms own", _LARGE),
            (256, 0.0, "gelu_tanh layer own", _LARGE),
            (1024, 0.1, "relu layer", _LARGE),
            (48, 0.0, "relu own", (64, 768, 768)),
            (64, 0.1, "gelu layer channel 16", (64, 4096, 4096)),
            (64, 0.1, "silu rms channel own 64", _LARGE),
            (17, 0.1, "tanh layer channel", (127, 1001, 1003)),  # nothing divisible by anything
        )
    ),
    (FP16, FP16, (32,), 0.1, "leaky_relu layer own", *_LARGE),
    (FP32, FP32, (24,), 0.0, "relu own", 2048, 384, 384),
    (FP32, FP32, (64,), 0.1, "gelu layer channel own", *_LARGE),
)


def bottleneck(x_dtype, dtype, hidden, dropout, form, m, k, n) -> None:
    """Launch all that a forward and backward of ``bottleneck`` launches."""
    from fastpeft.kernels import bottleneck as kernels

    from fastpeft.reference import Routing
    from fastpeft.reference.bottleneck_terms import Settings, Weights
    from fastpeft.reference.routing import tile_count

    activation, *words = form.split()
    tile = next((int(word) for word in words if word.isdigit()), None)
    norm = next((word for word in words if word in ("layer", "rms")), None)
    lead, slots = (() if tile is None else (32,)), 32

    def new(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    (h,) = hidden
    weights = Weights(
        new(*lead, h, k), new(*lead, h), new(*lead, n, h), new(*lead, n), new(*lead, n) if "channel" in words else None,
        new(*lead, k) if norm else None, new(*lead, k) if norm == "layer" else None,
    )  # fmt: skip
    settings = Settings(activation, 2.0, norm or "layer", 1e-5, dropout, "own" in words)
    x, dy = new(m, k, dtype=x_dtype), new(m, n, dtype=x_dtype)
    seed = new(*lead or (1,), dtype=torch.int64) if dropout else None
    residual = None if "own" in words else dy
    operands, needs = (weights, residual, settings, seed), (True, *(t is not None for t in weights))
    if tile is None:
        _, kept = kernels.forward(x, *operands, None)
        kernels.backward(dy, x, kept, weights, settings, seed, None, needs)
        return
    tables = (new(size, dtype=torch.int32) for size in (m, slots + 1))
    routing = Routing(*tables, new(2, tile_count(m, slots, tile), dtype=torch.int32), slots, tile)
    _, kept = kernels.forward(x, *operands, routing)
    kernels.backward(dy, x, kept, weights, settings, seed, routing, needs)
