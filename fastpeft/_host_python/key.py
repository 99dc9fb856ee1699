"""What decides how a call goes on: shapes, strides, dtypes, devices, alignment, gradients, numbers and modes."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

PLAIN = frozenset({Tensor, nn.Parameter})
ALIGNED = 16  # bytes, what Triton compiles for
_VALUES = frozenset({int, bool, str, type(None), torch.dtype})

_ENVIRON: Any = os.environ
_ENVIRONMENT, _BACKEND = _ENVIRON._data, _ENVIRON.encodekey("FASTPEFT_BACKEND")  # past a decoding at every call
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_is_tracing, _transform = torch._C._is_tracing, torch._C._functorch.peek_interpreter_stack
_grad_mode, _inference_mode = torch.is_grad_enabled, torch.is_inference_mode_enabled
_any_autocast = torch._C._is_any_autocast_enabled


def _bits(*names: str) -> int:
    return sum({torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr() for name in names})


# Tensors of these kinds are served by Python's way alone.
_OTHERS = _bits("Python", "PythonTLSSnapshot", "FuncTorchBatched", "FuncTorchGradWrapper", "Functionalize")
_OTHERS |= _bits("Conjugate", "Negative", "ZeroTensor", "NestedTensor")


def thread_is_plain() -> bool:
    """Whether no mode, transform or tracing looks at what this thread does."""
    return not (
        _dispatch_modes()
        or _function_modes()
        or _is_tracing()
        or forward_ad._current_level >= 0
        or _transform() is not None
    )


def modes() -> tuple | None:
    """What decides beside the arguments, or None where the call is Python's alone."""
    if not thread_is_plain():
        return None
    backend = _ENVIRONMENT.get(_BACKEND)
    if not _any_autocast():
        return _grad_mode(), _inference_mode(), backend
    casts = [torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None for kind in ("cpu", "cuda")]
    return _grad_mode(), _inference_mode(), backend, *casts


def cast_to(x: Tensor) -> torch.dtype | None:
    """The dtype of autocast on the tensor's device; None where there is none."""
    if not _any_autocast():
        return None
    kind = x.device.type
    on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def of_call(arguments: Sequence, tensors: list[Tensor]) -> tuple | None:
    """What calls that look alike have in common, or None for one that is Python's alone.

    Args:
        arguments: tensors, numbers, strings, None, and lists and tuples of those.
        tensors: is given the tensors among them, in their order.
    """
    found = modes()
    if found is None:
        return None
    facts: list = [found]
    return _of(facts, tensors) if _add(arguments, facts, tensors) else None


def of_tensors(tensors: Sequence[Tensor | None]) -> tuple | None:
    """The same for tensors alone, whose gradients nobody asks for."""
    facts: list = []
    given = [tensor for tensor in tensors if tensor is not None]
    if not thread_is_plain() or not all(type(tensor) in PLAIN and _add_tensor(tensor, facts) for tensor in given):
        return None
    facts.append(tuple([tensor is None for tensor in tensors]))
    return _of(facts, given)


def of_addresses(addresses: Sequence[int]) -> tuple:
    """Which tensors are aligned, True for all, and which are one tensor given twice, None for none."""
    aligned = [address % ALIGNED == 0 for address in addresses]
    apart = len(set(addresses)) == len(addresses)
    same = None if apart else tuple([addresses.index(address) for address in addresses])
    return all(aligned) or tuple(aligned), same


def _of(facts: list, tensors: Sequence[Tensor]) -> tuple:
    return *facts, of_addresses([tensor.data_ptr() for tensor in tensors])


def _add_tensor(tensor: Tensor, facts: list) -> bool:
    keys = torch._C._dispatch_keys(tensor).raw_repr()
    facts.append((tensor.dtype, tensor.device, tensor.shape, tensor.stride(), tensor.requires_grad, keys))
    return not keys & _OTHERS and tensor.layout is torch.strided and not tensor.is_meta


def _add(arguments: Sequence, facts: list, tensors: list[Tensor]) -> bool:
    for argument in arguments:
        kind = type(argument)
        facts.append(kind)  # 1 equals True
        if kind in PLAIN:
            if not _add_tensor(argument, facts):
                return False
            tensors.append(argument)
        elif kind is float:
            facts.append(argument.hex())  # 0.0 equals -0.0
        elif kind in _VALUES:
            facts.append(argument)
        elif kind is list or isinstance(argument, tuple):
            facts.append(len(argument))
            if not _add(argument, facts, tensors):
                return False
        else:
            return False
    return True
