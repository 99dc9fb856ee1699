"""What decides how a call goes on: shapes, strides, dtypes, devices, alignment, gradients, numbers and modes."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

PLAIN = frozenset({Tensor, nn.Parameter})
_VALUES = frozenset({int, bool, str, type(None), torch.dtype})


def _bits(*names: str) -> int:
    return sum({torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr() for name in names})


# Tensors of these kinds are served by Python's way alone.
_OTHERS = _bits("Python", "PythonTLSSnapshot", "FuncTorchBatched", "FuncTorchGradWrapper", "Functionalize")
_OTHERS |= _bits("Conjugate", "Negative", "ZeroTensor", "NestedTensor")


def thread_is_plain() -> bool:
    """Whether no mode, transform or tracing looks at what this thread does."""
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._is_tracing()
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def of_call(arguments: Sequence, tensors: list[Tensor]) -> tuple | None:
    """What calls that look alike have in common, or None for one that is Python's alone.

    Args:
        arguments: tensors, numbers, strings, None, and lists and tuples of those.
        tensors: is given the tensors among them, in their order.
    """
    if not thread_is_plain():
        return None
    facts: list = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), os.environ.get("FASTPEFT_BACKEND")]
    for kind in ("cpu", "cuda"):
        facts.append(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
    return _of(facts, tensors) if _add(arguments, facts, tensors) else None


def of_tensors(tensors: Sequence[Tensor | None]) -> tuple | None:
    """The same for tensors alone, whose gradients nobody asks for."""
    facts: list = []
    given = [tensor for tensor in tensors if tensor is not None]
    if not thread_is_plain() or not all(type(tensor) in PLAIN and _add_tensor(tensor, facts) for tensor in given):
        return None
    facts.append(tuple([tensor is None for tensor in tensors]))
    return _of(facts, given)


def _of(facts: list, tensors: Sequence[Tensor]) -> tuple:
    addresses = [tensor.data_ptr() for tensor in tensors]
    facts.append(tuple([address % 16 == 0 for address in addresses]))  # what Triton compiles for
    if len(set(addresses)) < len(addresses):  # one tensor given twice
        facts.append(tuple([addresses.index(address) for address in addresses]))
    return tuple(facts)


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
