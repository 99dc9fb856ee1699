"""Which modules' weights a function takes, from its byte code: for classes that have no source, as those of a shell."""

import dis
from collections.abc import Collection
from typing import Any


def reads_of_code(function: Any, asked: Collection[str]) -> set[tuple[str, ...]]:
    """The paths in every ``self.<path>.weight``, except where the weight is only asked about.

    Args:
        function: A method, whose first argument is the module.
        asked: Attributes of a weight that are no use of it (``dtype``).
    """
    code = getattr(function, "__code__", None)
    if code is None or not code.co_argcount:
        return set()
    found: set[tuple[str, ...]] = set()
    path: tuple[str, ...] | None = None
    taken: tuple[str, ...] | None = None  # whose weight is on top of the stack
    for step in dis.get_instructions(code):
        if step.opname in ("CACHE", "EXTENDED_ARG", "NOP"):
            continue
        attribute = step.argval if step.opname in ("LOAD_ATTR", "LOAD_METHOD") else None
        if taken and attribute not in asked:
            found.add(taken)
        taken = None
        if attribute is None:
            first = step.opname.startswith("LOAD_FAST") and step.argval == code.co_varnames[0]
            path = () if first else None
        elif path is not None:
            taken = path if attribute == "weight" else None
            path = (*path, attribute)
    return found
