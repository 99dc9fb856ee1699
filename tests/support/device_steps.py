"""Training steps of every op and of every method on a device, each ready to be repeated, captured or compiled."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import fastpeft
from fastpeft import ops

SLOTS, RANK, WIDE, OUT, ROWS = 3, 8, 64, 48, 32

Step = Callable[[], object]


def tensor(*sizes: int, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> Tensor:
    return torch.zeros(*sizes, dtype=dtype, device="cuda", requires_grad=grad)


def ids(*sizes: int) -> Tensor:
    return torch.zeros(*sizes, dtype=torch.long, device="cuda")


def gradients(ys: Tensor | tuple[Tensor, ...], *leaves: Tensor) -> tuple[Tensor, ...]:
    ys = (ys,) if isinstance(ys, Tensor) else ys
    return torch.autograd.grad(ys, leaves, [torch.zeros_like(y) for y in ys])


def lora_linear(dropout: float, adapters: torch.dtype) -> Step:
    x, w, bias = tensor(ROWS, WIDE), tensor(OUT, WIDE, grad=False), tensor(OUT)
    a, b = tensor(RANK, WIDE, dtype=adapters), tensor(OUT, RANK, dtype=adapters)
    return lambda: gradients(ops.lora_linear(x, w, a, b, bias, 2.0, dropout), x, a, b, bias)


def lora_linear_shared(dropout: float, adapters: torch.dtype) -> Step:
    x, w = tensor(ROWS, WIDE), tensor(OUT, WIDE, grad=False)
    a, b = tensor(RANK, WIDE, dtype=adapters), tensor(OUT, RANK, dtype=adapters)
    dropouts = [dropout, 0.0, dropout]
    return lambda: gradients(ops.lora_linear_shared(x, [w, w, None], [a] * 3, [b] * 3, dropouts=dropouts), x, a, b)


def _mixed(adapters: torch.dtype) -> tuple[Tensor, ...]:
    slots = torch.arange(ROWS, device="cuda") % (SLOTS + 1) - 1
    a, b = tensor(SLOTS, RANK, WIDE, dtype=adapters), tensor(SLOTS, OUT, RANK, dtype=adapters)
    return tensor(ROWS, WIDE), a, b, tensor(ROWS, OUT), slots, tensor(SLOTS, dtype=torch.float32, grad=False)


def multi_lora(dropout: float, adapters: torch.dtype) -> Step:
    x, a, b, y, slots, scales = _mixed(adapters)
    dropouts = [dropout] * SLOTS if dropout else None

    def step():
        routing = ops.route(slots, SLOTS)
        return gradients(ops.multi_lora(x, a, b, routing, scales, None, y, dropouts=dropouts), x, a, b, y)

    return step


def multi_lora_shared(dropout: float, adapters: torch.dtype) -> Step:
    x, a, b, _, slots, scales = _mixed(adapters)
    dropouts = [dropout] * SLOTS if dropout else None

    def step():
        routing = ops.route(slots, SLOTS)
        return gradients(ops.multi_lora_shared(x, [a, a], [b, b], routing, scales, dropouts=dropouts), x, a, b)

    return step


def bottleneck(dropout: float, adapters: torch.dtype) -> Step:
    x, residual, norm = tensor(ROWS, WIDE), tensor(ROWS, WIDE), tensor(WIDE, dtype=adapters)
    down, d = tensor(RANK, WIDE, dtype=adapters), tensor(RANK, dtype=adapters)
    up, u = tensor(WIDE, RANK, dtype=adapters), tensor(WIDE, dtype=adapters)

    def step():
        y = ops.bottleneck(x, down, d, up, u, residual, "gelu", 0.5, dropout=dropout, norm_weight=norm, norm="rms")
        return gradients(y, x, down, d, up, u, residual, norm)

    return step


def row_linear(dropout: float, adapters: torch.dtype) -> Step:
    x, w, bias, rows = tensor(ROWS, WIDE), tensor(OUT, WIDE, grad=False), tensor(OUT), tensor(5, WIDE, dtype=adapters)
    index = torch.arange(5, device="cuda")
    return lambda: gradients(ops.row_linear(x, w, rows, index, bias), x, rows, bias)


def prompt_gather(dropout: float, adapters: torch.dtype) -> Step:
    prompts, tokens = [tensor(4, WIDE, dtype=adapters), tensor(2, WIDE, dtype=adapters)], ids(3, 6)
    embedding, mask, which = tensor(10, WIDE, grad=False), ids(3, 6), ids(3)
    return lambda: gradients(ops.prompt_gather(prompts, which, tokens, embedding, attention_mask=mask)[0], *prompts)


def experts(dropout: float, adapters: torch.dtype) -> Step:
    x, index, weights = tensor(ROWS, WIDE), ids(ROWS, 2), tensor(ROWS, 2, dtype=torch.float32)
    a = [tensor(SLOTS, RANK, WIDE, dtype=adapters), tensor(SLOTS, RANK, OUT, dtype=adapters)]
    b = [tensor(SLOTS, 2 * OUT, RANK, dtype=adapters), tensor(SLOTS, WIDE, RANK, dtype=adapters)]
    up = ops.ExpertLinear(tensor(SLOTS, 2 * OUT, WIDE, grad=False), None, a[0], b[0], 0.5, dropout)
    down = ops.ExpertLinear(tensor(SLOTS, WIDE, OUT, grad=False), None, a[1], b[1], 0.5, dropout)
    return lambda: gradients(ops.experts(x, index, weights, up, down, nn.functional.glu), x, weights, *a, *b)


OPS = {
    build.__name__: build
    for build in (
        lora_linear, lora_linear_shared, multi_lora, multi_lora_shared, bottleneck, row_linear, prompt_gather, experts,
    )
}  # fmt: skip
DROP = {"lora_linear", "lora_linear_shared", "multi_lora", "multi_lora_shared", "bottleneck", "experts"}

# Every method that trains something of its own, by the settings that its step needs no values for.
METHODS = {
    "lora": lambda p: fastpeft.Lora(r=RANK, dropout=p),
    "bottleneck": lambda p: fastpeft.Bottleneck(dropout=p),
    "prompt": lambda p: fastpeft.PromptTuning(length=4),
    "prefix": lambda p: fastpeft.PrefixTuning(length=4),
    "last layer": lambda p: fastpeft.Selective(layers="last:1", params=["norm"]),
    "rows": lambda p: fastpeft.Selective(rows={"up_proj": [1, 5]}),
}
