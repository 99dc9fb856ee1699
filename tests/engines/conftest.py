"""These tests run vLLM's build for CPUs, in an environment of its own: make test-engines."""

import importlib.util
from pathlib import Path

import pytest

INSTALLED = importlib.util.find_spec("vllm") is not None
# Elsewhere one file says why, and the others' imports cost nothing.
collect_ignore_glob = [] if INSTALLED else ["test_[!v]*.py", "test_vllm_*.py"]


def pytest_collection_modifyitems(items):
    if not INSTALLED:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs vLLM's build for CPUs: make test-engines"))
