"""Laws of the files, read from their text: how long one may be, and that no test takes another's things.

Only text is read, so the pre-commit hook runs this where torch is not installed.
"""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("fastpeft", "kernels", "tests", "bench", "examples")
CODE = {".py", ".h", ".cpp", ".sh"}
LINES = 300
# Examples are scripts: what they import of one another lies beside them.
ON_PATH = {"tests/tools/demo/conftest.py", "bench/nullgpu/__main__.py"}


def files() -> list[str]:
    """Of git, or all that lie there where there is no git."""
    done = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True)
    found = [ROOT / line for line in done.stdout.splitlines()]
    found = found or [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    return sorted(str(path.relative_to(ROOT)) for path in found if path.suffix in CODE and path.is_file())


def lines_of(path: str) -> int:
    return len((ROOT / path).read_text().splitlines())


def test_law_length():
    assert [f"{path}: {lines_of(path)} lines" for path in files() if lines_of(path) > LINES] == []


def foreign_tests(path: str, source: str) -> list[str]:
    """Imports of test files and of conftest.py, by whatever name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(alias.name for alias in node.names)]
        parts = {part for name in names for part in name.split(".")}
        if any(part.startswith("test_") or part == "conftest" for part in parts):
            found.append(f"{path}:{node.lineno}: imports a test; what two share has its file in tests/support")
    return found


def import_paths(path: str, source: str) -> list[str]:
    """Changes of sys.path, by which a module's name depends on who was imported before."""
    if path in ON_PATH:
        return []
    found = [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path")
        or (isinstance(node, ast.Attribute) and node.attr == "syspath_prepend")
        or (isinstance(node, ast.ImportFrom) and node.module == "sys" and "path" in {a.name for a in node.names})
    ]
    return [f"{path}:{line}: sys.path is not changed; bench and tests are packages" for line in found]


def lost_tests(path: str, source: str) -> list[str]:
    """Tests in a file that pytest does not collect."""
    name = Path(path).name
    if not path.startswith("tests/") or name.startswith("test_"):
        return []
    tests = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return [f"{path}:{node.lineno}: {node.name} is never run" for node in tests if node.name.startswith("test_")]


RULES = [foreign_tests, import_paths, lost_tests]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_law(rule):
    sources = {path: (ROOT / path).read_text() for path in files() if path.endswith(".py")}
    assert len(sources) > 100
    assert [line for path, source in sources.items() for line in rule(path, source)] == []


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (foreign_tests, "tests/test_a.py", "from tests.methods.test_b import model"),
        (foreign_tests, "tests/test_a.py", "def f():\n    from . import test_b"),
        (foreign_tests, "bench/a.py", "import tests.ops.conftest as shared"),
        (import_paths, "tests/test_a.py", "import sys\nsys.path.insert(0, 'bench')"),
        (import_paths, "bench/a.py", "import sys\nsys.path[0] = 'bench'"),
        (import_paths, "tests/test_a.py", "from sys import path"),
        (import_paths, "tests/test_a.py", "def test_a(monkeypatch):\n    monkeypatch.syspath_prepend('bench')"),
        (lost_tests, "tests/ops/cases.py", "def test_a():\n    pass"),
    ],
)
def test_law_can_fail(rule, path, source):
    assert len(rule(path, source)) == 1


def test_law_can_pass():
    source = "import sys\nfrom tests.support.models import llama\nfrom fastpeft import testing\nsys.modules\n"
    assert [line for rule in RULES for line in rule("tests/test_a.py", source + "def test_a():\n    pass\n")] == []
