"""experts beside the frozen layer, PEFT's target_parameters and low-rank terms by grouped_mm: time and kept bytes.

    python -m bench.bench_experts --device cpu --out rows.jsonl [--quick] [--shape 64x512x192] [--tokens 256]

What is timed is a layer of experts of Qwen3-MoE, as transformers' grouped_mm computes it, with an adapter on both of
its weights; the router's weights and x want gradients, as in a model.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpeft import ops, reference
from fastpeft.ops import ExpertLinear

from . import command, harness
from .harness import FROZEN, PEER, Call, Variant

OURS, GROUPED = "ours", "grouped_mm"


@dataclass(frozen=True)
class Problem:
    """A layer: ``shape`` is its number of experts, the hidden and the inner size."""

    shape: str
    tokens: int
    choices: int
    rank: int
    dtype: torch.dtype
    device: torch.device

    @property
    def fields(self) -> dict:
        return harness.columns("experts", self.shape, self.tokens, self.dtype, rank=self.rank, top_k=self.choices)

    @property
    def sizes(self) -> tuple[int, int, int]:
        experts, hidden, inner = map(int, self.shape.split("x"))
        return experts, hidden, inner

    def traffic(self, which: str, adapted: bool) -> tuple[int, int]:
        """The least bytes and operations: every weight is read once, and once more for the gradients."""
        experts, hidden, inner = self.sizes
        rows, rank = self.tokens * self.choices, self.rank if adapted else 0
        passes = 1 if which == harness.FORWARD else 2
        low = rank * (2 * hidden + 3 * inner)
        moved = passes * (experts * (3 * hidden * inner + low) + 2 * self.tokens * hidden)
        flops = 2 * rows * (passes * 3 * hidden * inner + (1 if passes == 1 else 3) * low)
        return moved * self.dtype.itemsize, flops


@dataclass(frozen=True)
class Operands:
    """What every variant is given. A and B are as PEFT stores them: B's fast index is the expert."""

    x: Tensor
    index: Tensor
    weights: Tensor
    gate_up: Tensor
    down: Tensor
    adapters: tuple[Tensor, ...]
    dy: Tensor

    @classmethod
    def draw(cls, problem: Problem, seed: int) -> "Operands":
        experts, hidden, inner = problem.sizes
        tokens, rank, k = problem.tokens, problem.rank, problem.choices
        generator = torch.Generator().manual_seed(seed)

        def new(*size, spread=1.0, trained=True):
            drawn = torch.randn(size, generator=generator) * spread
            return drawn.to(problem.device, problem.dtype).requires_grad_(trained)

        scores, index = torch.rand(tokens, experts, generator=generator).topk(k)
        pairs = ((hidden, 2 * inner), (inner, hidden))
        adapters = [
            t
            for i, n in pairs
            for t in (new(experts * rank, i, spread=i**-0.5), new(n, rank * experts, spread=rank**-0.5))
        ]
        return cls(
            new(tokens, hidden),
            index.to(problem.device),
            (scores / scores.sum(1, keepdim=True)).to(problem.device, problem.dtype).requires_grad_(),
            new(experts, 2 * inner, hidden, spread=hidden**-0.5, trained=False),
            new(experts, hidden, inner, spread=inner**-0.5, trained=False),
            tuple(adapters),
            new(tokens, hidden, trained=False),
        )

    def to(self, dtype: torch.dtype) -> "Operands":
        def change(t):
            return t.detach().to(dtype).requires_grad_(t.requires_grad) if t.is_floating_point() else t

        return Operands(*(tuple(map(change, v)) if isinstance(v, tuple) else change(v) for v in vars(self).values()))

    def linears(self, adapted: bool = True) -> tuple[ExpertLinear, ExpertLinear]:
        found, experts = [], len(self.gate_up)
        for weight, a, b in ((self.gate_up, *self.adapters[:2]), (self.down, *self.adapters[2:])):
            lora = (a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts).permute(2, 0, 1), 2.0)
            found.append(ExpertLinear(weight, None, *lora) if adapted else ExpertLinear(weight))
        return found[0], found[1]


def swiglu(u: Tensor) -> Tensor:
    gate, up = u.chunk(2, -1)
    return F.silu(gate) * up


def _ours(o: Operands):
    return lambda: ops.experts(o.x, o.index, o.weights, *o.linears(), swiglu)


def _grouped(o: Operands):
    """As a person would write it: rows sorted, three grouped_mm for each projection, autograd."""
    experts, choices = len(o.gate_up), o.index.shape[1]

    def project(rows, linear, ends):
        low = F.grouped_mm(rows, linear.lora_a.mT, offs=ends)
        delta = F.grouped_mm(low, linear.lora_b.contiguous().mT, offs=ends)
        return F.grouped_mm(rows, linear.weight.mT, offs=ends) + linear.scale * delta

    def run():
        up, down = o.linears()
        order = o.index.reshape(-1).argsort(stable=True)
        ends = torch.bincount(o.index.reshape(-1), minlength=experts).cumsum(0, dtype=torch.int32)
        h = swiglu(project(o.x[order // choices], up, ends))
        y = project(h, down, ends) * o.weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return y[back].view(*o.index.shape, -1).sum(1)

    return run


def _module(o: Operands, problem: Problem):
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts, hidden, inner = problem.sizes
    config = Qwen3MoeConfig(num_experts=experts, hidden_size=hidden, moe_intermediate_size=inner)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = torch.nn.Parameter(o.gate_up, requires_grad=False)
    module.down_proj = torch.nn.Parameter(o.down, requires_grad=False)
    return torch.nn.ModuleDict({"experts": module})


def _frozen(o: Operands, problem: Problem):
    module = _module(o, problem)["experts"]
    return lambda: module(o.x, o.index, o.weights)


def _peft(o: Operands, problem: Problem):
    import peft

    names = [f"experts.{name}" for name in ("gate_up_proj", "down_proj")]
    config = peft.LoraConfig(r=problem.rank, lora_alpha=2 * problem.rank, target_modules=[], target_parameters=names)
    outer = peft.inject_adapter_in_model(config, _module(o, problem))["experts"]
    for wrapper, a, b in ((outer.base_layer, *o.adapters[:2]), (outer, *o.adapters[2:])):
        for part, t in ((wrapper.lora_A, a), (wrapper.lora_B, b)):
            part["default"].weight = torch.nn.Parameter(t) if not isinstance(t, torch.nn.Parameter) else t
    return lambda: outer(o.x, o.index, o.weights)


PROVIDERS: dict[str, Callable] = {
    FROZEN: _frozen,
    PEER: _peft,
    GROUPED: lambda o, problem: _grouped(o),
    OURS: lambda o, problem: _ours(o),
}


def variant(problem: Problem, name: str) -> Variant:
    adapted = name != FROZEN

    def leaves(o):
        return [o.x, o.weights, *(o.adapters if adapted else ())]

    def bind(i):
        o = Operands.draw(problem, i)
        if name == PEER:  # its modules hold parameters
            o = replace(o, adapters=tuple(map(torch.nn.Parameter, o.adapters)))
        run = PROVIDERS[name](o, problem)
        return Call(lambda: [run()], leaves(o), [o.dy], [o.gate_up, o.down, *o.adapters])

    def plain(dtype):
        o = Operands.draw(problem, 0)
        o = o if dtype is None else o.to(dtype)
        y = reference.experts(o.x, o.index, o.weights, *o.linears(adapted), swiglu)
        return [y, *torch.autograd.grad(y, leaves(o), o.dy)]

    return Variant(name, bind, plain, partial(problem.traffic, adapted=adapted), own=name == OURS)


def case(problem: Problem, names=None) -> harness.Case:
    return harness.Case.of(problem, [variant(problem, name) for name in names or PROVIDERS], sets=2)


def problems(device: torch.device) -> list[Problem]:
    if device.type == "cuda":  # Qwen3-30B-A3B; Mixtral's width with many tokens of few experts
        return [
            Problem("128x2048x768", 2048, 8, 16, torch.bfloat16, device),
            Problem("8x4096x14336", 2048, 2, 16, torch.bfloat16, device),
        ]
    return [
        Problem("64x512x192", 256, 8, 16, torch.float32, device),
        Problem("128x1024x384", 512, 8, 16, torch.float32, device),
    ]


def cases(options: argparse.Namespace) -> list[Callable[[], harness.Case]]:
    listed = problems(options.device)
    if options.shape:
        listed = [replace(listed[0], shape=shape) for shape in options.shape]
    listed = [replace(p, **command.given(options, "tokens", "choices", "rank")) for p in listed]
    return [partial(case, problem, options.variant) for problem in listed[: 1 if options.quick else None]]


def main(argv: list[str] | None = None) -> int:
    parser = command.parser("bench_experts", __doc__, quick="the first case", variants=list(PROVIDERS))
    parser.add_argument("--shape", action="append", help="experts x hidden x inner size; may be repeated")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--choices", type=int, help="experts a token")
    parser.add_argument("--rank", type=int)
    return command.main(parser, cases, argv)


if __name__ == "__main__":
    sys.exit(main())
