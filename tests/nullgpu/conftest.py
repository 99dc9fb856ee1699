"""These tests run on the GPU that computes nothing (bench/nullgpu), in an environment of its own."""

from pathlib import Path

import pytest

from bench import nullgpu


def pytest_collection_modifyitems(items):
    if not nullgpu.is_loaded():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs the null GPU: make test-nullgpu"))
