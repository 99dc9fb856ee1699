"""The trained half of a LoRA layer."""

import math

import torch
from torch import nn

from .. import _check

INITS = ("kaiming", "gaussian", "random")


class LoraAdapter(nn.Module):
    """The trained parameters of one adapter, ``lora_A [r, K]`` and ``lora_B [N, r]``, and the numbers beside them.

    Args:
        in_features: K, the width of the frozen layer's input.
        out_features: N, the width of its output.
        r: The rank, at least 1. The default is PEFT's.
        alpha: The numerator of the scale, any finite number. The default is PEFT's.
        dropout: The probability of dropping an element of x, in [0, 1), in training mode only.
        rslora: Whether the scale is ``alpha / sqrt(r)`` (Kalajdzievski, 2023) instead of ``alpha / r``.
        lora_bias: Whether B has a bias ``[N]``, which is trained with it.
        init: How A and B start. "kaiming" is a uniform A and a zero B, as in the paper and in PEFT; "gaussian" a normal
            A of standard deviation 1 / r and a zero B; "random" starts both as ``nn.Linear`` starts its weight, so that
            the adapter acts from the first step.
        dtype: The parameters' dtype; None is torch's default.
        device: The parameters' device; None is torch's default.
        experts: How many matrices the adapter is for, in PEFT's layout: ``lora_A [experts · r, K]``, the expert its
            slow index, and ``lora_B [N, r · experts]``, the expert its fast one.
        dora: Whether the rows of W + scale · B A have norms that are trained, ``lora_magnitude [N]`` (Liu et al.,
            2024). The layer around it gives them their first values.

    Raises:
        ValueError: An argument has a value that it may not have; the error names it and what was expected.
        TypeError: ``rslora`` or ``dora`` is no bool.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_bias: nn.Parameter | None
    lora_magnitude: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float = 8,
        dropout: float = 0.0,
        rslora: bool = False,
        lora_bias: bool = False,
        init: str = "kaiming",
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        experts: int = 1,
        dora: bool = False,
    ):
        super().__init__()
        self.r = _check.positive("LoraAdapter", "r", r)
        self.alpha = _check.finite("LoraAdapter", "alpha", alpha)
        self.dropout = _check.probability("LoraAdapter", "dropout", dropout)
        _check.one_of("LoraAdapter", "init", init, INITS)
        self.rslora = _check.boolean("LoraAdapter", "rslora", rslora)
        self.init = init
        self.scale = self.alpha / (math.sqrt(self.r) if rslora else self.r)
        self.lora_A = nn.Parameter(torch.empty(experts * self.r, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, self.r * experts, dtype=dtype, device=device))
        bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if lora_bias else None
        self.register_parameter("lora_bias", bias)
        if _check.boolean("LoraAdapter", "dora", dora) and lora_bias:
            raise ValueError("LoraAdapter: dora is True beside lora_bias=True, expected one of them")
        magnitude = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if dora else None
        self.register_parameter("lora_magnitude", magnitude)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise anew; also what a model made on the meta device calls once it has memory."""
        if self.init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if self.init == "random":
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)
        if self.lora_magnitude is not None:
            nn.init.constant_(self.lora_magnitude, math.nan)  # only who has W can tell

    def extra_repr(self) -> str:
        rest = ", rslora=True" if self.rslora else ""
        rest += ", lora_bias=True" if self.lora_bias is not None else ""
        rest += ", dora=True" if self.lora_magnitude is not None else ""
        return f"r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}{rest}"


def adapter_name(op: str, name: str) -> str:
    """Check that ``name`` can be part of a parameter's name."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name) or name == "training":
        given = repr(name) if isinstance(name, str) else _check.shown(name)
        raise ValueError(f"{op}: name is {given}, expected a word without dots that nn.ModuleDict does not use itself")
    return name
