"""What tests need before their imports: the interpreter where there is no GPU, no network, threads to fit the cores."""

import importlib.util
import os

import pytest
import torch

from tests.support import interpreter, session

# Triton reads TRITON_INTERPRET when a kernel is decorated, so it is set before any test module is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton") is not None:
        interpreter.correct()
elif os.environ.get("TRITON_INTERPRET") == "1":
    pytest.exit("a GPU is visible, yet TRITON_INTERPRET=1 would test the interpreter: unset it or hide the GPU", 2)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# With xdist, workers share the cores: threads of one beside threads of another only slow both down.
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
threads = max(1, (os.cpu_count() or 1) // workers)
torch.set_num_threads(threads)
os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        session.begin()


def pytest_unconfigure(config):
    if not hasattr(config, "workerinput"):
        session.end()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "slow" not in item.keywords)  # so that no worker is left with a long one at the end
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    """What tests recorded: error against float64 over plain PyTorch's, and which adapters can be attached in turn."""
    passed = terminalreporter.stats.get("passed", [])
    pairs = [value for report in passed for name, value in report.user_properties if name == "pairs"]
    if pairs:
        terminalreporter.section("adapters attached (down) before others (across), of which neither reads the other")
        for line in pairs:
            terminalreporter.line(line)
    rows = [(report.nodeid, value) for report in passed for name, value in report.user_properties if name == "ratio"]
    if rows:
        terminalreporter.section("error over that of plain PyTorch at the same dtype (at most 2 max, 1.2 rms)")
        for nodeid, value in sorted(rows):
            terminalreporter.line(f"{value}  {nodeid.rpartition('::')[2]}")
