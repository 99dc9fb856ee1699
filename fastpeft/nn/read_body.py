"""What a module's forward may run, read from its source, and whose weights it takes on the way (``read_past``)."""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Collection
from types import FunctionType
from typing import Any

from torch import nn

from .read_code import reads_of_code
from .read_conditions import Settings, truth

Path = tuple[str, ...]  # of a module, from the one that reads; "*" is any child
_DEPTH = 4  # of calls that are followed
# What is asked of a weight without computing with it. ``data`` has no gradient, whoever reads it.
_ASKED = frozenset(
    "data dtype device shape size dim ndim numel requires_grad requires_grad_ is_meta is_cuda is_cpu layout stride "
    "element_size is_floating_point is_contiguous data_ptr grad __class__".split()
)
_ASKING = frozenset({"isinstance", "hasattr", "type", "id", "callable"})
_TAKEN, _CHANGED = "computes with its weight itself", "changes its weight in place"


@functools.lru_cache(maxsize=4096)
def _tree(function: Callable) -> ast.FunctionDef | None:
    """The function's syntax; None where it has no source."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError):
        return None
    return body[0] if body and isinstance(body[0], ast.FunctionDef) else None


def parameters_of(function: Any) -> list[str]:
    """Names of the arguments that may be given by position."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return [] if code is None else list(code.co_varnames[: code.co_argcount])


def returns_several(function: Callable) -> bool:
    """Whether a tuple is written where the function returns; not without its source."""
    tree = _tree(inspect.unwrap(function))
    return tree is not None and any(
        isinstance(n, ast.Return) and isinstance(n.value, ast.Tuple) for n in ast.walk(tree)
    )


class Reader:
    """Walks what a module's forward may run, and notes the modules whose weights it takes.

    Args:
        module: The module.
        everywhere: Whether to take every path, whatever is known of its conditions.
    """

    def __init__(self, module: nn.Module, everywhere: bool = False):
        self.module, self.everywhere = module, everywhere
        self.found, self.seen = dict[Path, str](), set[tuple]()

    def at(self, path: Path) -> nn.Module | None:
        """The module at a path, if that is one."""
        found: nn.Module | None = self.module
        for name in path:
            found = None if found is None else found._modules.get(name)
        return found

    def method(self, function: Any, owner: Path, depth: int = 0) -> None:
        """Read a method of the module at ``owner`` that is called without arguments that matter."""
        names = parameters_of(function)
        if names:
            self.function(function, {names[0]: owner}, depth, owner)

    def function(
        self, function: Any, bound: dict[str, Path], depth: int, owner: Path | None, given: Collection[str] = ()
    ) -> None:
        """Read one function, whose arguments ``bound`` are these modules; those not ``given`` have their defaults."""
        function = inspect.unwrap(function)
        key = (function, *sorted(bound.items()), *sorted(given))
        if depth > _DEPTH or key in self.seen:
            return
        self.seen.add(key)
        tree = _tree(function)
        if tree is None:
            if owner == ():
                self.found.update(dict.fromkeys(reads_of_code(function, _ASKED), _TAKEN))
            return
        _Body(self, function, tree, bound, depth, owner, given).block(tree.body)


class _Body:
    """One function's statements."""

    def __init__(
        self,
        reader: Reader,
        function: Any,
        tree: ast.FunctionDef,
        bound: dict[str, Path],
        depth: int,
        owner: Path | None,
        given: Collection[str],
    ):
        self.reader, self.function, self.depth, self.owner = reader, function, depth, owner
        self.modules: dict[str, Path] = dict(bound)  # by the local names that stand for them
        unknown = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        unknown.update(given)
        parameters = () if "*" in given else inspect.signature(function).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.name not in unknown}
        known = [(name, module) for name, path in bound.items() if (module := reader.at(path)) is not None]
        self.settings = Settings(dict(known), defaults)

    def truth(self, condition: ast.expr) -> bool | None:
        return None if self.reader.everywhere else truth(condition, self.settings)

    def block(self, statements: list[ast.stmt]) -> bool:
        """Read statements in their order; returns whether they certainly leave the function."""
        return any(self.statement(statement) for statement in statements)

    def statement(self, node: ast.stmt) -> bool:
        if isinstance(node, ast.If):
            self.expression(node.test)
            known = self.truth(node.test)
            left = [
                self.block(part) for part, open_ in ((node.body, True), (node.orelse, False)) if known in (None, open_)
            ]
            return all(left)
        if isinstance(node, ast.For | ast.AsyncFor):
            self.name(node.target, node.iter)
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            self.name_one(node.targets[0], node.value)
        for field in ast.iter_child_nodes(node):
            if isinstance(field, ast.stmt):
                self.statement(field)
            elif isinstance(field, ast.ExceptHandler):
                self.block(field.body)
            else:
                self.expression(field)
        return isinstance(node, ast.Return | ast.Raise)

    def expression(self, node: ast.AST, how: str | None = _TAKEN) -> None:
        """Read an expression; ``how`` says what is done with it, None that it is only asked about."""
        if isinstance(node, ast.IfExp):
            known = self.truth(node.test)
            for part, open_ in ((node.body, True), (node.orelse, False)):
                if known in (None, open_):
                    self.expression(part)
            self.expression(node.test)
            return
        if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
            for generator in node.generators:
                self.name(generator.target, generator.iter)
        if isinstance(node, ast.Attribute):
            self.property(node)
        path = self.weight_of(node)
        if path and how is not None:
            self.reader.found.setdefault(path, how)
        if isinstance(node, ast.Call):
            self.call(node)
        for child in ast.iter_child_nodes(node):
            self.expression(child, _use(node))

    def property(self, node: ast.Attribute) -> None:
        """Follow a property of a module's class."""
        path = self.module_of(node.value)
        module = None if path is None else self.reader.at(path)
        if path is not None and module is not None and node.attr != "weight":
            found = inspect.getattr_static(type(module), node.attr, None)
            if isinstance(found, property) and isinstance(found.fget, FunctionType):
                self.reader.method(found.fget, path, self.depth + 1)

    def weight_of(self, node: ast.AST) -> Path | None:
        """The module whose weight an expression takes."""
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            return self.module_of(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) and node.args[1].value == "weight":
                return self.module_of(node.args[0])
        return None

    def module_of(self, node: ast.AST) -> Path | None:
        """The path of the module that an expression is, if it is one."""
        if isinstance(node, ast.Name):
            return self.modules.get(node.id)
        if isinstance(node, ast.Attribute):
            outer = self.module_of(node.value)
            return None if outer is None else (*outer, node.attr)
        if isinstance(node, ast.Subscript):
            outer = self.module_of(node.value)
            if outer is None:
                return None
            index = node.slice
            known = isinstance(index, ast.Constant) and isinstance(index.value, int | str)
            return (*outer, str(index.value) if known else "*")  # type: ignore[attr-defined]
        return None

    def name(self, target: ast.AST, items: ast.AST) -> None:
        """A loop gives names to the children of one module, or of several."""
        if isinstance(items, ast.Call) and isinstance(items.func, ast.Name) and items.func.id in ("enumerate", "zip"):
            names = target.elts if isinstance(target, ast.Tuple) else []
            names = names[1:] if items.func.id == "enumerate" else names
            for name, given in zip(names, items.args, strict=False):
                self.name(name, given)
            return
        outer = self.module_of(items)
        if outer is not None and isinstance(target, ast.Name):
            self.modules[target.id] = (*outer, "*")

    def name_one(self, target: ast.AST, value: ast.AST) -> None:
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=False))
        for one, given in pairs:
            path = self.module_of(given)
            if isinstance(one, ast.Name) and path is not None:
                self.modules[one.id] = path

    def call(self, node: ast.Call) -> None:
        """Follow a method of a module's, and a function that is handed modules."""
        callee, owner = self.callee(node.func)
        if callee is None:
            return
        names = parameters_of(callee)
        bound = {} if owner is None or not names else {names[0]: owner}
        given = dict(zip(names[len(bound) :], node.args, strict=False)) | {k.arg or "*": k.value for k in node.keywords}
        if any(isinstance(value, ast.Starred) for value in node.args):
            given["*"] = node
        bound |= {name: path for name, value in given.items() if (path := self.module_of(value)) is not None}
        if bound:
            self.reader.function(callee, bound, self.depth + 1, owner, given)

    def callee(self, node: ast.AST) -> tuple[Any, Path | None]:
        """What is called, where it is a function that can be read, and the path of the module it is a method of."""
        if isinstance(node, ast.Name):
            found = inspect.unwrap(self.function).__globals__.get(node.id)
            return (found, None) if isinstance(found, FunctionType) else (None, None)
        if not isinstance(node, ast.Attribute):
            return None, None
        above = isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
        above = above and node.value.func.id == "super"  # type: ignore[attr-defined]
        path = self.owner if above else self.module_of(node.value)
        module = None if path is None else self.reader.at(path)
        if path is None or module is None:
            return None, None
        found = self.above(type(module), node.attr) if above else inspect.getattr_static(type(module), node.attr, None)
        if isinstance(found, staticmethod):
            return found.__func__, None
        own = isinstance(found, FunctionType) and (node.attr == "forward" or not hasattr(nn.Module, node.attr))
        return (found, path) if own else (None, None)

    def above(self, kind: type, name: str) -> Any:
        """What ``super().name`` means in this function."""
        line = kind.__mro__
        here = (i for i, base in enumerate(line) if any(_is(value, self.function) for value in vars(base).values()))
        return next((vars(base)[name] for base in line[next(here, len(line)) + 1 :] if name in vars(base)), None)


def _use(node: ast.AST) -> str | None:
    """What an expression does with the parts of it."""
    if isinstance(node, ast.Attribute):
        return None if node.attr in _ASKED else _CHANGED if re.fullmatch(r"[a-z]\w*[a-z]_", node.attr) else _TAKEN
    asks = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKING
    asks |= isinstance(node, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops)
    return None if asks else _TAKEN


def _is(value: Any, function: Any) -> bool:
    return isinstance(value, FunctionType) and inspect.unwrap(value) is inspect.unwrap(function)
