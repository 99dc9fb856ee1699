"""These tests run on the GPU that computes nothing (bench/nullgpu), in an environment of its own."""

from pathlib import Path

import pytest

from bench import nullgpu

# Elsewhere one file says why, and the others' imports cost nothing.
collect_ignore_glob = [] if nullgpu.is_loaded() else ["test_[!d]*.py"]


def pytest_collection_modifyitems(items):
    if not nullgpu.is_loaded():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs the null GPU: make test-nullgpu"))
