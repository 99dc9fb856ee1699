"""Functions that are written out for one case, as source, and compiled: a loop over closures costs several times more.

``dataclasses`` and ``collections.namedtuple`` make their methods so. What differs between cases that are alike (sizes,
tensors, numbers) is not in the source but among its names, so that one compilation serves them all.
"""

import builtins
import functools
import linecache
from collections.abc import Sequence
from types import CodeType, FunctionType
from typing import Any


class Names:
    """The objects that a source speaks of, each under a name of its own."""

    def __init__(self, **known: Any):
        self.known = known | {"__builtins__": builtins}
        self._of: dict[int, str] = {}  # by identity; ``known`` keeps the objects alive

    def __call__(self, value: Any) -> str:
        """The value's name; None, True and False have theirs."""
        if value is None or type(value) is bool:
            return repr(value)
        found = self._of.get(id(value))
        if found is None:
            found = self._of[id(value)] = f"c{len(self._of)}"
            self.known[found] = value
        return found


def function(head: str, lines: Sequence[str], names: Names) -> FunctionType:
    """The function of this body.

    Args:
        head: its name and parameters, as in ``"holds(x)"``.
        lines: of its body, without their indentation.
        names: what they speak of.
    """
    source = f"def {head}:\n" + "".join(f"    {line}\n" for line in lines)
    # A copy: the interpreter learns where a function's names are, and would learn it anew for each that shares a code.
    return FunctionType(_compiled(source).replace(), names.known)


@functools.lru_cache(1024)
def _compiled(source: str) -> CodeType:
    file = f"<fastpeft plan {hash(source) & 0xFFFFFFFF:08x}>"
    linecache.cache[file] = len(source), None, source.splitlines(True), file  # a traceback shows the line
    return next(found for found in compile(source, file, "exec").co_consts if isinstance(found, CodeType))
