"""A whole Llama block and a small model, LoRA on all linears, with and without gradient checkpointing of each block.

    python -m bench.bench_block --out rows.jsonl [--quick]

A step is forward and backward from the last hidden state; dropout 0.05, float32 adapters of rank 16. What is kept and
what is needed at most is counted by PyTorch's profiler, allocation by allocation: on a CPU too it is exact. The gate
compares without dropout, whose masks are each library's own. Three ways: PEFT's layers, those with the MLPs as one op
of ours, and all layers ours.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import fastpeft

from . import command, harness
from .harness import BOTH, PEER, Call, Case, Variant

OURS, MIXED = "ours", "PEFT, our MLP"
WAYS = (PEER, MIXED, OURS)
RANK, DROPOUT = 16, 0.05
_BETWEEN = "forward has ended"


@dataclass(frozen=True)
class Problem:
    """``blocks`` of a Llama of hidden size K and inner size I, ``shape`` is KxI; rows are tokens of one text."""

    shape: str
    blocks: int
    rows: int
    checkpointing: bool
    device: torch.device
    dtype: torch.dtype = torch.float32

    @property
    def fields(self) -> dict:
        op = ("block" if self.blocks == 1 else f"{self.blocks} blocks") + ", checkpointed" * self.checkpointing
        adapters = str(self.dtype).removeprefix("torch.")
        return harness.columns(op, self.shape, self.rows, self.dtype, rank=RANK, dropout=DROPOUT, adapters=adapters)

    def model(self, way: str, dropout: float, dtype: torch.dtype) -> nn.Module:
        import peft
        from transformers import LlamaConfig, LlamaModel

        wide, inner = map(int, self.shape.split("x"))
        heads = {"num_attention_heads": wide // 64, "num_key_value_heads": max(1, wide // 256)}
        sizes = {"hidden_size": wide, "intermediate_size": inner, "num_hidden_layers": self.blocks, "vocab_size": 8}
        torch.manual_seed(0)
        base = LlamaModel(LlamaConfig(**sizes, **heads, use_cache=False)).to(self.device, dtype)
        config = peft.LoraConfig(r=RANK, lora_dropout=dropout, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(base, config).train()
        for module in [model] if way == OURS else [block.mlp for block in base.layers] if way == MIXED else []:
            fastpeft.accelerate(module)
        if self.checkpointing:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return base

    def call(self, way: str, dropout: float, dtype: torch.dtype | None = None) -> Call:
        """The step of one way; without a dtype in the problem's."""
        dtype = dtype or self.dtype
        model, generator = self.model(way, dropout, dtype), torch.Generator().manual_seed(1)
        x, dy = (torch.randn(1, self.rows, model.config.hidden_size, generator=generator) for _ in range(2))
        x, dy = x.to(self.device, dtype).requires_grad_(), dy.to(self.device, dtype)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        resident = [*model.parameters(), *model.buffers()]
        return Call(lambda: [model(inputs_embeds=x).last_hidden_state], [x, *trained], [dy], resident)

    def traffic(self, which: str) -> tuple[int, int]:
        """No bytes, and the operations of the frozen linears: 2 a weight and row, again for dx and once more."""
        wide, inner = map(int, self.shape.split("x"))
        weights = 2 * wide * wide + 2 * wide * 64 * max(1, wide // 256) + 3 * wide * inner
        return 0, 2 * self.rows * self.blocks * weights * (1 if which != BOTH else 2 + self.checkpointing)


@dataclass(frozen=True)
class Step(Call):
    """What is checked, without dropout; what is timed and counted is ``trains``, with it."""

    trains: Call | None = None

    def step(self, which: str) -> Callable:
        return self.trains.step(which)

    def memory(self, device: torch.device) -> tuple[int, int]:
        """Allocated after forward, and the most at any time of a step, above what was there before."""
        call = self.trains
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            ys = call.forward()
            kept = torch.cuda.memory_allocated(device) - before
            torch.autograd.grad(ys, call.wrt, call.grads)
            return kept, torch.cuda.max_memory_allocated(device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            ys = call.forward()
            with record_function(_BETWEEN):
                pass
            grads = torch.autograd.grad(ys, call.wrt, call.grads)
        del ys, grads
        now = peak = kept = 0
        for event in sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
            if event.name() == _BETWEEN:
                kept = now
            elif event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now)
        return kept, peak


def case(problem: Problem, ways: Sequence[str] = WAYS) -> Case:
    @cache
    def plain(dtype: torch.dtype | None) -> list[Tensor]:
        call = replace(problem, checkpointing=False).call(PEER, 0.0, dtype)
        ys = call.forward()
        return [*ys, *torch.autograd.grad(ys, call.wrt, call.grads)]

    @cache
    def bind(_: int, way: str) -> Step:
        return Step(**vars(problem.call(way, 0.0)), trains=problem.call(way, DROPOUT))

    variants = [Variant(way, partial(bind, way=way), plain, problem.traffic, own=way != PEER) for way in ways]
    return Case({**problem.fields, "sets": 1}, variants, 1, problem.device, problem.dtype, (BOTH,))


def cases(options: argparse.Namespace) -> list[Callable[[], Case]]:
    sizes = [("512x1408", 1, 512), ("256x704", 6, 256)][: 1 if options.quick else None]
    problems = [Problem(*each, checkpointing, options.device) for each in sizes for checkpointing in (False, True)]
    return [partial(case, problem) for problem in problems]


def main(argv: list[str] | None = None) -> int:
    return command.main(command.parser("bench_block", __doc__, quick="the block", variants=WAYS), cases, argv)


if __name__ == "__main__":
    sys.exit(main())
