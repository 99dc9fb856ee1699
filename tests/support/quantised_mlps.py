"""Problems for lora_mlp whose weights are quantised, in formats that are mixed."""

import torch
from torch import Tensor

from fastpeft import ops
from fastpeft.testing import MlpProblem
from tests.support.backends import DEVICE, FP32
from tests.support.quantised import eight_bit, four_bit

SIZES = K, INNER, OUT = 32, 64, 48
KINDS = ["4 bits", "dense gate", "dense up", "8 bits"]


def bases(dtype, kind="4 bits", block=16, sizes=SIZES):
    """Gate in nested scales, up, and down; of one of the other kinds all are, or one is dense."""
    k, inner, out = sizes
    if kind == "8 bits":
        found = [eight_bit(inner, k, dtype), eight_bit(inner, k, dtype, 1), eight_bit(out, inner, dtype, 2)]
    else:
        found = [four_bit(inner, k, block, True, dtype), four_bit(inner, k, block, False, dtype, 1)]
        found.append(four_bit(out, inner, block, True, dtype, 2))
    found = [ops.Base(*(t.to(DEVICE) if isinstance(t, Tensor) else t for t in base)) for base in found]
    dense = {"dense gate": 0, "dense up": 1}.get(kind)
    return [ops.dequantise(base, dtype) if p == dense else base for p, base in enumerate(found)]


def written(weights, dtype):
    return tuple(ops.dequantise(w, dtype) if isinstance(w, ops.Base) else w for w in weights)


def problem(dtype=FP32, adapter=None, dropout=0.0, rows=(2, 19), sizes=SIZES):
    k, inner, out = sizes
    return MlpProblem.make((*rows, k), inner, out, (4, 3, 5), dtype, adapter, DEVICE, dropout)


def computed(p, weights, backend=None):
    """The output, and the gradients of x, A and B."""
    x, *lists = p.x.clone().requires_grad_(), p.lora_as, p.lora_bs
    lists = [[t.clone().requires_grad_() for t in ts] for ts in lists]
    y = ops.lora_mlp(x, weights, *lists, p.biases, p.scales, p.dropouts, p.seeds, p.activation, backend)
    leaves = {"dx": x} | {f"d{n}{i}": t for n, ts in zip("AB", lists, strict=True) for i, t in enumerate(ts)}
    return {"y": y.detach()} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), p.dy), strict=True))
