"""pytest plugin: records every test's outcome and, where FASTPEFT_SUITE=fused, registers our layer in every LoraConfig.

run.py starts it; FASTPEFT_SUITE_OUT is the folder it writes to.
"""

import collections
import json
import os
from pathlib import Path

_CALLS = collections.Counter()
_OUTCOMES = {}
_FUSED = os.environ["FASTPEFT_SUITE"] == "fused"


def pytest_configure(config):
    if _FUSED:
        _register_everywhere()


def _register_everywhere():
    from peft import LoraConfig

    import fastpeft
    from fastpeft.integrations import _fusable

    complete, plan = LoraConfig.__post_init__, _fusable.plan

    def registered(self):
        complete(self)
        fastpeft.register(self)

    def counted(layer, x=None):
        made = plan(layer, x)
        if x is not None:
            _CALLS["fused" if isinstance(made, list) else made] += 1
        return made

    LoraConfig.__post_init__, _fusable.plan = registered, counted


def pytest_runtest_logreport(report):
    # A test's outcome is its call's, unless set-up skipped it or set-up or teardown failed.
    if report.when == "call" or report.outcome != "passed":
        outcome = report.outcome
        if hasattr(report, "wasxfail"):
            outcome = "xfailed" if outcome == "skipped" else "xpassed"
        _OUTCOMES[report.nodeid] = outcome if report.when != "teardown" else "error"


def pytest_sessionfinish(session):
    out = Path(os.environ["FASTPEFT_SUITE_OUT"])
    if _CALLS:  # in each xdist worker
        (out / f"calls-{os.getpid()}.json").write_text(json.dumps(_CALLS))
    if not hasattr(session.config, "workerinput"):
        (out / "outcomes.json").write_text(json.dumps(_OUTCOMES))
