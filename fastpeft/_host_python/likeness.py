"""Whether a call looks like one whose key is known: the same facts as ``key`` holds, asked without making a key."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._C._dynamo.guards import TensorGuards

from . import key, source


def recogniser(arguments: Sequence) -> Callable[[Sequence], list[Tensor] | None]:
    """The function that gives the tensors of a call that looks like this one, and None for any other call.

    Modes, and how many arguments there are, it takes as given. For ``(x, [w], 0.5, None)`` it is::

        def tensors_of(arguments):
            (a0, a1, a2, a3,) = arguments
            if type(a1) is not list or len(a1) != 1: return None
            (a4,) = a1
            if not ((a2 is c0 or type(a2) is float and a2.hex() == c1) and a3 is None): return None
            if not alike(a0, a4): return None
            p0 = a0.data_ptr()
            p1 = a4.data_ptr()
            if (p0 | p1) & 15 or len({p0, p1}) != 2: return None
            return [a0, a4]

    ``alike`` are Dynamo's guards, which compare class, dtype, device, sizes, strides, ``requires_grad`` and dispatch
    keys of all tensors in one call.

    Args:
        arguments: as ``key.of_call`` takes them.
    """
    names, lines, conditions = source.Names(), list[str](), list[str]()
    tensors: list[Tensor] = []
    found = _unpack(arguments, "arguments", names, lines, conditions, tensors, [0])
    once: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in zip(found, tensors, strict=True):
        first, _ = once.setdefault(id(tensor), (name, tensor))
        if first != name:
            conditions.append(f"{name} is {first}")
    if conditions:
        lines.append(f"if not ({' and '.join(conditions)}): return None")
    if once:
        _compare(dict(once.values()), names, lines)
    lines.append(f"return [{', '.join(found)}]")
    return source.function("tensors_of(arguments)", lines, names)


def _compare(named: dict[str, Tensor], names: source.Names, lines: list[str]) -> None:
    """Lines that compare the tensors, which are different objects: Dynamo's guards refuse one that comes twice."""
    tensors = list(named.values())
    sizes: Any = [list(tensor.shape) for tensor in tensors]
    strides: Any = [list(tensor.stride()) for tensor in tensors]
    names.known["alike"] = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    lines.append(f"if not alike({', '.join(named)}): return None")
    lines += [f"p{i} = {name}.data_ptr()" for i, name in enumerate(named)]
    addresses = [f"p{i}" for i in range(len(named))]
    expected = key.of_addresses([tensor.data_ptr() for tensor in tensors])
    if expected == (True, None):  # all are aligned, and apart
        apart = f"len({{{', '.join(addresses)}}}) != {len(addresses)}"
        lines.append(f"if ({' | '.join(addresses)}) & {key.ALIGNED - 1} or {apart}: return None")
    else:
        names.known |= {"of_addresses": key.of_addresses, "expected": expected}
        lines.append(f"if of_addresses([{', '.join(addresses)}]) != expected: return None")


def _unpack(
    items: Sequence, name: str, names: source.Names, lines: list, conditions: list, tensors: list, count: list[int]
) -> list[str]:
    """Lines that give each item a name, and conditions for those that are no tensors; the names of those that are."""
    first, found = count[0], list[str]()
    count[0] += len(items)
    if items:
        lines.append(f"({''.join(f'a{first + i}, ' for i in range(len(items)))}) = {name}")
    for i, item in enumerate(items):
        own, kind = f"a{first + i}", type(item)
        if kind in key.PLAIN:
            tensors.append(item)
            found.append(own)
        elif item is None or kind is bool:
            conditions.append(f"{own} is {item}")
        elif kind is float:  # 0.0 equals -0.0
            conditions.append(
                f"({own} is {names(item)} or type({own}) is float and {own}.hex() == {names(item.hex())})"
            )
        elif kind is list or isinstance(item, tuple):
            lines.append(f"if type({own}) is not {names(kind)} or len({own}) != {names(len(item))}: return None")
            found += _unpack(item, own, names, lines, conditions, tensors, count)
        else:  # 1 equals True
            conditions.append(f"({own} is {names(item)} or type({own}) is {names(kind)} and {own} == {names(item)})")
    return found
