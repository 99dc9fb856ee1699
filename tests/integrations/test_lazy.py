"""Integrations are attributes from the first import on, and import their package when they are first used."""

import subprocess
import sys
from pathlib import Path

import pytest

import fastpeft

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys, fastpeft\n{code}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("name", "package"), [("peft", "peft"), ("transformers", "transformers"), ("vllm", "vllm")])
def test_each_resolves_on_first_use(name, package):
    """vllm and sglang do without their package until it asks for them."""
    needed = package != "vllm"
    if needed:
        pytest.importorskip(package, reason=f"{package} is not installed")
    run(f"""
assert {package!r} not in sys.modules and "torch" not in sys.modules
fastpeft.integrations
assert {package!r} not in sys.modules and "torch" not in sys.modules
module = fastpeft.integrations.{name}
assert module is sys.modules["fastpeft.integrations.{name}"]
assert ({package!r} in sys.modules) == {needed}
""")


def test_a_package_that_is_missing_is_named():
    run("""
sys.modules["adapters"] = None  # importing it raises ImportError
try:
    fastpeft.integrations.adapters
except ImportError as error:
    assert "pip install adapters" in str(error), error
else:
    raise SystemExit("nothing was raised")
""")


def test_names():
    files = {path.stem for path in (ROOT / "fastpeft/integrations").glob("[!_]*.py")}
    assert set(fastpeft.integrations.__all__) == files <= set(dir(fastpeft.integrations))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fastpeft.integrations.nonsense
