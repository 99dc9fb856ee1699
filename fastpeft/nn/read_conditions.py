"""What is known of a condition in a module's code before it runs: from its settings and the arguments' defaults."""

import ast
import inspect
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

UNKNOWN = object()
_PLAIN = (bool, int, float, str, type(None))
_COMPARE: dict[type, Any] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip


class Settings(NamedTuple):
    """What is known where a condition stands.

    Attributes:
        modules: What is a module, by its local name: ``self``.
        defaults: Values of arguments that are taken to be left out.
    """

    modules: Mapping[str, nn.Module]
    defaults: Mapping[str, Any]


def truth(node: ast.AST, settings: Settings) -> bool | None:
    """Whether a condition holds; None where that may change from call to call, as ``self.training`` does."""
    if isinstance(node, ast.BoolOp):
        known = [truth(value, settings) for value in node.values]
        decides = isinstance(node.op, ast.Or)
        return decides if decides in known else None if None in known else not decides
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        known_one = truth(node.operand, settings)
        return None if known_one is None else not known_one
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        left, right = _value(node.left, settings), _value(node.comparators[0], settings)
        if left is UNKNOWN or right is UNKNOWN:
            return None
        try:
            return bool(_COMPARE[type(node.ops[0])](left, right))
        except TypeError:
            return None
    value = _value(node, settings)
    return None if value is UNKNOWN else bool(value)


def _value(node: ast.AST, settings: Settings) -> Any:
    found = _object(node, settings)
    return found if isinstance(found, _PLAIN) else UNKNOWN


def _object(node: ast.AST, settings: Settings) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return settings.modules.get(node.id, settings.defaults.get(node.id, UNKNOWN))
    if isinstance(node, ast.Attribute) and node.attr != "training":
        outer = _object(node.value, settings)
        # Looked up without running anything: what a property computes may change, and is no plain value.
        return UNKNOWN if outer is UNKNOWN else inspect.getattr_static(outer, node.attr, UNKNOWN)
    return UNKNOWN
