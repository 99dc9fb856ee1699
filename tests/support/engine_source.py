"""What a source tree says of an engine's interface, read with ast, and what was recorded of released versions.

python tests/support/engine_source.py vllm 0.33.0 /path/to/unpacked/wheel      # adds a version to recorded/vllm.json
"""

import ast
import importlib.util
import inspect
import json
import os
import re
import sys
from pathlib import Path

RECORDED = Path(__file__).parent / "recorded"


def recorded(package: str) -> dict[str, dict[str, str]]:
    """For each version what its source says of each name: ``"(self, y, x, *, buffer=None)"``, property or attribute."""
    return json.loads((RECORDED / f"{package}.json").read_text())


def tree_of(package: str) -> Path | None:
    """The folder that holds the package's source: named by the environment, or where it is installed."""
    named = os.environ.get(f"FASTPEFT_{package.upper()}_SOURCE")
    if named:
        return Path(named)
    spec = importlib.util.find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))).parent if spec else None


def said(tree: Path, target: str) -> str:
    """What the source under ``tree`` says of ``"module:Class.name"``, in the form in which it is recorded."""
    module, _, path = target.partition(":")
    file = tree / Path(*module.split(".")).with_suffix(".py")
    if not file.is_file():
        raise ImportError(f"no file {file}")
    source = file.read_text()
    *outer, name = path.split(".")
    node = ast.parse(source)
    for part in outer:
        node = next((n for n in node.body if isinstance(n, ast.ClassDef) and n.name == part), None)
        if node is None:
            raise AttributeError(f"no class {part}")
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and child.name == name:
            decorators = {ast.unparse(decorator) for decorator in child.decorator_list}
            return "property" if "property" in decorators else _names_only(child.args)
        if isinstance(child, ast.AnnAssign) and ast.unparse(child.target) == name:
            return "attribute"
    if re.search(rf"\bself\.{name}\b", ast.get_source_segment(source, node) or ""):
        return "attribute"
    raise AttributeError(f"no {name}")


def _names_only(args: ast.arguments) -> str:
    for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg):
        if arg is not None:
            arg.annotation = None
    args.defaults = [ast.Constant(None) for _ in args.defaults]
    args.kw_defaults = [default and ast.Constant(None) for default in args.kw_defaults]
    return f"({ast.unparse(args)})"


def present(text: str) -> inspect.Signature | str:
    """The recorded form as ``fastpeft.integrations._interface`` compares it."""
    if not text.startswith("("):
        return text
    names: dict = {}
    exec(f"def function{text}: pass", names)
    return inspect.signature(names["function"])


def looker(names: dict[str, str]):
    """For ``_interface.problems``: looks into what was recorded."""

    def look(target):
        if target not in names:
            raise AttributeError("not recorded")
        return present(names[target])

    return look


if __name__ == "__main__":
    package, version, tree = sys.argv[1:]
    plugin = importlib.import_module(f"fastpeft.integrations.{package}")
    interface = plugin.INTERFACE | getattr(plugin, "CPU_INTERFACE", {})
    file = RECORDED / f"{package}.json"
    versions = json.loads(file.read_text()) if file.exists() else {}
    versions[version] = {target: said(Path(tree), target) for target in interface}
    ordered = sorted(versions, key=lambda name: [int(part) for part in name.split(".")])
    file.write_text(json.dumps({name: versions[name] for name in ordered}, indent=1) + "\n")
