"""What bench_host.py measures of a block of Llama-3.1-8B, dense and in NF4: its MLP as one op and as layers."""

import copy
from collections.abc import Callable

import peft
import torch
from torch import nn

import fastpeft

from . import bench_quantised, memory_models
from .host_methods import FROZEN, OURS, PEFT, Steps
from .llama_block import Block

APART = "ours, fuse_mlp=False"
NAMES = ("gated block", "gated block in NF4")


def steps(nf4: bool, config: peft.LoraConfig, wide: bool, step: Callable[[nn.Module], object], unsloth: bool) -> Steps:
    """A step of each way.

    Args:
        nf4: whether the block's linear layers are bitsandbytes'.
        config: of the adapters.
        wide: whether those are float32.
        step: what is timed, given a model.
        unsloth: whether Unsloth's functions are measured beside PEFT's layers, and nothing else.
    """
    with torch.device("cuda"):
        base = Block().bfloat16().requires_grad_(False)
    if nf4:
        for part in (base.self_attn, base.mlp):
            for name, layer in [*part.named_children()]:
                if isinstance(layer, nn.Linear):
                    made = bench_quantised.nf4_of_zeros(layer.out_features, layer.in_features, "cuda")
                    setattr(part, name, made)
        base.is_loaded_in_4bit = True

    def adapted() -> nn.Module:
        return peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=wide).train()

    if unsloth:
        models = {PEFT: adapted(), memory_models.UNSLOTH: adapted()}
        block = models[memory_models.UNSLOTH].base_model.model
        memory_models.use_unsloths(memory_models.unsloths_functions(), block.self_attn, block.mlp)
    else:
        models = {FROZEN: base, PEFT: adapted(), OURS: adapted(), APART: adapted()}
        fastpeft.accelerate(models[OURS])
        fastpeft.accelerate(models[APART], fuse_mlp=False)
    return {way: step(model if way == FROZEN else model.base_model.model) for way, model in models.items()}
