"""A bottleneck adapter: parameters, initialisation, and what surrounds the fused op in some of its forms.

    u = drop(scale · (act(norm(x) Dᵀ + d) Uᵀ + b))                    one call into ops, with the residual where
    u = u · mean(sigmoid(x Gᵀ + g))            gating                 nothing comes between them
    y = LN(residual + u), or residual + LN(u)  norm_after

Sources: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP" (2019); Pfeiffer et al., "AdapterFusion"
(2021); He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning" (2022); for the gate Mao et al.,
"UniPELT" (2022); for the channel scale and stochastic depth Steitz and Roth, "Adapters Strike Back" (2024).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check, ops
from ..ops.bottleneck_arguments import ACTIVATIONS, NORMS
from . import plain
from .backend import serving_backend

INITS = ("bert", "mam", "houlsby")
SCALES = ("learned", "channel")


class BottleneckAdapter(nn.Module):
    """A bottleneck adapter, sequential or parallel. Its formulas are those of the library ``adapters``.

    >>> adapter = BottleneckAdapter(768, 48, activation="silu")
    >>> y = adapter(x)                            # x + U act(D x + d) + b
    >>> y = adapter(x, residual)                  # residual + ...
    >>> delta = BottleneckAdapter(768, 48, parallel=True)(x)              # without residual

    Parameters: ``down_weight [bottleneck, features]``, ``up_weight [features, bottleneck]`` and, where asked for,
    ``down_bias``, ``up_bias``, ``scale``, ``norm_weight``, ``norm_bias``, ``norm_after_weight``, ``norm_after_bias``,
    ``gate_weight [1, features]``, ``gate_bias [1]``.

    Args:
        features: K, the width of x and of the output.
        bottleneck: H, the width between the projections, at least 1.
        activation: "relu", "gelu", "gelu_tanh", "silu", "tanh", "leaky_relu" or "identity".
        scale: A number, "learned" (one parameter) or "channel" (one parameter a feature); parameters start at 1.
        norm: The norm of x before the projection: None, "layer" or "rms".
        norm_after: Whether the output goes through a LayerNorm.
        residual_first: Whether the residual is added before that LayerNorm, as it is by default; a parallel adapter
            adds it after.
        parallel: Whether nothing is added where no residual is given; a sequential adapter adds x.
        dropout: The probability of dropping an element of the branch, in [0, 1), in training mode only.
        stochastic_depth: The probability of dropping the whole branch of a sample (the first dimension), in [0, 1), in
            training mode only.
        gating: Whether the branch is multiplied by sigmoid(x Gᵀ + g), averaged over dimension 1, the sequence.
        init: How the weights start. "bert" is normal with standard deviation 0.02; "mam" a uniform D as ``nn.Linear``'s
            and a zero U; "houlsby" normal with standard deviation 0.01, cut at two of them. Biases start at 0.
        bias: Whether the projections have biases.
        eps: What the norms add to the variance.
        dtype: The parameters' dtype; None is torch's default.
        device: The parameters' device; None is torch's default.

    Raises:
        ValueError: An argument has a value that it may not have; the error names it and what was expected.
    """

    fastpeft_kind = "bottleneck adapters"

    down_weight: nn.Parameter
    up_weight: nn.Parameter
    down_bias: nn.Parameter | None
    up_bias: nn.Parameter | None
    norm_weight: nn.Parameter | None
    norm_bias: nn.Parameter | None
    norm_after_weight: nn.Parameter | None
    norm_after_bias: nn.Parameter | None
    gate_weight: nn.Parameter | None
    gate_bias: nn.Parameter | None
    scale: float | nn.Parameter

    def __init__(
        self,
        features: int,
        bottleneck: int,
        activation: str = "relu",
        scale: float | str = 1.0,
        norm: str | None = None,
        norm_after: bool = False,
        residual_first: bool = True,
        parallel: bool = False,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        gating: bool = False,
        init: str = "bert",
        bias: bool = True,
        eps: float = 1e-5,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ):
        super().__init__()
        name = "BottleneckAdapter"
        self.features = _check.positive(name, "features", features)
        self.bottleneck = _check.positive(name, "bottleneck", bottleneck)
        _check.one_of(name, "activation", activation, ACTIVATIONS)
        _check.one_of(name, "norm", norm, (None, *NORMS))
        _check.one_of(name, "init", init, INITS)
        self.activation, self.norm, self.init = activation, norm, init
        self.residual_first, self.parallel = residual_first, parallel
        self.eps = _check.finite(name, "eps", eps)
        self.dropout = _check.probability(name, "dropout", dropout)
        self.stochastic_depth = _check.probability(name, "stochastic_depth", stochastic_depth)

        def parameter(label, *shape, wanted=True):
            value = nn.Parameter(torch.empty(shape, dtype=dtype, device=device)) if wanted else None
            self.register_parameter(label, value)

        parameter("down_weight", bottleneck, features)
        parameter("down_bias", bottleneck, wanted=bias)
        parameter("up_weight", features, bottleneck)
        parameter("up_bias", features, wanted=bias)
        if isinstance(scale, str):
            _check.one_of(name, "scale", scale, SCALES)
            parameter("scale", 1 if scale == "learned" else features)
        else:
            self.scale = _check.finite(name, "scale", scale)
        parameter("norm_weight", features, wanted=norm is not None)
        parameter("norm_bias", features, wanted=norm == "layer")
        parameter("norm_after_weight", features, wanted=norm_after)
        parameter("norm_after_bias", features, wanted=norm_after)
        parameter("gate_weight", 1, features, wanted=gating)
        parameter("gate_bias", 1, wanted=gating)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise anew; also what a model made on the meta device calls once it has memory."""
        if self.init == "bert":
            nn.init.normal_(self.down_weight, std=0.02)
            nn.init.normal_(self.up_weight, std=0.02)
        elif self.init == "mam":
            nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
            nn.init.zeros_(self.up_weight)
        else:
            for weight in (self.down_weight, self.up_weight):
                nn.init.trunc_normal_(weight, std=1e-2, a=-2e-2, b=2e-2)
        for label, value in self.named_parameters(recurse=False):
            if label.endswith("_bias"):
                value.zero_()
            elif label in ("scale", "norm_weight", "norm_after_weight"):
                value.fill_(1.0)
        if self.gate_weight is not None:
            nn.init.normal_(self.gate_weight, std=0.02)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """The adapter's output, of x's shape.

        Args:
            x: ``[..., features]``.
            residual: What is added, of x's shape; None is x for a sequential adapter, nothing for a parallel one.
        """
        if residual is None and not self.parallel:
            residual = x
        dropout = self.dropout if self.training else 0.0
        depth = self.stochastic_depth if self.training else 0.0
        after, gate_weight = self.norm_after_weight is not None, self.gate_weight
        before = self.residual_first and not self.parallel  # where the residual goes if a norm follows
        alone = gate_weight is not None or depth > 0.0 or (after and not before)
        if plain.is_plain(x):
            y = plain.bottleneck(self, x, None if alone else residual, dropout)
        else:
            y = ops.bottleneck(
                x, self.down_weight, self.down_bias, self.up_weight, self.up_bias, None if alone else residual,
                self.activation, self.scale, self.norm_weight, self.norm_bias, self.norm or "layer", self.eps, dropout,
            )  # fmt: skip
        if depth:
            y = y * _survivors(x, depth)
        if gate_weight is not None:
            gate = torch.sigmoid(F.linear(x.to(gate_weight.dtype), gate_weight, self.gate_bias))
            y = y * gate.mean(1, keepdim=True).to(y.dtype)
        if alone and before and residual is not None:
            y = y + residual
        if after:
            y = F.layer_norm(y, y.shape[-1:], self.norm_after_weight, self.norm_after_bias, self.eps)
        return y + residual if alone and not before and residual is not None else y

    def fastpeft_backend(self) -> str:
        """The backend for an x of one row."""
        tensors = self.down_weight, self.down_bias, self.up_weight, self.up_bias
        return serving_backend("bottleneck", self.down_weight.new_empty(1, self.features), *tensors)

    def fastpeft_report(self) -> str:
        """``"fused"``, or what runs in plain PyTorch around the fused op."""
        parts = {
            "its gate": self.gate_weight is not None,
            "its norm after": self.norm_after_weight is not None,
            "stochastic depth": self.stochastic_depth > 0.0,
        }
        found = [part for part, there in parts.items() if there]
        return f"{' and '.join(found)} in plain PyTorch after the fused op" if found else "fused"

    def extra_repr(self) -> str:
        scale = self.scale if isinstance(self.scale, float) else "learned" if len(self.scale) == 1 else "channel"
        given = {
            "scale": None if scale == 1.0 else scale,
            "norm": self.norm,
            "norm_after": self.norm_after_weight is not None,
            "parallel": self.parallel,
            "dropout": self.dropout,
            "stochastic_depth": self.stochastic_depth,
            "gating": self.gate_weight is not None,
        }
        rest = "".join(f", {key}={value}" for key, value in given.items() if value)
        return f"features={self.features}, bottleneck={self.bottleneck}, activation={self.activation}{rest}"


def _survivors(x: Tensor, p: float) -> Tensor:
    """1 / (1 - p) for each sample that keeps its branch, 0 for the others: ``[B, 1, ...]``."""
    shape = [x.shape[0]] + [1] * (x.dim() - 1)
    return torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1.0 - p).div_(1.0 - p)
