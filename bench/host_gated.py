"""What bench_host.py measures of a block whose MLP is gated, dense and in NF4: as one op, as layers, PEFT's, frozen."""

import copy
from collections.abc import Callable

import peft
from torch import Tensor, nn

import fastpeft

from . import bench_quantised
from .host_methods import FROZEN, OURS, PEFT, Steps

APART = "ours, fuse_mlp=False"
NAMES = ("gated block", "gated block in NF4")


class Gated(nn.Module):
    """A Llama's MLP in place of an MLP with the same projections."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        for name, layer in mlp.named_children():
            setattr(self, name, layer)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def steps(
    base: nn.Module, nf4: bool, config: peft.LoraConfig, wide: bool, step: Callable[[nn.Module], object]
) -> Steps:
    """A step of each way.

    Args:
        base: the block; its MLP becomes gated here, and in NF4 if asked.
        nf4: whether its linear layers are bitsandbytes'.
        config: of the adapters.
        wide: whether those are float32.
        step: what is timed, given a model.
    """
    base.mlp = Gated(base.mlp)
    if nf4:
        for part in (base.self_attn, base.mlp):
            for name, layer in [*part.named_children()]:
                if isinstance(layer, nn.Linear):
                    made = bench_quantised.nf4_of_zeros(layer.out_features, layer.in_features, "cuda")
                    setattr(part, name, made)
        base.is_loaded_in_4bit = True

    def adapted() -> nn.Module:
        return peft.get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=wide).train()

    models = {FROZEN: base, PEFT: adapted(), OURS: adapted(), APART: adapted()}
    fastpeft.accelerate(models[OURS])
    fastpeft.accelerate(models[APART], fuse_mlp=False)
    return {way: step(model if way == FROZEN else model.base_model.model) for way, model in models.items()}
