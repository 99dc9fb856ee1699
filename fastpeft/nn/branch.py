"""What a layer tells its siblings about itself: its tensors and numbers, or why it keeps to itself."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from .. import ops
from .._check import PLAIN


class Branch(NamedTuple):
    """One projection of x as ``fastpeft.ops.lora_linear`` takes it.

    Attributes:
        weight: ``[N, K]`` frozen, any strides or quantised; None where the frozen layer is called beside it.
        lora_a: ``[r, K]`` trained.
        lora_b: ``[N, r]`` trained.
        bias: ``[N]`` of the frozen layer, or None.
        scale: dimensionless factor of the low-rank term.
        dropout: probability that holds for this call, 0 outside training.
        lora_bias: ``[N]`` of lora_b, trained, or None; it enters as ``bias + scale · lora_bias``.
    """

    weight: Any
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    scale: float
    dropout: float
    lora_bias: Tensor | None = None

    def folded_bias(self) -> Tensor | None:
        """``bias + scale · lora_bias`` in the adapter's dtype: a float32 one is not rounded to 16 bits."""
        if self.lora_bias is None:
            return self.bias
        bias = self.scale * self.lora_bias.to(self.lora_a.dtype)
        return bias if self.bias is None else bias + self.bias

    def unchanged(self, other: object) -> bool:
        """Whether this is ``other``: the same tensors and numbers.

        Args:
            other: A branch of the same module, or why there is none.
        """
        if self is other:
            return True
        return (
            isinstance(other, Branch)
            and self.weight is other.weight
            and self.lora_a is other.lora_a
            and self.lora_b is other.lora_b
            and self.bias is other.bias
            and self.lora_bias is other.lora_bias
            and (self.scale, self.dropout) == (other.scale, other.dropout)
        )

    def fits(self, other: "Branch") -> bool:
        """Whether both can be projections of one x in one call.

        Args:
            other: A branch of another module.
        """
        return (
            self.lora_a.dtype == other.lora_a.dtype
            and self.weight.dtype == other.weight.dtype
            and self.weight.device == other.weight.device == other.lora_a.device
            and self.weight.shape[1] == other.weight.shape[1]
        )

    def versions(self) -> tuple:
        """Counters that rise when a tensor is modified in place."""
        weight, a, b, bias, _, _, lora_bias = self
        optional = bias is not None and bias._version, lora_bias is not None and lora_bias._version
        return weight._version, a._version, b._version, *optional


def own_path_reason(module: nn.Module) -> str | None:
    """Why calling ``module`` is more than running its class's forward on its parameters, or None."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has hooks"
    if "forward" in module.__dict__:
        return "has its forward overridden on the instance"
    trains = getattr(type(module), "fastpeft_trains", None)
    if trains is not None:
        return trains
    return "is parametrised" if "parametrizations" in module._modules else None


def branch_of(module: Any) -> Branch | str:
    """The module's branch (``protocol.Sharing``), or the reason why it cannot share its input."""
    reason = own_path_reason(module)
    if reason is not None:
        return f"it {reason}"
    branch = module.fastpeft_branch()
    if isinstance(branch, str):
        return branch
    for tensor in (branch.weight, branch.lora_a, branch.lora_b, branch.bias, branch.lora_bias):
        if tensor is None or isinstance(tensor, ops.Base):
            continue
        if type(tensor) not in PLAIN or tensor.is_inference():
            return f"a parameter is a {type(tensor).__name__}" if type(tensor) not in PLAIN else "inference tensors"
    return branch
