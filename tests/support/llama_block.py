"""A block of Llama-3.1-8B on the null GPU: a step of each way, and what that keeps and needs."""

import copy
import functools

import peft
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastpeft
from bench.llama_block import LINEARS, WIDE, Block
from bench.memory_models import OURS, PEFT
from bench.nullgpu import counted
from fastpeft import _plan

ROWS = 2048
MIB = 2**20


@functools.cache
def base() -> Block:
    with torch.device("cuda"):
        return Block().bfloat16().requires_grad_(False)


@functools.cache
def nf4_base() -> Block:
    from bench.bench_quantised import nf4_of_zeros  # which asks for bitsandbytes

    with torch.device("meta"):
        block = Block()
    for module in (block.self_attn, block.mlp):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(module, name, nf4_of_zeros(layer.out_features, layer.in_features, "cuda"))
    block.is_loaded_in_4bit = True
    return block


def step_of(
    way: str, dropout: float, adapters: torch.dtype, base=base, reentrant: bool | None = None, dora: bool = False
):
    """Forward and backward, under a checkpoint unless ``reentrant`` is None."""
    config = peft.LoraConfig(r=16, lora_dropout=dropout, target_modules=LINEARS, use_dora=dora)
    wide = adapters == torch.float32
    model = peft.get_peft_model(copy.deepcopy(base()), config, autocast_adapter_dtype=wide).train()
    if way != PEFT:
        fastpeft.accelerate(model, fuse_mlp=way == OURS)
    model = model.base_model.model
    x = torch.zeros(1, ROWS, WIDE, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    gradient, trained = torch.zeros_like(x), [p for p in model.parameters() if p.requires_grad]

    def step() -> int:
        y = model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)
        kept = torch.cuda.memory_allocated()
        y.backward(gradient)
        x.grad = None
        for parameter in trained:
            parameter.grad = None
        return kept

    for _ in range(5):
        step()
    return step


def kept_and_peak(step) -> tuple[float, float]:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = step() - before
    return round(kept / MIB, 1), round((torch.cuda.max_memory_allocated() - before) / MIB, 1)


APART = "ours, fuse_mlp=False"
ROUNDING = 1.3  # the allocator hands out a free block up to 1 MiB too large and counts it so, by what ran before
# (dropout, adapters): kept and peak in MiB of each way.
BLOCKS = {
    (0.0, torch.bfloat16): {PEFT: (272.4, 384.9), APART: (272.4, 384.9), OURS: (160.4, 213.2)},
    (0.05, torch.bfloat16): {PEFT: (412.4, 516.4), APART: (272.4, 384.9), OURS: (160.4, 213.2)},
    (0.0, torch.float32): {PEFT: (488.9, 624.9), APART: (272.9, 385.9), OURS: (160.9, 214.1)},
    (0.05, torch.float32): {PEFT: (564.9, 812.9), APART: (272.9, 385.9), OURS: (160.9, 212.7)},
}
# Of a block under a checkpoint, with dropout and float32 adapters: whether it is reentrant, and the peak of each way.
CHECKPOINTED = {False: {PEFT: 812.9, OURS: 154.1}, True: {PEFT: 828.9, OURS: 228.7}}


def assert_launches(step, launches: int) -> None:
    _plan.refusals.clear()
    asked = counted(step)
    assert (asked.syncs, asked.pageable, asked.missing) == (0, 0, 0)
    assert asked.launches <= launches
    assert not _plan.refusals
