"""What the plugins have in common: how every test ends, and stand-ins for packages that tests import and do not use."""

import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from pathlib import Path

_OUTCOMES = {}


def pytest_runtest_logreport(report):
    # A test's outcome is its call's, unless set-up skipped it or set-up or teardown failed.
    if report.when == "call" or report.outcome != "passed":
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if outcome == "skipped" else "xpassed"
        _OUTCOMES[report.nodeid] = outcome if report.when != "teardown" else "error"


def write_outcomes(session):
    """By the process that has them all."""
    if not hasattr(session.config, "workerinput"):
        Path(os.environ["FASTPEFT_SUITE_OUT"], "outcomes.json").write_text(json.dumps(_OUTCOMES))


class _Anything(types.ModuleType):
    """Stands for a package that tests import and that those which run here do not use."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stand_in(*names):
    """Have an empty package where there is none of this name."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = _Anything(name)
            sys.modules[name].__version__ = "0"
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
