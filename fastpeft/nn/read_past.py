"""Layers whose weight is read past their forward: another module takes ``self.proj.weight`` and calls no ``proj``.

What is put around such a layer, or hooked to it, takes no part in what the model computes and gets no gradient: the
projections that Mamba's fused kernels take, ``nn.MultiheadAttention``'s ``out_proj``, a matrix that is multiplied by
hand. They are found in the source of the module that reads them: in its ``forward`` and whatever that calls of its own,
along every path that its settings and the arguments' defaults leave open. ``self.training`` leaves both open.

A weight that is changed in place there counts too: RWKV divides some by powers of two in evaluation, and what stands
beside them would stay as large as it was.
"""

import inspect
from types import FunctionType
from typing import Any

from torch import nn

from .protocol import original_child
from .read_body import Path, Reader

# Their fused inference reads weights, but ``methods.bypasses`` has it call the layers.
_SERVED = (nn.TransformerEncoderLayer, nn.TransformerEncoder)


def read_past(model: nn.Module) -> dict[str, str]:
    """Path and reason of every module in ``model`` whose weight another one reads past its forward.

    Args:
        model: Any module; it is not called and not changed.
    """
    found: dict[str, str] = {}
    reads: dict[tuple, bool] = {}  # whether modules built like this one take a weight along any path at all
    for path, module in model.named_modules():
        forward = _forward(module)
        built = (forward, type(module), *((name, type(child)) for name, child in module._modules.items()))
        if built not in reads:
            own = not module._modules or original_child(module) is not None or _is_served(module)
            reads[built] = not own and bool(_read_by(module, True))
        if reads[built]:
            for child, how in _read_by(module).items():
                for target in _at(module, child):
                    reason = f"read past its forward, since {type(module).__name__} {how}"
                    found.setdefault(f"{path}.{target}" if path else target, reason)
    return found


def _is_served(module: nn.Module) -> bool:
    served = next((kind for kind in _SERVED if isinstance(module, kind)), None)
    return served is not None and _forward(module) is inspect.unwrap(served.forward)


def _read_by(module: nn.Module, everywhere: bool = False) -> dict[Path, str]:
    reader = Reader(module, everywhere)
    reader.method(_forward(module), ())
    return reader.found


def _forward(module: nn.Module) -> Any:
    """The function that a call runs: one set on the instance, unless it hides what it is, else the class's."""
    own = inspect.unwrap(module.__dict__.get("forward", type(module).forward))
    own = getattr(own, "__func__", own)
    return own if isinstance(own, FunctionType) else inspect.unwrap(type(module).forward)


def _at(module: nn.Module, path: Path) -> list[str]:
    """The paths of the modules that are there, for one with "*"."""
    found: list[tuple[str, nn.Module]] = [("", module)]
    for name in path:
        found = [
            (f"{at}.{child}" if at else child, inner)
            for at, outer in found
            for child, inner in outer._modules.items()
            if inner is not None and name in (child, "*")
        ]
    return [at for at, inner in found if at and "weight" in {*inner._parameters, *dir(type(inner)), *inner.__dict__}]
