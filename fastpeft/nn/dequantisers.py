"""Frozen layers in the formats of other libraries: one function each, which writes the weight out.

A layer is known by the name of its class or of its weight's, so that nothing is imported. The functions that are here
call the library's own; ``register_dequantiser`` adds others. What a layer gives is rounded as its library rounds it,
and an input is not quantised: a base that does both is read as int8 is.
"""

import functools
import importlib
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import _check, ops


class _Kind(NamedTuple):
    """How one format is read; ``multiplied`` tells the dtype in which its library multiplies, None for that of x."""

    write: Callable[[Any], Tensor]
    multiplied: Callable[[Any], torch.dtype | None]


class _Known(NamedTuple):
    """A Base, and what decided over it."""

    kind: _Kind
    facts: tuple
    base: ops.Base


def _hqq(module: Any) -> Tensor:
    return module.dequantize()


def _torchao(module: Any) -> Tensor:
    return module.weight.dequantize()


def _fp8(module: Any) -> Tensor:
    library = _library("transformers.integrations.finegrained_fp8")
    return library.Fp8Dequantize(None)._dequantize_one(module.weight, module.weight_scale_inv, torch.float32)


def _gptq(module: Any) -> Tensor:
    return module.dequantize_weight().T


def _awq(module: Any) -> Tensor:
    packing = _library("awq.utils.packing_utils")
    weight = packing.dequantize_gemm(module.qweight, module.qzeros, module.scales, module.w_bit, module.group_size)
    return weight.T


def _eetq(module: Any) -> Tensor:
    weight, library = module.weight, _library("transformers.integrations.eetq")
    identity = torch.eye(weight.shape[0], device=weight.device, dtype=torch.float16)
    return library.eetq_kernels_hub.w8_a16_gemm(identity, weight, module.weight_scales).T


def _library(name: str) -> Any:
    """A module of the layer's own library, which is loaded where there is such a layer."""
    return importlib.import_module(name)


def _of_weight(module: Any) -> torch.dtype:
    return module.weight.dtype


def _of_x(module: Any) -> None:
    return None


def _half(module: Any) -> torch.dtype:
    return torch.float16


_KINDS: dict[str, _Kind] = {
    "hqq.core.quantize.HQQLinear": _Kind(_hqq, lambda module: module.compute_dtype),
    "torchao.utils.TorchAOBaseTensor": _Kind(_torchao, _of_weight),
    "transformers.integrations.finegrained_fp8.FP8Linear": _Kind(_fp8, _of_x),
    "gptqmodel.nn_modules.qlinear.torch.TorchLinear": _Kind(_gptq, _of_x),
    "gptqmodel.nn_modules.qlinear.tritonv2.TritonV2Linear": _Kind(_gptq, _of_x),
    "awq.modules.linear.gemm.WQLinear_GEMM": _Kind(_awq, _half),
    "transformers.integrations.eetq.EetqLinear": _Kind(_eetq, _half),
}
_known: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


def register_dequantiser(kind: type | str, function: Callable[[Any], Tensor], dtype: torch.dtype | None = None) -> None:
    """Have frozen layers of one more kind read by the fused op: their weight is written out, used and let go.

    Args:
        kind: The class of such layers, or of their ``weight``, or its full name where it is not imported yet; its
            subclasses are meant too, unless they have a forward of their own. An earlier function for it is replaced.
        function: Given the layer, returns W ``[N, K]`` in a floating-point dtype. It is asked in every forward and
            again in backward, and must give the same values both times.
        dtype: In which such a layer multiplies: for an input in another one it is called as it is. None: in x's.

    Raises:
        TypeError: ``kind`` is no class and no name, ``function`` no function, or ``dtype`` no floating-point dtype.
    """
    if not isinstance(kind, type | str):
        raise TypeError(f"register_dequantiser: kind is {_check.shown(kind)}, expected a class or its full name")
    if not callable(function):
        raise TypeError(f"register_dequantiser: function is {_check.shown(function)}, expected a function")
    _check.dtype_or_none("register_dequantiser", "dtype", dtype)
    name = kind if isinstance(kind, str) else _name(kind)
    _KINDS[name] = _Kind(function, lambda module: dtype)
    _of_class.cache_clear()


def reads(module: nn.Module) -> bool:
    """Whether there is a function for this layer."""
    return _kind(module) is not None


def computed_in(module: Any) -> torch.dtype | None:
    """The dtype in which a layer that ``reads`` knows multiplies; None for that of its input."""
    kind = _kind(module)
    return None if kind is None else kind.multiplied(module)


def base_of(module: Any) -> ops.Base | str | None:
    """The layer's weight as the op takes it; what keeps it from being read; None where no function is for it."""
    kind = _kind(module)
    if kind is None:
        return None
    if torch.compiler.is_compiling():
        return "is written out by its library, which is not compiled with the rest"
    tensor = next((t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None), None)
    if tensor is None or tensor.is_meta:
        return "is offloaded or on the meta device"
    shape = _shape(module)
    if shape is None:
        return "does not say in_features and out_features"
    facts = shape, tensor.device, kind.multiplied(module)
    before = _known.get(module)
    if before is None or before.kind is not kind or before.facts != facts:
        own = weakref.ref(module)
        _known[module] = before = _Known(kind, facts, ops.written_by(lambda: kind.write(own()), *facts))
    return before.base


def _shape(module: Any) -> tuple[int, int] | None:
    n, k = getattr(module, "out_features", None), getattr(module, "in_features", None)
    return (n, k) if isinstance(n, int) and isinstance(k, int) else None


def _kind(module: nn.Module) -> _Kind | None:
    layer: Any = type(module)
    found = _of_class(layer)
    if found is not None:
        known, kind = found
        return kind if layer.forward is getattr(known, "forward", None) else None
    weight = module._parameters.get("weight")
    held: Any = type(weight)
    if weight is None or layer is not nn.Linear or held in _check.PLAIN:
        return None
    found = _of_class(held)
    return None if found is None else found[1]


@functools.lru_cache(maxsize=4096)  # names are made anew each time they are asked for, and calls ask
def _of_class(kind: type) -> tuple[type, _Kind] | None:
    """The nearest base of a class that there is a function for, and that."""
    return next(((base, _KINDS[_name(base)]) for base in kind.__mro__ if _name(base) in _KINDS), None)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
