"""pytest plugin: no assertion fails. Kernels of the null GPU write nothing, so values say nothing; other exceptions do.

python -m bench.nullgpu -m pytest -p tests.nullgpu.values_ignored -m "gpu or not slow" FILES
"""

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.excinfo is not None and call.excinfo.errisinstance((AssertionError, pytest.fail.Exception)):
        report = outcome.get_result()
        report.outcome, report.longrepr = "passed", None
