"""pytest plugin: tests run to their end, whatever the values: the null GPU's kernels write nothing.

    python -m bench.nullgpu -m pytest -p tests.nullgpu.values_ignored -m "gpu or not slow" FILES

What counts is everything else: exceptions, and assertions that read shapes, dtypes, strides, devices or launches. Any
other assertion of tests/ is evaluated and not judged.
"""

import ast
import importlib.machinery
import importlib.util
import sys
from pathlib import Path

from bench.nullgpu.values import ignore_values

ROOT = Path(__file__).parents[2]
REAL = {"shape", "dtype", "device", "stride", "is_contiguous", "numel", "nbytes", "launches", "syncs", "refused"}
VALUES = {"equal", "allclose", "all", "any", "item", "tolist", "sum", "max", "min", "isfinite", "isnan"}


class _Unjudged(ast.NodeTransformer):
    """``assert x`` becomes ``not x``, unless it reads what is real here and nothing that is not."""

    def visit_Assert(self, node: ast.Assert) -> ast.stmt:
        names = {getattr(part, "attr", getattr(part, "id", None)) for part in ast.walk(node.test)}
        if names & REAL and not names & VALUES:
            return node
        return ast.copy_location(ast.Expr(ast.UnaryOp(ast.Not(), node.test)), node)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str):
        """From the source, since what is compiled here is for here alone."""
        tree = ast.parse(Path(self.path).read_bytes(), self.path)
        return compile(ast.fix_missing_locations(_Unjudged().visit(tree)), self.path, "exec")


class _Finder:
    """Finds modules of tests/ before pytest's own finder, which rewrites their assertions."""

    @staticmethod
    def find_spec(name: str, path=None, target=None):
        if not name.startswith("tests."):
            return None
        file = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        loader = _Loader(name, str(file))
        return importlib.util.spec_from_file_location(name, file, loader=loader) if file.is_file() else None


def pytest_configure(config):
    sys.meta_path.insert(0, _Finder)
    ignore_values()
