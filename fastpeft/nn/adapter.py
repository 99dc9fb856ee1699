"""The trained half of a LoRA layer."""

import math

import torch
from torch import nn

from .. import _check

INITS = ("kaiming", "gaussian", "random")


class LoraAdapter(nn.Module):
    """The trained parameters of one adapter and the numbers that go with them.

    Args:
        in_features, out_features: K and N of the frozen layer.
        r: rank, the rows of A.
        alpha: numerator of the scale.
        dropout: probability of dropping an element of x, in [0, 1); in training mode only.
        rslora: scale is ``alpha / sqrt(r)`` instead of ``alpha / r``.
        lora_bias: whether B has a bias ``[N]``, trained with it.
        init: of A and B. "kaiming": uniform A and zero B, as the paper and PEFT; "gaussian": normal A of standard
            deviation 1 / r and zero B; "random": both as ``nn.Linear`` starts, so that the adapter acts from the start.
        dtype, device: of the parameters.

    Raises:
        ValueError: naming the argument, what it is and what was expected.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        rslora: bool = False,
        lora_bias: bool = False,
        init: str = "kaiming",
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.r = _check.positive("LoraAdapter", "r", r)
        self.alpha = _check.finite("LoraAdapter", "alpha", alpha)
        self.dropout = _check.probability("LoraAdapter", "dropout", dropout)
        if init not in INITS:
            raise ValueError(f"LoraAdapter: init is {init!r}, expected one of {', '.join(INITS)}")
        self.rslora = rslora
        self.init = init
        self.scale = self.alpha / (math.sqrt(r) if rslora else r)
        self.lora_A = nn.Parameter(torch.empty(r, in_features, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, dtype=dtype, device=device))
        bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if lora_bias else None
        self.register_parameter("lora_bias", bias)
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

    def extra_repr(self) -> str:
        rest = ", rslora=True" if self.rslora else ""
        rest += ", lora_bias=True" if self.lora_bias is not None else ""
        return f"r={self.r}, alpha={self.alpha:g}, dropout={self.dropout:g}{rest}"


def adapter_name(op: str, name: str) -> str:
    """A name that can be part of a parameter's name."""
    if not isinstance(name, str) or not name or "." in name or hasattr(nn.ModuleDict, name) or name == "training":
        raise ValueError(f"{op}: name is {name!r}, expected a word without dots that nn.ModuleDict does not use itself")
    return name
