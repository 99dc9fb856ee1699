"""What others do for a LoRA linear layer: PEFT's own layer, the addmm form of the fast trainers, torch.compile."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def compiled() -> Callable[[Callable], Callable]:
    """torch.compile for one case: it forgets those before, which count against a limit of 8 and then run eagerly."""
    torch.compiler.reset()
    return partial(torch.compile, dynamic=False)


def peft_layer(
    weight: Tensor,
    a: nn.Parameter,
    b: nn.Parameter,
    scale: float,
    dropout: float,
    magnitude: nn.Parameter | None = None,
) -> nn.Module:
    """PEFT's LoRA layer as ``get_peft_model`` makes it around a linear layer, holding these very parameters.

    With a magnitude it is DoRA. Adapters wider than the weight are PEFT's default (``autocast_adapter_dtype``), which
    casts x up in every layer.
    """
    import peft

    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    base.weight, r = nn.Parameter(weight, requires_grad=False), a.shape[0]
    settings = {"r": r, "lora_alpha": scale * r, "lora_dropout": dropout, "use_dora": magnitude is not None}
    config = peft.LoraConfig(**settings, target_modules=["proj"])
    model = peft.get_peft_model(nn.ModuleDict({"proj": base}), config, autocast_adapter_dtype=a.dtype != weight.dtype)
    layer = model.base_model.model["proj"]
    layer.lora_A["default"].weight, layer.lora_B["default"].weight = a, b
    if magnitude is not None:
        layer.lora_magnitude_vector["default"].weight = magnitude
    return layer.train()


class _Addmm(torch.autograd.Function):
    """y = x Wᵀ + s (drop(x) Aᵀ) Bᵀ in library calls that accumulate (beta = 1), as axolotl and Unsloth write it."""

    @staticmethod
    def forward(ctx, x, dropped, weight, a, b, scale):
        a_cast, b_cast = a.to(x.dtype), b.to(x.dtype)
        y = x @ weight.T
        y.addmm_(dropped @ a_cast.T, b_cast.T, alpha=scale)
        ctx.save_for_backward(dropped, weight, a_cast, b_cast)
        ctx.settings = scale, dropped is not x and dropped.data_ptr() != x.data_ptr(), a.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        dropped, weight, a, b = ctx.saved_tensors
        scale, two_inputs, adapter_dtype = ctx.settings
        dy_b = dy @ b
        da = (dy_b.T @ dropped).mul_(scale)
        db = (dy.T @ (dropped @ a.T)).mul_(scale)  # S is computed again, not saved
        dx, d_dropped = dy @ weight, None
        if two_inputs:
            d_dropped = (dy_b @ a).mul_(scale)
        else:
            dx.addmm_(dy_b, a, alpha=scale)
        return dx, d_dropped, None, da.to(adapter_dtype), db.to(adapter_dtype), None


def addmm_form(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float, dropout: float) -> Tensor:
    """The form above; dropout is PyTorch's own in front of it, as in axolotl, and Unsloth has none."""
    dropped = F.dropout(x, dropout) if dropout else x
    return _Addmm.apply(x, dropped, weight, a, b, scale)


def plain(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Sequence[Tensor] | None,
    lora_bs: Sequence[Tensor] | None,
    scale: float,
    masks: Sequence[Tensor | None],
) -> list[Tensor]:
    """What a person writes. ``masks`` are 0 where an element was dropped, else 1 / (1 - p); no lora_as: frozen."""
    ys = []
    for p, (weight, mask) in enumerate(zip(weights, masks, strict=True)):
        y = F.linear(x, weight)
        if lora_as is not None:
            branch = x.to(lora_as[p].dtype)
            branch = branch if mask is None else branch * mask.to(branch.dtype)
            y = (y + F.linear(F.linear(branch, lora_as[p]), lora_bs[p]) * scale).to(x.dtype)
        ys.append(y)
    return ys
