"""Problems of multi_lora on the emulated GPU: what the launcher gives, and the definition of it."""

from dataclasses import replace

import pytest
import torch

from fastpeft.cuda import multi_lora as cuda
from fastpeft.reference.multi_lora import Slots
from fastpeft.reference.multi_lora import multi_lora as definition
from fastpeft.reference.routing import route
from fastpeft.testing import MultiLoraProblem

BF16, FP16 = torch.bfloat16, torch.float16
CLUSTER, PLANES = 90, 80  # capabilities, and with them the path
each_path = pytest.mark.parametrize("gpu", [CLUSTER, PLANES], ids=["cluster", "planes"], indirect=True)


def run(p, tile=16, **changed) -> list[torch.Tensor]:
    """y of every slice, in place on copies."""
    p = replace(p, **changed)
    ys = [y.clone() for y in p.ys]
    routing = route(p.token_slots, p.lora_as[0].shape[0], tile)
    cuda.add_(ys, p.x, p.lora_as, p.lora_bs, routing, Slots(p.scales, p.ranks))
    return ys


def forward(p, function=definition, dtype=torch.float64) -> list[torch.Tensor]:
    """y of every slice by the definition, or as PEFT computes it."""
    ys = []
    for i, (a, b, y) in enumerate(zip(p.lora_as, p.lora_bs, p.ys, strict=True)):
        scales, ranks = (t[i] if t is not None and t.dim() == 2 else t for t in (p.scales, p.ranks))
        ys.append(function(p.x.to(dtype), a.to(dtype), b.to(dtype), p.token_slots, scales, ranks, y.to(dtype)))
    return ys


def integers(tokens, k, outs, ranks, dtype=BF16, slots=4, **options):
    return MultiLoraProblem.make(tokens, k, outs, ranks, slots, dtype, integers=True, **options)


def assert_exact(p, tile=16):
    for found, wanted in zip(run(p, tile), forward(p), strict=True):
        assert torch.equal(found, wanted.to(found.dtype))


def with_slots(p, token_slots):
    return replace(p, token_slots=torch.tensor(token_slots, dtype=torch.int32))
