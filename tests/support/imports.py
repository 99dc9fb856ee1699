"""Who imports whom in the package, read from its source: nothing is imported, so torch need not be there."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path.relative_to(ROOT) for folder in ("fastpeft", "kernels") for path in (ROOT / folder).rglob("*.py"))


def module_name(path: Path) -> str:
    """kernels/a.py -> fastpeft.kernels.a; fastpeft/ops/__init__.py -> fastpeft.ops."""
    parts = path.with_suffix("").parts
    parts = ("fastpeft", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = frozenset(map(module_name, FILES))


IMPORT, CALL, CHECK = "import", "call", "check"  # when an import happens; CHECK: never, checkers read it


def imports(path: Path, tree: ast.Module, modules: frozenset[str] = MODULES) -> Iterator[tuple[int, str, str]]:
    """(line, module, when) of every import, with relative names resolved."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.Lambda)]
    guarded = [node for node in ast.walk(tree) if isinstance(node, ast.If) and _is_guard(node.test)]
    when = {id(n): CALL for f in functions for n in ast.walk(f)}
    when |= {id(n): CHECK for node in guarded for statement in node.body for n in ast.walk(statement)}
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            each = [f"{base}.{alias.name}" for alias in node.names]
            names = each if base == "fastpeft" else [name if name in modules else base for name in each]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
        for name in dict.fromkeys(names):
            yield node.lineno, name, when.get(id(node), IMPORT)


def _is_guard(test: ast.expr) -> bool:
    return isinstance(test, ast.Name | ast.Attribute) and ast.unparse(test).endswith("TYPE_CHECKING")


Edge = tuple[str, str]


def edges(files: dict[Path, str]) -> tuple[set[Edge], set[Edge]]:
    """(importer, imported) of the package's modules: those of whole files, TYPE_CHECKING's too, and those of functions.

    A module's own packages are not counted: Python has begun to import them by then.
    """
    whole, late = set(), set()
    known = frozenset(map(module_name, files))
    for path, source in files.items():
        own = module_name(path)
        for _, name, when in imports(path, ast.parse(source), known):
            name = "fastpeft" if name.startswith("fastpeft.__") else name
            if name in known and name != own:
                (late if when == CALL else whole).add((own, name))
    return whole, late


def circles(found: set[Edge]) -> list[list[str]]:
    """The groups of modules that import each other, directly or by way of others."""
    out: dict[str, set[str]] = {}
    for importer, imported in found:
        out.setdefault(importer, set()).add(imported)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = out.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    reach = {module: reached(module) for module in out}
    groups = {frozenset(m for m in reach[module] if module in reach.get(m, ())) for module in out}
    return sorted(sorted(group) for group in groups if group)
